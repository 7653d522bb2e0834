"""Softmax attention of the first T tokens to all S, from the packed product: Triton kernels and launchers.

Letters: B images, S tokens (keys), the first T of which are queries, H heads of d columns, D = H*d. A row of the packed
product holds q, k and v, D columns each, with head h at columns h*d of each.

A program computes one head of one image. It holds all keys and values on chip and all scores of a query in registers,
so that the softmax needs no rescaling, and backward nothing of the forward pass but the packed product. Each input is
read once and each output written once, including the zeros of d_qkv. Only where there are few heads does the forward
kernel split the queries of a head among programs, each of which reads the keys and values.

Arithmetic: matrix operands have the dtype of the packed product, everything else is fp32. Operands in fp32 are for the
interpreter only: on a GPU, products to full fp32 take three TF32 passes, and the operands that are split for them leave
too few registers.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor

SHARED_MEMORY = 110592  # bytes that backward takes on sm_80; sm_86 and sm_89 have only 101376

MOST_KEYS, WIDEST_HEAD = 240, 64  # within the registers of a program

LOG2_E = 1.4426950408889634


@triton.jit
def _tile(start, count: tl.constexpr, d: tl.constexpr, STRIDE: tl.constexpr,
          ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Offsets and mask [ROWS, BLOCK_D] of the rows of a head from ``start``; ``count`` rows exist."""
    rows, columns = start + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return rows * STRIDE + columns, (rows < count) & (columns < d)


