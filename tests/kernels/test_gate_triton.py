"""The Triton gate against its formula in double precision."""

import functools
import itertools

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip
from insvp_fast.kernels.gpu import gate as kernel

from insvp_fast.runtime.activations import ACTIVATIONS
from insvp_fast.testing import relative_error
from tests.kernels import gate_checks
from tests.kernels.gate_checks import EPS, exact

# one rounding of 16 bits is half of eps, a whole one of bf16 in the interpreter, which truncates
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11 + 1e-6, torch.bfloat16: 2.0 ** (-7 if chip.INTERPRETED else -8)}

computed = functools.partial(gate_checks.computed, kernel)
each_kind = pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])


def operands(shape, gated, dtype, device):
    return [x if x is None else x.to(device) for x in gate_checks.operands(shape, gated, dtype)]


@each_kind
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (5, 7), (2, 17, 33), (3, 1025), (2, 8192)], ids=str)
def test_parity(shape, dtype, gated, device, poison):
    activations = ACTIVATIONS if dtype == torch.float32 else ("silu",)  # which differ before the result is rounded
    for activation, eps in itertools.product(activations, (None, EPS)):
        width = min(shape[-1], kernel.WIDEST[eps is not None])
        given = operands((*shape[:-1], width), gated, dtype, device)
        for value, truth in zip(computed(*given, activation, eps), exact(*given, activation, eps), strict=True):
            assert value.dtype == dtype and value.shape == truth.shape and value.isfinite().all()
            assert relative_error(value, truth) < TOLERANCE[dtype], (activation, eps)


def test_a_constant_hidden_layer_is_its_mean(device):
    """Without a rest of rounding, which 1/sigma would make large: 8 and its sums are exact, its mean has to be."""
    pre, factor = torch.full((2, 1000), 32.0, device=device), torch.full((2, 1000), 0.25, device=device)
    assert not kernel.gate_fwd(pre, factor, "silu", EPS).any()


@each_kind
def test_results_may_take_the_place_of_operands(gated, device):
    grad, pre, factor = operands((7, 530), gated, torch.bfloat16, device)
    expected = kernel.gate_fwd(pre, factor, "silu", EPS)
    gradients = kernel.gate_bwd(grad.mT.contiguous().mT, pre, factor, "silu", EPS)  # not contiguous: stays as it is
    d_pre, d_factor = kernel.gate_bwd(grad, pre, factor, "silu", EPS)
    assert d_pre is grad and torch.equal(d_pre, gradients[0])
    assert torch.equal(d_factor, gradients[1]) if gated else d_factor is None
    found = kernel.gate_fwd(pre, factor, "silu", EPS, keep=False)
    assert found is pre and torch.equal(found, expected)


def test_any_layout(device):
    given = operands((6, 40), True, torch.float32, device)
    strided = [x.mT.contiguous().mT for x in given]
    found = kernel.gate_fwd(*strided[1:], "silu", EPS), *kernel.gate_bwd(*strided, "silu", EPS)
    for value, expected in zip(found, computed(*given, "silu", EPS), strict=True):
        assert value.is_contiguous() and torch.equal(value, expected)


def test_nan_stays_in_its_row(device):
    for which, eps in itertools.product((0, 1, 2), (None, EPS)):
        given = operands((4, 70), True, torch.float32, device)
        clean = computed(*given, "silu", eps)
        given[which][2, 69] = float("nan")
        for value, before in zip(computed(*given, "silu", eps), clean, strict=True):
            others = torch.arange(4, device=device) != 2
            assert torch.equal(value[others], before[others])
            assert value[2].isnan().any() or torch.equal(value, before)  # the hidden layer has no gradient


def test_what_is_refused(device, monkeypatch):
    wide = torch.ones(1, 8193, device=device)
    for eps, widest in ((None, 8192), (EPS, 4096)):
        assert kernel.covers(widest, eps is not None) and not kernel.covers(widest + 1, eps is not None)
        with pytest.raises(ValueError, match=f"the width must be 1 to {widest}, got 8193"):
            kernel.gate_fwd(wide, None, "silu", eps)
    monkeypatch.setattr(chip, "INTERPRETED", False)
    wide = wide.cpu()
    for call in (lambda: kernel.gate_fwd(wide, None, "silu", None), lambda: kernel.gate_bwd(*[wide] * 3, "silu", None)):
        with pytest.raises(RuntimeError, match="gate: .*TRITON_INTERPRET"):
            call()
