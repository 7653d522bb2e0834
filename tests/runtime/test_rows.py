"""rows_apart: a row's NaN does not come out of another row, whatever the product does with it."""

import pytest
import torch

from insvp_fast.runtime import hardware, products
from insvp_fast.runtime.products import FrozenLinear
from insvp_fast.runtime.rows import rows_apart


def leaky(x, weight, scale):
    """A product that in 16 bits reads beyond the end of a row, as oneDNN's with tiles does."""
    beyond = torch.cat([x[1:, 0], x.new_zeros(1)])
    leak = 0 * beyond[:, None] if x.dtype == torch.bfloat16 else 0
    return scale * (x @ weight + leak), x.sum(1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_keeps_its_nan(monkeypatch, bad):
    monkeypatch.setattr(hardware, "has_tiles", lambda dtype: dtype == torch.bfloat16)
    x, weight = torch.randn(7, 5).bfloat16(), torch.randn(5, 3).bfloat16()
    x[4, 0] = bad
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = rows_apart(leaky)(x, weight, 2)
        for result in results:
            assert result.dtype == torch.bfloat16
            assert result.flatten(1 - result.ndim).isfinite().view(7, -1).all(1).tolist() == [i != 4 for i in range(7)]


def test_the_dtype_of_a_product_under_autocast_counts(monkeypatch):
    monkeypatch.setattr(hardware, "has_tiles", lambda dtype: dtype == torch.bfloat16)
    x, products = torch.tensor([[1.0], [torch.nan]]), []

    @rows_apart
    def product(x):
        products.append((x @ x.mT).dtype)
        return x @ x.mT

    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            product(x)
    assert products == [torch.float32, torch.bfloat16, torch.float32]


def test_finite_results_are_those_of_the_function(monkeypatch):
    monkeypatch.setattr(hardware, "has_tiles", lambda dtype: True)
    x, calls = torch.randn(3, 4).bfloat16(), []

    @rows_apart
    def double(x):
        calls.append(x.dtype)
        return 2 * x

    assert torch.equal(double(x), 2 * x)
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(17, 33), (64, 31), (33, 34), (130, 152)])
def test_products_of_this_machine(dtype, rows, width):
    """Among them shapes whose rows oneDNN mixes with tiles."""
    x, other = torch.randn(2, rows, width).to(dtype), torch.randn(2, width, 8).to(dtype)
    x[1, 5] = torch.nan
    result = rows_apart(torch.matmul)(x, other)
    assert result.isfinite().all(-1).logical_not().nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize(("inner", "outer", "ragged"), [(48, 64, True), (64, 33, True), (64, 32, False)])
def test_rows_that_tiles_do_not_divide_are_multiplied_in_fp32(inner, outer, ragged, monkeypatch):
    asked = []
    monkeypatch.setattr(hardware, "has_tiles", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(products, "provider", lambda dtype, device: asked.append(dtype) or "plain")
    layer = FrozenLinear(torch.randn(outer, inner).bfloat16())
    assert products.linear(torch.randn(3, inner).bfloat16(), layer, "plain").dtype == torch.bfloat16
    assert products.linear_bwd(torch.randn(3, outer).bfloat16(), layer, "plain").dtype == torch.bfloat16
    assert asked == 2 * [torch.float32] * ragged
