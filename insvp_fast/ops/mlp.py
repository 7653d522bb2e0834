"""Two frozen linear layers with an activation between: mlp."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order, save, saved
from insvp_fast.ops.linear import PROVIDERS, auto_providers, frozen_operands, provider_reason, require_all_outputs
from insvp_fast.ops.registry import PACKS, Implementation, call, register, require, triton_reason
from insvp_fast.runtime import native, products
from insvp_fast.runtime.activations import ACTIVATIONS, activate_bwd
from insvp_fast.runtime.dtypes import widened
from insvp_fast.runtime.products import FrozenLinear

__all__ = ["KEEP", "derivative_code", "derivative_from_code", "mlp"]

KEEP = ("pre", "code", "input")


def mlp(
    x: Tensor,
    fc1: FrozenLinear,
    fc2: FrozenLinear,
    *,
    activation: str = "gelu",
    keep: str = "pre",
    impl: str = "auto",
) -> Tensor:
    """scale * (activation((gain*x + shift) @ w1.T + b1) @ w2.T + b2), with frozen weights.

    Args:
        x: [..., D]; its dtype is that of the products and of the result.
        fc1, fc2: layers [M, D] and [D, M], all of their outputs; the first without scale, the second without gain and
            shift.
        activation: "gelu", exact (erf); "gelu_tanh", its approximation by tanh; "quick_gelu", x sigmoid(1.702 x); or
            "silu", x sigmoid(x).
        keep: for backward, "pre", what the activation was applied to, [..., M]; "code", its derivative there rounded to
            8 bits (``derivative_code``), so that gradients are off by up to 0.25 %; or "input", x, to compute "pre"
            again.
        impl: "auto" lets the device decide; those of ``linear`` insist on a product, "triton" on Triton's activation
            with PyTorch's product.

    Returns:
        [..., D]

    Raises:
        TypeError: for a layer that is no ``FrozenLinear``.
        ValueError: for shapes that do not fit, a weight that requires a gradient, or another ``activation``, ``keep``
            or ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if keep not in KEEP:
        raise ValueError(f"keep={keep!r}: expected one of {KEEP}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {ACTIVATIONS}")
    w1, b1, gain, shift, _, w2, b2, _, _, scale, *_ = frozen_operands(x, fc1, fc2)
    if fc1.scale is not None:
        raise ValueError("fc1 has a scale: expected none")
    if fc2.gain is not None or fc2.shift is not None:
        raise ValueError("fc2 has a gain or shift: expected none")
    needed = torch.is_grad_enabled() and x.requires_grad
    require_all_outputs(fc1=fc1, fc2=fc2)
    operands = _Fwd(x, w1, b1, w2, b2, gain, shift, scale, activation, keep if needed else "nothing")
    require("mlp_fwd", impl, operands)
    return cast(Tensor, apply(_Mlp, *operands, impl))


# The derivative of GELU lies within -0.1290 and 1.1290, those of the other activations within the same. In 8 bits it
# has steps of 1/201, and the code of 0 is 27: the range -0.1343 to 1.1343 contains the extrema, and saturated units,
# whose derivative is 0 or 1, are exact.
CODE_STEPS, CODE_ZERO = 201, 27
CODE_OF_NAN = 255  # those of numbers are 1 to 254


def derivative_code(x: Tensor, activation: str = "gelu") -> Tensor:
    """The derivative of an activation rounded to 8 bits; a code of its own for NaN, which it is where x is infinite."""
    x = x.to(widened(x.dtype))
    derivative = activate_bwd(torch.ones_like(x), x, activation)
    code: Tensor = (CODE_STEPS * derivative + CODE_ZERO).round().to(torch.uint8)
    return code.masked_fill_(~derivative.isfinite(), CODE_OF_NAN)


def derivative_from_code(code: Tensor) -> Tensor:
    """The derivative that ``derivative_code`` rounded, to half a step, in fp32."""
    return ((code.float() - CODE_ZERO) / CODE_STEPS).masked_fill_(code == CODE_OF_NAN, torch.nan)


class _Fwd(NamedTuple):
    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    activation: str
    keep: str


class _Bwd(NamedTuple):
    grad: Tensor
    kept: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    activation: str
    keep: str


