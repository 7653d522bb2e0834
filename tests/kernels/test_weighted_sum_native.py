"""The native weighted_sum against the same sum of PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from insvp_fast.runtime import native
from insvp_fast.runtime.elementwise import put_sum
from tests.kernels.native_checks import BF16, F32, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 7), (3, 5, 33), (2, 60, 1000)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (-0.3, 1e-3)], ids=str)
@pytest.mark.parametrize("shared", ["none", "a", "b"])
def test_bits(isa, shape, dtypes, weights, shared):
    a, b = (
        torch.randn(1 if name == shared else shape[0], *shape[1:]).to(dtype)
        for name, dtype in zip("ab", dtypes, strict=True)
    )
    both = torch.full((shape[0], *shape[1:-1], 2, shape[-1]), 7.0, dtype=torch.promote_types(*dtypes))
    both = both.movedim(-2, 1).contiguous()  # images of twice the memory, of which one half is written
    native.weighted_sum(both[:, 0], a, weights[0], b, weights[1])
    expected = weights[0] * a + weights[1] * b
    assert torch.equal(both[:, 0], expected.expand(shape)) and (both[:, 1] == 7).all()
    native.weighted_sum(both[:, 0], a.expand(shape), weights[0], None, 0.0)
    assert torch.equal(both[:, 0], (weights[0] * a).to(both.dtype).expand(shape))


def test_threads_change_no_bit(threads):
    a, b = torch.randn(3, 100_000), torch.randn(1, 100_000).bfloat16()
    for count in (1, 2, 3):
        threads(count)
        found = torch.empty(3, 100_000)
        native.weighted_sum(found, a, 0.7, b, 0.3)
        assert torch.equal(found, 0.7 * a + 0.3 * b)


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_pytorchs(dtype):
    a, b, found = torch.randn(2, 5).to(dtype), torch.randn(2, 5).to(dtype), torch.empty(2, 5, dtype=dtype)
    put_sum(found, a, 0.7, b, 0.3)
    assert torch.equal(found, 0.7 * a + 0.3 * b)
    put_sum(found, a, 1, None, 0)
    assert torch.equal(found, a)


def test_images_that_are_not_contiguous_are_pytorchs():
    a, b, found = torch.randn(2, 5, 3).mT, torch.randn(1, 3, 5), torch.empty(2, 3, 5)
    put_sum(found, a, 0.7, b, 0.3)
    assert torch.equal(found, 0.7 * a + 0.3 * b)


def test_what_is_refused():
    to = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="a has shape"):
        native.weighted_sum(to, torch.zeros(2, 4, 3), 1.0, None, 0.0)
    with pytest.raises(ValueError, match="b has shape"):
        native.weighted_sum(to, to, 1.0, torch.zeros(3, 3, 4), 0.0)
    with pytest.raises(ValueError, match="b has strides"):
        native.weighted_sum(to, to, 1.0, torch.zeros(2, 4, 3).mT, 0.0)
    with pytest.raises(ValueError, match="to has strides"):
        native.weighted_sum(torch.zeros(2, 4, 3).mT, to, 1.0, None, 0.0)
    with pytest.raises(TypeError, match="a has dtype"):
        native.weighted_sum(to, to.double(), 1.0, None, 0.0)
