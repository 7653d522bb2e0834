"""The methods and properties that timm's and PEFT's users expect of a model."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NoReturn

from timm.models._features import feature_take_indices
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from insvp_fast import reference
from insvp_fast.backbones import family_of
from insvp_fast.config import InsVPConfig
from insvp_fast.reference import structure_of, take_head
from insvp_fast.reference.heads import DistilledHead, reset_classifier
from insvp_fast.reference.masks import require_masks
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
    class_names: list[str] | None
    preprocessing: dict[str, Any] | None
    recompute: str
    config: InsVPConfig
    patch_size: int
    prompted_blocks: tuple[int, ...]
    widths: tuple[int, ...]
    prompt_widths: tuple[int, ...]
    common_prompts: nn.ParameterList | None
    global_prompter: reference.GlobalPrompter | None
    patch_prompter: reference.PatchPrompter | None
    specific_prompter: reference.SpecificPrompter | None
    if TYPE_CHECKING:

        def block_outputs(
            self, image: Tensor, blocks: Collection[int], attn_mask: Tensor | None = None
        ) -> list[Any]: ...

        def image_prompt(self, image: Tensor) -> reference.ImagePrompt: ...

    num_features = _of_backbone("num_features", "D, the width of the features.")
    head_hidden_size = _of_backbone("head_hidden_size", "The width of what the head reads.")
    embed_dim = _of_backbone("embed_dim", "D, the width of the tokens.")
    in_chans = _of_backbone("in_chans", "C, the channels of an image.")
    num_prefix_tokens = _of_backbone("num_prefix_tokens", "The number of tokens before the patches; prompts are none.")
    num_reg_tokens = _of_backbone("num_reg_tokens", "The number of register tokens.")
    has_class_token = _of_backbone("has_class_token", "Whether there is a class token.")
    global_pool = _of_backbone("global_pool", "How the tokens are pooled.")
    dynamic_img_size = _of_backbone("dynamic_img_size", "Whether images may have any size.")
    output_fmt = _of_backbone("output_fmt", "The order of the dimensions of features, if they are maps.")
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

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; of a distilled DeiT the two, for the class token and for the distillation token."""
        head = self.head
        return (head.class_head, head.distillation_head) if isinstance(head, DistilledHead) else head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new trained head, on the backbone's device and in its dtype; 0 classes for features.

        Its classes have no names until ``class_names`` is set again.
        """
        reset_classifier(self.backbone, num_classes, global_pool)
        self.num_classes, self.head = num_classes, take_head(self.backbone).requires_grad_(True)
        self.head.train(self.training)
        self.class_names = None

    def init_weights(self, mode: str = "") -> None:
        """Draw what is trained anew, as the constructor does; the frozen backbone keeps its weights.

        Raises:
            ValueError: for a ``mode``, timm's name of a way to draw the backbone's.
        """
        if mode:
            raise ValueError(f"mode={mode!r}: expected '', the backbone is frozen and its weights are not drawn again")
        for part in (self.global_prompter, self.patch_prompter, self.specific_prompter, self.head):
            for module in () if part is None else part.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        for name, parameter in self.named_parameters():
            if name.startswith("common_prompts"):
                nn.init.uniform_(parameter, -1, 1)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        **size: Any,
    ) -> None:
        """Resize the backbone's position embedding for another image size; ``size`` goes to the backbone as it is.

        Images are then prepared in that size, where it is known how: ``preprocessing`` gets another ``input_size``.

        Raises:
            ValueError: for another patch size, which the patch prompter's weights do not fit.
        """
        if patch_size not in (None, self.patch_size, (self.patch_size, self.patch_size)):
            raise ValueError(f"patch_size={patch_size!r}: expected {self.patch_size}, that of the patch prompter")
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.backbone.set_input_size(sides, **size)
        if sides is not None and self.preprocessing is not None:
            self.preprocessing = self.preprocessing | {"input_size": [self.in_chans, *sides]}

    # training

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are computed again in backward."""
        return self.recompute == "block"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch ``recompute="block"`` on or off."""
        self.recompute = "block" if enable else "none"

    def no_weight_decay(self) -> set[str]:
        """Names of what shall not decay, for timm's optimizer factory: common prompts, and what the backbone names.

        Prompts of other methods are not among them: their authors let them decay.
        """
        of_backbone = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        common = {name for name, _ in self.named_parameters() if name.startswith("common_prompts")}
        return common | {f"backbone.{name}" for name in of_backbone}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of each parameter for timm's layer decay, by its name: those of the backbone, and the head behind.

        The prompters stand before the first block, and the common prompts of a block in it.
        """
        names = [name for name, _ in self.named_parameters()]
        places = [(self._place(name), name) for name in names if "_prompter." not in name]
        groups = group_with_matcher(places, self.backbone.group_matcher(coarse), return_values=True)
        layers = dict.fromkeys(names, 0) | {name: layer for layer, group in groups.items() for name in group}
        return layers.__getitem__

    def _place(self, name: str) -> str:
        """What a parameter would be called if it were the backbone's."""
        part, _, rest = name.partition(".")
        if part != "common_prompts":
            return rest if part == "backbone" else name
        block = self.prompted_blocks[int(rest)]
        if self._depths is None:
            return f"blocks.{block}.{part}"
        stage = bisect_left(self._feature_blocks(), block)
        return f"layers.{stage}.blocks.{block - sum(self._depths[:stage])}.{part}"

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
        attn_mask: Tensor | None = None,
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
            attn_mask: see ``InsVPViT.forward``.
            is_causal: in timm's signature; must be False.

        Raises:
            ValueError: for another ``output_fmt``, ``is_causal``, or a mask that does not fit.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'")
        self._require_taken(attn_mask, is_causal)
        if not self.widths:  # only the image is prompted
            options = {"norm": norm, "stop_early": stop_early, "output_fmt": output_fmt}
            asked = {"return_prefix_tokens": return_prefix_tokens, "output_dict": output_dict}
            options |= {"intermediates_only": intermediates_only} | {name: True for name in asked if asked[name]}
            return self.backbone.forward_intermediates(self.image_prompt(x).prompted, indices, **options)
        ends = self._feature_blocks()
        taken, last = feature_take_indices(len(ends), indices)
        last = last if stop_early or intermediates_only else len(ends) - 1
        ran = sorted({*taken, last})
        outputs = dict(zip(ran, self.block_outputs(x, [ends[i] for i in ran], attn_mask), strict=True))
        tokens = {i: self._tokens(h, i, x) for i, h in outputs.items()}
        n = 0 if self._depths else tokens[last].shape[1] - math.prod(self._feature_grid(x))
        # of several widths, the norm fits only the last
        normed = {i: self.norm(h) for i, h in tokens.items() if i == len(ends) - 1 or self._depths is None}
        features = normed.get(last, tokens[last])
        if family_of(self.backbone) is None:
            features = structure_of(self.backbone).final_norm(self.backbone, outputs[last])
        chosen = [normed.get(i, tokens[i]) if norm else tokens[i] for i in sorted({*taken})]
        prefix, maps = [h[:, :n] for h in chosen], [self._feature_map(h, n, x, output_fmt) for h in chosen]
        with_prefix = return_prefix_tokens and n > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": prefix} if with_prefix else {}
            return found if intermediates_only else found | {"image_features": features}
        intermediates = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return intermediates if intermediates_only else (features, intermediates)

    def _require_taken(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        if is_causal:
            raise ValueError("is_causal=True: expected False, and the mask itself as attn_mask")
        if attn_mask is not None:
            require_masks(self.backbone)

    @property
    def _depths(self) -> list[int] | None:
        """The numbers of blocks in the stages of the backbone; None if it has no stages."""
        return [len(stage.blocks) for stage in self.backbone.layers] if hasattr(self.backbone, "layers") else None

    def _feature_blocks(self) -> list[int]:
        """The blocks behind which there is a feature map: the last of each stage, or all."""
        depths = self._depths
        return [*range(len(self.widths))] if depths is None else [end - 1 for end in accumulate(depths)]

    def _tokens(self, h: Any, feature: int, image: Tensor) -> Tensor:
        """The tokens in h behind a block, [B, T, D]; those of stage number ``feature`` in rows, [B, h, w, D]."""
        tokens: Tensor = h if isinstance(h, Tensor) else h.tokens
        if self._depths is None or tokens.ndim == 4:
            return tokens
        rows: Tensor = tokens.unflatten(1, [side // self.patch_size >> feature for side in image.shape[-2:]])
        return rows

    def _feature_map(self, tokens: Tensor, prefix: int, image: Tensor, output_fmt: str) -> Tensor:
        """Tokens [B, T, D], or in rows [B, h, w, D], in one of timm's formats."""
        if tokens.ndim == 4:
            return tokens.flatten(1, 2) if output_fmt == "NLC" else tokens.permute(0, 3, 1, 2).contiguous()
        if output_fmt == "NLC":
            return tokens[:, prefix:]
        rows: Tensor = tokens[:, prefix:].transpose(1, 2).unflatten(2, self._feature_grid(image))
        return rows.contiguous()

    def _feature_grid(self, image: Tensor) -> tuple[int, int]:
        embedding = getattr(self.backbone, "embeds", None) or self.patch_embed  # NaFlexVit has another name for it
        grid: tuple[int, int] = embedding.dynamic_feat_size(image.shape[-2:])
        return grid

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
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
        ends = self._feature_blocks()
        taken: list[int] = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.widths:
            self._drop_prompts(ends[max(taken)] + 1)
        if prune_head or (self._depths is not None and max(taken) + 1 < len(ends)):  # a head fits the last width
            self.reset_classifier(0, "")
        return taken

    def _drop_prompts(self, depth: int) -> None:
        """Drop what belongs to the blocks from number ``depth`` on."""
        kept = tuple(j for j in self.prompted_blocks if j < depth)
        self.widths, self.prompted_blocks = self.widths[:depth], kept
        self.config = replace(self.config, prompted_blocks=kept)
        specific, count = self.specific_prompter, len(self.prompt_widths)
        if not kept:
            self.specific_prompter = self.common_prompts = None
        elif self.common_prompts is not None:
            self.common_prompts = self.common_prompts[: len(kept)]
        if isinstance(specific, reference.PyramidPrompter):
            specific.conv3 = nn.ModuleList([*specific.conv3.children()][:count])
            specific.widths = specific.widths[:count]

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
