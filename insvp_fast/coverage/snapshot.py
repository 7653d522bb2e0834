"""Whether modules have changed since they were examined; the comparison takes a tenth of a millisecond for a ViT-B."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

__all__ = ["HOOKS", "Snapshot"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """The types, attributes, children, parameters, buffers and hooks of some modules, without those of their children.

    Attributes are compared by ``==``, so that an object changed in place counts as unchanged; parameters and buffers by
    identity, type, dtype, layout, shape, lazy sign and ``requires_grad``, so that new values count as unchanged.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules, self._types = modules, [*map(type, modules)]
        self._state = [state for m in modules for state in (vars(m), m._modules)]
        self._copies = [*map(dict, self._state)]
        self._sequences = [m._modules for m in modules if isinstance(m, nn.Sequential)]
        self._orders = [*map(list, self._sequences)]
        self._hooks = [vars(m).get(name) for m in modules for name in HOOKS]
        self._has_hooks = any(self._hooks)
        self._named = [named for m in modules for named in (m._parameters, m._buffers)]
        self._sizes = [*map(len, self._named)]
        self._tensors = _values(self._named)
        self._properties = [*map(_properties, self._tensors)]

    def holds(self) -> bool:
        """Whether nothing has changed; never with hooks, whose effects are not known."""
        if self._has_hooks or any(self._hooks):
            return False
        try:
            same = [*map(type, self._modules)] == self._types and self._state == self._copies
            same = same and [*map(list, self._sequences)] == self._orders  # in which a Sequential runs its children
        except (RuntimeError, ValueError):  # tensors and arrays, which have no plain equality
            return False
        tensors = _values(self._named)
        same = same and [*map(len, self._named)] == self._sizes and all(map(operator.is_, tensors, self._tensors))
        return same and [*map(_properties, tensors)] == self._properties

    def has_tensors_of(self, other: Snapshot) -> bool:
        """Whether the parameters and buffers were the same objects."""
        return len(self._tensors) == len(other._tensors) and all(map(operator.is_, self._tensors, other._tensors))


def _values(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, dictionaries))]


def _properties(x: Tensor | None) -> object:
    if type(x) not in (Tensor, nn.Parameter):  # no fast path takes another; that of a lazy module has no shape yet
        return type(x)
    assert x is not None
    return type(x), x.requires_grad, x.dtype, x.layout, x.shape, x.is_neg()
