"""The Triton activations and their derivatives, also in 8 bits, against the formulas in float64."""

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import activation as kernel
from insvp_fast.kernels.gpu import chip

from insvp_fast.ops.mlp import CODE_OF_NAN, CODE_STEPS, CODE_ZERO, derivative_code, derivative_from_code
from insvp_fast.runtime.activations import activate, activate_bwd
from tests.activations import FORMULAS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# half a unit in the last place; a whole one of bf16, which the interpreter truncates
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11 + 1e-6, torch.bfloat16: 2.0 ** (-7 if chip.INTERPRETED else -8)}
each_activation = pytest.mark.parametrize("activation", FORMULAS)


def inputs(shape, dtype, device):
    return (3 * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)


@each_activation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 100), (2048,), (2049,), (0, 4), (1,)], ids=str)
def test_parity(shape, dtype, activation, device, poison):
    pre, grad = inputs(shape, dtype, device)
    hidden, d_pre = kernel.activation_fwd(pre, activation), kernel.activation_bwd(grad, pre, activation)
    assert hidden.dtype == d_pre.dtype == dtype and hidden.shape == d_pre.shape == shape
    (exact, slope), atol = (
        FORMULAS[activation](pre.double()),
        1e-7 if dtype != torch.float16 else 2**-24,
    )  # its smallest
    torch.testing.assert_close(hidden.double(), exact, rtol=ROUNDING[dtype], atol=atol)
    torch.testing.assert_close(d_pre.double(), grad.double() * slope, rtol=ROUNDING[dtype], atol=1e-6)


@each_activation
def test_every_bf16_number(activation, device):
    """All 65,536 of them, including infinities and NaN; PyTorch has NaN where the square of x overflows."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).to(device).float()
    hidden, (exact, slope) = kernel.activation_fwd(x, activation), FORMULAS[activation](x.double())
    torch.testing.assert_close(hidden.double(), exact, rtol=2e-6, atol=1e-7, equal_nan=True)
    slope = slope.masked_fill(activate_bwd(torch.ones_like(x), x, activation).isnan(), torch.nan)
    d = kernel.activation_bwd(torch.ones_like(x), x, activation)
    torch.testing.assert_close(d.double(), slope, rtol=1e-6, atol=1e-6, equal_nan=True)


@each_activation
def test_large_values_saturate(activation, device):
    x = torch.tensor([-140.0, -130.0, 30.0, 140.0], device=device)
    assert kernel.activation_fwd(x, activation).tolist() == [0, 0, 30, 140]
    assert kernel.activation_bwd(torch.ones_like(x), x, activation).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_place(dtype, device):
    pre, grad = inputs((3, 700), dtype, device)
    expected = kernel.activation_bwd(grad, pre, "silu")
    code = kernel.activation_fwd_code(pre, "silu")[1]
    from_code, again = kernel.activation_bwd_code(grad, code), grad.clone()
    assert kernel.activation_bwd_code(again, code, out=again) is again and torch.equal(again, from_code)
    assert kernel.activation_bwd(grad, pre, "silu", out=grad) is grad and torch.equal(grad, expected)


def test_out_must_fit(device):
    pre, grad = inputs((4, 6), torch.float32, device)
    for out in (grad.half(), grad[:2], grad.clone().t().contiguous().t()):
        with pytest.raises(ValueError, match="expected contiguous"):
            kernel.activation_bwd(grad, pre, "silu", out=out)


@each_activation
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_of_the_code(dtype, activation, device, poison):
    pre, grad = inputs((5, 333), dtype, device)
    hidden, code = kernel.activation_fwd_code(pre, activation)
    assert torch.equal(hidden, kernel.activation_fwd(pre, activation)) and code.dtype == torch.uint8
    expected, exact = derivative_code(pre, activation), CODE_STEPS * FORMULAS[activation](pre.double())[1]
    tie = (exact - exact.floor() - 0.5).abs() < 1e-3
    assert torch.equal(code[~tie], expected[~tie])
    assert (code.int() - expected.int()).abs().max() <= 1
    exact = grad.double() * derivative_from_code(expected).double()
    d_pre = kernel.activation_bwd_code(grad, expected)
    torch.testing.assert_close(d_pre.double(), exact, rtol=ROUNDING[dtype], atol=1e-7)
    assert d_pre.dtype == dtype


@each_activation
def test_the_code_is_off_by_half_a_step_at_most(activation, device):
    assert (kernel.STEPS.value, kernel.ZERO.value) == (CODE_STEPS, CODE_ZERO)
    x = torch.linspace(-8, 8, 20001, device=device)
    _, code = kernel.activation_fwd_code(x, activation)
    for codes in (code, derivative_code(x, activation)):
        off = (derivative_from_code(codes).double() - FORMULAS[activation](x.double())[1]).abs().max()
        assert off <= (0.5 + 1e-3) / CODE_STEPS
    assert code.min() > 0 and code.max() < 255
    ends = kernel.activation_fwd_code(torch.tensor([-20.0, 20.0], device=device), activation)[1]
    assert derivative_from_code(ends).tolist() == [0, 1]


def test_noncontiguous_inputs(device):
    pre, grad = inputs((6, 40), torch.float32, device)
    assert torch.equal(kernel.activation_fwd(pre.t(), "silu"), kernel.activation_fwd(pre, "silu").t())
    assert torch.equal(kernel.activation_bwd(grad.t(), pre.t(), "silu"), kernel.activation_bwd(grad, pre, "silu").t())


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(chip, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="activation: .*TRITON_INTERPRET"):
        kernel.activation_fwd(torch.ones(3), "silu")


@each_activation
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype, activation, device):
    assert kernel.NAN.value == CODE_OF_NAN
    pre = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 0.0], device=device).to(dtype)
    hidden, code = kernel.activation_fwd_code(pre, activation)
    x = pre.float()
    assert torch.equal(hidden.isfinite(), activate(x, activation).isfinite())
    grad, expected = torch.ones_like(pre), activate_bwd(torch.ones_like(x), x, activation)
    for d_pre in (kernel.activation_bwd(grad, pre, activation), kernel.activation_bwd_code(grad, code)):
        assert torch.equal(d_pre.isnan(), expected.isnan())
