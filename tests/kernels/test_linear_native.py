"""The native product and its epilogues against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from insvp_fast.runtime import native
from insvp_fast.runtime.activations import ACTIVATIONS
from insvp_fast.runtime.native.library import address, call, pointer
from insvp_fast.runtime.native.linear import _LINEAR
from insvp_fast.testing import assert_within_budget
from tests.activations import FORMULAS
from tests.kernels.native_checks import BF16, F32, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison", "one_thread")]  # an element left unwritten is NaN
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def inputs(M: int, K: int, N: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    """x in ``dtype``, the weight in fp32 with values of ``dtype``, and the bias in fp32."""
    torch.manual_seed(M + 10 * K + 100 * N)
    weight = (torch.randn(N, K) / max(K, 1) ** 0.5).to(dtype).float()
    return torch.randn(M, K).to(dtype), weight, torch.randn(N)


def assert_exact(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The error of sums in fp32, rounded once to ``dtype``."""
    assert out.shape == expected.shape and out.dtype == dtype and out.is_contiguous()
    excess = (out.double() - expected).norm() - 1e-6 * expected.norm()
    rounding = 0.0 if dtype == F32 else 2**-8 * expected.norm()
    assert excess <= rounding


def check(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
    y = native.linear(x, native.pack_linear(weight, x.dtype), bias, len(weight), dtype=dtype)
    assert_exact(y, x.double() @ weight.double().T + (0 if bias is None else bias.double()), dtype or x.dtype)


def check_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "gelu") -> None:
    packed, code = native.pack_linear(weight, x.dtype), ACTIVATIONS.index(activation)
    pre, hidden = native.linear_activation(x, packed, bias, len(weight), code)
    assert torch.equal(pre, native.linear(x, packed, bias, len(weight)))
    product = x.double() @ weight.double().T
    formula = FORMULAS[activation]
    assert_exact(hidden, formula(product if bias is None else product + bias.double())[0], x.dtype)
    nothing, same = native.linear_activation(x, packed, bias, len(weight), code, keep=False)
    assert nothing is None and torch.equal(same, hidden)
    assert_exact(native.linear_activation_bwd(x, packed, pre, code), product * formula(pre.double())[1], x.dtype)


@each_dtype
@pytest.mark.parametrize("M", [0, 1, 13, 111])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (33, 50), (512, 96), (601, 331), (31, 0), (0, 31)])
def test_parity(isa, dtype, M, K, N):
    x, weight, bias = inputs(M, K, N, dtype)
    check(x, weight, bias)
    check(x, weight, None)
    check(x, weight, bias, BF16 if dtype == F32 else F32)
    check_activation(x, weight, bias)
    check_activation(torch.randn(M, N).to(dtype), weight.T, None)  # the transposed weight, as in backward


@each_dtype
@pytest.mark.parametrize("N", [3072, 3080])
def test_a_large_argument_of_an_activation(isa, threads, dtype, N):
    """With matrix tiles, 4 MB of whole cache lines are written past the caches: the bits of a few rows at a time."""
    threads(2)
    x, weight, bias = inputs(700, 33, N, dtype)
    packed, code = native.pack_linear(weight, dtype), ACTIVATIONS.index("gelu")
    pre, hidden = native.linear_activation(x, packed, bias, N, code)
    parts = [native.linear_activation(part, packed, bias, N, code) for part in x.split(97)]
    assert torch.equal(pre, torch.cat([part for part, _ in parts]))
    assert torch.equal(hidden, torch.cat([part for _, part in parts]))


def test_a_large_argument_that_begins_within_a_cache_line(isa):
    M, K, N = 700, 33, 3072
    x, weight, bias = inputs(M, K, N, BF16)
    packed, code = native.pack_linear(weight, BF16), ACTIVATIONS.index("gelu")
    shifted, hidden = torch.empty(M * N + 1, dtype=BF16)[1:].view(M, N), torch.empty(M, N, dtype=BF16)
    pointers = [number for t in (x, packed) for number in pointer(t)] + [
        address(bias),
        *pointer(hidden),
        *pointer(shifted),
    ]
    call("linear", _LINEAR, *pointers, 1, code, M, N, K, M, 0, K)
    pre, expected = native.linear_activation(x, packed, bias, N, code)
    assert torch.equal(shifted, pre) and torch.equal(hidden, expected)


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_parity_of_activations(isa, dtype, activation):
    x, weight, bias = inputs(13, 33, 50, dtype)
    check_activation(3 * x, weight, bias, activation)


@each_dtype
@pytest.mark.parametrize(("K", "N"), [(768, 2304), (3072, 768), (1027, 1031)])
def test_parity_of_a_transformer(isa, dtype, K, N):
    check(*inputs(197 if isa == "generic" else 1000, K, N, dtype))


