"""MethodViT: a frozen backbone with the prompts of any method, on the fast path, saved as an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from insvp_fast import coverage
from insvp_fast.checkpoints.adapter import adapter_part
from insvp_fast.checkpoints.adapter_config import BackboneRecord
from insvp_fast.checkpoints.backbone import unlike_timm
from insvp_fast.methods.checkpoint import MethodCheckpoint, options_of, require_method
from insvp_fast.methods.dam_vp import DAMVP
from insvp_fast.prompted import PromptedViT
from insvp_fast.reference import Geometry, ImagePrompt, PromptMethod
from insvp_fast.reference.heads import leaves_backbone
from insvp_fast.timm_interface import TimmInterface

__all__ = ["MethodViT"]


class MethodViT(MethodCheckpoint, TimmInterface, PromptedViT):
    """A frozen backbone of timm with a trained head and the prompts of a method.

    Computes what ``PromptedReference`` with the same arguments says, on the fast path where that covers the backbone,
    else module by module; a warning then says why. Trained: ``method`` and ``head``.

    Args:
        method: makes the method for a backbone: a subclass of ``PromptMethod``, or ``functools.partial`` of one.

    Other arguments: see ``InsVPViT``.

    Raises:
        TypeError: if the backbone cannot be prompted, or has more than one head, or ``method`` makes no
            ``PromptMethod``.
        ValueError: if the method asks for what cannot be done with such a backbone.
    """

    KIND = PromptMethod

    # what ``TimmInterface`` would sort into layers, if it were InsVP's: a method learns at the rate of the head
    prompt_widths = ()
    common_prompts = global_prompter = patch_prompter = specific_prompter = None

    @leaves_backbone
    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        method: Callable[[Geometry], PromptMethod],
        pretrained: bool = False,
        recompute: str = "none",
        fold_norm: bool = True,
        attention: str = "auto",
        gelu_in_8_bits: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        require_method(method, PromptMethod)
        super().__init__(backbone, num_classes, method=method, pretrained=pretrained, **backbone_kwargs)
        if isinstance(self.method, DAMVP):
            self.method.attach(PromptedViT(self.backbone, method=PromptMethod))
        self.recompute, self.fold_norm, self.attention = recompute, fold_norm, attention
        self.gelu_in_8_bits = gelu_in_8_bits
        self._options = options_of(method)
        coverage.covers(self)  # warns now rather than in the first forward pass

    def init_weights(self, mode: str = "") -> NoReturn:
        """Not for these methods: make the model again.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a {type(self).__name__} does not draw its weights anew: make the model again")

    def prune_intermediate_layers(self, *arguments: Any, **options: Any) -> NoReturn:
        """Not for these methods, whose parameters are for all blocks of the backbone: prune that before.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a {type(self).__name__} does not drop blocks: drop them from the backbone before")

    def image_prompt(self, image: Tensor) -> ImagePrompt:
        """The prompted image and what was added to it, [B, C, H, W]; None for a method that adds nothing."""
        image = self._normalize(image) if image.dtype == torch.uint8 else image
        prompted, _ = self.prompt_image(image)
        return ImagePrompt(None, None, None if prompted is image else prompted - image, prompted)

    def _adapter(self) -> dict[str, Tensor]:
        return adapter_part(self.state_dict())

    def _backbone_record(self) -> BackboneRecord:
        return BackboneRecord.of(self.backbone).unless(unlike_timm(self.backbone))
