"""rotate against its formula in double precision and against timm's function, and as a PyTorch operator."""

import functools

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops.rotate import rotate_bwd_reference, rotate_reference
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import DTYPES, copies, with_gradients

SHAPES = [
    # B, prefix, N, L, parts, heads, d, whether each head has its own rotation
    (0, 1, 4, 2, 3, 2, 4, False),
    (2, 5, 9, 3, 3, 3, 8, False),
    (3, 0, 7, 0, 2, 2, 6, True),
    (1, 1, 0, 2, 3, 1, 2, False),
    (2, 1, 16, 10, 2, 1, 16, False),
]


def operands(B, prefix, N, L, parts, heads, d, own, dtype=torch.float32):
    torch.manual_seed(B + N + d)
    packed = torch.randn(B, prefix + N + L, parts * heads * d).to(dtype).requires_grad_()
    return packed, heads, torch.randn(*[heads] * own, N, 2 * d), prefix  # any numbers, not only sines and cosines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotate(shape, half, dtype):
    inputs = operands(*shape, dtype)
    exact = numbers(functools.partial(rotate_reference, half=half), double(inputs))
    plain = numbers(functools.partial(rotate_reference, half=half), inputs)
    found = numbers(functools.partial(ops.rotate, half=half), inputs)
    for value, expected, truth in zip(found, plain, exact, strict=True):
        assert value.dtype == dtype and value.is_contiguous()
        if dtype == torch.float32:
            assert relative_error(value, truth) < 1e-6
        else:
            assert_within_budget(value, expected, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
def test_in_16_bits_only_the_result_is_rounded(half, dtype):
    inputs = operands(2, 5, 90, 3, 3, 3, 8, False, dtype)
    grad = torch.randn(inputs[0].shape).to(dtype)
    found = ops.rotate(*inputs, half=half)
    results = found, *torch.autograd.grad(found, inputs[0], grad)
    packed, *rest = double(inputs)
    exact = rotate_reference(packed, *rest, half), rotate_bwd_reference(grad.double(), *rest, half)
    for value, expected in zip(results, exact, strict=True):  # now and then a tie is rounded to the other side
        assert relative_error(value, expected.to(dtype)) < torch.finfo(dtype).eps / 50


def numbers(function, inputs):
    packed, *rest = inputs
    return with_gradients(lambda x: function(x, *rest), [packed])


def double(inputs):
    packed, heads, rotation, prefix = inputs
    return (*copies([packed], torch.float64), heads, rotation.double(), prefix)


@pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
def test_the_formula_is_that_of_timm(half):
    packed, heads, rotation, prefix = double(operands(2, 1, 6, 2, 3, 2, 8, True))
    q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    rows = slice(prefix, prefix + 6)
    turned = [t.clone() for t in (q, k)]
    for t in turned:
        t[:, :, rows] = apply_rot_embed_cat(t[:, :, rows], rotation, half=half)
    expected = torch.stack([*turned, v]).permute(1, 3, 0, 2, 4).flatten(2)
    assert torch.equal(rotate_reference(packed, heads, rotation, prefix, half), expected)
    grad = torch.randn_like(packed)
    (written_out,) = torch.autograd.grad(expected, packed, grad)
    torch.testing.assert_close(rotate_bwd_reference(grad, heads, rotation, prefix, half), written_out)


def test_operator():
    arguments = *operands(*SHAPES[1]), True, "auto"
    for operator in (torch.ops.insvp_fast.rotate_fwd, torch.ops.insvp_fast.rotate_bwd):
        # how they are traced as a part of a whole model, tests/model/test_structures.py sees
        kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(operator.default, (arguments[0].detach(), *arguments[1:]), test_utils=kinds)
    inputs = double(operands(*SHAPES[1]))
    assert torch.autograd.gradcheck(lambda x: ops.rotate(x, *inputs[1:]), inputs[:1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation": torch.zeros(9, 10)}, "expected"),
        ({"rotation": torch.zeros(2, 9, 16)}, r"expected \[N, 2\*d\] or \[3, N, 2\*d\]"),
        ({"rotation": torch.zeros(9, 6), "packed": torch.zeros(2, 17, 27)}, "d even"),
        ({"rotation": torch.zeros(30, 16)}, "expected rows within 0 to 17"),
        ({"rotation": torch.zeros(9, 16, requires_grad=True)}, "frozen"),
        ({"first": -1}, "first=-1"),
        ({"impl": "fast"}, "impl='fast'"),
    ],
)
def test_what_does_not_fit(change, words):
    packed, heads, rotation, first = operands(*SHAPES[1])
    arguments = {"packed": packed, "num_heads": heads, "rotation": rotation, "first": first}
    with pytest.raises(ValueError, match=words):
        ops.rotate(**arguments | change)
