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
    """The types, attributes, children, parameters and hooks of some modules, without those of their children.

    Attributes are compared by ``==``, so that an object changed in place counts as unchanged; parameters by identity,
    type, dtype, layout and ``requires_grad``, so that new values count as unchanged.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules, self._types = modules, [*map(type, modules)]
        self._state = [state for m in modules for state in (vars(m), m._modules)]
        self._copies = [*map(dict, self._state)]
        self._hooks = [vars(m).get(name) for m in modules for name in HOOKS]
        self._has_hooks = any(self._hooks)
        self._buffers = [m._buffers for m in modules]
        self._has_buffers = any(self._buffers)
        self._named = [m._parameters for m in modules]
        self._parameters = _values(self._named)
        self._properties = [*map(_properties, self._parameters)]

    def holds(self) -> bool:
        """Whether nothing has changed; never with hooks or buffers, whose contents are not compared."""
        if self._has_hooks or self._has_buffers or any(self._hooks) or any(self._buffers):
            return False
        try:
            same = [*map(type, self._modules)] == self._types and self._state == self._copies
        except (RuntimeError, ValueError):  # tensors and arrays, which have no plain equality
            return False
        parameters = _values(self._named)
        same = (
            same and len(parameters) == len(self._parameters) and all(map(operator.is_, parameters, self._parameters))
        )
        return same and [*map(_properties, parameters)] == self._properties


def _values(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, dictionaries))]


def _properties(parameter: Tensor | None) -> object:
    return parameter is None or (type(parameter), parameter.requires_grad, parameter.dtype, parameter.layout)
