"""The Triton rotate against its formula in double precision."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip
from insvp_fast.kernels.gpu import rotate as kernel

from insvp_fast import ops
from tests.kernels.rotate_checks import SHAPES, assert_rotated, operands

F32 = torch.float32
# half a unit in the last place; a whole one of bf16, which the interpreter truncates
ROUNDING = {F32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2.0 ** (-7 if chip.INTERPRETED else -8)}
each_pairing = pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])


@each_pairing
@pytest.mark.parametrize("own", [False, True], ids=["one for all heads", "one for each"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, own, half, device, poison):
    given = operands(*shape, own, dtype, device)
    for forward in (True, False):
        found = kernel.rotate(*given, half=half, forward=forward)
        assert_rotated(found, given, half, forward, ROUNDING[dtype])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@each_pairing
def test_a_number_that_is_not_finite_reaches_its_pair_alone(half, device):
    x, *rest = operands(2, 9, 1, 5, 2, 2, 6, False, F32, device)
    clean = kernel.rotate(x, *rest, half=half, forward=True)
    x[1, 2, 6 + 1] = float("nan")  # of the second head of the queries
    x[0, 0, 3] = float("inf")  # of a prefix token
    found = kernel.rotate(x, *rest, half=half, forward=True)
    reached = torch.zeros(found.shape, dtype=torch.bool, device=device)
    reached[1, 2, [6 + 1, 6 + (4 if half else 0)]] = True
    assert torch.equal(found.isnan(), reached) and found[0, 0, 3] == float("inf")
    reached[0, 0, 3] = True
    assert torch.equal(found[~reached], clean[~reached])


def test_any_layout(device):
    x, heads, rotation, first = operands(3, 6, 1, 4, 2, 2, 8, True, F32, device)
    for half, forward in itertools.product((True, False), repeat=2):
        expected = kernel.rotate(x, heads, rotation, first, half=half, forward=forward)
        strided = x.mT.contiguous().mT, heads, rotation.mT.contiguous().mT, first
        found = kernel.rotate(*strided, half=half, forward=forward)
        assert torch.equal(found, expected) and found.is_contiguous()


@each_pairing
def test_a_rotation_of_16_bits(half, device):
    """As models in bf16 have it: its numbers are those of the same rotation in fp32."""
    x, heads, rotation, first = operands(2, 9, 1, 5, 2, 2, 6, True, torch.bfloat16, device)
    found, expected = (
        kernel.rotate(x, heads, other, first, half=half, forward=True)
        for other in (rotation.bfloat16(), rotation.bfloat16().float())
    )
    assert torch.equal(found, expected)


@each_pairing
def test_the_operation(half, device):
    x, *rest = operands(2, 9, 1, 5, 2, 2, 6, False, F32, device)
    x.requires_grad_()
    found = ops.rotate(x, *rest, half=half, impl="triton")
    grad = torch.randn_like(found)
    assert torch.equal(found, kernel.rotate(x.detach(), *rest, half=half, forward=True))
    (d_x,) = torch.autograd.grad(found, x, grad)
    assert torch.equal(d_x, kernel.rotate(grad, *rest, half=half, forward=False))


def test_what_is_refused(monkeypatch, device):
    x, heads, rotation, first = operands(1, 2, 0, 1, 2, 1, 1026, False, F32, device)
    with pytest.raises(ValueError, match="an even width of 2 to 1024, got 1026"):
        kernel.rotate(x, heads, rotation, first, half=True, forward=True)
    with pytest.raises(RuntimeError, match='impl="triton" does not cover heads of width 1026'):
        ops.rotate(x, heads, rotation, first, impl="triton")
    with pytest.raises(RuntimeError, match='impl="triton" cannot compute in torch.float64: expected torch.float32'):
        ops.rotate(x, heads, rotation.double(), first, impl="triton")
    monkeypatch.setattr(chip, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="rotate: .*TRITON_INTERPRET"):
        kernel.rotate(x.cpu(), heads, rotation, first, half=True, forward=True)
