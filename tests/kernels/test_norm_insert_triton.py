"""The Triton norm_insert against LayerNorm in float64 and autograd through it."""

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip, norm_insert

from insvp_fast.testing import assert_within_budget, relative_error

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(B, T, L, D, stream, device, narrow=None, branch=True, affine=True):
    """Residual, branch, prompts, weight and bias; branch and prompts in ``narrow``, by default the stream's dtype."""
    narrow = narrow or stream
    # with a mean, from which E[x²] - E[x]² would lose digits
    residual = (torch.randn(B, T, D, device=device) + 3).to(stream)
    added = torch.randn(B, T, D, device=device).to(narrow) if branch else None
    prompts = torch.randn(B, L, D, device=device).to(narrow) if L else None
    weight, bias = (torch.randn(D, device=device), torch.randn(D, device=device)) if affine else (None, None)
    return residual, added, prompts, weight, bias


def formula(residual, branch, prompts, weight, bias, dtype, center):
    """The results in ``dtype`` by PyTorch's operations, and the leaves for autograd."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (residual, branch, prompts)]
    stream, added, extra = leaves
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    total = stream if added is None else stream + added
    rows = total if extra is None else torch.cat([total, extra], 1)
    norm = torch.nn.functional.layer_norm if center else torch.nn.functional.rms_norm
    xhat = norm(rows, rows.shape[-1:], eps=EPS)
    normed = xhat if weight is None else xhat * weight + (0 if bias is None else bias)
    return leaves, total, normed, xhat


def check(tensors, dtype, device, center=True):
    """Forward and backward within twice the error of the formula in the same precision."""
    residual, branch, prompts, weight, _ = tensors
    B, T, D = residual.shape
    L = 0 if prompts is None else prompts.shape[1]
    stream = residual.dtype
    total, normed, xhat, rstd = norm_insert.norm_insert_fwd(*tensors, EPS, dtype, center)
    assert total.dtype == stream and normed.dtype == xhat.dtype == dtype and rstd.dtype == torch.float32
    assert total.shape == ((0,) if branch is None else (B, T, D))
    assert xhat.shape == ((0,) if weight is None else (B, T + L, D)) and rstd.shape == (B, T + L)
    grad_total = torch.randn(B, T, D, device=device).to(stream)
    grad_normed = torch.randn(B, T + L, D, device=device).to(dtype)
    branch_dtype = None if branch is None else branch.dtype
    d_residual, d_branch, d_prompts = norm_insert.norm_insert_bwd(
        grad_total, grad_normed, normed if weight is None else xhat, rstd, weight, T, stream, branch_dtype, center
    )
    assert d_residual.dtype == stream and d_residual.shape == (B, T, D)
    assert d_prompts.dtype == stream and d_prompts.shape == (B, L, D)
    if branch_dtype == stream:
        assert d_branch.shape == (0,)
    else:
        assert torch.equal(d_branch, d_residual.to(branch_dtype)) or chip.INTERPRETED  # which truncates bf16

    values = {}
    for precision in (torch.float64, torch.promote_types(stream, dtype) if dtype == torch.float32 else dtype):
        leaves, new, out, before = formula(*tensors, precision, center)
        present = [t for t in leaves if t is not None]
        grads = torch.autograd.grad((new, out), present, (grad_total.to(precision), grad_normed.to(precision)))
        values[precision] = [new, out, before, grads[0], *grads[len(present) - 1 :] * (prompts is not None)]
    exact, plain = values.values()
    fast = [total if branch is not None else residual, normed, xhat if weight is not None else normed, d_residual]
    for value, rough, truth in zip([*fast, *[d_prompts] * (prompts is not None)], plain, exact, strict=True):
        if dtype == torch.float32:
            assert relative_error(value, truth) < 2e-6
        else:
            assert_within_budget(value, rough, truth, dtype)
    rows = residual.double() if branch is None else residual.double() + branch.double()
    rows = rows if prompts is None else torch.cat([rows, prompts.double()], 1)
    tolerance = 1e-6 if stream == torch.float32 else 4 * torch.finfo(stream).eps
    mean_square = rows.var(-1, correction=0) if center else rows.square().mean(-1)
    assert relative_error(rstd, (mean_square + EPS).rsqrt()) < tolerance


SHAPES = [(1, 5, 9, 768), (3, 7, 1, 100), (3, 3, 0, 24), (0, 4, 2, 24), (1, 1, 1, 1), (2, 3, 2, 2500)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, device, poison):
    check(inputs(*shape, dtype, device), dtype, device)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_what_may_be_absent(branch, affine, device, poison):
    tensors = inputs(2, 5, 3, 100, torch.float32, device, branch=branch, affine=affine)
    check(tensors, torch.float32, device)
    check(tensors, torch.float32, device, center=False)


def test_an_affine_map_without_bias(device, poison):
    *tensors, _ = inputs(2, 5, 3, 100, torch.float32, device)
    check((*tensors, None), torch.float32, device)


@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_an_affine_map_of_any_layout(layout, device, poison):
    *tensors, _, _ = inputs(2, 5, 3, 100, torch.float32, device)
    affine = (
        torch.randn(1, 2, device=device).expand(100, 2) if layout == "expanded" else torch.randn(100, 2, device=device)
    )
    check((*tensors, *affine.unbind(1)), torch.float32, device)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_wide_stream_and_narrow_products(narrow, device, poison):
    check(inputs(2, 5, 3, 100, torch.float32, device, narrow), narrow, device)


@pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
def test_prompts_of_any_layout(layout, device, poison):
    residual, branch, prompts, weight, bias = inputs(3, 4, 2, 24, torch.float32, device)
    if layout == "expanded":  # one block's common prompts
        prompts = torch.randn(12, 2, 24, device=device)[5].expand(3, -1, -1)
    elif layout == "sliced":
        prompts = torch.randn(3, 6, 24, device=device)[:, 1:3]
    else:
        prompts = prompts.mT.contiguous().mT
    check((residual, branch, prompts, weight, bias), torch.float32, device)


def test_without_a_gradient_of_the_stream(device, poison):
    xhat, rstd = torch.randn(2, 5, 24, device=device), torch.rand(2, 5, device=device)
    grad = torch.randn(2, 5, 24, device=device)
    zero = torch.zeros(2, 3, 24, device=device)
    for weight in (None, torch.randn(24, device=device)):
        absent = norm_insert.norm_insert_bwd(None, grad, xhat, rstd, weight, 3, torch.float32, torch.float32)
        present = norm_insert.norm_insert_bwd(zero, grad, xhat, rstd, weight, 3, torch.float32, torch.float32)
        for value, expected in zip(absent, present, strict=True):
            assert torch.equal(value, expected)


def test_a_large_mean_does_not_cost_the_variance(device):
    """Rows far from zero, whose E[x²] - E[x]² would be lost in fp32."""
    residual = torch.randn(1, 4, 768, device=device) + 1000
    _, normed, _, _ = norm_insert.norm_insert_fwd(residual, None, None, None, None, EPS, torch.float32)
    exact = torch.nn.functional.layer_norm(residual.double(), (768,), eps=EPS)
    assert relative_error(normed, exact) < 1e-4  # the rounding of the mean, 1000 · 2^-24


def test_a_bad_value_stays_in_its_row(device):
    residual = torch.randn(1, 4, 100, device=device)
    residual[0, 1, 3], residual[0, 2, 5] = float("nan"), float("inf")
    _, normed, _, rstd = norm_insert.norm_insert_fwd(residual, None, None, None, None, EPS, torch.float32)
    assert normed[0, 1:3].isnan().all() and rstd[0, 1:3].isnan().all()
    assert normed[0, 0].isfinite().all() and normed[0, 3].isfinite().all()
    constant = torch.full((1, 2, 100), 5.0, device=device)
    assert not norm_insert.norm_insert_fwd(constant, None, None, None, None, EPS, torch.float32)[1].any()


@pytest.mark.parametrize("D", [1, 24, 384, 768, 1024, 1408, 4096, 16384])
def test_a_warp_has_2048_values_at_most(D):
    config = norm_insert.launch_config(D)
    assert config["BLOCK_D"] >= D and config["BLOCK_M"] * config["BLOCK_D"] <= 2048 * config["num_warps"]
    assert config["num_warps"] <= 8 and (D > 2048 or config["num_warps"] == 1)


def test_the_width_is_bounded(device):
    assert not norm_insert.covers(16385)
    with pytest.raises(ValueError, match="1 to 16384"):
        norm_insert.norm_insert_fwd(torch.empty(1, 1, 16385, device=device), None, None, None, None, EPS, torch.float32)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(chip, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="norm_insert: .*TRITON_INTERPRET"):
        norm_insert.norm_insert_fwd(torch.ones(1, 1, 8), None, None, None, None, EPS, torch.float32)