def test_bf16_within_the_budget_of_arithmetic(isa):
    """The whole path in bf16, including the rounding of the weight and of ``pre``."""
    x, weight, bias = torch.randn(197, 768), torch.randn(300, 768) / 768**0.5, torch.randn(300)
    grad, back = torch.randn(197, 50), torch.randn(300, 50) / 50**0.5
    leaf = (x.double() @ weight.double().T + bias).requires_grad_()
    exact = torch.nn.functional.gelu(leaf)
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad.double() @ back.double().T)
    leaf = torch.nn.functional.linear(x.to(BF16), weight.to(BF16), bias.to(BF16)).requires_grad_()
    plain = torch.nn.functional.gelu(leaf)
    (plain_grad,) = torch.autograd.grad(plain, leaf, grad.to(BF16) @ back.to(BF16).T)
    pre, hidden = native.linear_activation(x.to(BF16), native.pack_linear(weight, BF16), bias, 300)
    d_pre = native.linear_activation_bwd(grad.to(BF16), native.pack_linear(back, BF16), pre)
    assert_within_budget(hidden, plain, exact, BF16, "hidden")
    assert_within_budget(d_pre, plain_grad, exact_grad, BF16, "d_pre")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_to_the_last_bits(isa, activation):
    large = torch.logspace(-30, 18 if activation == "gelu_tanh" else 30, 1001)  # whose squares do not overflow
    x = torch.cat([torch.linspace(-15, 15, 300_001), large, -large])
    identity, code = native.pack_linear(torch.ones(1, 1)), ACTIVATIONS.index(activation)
    pre, hidden = native.linear_activation(x[:, None], identity, None, 1, code)
    slope = native.linear_activation_bwd(torch.ones(len(x), 1), identity, x[:, None], code)
    assert torch.equal(pre[:, 0], x)
    ulp, (exact, derivative) = 2**-23, FORMULAS[activation](x.double())
    # the rounding of the exponent becomes the relative error of exp: of -x*x/2, or of the argument of the sigmoid
    x = x.double()
    exponent = {"gelu": x**2 / 2, "gelu_tanh": 4 * (x + 0.045 * x**3).abs()}.get(activation, 2 * x.abs())
    least = 1e-37 if activation == "gelu" else 1e-36  # exp is 0 below -87
    assert ((hidden[:, 0] - exact).abs() <= ulp * (4 + exponent) * exact.abs() + least).all()
    assert ((slope[:, 0] - derivative).abs() <= 2 * ulp).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_bf16(isa, activation):
    x = torch.linspace(-12, 12, 100_001).to(BF16)[:, None]
    identity, code = native.pack_linear(torch.ones(1, 1), BF16), ACTIVATIONS.index(activation)
    _, hidden = native.linear_activation(x, identity, None, 1, code)
    slope = native.linear_activation_bwd(torch.ones_like(x), identity, x, code)
    tolerance = 2**-8 + 2e-4  # of rounding to bf16 and of the approximations
    exact, derivative = FORMULAS[activation](x.double())
    assert ((hidden - exact).abs() <= tolerance * exact.abs() + 1e-9).all()
    terms = derivative.abs() + 2 * (exact / x.double()).nan_to_num().abs()  # P(x) + x P'(x) may cancel
    assert ((slope - derivative).abs() <= tolerance * terms + 1e-34).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_their_tails(isa, activation):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 30.0, -140.0, 1e18, -1e18, inf, -inf, nan]]).T
    identity, code = native.pack_linear(torch.ones(1, 1)), ACTIVATIONS.index(activation)
    _, hidden = native.linear_activation(x, identity, None, 1, code)
    assert_close = torch.testing.assert_close
    expected = torch.tensor([[0.0, 30.0, 0.0, 1e18, 0.0, inf, nan, nan]]).T
    assert_close(hidden, expected, rtol=0, atol=0, equal_nan=True)
    slope = native.linear_activation_bwd(torch.ones_like(x), identity, x, code)
    expected = torch.tensor([[0.5, 1.0, 0.0, 1.0, 0.0, nan, nan, nan]]).T
    assert_close(slope, expected, rtol=0, atol=1e-11, equal_nan=True)


