"""The hidden layer of a gated MLP from its two products, forward and backward: Triton kernels and launchers.

A program computes BLOCK_M rows of D numbers, as a norm of the hidden layer needs all of a row. The backward pass
computes the hidden layer again.

Arithmetic: fp32 from load to store.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from insvp_fast.kernels.gpu.activation import activate, derivative
from insvp_fast.kernels.gpu.norm_insert import mean
from torch import Tensor

WIDEST = {True: 4096, False: 8192}  # rows, normalized or not; `tools.aot --all` shows no spills in backward


@triton.jit
def _places(M, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of a program's rows; int64, as offsets may exceed int32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    return m.to(tl.int64)[:, None] * D + d[None, :], (m < M)[:, None] & (d < D)[None, :]


@triton.jit
def _normalize(x, mask, eps, D: tl.constexpr):
    """x-hat and 1/sigma of each row."""
    deviation = tl.where(mask, x - mean(x, D), 0.0)
    rstd = tl.rsqrt(mean(deviation * deviation, D) + eps)
    return deviation * rstd, rstd


@triton.jit(do_not_specialize=["M"])
def _gate_fwd_kernel(
    pre_ptr, factor_ptr, hidden_ptr, M, eps,
    ACTIVATION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``factor_ptr`` and ``eps`` may be None."""
    offs, mask = _places(M, D, BLOCK_M, BLOCK_D)
    hidden = activate(tl.load(pre_ptr + offs, mask, 0.0).to(tl.float32), ACTIVATION)
    if factor_ptr is not None:
        hidden *= tl.load(factor_ptr + offs, mask, 0.0).to(tl.float32)
    if eps is not None:
        hidden, _ = _normalize(hidden, mask, eps, D)
    tl.store(hidden_ptr + offs, hidden.to(hidden_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M"])
def _gate_bwd_kernel(
    grad_ptr, pre_ptr, factor_ptr, d_pre_ptr, d_factor_ptr, M, eps,
    ACTIVATION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``factor_ptr``, with it ``d_factor_ptr``, and ``eps`` may be None; ``d_pre_ptr`` may be ``grad_ptr``."""
    offs, mask = _places(M, D, BLOCK_M, BLOCK_D)
    g = tl.load(grad_ptr + offs, mask, 0.0).to(tl.float32)
    x = tl.load(pre_ptr + offs, mask, 0.0).to(tl.float32)
    opened = activate(x, ACTIVATION)
    hidden = opened
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + offs, mask, 0.0).to(tl.float32)
        hidden *= factor
    if eps is not None:
        xhat, rstd = _normalize(hidden, mask, eps, D)
        along = tl.sum(g * xhat, 1, keep_dims=True) * (1 / D)
        g = rstd * (g - tl.sum(g, 1, keep_dims=True) * (1 / D) - xhat * along)
    if factor_ptr is not None:
        tl.store(d_factor_ptr + offs, (g * opened).to(d_factor_ptr.dtype.element_ty), mask)
        g *= factor
    tl.store(d_pre_ptr + offs, (g * derivative(x, ACTIVATION)).to(d_pre_ptr.dtype.element_ty), mask)


def launch_config(D: int, normalized: bool) -> dict[str, int]:
    """Rows, warps and stages of both kernels on every architecture; raises ValueError for rows that are not covered.

    A warp has at most 512 values, as backward holds six numbers of each. Products and sums are rounded apart, as
    in ``norm_insert``.
    """
    if not covers(D, normalized):
        raise ValueError(f"gate: the width must be 1 to {WIDEST[normalized]}, got {D}")
    BLOCK_D = triton.next_power_of_2(D)
    rows, warps = max(1, min(8, 512 // BLOCK_D)), max(1, BLOCK_D // 512)
    return {"BLOCK_M": rows, "BLOCK_D": BLOCK_D, **chip.launch_options(warps, 1, fused=False)}


def covers(D: int, normalized: bool) -> bool:
    """Whether the kernels take rows of this width."""
    return 1 <= D <= WIDEST[normalized]


def gate_fwd(pre: Tensor, factor: Tensor | None, activation: str, eps: float | None, *, keep: bool = True) -> Tensor:
    """``normalize(activation(pre) * factor)``, with LayerNorm without an affine map, or without one if eps is None.

    Args:
        pre: and ``factor``, if there is one, [..., D] in fp32, fp16 or bf16.
        activation: as in ``activation_fwd``.
        keep: else a contiguous ``pre`` is overwritten with the result.

    Returns:
        [..., D] in the dtype of ``pre``, contiguous.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
        ValueError: for rows that are not covered.
    """
    chip.require_arch("gate", pre)
    hidden = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device) if keep else pre.contiguous()
    _launch(_gate_fwd_kernel, pre, (pre, factor, hidden), activation, eps)
    return hidden


def gate_bwd(
    grad: Tensor, pre: Tensor, factor: Tensor | None, activation: str, eps: float | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``gate_fwd`` by pre, which overwrites a contiguous ``grad``, and by factor.

    ``grad`` has the shape and the dtype of ``pre``. Raises as ``gate_fwd`` does.
    """
    chip.require_arch("gate", pre)
    d_pre = grad.contiguous()
    d_factor = None if factor is None else torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    _launch(_gate_bwd_kernel, pre, (d_pre, pre, factor, d_pre, d_factor), activation, eps)
    return d_pre, d_factor


def _launch(
    kernel: triton.JITFunction, pre: Tensor, tensors: tuple[Tensor | None, ...], activation: str, eps: float | None
) -> None:
    D = pre.shape[-1]
    if not pre.numel():
        return
    config, M = launch_config(D, eps is not None), pre.numel() // D
    operands = (None if x is None else x.contiguous() for x in tensors)
    with torch.cuda.device_of(pre):
        kernel[(triton.cdiv(M, config["BLOCK_M"]),)](*operands, M, eps, ACTIVATION=activation, D=D, **config)
