"""linear and project_q_kv against PyTorch's products in double precision, and as PyTorch operators."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops import FrozenLinear
from insvp_fast.runtime import hardware, native, prepack, products
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import DTYPES, copies, with_gradients

NEEDS_LIBRARY = pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
PROVIDERS = pytest.mark.parametrize("how", ["onednn", pytest.param("native", marks=NEEDS_LIBRARY), "widened", "plain"])
NAMES = {"plain": "reference", "widened": "reference"}  # the implementations of providers, where fp32 is not widened


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_linear(dtype, weight_dtype):
    weight, bias = torch.randn(48, 33).to(weight_dtype), torch.randn(48).to(weight_dtype)
    inputs = [torch.randn(2, 5, 33).to(dtype).requires_grad_()]
    exact = with_gradients(
        lambda x: torch.nn.functional.linear(x, weight.double(), bias.double()), copies(inputs, torch.float64)
    )
    plain = with_gradients(lambda x: torch.nn.functional.linear(x, weight.to(dtype), bias.to(dtype)), inputs)
    fast = with_gradients(lambda x: ops.linear(x, FrozenLinear(weight, bias)), inputs)
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, rough, expected, dtype)


@pytest.mark.parametrize("surroundings", [lambda: torch.device("meta"), FakeTensorMode, torch.inference_mode])
def test_where_a_provider_is_first_asked_for_does_not_matter(surroundings):
    expected = products.cpu_provider(torch.float32)
    for cached in (products._cpu_provider, products._works):
        cached.cache_clear()
    with surroundings():
        assert products.cpu_provider(torch.float32) == expected


def test_what_is_kept_does_not_depend_on_the_precision_that_is_set():
    weight, shift, before = torch.randn(512, 768), torch.randn(768), torch.get_float32_matmul_precision()
    x, results = torch.zeros(1, 768), []
    for precision in ("medium", "high", "highest"):
        prepack.clear()
        torch.set_float32_matmul_precision(precision)
        try:
            results.append(ops.linear(x, FrozenLinear(weight, None, None, shift)))
        finally:
            torch.set_float32_matmul_precision(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])
    assert relative_error(results[0][0], (weight.double() * shift.double()).sum(1)) < 1e-6


@PROVIDERS
@pytest.mark.parametrize("shape", [(33,), (7, 33), (0, 33), (2, 3, 33), (2, 1, 3, 33)])
def test_every_provider(how, shape):
    weight, bias, x, grad = torch.randn(48, 33), torch.randn(48), torch.randn(shape), torch.randn(*shape[:-1], 48)
    for _ in range(2):  # the second call finds what the first has kept
        y, d_x = (
            products.linear(x, FrozenLinear(weight, bias), how),
            products.linear_bwd(grad, FrozenLinear(weight), how),
        )
        assert relative_error(y, x.double() @ weight.double().T + bias) < 1e-6
        assert relative_error(d_x, grad.double() @ weight.double()) < 1e-6


def test_the_provider_follows_the_native_library(monkeypatch):
    """What was chosen without it, as for a report, is not kept."""
    before = products.cpu_provider(torch.float32)
    with monkeypatch.context() as without:
        absent = native.NativeStatus(False, None, "switched off")
        without.setattr(native, "native_status", lambda: absent)
        without.setattr(native, "available", lambda *dtypes: False)
        assert products.cpu_provider(torch.float32) in ("onednn", "plain")
    assert products.cpu_provider(torch.float32) == before


def test_which_provider_is_used():
    vectors = native.native_status().isa not in (None, "generic")
    assert (products.cpu_provider(torch.float32) == "native") == vectors
    if not hardware.has_products(torch.float16):
        assert products.cpu_provider(torch.float16) == "widened"
    assert products.cpu_provider(torch.float64) == "plain"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_widened_product_is_rounded_once(dtype, weight_dtype):
    how = "widened"
    weight, bias = torch.randn(48, 33).to(weight_dtype), torch.randn(48)
    x, grad = torch.randn(7, 33).to(dtype), torch.randn(7, 48).to(dtype)
    for y, exact in (
        (products.linear(x, FrozenLinear(weight, bias), how), x.double() @ weight.double().T + bias),
        (products.linear_bwd(grad, FrozenLinear(weight), how), grad.double() @ weight.double()),
    ):
        assert y.dtype == dtype
        assert relative_error(y, exact) < torch.finfo(dtype).eps / 2


def test_compiled_graphs_find_packed_weights(monkeypatch):
    if not products.onednn_works(torch.float32):  # which packs once to see
        pytest.skip("oneDNN has no packed product here")
    made, pack = [], products._pack
    monkeypatch.setattr(products, "_pack", lambda matrix: made.append(1) or pack(matrix))
    weight = torch.randn(16, 8)
    layer = FrozenLinear(weight, first=4, last=12)
    compiled = torch.compile(lambda x: ops.linear(x, layer, impl="onednn"), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(3, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        assert relative_error(grad, weight[4:12].sum(0).expand(3, 8)) < 1e-6
    assert len(made) == 2  # forward and backward, once each


@PROVIDERS
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 1, 5, 12), (0, 12), (2, 0, 12)])
@pytest.mark.parametrize("last", [3, 9])
def test_dimensions_of_any_number_and_size(how, shape, last):
    if how == "onednn" and last == 3:
        pytest.skip("oneDNN refuses a product without columns")
    weight, x = torch.randn(20, 12), torch.randn(shape, requires_grad=True)
    y = ops.linear(x, FrozenLinear(weight, first=3, last=last), impl=NAMES.get(how, how))
    assert y.shape == (*shape[:-1], last - 3) and torch.allclose(y, x @ weight[3:last].T, atol=1e-5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, weight[3:last].sum(0).expand(shape), atol=1e-5)


@PROVIDERS
def test_rows_of_a_convolutions_weight(how):
    weight, bias, x = torch.randn(12, 3, 2, 2), torch.randn(12), torch.randn(5, 12, requires_grad=True)
    layer = FrozenLinear(weight.to(memory_format=torch.channels_last), bias, first=2, last=9)
    y = ops.linear(x, layer, impl=NAMES.get(how, how))
    exact = x.double() @ weight[2:9].flatten(1).double().T + bias[2:9]
    assert relative_error(y, exact) < 1e-6
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert relative_error(grad, weight[2:9].flatten(1).sum(0).expand(5, 12)) < 1e-6


@PROVIDERS
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_scale_is_folded_in(how, weight_dtype, affine):
    impl = NAMES.get(how, how)
    weight, bias, gain, shift, scale = (torch.randn(n).to(weight_dtype) for n in ((48, 33), (48,), (33,), (33,), (48,)))
    x = torch.randn(5, 33, requires_grad=True)
    for constant, factor in ((bias, 1), (None, 1), (bias, -2)):
        scale.mul_(factor)  # the last time as after loading a state dict
        layer = FrozenLinear(weight, constant, *((gain, shift) if affine else (None, None)), scale, 3, 40)
        folded = weight.double() * scale.double()[:, None] * (gain.double() if affine else 1)
        added = weight.double() @ shift.double() if affine else torch.zeros(48).double()
        added = scale.double() * (added if constant is None else added + constant.double())
        y = ops.linear(x, layer, impl=impl)
        assert relative_error(y, x.double() @ folded[3:40].T + added[3:40]) < 1e-6
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert relative_error(grad, folded[3:40].sum(0).expand(5, 33)) < 1e-6


def test_projected_queries_of_some_and_keys_of_all():
    weight, bias, gain, shift = (torch.randn(n, dtype=torch.float64) for n in ((12, 4), (12,), (4,), (4,)))
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    run = lambda x: ops.project_q_kv(x, 2, FrozenLinear(weight, bias, gain, shift))  # noqa: E731
    exact = torch.nn.functional.linear(gain * x + shift, weight, bias)
    q, kv = run(x)
    assert relative_error(q, exact[:, :2, :4]) < 1e-14 and relative_error(kv, exact[..., 4:]) < 1e-14
    assert torch.autograd.gradcheck(run, [x])
    with pytest.raises(ValueError, match="frozen weights"):
        ops.project_q_kv(x, 2, FrozenLinear(weight.requires_grad_(), bias))


def test_linear_gradcheck():
    x, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.linear(x, FrozenLinear(weight)), [x])


@pytest.mark.parametrize("trained", ["weight", "bias", "gain", "shift", "scale"])
def test_linear_refuses_a_trained_weight(trained):
    parts = {"weight": torch.randn(4, 3), "bias": torch.randn(4), "gain": torch.randn(3), "shift": torch.randn(3)}
    parts["scale"] = torch.randn(4)
    parts[trained].requires_grad_()
    with pytest.raises(ValueError, match="frozen weights"):
        ops.linear(torch.randn(2, 3), FrozenLinear(**parts))


def test_linear_opcheck():
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4)
    layer = weight, bias, torch.randn(6), torch.randn(6), torch.randn(4), 1, 3
    opcheck(torch.ops.insvp_fast.linear_fwd.default, (x, *layer, "auto"))
    opcheck(torch.ops.insvp_fast.linear_bwd.default, (torch.randn(2, 5, 2), *layer, "auto"))
    of_patches = weight.view(4, 3, 2, 1), bias, *layer[2:]
    opcheck(torch.ops.insvp_fast.linear_bwd.default, (torch.randn(2, 5, 2), *of_patches, "auto"))


@PROVIDERS
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norms_affine_map_is_folded_in(how, weight_dtype):
    impl = NAMES.get(how, how)
    weight, bias, gain, shift = (torch.randn(n).to(weight_dtype) for n in ((48, 33), (48,), (33,), (33,)))
    x = torch.randn(5, 33, requires_grad=True)
    for constant in (bias, None):
        y = ops.linear(x, FrozenLinear(weight, constant, gain, shift, first=3, last=40), impl=impl)
        exact = (gain.double() * x.double() + shift.double()) @ weight[3:40].double().T
        exact = exact if constant is None else exact + constant[3:40].double()
        assert relative_error(y, exact) < 1e-6
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert relative_error(grad, (weight[3:40].double().sum(0) * gain.double()).expand(5, 33)) < 1e-6
    gain.mul_(-2)  # as after loading a state dict
    exact = (gain.double() * x.double()) @ weight.double().T
    assert relative_error(ops.linear(x, FrozenLinear(weight, gain=gain), impl=impl), exact) < 1e-6
