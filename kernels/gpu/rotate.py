"""Rotary position embedding of packed queries and keys, forward and backward: a Triton kernel and its launcher.

A program computes BLOCK_M heads of D features, one below the other in memory: H of queries, H of keys and H of values
for a token, those of the next token behind them. A pair of features is turned where its head is one of the queries or
keys of a rotated token, else copied.

Arithmetic: fp32 from load to store.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor

WIDEST_HEAD = 1024  # of which a program has two


@triton.jit
def _columns(D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Those that are loaded at once: the first of each pair, or all; and which of them there are."""
    if HALF:
        d = tl.arange(0, BLOCK)[None, :]
        return d, d < D // 2
    else:
        d = tl.arange(0, 2 * BLOCK)[None, :]
        return d, d < D


@triton.jit
def _load(ptr, rows, mask, D: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """The first and the second feature of each pair [BLOCK_M, BLOCK]."""
    d, inside = _columns(D, HALF, BLOCK)
    x = tl.load(ptr + rows + d, mask & inside, 0.0).to(tl.float32)
    if HALF:
        return x, tl.load(ptr + rows + D // 2 + d, mask & inside, 0.0).to(tl.float32)
    else:
        return tl.split(tl.reshape(x, (BLOCK_M, BLOCK, 2)))


@triton.jit
def _store(ptr, rows, mask, a, b, D: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    d, inside = _columns(D, HALF, BLOCK)
    if HALF:
        tl.store(ptr + rows + d, a.to(ptr.dtype.element_ty), mask & inside)
        tl.store(ptr + rows + D // 2 + d, b.to(ptr.dtype.element_ty), mask & inside)
    else:
        x = tl.reshape(tl.join(a, b), (BLOCK_M, 2 * BLOCK))
        tl.store(ptr + rows + d, x.to(ptr.dtype.element_ty), mask & inside)


@triton.jit(do_not_specialize=["M", "S", "first", "N"])
def _rotate_kernel(
    x_ptr, rotation_ptr, out_ptr, M, S, first, N, head_stride, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, FORWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rotation_ptr``: of a token, and of a head if they are apart, the sines of D features, then their cosines."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    place = m // (PARTS * H) % S - first
    turned = (m < M) & (m // H % PARTS < PARTS - 1) & (place >= 0) & (place < N)
    rows, angles = m.to(tl.int64) * D, m % H * head_stride + place * (2 * D)
    a, b = _load(x_ptr, rows, m < M, D, HALF, BLOCK_M, BLOCK)
    sin_a, sin_b = _load(rotation_ptr, angles, turned, D, HALF, BLOCK_M, BLOCK)
    cos_a, cos_b = _load(rotation_ptr, angles + D, turned, D, HALF, BLOCK_M, BLOCK)
    if FORWARD:
        u, v = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    else:
        u, v = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    u, v = tl.where(turned, u, a), tl.where(turned, v, b)
    _store(out_ptr, rows, m < M, u, v, D, HALF, BLOCK_M, BLOCK)


def launch_config(D: int) -> dict[str, int]:
    """Heads, pairs, warps and stages for every architecture; raises ValueError for heads that are not covered.

    16 numbers per thread: two 16-byte loads of 16 bits, and of 32 bits twice as many.
    """
    if not covers(D):
        raise ValueError(f"rotate: the heads must have an even width of 2 to {WIDEST_HEAD}, got {D}")
    BLOCK = triton.next_power_of_2(D // 2)
    return {"BLOCK_M": max(1, 1024 // BLOCK), "BLOCK": BLOCK, **chip.launch_options(4, 1)}


def covers(D: int) -> bool:
    """Whether the kernel takes heads of this width."""
    return D % 2 == 0 and 2 <= D <= WIDEST_HEAD


def rotate(x: Tensor, num_heads: int, rotation: Tensor, first: int, *, half: bool, forward: bool) -> Tensor:
    """``rotate_reference``, or ``rotate_bwd_reference``, of the module ``insvp_fast.ops.rotate``.

    Args:
        x: [B, S, 3·D·num_heads], or 2 instead of 3, in fp32, fp16 or bf16.
        rotation: [N, 2·D] or [num_heads, N, 2·D], in fp32, fp16 or bf16.

    Returns:
        A new contiguous tensor like ``x``.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
        ValueError: for heads that are not covered.
    """
    chip.require_arch("rotate", x)
    (B, S, width), (N, both) = x.shape, rotation.shape[-2:]
    D, rotation = both // 2, rotation.contiguous()
    config, out = launch_config(D), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if M := B * S * (width // D):
        with torch.cuda.device_of(x):
            _rotate_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
                x.contiguous(), rotation, out, M, S, first, N, N * both if rotation.ndim > 2 else 0,
                PARTS=width // (num_heads * D), H=num_heads, D=D, HALF=half, FORWARD=forward, **config,
            )  # fmt: skip
    return out
