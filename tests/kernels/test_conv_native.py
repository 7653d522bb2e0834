"""The native convolutions against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, assert_close, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison", "one_thread")]  # an element left unwritten is NaN
SLOPE = 0.01


def center(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def conv_formula(x, weight, bias, dilation: int, height: int, width: int, relu: bool) -> Tensor:
    y = center(F.conv2d(x, weight, bias, padding="same", dilation=dilation), height, width)
    return y.relu() if relu else y


def conv_pool_formula(x, weight, bias, height: int, width: int, pool: int) -> Tensor:
    return F.leaky_relu(F.max_pool2d(conv_formula(x, weight, bias, 1, height, width, False), pool), SLOPE)


def inputs(B: int, C: int, H: int, W: int, out: int, kh: int, kw: int, dtype=F32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(B + 10 * C + 100 * H + W)
    weight = torch.randn(out, C, kh, kw) / (C * kh * kw) ** 0.5
    return torch.randn(B, C, H, W).to(dtype), weight, torch.randn(out)


def expected(formula, tensors, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result and all gradients in float64."""
    leaves = [t.double().requires_grad_() for t in tensors]
    y = formula(*leaves)
    return y.detach(), list(torch.autograd.grad(y, leaves, grad.double()))


# B, C, H, W, channels out, kh, kw, dilation, height, width
CONV_SHAPES = [
    (3, 3, 40, 37, 6, 3, 3, 5, 40, 37),  # the paper's first; rows that are no multiple of a vector
    (1, 6, 33, 48, 3, 3, 3, 12, 33, 48),  # its second: rows shorter than what the kernel reaches
    (1, 3, 30, 45, 6, 11, 11, 1, 30, 45),
    (1, 6, 20, 70, 3, 25, 25, 1, 20, 70),  # most rows of the kernel lie in the padding
    (3, 27, 16, 16, 27, 3, 3, 1, 16, 16),  # vectors across several rows
    (1, 9, 14, 15, 13, 3, 5, 1, 9, 10),  # the center only; blocks of channels of two sizes
    (1, 1, 5, 4, 1, 1, 1, 1, 5, 4),
    (1, 2, 9, 12, 11, 4, 2, 1, 9, 12),  # even kernels, with more padding at the end
    (1, 2, 9, 12, 2, 4, 6, 3, 5, 7),
    (1, 1, 3, 2, 5, 9, 7, 2, 3, 2),  # a map smaller than the kernel
    (2, 5, 130, 224, 4, 5, 5, 1, 121, 219),  # several jobs for each image
    (70, 1, 4, 5, 2, 3, 3, 1, 4, 5),  # more jobs than chunks
    (0, 3, 8, 8, 2, 3, 3, 1, 8, 8),  # no image: gradients of the weights are zero
]


