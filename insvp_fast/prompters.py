"""The convolutional prompters with less work for the same function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast import ops, reference
from insvp_fast.coverage import rules
from insvp_fast.ops.conv import conv_reference

__all__ = ["GlobalPrompter", "PatchPrompter", "SpecificPrompter"]


class GlobalPrompter(rules.Planned, reference.GlobalPrompter):
    """G_g with the convolutions of this package where they are faster."""

    def forward(self, image: Tensor) -> Tensor:
        dtype = _result_dtype(image, self.dropout, self.conv1, self.conv2) if rules.covers(self) else None
        if dtype is None:
            return super().forward(image)
        (w1, b1), (w2, b2), (H, W) = _weights(self.conv1), _weights(self.conv2), image.shape[-2:]
        with torch.autocast("cpu", enabled=False):  # the operations choose their own precision
            x = ops.conv(image, w1, b1, self.conv1.dilation[0], H, W, relu=True, dtype=dtype)
            x = ops.conv(x, w2, b2, self.conv2.dilation[0], H, W)
        return self.dropout(x)


class PatchPrompter(rules.Planned, reference.PatchPrompter):
    """G_l, which the fast plan computes by ``ops.superpose``."""


class SpecificPrompter(rules.Planned, reference.SpecificPrompter):
    """G_s without the work that is thrown away: only what pooling reads is convolved, and LeakyReLU runs after pooling.

    LeakyReLU is increasing, so it commutes with the maximum; behind it the map is 16 times smaller.
    """

    def forward(self, image: Tensor) -> Tensor:
        if not rules.covers(self) or not rules.dtypes_fit(image, *self.parameters()):
            return super().forward(image)
        B, L, D = image.shape[0], self.conv1.out_channels, self.token_channels * self.grid**2
        size, grid = 3 * self.grid + 4, self.grid
        H, W = (side // size * size or side for side in image.shape[-2:])
        pool = H // size
        convs = self.conv1, self.conv2, self.conv3
        dtype = _result_dtype(image, self.dropout, *convs)
        if dtype is None or not 1 <= pool <= 16 or W // size != pool:  # other windows overlap, or are not square
            x = reference.pool_centre(_conv(self.conv1, image, H, W), size)
            x = _conv(self.conv2, self.dropout(F.leaky_relu(x)), 3 * grid, 3 * grid)
            return self.conv3(self.dropout(F.leaky_relu(F.max_pool2d(x, 3)))).reshape(B, L, D)
        (w1, b1), (w2, b2), (w3, b3) = map(_weights, convs)
        with torch.autocast("cpu", enabled=False):  # the operations choose their own precision
            # the maps between are small, and rounding them would change which of two neighbours is the largest
            x = self.dropout(ops.conv_pool(image, w1, b1, H, W, pool, dtype=torch.float32))
            x = self.dropout(ops.conv_pool(x, w2, b2, 3 * grid, 3 * grid, 3))
            return ops.conv(x, w3, b3, 1, grid, grid, dtype=dtype).reshape(B, L, D)


def _result_dtype(image: Tensor, dropout: nn.Dropout, *convs: nn.Conv2d) -> torch.dtype | None:
    """The dtype that PyTorch's convolutions give here, or None where they have to run themselves.

    They do on GPUs, where the compiler fuses them, and in fp16 and fp64. Before a dropout, whose mask is drawn in the
    order of memory, they also do where they would keep the image's layout.
    """
    if image.device.type != "cpu" or image.shape[1] != convs[0].weight.shape[1]:
        return None
    if dropout.training and not image.is_contiguous():
        return None
    autocast = torch.is_autocast_enabled("cpu")
    if any(w.dtype != torch.float32 for conv in convs for w in _weights(conv)):
        return None
    if image.dtype not in ((torch.float32, torch.bfloat16) if autocast else (torch.float32,)):
        return None
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    return dtype if dtype in (torch.float32, torch.bfloat16) else None


def _weights(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight, conv.bias


def _conv(conv: nn.Conv2d, x: Tensor, height: int, width: int) -> Tensor:
    return conv_reference(x, *_weights(conv), 1, height, width, relu=False)
