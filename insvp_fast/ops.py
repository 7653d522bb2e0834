"""The operations: one contract each, carried out by whatever is fastest where the tensors are.

Every operation but ``linear``, which is PyTorch's, is the function of the same name in ``reference.py``. Where an
operation has kernels, its schema is registered with PyTorch and PyTorch's dispatcher is the device table: the
reference formula for every device, the native library over it for CPU, Triton over it for CUDA and ROCm. Gradients are
first-order only.

Letters as in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library, register_fake

from insvp_fast import cpu, frozen, native, reference

__all__ = ["attention", "gelu", "linear", "norm_insert", "superpose"]

_LIBRARY = Library("insvp_fast", "DEF")


def _define(schema: str) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


# ------------------------------------------------------------------------------------------------------------ superpose

_define(
    "superpose_fwd(Tensor image, Tensor? global_prompt, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int patch_size, "
    "float global_weight, float patch_weight, ScalarType dtype) -> (Tensor, Tensor)"
)
_define(
    "superpose_bwd(Tensor grad, Tensor image, Tensor hidden, Tensor w1, Tensor w2, int patch_size, "
    "float global_weight, float patch_weight, bool need_image, bool need_global) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def superpose(
    image: Tensor,
    global_prompt: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    patch_size: int,
    global_weight: float,
    patch_weight: float,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The prompted image x + w_g·p_g + w_l·G_l(x), unfolded into patches, in one pass (eq. 5, 6 and 7).

    Args:
        image, global_prompt: [B, C, H, W], fp32, bf16 or fp16; no global prompt, no such term.
        w1, b1, w2, b2: the patch prompter, [R, K], [R], [K, R], [K].
        dtype: of the result; the image's if not given. Arithmetic is fp32.
        impl: "auto" lets the device decide; "reference", "native" or "triton" insists.

    Returns:
        [B, N, K]

    Raises:
        ValueError: for shapes that do not fit, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    _, C, H, W = image.shape
    K = C * patch_size**2
    if H % patch_size or W % patch_size:
        raise ValueError(f"image of {H}x{W} pixels: expected multiples of the patch side {patch_size}")
    if global_prompt is not None and global_prompt.shape != image.shape:
        raise ValueError(
            f"global_prompt has shape {tuple(global_prompt.shape)}: expected that of the image, {tuple(image.shape)}"
        )
    R = w1.shape[0]
    for name, weight, shape in (("w1", w1, (R, K)), ("b1", b1, (R,)), ("w2", w2, (K, R)), ("b2", b2, (K,))):
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}: expected {shape}")
    if impl not in _SUPERPOSE:
        raise ValueError(f"impl={impl!r}: expected one of {sorted(_SUPERPOSE)}")
    blend = patch_size, float(global_weight), float(patch_weight)
    return _Superpose.apply(image, global_prompt, w1, b1, w2, b2, *blend, dtype or image.dtype, impl)


class _Superpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype, impl):
        forward = _SUPERPOSE[impl][0]
        tokens, hidden = forward(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype)
        ctx.save_for_backward(image, hidden, w1, w2)
        ctx.blend = patch_size, global_weight, patch_weight
        ctx.impl = impl
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        backward = _SUPERPOSE[ctx.impl][1]
        need_image, need_global = ctx.needs_input_grad[:2]
        grads = backward(grad, *ctx.saved_tensors, *ctx.blend, need_image, need_global)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 5


def _superpose_fwd_reference(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype):
    wide = _widened(image.dtype)
    x = image.to(wide)
    p_g = None if global_prompt is None else global_prompt.to(wide)
    w1, b1, w2, b2 = (w.to(wide) for w in (w1, b1, w2, b2))
    hidden = torch.nn.functional.linear(reference.unfold(x, patch_size), w1, b1).relu()
    tokens = reference.superpose(x, p_g, w1, b1, w2, b2, patch_size, global_weight, patch_weight)
    return tokens.to(dtype), hidden


def _superpose_bwd_reference(
    grad, image, hidden, w1, w2, patch_size, global_weight, patch_weight, need_image, need_global
):
    wide = _widened(image.dtype)
    g, x, hidden, v1, v2 = (t.to(wide) for t in (grad, image, hidden, w1, w2))
    d_image, d_global, *d_weights = reference.superpose_bwd(
        g, x, hidden, v1, v2, patch_size, global_weight, patch_weight
    )
    d_image = d_image.to(image.dtype) if need_image else image.new_empty(0)
    d_global = d_global.to(grad.dtype) if need_global else grad.new_empty(0)
    return d_image, d_global, *(d.to(w.dtype) for d, w in zip(d_weights, (w1, w1, w2, w2), strict=True))


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _superpose_fwd_cpu(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype):
    p_g_dtype = image.dtype if global_prompt is None else global_prompt.dtype
    weights_fit = all(w.dtype == torch.float32 for w in (w1, b1, w2, b2))
    covered = weights_fit and native.available(image.dtype, p_g_dtype, dtype)
    run = native.superpose_fwd if covered else _superpose_fwd_reference
    return run(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype)


def _superpose_bwd_cpu(grad, image, hidden, w1, w2, *rest):
    covered = w1.dtype == w2.dtype == torch.float32 and native.available(grad.dtype, image.dtype)
    run: Callable[..., Any] = native.superpose_bwd if covered else _superpose_bwd_reference
    return run(grad, image, hidden, w1, w2, *rest)


def _superpose_fwd_cuda(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype):
    run = _superpose_fwd_triton if _triton_covers(image, global_prompt, w1, w2, dtype) else _superpose_fwd_reference
    return run(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype)


def _superpose_bwd_cuda(grad, image, hidden, w1, w2, *rest):
    run = _superpose_bwd_triton if _triton_covers(image, None, w1, w2, grad.dtype) else _superpose_bwd_reference
    return run(grad, image, hidden, w1, w2, *rest)


def _triton_covers(image, global_prompt, w1, w2, dtype):
    from insvp_fast.kernels.gpu import superpose as kernel

    tensors = [t for t in (image, global_prompt, w1, w2) if t is not None]
    return kernel.covers(image.device, w1.shape[0], *(t.dtype for t in tensors), dtype)


def _superpose_fwd_triton(*args):
    from insvp_fast.kernels.gpu import superpose as kernel

    return kernel.superpose_fwd(*args)


def _superpose_bwd_triton(*args):
    from insvp_fast.kernels.gpu import superpose as kernel

    return kernel.superpose_bwd(*args)


@register_fake("insvp_fast::superpose_fwd", lib=_LIBRARY)
def _(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype):
    B, _, H, W = image.shape
    N = (H // patch_size) * (W // patch_size)
    hidden = image.new_empty(B, N, w1.shape[0], dtype=_widened(image.dtype))
    return image.new_empty(B, N, w1.shape[1], dtype=dtype), hidden


@register_fake("insvp_fast::superpose_bwd", lib=_LIBRARY)
def _(grad, image, hidden, w1, w2, patch_size, global_weight, patch_weight, need_image, need_global):
    R, K = w1.shape
    d_image = image.new_empty(image.shape if need_image else 0)
    d_global = grad.new_empty(image.shape if need_global else 0)
    return d_image, d_global, w1.new_empty(R, K), w1.new_empty(R), w2.new_empty(K, R), w2.new_empty(K)


_LIBRARY.impl("superpose_fwd", _superpose_fwd_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("superpose_bwd", _superpose_bwd_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("superpose_fwd", _superpose_fwd_cpu, "CPU")
_LIBRARY.impl("superpose_bwd", _superpose_bwd_cpu, "CPU")
_LIBRARY.impl("superpose_fwd", _superpose_fwd_cuda, "CUDA")
_LIBRARY.impl("superpose_bwd", _superpose_bwd_cuda, "CUDA")

_SUPERPOSE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "auto": (torch.ops.insvp_fast.superpose_fwd.default, torch.ops.insvp_fast.superpose_bwd.default),
    "reference": (_superpose_fwd_reference, _superpose_bwd_reference),
    "native": (native.superpose_fwd, native.superpose_bwd),
    "triton": (_superpose_fwd_triton, _superpose_bwd_triton),
}

# --------------------------------------------------------------------------------------------------------------- linear

_define("linear(Tensor x, Tensor weight, Tensor? bias, int first, int last) -> Tensor")
_define("linear_bwd(Tensor grad, Tensor weight, int first, int last) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[int, int] | None = None) -> Tensor:
    """x @ weight.T + bias with a frozen weight: no gradient for it, nothing of x kept, packed once (``frozen.py``).

    Args:
        x: [..., D_in]; its dtype is that of the product and of the result.
        weight, bias: [D_out, D_in] and [D_out] or None, in any floating dtype; they must not require a gradient.
            A weight of more dimensions, a convolution's, is flattened to two.
        rows: use only the outputs from the first to before the last of these two.

    Raises:
        ValueError: if the weight requires a gradient, which would be lost.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "ops.linear is for frozen weights: expected requires_grad=False, use torch.nn.functional.linear"
        )
    first, last = rows or (0, weight.shape[0])
    return _Linear.apply(x, weight, bias, first, last)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, first, last):
        ctx.save_for_backward(weight)
        ctx.rows = first, last
        return torch.ops.insvp_fast.linear.default(x, weight, bias, first, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        (weight,) = ctx.saved_tensors
        return torch.ops.insvp_fast.linear_bwd.default(grad, weight, *ctx.rows), None, None, None, None


@register_fake("insvp_fast::linear", lib=_LIBRARY)
def _(x, weight, bias, first, last):
    return x.new_empty(*x.shape[:-1], last - first)


@register_fake("insvp_fast::linear_bwd", lib=_LIBRARY)
def _(grad, weight, first, last):
    return grad.new_empty(*grad.shape[:-1], weight[0].numel())


_LIBRARY.impl("linear", frozen.linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_bwd", frozen.linear_bwd, "CompositeExplicitAutograd")

# ---------------------------------------------------------------------------------------------------------- norm_insert


def norm_insert(
    residual: Tensor,
    branch: Tensor | None,
    prompts: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition, then LayerNorm of tokens and prompts, placed in one buffer for the QKV product.

    Args:
        residual: [B, T, D], the stream; statistics are taken in at least fp32.
        branch: [B, T, D], what the preceding half-block adds to it, or None.
        prompts: [B, L, D], or None.
        weight, bias, eps: of the frozen LayerNorm.
        dtype: of the normalised buffer, the next product's; the residual's if not given.

    Returns:
        The new residual [B, T, D], and the normalised tokens and prompts [B, T+L, D]. The residual is a view of the
        one buffer that is kept for backward.
    """
    dtype = dtype or residual.dtype
    # Inductor fuses the formula and writes the parts of its cat in place; torch 2.11 would lose a gradient of
    # _NormInsert, whose outputs include a view
    if torch.compiler.is_compiling():
        total, normed = reference.norm_insert(residual, branch, prompts, weight, bias, eps)
        return total.to(residual.dtype), normed.to(dtype)
    return _NormInsert.apply(residual, branch, prompts, weight, bias, eps, dtype)


class _NormInsert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual, branch, prompts, weight, bias, eps, dtype):
        tokens = _place(residual, branch, prompts)
        normed, mean, rstd = torch.native_layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(tokens, mean, rstd, weight, bias)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.has_prompts = prompts is not None
        return tokens[:, : residual.shape[1]], normed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual, grad_normed):
        tokens, mean, rstd, weight, bias = ctx.saved_tensors
        T, grad_normed = grad_residual.shape[1], grad_normed.to(tokens.dtype)
        d_tokens, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, tokens, tokens.shape[-1:], mean, rstd, weight, bias, (True, False, False)
        )
        d_residual = d_tokens[:, :T].add_(grad_residual)
        d_branch = None if ctx.branch_dtype is None else d_residual.to(ctx.branch_dtype)
        return d_residual, d_branch, d_tokens[:, T:] if ctx.has_prompts else None, None, None, None, None


def _place(residual: Tensor, branch: Tensor | None, prompts: Tensor | None) -> Tensor:
    """The sum and, behind it, the prompts, in one new buffer [B, T+L, D]."""
    (B, T, D), L = residual.shape, 0 if prompts is None else prompts.shape[1]
    tokens = residual.new_empty(B, T + L, D)
    if branch is None:
        tokens[:, :T] = residual
    else:
        torch.add(residual, branch, out=tokens[:, :T])
    if prompts is not None:
        tokens[:, T:] = prompts
    return tokens


# ------------------------------------------------------------------------------------------------------------ attention


_define("attention_fwd(Tensor qkv, int num_heads, int num_queries, float scale) -> (Tensor, Tensor)")
_define(
    "attention_bwd(Tensor grad, Tensor qkv, Tensor? out, Tensor logsumexp, int num_heads, int num_queries, "
    "float scale) -> Tensor"
)


def attention(qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> Tensor:
    """Softmax attention of the first ``num_queries`` tokens to all S, from the packed product.

    Args:
        qkv: [B, S, 3·D], heads folded into D.
        scale: of the scores before the softmax.

    Returns:
        [B, num_queries, D]. Kept for backward: ``qkv`` and what the implementation needs of the softmax.
    """
    if qkv.device.type == "cpu":
        return _Attention.apply(qkv, num_heads, num_queries, scale)
    q, k, v = reference.split_heads(qkv, num_heads)
    return reference.merge_heads(
        torch.nn.functional.scaled_dot_product_attention(q[:, :, :num_queries], k, v, scale=scale)
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, num_heads, num_queries, scale):
        out, logsumexp = torch.ops.insvp_fast.attention_fwd.default(qkv, num_heads, num_queries, scale)
        ctx.save_for_backward(qkv, out if logsumexp.numel() else None, logsumexp)
        ctx.shape = num_heads, num_queries, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        return torch.ops.insvp_fast.attention_bwd.default(grad, *ctx.saved_tensors, *ctx.shape), None, None, None


@register_fake("insvp_fast::attention_fwd", lib=_LIBRARY)
def _(qkv, num_heads, num_queries, scale):
    B, _, D3 = qkv.shape
    softmax = 0 if cpu.explicit_attention(qkv.dtype) else (B, num_queries, num_heads)
    logsumexp = qkv.new_empty(softmax, dtype=_widened(qkv.dtype))
    return qkv.new_empty(B, num_queries, D3 // 3), logsumexp if logsumexp.ndim == 1 else logsumexp.transpose(1, 2)


@register_fake("insvp_fast::attention_bwd", lib=_LIBRARY)
def _(grad, qkv, out, logsumexp, num_heads, num_queries, scale):
    return qkv.new_empty(qkv.shape)


_LIBRARY.impl("attention_fwd", cpu.attention_fwd, "CPU")
_LIBRARY.impl("attention_bwd", cpu.attention_bwd, "CPU")

# ----------------------------------------------------------------------------------------------------------------- gelu


def gelu(x: Tensor) -> Tensor:
    """GELU in its exact (erf) form, any shape and floating dtype; kept for backward: ``x``."""
    return torch.nn.functional.gelu(x)
