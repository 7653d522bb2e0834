"""gate in C++: the hidden layer of a gated MLP from its two products, forward and backward."""

from __future__ import annotations

from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.activations import ACTIVATIONS
from insvp_fast.runtime.native.library import TYPE_CODES, array, f32, i32, i64, launch, pointer, require

__all__ = ["gate_bwd", "gate_fwd"]

_REST = [i32, i32, f32, i64, i64]
_FWD = [*array * 3, *_REST]
_BWD = [*array * 5, *_REST]


def gate_fwd(pre: Tensor, factor: Tensor | None, activation: str, eps: float | None, *, keep: bool = True) -> Tensor:
    """``normalize(activation(pre) * factor)``, with LayerNorm without an affine map, or without one if eps is None.

    pre, and factor if there is one, [..., D] in float32 or bfloat16; activation one of ``ACTIVATIONS``. Computed
    in float32, rounded once; without ``keep`` pre is overwritten. Errors: see ``native``.
    """
    pre, factor = _operands(pre, factor)
    hidden = buffers.empty(pre.shape, pre.dtype) if keep else pre
    tensors = (*pointer(hidden), *pointer(pre), *pointer(factor))
    launch("gate_fwd", _FWD, *tensors, *_rest(pre, activation, eps))
    return hidden


def gate_bwd(
    d_hidden: Tensor, pre: Tensor, factor: Tensor | None, activation: str, eps: float | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``gate_fwd`` by pre, which overwrites a contiguous ``d_hidden``, and by factor.

    d_hidden has the shape and the dtype of pre. Errors: see ``native``.
    """
    pre, factor = _operands(pre, factor)
    d_hidden = require("d_hidden", d_hidden, pre.shape, pre.dtype)
    d_factor = None if factor is None else buffers.empty(pre.shape, pre.dtype)
    tensors = (*pointer(d_hidden), *pointer(d_factor), *pointer(d_hidden), *pointer(pre), *pointer(factor))
    launch("gate_bwd", _BWD, *tensors, *_rest(pre, activation, eps))
    return d_hidden, d_factor


def _operands(pre: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    pre = require("pre", pre, pre.shape, *TYPE_CODES)
    return pre, None if factor is None else require("factor", factor, pre.shape, pre.dtype)


def _rest(pre: Tensor, activation: str, eps: float | None) -> tuple[object, ...]:
    D = pre.shape[-1] if pre.ndim else 1
    return ACTIVATIONS.index(activation), eps is not None, 0.0 if eps is None else eps, pre.numel() // max(D, 1), D
