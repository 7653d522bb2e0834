"""The MLP of a ViT-B block with its frozen weights, which autocast casts anew at every use."""

import torch
import torch.nn.functional as F

from benchmarks.measure import CASES, DEVICE, time_operation
from insvp_fast import ops

D, HIDDEN = 768, 3072


def plain(x, *weights):
    w1, b1, w2, b2 = (w.to(x.dtype) for w in weights)
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def fast(x, w1, b1, w2, b2):
    return ops.mlp(x, ops.FrozenLinear(w1, b1), ops.FrozenLinear(w2, b2))


def make_weights():
    shapes = (HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)
    return [torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5 for shape in shapes]


@CASES
def bench_mlp(benchmark, tiny, implementation, direction, precision):
    M = 7 if tiny else (2 if DEVICE.type == "cpu" else 256) * 197
    weights = make_weights()
    time_operation(
        benchmark,
        implementation,
        direction,
        precision,
        name=f"mlp {M}x{D}x{HIDDEN}",
        plain=plain,
        fast=fast,
        make=lambda dtype: [torch.randn(M, D, device=DEVICE).to(dtype).requires_grad_(), *weights],
        flops=(1 if direction == "forward" else 2) * 4 * M * D * HIDDEN,
    )
