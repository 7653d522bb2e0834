"""The product with a frozen weight: linear, and project_q_kv for the attention of few queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order, save, saved
from insvp_fast.ops.registry import (
    FLOATS,
    PACKS,
    Implementation,
    call,
    cpu_reason,
    dtype_reason,
    native_reason,
    register,
    require,
)
from insvp_fast.runtime import products
from insvp_fast.runtime.products import FrozenLinear

__all__ = ["linear", "project_q_kv"]


def linear(x: Tensor, layer: FrozenLinear, *, impl: str = "auto") -> Tensor:
    """scale * ((gain*x + shift) @ weight.T + bias), all frozen: no gradient for them, nothing of x kept, packed once.

    Args:
        x: [..., D_in]; its dtype is that of the product and of the result.
        layer: weight [D_out, D_in] and bias [D_out] or None, in any floating dtype, gain and shift [D_in] of the norm
            before, or None, scale [D_out] or None, and the range of outputs to compute. None may require a gradient.
        impl: "auto" lets the device decide; "reference" is PyTorch's product, "native" the native library's, "onednn"
            oneDNN's with a packed weight, "widened" one in fp32 of 16-bit operands.

    Returns:
        [..., last - first]

    Raises:
        TypeError: for a layer that is no ``FrozenLinear``.
        ValueError: for shapes that do not fit, a weight that requires a gradient, which would be lost, or an unknown
            ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    operands = _Fwd(x, *frozen_operands(x, layer))
    require("linear_fwd", impl, operands)
    return cast(Tensor, apply(_Linear, *operands, impl))


def project_q_kv(x: Tensor, num_queries: int, layer: FrozenLinear, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """``linear`` for the attention of few tokens to all: queries of the first, keys and values of all.

    Args:
        x: [B, S, D].
        layer: the packed layer of queries, keys and values, [3·D, D], all of it.
        impl: as in ``linear``.

    Returns:
        Queries [B, num_queries, D], and keys and values [B, S, 2·D].

    Raises:
        TypeError, ValueError, RuntimeError: as ``linear``.
    """
    operands = _Fwd(x, *frozen_operands(x, layer))
    if x.ndim != 3 or not 0 <= num_queries <= x.shape[1] or operands.last != 3 * x.shape[2] or operands.first:
        found = f"x of shape {tuple(x.shape)}, num_queries={num_queries} and {operands.last - operands.first} outputs"
        raise ValueError(f"found {found}: expected [B, S, D], 0 to S, and 3*D")
    require_all_outputs(layer=layer)
    require("linear_fwd", impl, operands)
    q, kv = apply(_ProjectQKV, x, num_queries, *layer.sources, impl)
    return q, kv


def frozen_operands(x: Tensor, *layers: FrozenLinear) -> tuple[Any, ...]:
    """All that frozen layers are made of, one after the other, and the range of outputs of the last.

    Raises:
        TypeError: for a layer that is no ``FrozenLinear``.
        ValueError: if a weight is trained, or a layer does not fit x or the layer before.
    """
    if not x.ndim:
        raise ValueError("x is a single number: expected [..., D]")
    sources: list[Tensor | None] = []
    features = x.shape[-1]
    for layer in layers:
        features = _check(layer, features)
        sources += layer.sources
    for w in sources:
        if w is not None and w.requires_grad:
            raise ValueError(
                "a FrozenLinear is made of frozen weights: expected requires_grad=False, use torch.nn.functional.linear"
            )
    first = layers[-1].first
    return *sources, first, first + features


def require_all_outputs(**layers: FrozenLinear) -> None:
    """Check that no range of its outputs is asked of a layer; raises ValueError."""
    for name, layer in layers.items():
        if layer.first or layer.out_features != len(layer.weight):
            found = f"{layer.first} to {layer.first + layer.out_features}"
            raise ValueError(f"{name} has the outputs {found}: expected all, without a range")


def _check(layer: FrozenLinear, features: int) -> int:
    """The number of outputs of a layer that fits."""
    if not isinstance(layer, FrozenLinear):
        raise TypeError(f"a layer is {type(layer).__name__}: expected ops.FrozenLinear, as FrozenLinear.of(layer) is")
    weight, bias, gain, shift, scale, first, last = layer
    outputs = len(weight) if weight.ndim else 0
    last = outputs if last is None else last
    if weight.ndim < 2 or layer.in_features != features:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [D_out, {features}] for its input")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected {(outputs,)}")
    if gain is not None and gain.shape != (features,):
        raise ValueError(f"gain has shape {tuple(gain.shape)}: expected {(features,)}")
    if shift is not None and shift.shape != (features,):
        raise ValueError(f"shift has shape {tuple(shift.shape)}: expected {(features,)}")
    if scale is not None and scale.shape != (outputs,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}: expected {(outputs,)}")
    if not 0 <= first <= last <= outputs:
        raise ValueError(f"outputs {first} to {last}: expected a range within 0 to {outputs}")
    return last - first


