"""Dropout with the random numbers of PyTorch: dropout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.registry import Implementation, call, native_reason, register, require
from insvp_fast.runtime import native, torch_private

__all__ = ["draws_natively", "dropout", "dropout_bwd_reference", "dropout_mask", "dropout_reference"]


def dropout(x: Tensor, p: float, *, impl: str = "auto") -> Tensor:
    """``F.dropout(x, p)``; on CPUs bit for bit, and so is the state in which it leaves PyTorch's random numbers.

    Backward reads where each element was kept, a byte each.

    Args:
        x: of any shape, in any floating dtype.
        p: the probability that an element is dropped, above 0 and below 1.
        impl: "auto" lets the device decide; "reference" or "native" insists.

    Returns:
        As x: elements times 1 / (1 - p) or times 0.

    Raises:
        ValueError: for another p, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if not 0 < p < 1:
        raise ValueError(f"p={p}: expected a probability above 0 and below 1")
    operands = _Fwd(x, float(p))
    require("dropout_fwd", impl, operands)
    return cast(Tensor, apply(_Dropout, *operands, impl))


def dropout_mask(shape: Sequence[int], p: float) -> Tensor:
    """Where ``dropout`` keeps an element of a contiguous tensor of this shape on the CPU."""
    if not torch.compiler.is_compiling() and draws_natively(torch.float32):
        native.interrupt()  # values of random numbers are in no program
        return native.dropout_mask(shape, p, torch.default_generator)
    return F.dropout(torch.ones(shape, device="cpu"), p) != 0


def dropout_reference(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The formula of ``dropout``, and where x was kept."""
    factor = F.dropout(torch.ones_like(x), p)
    return x * factor, factor != 0


def dropout_bwd_reference(grad: Tensor, kept: Tensor, p: float) -> Tensor:
    """The gradient of ``dropout_reference`` by x, written out."""
    return grad * kept.to(grad.dtype).div_(1 - p)


class _Fwd(NamedTuple):
    x: Tensor
    p: float


class _Bwd(NamedTuple):
    grad: Tensor
    kept: Tensor
    p: float


@first_order("dropout", "torch.nn.functional.dropout")
class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, impl: str) -> Tensor:
        y, kept = call("dropout_fwd", x, p, impl)
        ctx.save_for_backward(kept)
        ctx.p, ctx.impl = p, impl
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return call("dropout_bwd", grad, kept, ctx.p, ctx.impl), None, None


def _fwd_native_reason(a: _Fwd) -> str | None:
    if reason := native_reason(a.x.device, a.x.dtype):
        return reason
    if not a.x.is_contiguous():
        return "cannot draw in the order of memory that is not contiguous"
    if torch_private.dispatch_modes():  # traced, or asked again by the kernel
        return None
    return None if _draws_as_pytorch() else "cannot draw the random numbers of this version of PyTorch"


def _bwd_native_reason(a: _Bwd) -> str | None:
    return native_reason(a.grad.device, a.grad.dtype)


def draws_natively(dtype: torch.dtype) -> bool:
    """Whether masks for contiguous tensors of this dtype on CPUs are drawn by the native library."""
    return native.available(dtype) and not torch_private.dispatch_modes() and _draws_as_pytorch()


@cache
def _draws_as_pytorch() -> bool:
    """Whether masks of the native library, and the generator behind them, are those of PyTorch here.

    They rest on the layout of a generator's state, and on how its bits are compared with a probability: PyTorch
    promises neither.
    """
    generator, ones = torch.Generator("cpu"), torch.ones(701, dtype=torch.float32, device="cpu")
    for p in (0.1, 0.9):
        state = generator.get_state()
        if state.numel() < native.STATE_BYTES:
            return False
        expected = torch.empty_like(ones).bernoulli_(1 - p, generator=generator), generator.get_state()
        generator.set_state(state)
        kept = native.dropout_fwd(ones, p, generator)[1].to(ones.dtype)
        if not all(map(torch.equal, (kept, generator.get_state()), expected)):
            return False
        torch.empty(1, dtype=torch.int32, device="cpu").random_(generator=generator)  # an odd number of words
    return True


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.x), torch.empty_like(a.x, dtype=torch.bool)


register(
    "dropout_fwd",
    _Fwd,
    "(Tensor, Tensor)",
    torch.Tag.nondeterministic_seeded,
    fake=_fwd_fake,
    reference=lambda a: dropout_reference(*a),
    native=Implementation(lambda a: native.dropout_fwd(a.x, a.p, torch.default_generator), _fwd_native_reason),
)
register(
    "dropout_bwd",
    _Bwd,
    "Tensor",
    fake=lambda a: torch.empty_like(a.grad),
    reference=lambda a: dropout_bwd_reference(*a),
    native=Implementation(lambda a: native.dropout_bwd(*a), _bwd_native_reason),
)
