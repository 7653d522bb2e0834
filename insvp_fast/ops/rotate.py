"""Rotary position embedding of packed queries and keys: rotate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import check_heads
from insvp_fast.ops.registry import Implementation, Size, call, native_reason, register, require, triton_reason
from insvp_fast.runtime import buffers, native

__all__ = ["rotate", "rotate_bwd_reference", "rotate_reference"]


def rotate(
    packed: Tensor, num_heads: int, rotation: Tensor, first: int, *, half: bool = False, impl: str = "auto"
) -> Tensor:
    """Turn pairs of features of queries and keys by angles that depend on the token (Su et al. 2021, equation 34).

    Args:
        packed: [B, S, 3·D], queries, keys and values, or [B, S, 2·D], keys and values, with ``num_heads`` equal heads
            of width d folded into D, in any floating dtype. The values stay as they are.
        rotation: [N, 2·d], or [heads, N, 2·d], the sine for each feature and, behind them, the cosines; frozen. The
            rotation is computed in the wider of both dtypes, or in fp32.
        first: the row of the first rotated token. The N rows from there on are rotated; the others, prefix tokens
            before and prompts behind, stay as they are.
        half: whether feature i is paired with i + d/2; else 2·i is with 2·i + 1.
        impl: "auto" lets the device decide; "native", "triton" or "reference" insists.

    Returns:
        A new tensor like ``packed``. Kept for backward: ``rotation``.

    Raises:
        ValueError: for shapes that do not fit, a rotation that would be trained, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    check_heads(num_heads)
    if rotation.ndim < 2:
        raise ValueError(f"rotation has shape {tuple(rotation.shape)}: expected [N, 2*d] or [{num_heads}, N, 2*d]")
    N, d = rotation.shape[-2], rotation.shape[-1] // 2
    if packed.ndim != 3 or not d or d % 2 or packed.shape[2] not in (2 * num_heads * d, 3 * num_heads * d):
        shapes = tuple(packed.shape), tuple(rotation.shape)
        raise ValueError(f"packed and rotation have shapes {shapes}: expected [B, S, 3*D or 2*D] and [N, 2*d], d even")
    if rotation.ndim > 2 and tuple(rotation.shape[:-2]) != (num_heads,):
        raise ValueError(f"rotation has shape {tuple(rotation.shape)}: expected [N, 2*d] or [{num_heads}, N, 2*d]")
    if not 0 <= first <= first + N <= packed.shape[1]:
        raise ValueError(f"first={first} and {N} rotated tokens: expected rows within 0 to {packed.shape[1]}")
    if rotation.requires_grad:
        raise ValueError("ops.rotate is for a frozen rotation: expected requires_grad=False")
    operands = _Operands(packed, num_heads, rotation, first, half)
    require("rotate_fwd", impl, operands)
    return cast(Tensor, apply(_Rotate, *operands, impl))


def rotate_reference(packed: Tensor, num_heads: int, rotation: Tensor, first: int, half: bool = False) -> Tensor:
    """The formula of ``rotate``."""
    return _formula(packed, num_heads, rotation, first, half, forward=True)


def rotate_bwd_reference(grad: Tensor, num_heads: int, rotation: Tensor, first: int, half: bool = False) -> Tensor:
    """The gradient of ``rotate_reference``: of a true rotation, the rotation by the negative angles."""
    return _formula(grad, num_heads, rotation, first, half, forward=False)


def _formula(x: Tensor, num_heads: int, rotation: Tensor, first: int, half: bool, forward: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, rotation.dtype)
    rows = slice(first, first + rotation.shape[-2])
    (a, b), factors = _pairs(_turned(x, num_heads, rotation)[:, rows].to(wide), half), _factors(rotation, half)
    sin_a, cos_a, sin_b, cos_b = factors
    if forward:
        turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    else:
        turned = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    joined = torch.cat(turned, dim=-1) if half else torch.stack(turned, dim=-1).flatten(-2)
    out = x.clone()
    _turned(out, num_heads, rotation)[:, rows] = joined.to(x.dtype)
    return out


