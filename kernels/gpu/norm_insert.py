"""Residual addition, LayerNorm or RMSNorm, and placement of the prompts in one pass: Triton kernels and launchers.

Letters: B images, T tokens and L prompts of each, S = T + L, M = B*S rows of the normalized buffer, D width.

A program computes BLOCK_M consecutive rows of the normalized buffer, each a token or a prompt, depending on its number.
It loads both through masks that exclude each other, and adds them. Up to D = 2048 a program is one warp, so that the
sums over a row need no shared memory and no barrier, and many programs per multiprocessor keep the memory busy.

Arithmetic: fp32 from load to store. The variance is the mean square of the deviations, which does not cancel as
E[x²] - E[x]² does.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor


@triton.jit
def _rows(M, T, L, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Image, position in it [BLOCK_M, 1], columns and mask of a program's rows; int64, as offsets may exceed int32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # broadcast to the rows, so that weight and bias get the layout of the data and need no exchange between lanes
    offs_d = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], (BLOCK_M, BLOCK_D))
    image, place = (m // (T + L)).to(tl.int64)[:, None], (m % (T + L))[:, None]
    return image, place, offs_d, (m < M)[:, None] & (offs_d < D)


@triton.jit
def mean(x, D: tl.constexpr):
    """Of each row, rounded correctly: ``/`` is less exact on GPUs, and a constant row would differ from its mean."""
    return tl.div_rn(tl.sum(x, 1, keep_dims=True), D)


@triton.jit(do_not_specialize=["M", "T", "L"])
def _norm_insert_fwd_kernel(
    residual_ptr, branch_ptr, prompts_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, xhat_ptr, rstd_ptr,
    M, T, L, prompt_stride, eps, CENTER: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers may be None: without a branch there is no total, without a weight no bias and no separate x-hat."""
    image, place, offs_d, mask = _rows(M, T, L, D, BLOCK_M, BLOCK_D)
    tokens = (image * T + place) * D + offs_d
    token_mask = mask & (place < T)
    x = tl.load(residual_ptr + tokens, token_mask, 0.0).to(tl.float32)
    if branch_ptr is not None:
        x += tl.load(branch_ptr + tokens, token_mask, 0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + tokens, total, token_mask)
        x = total.to(tl.float32)  # normalize the rounded stream, which is what the next block reads
    if prompts_ptr is not None:
        prompts = image * prompt_stride + (place - T) * D + offs_d
        x += tl.load(prompts_ptr + prompts, mask & (place >= T), 0.0).to(tl.float32)

    deviation = x
    if CENTER:
        deviation = tl.where(offs_d < D, x - mean(x, D), 0.0)
    rstd = tl.rsqrt(mean(deviation * deviation, D) + eps)
    y = deviation * rstd
    rows = image * (T + L) + place
    tl.store(rstd_ptr + rows, rstd, rows < M)
    if weight_ptr is not None:
        tl.store(xhat_ptr + rows * D + offs_d, y.to(xhat_ptr.dtype.element_ty), mask)
        y *= tl.load(weight_ptr + offs_d, offs_d < D, 0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_d, offs_d < D, 0.0).to(tl.float32)
    tl.store(normed_ptr + rows * D + offs_d, y.to(normed_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "T", "L"])
