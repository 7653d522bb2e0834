"""InsVPViT: the function of ``InsVPReference``, computed by the operations of this package."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast import coverage, ops, prompters, reference
from insvp_fast.checkpoints.adapter import AdapterCheckpoint
from insvp_fast.config import InsVPConfig
from insvp_fast.coverage import Covered
from insvp_fast.coverage.rules import foreign, full_name
from insvp_fast.ops.dropout import draws_natively, dropout_mask
from insvp_fast.prompted import PromptedViT
from insvp_fast.reference import InsVPReference
from insvp_fast.reference.heads import leaves_backbone
from insvp_fast.runtime import buffers, cuda_graphs, torch_private
from insvp_fast.runtime.elementwise import put, put_sum
from insvp_fast.timm_interface import TimmInterface

__all__ = ["InsVPViT"]

STEPS = ("prompt_image", "_image_prompt", "specific_prompt")  # of the reference, which the fast path takes at once


class InsVPViT(AdapterCheckpoint, TimmInterface, PromptedViT, InsVPReference):
    """InsVP around a frozen backbone of timm, with the constructor, keys and numbers of ``InsVPReference``.

    Has timm's interface (``forward_features``, ``forward_head``, ``get_classifier``, ``reset_classifier``,
    ``no_weight_decay``, ``set_grad_checkpointing``) and works under autocast, ``torch.compile``, DDP,
    ``copy.deepcopy`` and ``torch.export``. Products are computed in the autocast dtype, else in that of the backbone.
    A backbone without a fast path runs through the reference's own path, exactly, and a warning says so once.

    Args, shapes and errors: see ``InsVPReference``. A backbone's name is anything that ``create_backbone`` takes. The
    arguments below are attributes as well, which may be set later.

    Args:
        recompute: what backward computes again instead of keeping it, with the same numbers: "none", "mlp" (the hidden
            layers: two fifths less memory, a sixth more products), or "block" (all blocks).
        fold_norm: fold the frozen norms' affine maps and the layer scales into the products beside them, which rounds
            those weights again.
        attention: the implementation, one of ``ops.ATTENTION``; in windows and with a bias of the scores, one of
            ``ops.WINDOW_ATTENTION``.
        gelu_in_8_bits: keep the derivative of GELU for backward in 8 bits: a fifth less memory in bf16,
            and gradients that are off by up to 0.25 %. This is the only setting that is not exact.
        compile_prompters: run the convolutional prompters through ``torch.compile``.
        cuda_graphs: on a GPU, launch all kernels from the image to the last block at once, as a CUDA graph, from the
            second batch of a shape on, with the same bits; where this covers the model.

    Raises:
        ValueError: also for settings that the fast path of this backbone, or another setting, does not go with.
    """

    @leaves_backbone
    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        config: InsVPConfig | None = None,
        *,
        pretrained: bool = False,
        recompute: str = "none",
        fold_norm: bool = True,
        attention: str = "auto",
        gelu_in_8_bits: bool = False,
        compile_prompters: bool = False,
        cuda_graphs: bool = True,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, config, pretrained=pretrained, **backbone_kwargs)
        for prompter in self._prompters():
            prompters.make_fast(prompter)
        self.recompute, self.fold_norm, self.attention = recompute, fold_norm, attention
        self.gelu_in_8_bits, self.compile_prompters, self.cuda_graphs = gelu_in_8_bits, compile_prompters, cuda_graphs
        self._prompters_are_compiled = False
        coverage.covers(self)  # warns now rather than in the first forward pass

    def _prompters(self) -> list[nn.Module]:
        return [p for p in (self.global_prompter, self.patch_prompter, self.specific_prompter) if p is not None]

    def _own_reason(self) -> str | None:
        if reason := super()._own_reason():
            return reason
        common = self.common_prompts
        if common is not None and type(common) is not nn.ParameterList:  # what gives other prompts at each look
            return f"common_prompts is {full_name(type(common))}: expected torch's ParameterList"
        for i, (prompts, j) in enumerate(zip(common or (), self.prompted_blocks, strict=False)):
            shape = self.config.prompt_length, self.widths[j]
            if prompts.shape != shape:
                return f"common_prompts.{i} has shape {tuple(prompts.shape)}: expected {shape}"
            if torch_private.overrides(prompts):
                return f"common_prompts.{i} is a {type(prompts).__name__}, whose operations are its own"
        return None

    def image_prompt(self, image: Tensor) -> reference.ImagePrompt:
        """As ``InsVPReference.image_prompt``, also of 8-bit images."""
        return super().image_prompt(self._normalize(image) if image.dtype == torch.uint8 else image)

    def _prompted_patches(self, image: Tensor) -> tuple[Tensor, Any]:
        self._compile_prompters()
        if coverage.overridden(self, *STEPS):
            return super()._prompted_patches(image)
        dtype, autocast = self._precision(image)
        with torch.autocast(image.device.type, dtype, enabled=autocast):
            pixels = image
            image = self._normalize(image) if image.dtype == torch.uint8 else image
            image = reference.simam(image) if self.config.simam else image
            # the GPU kernel reads 8-bit pixels itself; others would normalize them a second time
            pixels = pixels if pixels.is_cuda and not self.config.simam else image
            patches, prompted = self._superpose(image, pixels, dtype)
            return patches, self.specific_prompt(image, prompted)

    def _read_by_prompters(self, image: Tensor) -> tuple[Sequence[Hashable], Sequence[Tensor]] | None:
        if self.compile_prompters or not (cuda_graphs.has_graphs(image.device) or self._blends_at_once()):
            return None
        if foreign(self, *STEPS, "_prompted_patches", "_superpose", "_feature_prompts", "_embed_and_run"):
            return None
        decisions: list[Hashable] = [self.config, tuple(self.prompted_blocks), self.training]
        tensors: list[Tensor] = []
        for prompter in self._prompters():
            if not (isinstance(prompter, Covered) and coverage.covers(prompter)):
                return None
            if foreign(prompter, "forward", "_tokens", "_convolve"):
                return None
            kept = coverage.kept(prompter)  # is another after every change of its modules
            decisions.append(kept.setdefault("decision", object()))
            tensors += kept.setdefault("parameters", [*prompter.parameters()])
        return decisions, [*tensors, *(self.common_prompts or ())]

    def _embed_and_run(
        self, patches: Tensor, context: Any, grid: tuple[int, int], blocks: Collection[int], num_queries: int | None
    ) -> list[Tensor]:
        if self._blends_at_once():
            context = self._feature_prompts(context, len(patches), max(blocks))
        return super()._embed_and_run(patches, context, grid, blocks, num_queries)

    def feature_prompt(self, block: int, p_s: Any, batch: int) -> Tensor | None:
        """As ``InsVPReference.feature_prompt``; ``p_s`` may be what ``_feature_prompts`` made of it."""
        return p_s.get(block) if isinstance(p_s, dict) else super().feature_prompt(block, p_s, batch)

    def _blends_at_once(self) -> bool:
        """Whether the prompts of all blocks may be made together: none of them is overridden or made again.

        Where PyTorch draws the masks of dropout, they depend on its calls: those of the reference take one for a block.
        """
        if torch.compiler.is_compiling() or (self.recompute == "block" and torch.is_grad_enabled()):
            return False  # the former also because no compiler can trace how masks are drawn
        common = self.common_prompts or ()
        dropped = self._common_dropout() > 0 and not all(c.is_cpu and draws_natively(c.dtype) for c in common)
        mixed = len({prompts.dtype for prompts in common}) > 1
        return not (dropped or mixed or foreign(self, "feature_prompt", "block_prompts"))

    def _common_dropout(self) -> float:
        return self.config.common_dropout if self.training else 0.0

    def _feature_prompts(self, p_s: Any, batch: int, last: int) -> dict[int, Tensor]:
        """``feature_prompt`` of every block up to ``last``, bit for bit: few launches, and few more in backward.

        On CPUs the gradients too have the bits that they would have block by block, elsewhere those of other sums.
        """
        (w_c, w_s), p, prompts = self.config.blend_feature, self._common_dropout(), dict[int, Tensor]()
        feature_prompt = super().feature_prompt
        for i, width in enumerate(self.prompt_widths):
            blocks = sorted(j for j in self.prompted_blocks if self.widths[j] == width and j <= last)
            if not blocks:
                continue
            own_p_s = p_s[i] if isinstance(p_s, tuple) else p_s
            shape = batch, self.config.prompt_length, width
            if own_p_s is not None and own_p_s.shape != shape:  # of another prompter, to be broadcast perhaps
                made = [(j, feature_prompt(j, p_s, batch)) for j in blocks]
                prompts |= {j: p_j for j, p_j in made if p_j is not None}
            elif self.common_prompts is not None:
                common = [self.common_prompts[self.prompted_blocks.index(j)] for j in blocks]
                prompts |= zip(blocks, ops.blend_prompts(common, own_p_s, w_c, w_s, batch, p), strict=True)
            elif own_p_s is not None:
                prompts |= dict.fromkeys(blocks, w_s * own_p_s)  # w_s is 1 without common prompts
        return prompts

    def _compile_prompters(self) -> None:
        wanted = self.compile_prompters
        if torch.compiler.is_compiling() or wanted == self._prompters_are_compiled:
            return
        for prompter in (self.global_prompter, self.specific_prompter):
            if prompter is not None:
                prompter.compile(disable=not wanted)
        self._prompters_are_compiled = wanted

    def _superpose(self, image: Tensor, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x~ unfolded, [B, N, K] in ``dtype``, and folded, but the latter only if the specific prompter reads it.

        ``pixels`` are the image, perhaps still in 8 bits.
        """
        P, prompter, device = self.patch_size, self.patch_prompter, image.device.type
        specific = self.specific_prompter if self.config.specific_input == "prompted" else None
        folded = specific is not None
        any_layout = specific is None or prompters.in_row_order(image) or _takes_any_layout(specific)
        if prompter is None or not any_layout or not self._can_superpose(prompter, image):
            prompted = self._image_prompt(image).prompted
            return reference.unfold(prompted, P).to(dtype), prompted
        p_g = None if self.global_prompter is None else self.global_prompter(image).expand(image.shape)
        weights = ops.PatchWeights(prompter.fc1.weight, prompter.fc1.bias, prompter.fc2.weight, prompter.fc2.bias)
        scale, shift = self._pixel_scale(pixels.device) if pixels.dtype == torch.uint8 else (None, None)
        wide = torch.promote_types(image.dtype, dtype) if folded else dtype
        (w_g, w_l), kept = self.config.blend_image, None
        if _drops_out(prompter):
            kept, w_l = _draw_kept(image, prompter.dropout.p), w_l / (1 - prompter.dropout.p)
        with torch.autocast(device, enabled=False):
            patches = ops.superpose(
                pixels, p_g, weights, ops.Blend(P, w_g, w_l), dtype=wide, scale=scale, shift=shift, kept=kept
            )
        return _cast(patches, dtype), _fold(patches, P, *image.shape[-2:]) if folded else image

    def _can_superpose(self, prompter: reference.PatchPrompter, image: Tensor) -> bool:
        """Whether ``ops.superpose`` computes what this patch prompter would, in dtypes that PyTorch accepts."""
        drawn = image.device.type in ("cpu", "cuda") and self.patch_size > 1  # else in another order of memory
        return (
            (not _drops_out(prompter) or (drawn and prompter.dropout.p < 1))  # a rate of 1 draws none
            and coverage.covers(prompter)
            and prompter.patch_size == self.patch_size
            and coverage.dtypes_fit(image, *prompter.parameters())
        )


