"""gated_mlp: the SwiGLU MLP of an EVA-02-B block, with its norm; autocast casts the frozen weights at every use."""

import torch
import torch.nn.functional as F

from benchmarks.operations import DTYPES, Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.testing import DEVICE

D, HIDDEN, EPS = 768, 2048, 1e-6


def plain(x, *weights):
    wg, wv, gain, shift, w2 = (w.to(x.dtype) for w in weights)
    hidden = F.silu(F.linear(x, wg)) * F.linear(x, wv)
    return F.linear(F.layer_norm(hidden, (HIDDEN,), gain, shift, EPS), w2)


def fast(x, wg, wv, gain, shift, w2):
    gate, value, fc2 = ops.FrozenLinear(wg), ops.FrozenLinear(wv), ops.FrozenLinear(w2, None, gain, shift)
    return ops.gated_mlp(x, gate, value, fc2, eps=EPS)


def operation(M, itemsize):
    shapes = (HIDDEN, D), (HIDDEN, D), (HIDDEN,), (HIDDEN,), (D, HIDDEN)
    weights = [torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5 for shape in shapes]
    flops = 6 * M * D * HIDDEN
    hidden = M * HIDDEN * itemsize  # of gate, value or normalized; backward also of their gradients
    return Operation(
        name=f"gated_mlp {M}x{D}x{HIDDEN}",
        plain=plain,
        fast=fast,
        make=lambda dtype: [torch.randn(M, D, device=DEVICE).to(dtype).requires_grad_(), *weights],
        flops=(flops, 2 * flops),
        nbytes=(6 * hidden, 12 * hidden),
    )


@each_case
def bench_gated_mlp(benchmark, tiny, implementation, direction, precision):
    M = 7 if tiny else (2 if DEVICE.type == "cpu" else 256) * 197
    time_operation(benchmark, operation(M, DTYPES[precision].itemsize), implementation, direction, precision)
