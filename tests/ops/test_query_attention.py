"""query_attention against the formula in double precision."""

import pytest
import torch

from insvp_fast import ops
from insvp_fast.ops.heads import merge_heads
from insvp_fast.testing import assert_within_budget
from tests.gradients import DTYPES, copies, with_gradients


def formula(q, k, v, bias):  # [B, heads, T or S, d]
    """Attention whose scores of the first keys get a bias."""
    scores = 0.4 * q @ k.mT
    if bias is not None:
        n = min(bias.shape[2], k.shape[2])
        scores = torch.cat([scores[..., :n] + bias[..., :n].to(scores), scores[..., n:]], dim=-1)
    return merge_heads(scores.softmax(-1) @ v)


def bias_of(T, S):
    """Of all keys but two, which are prompts; none of the fewest keys."""
    return None if S == 5 else torch.randn(3, T, S - 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "S", "T", "num_keys"),
    [(0, 5, 1, None), (2, 9, 1, None), (3, 21, 4, None), (0, 5, 1, ()), (2, 9, 1, (9, 1)), (3, 21, 4, (4, 20, 11))],
)
def test_query_attention(dtype, B, S, T, num_keys):
    inputs = [torch.randn(B, n, width).to(dtype).requires_grad_() for n, width in ((T, 24), (S, 48))]
    bias = bias_of(T, S)

    def plain(q, kv):
        return formula(*(t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1))), bias)

    def image_by_image(q, kv):
        images = [plain(q[b : b + 1], kv[b : b + 1, :keys]) for b, keys in enumerate(num_keys)]
        return torch.cat([plain(q[:0], kv[:0]), *images])

    plain_of_each = plain if num_keys is None else image_by_image
    keys = None if num_keys is None else torch.tensor(num_keys, dtype=torch.int64)
    exact, rough = (with_gradients(plain_of_each, x) for x in (copies(inputs, torch.float64), inputs))
    fast = with_gradients(lambda q, kv: ops.query_attention(q, kv, 3, 0.4, num_keys=keys, bias=bias), inputs)
    for value, low, expected in zip(fast, rough, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, low, expected, dtype)


def test_a_bias_that_does_not_fit():
    q, kv = torch.randn(2, 1, 24), torch.randn(2, 5, 48)
    with pytest.raises(ValueError, match=r"bias has shape \(3, 2, 5\): expected \(3, 1\) and up to 5 keys"):
        ops.query_attention(q, kv, 3, 1.0, bias=torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="has to be frozen"):
        ops.query_attention(q, kv, 3, 1.0, bias=torch.zeros(3, 1, 5, requires_grad=True))


def test_each_image_has_a_key_even_without_queries():
    q, kv = torch.randn(2, 0, 24), torch.randn(2, 5, 48)
    with pytest.raises(ValueError, match=r"num_keys is \[0, 5\]: expected 1 to 5, queries to tokens"):
        ops.query_attention(q, kv, 3, 1.0, num_keys=torch.tensor([0, 5]))
