"""The library of PyTorch operators that the files beside this one fill, and what their autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import Library

from insvp_fast.runtime import native, torch_private

__all__ = [
    "LIBRARY",
    "NATIVE_DTYPES",
    "apply",
    "define",
    "first_order",
    "implement",
    "require_dtypes",
    "require_native",
    "widened",
]

LIBRARY = Library("insvp_fast", "DEF")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def define(schema: str) -> None:
    """Declare an operator that traces, exports and compiles."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(
    name: str,
    everywhere: Callable[..., Any] | None = None,
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Register what carries an operator out: on every device, and over that on CPU, and on CUDA and ROCm.

    Gradients are the business of the autograd functions: an exported program calls the operators without them.
    """
    for kernel, key in ((everywhere, "CompositeExplicitAutograd"), (cpu, "CPU"), (cuda, "CUDA")):
        if kernel is not None:
            LIBRARY.impl(name, torch.no_grad()(kernel), key)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic for tensors of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def require_dtypes(impl: str, covered: tuple[torch.dtype, ...], *dtypes: torch.dtype) -> None:
    """Raise RuntimeError for dtypes that the implementation asked for does not compute."""
    for dtype in dtypes:
        if dtype not in covered:
            raise RuntimeError(f'impl="{impl}" cannot compute in {dtype}: expected {" or ".join(map(str, covered))}')


def require_native(device: torch.device) -> None:
    """Raise RuntimeError where the native library, asked for by name, cannot run."""
    if device.type != "cpu" or not native.native_status():
        why = f"it computes on the CPU, not on {device}" if native.native_status() else native.native_status()
        raise RuntimeError(f'impl="native" cannot run here: {why}')


# ----------------------------------------------------------------------------------------------- first derivatives only


def first_order(name: str, instead: str) -> Callable[[type[Function]], type[Function]]:
    """Let an autograd function say, where its gradient is differentiated, which operation it is and what to use."""

    def decorate(function: type[Function]) -> type[Function]:
        backward = function.backward
        advice = f"use InsVPReference, or {instead}"
        once = f"the gradient of insvp_fast.ops.{name} cannot be differentiated again: {advice}"

        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            results = results if isinstance(results, tuple) else (results,)
            return _Once.apply(once, *(None if g is None else g.detach().requires_grad_() for g in results))

        function.backward = staticmethod(run)  # type: ignore[method-assign]
        where = "a transform of torch.func or forward-mode differentiation"
        function.refusal = f"insvp_fast.ops.{name} cannot run inside {where}: {advice}"  # type: ignore[attr-defined]
        return function

    return decorate


class _Once(Function):
    """The gradients as they are, and an error where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply``, refused where PyTorch would ask for derivatives that a ``first_order`` function has not."""
    if not torch.compiler.is_compiling() and torch_private.transforming(*arguments):
        raise RuntimeError(function.refusal)  # type: ignore[attr-defined]
    return function.apply(*arguments)
