"""The activations of an MLP, forward and backward, their derivative optionally kept in 8 bits: Triton kernels.

They are x P(x) with a distribution function P: in GELU in its exact (erf) form that of the normal distribution, Φ, in
its approximation by tanh, in quick GELU and in SiLU sigmoid(a x + b x³).

Only one tail of Φ is computed, Φ(-a) = 2^p(a) with a = |x| and a polynomial p of degree 10. It is fitted to log2 Φ(-a),
and beyond the range of the fit it decreases without bound. This takes fewer instructions than libdevice's erf, with
which the kernel would be limited by computation and not by memory. In fp32 the absolute error is at most 4e-8, half a
unit in the last place of 1, and the relative error at most 1e-5 down to x = -6, where 1 + erf has lost all its digits.

Arithmetic: fp32 from load to store.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor

# The derivative d is kept in 8 bits as round(STEPS d) + ZERO. This covers its range, -0.1290 to 1.1290, and is exact
# for 0 and 1. No number has the code 255, which stands for NaN.
STEPS: tl.constexpr = tl.constexpr(201)
ZERO: tl.constexpr = tl.constexpr(27)
NAN: tl.constexpr = tl.constexpr(255)


@triton.jit
def _tail(a):
    """Φ(-a) for a >= 0."""
    p = tl.fma(a, -2.03848425e-08, 6.56625861e-07)
    p = tl.fma(a, p, -8.96881494e-06)
    p = tl.fma(a, p, 6.58635057e-05)
    p = tl.fma(a, p, -0.00024685279)
    p = tl.fma(a, p, -6.07881422e-05)
    p = tl.fma(a, p, 0.0070131673)
    p = tl.fma(a, p, -0.0524813965)
    p = tl.fma(a, p, -0.459208907)
    p = tl.fma(a, p, -1.15110551)
    p = tl.fma(a, p, -0.999999979)
    return tl.exp2(p)


@triton.jit
def _sigmoid(x, ACTIVATION: tl.constexpr):
    """sigmoid(u) for u = a x + b x³, its derivative by u without cancellation, and the derivative of u by x."""
    if ACTIVATION == "gelu_tanh":  # the argument of tanh doubled, as 1 + tanh(t) = 2 sigmoid(2 t)
        u = x * tl.fma(x * x, 0.07135481627, 1.595769122)
        du = tl.fma(x * x, 0.2140644488, 1.595769122)
    elif ACTIVATION == "quick_gelu":
        u, du = 1.702 * x, 1.702
    else:
        u, du = x, 1.0
    e = tl.exp2(-1.4426950408889634 * tl.abs(u))
    high = 1.0 / (1.0 + e)
    low = e * high
    return tl.where(u < 0, low, high), low * high, du


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        tail = _tail(tl.abs(x))
        return x * tl.where(x > 0, 1.0 - tail, tail)
    else:
        s, _, _ = _sigmoid(x, ACTIVATION)
        return x * s


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """P(x) + x P'(x); of GELU computed at -|x| and mirrored."""
    if ACTIVATION == "gelu":
        a = tl.abs(x)
        bell = tl.exp2(tl.fma(x * x, -0.7213475204444817, -1.3257480647361593))  # log2 of exp(-x²/2) / √2π
        tail = tl.fma(-a, bell, _tail(a))
        return tl.where(x > 0, 1.0 - tail, tail)
    else:
        s, ds, du = _sigmoid(x, ACTIVATION)
        return tl.fma(x, ds * du, s)


@triton.jit
def _activation_fwd_kernel(pre_ptr, hidden_ptr, code_ptr, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """``code_ptr`` may be None."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre_ptr + offs, offs < N, 0.0).to(tl.float32)
    tl.store(hidden_ptr + offs, activate(x, ACTIVATION).to(hidden_ptr.dtype.element_ty), offs < N)
    if code_ptr is not None:
        d = derivative(x, ACTIVATION)
        tl.store(code_ptr + offs, tl.where(d == d, d * STEPS + (ZERO + 0.5), NAN).to(tl.uint8), offs < N)


@triton.jit
def _activation_bwd_kernel(grad_ptr, kept_ptr, out_ptr, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """``kept_ptr`` has the pre-activation, or as uint8 the derivative in 8 bits."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + offs, offs < N, 0.0).to(tl.float32)
    kept = tl.load(kept_ptr + offs, offs < N, 0.0).to(tl.float32)
    if kept_ptr.dtype.element_ty == tl.uint8:
        d = tl.where(kept == NAN, float("nan"), (kept - ZERO) * (1 / STEPS))
    else:
        d = derivative(kept, ACTIVATION)
    tl.store(out_ptr + offs, (grad * d).to(out_ptr.dtype.element_ty), offs < N)


LAUNCH = {"BLOCK": 2048, **chip.launch_options(4, 1)}  # 16 values per thread: at least two 16-byte loads in flight


def activation_fwd(pre: Tensor, activation: str) -> Tensor:
    """The activation of a tensor of any shape in fp32, fp16 or bf16; the result is contiguous.

    Args:
        activation: "gelu", "gelu_tanh", "quick_gelu" or "silu".

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
    """
    return _forward(pre, None, activation)


def activation_fwd_code(pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``activation_fwd``, and the derivative in 8 bits, as uint8 in the shape of ``pre``."""
    code = torch.empty(pre.shape, dtype=torch.uint8, device=pre.device)
    return _forward(pre, code, activation), code


def activation_bwd(grad: Tensor, pre: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """``grad`` times the derivative at ``pre``, in the dtype of ``pre``.

    Args:
        activation: as in ``activation_fwd``.
        out: where the result goes; it may be ``grad`` itself.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
        ValueError: for an ``out`` of another shape, dtype or layout.
    """
    return _backward(grad, pre, pre.dtype, activation, out)


def activation_bwd_code(grad: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad`` times the derivative in 8 bits, in the dtype of ``grad``; otherwise as ``activation_bwd``."""
    return _backward(grad, code, grad.dtype, "gelu", out)  # the code says all of the activation


def _forward(pre: Tensor, code: Tensor | None, activation: str) -> Tensor:
    chip.require_arch("activation", pre)
    pre = pre.contiguous()
    hidden = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    if N := pre.numel():
        with torch.cuda.device_of(pre):
            grid = (triton.cdiv(N, LAUNCH["BLOCK"]),)
            _activation_fwd_kernel[grid](pre, hidden, code, N, ACTIVATION=activation, **LAUNCH)
    return hidden


def _backward(grad: Tensor, kept: Tensor, dtype: torch.dtype, activation: str, out: Tensor | None) -> Tensor:
    chip.require_arch("activation", grad)
    if out is None:
        out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    elif out.shape != grad.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}: expected contiguous {dtype} {tuple(grad.shape)}")
    if N := grad.numel():
        with torch.cuda.device_of(grad):
            grid = (triton.cdiv(N, LAUNCH["BLOCK"]),)
            operands = grad.contiguous(), kept.contiguous(), out, N
            _activation_bwd_kernel[grid](*operands, ACTIVATION=activation, **LAUNCH)
    return out
