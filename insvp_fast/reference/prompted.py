"""A frozen backbone with prompts: what all methods of prompting share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from timm import create_model
from torch import Tensor, nn

from insvp_fast.reference.heads import DistilledHead, leaves_backbone, refuse_arguments, reset_classifier, take_head
from insvp_fast.reference.masks import with_mask
from insvp_fast.reference.method import Geometry, PromptMethod
from insvp_fast.reference.structure import Prompts, in_channels, pixel_layer
from insvp_fast.reference.structures import structure_of
from insvp_fast.reference.vision_transformer import block_reason

__all__ = ["PromptedReference", "check_blocks"]


def check_blocks(blocks: Collection[int], depth: int) -> None:
    """Raise ValueError for no block, or one that is neither -1, the input of the first, nor one of ``depth``."""
    if not len(blocks) or not all(-1 <= block < depth for block in blocks):
        raise ValueError(f"blocks={[*blocks]}: expected at least one of -1 to {depth - 1}")


class PromptedReference(nn.Module):
    """A frozen backbone of timm with a trained head and with the prompts of a ``PromptMethod``.

    A subclass may be its own method instead, and say itself what ``PromptMethod`` says: so does ``InsVPReference``.

    Args:
        method: makes the method for a backbone: a subclass of ``PromptMethod``, or ``functools.partial`` of one.

    Other arguments, shapes and errors: see ``InsVPReference``.

    Raises:
        TypeError: if ``method`` makes no ``PromptMethod``.
        ValueError: if the method asks for what cannot be done with such a backbone.
    """

    reads_tokens = PromptMethod.reads_tokens
    gives_keys_values = PromptMethod.gives_keys_values
    carry_prompts = PromptMethod.carry_prompts
    prompted_blocks: tuple[int, ...]
    _create = staticmethod(create_model)  # of a backbone given by name

    @leaves_backbone
    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        method: Callable[[Geometry], PromptMethod] | None = None,
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        module: Any = backbone
        if isinstance(backbone, str):
            module = self._create(backbone, pretrained=pretrained, **backbone_kwargs)
        else:
            refuse_arguments(backbone_kwargs, pretrained)
        structure = structure_of(module)
        self.patch_size = structure.patch_size(module)
        if num_classes is not None:
            reset_classifier(module, num_classes)
        self.num_classes: int = module.num_classes
        self.head = take_head(module)
        self.backbone: Any = module.requires_grad_(False).eval()
        self.widths = tuple(structure.widths(module))
        self.in_channels = in_channels(module, self.patch_size)
        self.head.requires_grad_(True)
        self.method = None if method is None else self._make_method(method)

    def _make_method(self, make: Callable[[Geometry], PromptMethod]) -> PromptMethod:
        weight = pixel_layer(self.backbone).weight
        with torch.device(weight.device):
            method = make(Geometry.of(self.backbone, self.widths, self.in_channels, self.patch_size))
        if not isinstance(method, PromptMethod):
            raise TypeError(f"method= makes a {type(method).__name__}: expected a PromptMethod")
        supported = structure_of(self.backbone).SUPPORTS
        for name in ("reads_tokens", "gives_keys_values", "carry_prompts"):
            if getattr(method, name) and name not in supported:
                kinds = type(method).__name__, type(self.backbone).__name__
                raise ValueError(f"{kinds[0]} has {name}=True, which prompts in a {kinds[1]} cannot have")
            setattr(self, name, getattr(method, name))
        self.prompted_blocks = method.prompted_blocks
        for j, block in enumerate(self.backbone.blocks if self.gives_keys_values else ()):
            if j in (self.prompted_blocks or [j]) and (reason := block_reason(block)):
                raise ValueError(f"{type(method).__name__} has gives_keys_values=True: {reason}")
        return method.to(weight.dtype)

    def _own_method(self) -> PromptMethod:  # no property: what lists a module's attributes would raise
        if self.method is None:
            raise NotImplementedError(f"{type(self).__name__} has no method of prompting: expected method=")
        return self.method

    def train(self, mode: bool = True) -> PromptedReference:
        """Set the mode of what is trained; the frozen backbone stays in evaluation mode."""
        if not isinstance(mode, bool):
            raise ValueError(f"mode={mode!r}: expected True or False")
        self.training = mode
        for name, child in self.named_children():
            child.train(mode and name != "backbone")  # at no time: other models may use it in other threads
        return self

    def prompt_image(self, image: Tensor) -> tuple[Tensor, Any]:
        """See ``PromptMethod.prompt_image``."""
        found: Any = self._own_method().prompt_image(image)
        if not isinstance(found, tuple | list) or len(found) != 2:
            what = f"{type(self.method).__name__}.prompt_image returns a {type(found).__name__}"
            raise TypeError(f"{what}: expected the image and a context, of any kind")
        prompted, context = found
        return prompted, context

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """See ``PromptMethod.block_prompts``."""
        prompts, kind = self._own_method().block_prompts(block, context, batch, tokens), type(self.method).__name__
        if not isinstance(prompts, Prompts | None):
            found = f"{kind}.block_prompts returns a {type(prompts).__name__} for block {block}"
            raise TypeError(f"{found}: expected Prompts or None")
        if self.carry_prompts and (prompts is not None) != (block in self.prompted_blocks):
            found = f"block {block} has {'no ' * (prompts is None)}prompts of its own"
            raise ValueError(f"{found}: expected some in {kind}.prompted_blocks={self.prompted_blocks} alone")
        if prompts is not None and prompts.keys_values is not None and not self.gives_keys_values:
            raise ValueError(f"the prompts of block {block} have keys_values: expected {kind}.gives_keys_values=True")
        return prompts

    def apply_block(self, block: int, h: Any, prompts: Prompts | None) -> tuple[Any, Tensor | None]:
        """Block number ``block`` of h with prompts (eq. 2 and 11); see ``Structure.apply_block``.

        Raises:
            ValueError: for prompts with lengths.
        """
        if prompts is not None and prompts.lengths is not None:
            raise ValueError(f"the prompts of block {block} have lengths: expected none, but on the fast path")
        return structure_of(self.backbone).apply_block(self.backbone, block, h, prompts)

    def block_outputs(self, image: Tensor, blocks: Collection[int], attn_mask: Tensor | None = None) -> list[Any]:
        """h behind each of ``blocks``, in the order in which they run; -1 stands for what is before the first.

        What is behind the last of them does not run. ``attn_mask``: see ``forward``.

        Raises:
            ValueError: for no block, or one that the backbone does not have.
        """
        check_blocks(blocks, len(self.widths))
        structure, carried = structure_of(self.backbone), None
        prompted, context = self.prompt_image(image)
        h: Any = structure.embed(self.backbone, prompted)  # (1)
        h = h if attn_mask is None else with_mask(self.backbone, h, attn_mask)
        outputs = [h] if -1 in blocks else []
        for j in range(max(blocks) + 1):
            tokens = getattr(h, "tokens", h) if self.reads_tokens else None
            prompts = self.block_prompts(j, context, image.shape[0], tokens)
            h, prompt_outputs = self.apply_block(j, h, carried if prompts is None else prompts)
            carried = Prompts(prompt_outputs) if self.carry_prompts and prompt_outputs is not None else None
            if j in blocks:
                outputs.append(h)
        return outputs

    def forward_features(self, image: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The features that the backbone's ``forward_features`` returns, [B, T, D] of a ViT, without prompts."""
        (h,) = self.block_outputs(image, [len(self.widths) - 1], attn_mask)
        return structure_of(self.backbone).final_norm(self.backbone, h)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens as the backbone does and, unless ``pre_logits``, classify (eq. 3)."""
        if isinstance(self.head, DistilledHead) and not pre_logits:
            return self.head(tokens)
        pooled: Tensor = self.backbone.forward_head(tokens, pre_logits=True)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, num_classes].

        Args:
            attn_mask: as timm's models take it, a mask of the attention in all blocks; ``with_mask`` lists the shapes.
                It is among the tokens without prompts, to which every token attends, and which attend to all.

        Raises:
            ValueError: for a mask that does not fit, or one of a backbone whose blocks take none.
        """
        return self.forward_head(self.forward_features(image, attn_mask))
