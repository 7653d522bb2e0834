"""The native rotate against its formula in double precision."""

from __future__ import annotations

import pytest
import torch

from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, needs_library
from tests.kernels.rotate_checks import SHAPES, assert_rotated, operands

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize("shape", [*SHAPES, (1, 60, 5, 50, 2, 12, 64)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["one for all heads", "one for each"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parity(isa, shape, own, dtype):
    given = operands(*shape, own, dtype)
    for half in (True, False):
        for forward in (True, False):
            found = native.rotate(*given, half=half, forward=forward)
            assert_rotated(found, given, half, forward, torch.finfo(dtype).eps / 2)


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
