"""Shallow copies of modules, which compute with other tensors in the place of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from insvp_fast.coverage.covered import forget

__all__ = ["with_tensors"]

M = TypeVar("M", bound=nn.Module)


def with_tensors(module: M, own: Sequence[Tensor], given: Sequence[Tensor], but: nn.Module) -> M:
    """A module that has the tensors ``given`` where ``module`` has its ``own``; itself if they are the same.

    It shares everything else with ``module``, which other threads may use at the same time, and the whole of the
    submodule ``but``.
    """
    if all(x is y for x, y in zip(own, given, strict=True)):
        return module
    return _copy(module, {id(x): y for x, y in zip(own, given, strict=True)}, but)


def _copy(module: M, tensors: Mapping[int, Tensor], but: nn.Module) -> M:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    forget(copy)  # what is remembered rests on the tensors
    parameters: dict[str, Any] = {name: tensors.get(id(p), p) for name, p in module._parameters.items()}
    copy._parameters = parameters
    copy._modules = {
        name: child if child is None or child is but else _copy(child, tensors, but)
        for name, child in module._modules.items()
    }
    return copy
