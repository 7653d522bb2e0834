"""gelu: the activation of the MLP by itself, as GPUs run it between two products."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.operations import DTYPES, Operation, each_case, time_operation
from insvp_fast.testing import DEVICE

HIDDEN = 3072


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre):
        from insvp_fast.kernels.gpu import activation as kernel

        ctx.save_for_backward(pre)
        return kernel.activation_fwd(pre, "gelu")

    @staticmethod
    def backward(ctx, grad):
        from insvp_fast.kernels.gpu import activation as kernel

        return kernel.activation_bwd(grad, *ctx.saved_tensors, "gelu")


def operation(M, itemsize):
    size = M * HIDDEN * itemsize
    return Operation(
        name=f"gelu {M}x{HIDDEN}",
        plain=F.gelu,
        fast=Gelu.apply if DEVICE.type == "cuda" else F.gelu,  # on CPUs it is a part of the product
        make=lambda dtype: [torch.randn(M, HIDDEN, device=DEVICE).to(dtype).requires_grad_()],
        nbytes=(2 * size, 5 * size),
        matmul=False,
    )


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on CPUs it is a part of the product")
@each_case
def bench_gelu(benchmark, tiny, implementation, direction, precision):
    M = 7 if tiny else 256 * 197
    time_operation(benchmark, operation(M, DTYPES[precision].itemsize), implementation, direction, precision)
