"""InsVP: the paper's prompts in a frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig
from insvp_fast.reference.heads import leaves_backbone
from insvp_fast.reference.images import simam
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.reference.prompters import GlobalPrompter, PatchPrompter, PyramidPrompter, SpecificPrompter
from insvp_fast.reference.structure import Prompts, pixel_layer

__all__ = ["ImagePrompt", "InsVPReference", "split_common_prompts"]


class ImagePrompt(NamedTuple):
    """The image prompt and what it is made of, each [B, C, H, W]; None where switched off."""

    patch: Tensor | None
    global_: Tensor | None
    prompt: Tensor | None
    prompted: Tensor


class InsVPReference(PromptedReference):
    """InsVP around a frozen backbone of timm, exactly as the equations say.

    Args:
        backbone: a timm model name, or a timm model, which is modified: it gets frozen, and its head becomes the
            model's. ``STRUCTURES`` lists the classes whose blocks take prompts; others take image prompts only.
        num_classes: classes of a new head; None keeps the backbone's own head, 0 returns pooled features.
        config: the hyper-parameters; ``InsVPConfig()``, the paper's, if not given.
        pretrained, backbone_kwargs: for ``timm.create_model``, where the backbone is a name.

    Shapes: images [B, C, H, W] in, logits [B, num_classes] out. Trained: the prompters, the common prompts and the
    head. Everything under ``backbone`` is frozen and stays in evaluation mode.

    The common prompts are one parameter for each prompted block. In a backbone of several widths, as Swin is, the
    specific prompter has a last convolution for each.

    Raises:
        TypeError: if the backbone is no model of timm, or has more than one head, or ``config`` is something else,
            or a field of it was given by itself.
        ValueError: if its patches are not square, or the configuration asks for what it does not have.
    """

    @leaves_backbone
    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        config: InsVPConfig | None = None,
        *,
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        if not isinstance(config, InsVPConfig | None):
            raise TypeError(f"config is a {type(config).__name__}: expected an InsVPConfig")
        for name in InsVPConfig.__dataclass_fields__.keys() & backbone_kwargs.keys():
            instead = f"config=InsVPConfig({name}={backbone_kwargs[name]!r})"
            raise TypeError(f"{name} is a field of InsVPConfig, not an argument of the backbone: expected {instead}")
        super().__init__(backbone, num_classes, pretrained=pretrained, **backbone_kwargs)
        self.config = config = config or InsVPConfig()
        self.carry_prompts = config.carry_prompts
        if config.has_feature_prompt and not self.widths:
            kind = type(self.backbone).__name__
            raise ValueError(
                f"a {kind} has no blocks that prompts can be put into, it takes image prompts only: expected a"
                " configuration with common_prompt=False and specific_prompt=False"
            )
        self.prompted_blocks = config.block_indices(len(self.widths))
        if config.carry_prompts and len({*self.widths}) > 1:
            raise ValueError("carry_prompts=True: expected a backbone of one width, in which prompts can run on")
        C, P, weight = self.in_channels, self.patch_size, pixel_layer(self.backbone).weight
        with torch.device(weight.device):
            self.global_prompter = GlobalPrompter(C, config) if config.global_prompt else None
            self.patch_prompter = PatchPrompter(C, P, config) if config.patch_prompt else None
            specific = config.specific_prompt and bool(self.prompted_blocks)
            self.specific_prompter = self._make_specific_prompter() if specific else None
            common = config.common_prompt and bool(self.prompted_blocks)
            self.common_prompts = self._make_common_prompts(weight.dtype) if common else None
        self.register_load_state_dict_pre_hook(_split_common_prompts)
        for prompter in (self.global_prompter, self.patch_prompter, self.specific_prompter):
            if prompter is not None:
                prompter.to(weight.dtype)
        self.train()

    @property
    def prompt_widths(self) -> tuple[int, ...]:
        """The different widths of the prompted blocks, in their order."""
        return tuple(dict.fromkeys(self.widths[j] for j in self.prompted_blocks))

    def _make_specific_prompter(self) -> SpecificPrompter:
        if len({*self.widths}) > 1:
            return PyramidPrompter(self.in_channels, self.prompt_widths, self.config)
        return SpecificPrompter(self.in_channels, self.patch_size, self.widths[0], self.config)

    def _make_common_prompts(self, dtype: torch.dtype) -> nn.ParameterList:
        L, widths = self.config.prompt_length, [self.widths[j] for j in self.prompted_blocks]
        return nn.ParameterList(torch.empty(L, D).uniform_(-1, 1).to(dtype) for D in widths)

    def prompt_image(self, image: Tensor) -> tuple[Tensor, Any]:
        """x~ (eq. 4 to 7) and p_s (eq. 9)."""
        image = simam(image) if self.config.simam else image
        prompted = self._image_prompt(image).prompted
        return prompted, self.specific_prompt(image, prompted)

    def image_prompt(self, image: Tensor) -> ImagePrompt:
        """The image prompt and its parts (eq. 4 to 7), each [B, C, H, W]; a prompt that is switched off is None."""
        return self._image_prompt(simam(image) if self.config.simam else image)

    def _image_prompt(self, image: Tensor) -> ImagePrompt:
        (w_g, w_l), p_g, p_l, prompt = self.config.blend_image, None, None, None
        if self.global_prompter is not None:
            p_g = self.global_prompter(image)  # (4)
            prompt = w_g * p_g
        if self.patch_prompter is not None:
            p_l = self.patch_prompter(image)  # (5)
            prompt = w_l * p_l if prompt is None else prompt + w_l * p_l  # (6)
        return ImagePrompt(p_l, p_g, prompt, image if prompt is None else image + prompt)  # (7)

    def specific_prompt(self, image: Tensor, prompted: Tensor) -> Any:
        """p_s, [B, L, D], from the image or from the prompted image (eq. 9); of several widths, one tensor for each."""
        if self.specific_prompter is None:
            return None
        return self.specific_prompter(image if self.config.specific_input == "image" else prompted)

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """p_j of ``feature_prompt``; ``context`` is p_s."""
        p_j = self.feature_prompt(block, context, batch)
        return None if p_j is None else Prompts(p_j)

    def feature_prompt(self, block: int, p_s: Any, batch: int) -> Tensor | None:
        """p_j = w_c·c_j + w_s·p_s, [B, L, D], or None for a block without prompts of its own (eq. 8 and 10)."""
        if block not in self.prompted_blocks:
            return None
        (w_c, w_s), width = self.config.blend_feature, self.widths[block]
        if isinstance(p_s, tuple):
            p_s = p_s[self.prompt_widths.index(width)]
        if self.common_prompts is None:
            return None if p_s is None else w_s * p_s
        common = self.common_prompts[self.prompted_blocks.index(block)]
        c_j = F.dropout(common.expand(batch, -1, -1), self.config.common_dropout, self.training)
        return w_c * c_j if p_s is None else w_c * c_j + w_s * p_s


def split_common_prompts(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict with the common prompts of each block by themselves.

    Earlier versions, and the authors' code, stack those of all blocks of one width, [blocks, L, D].
    """
    stacks = {key: t for key, t in tensors.items() if key.startswith(f"{prefix}common_prompts") and t.ndim == 3}
    blocks = [block for key in sorted(stacks) for block in stacks[key].unbind()]
    rest = {key: value for key, value in tensors.items() if key not in stacks}
    return rest | {f"{prefix}common_prompts.{i}": block for i, block in enumerate(blocks)}


def _split_common_prompts(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """``split_common_prompts`` in place, before a state dict is loaded."""
    split = split_common_prompts(state, prefix)
    state.clear()
    state.update(split)
