"""Frozen linear layers with a gated or a normalized hidden layer: gated_mlp."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order, save, saved
from insvp_fast.ops.linear import PROVIDERS, auto_providers, frozen_operands, provider_reason, require_all_outputs
from insvp_fast.ops.registry import PACKS, Implementation, call, register, require, triton_reason
from insvp_fast.runtime import buffers, native, products
from insvp_fast.runtime.activations import ACTIVATIONS, activate, activate_bwd
from insvp_fast.runtime.elementwise import put_sum
from insvp_fast.runtime.products import FrozenLinear

__all__ = ["gated_mlp"]

KEEP = ("pre", "input")
NO_VALUE = -1


def gated_mlp(
    x: Tensor,
    gate: FrozenLinear,
    value: FrozenLinear | None,
    fc2: FrozenLinear,
    *,
    activation: str = "silu",
    eps: float | None = None,
    keep: str = "pre",
    impl: str = "auto",
) -> Tensor:
    """fc2(normalize(activation(gate(x)) * value(x))): with SiLU this is SwiGLU (Shazeer 2020, equation 6).

    Args:
        x: [..., D]; its dtype is that of the products and of the result.
        gate, value: layers [M, D] with the same gain and shift, or the M outputs that each has of one packed layer;
            without ``value`` there is no product of the two, and the hidden layer is that of ``mlp``.
        fc2: the layer [D, M], all of its outputs; its gain and shift are the affine map of the norm of the hidden
            layer. The others have no scale.
        activation: as in ``mlp``.
        eps: of the LayerNorm of the hidden layer; None if it has none.
        keep: for backward, "pre", ``gate(x)`` and ``value(x)``, [..., M] each, or "input", x, to compute them again.
        impl: "auto" lets the device decide; those of ``linear`` insist on a product, "triton" on Triton's hidden layer
            with PyTorch's products.

    Returns:
        [..., D]

    Raises:
        TypeError: for a layer that is no ``FrozenLinear``.
        ValueError: for shapes that do not fit, a weight that requires a gradient, or another ``activation``, ``keep``
            or ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if keep not in KEEP:
        raise ValueError(f"keep={keep!r}: expected one of {KEEP}; the gradient of a gated MLP has no code in 8 bits")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {ACTIVATIONS}")
    needed = torch.is_grad_enabled() and x.requires_grad
    wg, bg, gain, shift, _, w2, b2, gain2, shift2, scale, *_ = frozen_operands(x, gate, fc2)
    if gate.scale is not None:
        raise ValueError("gate has a scale: expected none")
    wv, bv, value_first = None, None, NO_VALUE
    if value is not None:
        wv, bv, gain_v, shift_v, *_ = frozen_operands(x, value, fc2)
        if value.scale is not None:
            raise ValueError("value has a scale: expected none")
        value_first = value.first
        if gain_v is not gain or shift_v is not shift:
            raise ValueError("gate and value have a gain or shift of their own: expected those of one norm before both")
        if wv is wg and bv is bg:  # torch.compile traces no autograd function that gets a tensor twice
            wv, bv = None, None
    require_all_outputs(fc2=fc2)
    weights = wg, bg, wv, bv, gain, shift, w2, b2, gain2, shift2, scale
    operands = _Fwd(x, *weights, gate.first, value_first, eps, activation, keep if needed else "nothing")
    require("gated_mlp_fwd", impl, operands)
    return cast(Tensor, apply(_GatedMlp, *operands, impl))


class _Fwd(NamedTuple):
    x: Tensor
    wg: Tensor
    bg: Tensor | None
    wv: Tensor | None  # None: where there is a value, it is of the layer of the gate
    bv: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gain2: Tensor | None
    shift2: Tensor | None
    scale: Tensor | None
    gate_first: int  # of M outputs
    value_first: int  # or NO_VALUE
    eps: float | None
    activation: str
    keep: str


