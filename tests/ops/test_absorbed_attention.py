"""absorbed_attention, by every implementation, against the formula in double precision."""

import pytest
import torch
import torch.nn.functional as F

from insvp_fast import ops
from insvp_fast.ops.attention import attention_reference
from insvp_fast.ops.heads import split_packed
from insvp_fast.runtime import native
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import DTYPES, copies, with_gradients
from tests.ops.test_query_attention import bias_of, formula

IMPLS = ("reference", "native") if native.available() else ("reference",)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("B", "S", "T", "num_keys"),
    [(0, 5, 1, None), (2, 9, 0, None), (2, 9, 1, None), (2, 9, 1, (9, 1)), (3, 21, 4, (4, 20, 11))],
)
def test_absorbed_attention(impl, dtype, affine, biased, B, S, T, num_keys):
    if impl == "native" and (biased or dtype == torch.float16):
        pytest.skip("not covered")
    x = torch.randn(B, S, 16).to(dtype).requires_grad_()
    weight = torch.randn(72, 16) / 4
    bias, gain, shift = (torch.randn(72), torch.rand(16) + 0.5, torch.randn(16)) if affine else (None,) * 3
    keys, of_scores = None if num_keys is None else torch.tensor(num_keys, dtype=torch.int64), None
    if biased:
        of_scores = bias_of(T, S)
    rows = [*enumerate(num_keys or [S] * B)]

    def plain(x):
        tokens = x * gain.to(x) + shift.to(x) if affine else x
        qkv = F.linear(tokens, weight.to(x), None if bias is None else bias.to(x))
        q, k, v = split_packed(qkv, 3)
        images = [formula(q[b : b + 1, :, :T], k[b : b + 1, :, :n], v[b : b + 1, :, :n], of_scores) for b, n in rows]
        return torch.cat(images) if images else attention_reference(qkv, 3, T, 0.4)

    exact, rough = (with_gradients(plain, inputs) for inputs in (copies([x], torch.float64), [x]))
    layer, rest = ops.FrozenLinear(weight, bias, gain, shift), {"num_keys": keys, "bias": of_scores, "impl": impl}
    fast = with_gradients(lambda x: ops.absorbed_attention(x, T, layer, 3, 0.4, **rest), [x])
    for value, low, expected in zip(fast, rough, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, low, expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_absorbed_attention_of_a_scaled_layer(impl):
    x, weight, bias, scale = torch.randn(2, 9, 16), torch.randn(72, 16), torch.randn(72), torch.randn(72)

    def formula_of_all(x):
        return attention_reference(scale.to(x) * F.linear(x, weight.to(x) / 4, bias.to(x)), 3, 2, 0.4)

    layer = ops.FrozenLinear(weight / 4, bias, scale=scale)
    exact = with_gradients(formula_of_all, [x.double().requires_grad_()])
    found = with_gradients(lambda x: ops.absorbed_attention(x, 2, layer, 3, 0.4, impl=impl), [x.requires_grad_()])
    for value, expected in zip(found, exact, strict=True):
        assert relative_error(value, expected) < 1e-5


def test_absorbed_attention_says_what_does_not_fit():
    x, layer = torch.randn(2, 5, 16), ops.FrozenLinear(torch.randn(72, 16))
    with pytest.raises(ValueError, match="num_queries=6"):
        ops.absorbed_attention(x, 6, layer, 3, 1.0)
    with pytest.raises(ValueError, match="D in 5 heads"):
        ops.absorbed_attention(x, 1, layer, 5, 1.0)
    with pytest.raises(ValueError, match="48 outputs: expected"):
        ops.absorbed_attention(x, 1, layer._replace(first=24), 2, 1.0)
    for impl in IMPLS:
        for keys in (torch.tensor([5]), torch.tensor([5, 6]), torch.tensor([5, 4], dtype=torch.int32)):
            with pytest.raises(ValueError, match="num_keys"):
                ops.absorbed_attention(x, 1, layer, 3, 1.0, num_keys=keys, impl=impl)
    for scores in (torch.zeros(3, 1, 6), torch.zeros(2, 1, 5), torch.zeros(3, 1, 5, requires_grad=True)):
        with pytest.raises(ValueError, match="bias"):
            ops.absorbed_attention(x, 1, layer, 3, 1.0, bias=scores)
    with pytest.raises(ValueError, match="requires_grad=False"):
        ops.absorbed_attention(x, 1, ops.FrozenLinear(torch.randn(72, 16, requires_grad=True)), 3, 1.0)
    with pytest.raises(ValueError, match=r"impl='flash': expected one of \['auto', 'native', 'reference'\]"):
        ops.absorbed_attention(x, 1, layer, 3, 1.0, impl="flash")


@pytest.mark.skipif(not native.available(), reason="needs the native library")
def test_native_says_what_it_does_not_cover():
    x, layer = torch.randn(2, 5, 16), ops.FrozenLinear(torch.randn(72, 16))
    with pytest.raises(RuntimeError, match='impl="native" takes no bias of the scores'):
        ops.absorbed_attention(x, 1, layer, 3, 1.0, bias=torch.zeros(3, 1, 5), impl="native")
    with pytest.raises(RuntimeError, match=r'impl="native" cannot compute in torch.float64'):
        ops.absorbed_attention(x.double(), 1, layer, 3, 1.0, impl="native")
