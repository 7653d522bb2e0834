"""The MLP of a ViT-B block and its activation, with frozen weights."""

import torch
import torch.nn.functional as F

from benchmarks.measure import CASES, DEVICE, time_operation
from insvp_fast import ops, reference

D, HIDDEN = 768, 3072


@CASES
def bench_gelu(benchmark, tiny, implementation, direction, precision):
    M = 7 if tiny else (8 if DEVICE.type == "cpu" else 256) * 197
    # forward: in and out; backward: gradient and input in, gradient out
    time_operation(
        benchmark,
        implementation,
        direction,
        precision,
        name=f"gelu {M}x{HIDDEN}",
        plain=reference.gelu,
        fast=ops.gelu,
        make=lambda dtype: [torch.randn(M, HIDDEN, device=DEVICE).to(dtype).requires_grad_()],
        nbytes=M * HIDDEN * (2 if direction == "forward" else 5) * (4 if precision == "fp32" else 2),
        products=False,
    )


@CASES
def bench_mlp(benchmark, tiny, implementation, direction, precision):
    M = 7 if tiny else (2 if DEVICE.type == "cpu" else 256) * 197
    shapes = (HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)
    weights = [torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5 for shape in shapes]

    def plain(x, *weights):  # the weights as autocast would have them
        w1, b1, w2, b2 = (w.to(x.dtype) for w in weights)
        return F.linear(reference.gelu(F.linear(x, w1, b1)), w2, b2)

    def composed(x, w1, b1, w2, b2):
        return ops.linear(ops.gelu(ops.linear(x, w1, b1)), w2, b2)

    time_operation(
        benchmark,
        implementation,
        direction,
        precision,
        name=f"mlp {M}x{D}x{HIDDEN}",
        plain=plain,
        fast=ops.mlp if "mlp" in ops.__all__ else composed,
        make=lambda dtype: [torch.randn(M, D, device=DEVICE).to(dtype).requires_grad_(), *weights],
        flops=(1 if direction == "forward" else 2) * 4 * M * D * HIDDEN,
    )
