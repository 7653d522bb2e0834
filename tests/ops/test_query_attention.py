"""query_attention against the formula in double precision."""

import pytest
import torch

from insvp_fast import ops
from insvp_fast.ops.heads import merge_heads
from insvp_fast.testing import assert_within_budget
from tests.gradients import DTYPES, copies, with_gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "T"), [(0, 5, 1), (2, 9, 1), (3, 21, 4)])
def test_query_attention(dtype, B, S, T):
    inputs = [torch.randn(B, n, width).to(dtype).requires_grad_() for n, width in ((T, 24), (S, 48))]

    def plain(q, kv):
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
        return merge_heads((0.4 * q @ k.mT).softmax(-1) @ v)

    exact, rough = with_gradients(plain, copies(inputs, torch.float64)), with_gradients(plain, inputs)
    fast = with_gradients(lambda q, kv: ops.query_attention(q, kv, 3, 0.4), inputs)
    for value, low, expected in zip(fast, rough, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, low, expected, dtype)
