"""The native product against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from insvp_fast import native

F32 = torch.float32

pytestmark = pytest.mark.usefixtures("poison")  # an element left unwritten is NaN
needs_library = pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))


def linear_inputs(M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(M + 10 * K + 100 * N)
    return torch.randn(M, K), torch.randn(N, K) / max(K, 1) ** 0.5, torch.randn(N)


def assert_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    y = native.linear(x, native.pack_linear(weight), bias, len(weight))
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.shape == expected.shape and y.dtype == F32 and y.is_contiguous()
    assert (y.double() - expected).norm() <= 1e-6 * expected.norm()


@needs_library
@pytest.mark.parametrize("M", [0, 1, 5, 6, 7, 13, 250])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (33, 50), (256, 96), (257, 7), (700, 331), (31, 0), (0, 31)])
def test_linear(isa, M, K, N):
    x, weight, bias = linear_inputs(M, K, N)
    assert_product(x, weight, bias)
    assert_product(x, weight, None)
    assert_product(torch.randn(M, N), weight.T, None)  # the weight of backward


@needs_library
@pytest.mark.parametrize(("K", "N"), [(768, 2304), (2304, 768), (768, 3072), (3072, 768), (1027, 1031)])
def test_linear_of_a_transformer(isa, K, N):
    assert_product(*linear_inputs(1576 if isa == "avx2" else 197, K, N))


@needs_library
def test_linear_of_noncontiguous_inputs():
    x, weight, bias = linear_inputs(13, 300, 50)
    y = native.linear(x, native.pack_linear(weight), bias, 50)
    wide_weight, wide_bias = weight.repeat_interleave(3, 1)[:, ::3], bias.repeat_interleave(2)[::2]
    assert torch.equal(native.linear(x.T.contiguous().T, native.pack_linear(wide_weight), wide_bias, 50), y)


@needs_library
@pytest.mark.parametrize(("M", "K", "N"), [(8, 700, 331), (450, 300, 200), (1, 9, 2304)])
def test_linear_gives_the_same_bits_for_every_number_of_threads(isa, threads, M, K, N):
    x, weight, bias = linear_inputs(M, K, N)
    runs = []
    for n in (1, 2, 3, 7):
        threads(n)
        runs.append(native.linear(x, native.pack_linear(weight), bias, N))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    row = native.linear(x[-1:], native.pack_linear(weight), bias, N)
    assert torch.equal(row, runs[0][-1:])  # nor do the other rows matter


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_row(isa, bad):
    x, weight, bias = linear_inputs(15, 300, 50)
    x[7, 290] = bad
    y = native.linear(x, native.pack_linear(weight), bias, 50)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [7]


@needs_library
def test_linear_refuses_wrong_arguments():
    x, weight, bias = linear_inputs(3, 33, 50)
    packed = native.pack_linear(weight)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.bfloat16"):
        native.pack_linear(weight.bfloat16())
    with pytest.raises(ValueError, match="weight is on meta"):
        native.pack_linear(weight.to("meta"))
    with pytest.raises(ValueError, match=r"weight has shape \(50,\)"):
        native.pack_linear(bias)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 33\)"):
        native.linear(x[None], packed, bias, 50)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        native.linear(x.double(), packed, bias, 50)
    with pytest.raises(ValueError, match="packed has shape"):
        native.linear(x[:, :32], packed, bias, 50)
    with pytest.raises(ValueError, match=r"bias has shape \(49,\), expected \(50,\)"):
        native.linear(x, packed, bias[:49], 50)
