"""The native attention in windows against the formula in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from insvp_fast.ops.window_attention import window_attention_bwd_reference, window_attention_reference
from insvp_fast.runtime import native
from insvp_fast.runtime.native import Windows
from insvp_fast.testing import assert_within_budget, relative_error
from tests.kernels.native_checks import BF16, F32, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]  # an element left unwritten is NaN
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def inputs(B: int, L: int, n: int, w: int, heads: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Windows]:
    torch.manual_seed(B + 10 * w + 100 * n)
    windows = torch.randperm(n * w).view(n, w).int()
    mask = -100.0 * torch.randint(0, 2, (n, w, w))
    qkv, grad = torch.randn(B, n * w + L, 3 * heads * d), torch.randn(B, n * w, heads * d)
    return qkv.to(dtype), grad.to(dtype), Windows(windows, torch.randn(heads, w, w), mask)


def computed(qkv: Tensor, grad: Tensor, windows: Windows, heads: int = 2) -> tuple[Tensor, Tensor]:
    shape = heads, windows, 0.3
    return native.window_attention_fwd(qkv, *shape), native.window_attention_bwd(grad, qkv, *shape)


def expected(qkv: Tensor, grad: Tensor, windows: Windows, heads: int = 2) -> tuple[Tensor, Tensor]:
    shape = heads, *windows, 0.3
    return window_attention_reference(qkv, *shape), window_attention_bwd_reference(grad, qkv, *shape)


def check(qkv: Tensor, grad: Tensor, windows: Windows) -> None:
    values = computed(qkv, grad, windows)
    exact, plain = expected(qkv.double(), grad.double(), windows), expected(qkv, grad, windows)
    for value, rough, wide in zip(values, plain, exact, strict=True):
        assert value.shape == wide.shape and value.dtype == qkv.dtype
        for part, rough_part, wide_part in zip(
            *(t.split(grad.shape[2], -1) for t in (value, rough, wide)), strict=True
        ):
            if qkv.dtype == F32:
                assert relative_error(part, wide_part) <= 2e-6
            else:
                assert_within_budget(part, rough_part, wide_part, qkv.dtype)
    assert not values[1][:, grad.shape[1] :, : grad.shape[2]].any()  # prompts do not ask


@each_dtype
@pytest.mark.parametrize(
    ("B", "L", "n", "w", "d"),
    [
        (0, 2, 3, 4, 8),
        (1, 3, 0, 5, 8),
        (2, 3, 5, 1, 16),
        (1, 9, 4, 49, 32),
        (2, 0, 3, 17, 5),
        (1, 20, 2, 64, 16),
        (1, 1, 2, 65, 24),
        (1, 9, 2, 144, 32),
    ],
)
def test_parity(isa, dtype, B, L, n, w, d):
    check(*inputs(B, L, n, w, 2, d, dtype))


@each_dtype
def test_without_bias_and_mask_one_window_is_attention(isa, dtype):
    qkv, grad, _ = inputs(2, 9, 1, 77, 2, 16, dtype)
    windows = Windows(torch.arange(77).int()[None], None, None)
    plain = native.attention_fwd(qkv, 2, 77, 0.3), native.attention_bwd(grad, qkv, 2, 77, 0.3)
    assert_same_bits([computed(qkv, grad, windows), plain])


@each_dtype
def test_same_bits_for_every_number_of_threads(isa, threads, dtype):
    qkv, grad, windows = inputs(3, 5, 7, 9, 2, 16, dtype)
    runs = []
    for n in (1, 2, 3, 7):
        threads(n)
        runs.append(computed(qkv, grad, windows))
    assert_same_bits(runs)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_window_and_head(isa, threads, dtype, bad):
    threads(1)  # so that all windows use the same scratch memory
    heads, d = 2, 8
    qkv, grad, windows = inputs(2, 3, 4, 9, heads, d, dtype)
    clean = computed(qkv, grad, windows)
    qkv[1, windows.windows[2, 4], d] = bad  # a query of the second head
    for value, right in zip(computed(qkv, grad, windows), clean, strict=True):
        touched = (value != right).unflatten(-1, (-1, heads, d)).any(dim=(-1, -3)).nonzero()
        allowed = {*windows.windows[2].tolist(), 36, 37, 38}  # and the gradients of prompts, which all windows share
        assert len(touched) and all(b == 1 and t in allowed and h == 1 for b, t, h in touched.tolist())


def test_wrong_windows_are_refused():
    qkv, grad, windows = inputs(2, 3, 4, 9, 2, 8, F32)
    twice, outside, negative = (windows.windows.clone() for _ in range(3))
    twice[0, 0], outside[1, 1], negative[2, 2] = twice[0, 1], 36, -1
    for wrong in (twice, outside, negative):
        with pytest.raises(ValueError, match="each of the tokens 0 to 35 once"):
            computed(qkv, grad, windows._replace(windows=wrong))
    for name, wrong, message in [
        ("windows", windows.windows.long(), "windows has dtype torch.int64"),
        ("windows", windows.windows.repeat(2, 1), r"n\*w up to 39, the tokens of qkv"),
        ("bias", windows.bias[:1], r"bias has shape \(1, 9, 9\): expected \(2, 9, 9\)"),
        ("bias", windows.bias.double(), "bias has dtype torch.float64"),
        ("mask", windows.mask[:2], r"mask has shape \(2, 9, 9\): expected \(4, 9, 9\)"),
        ("windows", windows.windows.to("meta"), "windows is on meta"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            computed(qkv, grad, windows._replace(**{name: wrong}))