def _layers(a: _Fwd | _Bwd) -> tuple[FrozenLinear, FrozenLinear]:
    return FrozenLinear(a.w1, a.b1, a.gain, a.shift), FrozenLinear(a.w2, a.b2, scale=a.scale)


@first_order("mlp", "torch.nn.functional.linear and gelu")
class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, activation, keep, impl = rest
        out, kept = call("mlp_fwd", x, *rest)
        save(ctx, x if keep == "input" else kept, weights=weights)
        ctx.rest = activation, keep, impl
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return call("mlp_bwd", grad, *saved(ctx), *ctx.rest), *(None,) * 10


def _fwd(how: str, a: _Fwd) -> tuple[Tensor, Tensor]:
    fc1, fc2 = _layers(a)
    pre, hidden = products.linear_activation(a.x, fc1, a.activation, a.keep in ("pre", "code"), how)
    out = products.linear(hidden, fc2, how)
    if a.keep == "code":
        native.interrupt()
        return out, derivative_code(pre, a.activation)
    return out, pre


def _bwd(how: str, a: _Bwd) -> Tensor:
    fc1, fc2 = _layers(a)
    if a.keep == "code":
        d_pre = products.linear_bwd(a.grad, fc2, how)
        native.interrupt()
        d_pre.mul_(derivative_from_code(a.kept))
    else:
        pre = products.linear(a.kept, fc1, how) if a.keep == "input" else a.kept
        d_pre = products.linear_activation_bwd(a.grad, fc2, pre, a.activation, how)
    return products.linear_bwd(d_pre, fc1, how)


def _fwd_triton(a: _Fwd) -> tuple[Tensor, Tensor]:
    from insvp_fast.kernels.gpu import activation as kernel

    how, (fc1, fc2) = products.provider(a.x.dtype, a.x.device), _layers(a)
    pre = products.linear(a.x, fc1, how)
    if a.keep == "code":
        hidden, kept = kernel.activation_fwd_code(pre, a.activation)
    else:
        hidden, kept = kernel.activation_fwd(pre, a.activation), pre if a.keep == "pre" else a.x.new_empty(0)
    return products.linear(hidden, fc2, how), kept


def _bwd_triton(a: _Bwd) -> Tensor:
    from insvp_fast.kernels.gpu import activation as kernel

    how, (fc1, fc2) = products.provider(a.grad.dtype, a.grad.device), _layers(a)
    d_hidden = products.linear_bwd(a.grad, fc2, how)
    if a.keep == "code":
        d_pre = kernel.activation_bwd_code(d_hidden, a.kept, out=d_hidden)
    else:
        pre = products.linear(a.kept, fc1, how) if a.keep == "input" else a.kept
        d_pre = kernel.activation_bwd(d_hidden, pre, a.activation, out=d_hidden)
    return products.linear_bwd(d_pre, fc1, how)


def _triton_reason(a: _Fwd | _Bwd) -> str | None:
    return triton_reason(a[0].device, a[0].dtype)


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    kept = (*a.x.shape[:-1], a.w1.shape[0]) if a.keep in ("pre", "code") else 0
    dtype = torch.uint8 if a.keep == "code" else a.x.dtype
    return a.x.new_empty(*a.x.shape[:-1], a.w2.shape[0]), a.x.new_empty(kept, dtype=dtype)


def _bwd_fake(a: _Bwd) -> Tensor:
    return a.grad.new_empty(*a.grad.shape[:-1], a.w1.shape[1])


register(
    "mlp_fwd",
    _Fwd,
    "(Tensor, Tensor)",
    PACKS,
    fake=_fwd_fake,
    reference=partial(_fwd, "plain"),
    auto=auto_providers,
    triton=Implementation(_fwd_triton, _triton_reason),
    **{how: Implementation(partial(_fwd, how), provider_reason(how), recordable=how == "native") for how in PROVIDERS},
)
register(
    "mlp_bwd",
    _Bwd,
    "Tensor",
    PACKS,
    fake=_bwd_fake,
    reference=partial(_bwd, "plain"),
    auto=auto_providers,
    triton=Implementation(_bwd_triton, _triton_reason),
    **{how: Implementation(partial(_bwd, how), provider_reason(how), recordable=how == "native") for how in PROVIDERS},
)
