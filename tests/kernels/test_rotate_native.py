"""The native rotate against its formula in double precision."""

from __future__ import annotations

import pytest
import torch

from insvp_fast.ops.rotate import rotate_bwd_reference, rotate_reference
from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]

SHAPES = [
    # B, S, first, N, parts, heads, d
    (0, 3, 0, 3, 2, 1, 2),
    (1, 4, 2, 0, 2, 3, 4),
    (2, 1, 0, 1, 1, 1, 2),
    (2, 9, 1, 5, 2, 2, 6),
    (3, 5, 0, 5, 1, 3, 18),
    (2, 7, 3, 4, 2, 2, 34),
    (1, 60, 5, 50, 2, 12, 64),
]


def operands(B, S, first, N, parts, heads, d, own, dtype):
    x = torch.randn(B, S, (parts + 1) * heads * d).to(dtype)
    return x, heads, torch.randn(*[heads] * own, N, 2 * d), first  # any numbers, not only sines and cosines


def exact(x, heads, rotation, first, half, forward):
    formula = rotate_reference if forward else rotate_bwd_reference
    return formula(x.double(), heads, rotation.double(), first, half)


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["one for all heads", "one for each"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parity(isa, shape, own, dtype):
    given = operands(*shape, own, dtype)
    for half in (True, False):
        for forward in (True, False):
            found = native.rotate(*given, half=half, forward=forward)
            expected = exact(*given, half, forward)
            # two products of fp32, each below |x| * |rotation|, and one rounding to the dtype of the result
            bound = 4 * torch.finfo(F32).eps * largest(given[0]) * largest(given[2])
            assert found.dtype == dtype and found.isfinite().all()
            assert ((found - expected).abs() <= bound + torch.finfo(dtype).eps / 2 * expected.abs()).all()


@pytest.mark.parametrize("half", [True, False])
def test_a_number_that_is_not_finite_reaches_its_pair_alone(isa, half):
    given = operands(2, 9, 1, 5, 2, 2, 6, False, F32)
    clean = native.rotate(*given, half=half, forward=True)
    given[0][1, 2, 6 + 1] = float("nan")  # of the second head of the queries
    found = native.rotate(*given, half=half, forward=True)
    reached = torch.zeros(found.shape, dtype=torch.bool)
    reached[1, 2, [6 + 1, 6 + (4 if half else 0)]] = True
    assert torch.equal(found.isnan(), reached) and torch.equal(found[~reached], clean[~reached])


def test_any_layout_and_any_number_of_threads(threads):
    x, *rest = operands(3, 60, 5, 50, 2, 12, 64, True, F32)
    expected = native.rotate(x, *rest, half=False, forward=True)
    for count in (1, 2, 3):
        threads(count)
        found = native.rotate(x.mT.contiguous().mT, *rest, half=False, forward=True)
        assert torch.equal(found, expected) and found.is_contiguous()


def test_what_is_refused():
    x, heads, rotation, first = operands(2, 9, 1, 5, 2, 2, 6, False, F32)

    def rotate(x=x, heads=heads, rotation=rotation, first=first):
        native.rotate(x, heads, rotation, first, half=True, forward=True)

    with pytest.raises(ValueError, match="x has shape"):
        rotate(x=x[..., 1:])
    with pytest.raises(ValueError, match="rotation has shape"):
        rotate(rotation=rotation.expand(3, -1, -1))
    with pytest.raises(ValueError, match="first=5"):
        rotate(first=5)
    with pytest.raises(ValueError, match="first=-1"):
        rotate(first=-1)
    with pytest.raises(ValueError, match="an even width"):
        rotate(rotation=rotation[:, :6])
    with pytest.raises(TypeError, match="rotation has dtype"):
        rotate(rotation=rotation.bfloat16())
    with pytest.raises(TypeError, match="x has dtype"):
        rotate(x=x.double())
