"""What the autograd functions of the operations share: they have first derivatives only, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from insvp_fast.runtime import prepack, recording, torch_private

__all__ = ["apply", "differentiates", "first_order", "only_needed", "save", "saved"]


def first_order(name: str, instead: str) -> Callable[[type[Function]], type[Function]]:
    """Where its gradient is differentiated or batched, let an autograd function raise an error that says what to use.

    Args:
        name: of the operation in ``insvp_fast.ops``.
        instead: what has second derivatives: a function of PyTorch, or the formula in the operation's module.
    """

    def decorate(function: type[Function]) -> type[Function]:
        backward = function.backward
        advice = f"use InsVPReference, or {instead}"
        once = f"the gradient of insvp_fast.ops.{name} cannot be differentiated again: {advice}"
        batched = f"the gradient of insvp_fast.ops.{name} is of one loss, not of a batch of them: {advice}"

        @functools.wraps(backward)
        def run_backward(ctx: Any, *grads: Any) -> Any:
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            if torch_private.transforming(*grads) or torch_private.batched(grads):
                raise RuntimeError(batched)
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            ctx = _Read(ctx)
            with torch.no_grad():
                results = backward(ctx, *grads)
            results = results if isinstance(results, tuple) else (results,)
            # what they depend on, so that whoever differentiates them by some of it comes to the error
            graph = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
            found = [None if g is None else g.detach().requires_grad_() for g in results]
            return _Once.apply(once, len(found), *found, *graph)

        function.backward = staticmethod(run_backward)  # type: ignore[method-assign]
        where = "a transform of torch.func or forward-mode differentiation"
        function.refusal = f"insvp_fast.ops.{name} cannot run inside {where}: {advice}"  # type: ignore[attr-defined]
        return function

    return decorate


class _Read:
    """The context of a function whose saved tensors are read once: checkpoints give them only once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(Function):
    """The gradients as they are, and an error where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, number: int, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return grads[:number]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply``, refused where PyTorch would ask for derivatives that a ``first_order`` function has not.

    Where there will be no gradient it is only ``function.forward``, as a node of the graph costs more time than the
    launch of a small kernel.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if torch_private.transforming(*arguments):
        raise RuntimeError(function.refusal)  # type: ignore[attr-defined]
    if differentiates(arguments):
        return function.apply(*arguments)
    return function.forward(_NoBackward(), *arguments)


def differentiates(arguments: Sequence[Any]) -> bool:
    """Whether PyTorch will ask for gradients by one of these."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


class _NoBackward:
    """Takes what ``forward`` leaves to ``backward``, and keeps no tensor that it is asked to save."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def save(ctx: Any, *tensors: Tensor | None, weights: Sequence[Tensor | None]) -> None:
    """Leave tensors to ``saved``, the weights behind the others, with the memory that these have now."""
    if isinstance(ctx, _NoBackward):
        return
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*tensors, *weights)
        return
    memory = [None if w is None or w.is_inference() else w.detach() for w in weights]
    # hooks may save it elsewhere, or compute it again; those of a recording give what they got
    hooked = recording.current() is None and torch_private.saving_hooks()
    ctx.save_for_backward(*tensors, *(memory if hooked else weights))
    ctx.memory = [] if hooked else memory


def saved(ctx: Any) -> list[Any]:
    """What was saved: of weights that ``.data =`` has given other memory since, those that the forward pass read."""
    found = [*ctx.saved_tensors]
    if not torch.compiler.is_compiling():
        for i, kept in enumerate(ctx.memory, len(found) - len(ctx.memory)):
            moved = kept is not None and prepack.place(found[i]) != prepack.place(kept)
            if moved and kept.untyped_storage().nbytes():  # there is none where sharding has given it back
                found[i] = kept
    return found


def only_needed(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What ``backward`` returns: the gradients by the first inputs where they are needed, and None by all others."""
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return *wanted, *(None,) * (len(ctx.needs_input_grad) - len(wanted))
