"""The prompters of the reference, computed faster; and what their fast paths require."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast import coverage, ops, reference
from insvp_fast.coverage import Covered, Requirements, Rule, Table, rule, watch
from insvp_fast.coverage.rules import IDENTITY, convolution
from insvp_fast.ops.conv import conv_reference, conv_triton_reason
from insvp_fast.ops.conv_pool import conv_pool_triton_reason
from insvp_fast.ops.registry import FLOATS

__all__ = ["GlobalPrompter", "PatchPrompter", "PyramidPrompter", "SpecificPrompter", "in_row_order", "make_fast"]

watch("forward __call__", reference.GlobalPrompter, reference.PatchPrompter, reference.SpecificPrompter)
watch("forward __call__", reference.PyramidPrompter, nn.ModuleList)
watch("trunk", reference.SpecificPrompter)
watch("leaky_relu max_pool2d adaptive_max_pool2d pad dropout", F)
watch("relu", torch.Tensor)

DROPOUT = (IDENTITY, rule(nn.Dropout, "p", inplace=False))  # runs, on a tensor that backward needs unchanged


class GlobalPrompter(Covered, reference.GlobalPrompter):
    """G_g with the convolutions of this package where they are faster."""

    def _requirements(self) -> Requirements:
        convolutions = {name: _same_convolution(_dilation(getattr(self, name, None))) for name in ("conv1", "conv2")}
        # any subclass: it is this forward that asks
        return Requirements("global_prompter", self, {"": (rule(type(self)),), **convolutions, "dropout": DROPOUT})

    def forward(self, image: Tensor) -> Tensor:
        covered = coverage.covers(self, coverage.obstacle(image))
        dtype = _result_dtype(image, self.dropout, self.conv1, self.conv2) if covered else None
        H, W = image.shape[-2:]
        cases = ((conv, conv.dilation[0], H, W) for conv in (self.conv1, self.conv2))
        if dtype is None or not _on_cpu_or(conv_triton_reason, image, *cases):
            return super().forward(image)
        (w1, b1), (w2, b2) = _weights(self.conv1), _weights(self.conv2)
        with torch.autocast(image.device.type, enabled=False):  # the operations choose their own precision
            x = ops.conv(image, w1, b1, self.conv1.dilation[0], H, W, relu=True, dtype=dtype, operands=dtype)
            x = ops.conv(x, w2, b2, self.conv2.dilation[0], H, W, operands=dtype)
        return _dropped(self.dropout, x)


class PatchPrompter(Covered, reference.PatchPrompter):
    """G_l, whose fast path is a part of ``ops.superpose`` in ``InsVPViT``; called, it is the reference."""

    replaced_methods = ("forward",)

    def _requirements(self) -> Requirements:
        linear = (rule(nn.Linear, "in_features out_features", required="weight bias"),)
        table = {"": (rule(type(self), "patch_size"),), "fc1": linear, "fc2": linear, "dropout": DROPOUT}
        return Requirements("patch_prompter", self, table)


class SpecificPrompter(Covered, reference.SpecificPrompter):
    """G_s that convolves only what pooling reads, and applies LeakyReLU after pooling.

    LeakyReLU is increasing, so it may be exchanged with the maximum; behind it the map is 16 times smaller.
    """

    replaced_methods = ("trunk",)

    def _requirements(self) -> Requirements:
        convolutions = dict.fromkeys(("conv1", "conv2", "conv3"), _same_convolution(dilation=1))
        table = {"": (rule(type(self), "token_channels grid"),), **convolutions, "dropout": DROPOUT}
        return Requirements("specific_prompter", self, table)

    def forward(self, image: Tensor) -> Any:
        if not coverage.covers(self, coverage.obstacle(image)) or not coverage.dtypes_fit(image, *self.parameters()):
            return super().forward(image)
        dtype = _result_dtype(image, self.dropout, *(m for m in self.modules() if isinstance(m, nn.Conv2d)))
        size, grid = 3 * self.grid + 4, self.grid
        H, W = (side // size * size or side for side in image.shape[-2:])
        pool = H // size
        square = 1 <= pool <= 16 and W // size == pool  # else windows overlap, are large or not square
        if (
            dtype is None
            or not square
            or not _on_cpu_or(conv_pool_triton_reason, image, (self.conv1, pool), (self.conv2, 3))
        ):
            x = reference.pool_center(_conv(self.conv1, image, H, W), size)
            x = _conv(self.conv2, self.dropout(F.leaky_relu(x)), 3 * grid, 3 * grid)
            return self._tokens(self.dropout(F.leaky_relu(F.max_pool2d(x, 3))), None)
        (w1, b1), (w2, b2) = _weights(self.conv1), _weights(self.conv2)
        with torch.autocast(image.device.type, enabled=False):  # the operations choose their own precision
            # in fp32 between them: the maps are small, and the largest of neighbors are near each other
            x = image.to(dtype) if image.is_cuda else image
            x = ops.conv_pool(x, w1, b1, H, W, pool, dtype=torch.float32, operands=dtype)
            x = _dropped(self.dropout, x)
            x = x.to(dtype) if image.is_cuda else x
            x = ops.conv_pool(x, w2, b2, 3 * grid, 3 * grid, 3, dtype=torch.float32, operands=dtype)
            x = _dropped(self.dropout, x)
            if not image.is_cuda:
                return self._tokens(x, dtype)
        return self._tokens(x, None)

    def _tokens(self, x: Tensor, dtype: torch.dtype | None) -> Any:
        """The last convolution, with that of PyTorch where ``dtype``, of the result, is None."""
        return self._convolve(self.conv3, self.token_channels * self.grid**2, x, dtype)

    def _convolve(self, conv: Any, width: int, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        grid = self.grid
        y: Tensor = conv(x) if dtype is None else ops.conv(x, *_weights(conv), 1, grid, grid, dtype=dtype)
        return y.reshape(x.shape[0], self.conv1.out_channels, width)


class PyramidPrompter(SpecificPrompter, reference.PyramidPrompter):
    """G_s of several widths, computed as ``SpecificPrompter``."""

    def _requirements(self) -> Requirements:
        names = ["conv1", "conv2", *(f"conv3.{i}" for i in range(len(self.widths)))]
        table: Table = {"": (rule(type(self), "token_channels grid widths"),), "conv3": (rule(nn.ModuleList),)}
        table |= dict.fromkeys(names, _same_convolution(dilation=1)) | {"dropout": DROPOUT}
        return Requirements("specific_prompter", self, table)

    def _tokens(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        convolutions = zip(self.conv3.children(), self.widths, strict=True)
        return tuple(self._convolve(conv, width, x, dtype) for conv, width in convolutions)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    reference.GlobalPrompter: GlobalPrompter,
    reference.PatchPrompter: PatchPrompter,
    reference.SpecificPrompter: SpecificPrompter,
    reference.PyramidPrompter: PyramidPrompter,
}


def make_fast(prompter: nn.Module) -> None:
    """Turn a prompter of the reference into the one of the same name from this file, in place: only its class changes.

    Raises:
        KeyError: for a module of any other type.
    """
    prompter.__class__ = FAST[type(prompter)]


def _same_convolution(dilation: int) -> tuple[Rule, ...]:
    return (convolution(stride=(1, 1), padding="same", dilation=(dilation, dilation)),)


def _dilation(conv: object) -> int:
    """The vertical dilation of a convolution, which its fast path uses for both axes; 1 for anything else."""
    dilation = getattr(conv, "dilation", None)
    return dilation[0] if isinstance(dilation, tuple) and dilation else 1


def _result_dtype(image: Tensor, dropout: nn.Dropout, *convs: nn.Conv2d) -> torch.dtype | None:
    """The dtype of these convolutions' result, or None where PyTorch's own have to run.

    Those run in fp64, and on CPUs in fp16. They also run before an active dropout if an image or weight is in another
    order of memory than that of its dimensions: the result would be as well, and the mask is drawn in its order.
    """
    device = image.device.type
    if device not in ("cpu", "cuda") or image.shape[1] != convs[0].weight.shape[1]:
        return None
    if dropout.training and not all(map(in_row_order, (image, *(conv.weight for conv in convs)))):
        return None
    if any(w.dtype != torch.float32 for conv in convs for w in _weights(conv)):
        return None
    autocast = torch.is_autocast_enabled(device)
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else FLOATS
    if image.dtype not in (dtypes if autocast else (torch.float32,)):
        return None
    dtype = torch.get_autocast_dtype(device) if autocast else torch.float32
    return dtype if dtype in dtypes else None


def in_row_order(x: Tensor) -> bool:
    """Whether the strides of a tensor are those of a new one of its shape.

    ``is_contiguous`` asks nothing of dimensions of size 1, whose strides tell PyTorch's convolutions the order of
    channels.
    """
    return all(stride == math.prod(x.shape[at + 1 :]) for at, stride in enumerate(x.stride()))


def _dropped(dropout: nn.Module, x: Tensor) -> Tensor:
    """``dropout(x)``, on CPUs with masks drawn by this package; compiled code draws its own."""
    own = x.is_cpu and dropout.training and not torch.compiler.is_compiling()
    if own and isinstance(dropout, nn.Dropout) and 0 < dropout.p < 1:
        return ops.dropout(x, dropout.p)
    dropped: Tensor = dropout(x)
    return dropped


def _on_cpu_or(triton_reason: Callable[..., str | None], image: Tensor, *cases: tuple[Any, ...]) -> bool:
    """Whether the operations beat PyTorch's convolutions: on GPUs only with the kernels of this package.

    A case is a convolution, and what else the kernels are asked about.
    """
    return image.device.type == "cpu" or all(triton_reason(image, conv.weight, *rest) is None for conv, *rest in cases)


def _weights(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight, conv.bias


def _conv(conv: nn.Conv2d, x: Tensor, height: int, width: int) -> Tensor:
    return conv_reference(x, *_weights(conv), 1, height, width, relu=False)
