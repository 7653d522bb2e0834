"""The Triton convolutions, through the operations, against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip, conv, windows
from insvp_fast.kernels.gpu import conv_pool as kernel

from insvp_fast import ops
from insvp_fast.reference import crop_center
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import copies, with_gradients

SLOPE = 0.01


def outcome(operation, tensors, geometry):
    return with_gradients(lambda *t: operation(*t, *geometry), tensors)


def conv_formula(x, weight, bias, dilation, height, width, relu):
    y = crop_center(F.conv2d(x, weight, bias, padding="same", dilation=dilation), height, width)
    return y.relu() if relu else y


def conv_pool_formula(x, weight, bias, height, width, pool):
    y = F.conv2d(x, weight, bias, padding="same")
    return F.leaky_relu(F.max_pool2d(crop_center(y, height, width), pool), SLOPE)


def inputs(B, C, H, W, out, kh, kw, dtype, device):
    """Map, weight and bias; the weight has values of ``dtype``, so that rounding it does not move a maximum."""
    weight = (torch.randn(out, C, kh, kw, device=device) / (C * kh * kw) ** 0.5).to(dtype).float()
    tensors = torch.randn(B, C, H, W, device=device).to(dtype), weight, torch.randn(out, device=device)
    return [t.requires_grad_() for t in tensors]


def check(operation, formula, tensors, geometry):
    dtype = tensors[0].dtype
    exact = outcome(formula, copies(tensors, torch.float64), geometry)
    rough = outcome(formula, copies(tensors, dtype), geometry)
    got = outcome(operation, tensors, geometry)
    for name, value, plain, want in zip(("y", "d_x", "d_weight", "d_bias"), got, rough, exact, strict=True):
        assert value.shape == want.shape
        if dtype == torch.float32:
            assert relative_error(value, want) < 2e-6, name
        else:
            assert_within_budget(value, plain, want, dtype, name)


def run_conv(x, weight, bias, *geometry):
    return ops.conv(x, weight, bias, *geometry, impl="triton")


def run_conv_pool(x, weight, bias, *geometry):
    return ops.conv_pool(x, weight, bias, *geometry, impl="triton")


# B, C, H, W, channels out, kh, kw; dilation, height, width, whether a ReLU follows
CONV = [
    ((3, 3, 20, 17, 6, 3, 3), (5, 20, 17, True)),  # the paper's first
    ((1, 6, 15, 26, 3, 3, 3), (12, 15, 26, False)),  # its second: most taps lie outside of the map
    ((2, 2, 9, 12, 11, 4, 2), (1, 7, 12, True)),  # even sides, a center
    ((1, 1, 3, 2, 5, 9, 7), (2, 3, 2, False)),  # a map smaller than the kernel
    ((1, 1, 5, 4, 1, 1, 1), (1, 5, 4, True)),
]
WINDOWS = [  # with so many taps that windows of pixels are computed at once
    ((1, 2, 8, 16, 5, 11, 11), (1, 8, 16, True), torch.float32),  # as the release's first: channels in several groups
    ((1, 1, 8, 8, 2, 25, 25), (1, 8, 8, False), torch.bfloat16),  # as its second: most taps lie outside of the map
]
SMALL_WINDOWS = [
    ((1, 9, 8, 6, 1, 4, 5), (1, 4, 6, True), torch.float32),  # an even side, a center
    ((3, 2, 6, 8, 7, 3, 3), (1, 6, 8, True), torch.float16),
]


def in_16_bits(cases):
    """Every case in fp32, and some in 16 bits, which the interpreter does not round."""
    return [(*case, torch.float32) for case in cases] + [
        (*case, dtype) for case in cases[: 2 if chip.INTERPRETED else None] for dtype in (torch.bfloat16, torch.float16)
    ]


@pytest.mark.parametrize(("sizes", "geometry", "dtype"), in_16_bits(CONV) + WINDOWS, ids=str)
def test_conv_parity(device, poison, sizes, geometry, dtype):
    check(run_conv, conv_formula, inputs(*sizes, dtype, device), geometry)


@pytest.fixture
def small_windows(monkeypatch):
    """Convolutions of any number of taps in windows of 2 x 2, for which the interpreter needs little time."""
    monkeypatch.setattr(conv, "SIDE", 2)
    monkeypatch.setattr(conv, "MAX_PRODUCTS", 0)


@pytest.mark.parametrize(("sizes", "geometry", "dtype"), SMALL_WINDOWS, ids=str)
def test_conv_parity_in_small_windows(device, poison, small_windows, sizes, geometry, dtype):
    check(run_conv, conv_formula, inputs(*sizes, dtype, device), geometry)


# B, C, H, W, channels out, kh, kw; height, width, pool
CONV_POOL = [
    ((2, 3, 22, 26, 9, 7, 7), (16, 20, 4)),  # the paper's first: the center of an image
    ((1, 2, 7, 8, 27, 9, 9), (6, 6, 3)),  # its second: positions in several groups, padding on all sides
    ((1, 2, 16, 15, 3, 4, 2), (14, 14, 2)),  # even sides
    ((3, 1, 9, 6, 17, 3, 1), (9, 6, 1)),  # windows of one pixel, more channels than a tile of 16
    ((1, 1, 4, 5, 2, 9, 7), (4, 4, 2)),  # a map smaller than the kernel
]


def test_what_would_waste_products_is_refused(device):
    x, weight, bias = (t.detach() for t in inputs(1, 1, 16, 16, 1, 3, 3, torch.float32, device))
    with pytest.raises(RuntimeError, match=r"does not cover a weight of shape \(1, 1, 3, 3\) and windows of 16x16"):
        ops.conv_pool(x, weight, bias, 16, 16, 16, impl="triton")
    with pytest.raises(RuntimeError, match=r"does not cover a weight of shape \(17, 1, 3, 3\)"):
        ops.conv(x, weight.expand(17, -1, -1, -1), bias.expand(17), 1, 16, 16, impl="triton")


@pytest.mark.parametrize(("sizes", "geometry", "dtype"), in_16_bits(CONV_POOL), ids=str)
def test_conv_pool_parity(device, poison, sizes, geometry, dtype):
    check(run_conv_pool, conv_pool_formula, inputs(*sizes, dtype, device), geometry)


@pytest.mark.parametrize("layout", ["channels last", "every second column", "wide offsets"])
@pytest.mark.parametrize("taps", ["few", "many"])
def test_other_layouts_give_the_same_bits(device, monkeypatch, layout, taps, request):
    if taps == "many":
        request.getfixturevalue("small_windows")
    x, weight, bias = (t.detach() for t in inputs(2, 3, 12, 14, 5, 3, 3, torch.float32, device))
    same = x.clone()
    if layout == "channels last":
        same = x.to(memory_format=torch.channels_last)
    elif layout == "every second column":
        same = x.repeat_interleave(2, dim=3)[..., ::2]
    else:
        monkeypatch.setattr(windows, "offset_dtype", lambda *maps: kernel.tl.int64)
    for run, geometry in ((run_conv, (1, 12, 14)), (run_conv_pool, (12, 12, 4)))[: 1 if taps == "many" else 2]:
        one, other = (
            outcome(run, [t.requires_grad_() for t in (first, weight, bias)], geometry) for first in (x, same)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_offsets_are_wide_where_strides_are():
    frames = torch.empty(300, 64, 3, 224, 224, device="meta")
    assert windows.offset_dtype(frames[:200, 0, :, :4]) is kernel.tl.int32
    assert frames[:, 0].numel() < 2**31 and windows.offset_dtype(frames[:, 0]) is kernel.tl.int64


@pytest.mark.parametrize("far", [(2**32, 2**30, 8, 1), (192, 64, 2**29, 1)], ids=["channels", "rows"])
def test_an_image_beyond_the_reach_of_32_bits_is_copied(far, device, monkeypatch):
    wide = torch.empty_strided((2, 3, 8, 8), far, device="meta")
    assert windows.near(wide).is_contiguous()
    frames = torch.empty(2**20, 64, 3, 224, 224, device="meta")[:, 0]
    assert windows.near(frames) is frames  # places of images are wide anyhow
    x, weight, bias = (t.detach() for t in inputs(2, 3, 8, 8, 3, 3, 3, torch.float32, device))
    y, indices = kernel.conv_pool_fwd(x, weight, bias, (1, 1), 8, 8, 4, SLOPE, torch.float32)
    copied = []
    monkeypatch.setattr(windows, "near", lambda x: copied.append(x) or x)
    conv.conv_bwd(conv.conv_fwd(x, weight, bias, 1, (1, 1), 8, 8, False, x.dtype), x, None, weight, 1, (1, 1), True)
    kernel.conv_pool_fwd(x, weight, bias, (1, 1), 8, 8, 4, SLOPE, torch.float32)
    kernel.conv_pool_bwd_weight(y, x, y, indices, weight, (1, 1), 4, SLOPE)
    assert len(copied) == 4 and all(map(x.is_set_to, copied))


def test_a_gradient_that_is_larger_than_the_map_has_wide_offsets(monkeypatch):
    """A map that is expanded along the batch is small, and its gradient is not."""
    found = []
    monkeypatch.setattr(windows, "offset_dtype", lambda *maps: found.append(maps) or kernel.tl.int32)
    x, weight, bias = (t.detach() for t in inputs(1, 2, 8, 8, 3, 3, 3, torch.float32, "cpu"))
    x = x.expand(5, -1, -1, -1)
    y, indices = kernel.conv_pool_fwd(x, weight, bias, (1, 1), 8, 8, 4, SLOPE, torch.float32)
    found.clear()
    d_x = kernel.conv_pool_bwd_map(y, x, y, indices, weight, (1, 1), 4, SLOPE)
    assert any(map(d_x.is_set_to, found[0]))


def test_weights_that_are_large_at_every_position_are_not_covered():
    weight = torch.empty(64, 1, 512, 512, device="meta")
    assert not kernel.covers(weight, 1) and kernel.covers(weight[:, :, :9, :9], 1)


def test_operands_with_any_strides(device):
    """The bias, and what backward gets, as views of larger tensors."""
    x, weight, bias = (t.detach() for t in inputs(1, 2, 8, 8, 3, 3, 3, torch.float32, device))
    strided = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
    for run, geometry in ((run_conv, (1, 8, 8)), (run_conv_pool, (8, 8, 4))):
        assert torch.equal(run(x, weight, strided, *geometry), run(x, weight, bias, *geometry))
    y, indices = kernel.conv_pool_fwd(x, weight, bias, (1, 1), 8, 8, 4, SLOPE, torch.float32)
    views = [t.mT.contiguous().mT for t in (y, y, indices)]
    for backward in (kernel.conv_pool_bwd_weight, kernel.conv_pool_bwd_map):
        one, other = (backward(g, x, v, i, weight, (1, 1), 4, SLOPE) for g, v, i in ((y, y, indices), views))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_no_image(device):
    tensors = inputs(0, 3, 8, 8, 2, 3, 3, torch.float32, device)
    for run, geometry in ((run_conv, (1, 8, 8)), (run_conv_pool, (8, 8, 4))):
        y, *gradients = outcome(run, tensors, geometry)
        assert len(y) == 0 and all(not g.any() for g in gradients)


def test_the_same_maximum_as_torch_among_equals_and_nans(device):
    x = torch.randint(0, 3, (2, 1, 12, 36), device=device).float()
    x[torch.rand(x.shape, device=device) < 0.1] = float("nan")
    x[0, 0, :4] = -torch.inf
    weight, bias = torch.ones(1, 1, 1, 1, device=device), torch.zeros(1, device=device)
    y, indices = kernel.conv_pool_fwd(x, weight, bias, (0, 0), 12, 36, 4, 1.0, torch.float32)
    values, places = F.max_pool2d(x, 4, return_indices=True)
    torch.testing.assert_close(y, values, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(indices.long(), places // 36 % 4 * 4 + places % 36 % 4)


def test_a_bad_pixel_reaches_only_what_reads_it(device):
    """In forward and in the gradient of the map, infinities and NaN are where PyTorch has them."""
    x, weight, bias = (t.detach() for t in inputs(1, 2, 12, 13, 3, 3, 3, torch.float32, device))
    x[0, 0, 5, 5], x[0, 1, 9, 1] = torch.inf, torch.nan
    y, indices = kernel.conv_pool_fwd(x, weight, bias, (1, 1), 12, 12, 4, SLOPE, torch.float32)
    want = conv_pool_formula(x.double(), weight.double(), bias.double(), 12, 12, 4)
    torch.testing.assert_close(y, want.float(), equal_nan=True)
    grad = torch.randn_like(y)
    grad[0, 0, 1, 1], grad[0, 2, 0, 2] = -torch.inf, torch.nan
    finite = torch.randn(x.shape, device=device)
    y, indices = kernel.conv_pool_fwd(finite, weight, bias, (1, 1), 12, 12, 4, SLOPE, torch.float32)
    d_x = kernel.conv_pool_bwd_map(grad, finite, y, indices, weight, (1, 1), 4, SLOPE)
    leaf = finite.double().requires_grad_()
    (want,) = torch.autograd.grad(
        conv_pool_formula(leaf, weight.double(), bias.double(), 12, 12, 4), leaf, grad.double()
    )
    beside = ~(want.isnan() & d_x.isfinite())  # PyTorch also multiplies infinities by the zeros beside the maxima
    torch.testing.assert_close(d_x[beside], want.float()[beside], equal_nan=True)
    assert d_x.isfinite().sum() > d_x.numel() / 2
    for o, r, q in ((0, 1, 1), (2, 0, 2)):  # each reaches all taps around its maximum
        row, column = 4 * r + indices[0, o, r, q] // 4, 4 * q + indices[0, o, r, q] % 4
        around = d_x[0, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        assert around.numel() and not around.isfinite().any()


@pytest.mark.parametrize("bad", ["infinite weight", "weight that is no number", "infinite bias", "overflow"])
def test_what_is_not_finite_in_one_position_is_in_its_window(device, bad):
    x, weight, bias = (t.detach() for t in inputs(1, 2, 12, 12, 3, 3, 3, torch.float32, device))
    if bad == "overflow":  # infinities of both signs in two positions of a window: in any order, one begins with +inf
        x[0, :, 4, 4], x[0, 0, 5, 5], x[0, 1, 5, 6], x[0, 0, 6, 5], x[0, 1, 6, 6] = 0, 2e38, 2e38, -2e38, -2e38
        weight[0] *= 1e-3
        weight[0, 0, 1, 1], weight[0, 1, 1, 2] = 2, -2
    elif bad == "infinite bias":  # and the other infinity in sums of its window that are not the largest
        x[0, 0, 5, 5], weight[0, 0], bias[0] = -torch.inf, weight[0, 0].abs(), torch.inf
    else:
        weight[0, 1, 0, 2] = torch.inf if bad == "infinite weight" else torch.nan
    y, _ = kernel.conv_pool_fwd(x, weight, bias, (1, 1), 12, 12, 4, SLOPE, torch.float32)
    want = conv_pool_formula(x, weight, bias, 12, 12, 4)
    assert not want[0, 0, 1, 1].isfinite()
    if bad == "overflow":  # NaN where products are rounded before they are added, infinite where they are not
        y, want = (t.masked_fill(t.isinf(), torch.nan) for t in (y, want))
    torch.testing.assert_close(y, want, equal_nan=True)


def test_a_bad_pixel_reaches_only_the_windows_that_read_it(device, small_windows):
    for bad, relu in ((torch.inf, True), (torch.nan, False), (torch.nan, True)):
        x, weight, bias = (t.detach() for t in inputs(2, 2, 6, 8, 3, 4, 3, torch.float32, device))
        x[0, 0, 2, 7], x[1, 1, 5, 1] = bad, -torch.inf
        leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
        y, want = (
            run_conv(leaf, weight, bias, 1, 6, 8, relu),
            conv_formula(truth, weight.double(), bias.double(), 1, 6, 8, relu),
        )
        torch.testing.assert_close(y, want.float(), equal_nan=True)
        grad = torch.randn_like(y)
        grad[1, 0, 3, 3] = bad
        for got, expected in zip(
            torch.autograd.grad(y, leaf, grad), torch.autograd.grad(want, truth, grad.double()), strict=True
        ):
            torch.testing.assert_close(got, expected.float(), equal_nan=True)


def test_the_gradient_passes_where_relu_gave_nan(device):
    tensors = inputs(1, 2, 6, 7, 3, 3, 3, torch.float32, device)
    with torch.no_grad():
        tensors[0][0, 0, 2, 3] = torch.nan
    got = outcome(run_conv, tensors, (1, 6, 7, True))
    want = outcome(conv_formula, copies(tensors, torch.float64), (1, 6, 7, True))
    for value, truth in zip(got, want, strict=True):
        torch.testing.assert_close(value, truth.float(), equal_nan=True)
    assert got[1].isfinite().all() and got[3].isfinite().all()  # d_x and d_bias, which shows what passed


def test_what_windows_do_not_cover(device):
    x, weight, bias = (t.detach() for t in inputs(1, 1, 16, 16, 9, 11, 11, torch.float32, device))
    for dilation, height in ((2, 16), (1, 12)):  # a dilation; sides that windows do not divide
        with pytest.raises(RuntimeError, match="does not cover a weight of .* and a map of 16x16 pixels"):
            run_conv(x, weight, bias, dilation, height, 16)
    assert run_conv(x[:0], weight, bias, 1, 16, 16).shape == (0, 9, 16, 16)


def test_the_same_bits_twice(device):
    tensors = inputs(3, 3, 20, 20, 9, 3, 3, torch.bfloat16, device)
    for run, geometry in ((run_conv, (1, 20, 20)), (run_conv_pool, (20, 20, 4))):
        once, twice = (outcome(run, tensors, geometry) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
