"""conv and conv_pool: the convolutions of the paper's prompters for images of 224x224."""

from typing import NamedTuple

import pytest
import torch

from benchmarks.operations import Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.ops.conv import conv_reference
from insvp_fast.ops.conv_pool import conv_pool_reference
from insvp_fast.testing import DEVICE

SLOPE = 0.01  # of LeakyReLU
# The reference itself is off by up to 1e-3 in fp32: PyTorch's sum of 400,000 gradients for a bias.
TOLERANCE = 4e-3


class Shape(NamedTuple):
    """C channels of side x side pixels to O channels of size x size, the center of the map; max-pooled by ``pool``."""

    C: int
    side: int
    O: int  # noqa: E741
    kernel: int
    size: int
    dilation: int = 1
    relu: bool = False
    pool: int = 1

    def make_operands(self, batch, dtype):
        reads_image = self.C == 3  # whose gradient nobody asks for
        x = torch.randn(batch, self.C, self.side, self.side, device=DEVICE).to(dtype).requires_grad_(not reads_image)
        weight = torch.randn(self.O, self.C, self.kernel, self.kernel, device=DEVICE)
        weight /= weight[0].numel() ** 0.5
        return x, weight.requires_grad_(), torch.randn(self.O, device=DEVICE, requires_grad=True)

    def flops(self, batch):
        """Backward follows the largest pixel of each pooling window only."""
        forward = 2 * batch * self.O * self.C * (self.kernel * self.size) ** 2
        return forward, forward + (1 if self.C == 3 else 2) * forward / self.pool**2


CONVS = {
    "global 1": Shape(3, 224, 6, kernel=3, size=224, dilation=5, relu=True),
    "global 2": Shape(6, 224, 3, kernel=3, size=224, dilation=12),
    "specific 3": Shape(27, 16, 27, kernel=3, size=16),
}
DENSE = {  # of the release
    "global 1": Shape(3, 224, 6, kernel=11, size=224, relu=True),
    "global 2": Shape(6, 224, 3, kernel=25, size=224),
}
POOLED = {
    "specific 1": Shape(3, 224, 9, kernel=7, size=208, pool=4),
    "specific 2": Shape(9, 52, 27, kernel=9, size=48, pool=3),
}


def conv(shape, batch):
    geometry = shape.dilation, shape.size, shape.size, shape.relu
    return Operation(
        name=f"conv {batch}x{shape.C}x{shape.side}x{shape.side} to {shape.O}, {shape.kernel}x{shape.kernel}",
        plain=lambda x, weight, bias: conv_reference(x, weight.to(x.dtype), bias.to(x.dtype), *geometry),
        fast=lambda x, weight, bias: ops.conv(x, weight, bias, *geometry),
        make=lambda dtype: shape.make_operands(batch, dtype),
        flops=shape.flops(batch),
        tolerance=TOLERANCE,
    )


def conv_pool(shape, batch):
    geometry = shape.size, shape.size, shape.pool, SLOPE
    return Operation(
        name=f"conv_pool {batch}x{shape.C}x{shape.side}x{shape.side} to {shape.O}, {shape.kernel}x{shape.kernel}",
        plain=lambda x, weight, bias: conv_pool_reference(x, weight.to(x.dtype), bias.to(x.dtype), *geometry)[0],
        fast=lambda x, weight, bias: ops.conv_pool(x, weight, bias, *geometry),
        make=lambda dtype: shape.make_operands(batch, dtype),
        flops=shape.flops(batch),
        tolerance=TOLERANCE,
    )


def batch_size(tiny):
    return 1 if tiny else 8 if DEVICE.type == "cpu" else 256


@each_case
@pytest.mark.parametrize("layer", CONVS)
def bench_conv(benchmark, tiny, layer, implementation, direction, precision):
    time_operation(benchmark, conv(CONVS[layer], batch_size(tiny)), implementation, direction, precision)


@each_case
@pytest.mark.parametrize("layer", POOLED)
def bench_conv_pool(benchmark, tiny, layer, implementation, direction, precision):
    time_operation(benchmark, conv_pool(POOLED[layer], batch_size(tiny)), implementation, direction, precision)
