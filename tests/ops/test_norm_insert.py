"""norm_insert against its formula in double precision, and as a PyTorch operator."""

import pytest
import torch
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops.norm_insert import norm_insert_reference
from insvp_fast.testing import relative_error
from tests.gradients import copies, with_gradients

IMPLS = ("triton", "reference")


@pytest.mark.parametrize("L", [None, 0, 1, 9])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("compiled", "center"), [(False, True), (False, False), (True, True)])
def test_norm_insert(L, branch, compiled, center):
    weight, bias = torch.randn(24), torch.randn(24)
    inputs = [torch.randn(2, 7, 24, requires_grad=True)]
    inputs += [torch.randn(2, 7, 24, requires_grad=True)] * branch + [
        torch.randn(2, L or 0, 24, requires_grad=True)
    ] * (L is not None)

    def run(function, tensors):
        tensors = list(tensors)
        residual, added = tensors.pop(0), tensors.pop(0) if branch else None
        prompts, affine = tensors.pop() if tensors else None, (weight.to(residual), bias.to(residual))
        return function(residual, added, prompts, *affine, 1e-6, center=center)

    def fast(*t):
        return run(ops.norm_insert, t)

    exact = with_gradients(lambda *t: run(norm_insert_reference, t), copies(inputs, torch.float64))
    values = with_gradients(torch.compile(fast, fullgraph=True, backend="aot_eager") if compiled else fast, inputs)
    for value, expected in zip(values, exact, strict=True):
        assert value.shape == expected.shape and relative_error(value, expected) < 1e-5


@pytest.mark.parametrize(("affine", "center"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("branch", [True, False])
def test_norm_insert_gradcheck_and_opcheck(affine, branch, center):
    residual, added, prompts = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 3, 2))
    weights = [torch.randn(5, dtype=torch.float64) if affine else None for _ in range(2)]
    added = added if branch else None
    given = [t for t in (residual, added, prompts) if t is not None]

    def run(residual, *rest):
        return ops.norm_insert(residual, rest[0] if branch else None, rest[-1], *weights, 1e-6, center=center)

    assert torch.autograd.gradcheck(run, given)
    forward, backward = torch.ops.insvp_fast.norm_insert_fwd.default, torch.ops.insvp_fast.norm_insert_bwd.default
    tensors = [None if t is None else t.detach() for t in (residual, added, prompts)]
    opcheck(forward, (*tensors, *weights, 1e-6, torch.float64, center, "auto"))
    _, normed, xhat, rstd = forward(*tensors, *weights, 1e-6, torch.float64, center, "auto")
    for grad in (tensors[0], None):
        kept = xhat if affine else normed
        dtypes = torch.float64, torch.float32
        opcheck(backward, (grad, torch.randn_like(normed), kept, rstd, weights[0], 3, *dtypes, center, "auto"))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("branch", [True, False])
def test_the_kernels_of_norm_insert_fit_in(affine, branch, center):
    """What runs on a GPU, with the kernels interpreted, against what the operator does everywhere."""
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    residual, added, prompts = (torch.randn(2, n, 24) for n in (3, 3, 2))
    weights = [torch.randn(24) if affine else None for _ in range(2)]
    arguments = residual, added if branch else None, prompts, *weights, 1e-6, torch.float32, center
    forward = [torch.ops.insvp_fast.norm_insert_fwd(*arguments, impl) for impl in IMPLS]
    _, normed, xhat, rstd = forward[1]
    kept, grad_normed = xhat if affine else normed, torch.randn_like(normed)
    grads = [
        torch.ops.insvp_fast.norm_insert_bwd(
            grad, grad_normed, kept, rstd, weights[0], 3, torch.float32, branch_dtype, center, impl
        )
        for grad, branch_dtype in ((residual, torch.float32), (None, torch.float16))
        for impl in IMPLS
    ]
    for values, expected in (forward, grads[:2], grads[2:]):
        for value, exact in zip(values, expected, strict=True):
            assert value.dtype == exact.dtype and value.shape == exact.shape
            assert relative_error(value, exact) < (1e-3 if value.dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_norm_insert_refuses_a_norm_that_is_trained(trained):
    """Which would have no gradient."""
    affine = {name: torch.ones(8, requires_grad=name == trained) for name in ("weight", "bias")}
    with pytest.raises(ValueError, match=f"{trained} requires a gradient: ops.norm_insert is for frozen norms, use F"):
        ops.norm_insert(torch.randn(2, 3, 8), None, None, **affine, eps=1e-6)
    with torch.no_grad():
        ops.norm_insert(torch.randn(2, 3, 8), None, None, **affine, eps=1e-6)


def test_norm_insert_keeps_the_stream_wide_and_the_product_narrow():
    residual, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    stream, normed = ops.norm_insert(residual, branch, None, torch.ones(8), torch.zeros(8), 1e-6, dtype=torch.bfloat16)
    assert stream.dtype == torch.float32 and normed.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_prompts_have_gradients_in_their_own_dtype(dtype):
    residual, prompts = torch.randn(2, 7, 24), torch.randn(2, 3, 24)
    weight, grad = torch.randn(24), torch.randn(2, 10, 24)

    def gradient(prompts):
        prompts = prompts.detach().requires_grad_()
        _, normed = ops.norm_insert(residual, None, prompts, weight, None, 1e-6)
        return torch.autograd.grad(normed, prompts, grad)[0]

    prompts = prompts.to(dtype)
    found = gradient(prompts)
    assert found.dtype == dtype and relative_error(found, gradient(prompts.float())) < 1e-2
