"""A frozen backbone with prompts: what all methods of prompting share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timm import create_model
from torch import Tensor, nn

from insvp_fast.reference.heads import DistilledHead, take_head
from insvp_fast.reference.structure import Prompts, first_convolution
from insvp_fast.reference.structures import structure_of

__all__ = ["PromptedReference"]


class PromptedReference(nn.Module):
    """A frozen backbone of timm with a trained head and, by the two methods that a subclass gives it, with prompts.

    ``prompt_image`` makes the image that the backbone reads, ``block_prompts`` what a block attends to besides its
    tokens.

    Args, shapes and errors: see ``InsVPReference``.
    """

    carry_prompts = False  # whether the prompts' outputs are the prompts of a block that has none of its own

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        module: Any = backbone
        if isinstance(backbone, str):
            module = create_model(backbone, pretrained=pretrained, **backbone_kwargs)
        elif pretrained or backbone_kwargs:
            raise ValueError(
                f"pretrained and {sorted(backbone_kwargs)} belong to a backbone given by name, and a module was given"
            )
        structure = structure_of(module)
        self.patch_size = structure.patch_size(module)
        if num_classes is not None:
            module.reset_classifier(num_classes)
        self.num_classes: int = module.num_classes
        self.head = take_head(module)
        self.backbone: Any = module.requires_grad_(False).eval()
        self.widths = tuple(structure.widths(module))
        self.in_channels = first_convolution(module).in_channels
        self.head.requires_grad_(True)

    def train(self, mode: bool = True) -> PromptedReference:
        """Set the mode of what is trained; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def prompt_image(self, image: Tensor) -> tuple[Tensor, Any]:
        """The prompted image, [B, C, H, W], and what ``block_prompts`` needs of it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it prompts an image")

    def block_prompts(self, block: int, context: Any, batch: int) -> Prompts | None:
        """The prompts of a block, for ``batch`` images; None for a block without prompts of its own."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it prompts a block")

    def apply_block(self, block: int, h: Any, prompts: Prompts | None) -> tuple[Any, Tensor | None]:
        """Block number ``block`` of h with prompts (eq. 2 and 11); see ``Structure.apply_block``."""
        return structure_of(self.backbone).apply_block(self.backbone, block, h, prompts)

    def block_outputs(self, image: Tensor, blocks: Collection[int]) -> list[Any]:
        """h behind each of ``blocks``, in the order in which they run; -1 stands for what is before the first.

        What is behind the last of them does not run.
        """
        structure, carried = structure_of(self.backbone), None
        prompted, context = self.prompt_image(image)
        h = structure.embed(self.backbone, prompted)  # (1)
        outputs = [h] if -1 in blocks else []
        for j in range(max(blocks) + 1):
            prompts = self.block_prompts(j, context, image.shape[0])
            h, prompt_outputs = self.apply_block(j, h, carried if prompts is None else prompts)
            carried = Prompts(prompt_outputs) if self.carry_prompts and prompt_outputs is not None else None
            if j in blocks:
                outputs.append(h)
        return outputs

    def forward_features(self, image: Tensor) -> Tensor:
        """The features that the backbone's ``forward_features`` returns, [B, T, D] of a ViT, without prompts."""
        (h,) = self.block_outputs(image, [len(self.widths) - 1])
        return structure_of(self.backbone).final_norm(self.backbone, h)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens as the backbone does and, unless ``pre_logits``, classify (eq. 3)."""
        if isinstance(self.head, DistilledHead) and not pre_logits:
            return self.head(tokens)
        pooled: Tensor = self.backbone.forward_head(tokens, pre_logits=True)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(image))
