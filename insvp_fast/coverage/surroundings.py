"""What outside of a model changes the result of its modules: replaced functions, global hooks, modes, transforms."""

from __future__ import annotations

import inspect
import operator
from itertools import starmap
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch

from insvp_fast.runtime import torch_private

__all__ = ["home", "surroundings_reason", "watch"]

_WATCHED: dict[tuple[Any, str], Any] = {}


def watch(names: str, *owners: Any) -> None:
    """Stop all fast paths when one of these functions is replaced.

    Args:
        names: separated by blanks, of functions that modules of a fast path call, without arithmetic and shapes. One
            that comes from another package than torch, timm and this one counts as replaced from the start.
        owners: classes or modules that have them.
    """
    for owner in owners:
        for name in names.split():
            function = getattr(owner, name)
            # what torch.compile makes of any function is written in torch, and wraps it
            homes = {home(f).partition(".")[0] for f in (function, inspect.unwrap(function))}
            _WATCHED[owner, name] = function if homes <= {"torch", "timm", "insvp_fast"} else None


def home(function: Any) -> str:
    """The module in which a function was written, whatever a decorator says; "" if that is not known."""
    if isinstance(function, MethodDescriptorType):
        function = function.__objclass__
    elif not isinstance(function, BuiltinFunctionType):
        name: str = getattr(function, "__globals__", {}).get("__name__", "")
        return name
    return function.__module__ or "torch"  # PyTorch's functions in C++ may have none


def surroundings_reason() -> str | None:
    """Why no fast path may run now, or None."""
    if torch_private.global_hooks():
        return "there is a hook for all modules"
    functions = starmap(getattr, _WATCHED)
    if not all(map(operator.is_, functions, _WATCHED.values())):
        owner, name = next(place for place, function in _WATCHED.items() if getattr(*place) is not function)
        tracing = "torch.export traces without strict=True, so that " if torch.compiler.is_exporting() else ""
        return f"{tracing}{owner.__name__}.{name} has been replaced"
    if torch_private.function_modes():
        return "a torch function mode is active"
    if torch_private.foreign_dispatch_modes():
        return "a torch dispatch mode is active"
    if torch_private.transforming():
        return "a transform of torch.func or forward-mode differentiation is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace is active"
    return None
