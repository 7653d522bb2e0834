"""InsVPViT: the reference's function, computed by the operations of this package."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from insvp_fast import ops, prompters, reference
from insvp_fast.backbones import vision_transformer as frozen_backbone
from insvp_fast.checkpoints.adapter import AdapterCheckpoint
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.config import InsVPConfig
from insvp_fast.coverage import rules
from insvp_fast.reference import InsVPReference
from insvp_fast.runtime import hardware

__all__ = ["InsVPViT"]

# of 12 blocks, two kept together is where what is kept between them and what one backward makes again are least
RECOMPUTED = 2


class InsVPViT(AdapterCheckpoint, rules.Planned, InsVPReference):
    """InsVP around a frozen timm Vision Transformer, with the constructor, keys and numbers of ``InsVPReference``.

    Keeps timm's interface (``forward_features``, ``forward_head``, ``get_classifier``, ``reset_classifier``,
    ``no_weight_decay``, ``set_grad_checkpointing``) and works under autocast, ``torch.compile``, DDP,
    ``copy.deepcopy`` and ``torch.export``. Products are computed in the autocast dtype, else in that of the backbone.
    A backbone that the fast operations do not cover runs through the reference's own path, exactly, and says so once
    with a warning.

    Args, shapes and errors: see ``InsVPReference``; a pretrained backbone is whatever ``create_backbone`` takes.
    Besides, each also an attribute that may be set later:
        recompute: what backward computes again instead of keeping it, with the same numbers: "none", "mlp" (the hidden
            layers: half of the memory, a twelfth more work), or "block" (all blocks, of the model as it is then).
        fold_norm: fold the frozen norms' affine maps into the products behind them, which rounds these weights anew.
        attention: the implementation, "auto" or one of those in ``ops.attention``.
        gelu_in_8_bits: keep the derivative of GELU for backward in 8 bits, a quarter of a block's memory less in bf16,
            with gradients that are off by up to 0.25 %; the one setting here that is not exact.
        compile_prompters: run the convolutional prompters through ``torch.compile``; None does so on GPUs.
    """

    global_prompter_type = prompters.GlobalPrompter
    patch_prompter_type = prompters.PatchPrompter
    specific_prompter_type = prompters.SpecificPrompter

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
        self.recompute, self.fold_norm, self.attention = recompute, fold_norm, attention
        self.gelu_in_8_bits, self.compile_prompters = gelu_in_8_bits, compile_prompters
        self._prompters_are_compiled = False
        self._pixel_scales: dict[object, tuple[Tensor, Tensor]] = {}
        rules.covers(self)  # says at once what the first forward would say

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward_features(self, image: Tensor) -> Tensor:
        """The tokens after the backbone's last norm, [B, T, D], prompts left out."""
        if self._takes_fast_plan(image):
            return self._features(image, None)
        return super().forward_features(image if image.dtype != torch.uint8 else self._normalise(image))

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]; 8-bit images are normalised by ``preprocessing`` or the backbone."""
        one_token = self.backbone.global_pool == "token" and self.backbone.attn_pool is None
        one_token = one_token and self._takes_fast_plan(image)
        return self.forward_head(self._features(image, 1) if one_token else self.forward_features(image))

    def _takes_fast_plan(self, image: Tensor) -> bool:
        """Whether ``rules.py`` covers the model, and the image is of a dtype that PyTorch would compute with it."""
        if image.is_meta or not rules.covers(self):
            return False
        return image.dtype == torch.uint8 or rules.dtypes_fit(image, self.backbone.patch_embed.proj.weight)

    def _features(self, image: Tensor, num_queries: int | None) -> Tensor:
        """All tokens after the last norm, or only the first ``num_queries``."""
        backbone, device, P = self.backbone, image.device.type, self.patch_size
        self._check(image)
        self._compile_prompters(image.device)
        dtype = backbone.patch_embed.proj.weight.dtype
        autocast = torch.is_autocast_enabled(device) and dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else dtype
        # on a CPU without products in this dtype convolutions are widened too, where nothing needs a cast
        autocast = autocast and not (device == "cpu" and not hardware.has_products(dtype) and self._is_fp32(image))
        with torch.autocast(device, dtype, enabled=autocast):
            pixels = image
            image = self._normalise(image) if image.dtype == torch.uint8 else image
            image = reference.simam(image) if self.config.simam else image
            # a kernel reads 8 bits instead of 32; elsewhere they would be normalised once more
            pixels = pixels if pixels.is_cuda and not self.config.simam else image
            patches, prompted = self._prompted_patches(image, pixels, dtype)
            p_s = self.specific_prompt(image, prompted)
        with torch.autocast(device, enabled=False):  # the operations choose their own precision
            grid = image.shape[-2] // P, image.shape[-1] // P
            tokens = self._blocks(frozen_backbone.embed(backbone, patches, grid), p_s, dtype, num_queries)
        return backbone.norm(tokens)

    def _is_fp32(self, image: Tensor) -> bool:
        prompters = (self.global_prompter, self.patch_prompter, self.specific_prompter)
        weights = (p for prompter in prompters if prompter is not None for p in prompter.parameters())
        return image.dtype in (torch.float32, torch.uint8) and all(p.dtype == torch.float32 for p in weights)

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

    def _blocks(self, tokens: Tensor, p_s: Tensor | None, dtype: torch.dtype, num_queries: int | None) -> Tensor:
        """All blocks (eq. 11), [B, T, D] -> [B, num_queries or T, D]."""
        if self.recompute == "mlp" and self.gelu_in_8_bits:
            raise ValueError("recompute='mlp' keeps nothing of GELU: expected gelu_in_8_bits=False with it")
        keeps = "input" if self.recompute == "mlp" else "code" if self.gelu_in_8_bits else "pre"
        how = frozen_backbone.How(dtype, self.fold_norm, self.attention, keeps)
        blocks = list(self.backbone.blocks)

        def run(tokens: Tensor, p_s: Tensor | None, indices: range) -> Tensor:
            residual, branch = tokens, None
            for j in indices:
                queries = num_queries if j == len(blocks) - 1 else None
                prompts = self.feature_prompt(j, p_s, tokens.shape[0])
                if prompts is not None and prompts.shape[1] != self.config.prompt_length:
                    raise ValueError(f"{prompts.shape[1]} prompts: expected prompt_length={self.config.prompt_length}")
                residual, branch = frozen_backbone.forward_block(blocks[j], residual, branch, prompts, how, queries)
            return residual if branch is None else residual + branch

        if self.recompute != "block" or not torch.is_grad_enabled():
            return run(tokens, p_s, range(len(blocks)))
        for first in range(0, len(blocks), RECOMPUTED):
            indices = range(first, min(first + RECOMPUTED, len(blocks)))
            tokens = checkpoint(run, tokens, p_s, indices, use_reentrant=False)
        return tokens

    def _normalise(self, pixels: Tensor) -> Tensor:
        weight = self.backbone.patch_embed.proj.weight
        return reference.normalise(pixels, *self._pixel_scale(pixels.device)).to(weight.dtype)

    def image_prompt(self, image: Tensor) -> reference.ImagePrompt:
        """As ``InsVPReference.image_prompt``, also of 8-bit images."""
        return super().image_prompt(self._normalise(image) if image.dtype == torch.uint8 else image)

    def _pixel_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What 8-bit pixels are multiplied by and shifted by, [C] each."""
        facts = self.preprocessing or self.pretrained_cfg
        key = device, tuple(facts["mean"]), tuple(facts["std"])
        if key not in self._pixel_scales:
            with torch.inference_mode(False):  # backward may keep them
                mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in key[1:])
                self._pixel_scales = {key: (1 / (255 * std), -mean / std)}
        return self._pixel_scales[key]

    def _prompted_patches(self, image: Tensor, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x~ unfolded, [B, N, K] in ``dtype``, and, only if the specific prompter reads it, folded.

        ``pixels`` are the image, perhaps still in 8 bits.
        """
        P, prompter, device = self.patch_size, self.patch_prompter, image.device.type
        if prompter is None or not self._superposes(prompter, image):
            prompted = self._image_prompt(image).prompted
            return reference.unfold(prompted, P).to(dtype), prompted
        p_g = None if self.global_prompter is None else self.global_prompter(image)
        folded = self.config.specific_input == "prompted" and self.specific_prompter is not None
        weights = ops.PatchWeights(prompter.fc1.weight, prompter.fc1.bias, prompter.fc2.weight, prompter.fc2.bias)
        with torch.autocast(device, enabled=False):
            affine = self._pixel_scale(pixels.device) if pixels.dtype == torch.uint8 else (None, None)
            patches = ops.superpose(
                pixels,
                p_g,
                weights,
                ops.Blend(P, *self.config.blend_image),
                dtype=torch.promote_types(image.dtype, dtype) if folded else dtype,
                scale=affine[0],
                shift=affine[1],
            )
        prompted = reference.fold(patches, P, *image.shape[-2:]) if folded else image
        return patches.to(dtype), prompted

    def _superposes(self, prompter: nn.Module, image: Tensor) -> bool:
        """Whether a patch prompter is what its weights say, and they fit the image and the backbone."""
        masked = self.training and self.config.patch_dropout > 0  # between the steps that the operation fuses
        return (
            not masked
            and rules.covers(prompter)
            and prompter.patch_size == self.patch_size
            and rules.dtypes_fit(image, *prompter.parameters())
        )

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """A stock block of the general path."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    @property
    def attention(self) -> str:
        """The implementation of attention, "auto" or one of those in ``ops.attention``."""
        return self._attention

    @attention.setter
    def attention(self, impl: str) -> None:
        if impl not in ops.ATTENTION:
            raise ValueError(f"attention={impl!r}: expected one of {sorted(ops.ATTENTION)}")
        self._attention = impl

    @property
    def recompute(self) -> str:
        """What backward computes again: "none", "mlp" or "block"."""
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in ("none", "mlp", "block"):
            raise ValueError(f"recompute={what!r}: expected 'none', 'mlp' or 'block'")
        self._recompute = what

    def _check(self, image: Tensor) -> None:
        embedding, P = self.backbone.patch_embed, self.patch_size
        channels, expected = embedding.proj.weight.shape[1], embedding.img_size
        if image.ndim != 4 or image.shape[1] != channels:
            raise ValueError(f"image has shape {tuple(image.shape)}: expected [B, {channels}, H, W]")
        H, W = image.shape[-2:]
        if expected is not None and embedding.strict_img_size and tuple(expected) != (H, W):
            raise ValueError(
                f"image has {H}x{W} pixels: this backbone expects {expected[0]}x{expected[1]};"
                " create it with img_size=... or dynamic_img_size=True for others"
            )
        if H % P or W % P:
            raise ValueError(f"image has {H}x{W} pixels: expected multiples of the patch side {P}")

    # ------------------------------------------------------------------------------------------------- timm's interface

    @property
    def num_features(self) -> int:
        """D, the width of the features."""
        return self.backbone.num_features

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the backbone's weights: mean, std, interpolation, input size and source."""
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new trained head, on the backbone's device and in its dtype; 0 classes for features."""
        self.backbone.reset_classifier(num_classes, global_pool)
        self.num_classes, self.head = num_classes, self.backbone.get_classifier().requires_grad_(True)
        self.backbone.reset_classifier(0)
        self.head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the trained tensors that are embeddings and not weights, for timm's optimiser factory."""
        return {"common_prompts"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in backward, as ``recompute="block"``."""
        self.recompute = "block" if enable else "none"

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trained parameters and of all."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trained and of all parameters, and what each trained part contributes."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
        parts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                parts[part] = parts.get(part, 0) + parameter.numel()
        for part, count in parts.items():
            print(f"  {part}: {count:,}")