def _norm_insert_bwd_kernel(
    grad_residual_ptr, grad_normed_ptr, xhat_ptr, rstd_ptr, weight_ptr, d_residual_ptr, d_branch_ptr, d_prompts_ptr,
    M, T, L, CENTER: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers may be None: those of the stream's gradient, of the weight, and of results that are not needed."""
    image, place, offs_d, mask = _rows(M, T, L, D, BLOCK_M, BLOCK_D)
    rows = image * (T + L) + place
    tokens = (image * T + place) * D + offs_d
    token_mask = mask & (place < T)
    g = tl.load(grad_normed_ptr + rows * D + offs_d, mask, 0.0).to(tl.float32)
    xhat = tl.load(xhat_ptr + rows * D + offs_d, mask, 0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, rows < M, 0.0)
    if grad_residual_ptr is not None:  # loaded before the sums, to overlap with them
        onward = tl.load(grad_residual_ptr + tokens, token_mask, 0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + offs_d, offs_d < D, 0.0).to(tl.float32)

    along = tl.sum(g * xhat, 1, keep_dims=True) * (1 / D)  # fewer registers than a division takes
    if CENTER:
        g -= tl.sum(g, 1, keep_dims=True) * (1 / D)
    d = rstd * (g - xhat * along)
    if d_prompts_ptr is not None:
        prompts = (image * L + place - T) * D + offs_d
        tl.store(d_prompts_ptr + prompts, d.to(d_prompts_ptr.dtype.element_ty), mask & (place >= T))
    if grad_residual_ptr is not None:
        d += onward
    tl.store(d_residual_ptr + tokens, d.to(d_residual_ptr.dtype.element_ty), token_mask)
    if d_branch_ptr is not None:
        tl.store(d_branch_ptr + tokens, d.to(d_branch_ptr.dtype.element_ty), token_mask)


def launch_config(D: int) -> dict[str, int]:
    """Rows, warps and stages of both kernels on every architecture.

    A warp has at most 2048 values, 64 per lane and on AMD 32. Raises ValueError for a width above 16384.

    Products and sums are rounded apart: a mean of rounded products subtracted from products that are not would leave
    what was rounded, times 1/σ.
    """
    if not covers(D):
        raise ValueError(f"norm_insert: the width must be 1 to 16384, got {D}")
    BLOCK_D = triton.next_power_of_2(D)
    rows, warps = max(1, min(8, 2048 // BLOCK_D)), max(1, BLOCK_D // 2048)
    return {"BLOCK_M": rows, "BLOCK_D": BLOCK_D, **chip.launch_options(warps, 1, fused=False)}


def covers(D: int) -> bool:
    """Whether the kernels normalize rows of this width."""
    return 1 <= D <= 16384


def norm_insert_fwd(
    residual: Tensor, branch: Tensor | None, prompts: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dtype: torch.dtype, center: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Add the branch to the stream, normalize tokens and prompts, and place them in one buffer.

    Args:
        residual, branch: [B, T, D], in fp32, fp16 or bf16 as all operands.
        prompts: [B, L, D], which may be expanded along B.
        weight, bias: [D], of the frozen norm; None where they are folded into the next product.
        dtype: of the normalized tokens.
        center: subtract the mean: LayerNorm; without it RMSNorm.

    Returns:
        total: [B, T, D] in the dtype of ``residual``; empty without a branch.
        normed: [B, S, D] in ``dtype``.
        xhat: [B, S, D] in ``dtype``, ``normed`` before weight and bias; empty without a weight.
        rstd: [B, S] in fp32.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
        ValueError: for D above 16384.
    """
    chip.require_arch("norm_insert", residual)
    config = launch_config(residual.shape[-1])
    (B, T, D), L = residual.shape, 0 if prompts is None else prompts.shape[1]
    S, device = T + L, residual.device
    total = torch.empty(0 if branch is None else (B, T, D), dtype=residual.dtype, device=device)
    normed = torch.empty((B, S, D), dtype=dtype, device=device)
    xhat = torch.empty(0 if weight is None else (B, S, D), dtype=dtype, device=device)
    rstd = torch.empty((B, S), dtype=torch.float32, device=device)
    if prompts is not None:
        prompts = None if L == 0 else prompts if prompts.stride()[1:] == (D, 1) else prompts.contiguous()
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    if B * S:
        with torch.cuda.device_of(residual):
            _norm_insert_fwd_kernel[(triton.cdiv(B * S, config["BLOCK_M"]),)](
                residual.contiguous(), None if branch is None else branch.contiguous(), prompts, weight, bias,
                None if branch is None else total, normed, None if weight is None else xhat, rstd,
                B * S, T, L, 0 if prompts is None else prompts.stride(0), eps, CENTER=center, D=D, **config,
            )  # fmt: skip
    return total, normed, xhat, rstd


def norm_insert_bwd(
    grad_residual: Tensor | None, grad_normed: Tensor, xhat: Tensor, rstd: Tensor, weight: Tensor | None,
    num_tokens: int, stream_dtype: torch.dtype, branch_dtype: torch.dtype, center: bool = True,
    prompts_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of ``norm_insert_fwd``.

    Args:
        grad_residual: [B, T, D], of ``total``; None for zero.
        grad_normed: [B, S, D].
        xhat, rstd: as forward returned them; without a weight its ``normed`` is ``xhat``.
        num_tokens: T.

    Returns:
        d_residual: [B, T, D] in ``stream_dtype``.
        d_branch: the same values in ``branch_dtype``; empty where that is ``stream_dtype``.
        d_prompts: [B, L, D] in ``prompts_dtype``, or ``stream_dtype``.

    Raises:
        RuntimeError, ValueError: as forward does.
    """
    chip.require_arch("norm_insert", xhat)
    config = launch_config(xhat.shape[-1])
    (B, S, D), T, device = xhat.shape, num_tokens, xhat.device
    L = S - T
    apart = branch_dtype != stream_dtype
    d_residual = torch.empty((B, T, D), dtype=stream_dtype, device=device)
    d_branch = torch.empty((B, T, D) if apart else 0, dtype=branch_dtype, device=device)
    d_prompts = torch.empty((B, L, D), dtype=prompts_dtype or stream_dtype, device=device)
    if B * S:
        with torch.cuda.device_of(xhat):
            _norm_insert_bwd_kernel[(triton.cdiv(B * S, config["BLOCK_M"]),)](
                None if grad_residual is None else grad_residual.contiguous(), grad_normed.contiguous(),
                xhat.contiguous(), rstd.contiguous(), None if weight is None else weight.contiguous(),
                d_residual, d_branch if apart else None, d_prompts if L else None, B * S, T, L,
                CENTER=center, D=D, **config,
            )  # fmt: skip
    return d_residual, d_branch, d_prompts
