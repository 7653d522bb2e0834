"""mlp against PyTorch's layers in double precision, and as a PyTorch operator."""

import pytest
import torch
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops import FrozenLinear
from insvp_fast.ops.mlp import derivative_code
from insvp_fast.runtime import native, products
from insvp_fast.runtime.activations import ACTIVATIONS
from insvp_fast.testing import assert_within_budget, relative_error
from tests.activations import FORMULAS
from tests.gradients import DTYPES, copies, with_gradients

NEEDS_LIBRARY = pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
IMPLS = ("auto", "onednn", pytest.param("native", marks=NEEDS_LIBRARY), "widened", "reference")


def mlp_inputs(dtype=torch.float32, requires_grad=True):
    """x, the weights of both layers, and the affine map before them and the layer scale behind."""
    shapes = (48, 33), (48,), (33, 48), (33,), (33,), (33,), (33,)
    w1, b1, w2, b2, gain, shift, scale = (torch.randn(n) / 6 for n in shapes)
    x = torch.randn(2, 5, 33).to(dtype).requires_grad_(requires_grad)
    return x, (w1, b1, w2, b2), (1 + gain, shift, 1 + scale)


def run(x, w1, b1, w2, b2, gain=None, shift=None, scale=None, **options):
    return ops.mlp(x, FrozenLinear(w1, b1, gain, shift), FrozenLinear(w2, b2, scale=scale), **options)


def plain_mlp(x, w1, b1, w2, b2, gain, shift, scale, activation="gelu"):
    hidden = torch.nn.functional.linear(x * gain + shift, w1, b1)
    return scale * torch.nn.functional.linear(FORMULAS[activation](hidden)[0], w2, b2)


def assert_parity(dtype, activation="gelu", **options):
    x, weights, affine = mlp_inputs(dtype)

    def plain(x):
        return plain_mlp(x, *(w.to(x.dtype) for w in (*weights, *affine)), activation)

    exact, rough = with_gradients(plain, copies([x], torch.float64)), with_gradients(plain, [x])
    values = with_gradients(lambda x: run(x, *weights, *affine, activation=activation, **options), [x])
    for value, low, expected in zip(values, rough, exact, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, low, expected, dtype)


@pytest.mark.parametrize("keep", ["pre", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_mlp(impl, dtype, keep):
    if (impl == "widened" and dtype == torch.float32) or (impl == "onednn" and not products.onednn_works(dtype)):
        pytest.skip("this product is not for this dtype, or this processor")
    if dtype == torch.float16 and impl == "native":
        pytest.skip("no fp16 there")
    assert_parity(dtype, keep=keep, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(activation, dtype, impl):
    assert_parity(dtype, activation, impl=impl)


@pytest.mark.parametrize(("keep", "size"), [("pre", 4 * 2 * 5 * 48), ("code", 2 * 5 * 48), ("input", 4 * 2 * 5 * 33)])
def test_mlp_keeps_what_it_says(keep, size):
    x, weights, _ = mlp_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x, *weights, keep=keep)
    assert sum(t.nbytes for t in kept if t.data_ptr() not in {w.data_ptr() for w in weights}) == size


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_with_the_derivative_in_8_bits(dtype, activation):
    """Half a step of 1/201 in a derivative of at most 1.13, and that at worst in the same direction everywhere."""
    x, weights, _ = mlp_inputs(dtype)
    exact, coarse = (
        with_gradients(lambda x, k=k: run(x, *weights, activation=activation, keep=k), [x]) for k in ("pre", "code")
    )
    assert torch.equal(exact[0], coarse[0])
    assert 0 < relative_error(coarse[1], exact[1]) < 1e-2


@pytest.mark.parametrize("keep", ["pre", "code", "input", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_kernels_of_mlp_fit_in(dtype, keep, activation):
    """What runs on a GPU, with the kernels interpreted: the same products around them, in the same order."""
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    x, weights, affine = mlp_inputs(dtype, requires_grad=False)
    forward, backward = torch.ops.insvp_fast.mlp_fwd, torch.ops.insvp_fast.mlp_bwd
    with products.override_provider(lambda dtype: "plain"):
        out, kept = forward(x, *weights, *affine, activation, keep, "triton")
    plain_out, plain_kept = forward(x, *weights, *affine, activation, keep, "reference")
    eps = 4 * torch.finfo(dtype).eps  # the interpreter truncates 16-bit stores
    assert relative_error(out, plain_out) < eps and kept.dtype == plain_kept.dtype and kept.shape == plain_kept.shape
    if keep != "nothing":
        kept, grad = x if keep == "input" else kept, torch.randn_like(x)
        with products.override_provider(lambda dtype: "plain"):
            values = [
                backward(grad, kept, *weights, *affine, activation, keep, impl) for impl in ("triton", "reference")
            ]
        assert relative_error(*values) < eps


def test_mlp_gradcheck_opcheck_and_refusals():
    x, weights, affine = mlp_inputs(torch.float64)
    weights, affine = [w.double() for w in weights], [w.double() for w in affine]
    for keep in ("pre", "input"):
        function = lambda x, keep=keep: run(x, *weights, *affine, keep=keep)  # noqa: E731
        assert torch.autograd.gradcheck(function, [x])
    x = x.detach()
    for keep in ("pre", "code", "input", "nothing"):
        opcheck(torch.ops.insvp_fast.mlp_fwd.default, (x, *weights, *affine, "gelu", keep, "auto"))
    for keep in ("pre", "code", "input"):
        pre = torch.randn(2, 5, 48).double()
        kept = {"pre": pre, "code": derivative_code(pre), "input": x}[keep]
        arguments = (torch.randn_like(x), kept, *weights, *affine, "gelu", keep, "auto")
        opcheck(torch.ops.insvp_fast.mlp_bwd.default, arguments)
    with pytest.raises(ValueError, match="keep='all': expected one of"):
        run(x, *weights, keep="all")
    with pytest.raises(ValueError, match="activation='relu': expected one of"):
        run(x, *weights, activation="relu")
    with pytest.raises(ValueError, match="frozen weights"):
        run(x, weights[0].requires_grad_(), *weights[1:])


@pytest.mark.parametrize("keep", ["pre", "code"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_mlp_makes_nothing_for_backward_where_there_is_none(keep, impl, monkeypatch):
    asked, linear_activation = [], products.linear_activation

    def spy(x, layer, activation, kept, how):
        asked.append(kept)
        return linear_activation(x, layer, activation, kept, how)

    monkeypatch.setattr(products, "linear_activation", spy)
    x, weights, affine = mlp_inputs(requires_grad=False)
    run(x, *weights, *affine, keep=keep, impl=impl)
    with torch.no_grad():
        run(x.requires_grad_(), *weights, *affine, keep=keep, impl=impl)
    run(x, *weights, *affine, keep=keep, impl=impl)
    assert asked == [False, False, True]