def check_conv(shape: tuple[int, ...], relu: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    *sizes, dilation, height, width = shape
    x, weight, _ = tensors = inputs(*sizes, dtypes[0])
    grad = torch.randn(x.shape[0], weight.shape[0], height, width).to(dtypes[1])

    y = native.conv_fwd(*tensors, dilation, height, width, relu, grad.dtype)
    y64, _ = expected(lambda *t: conv_formula(*t, dilation, height, width, relu), tensors, grad)
    assert y.dtype == grad.dtype
    assert_close("y", y, y64)
    # positive is what forward returned as positive
    masked = grad * (y > 0) if relu else grad
    _, gradients = expected(lambda *t: conv_formula(*t, dilation, height, width, False), tensors, masked)
    got = native.conv_bwd(grad, x, y if relu else None, weight, dilation, height, width, True)
    assert [t.dtype for t in got] == [x.dtype, F32, F32]
    for name, out, want in zip(("x", "weight", "bias"), got, gradients, strict=True):
        assert_close(f"d_{name}", out, want)
    none, *weights = native.conv_bwd(grad, x, y if relu else None, weight, dilation, height, width, False)
    assert none.numel() == 0 and all(torch.equal(a, b) for a, b in zip(weights, got[1:], strict=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_conv_parity_fp32(isa, shape, relu):
    check_conv(shape, relu, (F32, F32))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("shape", [CONV_SHAPES[i] for i in (0, 4, 8, 9)], ids=str)
def test_conv_parity_bf16(isa, shape, dtypes):
    check_conv(shape, True, dtypes)


# B, C, H, W, channels out, kh, kw, height, width, pool
CONV_POOL_SHAPES = [
    (3, 3, 52, 56, 9, 7, 7, 48, 52, 4),
    (1, 9, 20, 23, 27, 9, 9, 18, 21, 3),
    (2, 1, 13, 14, 1, 5, 5, 12, 12, 2),
    (1, 3, 12, 77, 7, 3, 3, 10, 75, 5),
    (1, 2, 16, 15, 3, 4, 6, 14, 14, 7),  # even kernels
    (1, 2, 9, 12, 3, 3, 3, 9, 12, 1),  # windows of one
    (1, 2, 9, 6, 3, 11, 13, 9, 6, 3),  # a map smaller than the kernel
    (1, 16, 12, 12, 16, 1, 1, 6, 6, 3),  # a center far from the border
    (3, 3, 210, 210, 10, 7, 7, 208, 208, 4),  # several jobs for each image
    (70, 1, 6, 6, 2, 3, 3, 6, 6, 3),
    (0, 3, 8, 8, 2, 3, 3, 8, 8, 4),
]


def check_conv_pool(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    *sizes, height, width, pool = shape
    x, weight, _ = tensors = inputs(*sizes, dtypes[0])
    grad = torch.randn(x.shape[0], weight.shape[0], height // pool, width // pool).to(dtypes[1])

    y, indices = native.conv_pool_fwd(*tensors, height, width, pool, SLOPE, grad.dtype)
    y64, gradients = expected(lambda *t: conv_pool_formula(*t, height, width, pool), tensors, grad)
    assert y.dtype == grad.dtype and indices.dtype == torch.uint8
    assert_close("y", y, y64)
    got = native.conv_pool_bwd(grad, x, y, indices, weight, height, width, pool, SLOPE, True)
    assert [t.dtype for t in got] == [x.dtype, F32, F32]
    for name, out, want in zip(("x", "weight", "bias"), got, gradients, strict=True):
        assert_close(f"d_{name}", out, want)
    none, *weights = native.conv_pool_bwd(grad, x, y, indices, weight, height, width, pool, SLOPE, False)
    assert none.numel() == 0 and all(torch.equal(a, b) for a, b in zip(weights, got[1:], strict=True))


@pytest.mark.parametrize("shape", CONV_POOL_SHAPES, ids=str)
def test_conv_pool_parity_fp32(isa, shape):
    check_conv_pool(shape, (F32, F32))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("shape", CONV_POOL_SHAPES[:4], ids=str)
def test_conv_pool_parity_bf16(isa, shape, dtypes):
    check_conv_pool(shape, dtypes)


ROUNDING = ("avx512_bf16", "amx")  # the instruction sets with products of bf16


def rounded(t: Tensor) -> Tensor:
    return t.to(BF16).float()


# as CONV_SHAPES, but so many products that rounding pays
LARGE_SHAPES = [
    (3, 3, 40, 37, 6, 11, 11, 1, 40, 37),
    (2, 6, 30, 70, 3, 25, 25, 1, 28, 69),  # most rows of the kernel lie in the padding
    (1, 6, 40, 61, 3, 25, 25, 3, 30, 41),  # dilated: not the gradient of the weight
    (1, 4, 23, 90, 20, 9, 10, 1, 23, 85),  # more channels out than a tile has columns; an even kernel
    (1, 11, 24, 33, 35, 5, 6, 1, 20, 33),  # several tiles of columns
    (1, 2, 70, 49, 5, 3, 70, 1, 70, 49),  # a kernel wider than two tiles
    (1, 5, 130, 224, 4, 9, 9, 1, 121, 219),  # several jobs for each image
    (0, 3, 16, 16, 2, 11, 11, 1, 16, 16),
]


@pytest.mark.parametrize(("dtypes", "relu"), [((F32, F32), False), ((BF16, F32), True), ((F32, BF16), True)], ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_factors_are_rounded_where_bf16_is_multiplied(isa, shape, dtypes, relu):
    *sizes, dilation, height, width = shape
    (x, weight, bias), rounds = inputs(*sizes, dtypes[0]), isa in ROUNDING
    where, window = (dilation, height, width), (*sizes[4:5], height, width)
    factors = (rounded(x), rounded(weight)) if rounds else (x.float(), weight)
    y = native.conv_fwd(x, weight, bias, *where, relu, dtypes[1], BF16)
    assert_close("y", y, conv_formula(*(t.double() for t in (*factors, bias)), *where, relu))

    grad = torch.randn(x.shape[0], *window).to(dtypes[1])
    masked = grad.float() * (y > 0) if relu else grad.float()
    got = native.conv_bwd(grad, x, y if relu else None, weight, *where, True, BF16)
    factor = rounded(masked) if rounds else masked
    _, (d_x, d_weight, _) = expected(lambda *t: conv_formula(*t, *where, False), (*factors, bias), factor)
    if rounds and dilation > 1:
        operands = x.float(), weight, bias
        _, (_, d_weight, _) = expected(lambda *t: conv_formula(*t, *where, False), operands, masked)
    assert_close("d_x", got[0], d_x)
    assert_close("d_weight", got[1], d_weight)
    assert_close("d_bias", got[2], masked.double().sum((0, 2, 3)))


@pytest.mark.parametrize("sizes", [(1, 3, 30, 44, 4, 11, 11), (1, 5, 130, 224, 4, 9, 9)], ids=["", "several jobs"])
@pytest.mark.parametrize("where", ["x", "grad", "weight"])
def test_what_bf16_cannot_hold_is_not_rounded_in_convolutions(isa, where, sizes):
    """3.4e38 is infinite in bf16: times the zeros of the padding or beside a window it would not be zero."""
    (x, weight, bias), geometry = inputs(*sizes), (1, *sizes[2:4])
    grad, large = torch.randn(1, 4, *sizes[2:4]), 3.4e38
    {"x": x, "grad": grad, "weight": weight}[where][0, 1, 2, 3] = large
    y = native.conv_fwd(x, weight, bias, *geometry, False, F32, BF16)
    gradients = native.conv_bwd(grad, x, None, weight, *geometry, True, BF16)
    leaves, exact = (x, weight, bias), lambda *t: conv_formula(*t, *geometry, False)
    y64, gradients64 = expected(exact, leaves, grad)
    for value, double in zip((y, *gradients), (y64, *gradients64), strict=True):
        assert torch.equal(value.isnan(), torch.zeros_like(value, dtype=torch.bool))
        near = double.abs() < 1e30  # what does not read the large number
        assert near.all() or (value[~near].abs() > 1e30).all()
        torch.testing.assert_close(value[near].double(), double[near], rtol=0.02, atol=0.02 * double[near].abs().max())


LARGE_POOL_SHAPES = [
    *(CONV_POOL_SHAPES[i] for i in (0, 1, 6, 8)),
    (1, 5, 20, 37, 40, 2, 9, 20, 36, 2),  # several tiles of columns
    (2, 3, 64, 67, 5, 9, 9, 48, 64, 16),  # the largest windows
    (0, 3, 16, 16, 9, 7, 7, 16, 16, 4),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", LARGE_POOL_SHAPES, ids=str)
def test_operands_are_rounded_where_bf16_is_multiplied(isa, shape, dtype):
    *sizes, height, width, pool = shape
    x, weight, bias = inputs(*sizes, dtype)
    y, indices = native.conv_pool_fwd(x, weight, bias, height, width, pool, SLOPE, F32, BF16)
    operands = (rounded(x), rounded(weight), bias) if isa in ROUNDING else (x, weight, bias)
    assert_close("y", y, conv_pool_formula(*(t.double() for t in operands), height, width, pool))
    _, places = native.conv_pool_fwd(*operands, height, width, pool, SLOPE, F32)
    assert torch.equal(indices, places)  # no two sums of random numbers are as near as their errors


@pytest.mark.parametrize("shape", [CONV_POOL_SHAPES[i] for i in (2, 3, 5, 7)], ids=str)
def test_few_products_are_not_rounded(isa, shape):
    """For these, matrix tiles would take longer than vectors of fp32."""
    *sizes, height, width, pool = shape
    tensors, rest = inputs(*sizes), (height, width, pool, SLOPE, F32)
    assert_same_bits([native.conv_pool_fwd(*tensors, *rest, operands) for operands in (None, BF16)])
    x, weight, bias = inputs(1, 40, 20, 21, 3, 3, 3)
    assert_same_bits([[native.conv_fwd(x, weight, bias, 12, 20, 21, False, F32, dtype)] for dtype in (None, BF16)])
    if isa != "amx":  # half of each pair would be zeros
        x, weight, bias = inputs(1, 1, 40, 37, 6, 11, 11)
        assert_same_bits([[native.conv_fwd(x, weight, bias, 1, 40, 37, False, F32, dtype)] for dtype in (None, BF16)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])  # the last is infinite in bf16
@pytest.mark.parametrize("where", ["image", "weight"])
def test_what_bf16_cannot_hold_is_not_rounded(isa, where, bad):
    """A tile multiplies numbers beside the windows by zero; a channel of the weight has reach over all of them."""
    x, weight, bias = inputs(2, 3, 52, 56, 5, 7, 7)
    (x[0, 1] if where == "image" else weight[3, 1])[2, 3] = bad
    y, indices = native.conv_pool_fwd(x, weight, bias, 48, 52, 4, SLOPE, F32, BF16)
    exact, places = native.conv_pool_fwd(x, weight, bias, 48, 52, 4, SLOPE, F32)
    finite = exact.isfinite()
    assert 0 < (~finite).sum() < finite.numel() or bad == 3.4e38
    torch.testing.assert_close(y[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices[~finite], places[~finite])
    torch.testing.assert_close(y[finite], exact[finite], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("pool", [2, 3, 4])
def test_the_same_maximum_as_torch_among_equals_and_nans(isa, pool):
    torch.manual_seed(pool)
    x = torch.randint(0, 3, (2, 1, 12, 36)).float()
    x[torch.rand(x.shape) < 0.1] = float("nan")
    x[0, 0, :pool] = -torch.inf
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    y, indices = native.conv_pool_fwd(x, weight, bias, 12, 36, pool, 1.0, F32)
    values, places = F.max_pool2d(x, pool, return_indices=True)
    row, column = places // 36, places % 36
    torch.testing.assert_close(y, values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, (row % pool * pool + column % pool).to(torch.uint8))


def test_relu_is_that_of_torch(isa):
    x = torch.tensor([1.0, -1.0, 0.0, torch.inf, -torch.inf, torch.nan] * 4).reshape(1, 1, 4, 6)
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    y = native.conv_fwd(x, weight, bias, 1, 4, 6, True, F32)
    torch.testing.assert_close(y, x.relu(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(native.conv_fwd(x, weight, bias, 1, 4, 6, False, F32), x, rtol=0, atol=0, equal_nan=True)
    y, _ = native.conv_pool_fwd(x, weight, bias, 4, 6, 1, SLOPE, F32)
    torch.testing.assert_close(y, F.leaky_relu(x, SLOPE), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_pixel_stays_within_reach(isa, bad):
    x, weight, bias = inputs(1, 2, 30, 70, 3, 3, 5)
    x[0, 1, 20, 40] = bad
    broken = ~native.conv_fwd(x, weight, bias, 1, 30, 70, False, F32).isfinite()
    assert torch.equal(broken, ~F.conv2d(x, weight, bias, padding="same").isfinite())


def test_noncontiguous_inputs():
    x, weight, bias = inputs(2, 3, 20, 24, 4, 3, 3)
    grad, small = torch.randn(2, 4, 20, 24), torch.randn(2, 4, 5, 6)
    strided = [t.mT.contiguous().mT for t in (x, weight, grad, small)]
    assert not any(t.is_contiguous() for t in strided)
    x2, weight2, grad2, small2 = strided
    y, indices = native.conv_pool_fwd(x, weight, bias, 20, 24, 4, SLOPE, F32)
    y2, indices2 = native.conv_pool_fwd(x2, weight2, bias.repeat_interleave(2)[::2], 20, 24, 4, SLOPE, F32)
    dense, dense2 = (
        native.conv_bwd(g, a, None, w, 1, 20, 24, True) for a, w, g in ((x, weight, grad), (x2, weight2, grad2))
    )
    pooled, pooled2 = (
        native.conv_pool_bwd(g, a, y, indices, w, 20, 24, 4, SLOPE, True)
        for a, w, g in ((x, weight, small), (x2, weight2, small2))
    )
    assert_same_bits([(y, indices, *dense, *pooled), (y2, indices2, *dense2, *pooled2)])


@pytest.mark.parametrize("largest", [1.0, 3.4e38], ids=["", "infinite if rounded"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_same_bits_for_every_number_of_threads(isa, threads, images, largest):
    """Also where a pixel keeps some of the others from being rounded: not more of them with fewer threads."""
    x, weight, bias = inputs(images, 3, 144, 144, 6, 7, 7)
    x[0, 1, 70, 70] = largest
    grad, small = torch.randn(images, 6, 144, 144) / 100, torch.randn(images, 6, 36, 36) / 100
    runs = []
    for n in (1, 2, 3, 17, 2):
        threads(n)
        y = native.conv_fwd(x, weight, bias, 1, 144, 144, True, F32)
        pooled, indices = native.conv_pool_fwd(x, weight, bias, 144, 144, 4, SLOPE, F32, BF16)
        dense = native.conv_bwd(grad, x, y, weight, 1, 144, 144, True)
        sparse = native.conv_pool_bwd(small, x, pooled, indices, weight, 144, 144, 4, SLOPE, True)
        wide = weight.repeat(1, 1, 2, 2)  # which may be rounded
        large = native.conv_fwd(x, wide, bias, 1, 144, 144, True, F32, BF16)
        large_grads = native.conv_bwd(grad, x, None, wide, 1, 144, 144, True, BF16)
        runs.append((y, pooled, indices, *dense, *sparse, large, *large_grads))
    assert_same_bits(runs)


def test_wrong_arguments_are_refused():
    x, weight, bias = inputs(1, 3, 12, 12, 2, 3, 3)
    grad = torch.randn(1, 2, 12, 12)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float16"):
        native.conv_fwd(x.half(), weight, bias, 1, 12, 12, True, F32)
    with pytest.raises(TypeError, match="y cannot have dtype"):
        native.conv_fwd(x, weight, bias, 1, 12, 12, True, torch.float16)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.bfloat16"):
        native.conv_bwd(grad, x, None, weight.bfloat16(), 1, 12, 12, True)
    with pytest.raises(ValueError, match="x is on meta"):
        native.conv_fwd(x.to("meta"), weight, bias, 1, 12, 12, True, F32)
    with pytest.raises(ValueError, match=r"weight has shape .* expected \(2, 3, 3, 3\)"):
        native.conv_fwd(x, weight[:, :1], bias, 1, 12, 12, True, F32)
    for empty in (weight[:0], weight[:, :, :0], weight[..., :0]):
        with pytest.raises(ValueError, match="not empty"):
            native.conv_fwd(x, empty, bias[: len(empty)], 1, 12, 12, True, F32)
    with pytest.raises(MemoryError):  # 8.6 GB, in which places are no integers of 32 bits
        native.conv_fwd(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.zeros(1), 46400, 2, 2, True, F32)
    with pytest.raises(ValueError, match="13x12 is no center of 12x12"):
        native.conv_fwd(x, weight, bias, 1, 13, 12, True, F32)
    with pytest.raises(ValueError, match="12x10 is no center of 12x12 in windows of 4x4"):
        native.conv_pool_fwd(x, weight, bias, 12, 10, 4, SLOPE, F32)
    with pytest.raises(ValueError, match="windows of 17x17"):
        native.conv_pool_fwd(x, weight, bias, 17, 17, 17, SLOPE, F32)
    with pytest.raises(ValueError, match="grad has shape"):
        native.conv_bwd(grad[:, :1], x, None, weight, 1, 12, 12, True)
    for dilation in (0, -1, 2**60, 2**64):
        with pytest.raises(ValueError, match=f"dilation is {dilation}: expected 1 or more"):
            native.conv_fwd(x, weight, bias, dilation, 12, 12, True, F32)
        with pytest.raises(ValueError, match=f"dilation is {dilation}: expected 1 or more"):
            native.conv_bwd(grad, x, None, weight, dilation, 12, 12, True)
    y, indices = native.conv_pool_fwd(x, weight, bias, 12, 12, 2, SLOPE, F32)
    indices[0, 1, 2, 3] = 4
    with pytest.raises(ValueError, match="an index of a maximum is 4: expected less than 4"):
        native.conv_pool_bwd(y, x, y, indices, weight, 12, 12, 2, SLOPE, True)
    with pytest.raises(ValueError, match="windows of 0x0"):
        native.conv_pool_bwd(y, x, y, indices, weight, 12, 12, 0, SLOPE, True)
