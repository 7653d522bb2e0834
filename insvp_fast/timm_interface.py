"""The methods and properties that timm's and PEFT's users expect of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig
from insvp_fast.timm_models import in_backbone, prompted_cfg

__all__ = ["TimmInterface"]


def _of_backbone(name: str, meaning: str) -> Any:
    """A property that the backbone has and keeps; what it does not have, ``hasattr`` denies of the model too."""
    return property(lambda self: getattr(self.backbone, name), doc=meaning)


class TimmInterface(nn.Module):
    """timm's and PEFT's interface for a class with the attributes of ``InsVPViT``.

    The modules that timm's code reads from a model, ``blocks`` for instance, are properties: they belong to the
    backbone, and have their keys under ``backbone`` alone.
    """

    backbone: Any
    head: nn.Module
    num_classes: int
    recompute: str
    config: InsVPConfig
    patch_size: int
    prompted_blocks: tuple[int, ...]
    common_prompts: nn.Parameter | None
    global_prompter: nn.Module | None
    patch_prompter: nn.Module | None
    specific_prompter: nn.Module | None
    if TYPE_CHECKING:

        def block_outputs(self, image: Tensor, blocks: Collection[int]) -> list[Tensor]: ...

    num_features = _of_backbone("num_features", "D, the width of the features.")
    head_hidden_size = _of_backbone("head_hidden_size", "The width of what the head reads.")
    embed_dim = _of_backbone("embed_dim", "D, the width of the tokens.")
    in_chans = _of_backbone("in_chans", "C, the channels of an image.")
    num_prefix_tokens = _of_backbone("num_prefix_tokens", "The number of tokens before the patches; prompts are none.")
    num_reg_tokens = _of_backbone("num_reg_tokens", "The number of register tokens.")
    has_class_token = _of_backbone("has_class_token", "Whether there is a class token.")
    global_pool = _of_backbone("global_pool", "How the tokens are pooled.")
    dynamic_img_size = _of_backbone("dynamic_img_size", "Whether images may have any size.")
    feature_info = _of_backbone("feature_info", "Width, reduction and module of each feature map.")
    patch_embed = _of_backbone("patch_embed", "The backbone's patch embedding.")
    blocks = _of_backbone("blocks", "The backbone's blocks.")
    norm = _of_backbone("norm", "The norm after the last block.")
    fc_norm = _of_backbone("fc_norm", "The norm after pooling.")
    attn_pool = _of_backbone("attn_pool", "The attention that pools, or None.")

    # what timm knows of the model

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the weights, for this model: mean, std, interpolation, input size and source."""
        return prompted_cfg(self.backbone.pretrained_cfg)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """``pretrained_cfg`` by its older name."""
        return self.pretrained_cfg

    @property
    def _traits(self) -> dict[str, Any]:
        """What timm records of the input: the size of images and whether it is fixed, and the first convolution."""
        traits: dict[str, Any] = dict(self.backbone._traits)
        return traits | {"first_conv": in_backbone(traits.get("first_conv"))}

    # head and weights

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new trained head, on the backbone's device and in its dtype; 0 classes for features."""
        self.backbone.reset_classifier(num_classes, global_pool)
        self.num_classes, self.head = num_classes, self.backbone.get_classifier().requires_grad_(True)
        self.backbone.reset_classifier(0)
        self.head.train(self.training)

    def init_weights(self, mode: str = "") -> None:
        """Draw what is trained anew, as the constructor does; the frozen backbone keeps its weights.

        Raises:
            ValueError: for a ``mode``, timm's name of a way to draw the backbone's.
        """
        if mode:
            raise ValueError(f"mode={mode!r}: expected '', the backbone is frozen and its weights are not drawn again")
        for part in (self.global_prompter, self.patch_prompter, self.specific_prompter, self.head):
            for module in () if part is None else part.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        if self.common_prompts is not None:
            nn.init.uniform_(self.common_prompts, -1, 1)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        **size: Any,
    ) -> None:
        """Resize the backbone's position embedding for another image size; ``size`` goes to the backbone as it is.

        Raises:
            ValueError: for another patch size, which the patch prompter's weights do not fit.
        """
        if patch_size not in (None, self.patch_size, (self.patch_size, self.patch_size)):
            raise ValueError(f"patch_size={patch_size!r}: expected {self.patch_size}, that of the patch prompter")
        self.backbone.set_input_size((img_size, img_size) if isinstance(img_size, int) else img_size, **size)

    # training

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are computed again in backward."""
        return self.recompute == "block"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch ``recompute="block"`` on or off."""
        self.recompute = "block" if enable else "none"

    def no_weight_decay(self) -> set[str]:
        """Names of the trained tensors that are embeddings and not weights, for timm's optimizer factory."""
        return {name for name, _ in self.named_parameters() if name.startswith("common_prompts")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the model for timm's layer decay: those of the backbone, and in them what is trained.

        The prompters stand before the first block. The common prompts of all blocks are one tensor, which can have
        only one learning rate: that of the prompted block in the middle.
        """
        layers = self.backbone.group_matcher(coarse)
        blocks = layers["blocks"]
        blocks = [(blocks, None)] if isinstance(blocks, str) else blocks
        middle = self.prompted_blocks[len(self.prompted_blocks) // 2] if self.prompted_blocks else 0
        return {
            "stem": rf"{_under_backbone(layers['stem'])}|(?:global|patch|specific)_prompter\.",
            "blocks": [
                ("common_prompts", (middle,)),
                *((_under_backbone(pattern), place) for pattern, place in blocks),
            ],
        }

    # features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens or maps after chosen blocks, without prompts, in the forms that timm's models give them.

        Args:
            x: images, [B, C, H, W].
            indices: the last n blocks, or their indices; None for all.
            return_prefix_tokens: also give the class and register tokens, [B, n, D], as (map, prefix tokens).
            norm: apply the backbone's last norm to the intermediates.
            stop_early: do not run the blocks behind the last index; the features are then those after that.
            output_fmt: "NCHW" for maps [B, D, h, w], or "NLC" for tokens [B, N, D].
            intermediates_only: leave out the features, what ``forward_features`` returns.
            output_dict: give a dictionary of "image_features", "image_intermediates" and
                "image_intermediates_prefix" instead of (features, intermediates).
            attn_mask, is_causal: in timm's signature; must be None and False.

        Raises:
            ValueError: for another ``output_fmt``, or a mask.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'")
        _refuse_mask(attn_mask, is_causal)
        depth, n = len(self.blocks), getattr(self, "num_prefix_tokens", 0)
        taken, last = feature_take_indices(depth, indices)
        end = last if stop_early or intermediates_only else depth - 1
        ran = sorted({*taken, end})
        outputs = dict(zip(ran, self.block_outputs(x, ran), strict=True))
        tokens = [self.norm(outputs[j]) if norm else outputs[j] for j in sorted({*taken})]
        prefix, maps = [y[:, :n] for y in tokens], [y[:, n:] for y in tokens]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        with_prefix = return_prefix_tokens and n > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": prefix} if with_prefix else {}
            return found if intermediates_only else found | {"image_features": self.norm(outputs[end])}
        intermediates = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return intermediates if intermediates_only else (self.norm(outputs[end]), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: None = None,
    ) -> Any:
        """DINO's name and arguments for ``forward_intermediates`` without features."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, True, "NCHW" if reshape else "NLC", True, attn_mask=attn_mask
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last index with their prompts, and the last norm and the head if asked.

        Returns:
            The indices, all counted from the first block.
        """
        taken: list[int] = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        kept = tuple(j for j in self.prompted_blocks if j < len(self.blocks))
        self.prompted_blocks, self.config = kept, replace(self.config, prompted_blocks=kept)
        if not kept:
            self.specific_prompter = self.common_prompts = None
        elif self.common_prompts is not None:
            prompts = self.common_prompts
            self.common_prompts = nn.Parameter(prompts.detach()[: len(kept)].clone(), prompts.requires_grad)
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks every module for what it shall compile in its place
        raise NotImplementedError(f"torch.jit.script does not take {type(self).__name__}: use torch.export.export")

    # PEFT's

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trained parameters and of all."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trained and of all parameters, and the number in each trained part."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
        parts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                parts[part] = parts.get(part, 0) + parameter.numel()
        for part, count in parts.items():
            print(f"  {part}: {count:,}")


def _under_backbone(pattern: str) -> str:
    """A regular expression for the backbone's names as one for the model's."""
    return rf"backbone\.(?:{pattern.replace('^', '')})"


def _refuse_mask(attn_mask: object, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a mask of the attention was given: expected attn_mask=None and is_causal=False")