def _turned(x: Tensor, num_heads: int, rotation: Tensor) -> Tensor:  # [B, S, P·D] -> [B, S, P-1, heads, d]
    """All but the values."""
    parts: Tensor = x.unflatten(-1, (-1, num_heads, rotation.shape[-1] // 2))
    return parts[:, :, :-1]


def _pairs(x: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """The first and the second feature of each pair, as views."""
    return (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]) if half else (x[..., ::2], x[..., 1::2])


def _factors(rotation: Tensor, half: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sines and cosines of first features, then of second ones, [N, 1, heads or 1, d/2] each."""
    by_token = rotation.movedim(-2, 0).unsqueeze(1)  # [N, 1, heads, 2·d], without the heads where they share it
    by_token = by_token if rotation.ndim == 3 else by_token.unsqueeze(1)
    (sin_a, sin_b), (cos_a, cos_b) = (_pairs(x, half) for x in by_token.chunk(2, dim=-1))
    return sin_a, cos_a, sin_b, cos_b


class _Operands(NamedTuple):
    x: Tensor
    num_heads: int
    rotation: Tensor
    first: Size
    half: bool


@first_order("rotate", "rotate_reference of the module insvp_fast.ops.rotate")
class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, num_heads: int, rotation: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.num_heads, ctx.rest = num_heads, rest
        return cast(Tensor, call("rotate_fwd", packed, num_heads, rotation, *rest))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return call("rotate_bwd", grad, ctx.num_heads, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


def _lean(a: _Operands, forward: bool) -> Tensor:
    """The formula in one new tensor; in 16 bits there is a wide copy of what is rotated besides."""
    x, rows = a.x, slice(a.first, a.first + a.rotation.shape[-2])
    out, wide = buffers.empty_like(x), torch.promote_types(x.dtype, a.rotation.dtype)
    out[:, : a.first] = x[:, : a.first]
    out[:, rows.stop :] = x[:, rows.stop :]
    values = slice(x.shape[2] - a.num_heads * (a.rotation.shape[-1] // 2), None)
    out[:, rows, values] = x[:, rows, values]
    source, target = (_turned(t, a.num_heads, a.rotation)[:, rows] for t in (x, out))
    result = target if wide == x.dtype else buffers.empty(target.shape, wide, x.device)
    (in_a, in_b), (out_a, out_b) = _pairs(source.to(wide), a.half), _pairs(result, a.half)
    sin_a, cos_a, sin_b, cos_b = (factor.to(wide) for factor in _factors(a.rotation, a.half))
    torch.mul(in_a, cos_a, out=out_a)
    torch.mul(in_b, cos_b, out=out_b)
    out_a.addcmul_(in_b, sin_a if forward else sin_b, value=-1 if forward else 1)
    out_b.addcmul_(in_a, sin_b if forward else sin_a, value=1 if forward else -1)
    if result is not target:
        target.copy_(result)
    return out


def _fake(a: _Operands) -> Tensor:
    return a.x.new_empty(a.x.shape)


def _native(a: _Operands, forward: bool) -> Tensor:
    return native.rotate(a.x, a.num_heads, a.rotation, int(a.first), half=a.half, forward=forward)


def _native_reason(a: _Operands) -> str | None:
    return native_reason(a.x.device, a.x.dtype, weights=[a.rotation])


def _triton(a: _Operands, forward: bool) -> Tensor:
    from insvp_fast.kernels.gpu import rotate as kernel

    return kernel.rotate(a.x, a.num_heads, a.rotation, int(a.first), half=a.half, forward=forward)


def _triton_reason(a: _Operands) -> str | None:
    if reason := triton_reason(a.x.device, a.x.dtype, a.rotation.dtype):
        return reason
    from insvp_fast.kernels.gpu import rotate as kernel

    d = a.rotation.shape[-1] // 2
    return None if kernel.covers(d) else f"does not cover heads of width {d}"


def _auto(a: _Operands) -> Sequence[str]:
    if a.x.is_cuda:
        return ["triton"]
    return ["native"] if a.x.device.type == "cpu" and native.native_status().isa != "generic" else []


for _name, _forward in (("rotate_fwd", True), ("rotate_bwd", False)):
    register(
        _name,
        _Operands,
        "Tensor",
        fake=_fake,
        reference=partial(_lean, forward=_forward),
        auto=_auto,
        native=Implementation(partial(_native, forward=_forward), _native_reason, recordable=True),
        triton=Implementation(partial(_triton, forward=_forward), _triton_reason),
    )
