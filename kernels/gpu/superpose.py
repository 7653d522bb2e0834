"""The image prompt (equations 5 to 7) in one pass over the pixels, written unfolded: Triton kernels and launchers.

Letters: B images, C channels, H, W image size, P patch size, N = (H/P)(W/P) patches in row-major order, M = B*N patches
of the batch, K = C*P*P values of a patch (channel, row, column), R hidden width of the patch prompter, S splits of M.

A program computes BLOCK_M consecutive patches and loops over K. Lanes run along a pixel row of a patch and on into the
next patch, so that reads of the image use whole sectors and the tokens are written contiguously. Neither the unfolded
image nor the patch prompt is stored in memory.

Arithmetic: sums are in fp32. The operands of the matrix products have the dtype that image and tokens promote to. If
both have the same 16-bit dtype, the weights are rounded to it, as under autocast; otherwise the products have fp32
accuracy ("ieee", and three TF32 passes on NVIDIA, whose tensor cores have no fp32). An 8-bit image counts as fp32: it
is converted when loaded, with the scale and shift of its channel.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor


@triton.jit
def _patch_offsets(m, P: tl.constexpr, GRID: tl.constexpr, STRIDES: tl.constexpr):
    """Offset of the first pixel of patch m [BLOCK_M]; int64, since a batch may exceed 2^31 elements."""
    n = m % (GRID[0] * GRID[1])
    image = (m // (GRID[0] * GRID[1])).to(tl.int64) * STRIDES[0]
    return image + (n // GRID[1]) * (P * STRIDES[2]) + (n % GRID[1]) * (P * STRIDES[3])


@triton.jit
def _pixel_offsets(k, P: tl.constexpr, STRIDES: tl.constexpr):
    """Offset of value k = (channel, row, column) from the first pixel of its patch [BLOCK_K]."""
    return (k // (P * P)) * STRIDES[1] + (k // P % P) * STRIDES[2] + (k % P) * STRIDES[3]


@triton.jit
def _pixels(image_ptr, scale_ptr, shift_ptr, places, offs_k, mask,
            K: tl.constexpr, P: tl.constexpr, IMAGE: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Values offs_k of the patches that start at ``places``; scale and shift are None unless the image has 8 bits."""
    u = tl.load(image_ptr + places + _pixel_offsets(offs_k, P, IMAGE)[None, :], mask, 0.0)
    if scale_ptr is not None:
        channel, known = offs_k // (P * P), offs_k < K
        scale, shift = tl.load(scale_ptr + channel, known, 0.0), tl.load(shift_ptr + channel, known, 0.0)
        u = u.to(tl.float32) * scale[None, :] + shift[None, :]
    return u.to(COMPUTE)


@triton.jit
def _drop(values, kept_ptr, places, offs_k, mask, P: tl.constexpr, KEPT: tl.constexpr):
    """Values offs_k of patches times dropout's mask of them, unless ``kept_ptr`` is None."""
    if kept_ptr is not None:
        values *= tl.load(kept_ptr + places + _pixel_offsets(offs_k, P, KEPT)[None, :], mask, 0).to(values.dtype)
    return values


