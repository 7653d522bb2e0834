"""The native norm_insert against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch

from insvp_fast.ops.norm_insert import norm_insert_bwd_reference
from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, assert_close, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]  # an element left unwritten is NaN


def inputs(B, T, L, D, dtypes=(F32, F32, F32)):
    shapes = [(B, T, D), (B, T, D), (B, L, D)]
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize(
    ("B", "T", "L", "D"), [(0, 3, 2, 8), (1, 1, 0, 1), (3, 5, 2, 24), (2, 7, 9, 100), (2, 3, 1, 768)]
)
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, F32), (F32, BF16, BF16), (BF16, BF16, BF16)], ids=str)
@pytest.mark.parametrize(("affine", "center"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("branch", [True, False])
def test_parity(isa, B, T, L, D, dtypes, affine, center, branch):
    if D == 1 and not center:
        pytest.skip("the gradient of x / |x| is rounding alone")
    residual, added, prompts = inputs(B, T, L, D, dtypes)
    added = added if branch else None
    weight, bias = (torch.randn(D), torch.randn(D)) if affine else (None, None)
    dtype = dtypes[1]
    total, normed, xhat, rstd = native.norm_insert_fwd(residual, added, prompts, weight, bias, 1e-6, dtype, center)

    tokens = torch.cat([residual.double() + (added.double() if branch else 0), prompts.double()], 1)
    centered = tokens - tokens.mean(-1, keepdim=True) if center else tokens
    sigma = 1 / (centered.square().mean(-1) + 1e-6).sqrt()
    exact = centered * sigma[..., None]
    assert (total.numel() > 0) == (branch and B > 0)
    if branch:
        assert_close("total", total, tokens[:, :T])
    assert_close("rstd", rstd, sigma)
    assert_close("normed", normed, exact * weight + bias if affine else exact)
    kept = xhat if affine else normed
    assert_close("xhat", kept, exact)

    grad_total, grad_normed = torch.randn(B, T, D).to(dtypes[0]), torch.randn(B, T + L, D).to(dtype)
    for grad in (grad_total, None):
        d_residual, d_branch, d_prompts = native.norm_insert_bwd(
            grad, grad_normed, kept, rstd, weight, T, dtypes[0], dtype, center
        )
        expected = norm_insert_bwd_reference(
            torch.zeros(B, T, D, dtype=torch.float64) if grad is None else grad.double(),
            grad_normed.double(),
            kept.double(),
            rstd.double()[..., None],
            torch.ones(D) if weight is None else weight.double(),
            center,
        )
        assert (d_residual.dtype, d_prompts.dtype) == (dtypes[0], dtypes[0])
        _, _, rounded = native.norm_insert_bwd(grad, grad_normed, kept, rstd, weight, T, dtypes[0], dtype, center, BF16)
        assert rounded.dtype == BF16
        assert_close("d_prompts in bf16", rounded, expected[1])
        assert_close("d_residual", d_residual, expected[0])
        assert_close("d_prompts", d_prompts, expected[1])
        if dtype == dtypes[0]:
            assert d_branch.numel() == 0
        else:
            assert_close("d_branch", d_branch, expected[0])


def test_a_large_mean_does_not_cost_the_variance(isa):
    residual = 1e4 + torch.randn(1, 3, 64)
    _, normed, *_ = native.norm_insert_fwd(residual, None, None, None, None, 0.0, F32)
    exact = torch.nn.functional.layer_norm(residual.double(), (64,), eps=0.0)
    assert (normed - exact).abs().max() < 1e-3  # the rounding of the mean, 1e4 * 2**-24


def test_prompts_of_one_image_for_all():
    residual, branch, prompts = inputs(3, 4, 2, 24)
    expanded = prompts[:1].expand(3, -1, -1)
    outputs = native.norm_insert_fwd(residual, branch, expanded, None, None, 1e-6, F32)
    whole = native.norm_insert_fwd(residual, branch, expanded.contiguous(), None, None, 1e-6, F32)
    assert_same_bits([outputs, whole])


def test_same_bits_for_every_number_of_threads(isa, threads):
    residual, branch, prompts = inputs(3, 5, 2, 100)
    runs = []
    for n in (1, 2, 3, 64):
        threads(n)
        total, normed, _, rstd = native.norm_insert_fwd(residual, branch, prompts, None, None, 1e-6, F32)
        runs.append([total, normed, *native.norm_insert_bwd(total, normed + 1, normed, rstd, None, 5, F32, BF16)])
    assert_same_bits(runs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_row(isa, bad):
    residual, branch, prompts = inputs(2, 5, 2, 40)
    branch[1, 3, 39] = bad
    _, normed, *_ = native.norm_insert_fwd(residual, branch, prompts, None, None, 1e-6, F32)
    assert (~normed.isfinite()).any(-1).nonzero().tolist() == [[1, 3]]


def test_wrong_arguments_are_refused():
    residual, branch, prompts = inputs(2, 5, 2, 8)
    with pytest.raises(ValueError, match=r"branch has shape \(2, 4, 8\): expected \(2, 5, 8\)"):
        native.norm_insert_fwd(residual, branch[:, :4], prompts, None, None, 1e-6, F32)
    with pytest.raises(TypeError, match=r"residual has dtype torch\.float64"):
        native.norm_insert_fwd(residual.double(), branch, prompts, None, None, 1e-6, F32)
    with pytest.raises(ValueError, match=r"residual has shape \(5, 8\): expected \[B, T, D\]"):
        native.norm_insert_fwd(residual[0], branch, prompts, None, None, 1e-6, F32)
    with pytest.raises(TypeError, match=r"normed cannot have dtype torch\.float16"):
        native.norm_insert_fwd(residual, branch, prompts, None, None, 1e-6, torch.float16)
    _, normed, xhat, rstd = native.norm_insert_fwd(residual, branch, prompts, torch.ones(8), None, 1e-6, F32)
    for dtypes in ((torch.float16, F32), (F32, torch.float16), (F32, F32, True, torch.float16)):
        with pytest.raises(TypeError, match=r"d_\w+ cannot have dtype torch\.float16"):
            native.norm_insert_bwd(residual, normed, xhat, rstd, None, 5, *dtypes)
