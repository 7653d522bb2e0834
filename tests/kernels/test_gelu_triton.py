"""The Triton GELU and its derivative, kept whole or in 8 bits, against the formula in double precision."""

import math

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip, gelu

from insvp_fast.ops.mlp import CODE_OF_NAN, CODE_STEPS, CODE_ZERO, gelu_code, gelu_from_code

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# half a unit in the last place; the interpreter truncates bf16
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11 + 1e-6, torch.bfloat16: 2.0 ** (-7 if chip.INTERPRETED else -8)}


def derivative(x):
    x = x.double()
    return torch.special.ndtr(x) + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def inputs(shape, dtype, device):
    return (3 * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 100), (2048,), (2049,), (0, 4), (1,)], ids=str)
def test_parity(shape, dtype, device, poison):
    pre, grad = inputs(shape, dtype, device)
    hidden, d_pre = gelu.gelu_fwd(pre), gelu.gelu_bwd(grad, pre)
    assert hidden.dtype == d_pre.dtype == dtype and hidden.shape == d_pre.shape == shape
    wide, atol = pre.double(), 1e-7 if dtype != torch.float16 else 2**-24  # fp16's least number
    torch.testing.assert_close(hidden.double(), wide * torch.special.ndtr(wide), rtol=ROUNDING[dtype], atol=atol)
    exact = grad.double() * derivative(pre)
    torch.testing.assert_close(d_pre.double(), exact, rtol=ROUNDING[dtype], atol=1e-6)


def test_every_bf16_number(device):
    """All 65 536 of them, with infinities and NaN as the formula has them."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).to(device).float()
    hidden, exact = gelu.gelu_fwd(x), x.double() * torch.special.ndtr(x.double())
    torch.testing.assert_close(hidden.double(), exact, rtol=1e-6, atol=1e-7, equal_nan=True)
    d = gelu.gelu_bwd(torch.ones_like(x), x)
    torch.testing.assert_close(d.double(), derivative(x), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_large_values_saturate(device):
    x = torch.tensor([-40.0, -15.0, 15.0, 40.0], device=device)
    assert gelu.gelu_fwd(x).tolist() == [0, 0, 15, 40]
    assert gelu.gelu_bwd(torch.ones_like(x), x).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_place(dtype, device):
    pre, grad = inputs((3, 700), dtype, device)
    expected = gelu.gelu_bwd(grad, pre)
    code = gelu.gelu_fwd_code(pre)[1]
    from_code, again = gelu.gelu_bwd_code(grad, code), grad.clone()
    assert gelu.gelu_bwd_code(again, code, out=again) is again and torch.equal(again, from_code)
    assert gelu.gelu_bwd(grad, pre, out=grad) is grad and torch.equal(grad, expected)


def test_out_must_fit(device):
    pre, grad = inputs((4, 6), torch.float32, device)
    for out in (grad.half(), grad[:2], grad.clone().t().contiguous().t()):
        with pytest.raises(ValueError, match="expected contiguous"):
            gelu.gelu_bwd(grad, pre, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_code_is_the_references(dtype, device, poison):
    pre, grad = inputs((5, 333), dtype, device)
    hidden, code = gelu.gelu_fwd_code(pre)
    assert torch.equal(hidden, gelu.gelu_fwd(pre)) and code.dtype == torch.uint8
    expected, exact = gelu_code(pre), CODE_STEPS * derivative(pre)
    tie = (exact - exact.floor() - 0.5).abs() < 1e-3
    assert torch.equal(code[~tie], expected[~tie])
    assert (code.int() - expected.int()).abs().max() <= 1
    exact = grad.double() * gelu_from_code(expected).double()
    d_pre = gelu.gelu_bwd_code(grad, expected)
    torch.testing.assert_close(d_pre.double(), exact, rtol=ROUNDING[dtype], atol=1e-7)
    assert d_pre.dtype == dtype


def test_the_code_is_half_a_step_off_at_most(device):
    assert (gelu.STEPS.value, gelu.ZERO.value) == (CODE_STEPS, CODE_ZERO)
    x = torch.linspace(-8, 8, 20001, device=device)
    _, code = gelu.gelu_fwd_code(x)
    for codes in (code, gelu_code(x)):
        off = (gelu_from_code(codes).double() - derivative(x)).abs().max()
        assert off <= (0.5 + 1e-3) / CODE_STEPS
    assert code.min() > 0 and code.max() < 255
    ends = gelu.gelu_fwd_code(torch.tensor([-9.0, 9.0], device=device))[1]
    assert gelu_from_code(ends).tolist() == [0, 1]


def test_layouts_are_made_contiguous(device):
    pre, grad = inputs((6, 40), torch.float32, device)
    assert torch.equal(gelu.gelu_fwd(pre.t()), gelu.gelu_fwd(pre).t())
    assert torch.equal(gelu.gelu_bwd(grad.t(), pre.t()), gelu.gelu_bwd(grad, pre).t())


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(chip, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="gelu: .*TRITON_INTERPRET"):
        gelu.gelu_fwd(torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype, device):
    assert gelu.NAN.value == CODE_OF_NAN
    pre = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 0.0], device=device).to(dtype)
    hidden, code = gelu.gelu_fwd_code(pre)
    assert torch.equal(hidden.isfinite(), torch.nn.functional.gelu(pre.float()).isfinite())
    grad, x = torch.ones_like(pre), pre.float().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x), x, grad.float())
    for d_pre in (gelu.gelu_bwd(grad, pre), gelu.gelu_bwd_code(grad, code)):
        assert torch.equal(d_pre.isnan(), expected.isnan())