class _Fwd(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    first: int
    last: int


class _Bwd(NamedTuple):
    grad: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    first: int
    last: int


@first_order("linear", "torch.nn.functional.linear")
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        save(ctx, weights=rest[:5])
        ctx.rest = rest[5:]
        return cast(Tensor, call("linear_fwd", x, *rest))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return call("linear_bwd", grad, *saved(ctx), *ctx.rest), *(None,) * 8


@first_order("project_q_kv", "torch.nn.functional.linear")
class _ProjectQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_queries: int, *rest: Any) -> tuple[Tensor, Tensor]:
        *weights, impl = rest
        save(ctx, weights=weights)
        ctx.num_queries, ctx.impl, (last, D) = num_queries, impl, weights[0].shape
        q = call("linear_fwd", x[:, :num_queries], *weights, 0, D, impl)
        return q, call("linear_fwd", x, *weights, D, last, impl)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_kv: Tensor) -> tuple[Tensor | None, ...]:
        weights, impl = saved(ctx), ctx.impl
        last, D = weights[0].shape
        d_x = call("linear_bwd", d_kv, *weights, D, last, impl)
        d_x[:, : ctx.num_queries] += call("linear_bwd", d_q, *weights, 0, D, impl)
        return d_x, *(None,) * 7


def _fwd(how: str, a: _Fwd) -> Tensor:
    return products.linear(a.x, FrozenLinear(*a[1:]), how)


def _bwd(how: str, a: _Bwd) -> Tensor:
    return products.linear_bwd(a.grad, FrozenLinear(*a[1:]), how)


def auto_providers(a: Any) -> Sequence[str]:
    """Of operands that begin with what is multiplied: what "auto" tries, on GPUs Triton for what is between them."""
    return ["triton"] if a[0].is_cuda else [products.provider(a[0].dtype, a[0].device)]


def provider_reason(how: str) -> Callable[[Any], str | None]:
    """Of operands that begin with what is multiplied: why the provider ``how`` cannot multiply it."""

    def reason(operands: Any) -> str | None:
        x: Tensor = operands[0]
        if how == "native":
            return native_reason(x.device, x.dtype)
        if found := cpu_reason(x.device) or dtype_reason(products.HALF if how == "widened" else FLOATS, x.dtype):
            return found
        works = how == "widened" or products.onednn_works(x.dtype)
        return None if works else f"cannot run here: this PyTorch or processor has no packed product in {x.dtype}"

    return reason


def _fwd_fake(a: _Fwd) -> Tensor:
    return a.x.new_empty(*a.x.shape[:-1], a.last - a.first)


def _bwd_fake(a: _Bwd) -> Tensor:
    return a.grad.new_empty(*a.grad.shape[:-1], a.weight[0].numel())


PROVIDERS = ("native", "onednn", "widened")
register(
    "linear_fwd",
    _Fwd,
    "Tensor",
    PACKS,
    fake=_fwd_fake,
    reference=partial(_fwd, "plain"),
    auto=auto_providers,
    **{how: Implementation(partial(_fwd, how), provider_reason(how), recordable=how == "native") for how in PROVIDERS},
)
register(
    "linear_bwd",
    _Bwd,
    "Tensor",
    PACKS,
    fake=_bwd_fake,
    reference=partial(_bwd, "plain"),
    auto=auto_providers,
    **{how: Implementation(partial(_bwd, how), provider_reason(how), recordable=how == "native") for how in PROVIDERS},
)