class _Bwd(NamedTuple):
    grad: Tensor
    kept: Tensor  # x, or gate(x)
    kept_value: Tensor | None  # value(x)
    wg: Tensor
    bg: Tensor | None
    wv: Tensor | None  # None: where there is a value, it is of the layer of the gate
    bv: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gain2: Tensor | None
    shift2: Tensor | None
    scale: Tensor | None
    gate_first: int  # of M outputs
    value_first: int  # or NO_VALUE
    eps: float | None
    activation: str
    keep: str


def _layers(a: _Fwd | _Bwd) -> tuple[FrozenLinear, FrozenLinear | None, FrozenLinear]:
    fc2 = FrozenLinear(a.w2, a.b2, a.gain2, a.shift2, a.scale)

    def opening(weight: Tensor, bias: Tensor | None, first: int) -> FrozenLinear:
        return FrozenLinear(weight, bias, a.gain, a.shift, first=first, last=first + fc2.in_features)

    gate, value = opening(a.wg, a.bg, a.gate_first), None
    if a.value_first != NO_VALUE:
        weight, bias = (a.wg, a.bg) if a.wv is None else (a.wv, a.bv)
        value = opening(weight, bias, a.value_first)
    return gate, value, fc2


@first_order("gated_mlp", "torch.nn.functional.linear and silu")
class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, gate_first, value_first, eps, activation, keep, impl = rest
        out, pre, value = call("gated_mlp_fwd", x, *rest)
        kept = (x, None) if keep == "input" else (pre, None if value_first == NO_VALUE else value)
        save(ctx, *kept, weights=weights)
        ctx.rest = gate_first, value_first, eps, activation, keep, impl
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return call("gated_mlp_bwd", grad, *saved(ctx), *ctx.rest), *(None,) * 17


def _fused(how: str, x: Tensor) -> tuple[str, Any]:
    """The provider of the products, and what has ``gate_fwd`` and ``gate_bwd``."""
    if how == "native":
        return how, native
    from insvp_fast.kernels.gpu import gate

    return products.provider(x.dtype, x.device), gate


def _fwd_fused(how: str, a: _Fwd) -> tuple[Tensor, Tensor, Tensor]:
    (how, kernel), (gate, value, fc2) = _fused(how, a.x), _layers(a)
    pre = products.linear(a.x, gate, how)
    factor = None if value is None else products.linear(a.x, value, how)
    hidden = kernel.gate_fwd(pre, factor, a.activation, a.eps, keep=a.keep == "pre")
    kept = (pre, factor) if a.keep == "pre" else (None, None)
    # no result may be another one: PyTorch warns of that in compiled code, and is going to refuse it
    pre, factor = (a.x.new_empty(0) if x is None else x for x in kept)
    return products.linear(hidden, fc2, how), pre, factor


def _bwd_fused(how: str, a: _Bwd) -> Tensor:
    (how, kernel), (gate, value, fc2) = _fused(how, a.grad), _layers(a)
    pre, factor = _opening(how, a, gate, value)
    d_pre, d_factor = kernel.gate_bwd(products.linear_bwd(a.grad, fc2, how), pre, factor, a.activation, a.eps)
    d_x = products.linear_bwd(d_pre, gate, how)
    if value is None:
        return d_x
    d_x_value = products.linear_bwd(d_factor, value, how)
    if how != "native":
        return d_x.add_(d_x_value)
    total = buffers.empty(d_x.shape, d_x.dtype)
    put_sum(total, d_x, 1, d_x_value, 1)
    return total


def _opening(how: str, a: _Bwd, gate: FrozenLinear, value: FrozenLinear | None) -> tuple[Tensor, Tensor | None]:
    """``gate(x)`` and ``value(x)``, kept or computed again."""
    if a.keep == "pre":
        return a.kept, a.kept_value
    return products.linear(a.kept, gate, how), None if value is None else products.linear(a.kept, value, how)