@each_dtype
def test_noncontiguous_inputs(isa, dtype):
    x, weight, bias = inputs(5 * 13, 300, 50, dtype)
    packed = native.pack_linear(weight, dtype)
    y = native.linear(x, packed, bias, 50)
    wide_weight, wide_bias = weight.repeat_interleave(3, 1)[:, ::3], bias.repeat_interleave(2)[::2]
    assert torch.equal(native.pack_linear(wide_weight, dtype), packed)
    assert torch.equal(native.pack_linear(weight.to(dtype), dtype), packed)
    assert torch.equal(native.linear(x.T.contiguous().T, packed, wide_bias, 50), y)

    images = torch.full((5, 17, 301), float("nan"), dtype=dtype)[:, 2:15, 1:]
    images.copy_(x.view(5, 13, 300))
    got = native.linear(images, packed, bias, 50)
    assert got.is_contiguous() and torch.equal(got, y.view(5, 13, 50))
    pre, hidden = native.linear_activation(images, packed, bias, 50)
    assert torch.equal(hidden.view(-1, 50), native.linear_activation(x, packed, bias, 50)[1])
    d_pre = native.linear_activation_bwd(images, packed, pre.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(d_pre.view(-1, 50), native.linear_activation_bwd(x, packed, pre.view(-1, 50)))
    assert torch.equal(native.linear(x[:1].expand(7, 300), packed, bias, 50), y[:1].expand(7, 50))
    assert native.linear(images[:, :0], packed, bias, 50).shape == (5, 0, 50)


@each_dtype
@pytest.mark.parametrize(("M", "K", "N"), [(8, 1100, 331), (450, 1501, 60), (1, 9, 2304)])
def test_same_bits_for_every_number_of_threads(isa, dtype, threads, M, K, N):
    x, weight, bias = inputs(M, K, N, dtype)
    runs = []
    for n in (1, 2, 3, 7):
        threads(n)
        packed = native.pack_linear(weight, dtype)
        pre, hidden = native.linear_activation(x, packed, bias, N)
        runs.append((packed, pre, hidden, native.linear_activation_bwd(x, packed, pre)))
    assert_same_bits(runs)
    rows = slice(M - 3, M) if M > 3 else slice(None)
    packed, pre, hidden, d_pre = runs[0]
    again = (
        *native.linear_activation(x[rows], packed, bias, N),
        native.linear_activation_bwd(x[rows], packed, pre[rows]),
    )
    assert_same_bits([again, (pre[rows], hidden[rows], d_pre[rows])])  # and the other rows change nothing


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_row(isa, dtype, bad):
    x, weight, bias = inputs(15, 301, 50, dtype)
    packed = native.pack_linear(weight, dtype)
    pre, _ = native.linear_activation(x, packed, bias, 50)
    x[7, 300] = bad
    for y in (*native.linear_activation(x, packed, bias, 50), native.linear_activation_bwd(x, packed, pre)):
        assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [7]


@each_dtype
def test_a_bad_weight_stays_in_its_column(isa, dtype):
    x, weight, bias = inputs(15, 301, 50, dtype)
    weight[3, 300] = float("nan")
    y = native.linear(x, native.pack_linear(weight, dtype), bias, 50)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [3]


def test_bf16_operands_and_a_weight_packed_for_fp32(isa):
    x, weight, bias = inputs(13, 301, 50, BF16)
    packed = native.pack_linear(weight)
    widened = native.linear(x.float(), packed, bias, 50)
    assert torch.equal(native.linear(x, packed, bias, 50, dtype=F32), widened)
    assert torch.equal(native.linear(x, packed, bias, 50), widened.to(BF16))


def test_the_dtype_of_a_packed_weight(isa):
    weight = torch.randn(50, 33)
    assert native.pack_linear(weight).dtype == F32
    assert native.pack_linear(weight, BF16).dtype == (BF16 if isa in ("avx512_bf16", "amx") else F32)


def test_wrong_arguments_are_refused():
    x, weight, bias = inputs(3, 33, 50)
    packed = native.pack_linear(weight)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float64"):
        native.pack_linear(weight.double())
    with pytest.raises(TypeError, match=r"operands cannot have dtype torch\.float16"):
        native.pack_linear(weight, torch.float16)
    with pytest.raises(ValueError, match="weight is on meta"):
        native.pack_linear(weight.to("meta"))
    with pytest.raises(ValueError, match=r"weight has shape \(50,\)"):
        native.pack_linear(bias)
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 3, 33\)"):
        native.linear(x[None, None], packed, bias, 50)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        native.linear(x.double(), packed, bias, 50)
    with pytest.raises(TypeError, match=r"the product cannot have dtype torch\.float16"):
        native.linear(x, packed, bias, 50, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"packed has dtype torch\.bfloat16"):
        native.linear(x, packed.bfloat16(), bias, 50)
    with pytest.raises(ValueError, match="packed has shape"):
        native.linear(x[:, :32], packed, bias, 50)
    with pytest.raises(ValueError, match=r"bias has shape \(49,\): expected \(50,\)"):
        native.linear_activation(x, packed, bias[:49], 50)
    with pytest.raises(ValueError, match=r"pre has shape \(2, 50\): expected \(3, 50\)"):
        native.linear_activation_bwd(x, packed, torch.zeros(2, 50))
    with pytest.raises(TypeError, match=r"pre has dtype torch\.float64"):
        native.linear_activation_bwd(x, packed, torch.zeros(3, 50).double())