def _fold(patches: Tensor, P: int, height: int, width: int) -> Tensor:
    """``reference.fold``, on CPUs without gradients as a call that a program can hold."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not patches.is_cpu:
        return reference.fold(patches, P, height, width).contiguous()
    B, _, K = patches.shape
    C, h, w = K // P**2, height // P, width // P
    image = buffers.empty((B, C, height, width), patches.dtype)
    put(image.view(B, C, h, P, w, P), patches.view(B, h, w, C, P, P).permute(0, 3, 1, 4, 2, 5))
    return image


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, on CPUs without gradients as a call that a program can hold."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu or x.dtype == dtype:
        return x.to(dtype)
    cast = buffers.empty(x.shape, dtype)
    put_sum(cast, x, 1, None, 0)
    return cast


def _drops_out(prompter: nn.Module) -> bool:
    """Whether the dropout of a prompter is on."""
    dropout = getattr(prompter, "dropout", None)
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _takes_any_layout(prompter: nn.Module) -> bool:
    """Whether what a specific prompter makes of an image is the same for each order of its memory: no mask is drawn."""
    return coverage.covers(prompter) and not _drops_out(prompter)


def _draw_kept(image: Tensor, p: float) -> Tensor:
    """Where ``nn.Dropout`` keeps the patch prompt of an image, drawn from the same random numbers.

    On GPUs these depend on the dtype of the patch prompt, but nowhere on its values, which are not known yet.
    """
    if image.is_cpu:
        return dropout_mask(image.shape, p)
    device = image.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image.dtype
    return torch.native_dropout(torch.empty(image.shape, dtype=dtype, device=image.device), p, True)[1]
