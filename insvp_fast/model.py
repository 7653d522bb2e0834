"""InsVPViT: the function of ``InsVPReference``, computed by the operations of this package."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from insvp_fast import coverage, ops, prompters, reference
from insvp_fast.backbones import BackboneFamily, BlockOptions, family_of
from insvp_fast.checkpoints.adapter import AdapterCheckpoint
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.config import InsVPConfig
from insvp_fast.coverage import Covered, Requirements
from insvp_fast.coverage.rules import full_name
from insvp_fast.reference import InsVPReference
from insvp_fast.runtime import hardware
from insvp_fast.timm_interface import TimmInterface

__all__ = ["InsVPViT"]

# recompute="block" keeps the input of every second block, and in backward the activations of two blocks at a time. For
# 12 blocks the sum of both is smallest with two.
BLOCKS_PER_CHECKPOINT = 2


class InsVPViT(AdapterCheckpoint, TimmInterface, Covered, InsVPReference):
    """InsVP around a frozen timm Vision Transformer, with the constructor, keys and numbers of ``InsVPReference``.

    Has timm's interface (``forward_features``, ``forward_head``, ``get_classifier``, ``reset_classifier``,
    ``no_weight_decay``, ``set_grad_checkpointing``) and works under autocast, ``torch.compile``, DDP,
    ``copy.deepcopy`` and ``torch.export``. Products are computed in the autocast dtype, else in that of the backbone.
    A backbone without a fast path runs through the reference's own path, exactly, and a warning says so once.

    Args, shapes and errors: see ``InsVPReference``. With ``pretrained``, a backbone's name is anything that
    ``create_backbone`` takes. The arguments below are attributes as well, which may be set later.

    Args:
        recompute: what backward computes again instead of keeping it, with the same numbers: "none", "mlp" (the hidden
            layers: half of the memory, a sixth more products), or "block" (all blocks).
        fold_norm: fold the frozen norms' affine maps into the products behind them, which rounds those weights again.
        attention: the implementation, one of ``ops.ATTENTION``.
        gelu_in_8_bits: keep the derivative of GELU for backward in 8 bits: a quarter less memory for a block in bf16,
            and gradients that are off by up to 0.25 %. This is the only setting that is not exact.
        compile_prompters: run the convolutional prompters through ``torch.compile``; None does so on GPUs.
    """

    def __init__(
        self,
        backbone: str | VisionTransformer,
        num_classes: int | None = None,
        config: InsVPConfig | None = None,
        *,
        pretrained: bool = False,
        recompute: str = "none",
        fold_norm: bool = True,
        attention: str = "auto",
        gelu_in_8_bits: bool = False,
        compile_prompters: bool | None = None,
        **backbone_kwargs: Any,
    ) -> None:
        if isinstance(backbone, str) and pretrained:
            backbone, pretrained, backbone_kwargs = create_backbone(backbone, **backbone_kwargs), False, {}
        super().__init__(backbone, num_classes, config, pretrained=pretrained, **backbone_kwargs)
        for prompter in self._prompters():
            prompters.make_fast(prompter)
        self.recompute, self.fold_norm, self.attention = recompute, fold_norm, attention
        self.gelu_in_8_bits, self.compile_prompters = gelu_in_8_bits, compile_prompters
        self._prompters_are_compiled = False
        self._pixel_scales: dict[object, tuple[Tensor, Tensor]] = {}
        coverage.covers(self)  # warns now rather than in the first forward pass

    def _prompters(self) -> list[nn.Module]:
        return [p for p in (self.global_prompter, self.patch_prompter, self.specific_prompter) if p is not None]

    @property
    def attention(self) -> str:
        """The implementation of attention, one of ``ops.ATTENTION``; setting another raises ValueError."""
        return self._attention

    @attention.setter
    def attention(self, impl: str) -> None:
        if impl not in ops.ATTENTION:
            raise ValueError(f"attention={impl!r}: expected one of {sorted(ops.ATTENTION)}")
        self._attention = impl

    @property
    def recompute(self) -> str:
        """What backward computes again: "none", "mlp" or "block"; setting anything else raises ValueError."""
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in ("none", "mlp", "block"):
            raise ValueError(f"recompute={what!r}: expected 'none', 'mlp' or 'block'")
        self._recompute = what

    # which path

    @property
    def _family(self) -> BackboneFamily:
        family = family_of(self.backbone)
        assert family is not None, "a backbone without a family takes the general path"
        return family

    def _requirements(self) -> Requirements:
        table = self._family.requirements(self.backbone, self.patch_size)
        return Requirements("backbone", self.backbone, table, frozen=True)

    def _requirements_depend_on(self) -> object:
        return self.backbone, self.patch_size

    def _own_reason(self) -> str | None:
        family = family_of(self.backbone)
        if family is None:
            return f"backbone is {full_name(type(self.backbone))}, which has no fast path"
        for name in ("forward_features", "forward_head", "block_outputs", "apply_block"):
            if name in vars(self) or not getattr(type(self), name).__module__.startswith("insvp_fast."):
                return f"the model has a {name} of its own"
        L, common, prompted = self.config.prompt_length, self.common_prompts, self.prompted_blocks
        if common is not None and common.shape[1] != L:
            return f"common_prompts has {common.shape[1]} prompts: expected prompt_length={L}"
        # in the fast path prompts end with their block
        if self.config.carry_prompts and prompted:
            later = range(prompted[0], len(family.blocks(self.backbone)))
            if not set(later) <= set(prompted):
                return "carry_prompts with blocks that have no prompts of their own"
        return None

    def _takes_fast_path(self, image: Tensor) -> bool:
        if image.is_meta or not coverage.covers(self):
            return False
        return image.dtype == torch.uint8 or coverage.dtypes_fit(image, self._family.pixel_weight(self.backbone))

    # forward

    def forward(self, image: Tensor, attn_mask: None = None) -> Tensor:
        """[B, C, H, W] -> [B, num_classes].

        8-bit images are normalized by the mean and std of ``self.preprocessing``, else of the backbone's
        ``pretrained_cfg``.

        Raises:
            ValueError: for an image of a size or shape that the backbone cannot take. On the general path its
                modules raise errors of their own.
        """
        family = family_of(self.backbone)
        one_token = family is not None and family.reads_one_token(self.backbone) and self._takes_fast_path(image)
        if not one_token:
            return self.forward_head(self.forward_features(image))
        (tokens,) = self._block_outputs(image, [len(self._family.blocks(self.backbone)) - 1], num_queries=1)
        return self.forward_head(self._family.final_norm(self.backbone, tokens))

    def block_outputs(self, image: Tensor, blocks: Collection[int]) -> list[Tensor]:
        """As ``InsVPReference.block_outputs``, also of 8-bit images."""
        if self._takes_fast_path(image):
            return self._block_outputs(image, blocks)
        return super().block_outputs(image if image.dtype != torch.uint8 else self._normalize(image), blocks)

    def apply_block(self, block: nn.Module, h: Tensor, p_j: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As ``InsVPReference.apply_block``, computed again in backward with ``recompute="block"``."""
        if self.recompute != "block" or not torch.is_grad_enabled():
            return super().apply_block(block, h, p_j)
        result: tuple[Tensor, Tensor | None] = checkpoint(super().apply_block, block, h, p_j, use_reentrant=False)
        return result

    def image_prompt(self, image: Tensor) -> reference.ImagePrompt:
        """As ``InsVPReference.image_prompt``, also of 8-bit images."""
        return super().image_prompt(self._normalize(image) if image.dtype == torch.uint8 else image)

    def _block_outputs(
        self, image: Tensor, blocks: Collection[int], num_queries: int | None = None
    ) -> list[Tensor]:  # [B, num_queries or T, D] each
        """The fast path of ``block_outputs``; with ``num_queries``, the last block computes only the first tokens."""
        backbone, family, device, P = self.backbone, self._family, image.device.type, self.patch_size
        family.check_image(backbone, image)
        self._compile_prompters(image.device)
        dtype, autocast = self._precision(image)
        with torch.autocast(device, dtype, enabled=autocast):
            pixels = image
            image = self._normalize(image) if image.dtype == torch.uint8 else image
            image = reference.simam(image) if self.config.simam else image
            # the GPU kernel reads 8-bit pixels itself; others would normalize them a second time
            pixels = pixels if pixels.is_cuda and not self.config.simam else image
            patches, prompted = self._prompted_patches(image, pixels, dtype)
            p_s = self.specific_prompt(image, prompted)
        with torch.autocast(device, enabled=False):  # the operations choose their own precision
            grid = image.shape[-2] // P, image.shape[-1] // P
            return self._run_blocks(family.embed(backbone, patches, grid), p_s, dtype, blocks, num_queries)

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

    def _compile_prompters(self, device: torch.device) -> None:
        wanted = device.type == "cuda" if self.compile_prompters is None else self.compile_prompters
        if torch.compiler.is_compiling() or wanted == self._prompters_are_compiled:
            return
        for prompter in (self.global_prompter, self.specific_prompter):
            if prompter is not None and wanted:
                prompter.compile()
            elif prompter is not None:
                prompter.compile(disable=True)
        self._prompters_are_compiled = wanted

    def _prompted_patches(self, image: Tensor, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x~ unfolded, [B, N, K] in ``dtype``, and folded, but the latter only if the specific prompter reads it.

        ``pixels`` are the image, perhaps still in 8 bits.
        """
        P, prompter, device = self.patch_size, self.patch_prompter, image.device.type
        if prompter is None or not self._superposes(prompter, image):
            prompted = self._image_prompt(image).prompted
            return reference.unfold(prompted, P).to(dtype), prompted
        p_g = None if self.global_prompter is None else self.global_prompter(image)
        folded = self.config.specific_input == "prompted" and self.specific_prompter is not None
        weights = ops.PatchWeights(prompter.fc1.weight, prompter.fc1.bias, prompter.fc2.weight, prompter.fc2.bias)
        scale, shift = self._pixel_scale(pixels.device) if pixels.dtype == torch.uint8 else (None, None)
        wide = torch.promote_types(image.dtype, dtype) if folded else dtype
        with torch.autocast(device, enabled=False):
            patches = ops.superpose(
                pixels, p_g, weights, ops.Blend(P, *self.config.blend_image), dtype=wide, scale=scale, shift=shift
            )
        prompted = reference.fold(patches, P, *image.shape[-2:]) if folded else image
        return patches.to(dtype), prompted

    def _superposes(self, prompter: reference.PatchPrompter, image: Tensor) -> bool:
        """Whether ``ops.superpose`` computes what this patch prompter would, in dtypes that PyTorch accepts."""
        masked = self.training and self.config.patch_dropout > 0  # between the steps that the operation fuses
        return (
            not masked
            and coverage.covers(prompter)
            and prompter.patch_size == self.patch_size
            and coverage.dtypes_fit(image, *prompter.parameters())
        )

    def _run_blocks(
        self,
        tokens: Tensor,  # [B, T, D]
        p_s: Tensor | None,
        dtype: torch.dtype,
        wanted: Collection[int],
        num_queries: int | None,
    ) -> list[Tensor]:  # [B, num_queries or T, D] each
        """The blocks (eq. 11) up to the last that is wanted, and the tokens after each of ``wanted``."""
        if self.recompute == "mlp" and self.gelu_in_8_bits:
            raise ValueError("recompute='mlp' keeps nothing of GELU: expected gelu_in_8_bits=False with it")
        keeps = "input" if self.recompute == "mlp" else "code" if self.gelu_in_8_bits else "pre"
        options = BlockOptions(dtype, self.fold_norm, self.attention, keeps)
        family, blocks, L = self._family, self._family.blocks(self.backbone), self.config.prompt_length

        def run(tokens: Tensor, p_s: Tensor | None, indices: range) -> Tensor:
            residual: Tensor = tokens
            branch: Tensor | None = None
            for j in indices:
                queries = num_queries if j == len(blocks) - 1 else None
                prompts = self.feature_prompt(j, p_s, tokens.shape[0])
                if prompts is not None and prompts.shape[1] != L:
                    raise ValueError(f"block {j} has {prompts.shape[1]} prompts: expected prompt_length={L}")
                residual, branch = family.forward_block(blocks[j], residual, branch, prompts, options, queries)
            return residual if branch is None else residual + branch

        recomputes, outputs, depth = self.recompute == "block" and torch.is_grad_enabled(), [], max(wanted) + 1
        steps = range(BLOCKS_PER_CHECKPOINT, depth, BLOCKS_PER_CHECKPOINT) if recomputes else ()
        ends = sorted({*steps, *(j + 1 for j in wanted)})
        for start, end in zip([0, *ends], ends, strict=False):
            indices = range(start, end)
            tokens = (
                checkpoint(run, tokens, p_s, indices, use_reentrant=False) if recomputes else run(tokens, p_s, indices)
            )
            if end - 1 in wanted:
                outputs.append(tokens)
        return outputs

    # 8-bit images

    def _normalize(self, pixels: Tensor) -> Tensor:
        """8-bit pixels to what the backbone was trained with, in its dtype."""
        family = family_of(self.backbone)
        weight = next(self.backbone.parameters()) if family is None else family.pixel_weight(self.backbone)
        return reference.normalize(pixels, *self._pixel_scale(pixels.device)).to(weight.dtype)

    def _pixel_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factor and summand that normalize 8-bit pixels, [C] each."""
        facts = self.preprocessing or self.pretrained_cfg
        key = device, tuple(facts["mean"]), tuple(facts["std"])
        if key not in self._pixel_scales:
            with torch.inference_mode(False):  # backward may keep them
                mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in key[1:])
                self._pixel_scales = {key: (1 / (255 * std), -mean / std)}
        return self._pixel_scales[key]
