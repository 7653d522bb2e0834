"""What a method is that changes the backbone's own computation, which no ``PromptMethod`` can."""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

__all__ = ["Branch", "Tuning", "plain_blocks"]

CALLING = (Block, Attention, Mlp, GluMlp, SwiGLU)  # they call each of their modules, so that hooks of these run


class Branch(nn.Module):
    """A trained module beside a frozen operation of the backbone, of which it changes the output.

    It is a forward hook of the operation, so that the backbone keeps its modules and its names.
    """

    def forward(self, operation: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The new output of the operation, of the shape of ``output``."""
        raise NotImplementedError

    def fold_into(self, operation: Any) -> None:
        """Change the operation's own weights, so that it computes the same without the branch.

        Raises:
            ValueError: if no weights of the operation can do that.
        """
        raise ValueError(f"a {type(self).__name__} cannot be folded into the weights of a backbone")


class Tuning(nn.Module):
    """A method that trains parts of a backbone, or trained modules beside its own. This base does neither.

    A method is a module for one backbone, made with it first and with its own settings by name. Its own parameters are
    trained, and so are those of the backbone for which it sets ``requires_grad``. It works with the backbone's modules
    as they are, module by module: the operations of the fast path assume frozen blocks with nothing between them.

    Attributes:
        trains_all: whether nothing of the backbone stays as it was.
    """

    trains_all = False

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()

    def trained_modules(self, backbone: Any) -> list[nn.Module]:
        """The modules of the backbone that are trained as a whole, and are in training mode when the model is."""
        return []

    def make_head(self, head: nn.Module) -> nn.Module:
        """The trained head, from that of the backbone."""
        return head

    def combine(self, image: Tensor, features: Tensor) -> Tensor:
        """What the head reads, from the images [B, C, H, W] and the pooled features of the backbone, [B, D]."""
        return features

    def merged(self, backbone: nn.Module) -> nn.Module:
        """A copy of the backbone that computes the same without this method: its branches are folded into weights.

        Raises:
            ValueError: if that cannot be.
        """
        merged = copy.deepcopy(backbone)
        for operation in merged.modules():
            branches = [(key, hook) for key, hook in operation._forward_hooks.items() if isinstance(hook, Branch)]
            for key, branch in branches:
                branch.fold_into(operation)
                del operation._forward_hooks[key]
        return merged.requires_grad_(False)


def plain_blocks(backbone: Any, method: str) -> list[Any]:
    """The blocks of a ViT, which call each of their modules, so that a hook of any of them runs.

    Raises:
        ValueError: if they are of other classes, which may not.
    """
    expected = "timm's VisionTransformer with its Block, Attention and Mlp"
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"{method} in a {type(backbone).__name__}: expected {expected}")
    for block in backbone.blocks:
        for module in (block, getattr(block, "attn", None), getattr(block, "mlp", None)):
            if type(module) not in CALLING:
                raise ValueError(f"{method} in a backbone with a {type(module).__name__}: expected {expected}")
    return list(backbone.blocks)
