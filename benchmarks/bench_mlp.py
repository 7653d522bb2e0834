"""mlp: the MLP of a ViT-B block with its frozen weights, which autocast casts at every use."""

import torch
import torch.nn.functional as F

from benchmarks.operations import DTYPES, Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.testing import DEVICE

D, HIDDEN = 768, 3072


def plain(x, *weights):
    w1, b1, w2, b2 = (w.to(x.dtype) for w in weights)
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def fast(x, w1, b1, w2, b2):
    return ops.mlp(x, ops.FrozenLinear(w1, b1), ops.FrozenLinear(w2, b2))


def operation(M, itemsize):
    shapes = (HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)
    weights = [torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5 for shape in shapes]
    flops = 4 * M * D * HIDDEN
    hidden = M * HIDDEN * itemsize  # written and read forward; backward reads it, and writes and reads its gradient
    return Operation(
        name=f"mlp {M}x{D}x{HIDDEN}",
        plain=plain,
        fast=fast,
        make=lambda dtype: [torch.randn(M, D, device=DEVICE).to(dtype).requires_grad_(), *weights],
        flops=(flops, 2 * flops),
        nbytes=(2 * hidden, 5 * hidden),
    )


@each_case
def bench_mlp(benchmark, tiny, implementation, direction, precision):
    M = 7 if tiny else (2 if DEVICE.type == "cpu" else 256) * 197
    time_operation(benchmark, operation(M, DTYPES[precision].itemsize), implementation, direction, precision)
