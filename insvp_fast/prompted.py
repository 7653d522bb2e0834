"""PromptedViT: the function of ``PromptedReference``, with the backbone computed by the operations of this package."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from insvp_fast import coverage, reference
from insvp_fast.backbone_settings import BackboneSettings
from insvp_fast.backbones import BackboneFamily, BlockOptions, embeds_by_operations, family_of, only_operations
from insvp_fast.checkpoints.backbone import create_frozen
from insvp_fast.coverage import Covered, Requirements
from insvp_fast.coverage.copies import with_tensors
from insvp_fast.coverage.rules import foreign, full_name
from insvp_fast.ops.graphs import Ahead, Graphs
from insvp_fast.ops.programs import Programs
from insvp_fast.reference import Prompts
from insvp_fast.reference.prompted import PromptedReference, check_blocks
from insvp_fast.reference.structure import pixel_layer
from insvp_fast.runtime import cuda_graphs, hardware, native, products, torch_private
from insvp_fast.runtime.elementwise import sum_of

__all__ = ["PromptedViT"]

T = TypeVar("T")

# recompute="block" keeps the input of every second block, and in backward the activations of two blocks at a time. For
# 12 blocks the sum of both is smallest with two.
BLOCKS_PER_CHECKPOINT = 2


class PromptedViT(BackboneSettings, Covered, PromptedReference):
    """A frozen backbone with prompts, on the fast path where that covers the backbone, else as ``PromptedReference``.

    How the backbone is computed is set by the attributes of ``BackboneSettings``, at any time.
    """

    _create = staticmethod(create_frozen)
    replaced_methods = ("forward_features", "forward_head", "block_outputs", "apply_block")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pixel_scales: dict[object, tuple[Tensor, Tensor]] = {}

    # which path

    @property
    def _family(self) -> BackboneFamily:
        # a backbone without a family takes the general path
        return cast("BackboneFamily", family_of(self.backbone))

    def _requirements(self) -> Requirements:
        table = self._family.requirements(self.backbone, self.patch_size)
        return Requirements("backbone", self.backbone, table, frozen=True)

    def _requirements_depend_on(self) -> object:
        return self.backbone, self.patch_size

    def _own_reason(self) -> str | None:
        if (family := family_of(self.backbone)) is None:
            return f"backbone is {full_name(type(self.backbone))}, which has no fast path"
        asked = {
            "reads_tokens": self.reads_tokens,
            "gives_keys_values": self.gives_keys_values,
            "carry_prompts": self._carries_prompts,
        }
        missing = next((name for name, needed in asked.items() if needed and name not in family.SUPPORTS), None)
        return f"{missing}=True has no fast path in a {type(self.backbone).__name__}" if missing else None

    def _takes_fast_path(self, image: Tensor, attn_mask: Tensor | None = None) -> bool:
        coverage.check_image_type(image)
        if obstacle := coverage.obstacle(image, attn_mask):
            return coverage.covers(self, obstacle)
        if image.is_meta or not coverage.covers(self):
            return False
        return image.dtype == torch.uint8 or coverage.dtypes_fit(image, self._family.pixel_weight(self.backbone))

    # forward

    def forward(self, image: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, num_classes].

        8-bit images are normalized by the mean and std of ``self.preprocessing``, else of the backbone's
        ``pretrained_cfg``.

        Args:
            attn_mask: see ``PromptedReference.forward``; with a mask, the general path runs.

        Raises:
            TypeError: for an image that is no dense tensor of floating-point numbers or 8-bit pixels.
            ValueError: for an image of a size or shape that the backbone cannot take, or such a mask. On the general
                path the backbone's modules raise errors of their own.
        """
        ahead = None if attn_mask is not None else self._launch_ahead(image)
        try:
            if self._takes_fast_path(image, attn_mask):
                features = self._features(image, self._family.read_tokens(self.backbone), ahead)
            else:
                features = self.forward_features(image, attn_mask)
        finally:
            if ahead is not None:
                ahead.drop()
        return self.forward_head(features)

    def _launch_ahead(self, image: Tensor) -> Ahead | None:
        """Launch the CUDA graph that this pass will probably take, before it is known whether it does."""
        if not (isinstance(image, Tensor) and self._graphs_for(image)):
            return None
        graphs: Graphs | None = coverage.kept(self).get("graphs")
        return None if graphs is None else graphs.ahead(self.training, image)

    def _graphs_for(self, image: Tensor) -> bool:
        return cuda_graphs.has_graphs(image.device) and self.cuda_graphs and self._may_replay()

    def forward_features(self, image: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """What the backbone's ``forward_features`` returns, [B, T, D] of a ViT, without prompts."""
        if self._takes_fast_path(image, attn_mask):
            return self._features(image, None)
        return super().forward_features(image if image.dtype != torch.uint8 else self._normalize(image), attn_mask)

    def block_outputs(self, image: Tensor, blocks: Collection[int], attn_mask: Tensor | None = None) -> list[Any]:
        """As ``PromptedReference.block_outputs``; what comes from the fast path is always the tokens, [B, T, D]."""
        check_blocks(blocks, len(self.widths))
        if self._takes_fast_path(image, attn_mask):
            return self._block_outputs(image, blocks)
        return super().block_outputs(image if image.dtype != torch.uint8 else self._normalize(image), blocks, attn_mask)

    def apply_block(self, block: int, h: Any, prompts: Prompts | None) -> tuple[Any, Tensor | None]:
        """As ``PromptedReference.apply_block``, computed again in backward with ``recompute="block"``."""
        if self.recompute != "block" or not torch.is_grad_enabled():
            return super().apply_block(block, h, prompts)
        result: tuple[Any, Tensor | None] = checkpoint(super().apply_block, block, h, prompts, use_reentrant=False)
        return result

    def _features(self, image: Tensor, num_queries: int | None, ahead: Ahead | None = None) -> Tensor:
        """The fast path: all tokens after the last norm, or only the first ``num_queries``."""
        (tokens,) = self._block_outputs(image, [len(self.widths) - 1], num_queries, ahead)
        return self._family.final_norm(self.backbone, tokens, self._grid(image))

    def _grid(self, image: Tensor) -> tuple[int, int]:
        return image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size

    def _block_outputs(
        self,
        image: Tensor,
        blocks: Collection[int],
        num_queries: int | None = None,
        ahead: Ahead | None = None,
    ) -> list[Tensor]:
        """The fast path: the tokens behind each of ``blocks``, of the last block only the first ``num_queries``."""
        self._family.check_image(self.backbone, image)
        on_gpu = cuda_graphs.has_graphs(image.device)
        if on_gpu:
            replays = self._graphs_for(image)
        else:
            replays = not torch.is_grad_enabled() and self._may_record(image, self._precision(image)[0])
        embedding = replays and embeds_by_operations(self.backbone)
        reads = self._read_by_prompters(image) if embedding else None
        decisions, read = reads or ((), ())

        def compute(inputs: Sequence[Any]) -> list[Tensor]:
            image, *given = inputs
            model = with_tensors(self, read, given, but=self.backbone)
            return model._embed_and_run(*model._prompted_patches(image), self._grid(image), blocks, num_queries)

        inputs, device = [image, *read], image.device.type
        if reads is None:
            return compute(inputs)
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        settings = self.fold_norm, self.attention, self.gelu_in_8_bits, self.recompute, self.carry_prompts, autocast
        key = *sorted({*blocks}), None, num_queries, embedding, *settings, *decisions
        if on_gpu:
            graphs = self._kept("graphs", Graphs)
            return [*graphs.run(key, inputs, self._lasting(image), compute, ahead)]
        outputs: Any = self._kept("programs", Programs).run(key, inputs, compute)
        return [*outputs]

    def _read_by_prompters(self, image: Tensor) -> tuple[Sequence[Hashable], Sequence[Tensor]] | None:
        """What decides over the calls that make prompts, and the tensors that they read but the image.

        None where they call more than operations; then only blocks are programs.
        """
        return None

    def _lasting(self, image: Tensor) -> list[Tensor]:
        """All other tensors that are read."""
        weights = self._kept("weights", lambda: [*self.backbone.parameters(), *self.backbone.buffers()])
        return [*weights, *(self._pixel_scale(image.device) if image.dtype == torch.uint8 else ())]

    def _kept(self, name: str, make: Callable[[], T]) -> T:
        """What is kept as long as the decision about the backbone rests on what is there."""
        kept = coverage.kept(self)
        made: T = kept[name] if name in kept else kept.setdefault(name, make())
        return made

    def _embed_and_run(
        self, patches: Tensor, context: Any, grid: tuple[int, int], blocks: Collection[int], num_queries: int | None
    ) -> list[Tensor]:
        """``_block_outputs`` from what ``_prompted_patches`` returns."""
        with torch.autocast(patches.device.type, enabled=False):  # the operations choose their own precision
            tokens = self._family.embed(self.backbone, patches, grid)
            return self._run_blocks(tokens, context, patches.dtype, grid, blocks, num_queries)

    @property
    def _carries_prompts(self) -> bool:
        """Whether prompts run on from any block to the next."""
        return any(map(self._prompts_run_on, range(len(self.widths))))

    def _prompts_run_on(self, block: int) -> bool:
        """Whether the outputs of a block's prompts are the prompts of the next block."""
        return (
            self.carry_prompts
            and block + 1 < len(self.widths)
            and block + 1 not in self.prompted_blocks
            and block >= min(self.prompted_blocks, default=block + 1)
        )

    def _prompted_patches(self, image: Tensor) -> tuple[Tensor, Any]:
        """The prompted image unfolded, [B, N, K] in the dtype of the products, and the context of the prompts."""
        dtype, autocast = self._precision(image)
        with torch.autocast(image.device.type, dtype, enabled=autocast):
            image = self._normalize(image) if image.dtype == torch.uint8 else image
            prompted, context = self.prompt_image(image)
            return reference.unfold(prompted, self.patch_size).to(dtype), context

    def _prompters(self) -> list[nn.Module]:
        """The modules that make prompts."""
        return [child for child in self.children() if child not in (self.backbone, self.head)]

    def _precision(self, image: Tensor) -> tuple[torch.dtype, bool]:
        """The dtype of the backbone's products, and whether the prompters run under autocast."""
        device, dtype = image.device.type, self._family.pixel_weight(self.backbone).dtype
        if not torch.is_autocast_enabled(device) or dtype == torch.float64:
            return dtype, False
        dtype = torch.get_autocast_dtype(device)
        if device != "cpu" or hardware.has_products(dtype):
            return dtype, True
        # on a CPU that has no instructions for the dtype, prompters in fp32 run as they are, which is faster
        weights = (p for prompter in self._prompters() for p in prompter.parameters())
        fp32 = image.dtype in (torch.float32, torch.uint8) and all(p.dtype == torch.float32 for p in weights)
        return dtype, not fp32

    def _run_blocks(
        self,
        tokens: Tensor,
        context: Any,
        dtype: torch.dtype,
        grid: tuple[int, int],
        wanted: Collection[int],
        num_queries: int | None,
    ) -> list[Tensor]:
        """The blocks (eq. 11) up to the last of ``wanted``, and the tokens behind each of these."""
        keeps = "input" if self.recompute == "mlp" else "code" if self.gelu_in_8_bits else "pre"
        backbone, family, num_tokens = self.backbone, self._family, tokens.shape[1]
        options = BlockOptions(dtype, self.fold_norm, self.attention, keeps, grid, family.shared(backbone, grid))

        def run(tokens: Tensor, context: Any, indices: range) -> Tensor:
            residual: Tensor = tokens
            branch: Tensor | None = None
            for group in self._grouped(indices, tokens, options, num_queries):
                if len(group) > 1:
                    residual, branch = self._run_group(group, context, residual, branch, options, num_queries)
                    continue
                native.interrupt()  # PyTorch's operations, perhaps
                (j,) = group
                residual, branch, prompts = self._insert_prompts(j, context, num_tokens, residual, branch)
                rest = options, self._queries(j, num_queries)
                residual, branch = family.forward_block(backbone, j, residual, branch, prompts, *rest)
            return residual if branch is None else sum_of(residual, branch)

        recomputes = self.recompute == "block" and torch.is_grad_enabled()
        steps = range(BLOCKS_PER_CHECKPOINT, max(wanted) + 1, BLOCKS_PER_CHECKPOINT) if recomputes else ()
        ends, outputs = sorted({*steps, *(j + 1 for j in wanted)}), []
        for first, end in pairwise([0, *ends]):
            indices = range(first, end)
            if recomputes:
                tokens = checkpoint(run, tokens, context, indices, use_reentrant=False)
            else:
                tokens = run(tokens, context, indices)
            if end - 1 in wanted:
                outputs.append(tokens[:, :num_tokens] if self.carry_prompts else tokens)
        return outputs

    def _grouped(
        self, indices: range, tokens: Tensor, options: BlockOptions, num_queries: int | None
    ) -> list[list[int]]:
        """Blocks that run alone, and groups of them that can be programs."""
        recordable = self._may_record(tokens, options.dtype)
        groups: list[list[int]] = [[]]
        for j in indices:
            asked = self.backbone, j, options, tokens.shape[1], self._queries(j, num_queries)
            if recordable and only_operations(*asked):
                groups[-1].append(j)
            else:
                groups += [j], []
        return [group for group in groups if group]

    def _queries(self, block: int, num_queries: int | None) -> int | None:
        """How many tokens go on behind a block; all if None."""
        return num_queries if block == len(self.widths) - 1 else None

    def _may_record(self, tokens: Tensor, dtype: torch.dtype) -> bool:
        """Whether blocks whose products are in this dtype may run without what leads to their native calls."""
        if self.reads_tokens or self._carries_prompts or self.gives_keys_values:
            return False
        return tokens.is_cpu and self._may_replay() and products.provider(dtype, tokens.device) == "native"

    def _may_replay(self) -> bool:
        """Whether what has run once may run again without the Python that has led to its kernels."""
        if torch.compiler.is_compiling() or torch_private.is_replica(self):
            return False
        # what is recomputed, or passes through hooks, is what operations have saved
        if torch.is_grad_enabled() and (self.recompute == "block" or torch_private.saving_hooks()):
            return False
        # prompts that others make might be written again before they are read
        method = getattr(self, "method", None)
        own = method is None or type(method).__module__.startswith("insvp_fast.")
        return own and not (foreign(self, "block_prompts", "feature_prompt") or foreign(method, "block_prompts"))

    def _run_group(
        self,
        blocks: list[int],
        context: Any,
        residual: Tensor,
        branch: Tensor | None,
        options: BlockOptions,
        num_queries: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        prompts = [self.block_prompts(j, context, len(residual)) for j in blocks]

        def compute(inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
            residual, branch, shared, *tokens = inputs
            for j, p in zip(blocks, prompts, strict=True):
                inserted = tokens.pop()
                own = None if p is None else p._replace(tokens=inserted)
                rest = own, options._replace(shared=shared), self._queries(j, num_queries)
                residual, branch = self._family.forward_block(self.backbone, j, residual, branch, *rest)
            return residual, branch

        # of prompts that several blocks share, PyTorch adds the gradients in this order: those of the last come first
        inputs = residual, branch, options.shared, *(None if p is None else p.tokens for p in reversed(prompts))
        if any(p is not None and p.lengths is not None for p in prompts):
            native.interrupt()  # these decide by values
            return compute(inputs)
        programs = self._kept("programs", Programs)
        outputs: Any = programs.run((tuple(blocks), options._replace(shared=None), num_queries), inputs, compute)
        residual, branch = outputs
        return residual, branch

    def _insert_prompts(
        self, block: int, context: Any, num_tokens: int, residual: Tensor, branch: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Prompts | None]:
        """A block's input, as residual and branch, and its prompts; those that run on stand behind the tokens."""
        tokens = None
        if self.reads_tokens:
            residual, branch = residual if branch is None else residual + branch, None
            tokens = residual[:, :num_tokens] if self.carry_prompts else residual
        prompts, runs_on = self.block_prompts(block, context, len(residual), tokens), self._prompts_run_on(block)
        carried = self.carry_prompts and residual.shape[1] > num_tokens
        nothing_moves = runs_on and prompts is None if carried else not runs_on
        if nothing_moves:
            return residual, branch, prompts
        residual = residual if branch is None else residual + branch
        prompts = Prompts(residual[:, num_tokens:]) if prompts is None else prompts
        residual = residual[:, :num_tokens]
        if runs_on:
            residual = torch.cat([residual, prompts.tokens.to(residual.dtype)], dim=1)
            prompts = None if prompts.keys_values is None else prompts._replace(tokens=prompts.tokens[:, :0])
        return residual, None, prompts

    # 8-bit images

    def _normalize(self, pixels: Tensor) -> Tensor:
        """8-bit pixels to what the backbone was trained with, in its dtype."""
        normalized = reference.normalize(pixels, *self._pixel_scale(pixels.device))
        return normalized.to(pixel_layer(self.backbone).weight.dtype)

    def _pixel_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """See ``reference.pixel_scale``; kept, but in traces, modes and transforms, which make tensors of their own."""
        facts: Any = getattr(self, "preprocessing", None) or getattr(self.backbone, "pretrained_cfg", None) or {}
        mean, std = (tuple(facts.get(name, ())) for name in ("mean", "std"))
        key = device, mean, std
        if (scale := self._pixel_scales.get(key)) is None:
            for name, numbers in (("mean", mean), ("std", std)):
                if len(numbers) not in (1, C := self.in_channels):
                    raise ValueError(f"{name} is {numbers}: expected one number, or {C}, in `preprocessing`")
            with torch.inference_mode(False):  # backward may keep them
                scale = reference.pixel_scale(mean, std, device)
            if not (torch.compiler.is_compiling() or torch_private.dispatch_modes() or torch_private.transforming()):
                self._pixel_scales = {key: scale}
        return scale
