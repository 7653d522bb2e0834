"""conv and conv_pool against PyTorch in double precision, and as PyTorch operators."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops.conv import conv_bwd_reference, conv_reference
from insvp_fast.ops.conv_pool import conv_pool_bwd_reference, conv_pool_reference
from insvp_fast.reference import crop_center
from insvp_fast.runtime import native
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import with_gradients


def operands(dtype=torch.float32, B=2, C=3, size=(9, 10), out=4, kernel=(3, 5)):
    shapes = (B, C, *size), (out, C, *kernel), (out,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run_conv(x, weight, bias, **kwargs):
    return ops.conv(x, weight, bias, 2, 7, 8, True, **kwargs)


def run_conv_pool(x, weight, bias, **kwargs):
    return ops.conv_pool(x, weight, bias, 8, 8, 4, **kwargs)


@pytest.mark.parametrize("run", [run_conv, run_conv_pool])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operations_in_every_dtype(run, dtype):
    """The result is PyTorch's own; without the native library's dtypes it is the formula that runs."""

    def plain(x, weight, bias):
        y = F.conv2d(x, weight, bias, padding="same", dilation=2 if run is run_conv else 1)
        if run is run_conv:
            return crop_center(y.relu(), 7, 8)
        return F.leaky_relu(F.max_pool2d(crop_center(y, 8, 8), 4))

    inputs = operands(dtype)
    exact = with_gradients(plain, [t.detach().double().requires_grad_() for t in inputs])
    for value, rough, expected in zip(with_gradients(run, inputs), with_gradients(plain, inputs), exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        if dtype == torch.float64:  # no precision is higher: sums in another order
            assert relative_error(value, expected) < 1e-14
        else:
            assert_within_budget(value, rough, expected, dtype)


def run_conv_alone(x, weight, bias, **kwargs):
    return ops.conv(x, weight, bias, 1, 32, 40, **kwargs)


@pytest.mark.skipif(native.native_status().isa not in ("avx512_bf16", "amx"), reason="nothing multiplies bf16")
@pytest.mark.parametrize("run", [run_conv, run_conv_pool, run_conv_alone])
def test_rounding_does_not_decide_where_gradients_go(run):
    """Sums in front of a ReLU or a maximum are not rounded if there are gradients; these themselves may be."""
    inputs = operands(size=(32, 40), kernel=(11, 11))
    exact, found = (with_gradients(lambda *t, d=d: run(*t, operands=d), inputs) for d in (None, torch.bfloat16))
    assert torch.equal(exact[0], found[0]) == (run is not run_conv_alone)
    assert torch.equal(exact[2], found[2]) == (run is not run_conv_alone)  # dilated and pooled weights have vectors
    with torch.no_grad():
        assert not torch.equal(run(*inputs), run(*inputs, operands=torch.bfloat16))
    traced = torch.compile(lambda *t: run(*t, operands=torch.bfloat16), backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(traced(*inputs), run(*inputs, operands=torch.bfloat16))


@pytest.mark.parametrize("run", [run_conv, run_conv_pool])
def test_gradcheck(run):
    assert torch.autograd.gradcheck(run, operands(torch.float64, B=1, C=2, out=2))


def test_opcheck():
    x, weight, bias = (t.detach() for t in operands())
    fwd = torch.ops.insvp_fast.conv_fwd.default
    opcheck(fwd, (x, weight, bias, 2, 7, 8, True, torch.bfloat16, "auto"))
    y = fwd(x, weight, bias, 2, 7, 8, True, torch.float32, "auto")
    for mask, need_x in ((y, True), (None, False)):
        opcheck(torch.ops.insvp_fast.conv_bwd.default, (y, x, mask, weight, 2, 7, 8, need_x, "auto"))
    fwd = torch.ops.insvp_fast.conv_pool_fwd.default
    opcheck(fwd, (x, weight, bias, 8, 8, 4, 0.01, torch.bfloat16, "auto"))
    y, indices = fwd(x, weight, bias, 8, 8, 4, 0.01, torch.float32, "auto")
    for need_x in (True, False):
        opcheck(torch.ops.insvp_fast.conv_pool_bwd.default, (y, x, y, indices, weight, 8, 8, 4, 0.01, need_x, "auto"))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel", [(3, 5), (4, 2), (25, 11)])
def test_written_out_gradients_are_those_of_autograd(kernel, relu):
    x, weight, _ = inputs = operands(torch.float64, kernel=kernel)
    y, *expected = with_gradients(lambda *t: conv_reference(*t, 2, 7, 8, relu), inputs)
    torch.manual_seed(1)
    grad = torch.randn_like(y)
    got = conv_bwd_reference(grad * (y > 0) if relu else grad, x, weight, 2, 7, 8)
    torch.testing.assert_close(got, tuple(expected))
    y, *expected = with_gradients(lambda *t: conv_pool_reference(*t, 8, 9, 1, 0.3)[0], inputs)
    _, indices = conv_pool_reference(*inputs, 8, 9, 1, 0.3)
    torch.manual_seed(1)
    torch.testing.assert_close(
        conv_pool_bwd_reference(torch.randn_like(y), x, y, indices, weight, 8, 9, 1, 0.3), tuple(expected)
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, w, b: ops.conv(x, w[:, :1], b, 1, 9, 10), "expected"),
        (lambda x, w, b: ops.conv(x, w, b[:1], 1, 9, 10), "expected"),
        (lambda x, w, b: ops.conv(x, w[..., :0], b, 1, 9, 10), r"weight has shape \(.*, 0\).* each from 1 on"),
        (lambda x, w, b: ops.conv(x, w[:0], b[:0], 1, 9, 10), r"weight has shape \(0, .* each from 1 on"),
        (lambda x, w, b: ops.conv_pool(x[:, :0], w[:, :0], b, 8, 8, 2), "each from 1 on"),
        (lambda x, w, b: ops.conv(x, w, b, 2**23, 9, 10), r"dilation=8388608.* spans < 2\*\*24"),
        (lambda x, w, b: ops.conv(x, w, b, 1, 10, 10), "a center of 10x10: expected at most 9x10"),
        (lambda x, w, b: ops.conv_pool(x, w, b, 8, 8, 3), "in windows of 3x3"),
        (lambda x, w, b: ops.conv_pool(x, w, b, 8, 8, 17), "windows of 17x17"),
        (lambda x, w, b: ops.conv_pool(x, w, b, 8, 8, 4, -0.1), r"negative_slope=-0\.1"),
    ],
)
def test_wrong_arguments_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run(*operands())


@pytest.mark.parametrize("run", [run_conv, run_conv_pool])
def test_an_implementation_is_honored_or_refused(run):
    inputs = operands()
    plain = with_gradients(lambda *t: run(*t, impl="reference"), inputs)
    with pytest.raises(ValueError, match=r"impl='fast': expected one of \['auto', 'native', 'reference', 'triton'\]"):
        run(*inputs, impl="fast")
    with pytest.raises(RuntimeError, match='impl="native" cannot'):
        run(*operands(torch.float16), impl="native")
    if not native.native_status():
        pytest.skip(str(native.native_status()))
    for value, expected in zip(with_gradients(lambda *t: run(*t, impl="native"), inputs), plain, strict=True):
        assert relative_error(value, expected) < 1e-5
    y = run(*inputs, impl="native")
    with pytest.raises(RuntimeError, match="cannot differentiate by infinities and NaN"):
        y.backward(torch.full_like(y, torch.inf))


@pytest.mark.parametrize(("name", "run"), [("conv", run_conv), ("conv_pool", run_conv_pool)])
@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_sums_in_front_of_a_relu_or_a_maximum_are_exact_for_any_gradient(trained, name, run, monkeypatch):
    module, rounded = importlib.import_module(f"insvp_fast.ops.{name}"), []
    call = module.call
    monkeypatch.setattr(module, "call", lambda name, *rest: rounded.append(rest[-1]) or call(name, *rest))
    named = zip(("x", "weight", "bias"), operands(), strict=True)
    inputs = [t.detach().requires_grad_(of == trained) for of, t in named]
    run(*inputs, operands=torch.bfloat16)
    with torch.no_grad():
        run(*inputs, operands=torch.bfloat16)
    assert rounded == [None, torch.bfloat16]
