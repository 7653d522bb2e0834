"""The native gate against its formula in double precision."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from insvp_fast.runtime import native
from insvp_fast.runtime.activations import ACTIVATIONS
from insvp_fast.testing import relative_error
from tests.kernels import gate_checks
from tests.kernels.gate_checks import EPS, exact, operands
from tests.kernels.native_checks import BF16, F32, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]

SHAPES = [(0, 8), (3, 0), (1, 1), (5, 7), (2, 3, 33), (4, 100), (2, 2, 2, 16), (3, 2049)]

computed = functools.partial(gate_checks.computed, native)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parity(isa, shape, gated, dtype):
    for activation, eps in itertools.product(ACTIVATIONS, (None, EPS)):
        given = operands(shape, gated, dtype)
        found, expected = computed(*given, activation, eps), exact(*given, activation, eps)
        for value, truth in zip(found, expected, strict=True):
            assert value.dtype == dtype and value.shape == truth.shape and value.isfinite().all()
            # rounded once to 16 bits, to half of eps, and activations for these are off by 9e-4
            allowed = 16 * torch.finfo(F32).eps if dtype == F32 else torch.finfo(BF16).eps
            assert relative_error(value, truth) < allowed, (activation, eps)


@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_results_may_take_the_place_of_operands(eps, gated):
    d_hidden, pre, factor = operands((37, 530), gated, BF16)
    expected = native.gate_fwd(pre, factor, "gelu", eps)
    assert expected.data_ptr() != pre.data_ptr()
    grads = native.gate_bwd(d_hidden.mT.contiguous().mT, pre, factor, "gelu", eps)  # not contiguous: stays as it is
    d_pre, d_factor = native.gate_bwd(d_hidden, pre, factor, "gelu", eps)
    assert d_pre is d_hidden and torch.equal(d_pre, grads[0])
    assert torch.equal(d_factor, grads[1]) if gated else d_factor is None
    copy = pre.clone()
    found = native.gate_fwd(copy, factor, "gelu", eps, keep=False)
    assert found is copy and torch.equal(found, expected)


def test_nan_stays_in_its_row(isa):
    for which, eps in itertools.product((0, 1, 2), (None, EPS)):
        given = operands((4, 70), True, F32)
        clean = computed(*given, "silu", eps)
        given[which][2, 69] = float("nan")
        for value, before in zip(computed(*given, "silu", eps), clean, strict=True):
            others = torch.arange(4) != 2
            assert torch.equal(value[others], before[others])
            assert value[2].isnan().any() or torch.equal(value, before)  # the hidden layer has no gradient


def test_any_layout_and_any_number_of_threads(threads):
    given = operands((3, 41, 300), True, F32)
    expected = computed(*given, "gelu", EPS)
    for count in (1, 2, 3):
        threads(count)
        found = computed(*(x.mT.contiguous().mT for x in given), "gelu", EPS)
        assert all(map(torch.equal, found, expected)) and all(x.is_contiguous() for x in found)


def test_what_is_refused():
    d_hidden, pre, factor = operands((2, 8), True, F32)
    with pytest.raises(ValueError, match=r"factor has shape \(2, 7\): expected"):
        native.gate_fwd(pre, factor[:, 1:], "gelu", None)
    with pytest.raises(TypeError, match=r"factor has dtype torch.bfloat16: expected torch.float32"):
        native.gate_bwd(d_hidden, pre, factor.bfloat16(), "gelu", None)
    with pytest.raises(ValueError, match="d_hidden has shape"):
        native.gate_bwd(d_hidden[:1], pre, factor, "gelu", None)
    with pytest.raises(TypeError, match=r"pre has dtype torch.float64"):
        native.gate_fwd(pre.double(), None, "gelu", None)