def _fwd(how: str, a: _Fwd) -> tuple[Tensor, Tensor, Tensor]:
    gate, value, fc2 = _layers(a)
    pre, hidden = products.linear_activation(a.x, gate, a.activation, a.keep == "pre", how)
    nothing = factor = a.x.new_empty(0)
    if value is not None:
        factor = products.linear(a.x, value, how)
        hidden = hidden.mul_(factor)
    if a.eps is not None:
        hidden, _ = _normalize(hidden, a.eps)
    return products.linear(hidden, fc2, how), pre, factor if a.keep == "pre" else nothing


def _bwd(how: str, a: _Bwd) -> Tensor:
    gate, value, fc2 = _layers(a)
    pre, factor = _opening(how, a, gate, value)
    d_hidden = products.linear_bwd(a.grad, fc2, how)
    opened = activate(pre, a.activation)
    if a.eps is not None:
        d_hidden = _normalize_bwd(d_hidden, opened if factor is None else opened * factor, a.eps)
    if value is None or factor is None:
        return products.linear_bwd(activate_bwd(d_hidden, pre, a.activation), gate, how)
    d_x = products.linear_bwd(opened.mul_(d_hidden), value, how)
    return d_x.add_(products.linear_bwd(activate_bwd(d_hidden.mul_(factor), pre, a.activation), gate, how))


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm without an affine map, and 1/sigma: norm_insert without a sum and prompts."""
    rows = x.reshape(1, -1, x.shape[-1])
    _, normed, _, rstd = call("norm_insert_fwd", rows, None, None, None, None, eps, x.dtype, True, "auto")
    return normed.view(x.shape), rstd


def _normalize_bwd(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    normed, rstd = _normalize(x, eps)
    rows = 1, -1, x.shape[-1]
    kept = normed.view(rows), rstd, None, rstd.shape[1]
    d_x, _, _ = call("norm_insert_bwd", None, grad.reshape(rows), *kept, x.dtype, x.dtype, True, "auto")
    return cast(Tensor, d_x).view(x.shape)


def _triton_reason(a: _Fwd | _Bwd) -> str | None:
    if reason := triton_reason(a[0].device, a[0].dtype):
        return reason
    from insvp_fast.kernels.gpu import gate

    D = a.w2.shape[1]
    return None if gate.covers(D, a.eps is not None) else f"does not cover a hidden layer of {D} numbers"


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor, Tensor]:
    kept = (*a.x.shape[:-1], a.w2.shape[1]) if a.keep == "pre" else 0
    kept_value = 0 if a.value_first == NO_VALUE else kept
    return a.x.new_empty(*a.x.shape[:-1], a.w2.shape[0]), a.x.new_empty(kept), a.x.new_empty(kept_value)


def _bwd_fake(a: _Bwd) -> Tensor:
    return a.grad.new_empty(*a.grad.shape[:-1], a.wg.shape[1])


register(
    "gated_mlp_fwd",
    _Fwd,
    "(Tensor, Tensor, Tensor)",
    PACKS,
    fake=_fwd_fake,
    reference=partial(_fwd, "plain"),
    auto=auto_providers,
    native=Implementation(partial(_fwd_fused, "native"), provider_reason("native"), recordable=True),
    triton=Implementation(partial(_fwd_fused, "triton"), _triton_reason),
    **{how: Implementation(partial(_fwd, how), provider_reason(how)) for how in PROVIDERS if how != "native"},
)
register(
    "gated_mlp_bwd",
    _Bwd,
    "Tensor",
    PACKS,
    fake=_bwd_fake,
    reference=partial(_bwd, "plain"),
    auto=auto_providers,
    native=Implementation(partial(_bwd_fused, "native"), provider_reason("native"), recordable=True),
    triton=Implementation(partial(_bwd_fused, "triton"), _triton_reason),
    **{how: Implementation(partial(_bwd, how), provider_reason(how)) for how in PROVIDERS if how != "native"},
)
