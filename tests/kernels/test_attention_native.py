"""The native attention against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.runtime import native
from insvp_fast.testing import assert_within_budget, relative_error
from tests.kernels.native_checks import BF16, F32, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]  # an element left unwritten is NaN
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def inputs(B: int, S: int, T: int, heads: int, d: int, dtype: torch.dtype, size: float = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(B + 10 * S + 100 * T)
    return (size * torch.randn(B, S, 3 * heads * d)).to(dtype), torch.randn(B, T, heads * d).to(dtype)


def expected(qkv: Tensor, grad: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """The result and the gradient by autograd through the definition, in the dtype of the operands."""
    x = qkv.detach().clone().requires_grad_()
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in x.chunk(3, dim=-1))
    scores = scale * (q[:, :, : grad.shape[1]] @ k.transpose(-1, -2))
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(grad.shape)
    out.backward(grad)
    return out.detach(), x.grad


def computed(qkv: Tensor, grad: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    shape = heads, grad.shape[1], scale
    return native.attention_fwd(qkv, *shape), native.attention_bwd(grad, qkv, *shape)


def check(qkv: Tensor, grad: Tensor, heads: int, scale: float, tolerance: float = 1e-6) -> None:
    exact, plain = expected(qkv.double(), grad.double(), heads, scale), expected(qkv, grad, heads, scale)
    T = grad.shape[1]
    for value, rough, wide in zip(computed(qkv, grad, heads, scale), plain, exact, strict=True):
        assert value.shape == wide.shape and value.dtype == qkv.dtype and value.is_contiguous()
        for part, rough_part, wide_part in zip(*(t.chunk(3, -1) for t in (value, rough, wide)), strict=True):
            if qkv.dtype == F32:
                assert relative_error(part, wide_part) <= tolerance
            else:
                assert_within_budget(part, rough_part, wide_part, qkv.dtype)
    assert not value[:, T:, : value.shape[-1] // 3].any()  # no query, no gradient


SHAPES = [
    # B, S, T, heads, d
    (0, 5, 4, 2, 16),
    (1, 1, 1, 1, 8),
    (3, 1, 0, 2, 8),
    (2, 7, 0, 3, 16),
    (1, 33, 1, 2, 64),
    (3, 17, 17, 1, 80),
    (1, 16, 9, 3, 16),
    (1, 206, 197, 2, 64),
    (2, 300, 99, 1, 80),
    (1, 97, 96, 1, 48),
    (2, 50, 49, 2, 5),
    (1, 21, 20, 1, 1),
]


@each_dtype
@pytest.mark.parametrize(("B", "S", "T", "heads", "d"), SHAPES)
def test_parity(isa, dtype, B, S, T, heads, d):
    check(*inputs(B, S, T, heads, d, dtype), heads, d**-0.5)


@each_dtype
@pytest.mark.parametrize("size", [0.0, 4.5, 30.0])
def test_large_scores(isa, dtype, size):
    """Scores of ±80 and ±3500, whose exponentials would overflow if the largest score were not subtracted."""
    qkv, grad = inputs(1, 65, 60, 2, 16, dtype, size)
    # the rounding of the scores, 6e-8 of their size, becomes the relative error of the exponentials
    check(qkv, grad, 2, 1.0, tolerance=1e-6 + 1e-6 * size**2)


@each_dtype
def test_a_negative_scale(isa, dtype):
    check(*inputs(1, 37, 30, 2, 24, dtype), 2, -0.7)


def test_the_exponential_function(isa):
    """Two keys whose scores differ by x have the probabilities 1 and e^x over their sum."""
    x = -torch.cat([torch.logspace(-8, 1.938, 3000), torch.linspace(0, 86, 2000)])
    qkv = torch.zeros(len(x), 2, 3)
    qkv[:, 0, 0], qkv[:, 1, 1], qkv[:, 1, 2] = x, 1, 1  # q = x, k = 0 and 1, v = 0 and 1
    e = x.double().exp()
    values, exact = native.attention_fwd(qkv, 1, 1, 1.0)[:, 0, 0].double(), e / (1 + e)
    assert ((values - exact).abs() <= 4e-7 * exact).all()
    qkv[:, 0, 0] = -1000
    assert not native.attention_fwd(qkv, 1, 1, 1.0).any()


@each_dtype
def test_same_bits_for_every_number_of_threads(isa, threads, dtype):
    qkv, grad = inputs(3, 53, 50, 2, 32, dtype)
    runs = []
    for n in (1, 2, 3, 7):
        threads(n)
        runs.append(computed(qkv, grad, 2, 0.2))
    assert_same_bits(runs)
    alone = computed(qkv[2:], grad[2:], 2, 0.2)  # and the other images change nothing
    assert all(torch.equal(a, b[2:]) for a, b in zip(alone, runs[0], strict=True))


@each_dtype
@pytest.mark.parametrize(("S", "T", "keys"), [(21, 12, (12, 21, 13)), (66, 65, (65, 66, 65)), (19, 1, (1, 18, 2))])
def test_padding_is_not_read(isa, threads, dtype, S, T, keys):
    qkv, grad = inputs(3, S, T, 2, 24, dtype)
    alone = [computed(qkv[b : b + 1, :n], grad[b : b + 1], 2, 0.2) for b, n in enumerate(keys)]
    for image, n in zip(qkv, keys, strict=True):
        image[n:] = float("nan")
    for n in (1, 2, 5):
        threads(n)
        out = native.attention_fwd(qkv, 2, T, 0.2, torch.tensor(keys))
        d_qkv = native.attention_bwd(grad, qkv, 2, T, 0.2, torch.tensor(keys))
        for b, (right, d_right) in enumerate(alone):
            assert torch.equal(out[b], right[0]) and torch.equal(d_qkv[b, : keys[b]], d_right[0])
            assert not d_qkv[b, keys[b] :].any()


@each_dtype
def test_noncontiguous_inputs(dtype):
    qkv, grad = inputs(2, 21, 12, 3, 8, dtype)
    strided = qkv.repeat_interleave(2, 1)[:, ::2], grad.transpose(0, 2).contiguous().transpose(0, 2)
    assert_same_bits([computed(*strided, 3, 0.3), computed(qkv, grad, 3, 0.3)])


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_bad_value_stays_in_its_image_and_head(isa, threads, dtype, bad, part):
    threads(1)  # so that all heads use the same scratch memory
    heads, d = 3, 8
    qkv, grad = inputs(3, 37, 37, heads, d, dtype)
    clean = computed(qkv, grad, heads, 0.3)
    qkv.view(3, 37, 3, heads, d)[1, 20, part, 1, 3] = bad
    for value, right in zip(computed(qkv, grad, heads, 0.3), clean, strict=True):
        same = (value == right).unflatten(-1, (-1, heads, d)).transpose(2, 3)  # [B, tokens, heads, parts, d]
        assert not same[1, :, 1].all()
        same[1, :, 1] = True
        assert same.all()


@each_dtype
def test_a_bad_query_stays_in_its_row(isa, dtype):
    qkv, _ = inputs(1, 40, 37, 1, 16, dtype)
    qkv[0, 36, 0] = float("nan")
    out = native.attention_fwd(qkv, 1, 37, 0.3)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 36]] and out[0, 36].isnan().all()


def test_agreement_with_the_reference():
    qkv, grad = inputs(2, 21, 12, 3, 8, F32)
    out, d_qkv = computed(qkv, grad, 3, 0.3)
    torch.testing.assert_close(out, attention_reference(qkv, 3, 12, 0.3))
    torch.testing.assert_close(d_qkv, attention_bwd_reference(grad, qkv, 3, 12, 0.3))


def test_wrong_arguments_are_refused():
    qkv, grad = inputs(2, 21, 12, 3, 8, F32)
    with pytest.raises(TypeError, match=r"qkv has dtype torch\.float64"):
        native.attention_fwd(qkv.double(), 3, 12, 0.3)
    with pytest.raises(ValueError, match="qkv is on meta"):
        native.attention_fwd(qkv.to("meta"), 3, 12, 0.3)
    with pytest.raises(ValueError, match=r"qkv has shape \(21, 72\)"):
        native.attention_fwd(qkv[0], 3, 12, 0.3)
    with pytest.raises(ValueError, match="in 5 equal heads"):
        native.attention_fwd(qkv, 5, 12, 0.3)
    with pytest.raises(ValueError, match="num_queries is 22: expected 0 to 21"):
        native.attention_fwd(qkv, 3, 22, 0.3)
    for wrong in ([21, 22], [11, 21], [0, 12]):
        with pytest.raises(ValueError, match=r"num_keys is \[.*\]: expected 12 to 21, queries to tokens"):
            native.attention_fwd(qkv, 3, 12, 0.3, torch.tensor(wrong))
    with pytest.raises(TypeError, match=r"num_keys has dtype torch\.int32: expected torch\.int64"):
        native.attention_bwd(grad, qkv, 3, 12, 0.3, torch.tensor([12, 21], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"grad has dtype torch\.bfloat16"):
        native.attention_bwd(grad.bfloat16(), qkv, 3, 12, 0.3)
    with pytest.raises(ValueError, match=r"grad has shape \(2, 11, 24\): expected \(2, 12, 24\)"):
        native.attention_bwd(grad[:, :11], qkv, 3, 12, 0.3)
