"""Classification heads, taken from a backbone of timm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, TypeVar, cast

from timm.layers import ClassifierHead, NormMlpClassifierHead
from torch import Tensor, nn

__all__ = ["DistilledHead", "leaves_backbone", "refuse_arguments", "reset_classifier", "take_head"]

Init = TypeVar("Init", bound=Callable[..., None])


class DistilledHead(nn.Module):
    """The two heads of a distilled DeiT, whose logits are averaged; [B, T, D] -> [B, num_classes]."""

    def __init__(self, class_head: nn.Module, distillation_head: nn.Module) -> None:
        super().__init__()
        self.class_head, self.distillation_head = class_head, distillation_head

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = (self.class_head(tokens[:, 0]) + self.distillation_head(tokens[:, 1])) / 2
        return logits


def leaves_backbone(init: Init) -> Init:
    """A constructor that takes the head of a backbone, and where it fails leaves the backbone as it was."""

    @functools.wraps(init)
    def construct(self: Any, backbone: Any, *args: Any, **kwargs: Any) -> None:
        modules = [*backbone.modules()] if isinstance(backbone, nn.Module) else []
        before = [{k: v.copy() if isinstance(v, dict) else v for k, v in vars(m).items()} for m in modules]
        trained = [p for p in backbone.parameters() if p.requires_grad] if modules else []
        try:
            init(self, backbone, *args, **kwargs)
        except BaseException:
            for module, state in zip(modules, before, strict=True):
                vars(module).clear()
                vars(module).update(state)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    return cast(Init, construct)


def refuse_arguments(names: Iterable[str], pretrained: bool = False) -> None:
    """Check that a module comes without arguments, which only a backbone given by name can have.

    Raises:
        ValueError: if it does not.
    """
    if refused := [*["pretrained"] * bool(pretrained), *sorted(names)]:
        raise ValueError(f"{refused} belong to a backbone given by name, and a module was given")


def reset_classifier(backbone: Any, num_classes: int, *global_pool: str | None) -> None:
    """Give a backbone a new head, by timm's method.

    Raises:
        ValueError: for a number of classes that is no integer, or below 0.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or not 0 <= num_classes < 2**63:
        raise ValueError(f"num_classes={num_classes!r}: expected an integer of at least 0, below 2**63")
    backbone.reset_classifier(num_classes, *global_pool)


def take_head(backbone: Any) -> nn.Module:
    """The backbone's head, which it loses; without the pooling, which stays in its ``forward_head``.

    Raises:
        TypeError: if it has several heads, unless it is a distilled DeiT.
    """
    head = backbone.get_classifier()
    if isinstance(head, tuple) and len(head) == 2 and hasattr(backbone, "dist_token"):
        head = DistilledHead(*head)
    if isinstance(head, ClassifierHead | NormMlpClassifierHead):
        head = head.fc
    if isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1):
        head = _of_pooled(head)
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise TypeError(f"the {type(backbone).__name__} has {len(head)} heads: expected one")
    backbone.reset_classifier(0)
    return head


def _of_pooled(conv: nn.Conv2d) -> nn.Linear:
    """A convolution of one pixel as a layer of pooled features, [B, C]."""
    weight, bias = conv.weight.detach().flatten(1), conv.bias
    out, width = weight.shape
    linear = nn.Linear(width, out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear
