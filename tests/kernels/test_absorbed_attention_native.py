"""The native absorbed_attention against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch

from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, assert_close, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]  # an element left unwritten is NaN

SHAPES = [
    (0, 3, 4, 2, 1),
    (1, 1, 1, 1, 1),
    (2, 5, 7, 3, 0),
    (3, 17, 40, 5, 2),
    (2, 33, 100, 12, 1),
    (1, 206, 768, 12, 1),
]


def double(*tensors):
    return [x.double() for x in tensors]


@pytest.mark.parametrize(("B", "S", "E", "R", "T"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_parity(isa, B, S, E, R, T, dtype, padded):
    rows, x, scale = torch.randn(B, R, E).to(dtype), torch.randn(B, S, E).to(dtype), 0.7 * E**-0.5
    keys = torch.arange(1, B + 1).clamp(max=S) if padded else None
    means, weights = native.absorbed_attention_fwd(rows, x, scale, keys)
    wide_rows, wide_x = double(rows, x)
    scores = scale * wide_rows @ wide_x.mT
    if padded:
        scores = scores.masked_fill(torch.arange(S) >= keys[:, None, None], float("-inf"))
    p = scores.softmax(-1)
    assert_close("weights", weights, p)
    assert_close("means", means, p @ wide_x)
    assert not padded or not weights.masked_select(scores.isinf()).any()

    d_means, d_first = torch.randn(B, R, E).to(dtype), torch.randn(B, T, E).to(dtype)
    d_rows, d_products = native.absorbed_attention_bwd_rows(d_means, x, weights, scale)
    (wide_d,), (p,) = double(d_means), double(weights)
    d_p = wide_d @ wide_x.mT
    expected = scale * p * (d_p - (p * d_p).sum(-1, keepdim=True))
    assert_close("d_products", d_products, expected)
    assert_close("d_rows", d_rows, expected @ wide_x)

    d_x = native.absorbed_attention_bwd_tokens(d_means, weights, d_products, rows, d_first)
    expected = p.mT @ wide_d + d_products.double().mT @ wide_rows
    expected[:, :T] += d_first.double()
    assert_close("d_x", d_x, expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_neither_threads_nor_other_images_change_a_bit(threads, dtype):
    rows, x, d_means = (torch.randn(3, n, 100).to(dtype) for n in (6, 21, 6))
    d_first = torch.randn(3, 2, 100).to(dtype)

    def run(images):
        means, weights = native.absorbed_attention_fwd(rows[images], x[images], 0.3)
        d_rows, d_products = native.absorbed_attention_bwd_rows(d_means[images], x[images], weights, 0.3)
        rest = weights, d_products, rows[images], d_first[images]
        d_x = native.absorbed_attention_bwd_tokens(d_means[images], *rest)
        return means, weights, d_rows, d_products, d_x

    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(run(slice(None)))
        runs.append([torch.cat(parts) for parts in zip(*(run(slice(b, b + 1)) for b in range(3)), strict=True)])
    assert_same_bits(runs)


def test_large_scores_do_not_overflow_and_nan_stays_in_its_row():
    rows, x = torch.randn(1, 5, 40), torch.randn(1, 9, 40)
    rows[0, 1] *= 1e4
    rows[0, 3, 2] = float("nan")
    means, weights = native.absorbed_attention_fwd(rows, x, 1.0)
    others = [0, 1, 2, 4]
    assert_close("weights", weights[:, others], (rows.double() @ x.double().mT).softmax(-1)[:, others])
    assert weights[0, 3].isnan().all() and means[0, 3].isnan().all() and means[:, others].isfinite().all()


def test_what_is_refused():
    rows, x = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="rows has shape"):
        native.absorbed_attention_fwd(rows[:1], x, 1.0)
    with pytest.raises(TypeError, match="rows has dtype"):
        native.absorbed_attention_fwd(rows.bfloat16(), x, 1.0)
    with pytest.raises(TypeError, match="x has dtype"):
        native.absorbed_attention_fwd(rows.double(), x.double(), 1.0)
    for keys in (0, 6, 10**8, -(10**8)):
        with pytest.raises(ValueError, match="expected 1 to 5"):
            native.absorbed_attention_fwd(rows, x, 1.0, torch.tensor([5, keys]))


@pytest.mark.parametrize("size", [1e2, 1e5, 1e15])
def test_large_scores(isa, size):
    """The largest one, in a row of its own size, is subtracted as it was rounded."""
    x = size * torch.eye(3, 19)[None]
    rows = torch.eye(3, 19)[None] * torch.tensor([size, -size, 1.0])[:, None]
    means, weights = native.absorbed_attention_fwd(rows, x, 0.33)
    p = (0.33 * rows.double() @ x.double().mT).softmax(-1)
    assert_close("weights", weights, p)
    assert_close("means", means, p @ x.double())