@triton.jit
def _load(ptr, start, count: tl.constexpr, d: tl.constexpr, STRIDE: tl.constexpr,
          ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    offs, mask = _tile(start, count, d, STRIDE, ROWS, BLOCK_D)
    return tl.load(ptr + offs, mask, 0.0).to(COMPUTE)


@triton.jit
def _store(ptr, value, start, count: tl.constexpr, d: tl.constexpr, STRIDE: tl.constexpr,
           ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    offs, mask = _tile(start, count, d, STRIDE, ROWS, BLOCK_D)
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, out_ptr, log2_scale,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, d: tl.constexpr, QKV: tl.constexpr, KEYS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """KEYS divides the keys into tiles (first, size): a single one, a power of two, would be 256 for 206 keys."""
    D: tl.constexpr = H * d
    image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q_ptr = qkv_ptr + image * QKV[0] + head * d
    out_ptr += image * (T * D) + head * d

    k, v = (), ()
    for i in tl.static_range(len(KEYS)):
        # transposed before the loop, or the compiler would copy the keys to shared memory for every block of queries
        k_i = tl.trans(_load(q_ptr + D, KEYS[i][0], S, d, QKV[1], KEYS[i][1], BLOCK_D, COMPUTE))
        v_i = _load(q_ptr + 2 * D, KEYS[i][0], S, d, QKV[1], KEYS[i][1], BLOCK_D, COMPUTE)
        k += (k_i,)  # type: ignore[assignment]  # Triton tuples with an entry per unrolled iteration
        v += (v_i,)  # type: ignore[assignment]

    for t0 in range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        q = _load(q_ptr, t0, T, d, QKV[1], BLOCK_T, BLOCK_D, COMPUTE)
        scores = ()
        top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        for i in tl.static_range(len(KEYS)):
            s = tl.dot(q, k[i]) * log2_scale
            if KEYS[i][0] + KEYS[i][1] > S:
                s = tl.where((KEYS[i][0] + tl.arange(0, KEYS[i][1]) < S)[None, :], s, float("-inf"))
            top = tl.maximum(top, tl.max(s, 1))
            scores += (s,)  # type: ignore[assignment]
        total = tl.zeros((BLOCK_T,), tl.float32)
        out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for i in tl.static_range(len(KEYS)):
            p = tl.exp2(scores[i] - top[:, None])
            total += tl.sum(p, 1)
            out = tl.dot(p.to(COMPUTE), v[i], out)
        _store(out_ptr, out / total[:, None], t0, T, d, D, BLOCK_T, BLOCK_D)


@triton.jit
def _attention_bwd_kernel(
    grad_ptr, qkv_ptr, d_qkv_ptr, scale, log2_scale,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, d: tl.constexpr, GRAD: tl.constexpr, QKV: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, [keys, queries], and so are operands of d_k and d_v without leaving their registers."""
    D: tl.constexpr = H * d
    image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    grad_ptr += image * GRAD[0] + head * d
    q_ptr = qkv_ptr + image * QKV[0] + head * d
    d_q_ptr = d_qkv_ptr + image * (S * 3 * D) + head * d

    k = _load(q_ptr + D, 0, S, d, QKV[1], BLOCK_S, BLOCK_D, COMPUTE)
    v = _load(q_ptr + 2 * D, 0, S, d, QKV[1], BLOCK_S, BLOCK_D, COMPUTE)
    k_t = tl.trans(k)
    exists = (tl.arange(0, BLOCK_S) < S)[:, None]
    d_k = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)

    for t0 in range(0, T, BLOCK_T):
        q = _load(q_ptr, t0, T, d, QKV[1], BLOCK_T, BLOCK_D, COMPUTE)
        grad = _load(grad_ptr, t0, T, d, GRAD[1], BLOCK_T, BLOCK_D, COMPUTE)
        s = tl.dot(k, tl.trans(q))
        d_p = tl.dot(v, tl.trans(grad))
        s = tl.where(exists, s * log2_scale, float("-inf"))
        e = tl.exp2(s - tl.max(s, 0)[None, :])
        total, weighted = tl.reduce((e, e * d_p), 0, _add_pairs)  # one exchange between warps, not two
        inverse = 1 / total
        p = e * inverse[None, :]
        d_v = tl.dot(p.to(COMPUTE), grad, d_v)
        d_s = (p * (d_p - (weighted * inverse)[None, :])).to(COMPUTE)
        d_k = tl.dot(d_s, q, d_k)
        d_q = scale * tl.trans(tl.dot(k_t, d_s))
        _store(d_q_ptr, d_q, t0, S, d, 3 * D, BLOCK_T, BLOCK_D)  # zero from T on: so is grad

    for t0 in range((T + BLOCK_T - 1) // BLOCK_T * BLOCK_T, S, BLOCK_T):
        _store(d_q_ptr, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), t0, S, d, 3 * D, BLOCK_T, BLOCK_D)
    _store(d_q_ptr + D, scale * d_k, 0, S, d, 3 * D, BLOCK_S, BLOCK_D)
    _store(d_q_ptr + 2 * D, d_v, 0, S, d, 3 * D, BLOCK_S, BLOCK_D)


def launch_config(kind: str, S: int, d: int, arch: int | str) -> dict:
    """Tiles, warps and stages of kernel ``kind`` ("fwd" or "bwd") for S keys of width d."""
    BLOCK_D = max(64, triton.next_power_of_2(d))  # at least 64: these are the rows of the transposed d_q, for wgmma
    few_registers = arch in (80, "gfx942")  # operands of products share them with the sums
    if kind == "fwd":
        stages = 1 if few_registers and S > 208 else 2  # queries loaded ahead would leave too few for the scores
        return {"KEYS": key_tiles(S), "BLOCK_T": 64, "BLOCK_D": BLOCK_D, **chip.launch_options(4, stages)}
    BLOCK_S = max(16, triton.next_power_of_2(S))
    num_warps = 8 if BLOCK_S >= 128 else 4  # so that d_k and d_v take at most half of a thread's registers
    if arch == "gfx942":
        num_warps //= 2  # 64 lanes in a warp
    BLOCK_T = 32 if arch == 90 else 16  # elsewhere 32 need more registers than there are
    tiles = {"BLOCK_T": BLOCK_T, "BLOCK_S": BLOCK_S, "BLOCK_D": BLOCK_D}
    return tiles | chip.launch_options(num_warps, 3 if arch == 90 else 2)


def key_tiles(S: int) -> tuple[tuple[int, int], ...]:
    """Tiles (first, size) for S keys, rounded up to 16: sizes of 128, 64, 32 and 16, the largest first."""
    tiles, start, end = [], 0, triton.cdiv(S, 16) * 16
    while start < end:
        size = next(size for size in (128, 64, 32, 16) if size <= end - start)
        tiles.append((start, size))
        start += size
    return tuple(tiles)


def constants(kind: str, H: int, T: int, S: int, d: int, dtype: torch.dtype, arch: int | str) -> dict:
    """The compile-time constants and launch options of kernel ``kind``, without the strides of its inputs."""
    compute = chip.operands(dtype, arch)["COMPUTE"]
    return {"H": H, "T": T, "S": S, "d": d, "COMPUTE": compute} | launch_config(kind, S, d, arch)


def covers(device: torch.device, S: int, d: int, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device, for S keys of width d in this dtype.

    With d = 64 and 64, 109, 128, 206 and 240 keys they were compiled ahead of time, without spills on any architecture.
    """
    known = chip.arch(device) is not None and chip.shared_memory(device) >= SHARED_MEMORY
    return known and 1 <= S <= MOST_KEYS and 1 <= d <= WIDEST_HEAD and dtype in (torch.float16, torch.bfloat16)


def _check(qkv: Tensor, num_heads: int, num_queries: int) -> tuple[int, int, int, int | str]:
    """B, S, d and the architecture; raises what the launchers say they raise."""
    arch = chip.require_arch("attention", qkv)
    B, S, D3 = qkv.shape
    d = D3 // (3 * num_heads)
    if not chip.INTERPRETED and not covers(qkv.device, S, d, qkv.dtype):
        raise ValueError(f"attention: the Triton kernels do not cover {S} keys of width {d} in {qkv.dtype} here")
    if not 1 <= num_queries <= S:
        raise ValueError(f"attention: num_queries must be 1 to {S}, got {num_queries}")
    return B, S, d, arch


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """``x``, copied where its rows are not contiguous, or too far apart for the kernels' 32-bit offsets in an image."""
    return x if x.stride(2) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def attention_fwd(qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> Tensor:
    """Attention of the first ``num_queries`` tokens to all: softmax(scale q k^T) v for every head.

    Args:
        qkv: [B, S, 3*D] in bf16 or fp16; copied only where rows are not contiguous or 2^31 elements apart in an image.

    Returns:
        [B, num_queries, D], contiguous, in the same dtype.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter, which also takes fp32 and any d.
        ValueError: for what ``covers`` excludes, and for num_queries outside of 1 to S.
    """
    B, S, d, arch = _check(qkv, num_heads, num_queries)
    qkv = _with_contiguous_rows(qkv)
    const = constants("fwd", num_heads, num_queries, S, d, qkv.dtype, arch)
    out = qkv.new_empty(B, num_queries, num_heads * d)
    if B:
        # with few heads, blocks of queries get programs of their own, until each multiprocessor has two
        heads, blocks = B * num_heads, triton.cdiv(num_queries, const["BLOCK_T"])
        splits = min(blocks, triton.cdiv(2 * chip.MULTIPROCESSORS[arch], heads))
        with torch.cuda.device_of(qkv):
            _attention_fwd_kernel[(heads, splits)](qkv, out, scale * LOG2_E, QKV=qkv.stride()[:2], **const)
    return out


def attention_bwd(grad: Tensor, qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> Tensor:
    """The gradient of ``attention_fwd`` with respect to the packed product, without atomics and so deterministic.

    Args:
        grad: [B, num_queries, D] in the dtype of ``qkv``; the rest as in forward.

    Returns:
        [B, S, 3*D], contiguous; zero in the first D columns of tokens that are no queries, where all is finite.

    Raises:
        RuntimeError, ValueError: as forward does.
    """
    B, S, d, arch = _check(qkv, num_heads, num_queries)
    qkv, grad = _with_contiguous_rows(qkv), _with_contiguous_rows(grad)
    const = constants("bwd", num_heads, num_queries, S, d, qkv.dtype, arch)
    d_qkv = qkv.new_empty(qkv.shape)
    if B:
        strides = {"GRAD": grad.stride()[:2], "QKV": qkv.stride()[:2]}
        with torch.cuda.device_of(qkv):
            _attention_bwd_kernel[(B * num_heads,)](grad, qkv, d_qkv, scale, scale * LOG2_E, **strides, **const)
    return d_qkv