@triton.jit
def _project(hidden, places, mask_m, k0, image_ptr, scale_ptr, shift_ptr, w1_ptr,
             K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, IMAGE: tl.constexpr,
             COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """The next BLOCK_K pixels of the patches, from k0, and ``hidden`` plus their part of the first layer's product."""
    offs_k, offs_r = k0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_k = (offs_k < K)[None, :]
    u = _pixels(image_ptr, scale_ptr, shift_ptr, places, offs_k, mask_m & mask_k, K, P, IMAGE, COMPUTE)
    w1 = tl.load(w1_ptr + offs_r[:, None] * K + offs_k[None, :], (offs_r < R)[:, None] & mask_k, 0.0).to(COMPUTE)
    return u, tl.dot(u, tl.trans(w1), hidden, input_precision=PRECISION)


@triton.jit
def _write_tokens(u, hidden, rows, mask_m, k0, global_ptrs, kept_ptr, kept_places, w2_ptr, b2_ptr, tokens_ptr,
                  global_weight, patch_weight, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
                  GLOBAL: tl.constexpr, HAS_GLOBAL: tl.constexpr, KEPT: tl.constexpr, COMPUTE: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Second layer, superposition and store for BLOCK_K pixels of the patches, from k0."""
    offs_k, offs_r = k0 + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask = mask_m & mask_k[None, :]
    w2 = tl.load(w2_ptr + offs_k[:, None] * R + offs_r[None, :], mask_k[:, None] & (offs_r < R)[None, :], 0.0)
    prompt = tl.dot(hidden, tl.trans(w2.to(COMPUTE)), input_precision=PRECISION)
    prompt += tl.load(b2_ptr + offs_k, mask_k, 0.0).to(tl.float32)[None, :]
    prompt = _drop(prompt, kept_ptr, kept_places, offs_k, mask, P, KEPT)
    out = u.to(tl.float32) + patch_weight * prompt
    if HAS_GLOBAL:
        p_g = tl.load(global_ptrs + _pixel_offsets(offs_k, P, GLOBAL)[None, :], mask, 0.0)
        out += global_weight * p_g.to(tl.float32)
    tl.store(tokens_ptr + rows * K + offs_k[None, :], out.to(tokens_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M"])
def _superpose_fwd_kernel(
    image_ptr, scale_ptr, shift_ptr, global_ptr, kept_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, tokens_ptr,
    hidden_ptr, M, global_weight, patch_weight,
    K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, GRID: tl.constexpr, IMAGE: tl.constexpr, GLOBAL: tl.constexpr,
    HAS_GLOBAL: tl.constexpr, KEPT: tl.constexpr, KEEP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """With KEEP the pixels stay in registers between the layers, in loops unrolled over K; else they are read twice."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = (offs_m < M)[:, None]
    places = _patch_offsets(offs_m, P, GRID, IMAGE)[:, None]

    hidden = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    kept = ()
    if KEEP:
        for k0 in tl.static_range(0, K, BLOCK_K):
            u, hidden = _project(hidden, places, mask_m, k0, image_ptr, scale_ptr, shift_ptr, w1_ptr,
                                 K, P, R, IMAGE, COMPUTE, PRECISION, BLOCK_K, BLOCK_R)  # fmt: skip
            kept += (u,)  # type: ignore[assignment]  # a Triton tuple with an entry per unrolled iteration
    else:
        for k0 in range(0, K, BLOCK_K):
            u, hidden = _project(hidden, places, mask_m, k0, image_ptr, scale_ptr, shift_ptr, w1_ptr,
                                 K, P, R, IMAGE, COMPUTE, PRECISION, BLOCK_K, BLOCK_R)  # fmt: skip
    hidden += tl.load(b1_ptr + offs_r, offs_r < R, 0.0).to(tl.float32)[None, :]
    hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch.relu does
    tl.store(hidden_ptr + rows * R + offs_r[None, :], hidden, mask_m & (offs_r < R)[None, :])

    if R < BLOCK_R:  # what only fills the tile may be an infinity times zero
        hidden = tl.where((offs_r < R)[None, :], hidden, 0.0)
    hidden = hidden.to(COMPUTE)
    global_ptrs = global_ptr + _patch_offsets(offs_m, P, GRID, GLOBAL)[:, None]
    kept_places = _patch_offsets(offs_m, P, GRID, KEPT)[:, None]
    if KEEP:
        for k0 in tl.static_range(0, K, BLOCK_K):
            _write_tokens(kept[k0 // BLOCK_K], hidden, rows, mask_m, k0, global_ptrs, kept_ptr, kept_places, w2_ptr,
                          b2_ptr, tokens_ptr, global_weight, patch_weight, K, P, R, GLOBAL, HAS_GLOBAL, KEPT,
                          COMPUTE, PRECISION, BLOCK_K, BLOCK_R)  # fmt: skip
    else:
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            mask = mask_m & (offs_k < K)[None, :]
            u = _pixels(image_ptr, scale_ptr, shift_ptr, places, offs_k, mask, K, P, IMAGE, COMPUTE)
            _write_tokens(u, hidden, rows, mask_m, k0, global_ptrs, kept_ptr, kept_places, w2_ptr,
                          b2_ptr, tokens_ptr, global_weight, patch_weight, K, P, R, GLOBAL, HAS_GLOBAL, KEPT,
                          COMPUTE, PRECISION, BLOCK_K, BLOCK_R)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _superpose_bwd_kernel(
    grad_ptr, kept_ptr, hidden_ptr, w1_ptr, w2_ptr, d_hidden_ptr, d_image_ptr, d_global_ptr,
    M, global_weight, patch_weight,
    K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, GRID: tl.constexpr, IMAGE: tl.constexpr,
    NEED_IMAGE: tl.constexpr, NEED_GLOBAL: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < M)[:, None]
    mask_r = offs_r < R
    rows = offs_m.to(tl.int64)[:, None]
    places = _patch_offsets(offs_m, P, GRID, IMAGE)[:, None]

    d_hidden = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m & mask_k[None, :]
        grad = tl.load(grad_ptr + rows * K + offs_k[None, :], mask, 0.0).to(COMPUTE)
        w2 = tl.load(w2_ptr + offs_k[:, None] * R + offs_r[None, :], mask_k[:, None] & mask_r[None, :], 0.0).to(COMPUTE)
        if NEED_GLOBAL:
            out = (global_weight * grad.to(tl.float32)).to(d_global_ptr.dtype.element_ty)
            tl.store(d_global_ptr + places + _pixel_offsets(offs_k, P, IMAGE)[None, :], out, mask)
        grad = _drop(grad, kept_ptr, places, offs_k, mask, P, IMAGE)
        d_hidden = tl.dot(grad, w2, d_hidden, input_precision=PRECISION)
    spots = rows * R + offs_r[None, :]
    hidden = tl.load(hidden_ptr + spots, mask_m & mask_r[None, :], 0.0)
    d_hidden = tl.where(hidden <= 0, 0.0, patch_weight * d_hidden)
    tl.store(d_hidden_ptr + spots, d_hidden, mask_m & mask_r[None, :])

    if NEED_IMAGE:
        d_hidden = d_hidden.to(COMPUTE)
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            mask = mask_m & mask_k[None, :]
            grad = tl.load(grad_ptr + rows * K + offs_k[None, :], mask, 0.0).to(COMPUTE)
            w1 = tl.load(w1_ptr + offs_r[:, None] * K + offs_k[None, :], mask_r[:, None] & mask_k[None, :], 0.0)
            out = grad.to(tl.float32) + tl.dot(d_hidden, w1.to(COMPUTE), input_precision=PRECISION)
            out = out.to(d_image_ptr.dtype.element_ty)
            tl.store(d_image_ptr + places + _pixel_offsets(offs_k, P, IMAGE)[None, :], out, mask)


@triton.jit(do_not_specialize=["M"])
def _superpose_bwd_weight_kernel(
    grad_ptr, kept_ptr, image_ptr, scale_ptr, shift_ptr, hidden_ptr, d_hidden_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    M, patch_weight, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr, GRID: tl.constexpr, IMAGE: tl.constexpr,
    KEPT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of split s of S, over every S-th block of patches; the launcher adds the splits."""
    split = tl.program_id(1)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask_r = offs_r < R

    dw1 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    dw2 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    db1 = tl.zeros((BLOCK_R,), tl.float32)
    db2 = tl.zeros((BLOCK_K,), tl.float32)
    for m0 in range(split * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M)[:, None]
        rows = offs_m.to(tl.int64)[:, None]
        mask = mask_m & mask_k[None, :]
        grad = tl.load(grad_ptr + rows * K + offs_k[None, :], mask, 0.0).to(COMPUTE)
        grad = _drop(grad, kept_ptr, _patch_offsets(offs_m, P, GRID, KEPT)[:, None], offs_k, mask, P, KEPT)
        places = _patch_offsets(offs_m, P, GRID, IMAGE)[:, None]
        u = _pixels(image_ptr, scale_ptr, shift_ptr, places, offs_k, mask, K, P, IMAGE, COMPUTE)
        hidden = tl.load(hidden_ptr + rows * R + offs_r[None, :], mask_m & mask_r[None, :], 0.0)
        d_hidden = tl.load(d_hidden_ptr + rows * R + offs_r[None, :], mask_m & mask_r[None, :], 0.0)
        dw2 = tl.dot(tl.trans(grad), hidden.to(COMPUTE), dw2, input_precision=PRECISION)
        dw1 = tl.dot(tl.trans(u), d_hidden.to(COMPUTE), dw1, input_precision=PRECISION)
        db2 += tl.sum(grad.to(tl.float32), 0)
        db1 += tl.sum(d_hidden, 0)

    weight = mask_k[:, None] & mask_r[None, :]
    tl.store(dw1_ptr + split * R * K + offs_r[None, :] * K + offs_k[:, None], dw1, weight)
    tl.store(dw2_ptr + split * R * K + offs_k[:, None] * R + offs_r[None, :], patch_weight * dw2, weight)
    tl.store(db2_ptr + split * K + offs_k, patch_weight * db2, mask_k)
    if tl.program_id(0) == 0:
        tl.store(db1_ptr + split * R + offs_r, db1, mask_r)


def launch_config(kind: str, K: int, R: int, dtype: torch.dtype, arch: int | str) -> dict[str, int]:
    """Tiles, warps and stages of kernel ``kind`` ("fwd", "bwd" or "bwd_weight").

    Args:
        dtype: of the operands of the matrix products.

    Raises:
        ValueError: for R outside of 1 to 128.
    """
    if not covers(R):
        raise ValueError(f"superpose: the hidden width must be 1 to 128, got {R}")
    BLOCK_R = max(16, triton.next_power_of_2(R))
    wide = dtype == torch.float32
    config = {"KEEP": not wide and K <= 1024 and R <= 32} if kind == "fwd" else {}
    if config.get("KEEP"):  # 32 x 768 pixels take 48 registers of a thread
        BLOCK_M, BLOCK_K, num_warps = 32, 64, 8
    elif kind == "bwd_weight":  # a wide BLOCK_K, since each block of K reads the hidden activations
        BLOCK_M, BLOCK_K, num_warps = 64 if arch == 90 and not wide else 32, 64 if wide else 128, 8
    else:
        BLOCK_M, BLOCK_K, num_warps = 32 if wide and R > 16 else 64, 32 if wide else 64, 4
    if BLOCK_R > 32:  # registers allow a smaller tile then
        BLOCK_K = max(2048 // BLOCK_R, 16)
    num_stages = 2 if wide and arch == 100 else 3  # triton 3.6 would spill
    if arch == "gfx942":  # 64 lanes in a warp, 64 KB of shared memory
        num_warps, num_stages = num_warps // 2, 2
    sizes = {"BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K, "BLOCK_R": BLOCK_R}
    return config | sizes | chip.launch_options(num_warps, num_stages)


def weight_splits(M: int, K: int, config: dict[str, int], arch: int | str) -> int:
    """The number S of splits in the weight kernel: two programs per multiprocessor, none of them without work."""
    return min(
        triton.cdiv(M, config["BLOCK_M"]), max(1, 2 * chip.MULTIPROCESSORS[arch] // triton.cdiv(K, config["BLOCK_K"]))
    )


def constants(kind: str, shape: tuple, P: int, R: int, dtypes: tuple, arch: int | str) -> dict:
    """The compile-time constants and launch options of kernel ``kind``, without the strides of its operands.

    Args:
        shape: of the image, [B, C, H, W].
        dtypes: of the image and the tokens.
    """
    _, C, H, W = shape
    compute = torch.promote_types(*(torch.float32 if dtype == torch.uint8 else dtype for dtype in dtypes))
    config = launch_config(kind, C * P * P, R, compute, arch)
    fixed = {"K": C * P * P, "P": P, "R": R, "GRID": (H // P, W // P)}
    return fixed | chip.operands(compute, arch) | config


def covers(R: int) -> bool:
    """Whether the kernels compute a patch prompter of this hidden width."""
    return 1 <= R <= 128


def _dense(x: Tensor) -> Tensor:
    """The tensor if it is contiguous or channels_last, else a copy.

    So few variants are compiled, and offsets within an image fit int32.
    """
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _bytes(kept: Tensor | None) -> Tensor | None:
    return None if kept is None else kept.contiguous().view(torch.uint8)


def superpose_fwd(
    image: Tensor, global_prompt: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    patch_size: int, global_weight: float, patch_weight: float, dtype: torch.dtype,
    scale: Tensor | None = None, shift: Tensor | None = None, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Superpose the patch prompt and the global prompt on an image, unfolded (equations 5 to 7 of InsVP, MM 2024).

    With u = unfold(image), hidden = relu(u w1^T + b1) and
    tokens = u + global_weight unfold(global_prompt) + patch_weight (hidden w2^T + b2) unfold(kept).

    Args:
        image, global_prompt: [B, C, H, W] in fp32, fp16 or bf16; the image also in uint8.
        w1, b1, w2, b2: [R, K], [R], [K, R] and [K].
        dtype: of the tokens.
        scale, shift: [C] in fp32, for a uint8 image, which stands for image · scale + shift.
        kept: [B, C, H, W] in bool, dropout's mask of the patch prompt; all ones if not given.

    Returns:
        tokens: [B, N, K] in ``dtype``.
        hidden: [B, N, R] in fp32.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
        ValueError: for R outside of 1 to 128.
    """
    arch = chip.require_arch("superpose", image)
    (B, C, H, W), P, (R, K) = image.shape, patch_size, w1.shape
    image = _dense(image)
    scale, shift = (None if x is None else x.contiguous() for x in (scale, shift))
    prompt = image if global_prompt is None else _dense(global_prompt)
    const = constants("fwd", image.shape, P, R, (image.dtype, dtype), arch)
    N = (H // P) * (W // P)
    M = B * N
    tokens = torch.empty((B, N, K), dtype=dtype, device=image.device)
    hidden = torch.empty((B, N, R), dtype=torch.float32, device=image.device)
    weights = (w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous())
    if M:
        with torch.cuda.device_of(image):
            _superpose_fwd_kernel[(triton.cdiv(M, const["BLOCK_M"]),)](
                image, scale, shift, prompt, _bytes(kept), *weights, tokens, hidden, M, global_weight, patch_weight,
                IMAGE=image.stride(), GLOBAL=prompt.stride(), HAS_GLOBAL=global_prompt is not None,
                KEPT=(C * H * W, H * W, W, 1), **const,
            )  # fmt: skip
    return tokens, hidden


def superpose_bwd(
    grad: Tensor, image: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor,
    patch_size: int, global_weight: float, patch_weight: float, need_image: bool, need_global: bool,
    scale: Tensor | None = None, shift: Tensor | None = None, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of ``superpose_fwd``, all contiguous.

    Deterministic: without atomics, each split sums a fixed part of the patches and the splits are added in order.

    Args:
        grad: [B, N, K] in the dtype of the tokens; the rest as in forward.
        need_image, need_global: whether to compute d_image and d_global; a uint8 image has no gradient.

    Returns:
        d_image: [B, C, H, W] in the dtype of the image; empty if not needed.
        d_global: [B, C, H, W] in the dtype of ``grad``; empty if not needed.
        dw1, db1, dw2, db2: in the dtype of their weight.

    Raises:
        RuntimeError, ValueError: as forward does.
    """
    arch = chip.require_arch("superpose", grad)
    (_, C, H, W), P, (R, K) = image.shape, patch_size, w1.shape
    image, grad, hidden, kept = _dense(image), grad.contiguous(), hidden.contiguous(), _bytes(kept)
    scale, shift = (None if x is None else x.contiguous() for x in (scale, shift))
    dense = C * H * W, H * W, W, 1
    M, dtypes = hidden.numel() // R, (image.dtype, grad.dtype)
    d_image = torch.empty(image.shape if need_image else 0, dtype=image.dtype, device=grad.device)
    d_global = torch.empty(image.shape if need_global else 0, dtype=grad.dtype, device=grad.device)
    d_hidden = torch.empty((M, R), dtype=torch.float32, device=grad.device)
    rows = constants("bwd", image.shape, P, R, dtypes, arch)
    sums = constants("bwd_weight", image.shape, P, R, dtypes, arch)
    S = weight_splits(M, K, sums, arch)
    partial = [
        torch.empty((S, *size), dtype=torch.float32, device=grad.device) for size in ((R, K), (R,), (K, R), (K,))
    ]
    if M:
        with torch.cuda.device_of(grad):
            _superpose_bwd_kernel[(triton.cdiv(M, rows["BLOCK_M"]),)](
                grad, kept, hidden, w1.contiguous(), w2.contiguous(), d_hidden, d_image, d_global,
                M, global_weight, patch_weight, IMAGE=dense, NEED_IMAGE=need_image, NEED_GLOBAL=need_global, **rows,
            )  # fmt: skip
            _superpose_bwd_weight_kernel[(triton.cdiv(K, sums["BLOCK_K"]), S)](
                grad, kept, image, scale, shift, hidden, d_hidden, *partial, M, patch_weight,
                IMAGE=image.stride(), KEPT=dense, **sums,
            )  # fmt: skip
    weights = zip(partial, (w1, w1, w2, w2), strict=True)
    dw1, db1, dw2, db2 = (part.sum(0).to(like.dtype) for part, like in weights)
    return d_image, d_global, dw1, db1, dw2, db2
