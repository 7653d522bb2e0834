"""gated_mlp against PyTorch's layers in double precision, and as a PyTorch operator."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops import FrozenLinear
from insvp_fast.runtime import products
from insvp_fast.testing import DEVICE, assert_within_budget, relative_error
from tests.activations import FORMULAS
from tests.gradients import DTYPES, copies, with_gradients

EPS = 1e-6
OPTIONS = [{}, {"normed": True}, {"normed": True, "value": False, "activation": "gelu"}]


def inputs(dtype=torch.float32):
    """x, and all weights: gate, value, the affine map before them, the second layer, that before it and its scale."""
    shapes = (48, 33), (48,), (48, 33), (48,), (33,), (33,), (33, 48), (33,), (48,), (48,), (33,)
    return torch.randn(2, 5, 33).to(dtype).requires_grad_(), [torch.randn(shape) / 6 for shape in shapes]


def run(x, wg, bg, wv, bv, gain, shift, w2, b2, gain2, shift2, scale, value=True, normed=False, **options):
    gate, other = FrozenLinear(wg, bg, gain, shift), FrozenLinear(wv, bv, gain, shift) if value else None
    fc2 = FrozenLinear(w2, b2, *((gain2, shift2) if normed else (None, None)), scale)
    return ops.gated_mlp(x, gate, other, fc2, eps=EPS if normed else None, **options)


def plain(x, wg, bg, wv, bv, gain, shift, w2, b2, gain2, shift2, scale, value=True, normed=False, activation="silu"):
    x = x * gain + shift
    hidden = FORMULAS[activation](F.linear(x, wg, bg))[0]
    hidden = hidden * F.linear(x, wv, bv) if value else hidden
    return scale * F.linear(F.layer_norm(hidden, (48,), gain2, shift2, EPS) if normed else hidden, w2, b2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keep", ["pre", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["auto", "onednn", "reference"])
def test_gated_mlp(impl, dtype, keep, options):
    if impl == "onednn" and not products.onednn_works(dtype):
        pytest.skip("this product is not for this processor")
    x, weights = inputs(dtype)
    exact, rough = (
        with_gradients(lambda x: plain(x, *(w.to(x.dtype) for w in weights), **options), copies([x], like))
        for like in (torch.float64, dtype)
    )
    values = with_gradients(lambda x: run(x, *weights, keep=keep, impl=impl, **options), [x])
    for value, low, expected in zip(values, rough, exact, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, low, expected, dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keep", ["pre", "input", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_of_gated_mlp_fit_in(dtype, keep, options):
    """What runs on a GPU, or with the kernels interpreted: the same products around them, in the same order."""
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if DEVICE.type == "cpu" and not chip.INTERPRETED:
        pytest.skip("needs a GPU or Triton's interpreter")
    with DEVICE:
        x, (wg, bg, wv, bv, gain, shift, w2, b2, *affine, scale) = inputs(dtype)
    value, normed, activation = (options.get(name) for name in ("value", "normed", "activation"))
    weights = wg, bg, *((None, None) if value is False else (wv, bv)), gain, shift, w2, b2
    weights = *weights, *(affine if normed else (None, None)), scale
    rest = 0, -1 if value is False else 0, EPS if normed else None, activation or "silu", keep
    forward, backward = torch.ops.insvp_fast.gated_mlp_fwd, torch.ops.insvp_fast.gated_mlp_bwd
    eps = 4 * torch.finfo(dtype).eps  # the interpreter truncates 16-bit stores
    with torch.no_grad(), products.override_provider(lambda dtype: "plain"):
        found, expected = (forward(x, *weights, *rest, impl) for impl in ("triton", "reference"))
        assert relative_error(found[0], expected[0]) < eps
        if keep == "nothing":
            return
        if keep == "pre":
            assert found[1].shape == expected[1].shape and torch.equal(found[2], expected[2])
        kept = (x, None) if keep == "input" else (found[1], None if value is False else found[2])
        grad = torch.randn_like(x)
        values = [backward(grad, *kept, *weights, *rest, impl) for impl in ("triton", "reference")]
    assert relative_error(*values) < eps


def test_a_hidden_layer_that_no_kernel_covers(device):
    pytest.importorskip("triton")
    x, fc1, fc2 = (torch.randn(shape, device=device) for shape in ((2, 3), (8193, 3), (3, 8193)))
    with pytest.raises(RuntimeError, match='impl="triton" does not cover a hidden layer of 8193 numbers'):
        ops.gated_mlp(x, FrozenLinear(fc1), None, FrozenLinear(fc2), impl="triton")


def test_it_keeps_what_it_says():
    x, weights = inputs()
    for options, size in (({}, 2 * 48), ({"value": False}, 48), ({"normed": True}, 2 * 48), ({"keep": "input"}, 33)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            run(x, *weights, **options)
        assert sum(t.numel() for t in kept if t.data_ptr() not in {w.data_ptr() for w in weights}) == 2 * 5 * size


def test_halves_of_one_packed_layer():
    x, weights = inputs()
    wg, bg, wv, bv, *rest = weights
    weight, bias = torch.cat([wg, wv]), torch.cat([bg, bv])
    gain, shift, w2, b2, *_ = rest
    whole, fc2 = FrozenLinear(weight, bias, gain, shift), FrozenLinear(w2, b2)

    def of_halves():
        return with_gradients(lambda x: ops.gated_mlp(x, whole._replace(last=48), whole._replace(first=48), fc2), [x])

    def of_parts():
        parts = (FrozenLinear(weight[i:j].clone(), bias[i:j].clone(), gain, shift) for i, j in ((0, 48), (48, 96)))
        return with_gradients(lambda x: ops.gated_mlp(x, *parts, fc2), [x])

    assert all(map(torch.equal, of_halves(), of_parts()))
    weight[50] *= 2
    assert all(map(torch.equal, of_halves(), of_parts()))


@pytest.mark.parametrize("keep", ["pre", "input", "nothing"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_no_result_is_another_one(gated, keep):
    """PyTorch checks it in compiled code."""
    x, (wg, bg, wv, bv, *rest) = inputs()
    weights = wg, bg, *((wv, bv) if gated else (None, None)), *rest
    firsts = 0, 0 if gated else -1
    for impl in ("auto", "reference"):
        arguments = x.detach(), *weights, *firsts, EPS, "silu", keep, impl
        opcheck(torch.ops.insvp_fast.gated_mlp_fwd.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("bias", [True, False])
def test_halves_of_one_packed_layer_compile(bias):
    """In training too, where no tensor may be given twice to an autograd function."""
    x, (wg, bg, wv, bv, _, _, w2, *_) = inputs()
    whole, fc2 = FrozenLinear(torch.cat([wg, wv]), torch.cat([bg, bv]) if bias else None), FrozenLinear(w2)

    def mlp(x):
        return ops.gated_mlp(x, whole._replace(first=48), whole._replace(last=48), fc2)

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for keep_gradients in (True, False):
        with torch.set_grad_enabled(keep_gradients):
            assert torch.equal(compiled(x), mlp(x))
    assert all(map(torch.equal, with_gradients(compiled, [x]), with_gradients(mlp, [x])))


def test_gradcheck_opcheck_and_refusals():
    x, weights = inputs(torch.float64)
    weights = [w.double() for w in weights]
    for options in ({"normed": True}, {"keep": "input"}):
        assert torch.autograd.gradcheck(lambda x, o=options: run(x, *weights, **o), [x])
    x = x.detach()
    opcheck(torch.ops.insvp_fast.gated_mlp_fwd.default, (x, *weights, 0, 0, EPS, "silu", "pre", "auto"))
    pre, value = (torch.randn(2, 5, 48).double() for _ in range(2))
    for kept in ((pre, value, *weights, 0, 0, EPS, "silu", "pre"), (x, None, *weights, 0, 0, None, "gelu", "input")):
        opcheck(torch.ops.insvp_fast.gated_mlp_bwd.default, (torch.randn_like(x), *kept, "auto"))
    with pytest.raises(ValueError, match="keep='code': expected one of .* has no code in 8 bits"):
        run(x, *weights, keep="code")
    with pytest.raises(ValueError, match="activation='relu': expected one of"):
        run(x, *weights, activation="relu")
    with pytest.raises(ValueError, match="expected those of one norm before both"):
        ops.gated_mlp(x, FrozenLinear(weights[0], None, weights[4]), FrozenLinear(weights[2]), FrozenLinear(weights[6]))
    with pytest.raises(ValueError, match=r"weight has shape \(33, 48\): expected \[D_out, 33\]"):
        ops.gated_mlp(x, FrozenLinear(weights[0]), FrozenLinear(weights[6]), FrozenLinear(weights[6]))
    with pytest.raises(ValueError, match="a FrozenLinear is made of frozen weights"):
        run(x, *weights[:2], weights[2].requires_grad_(), *weights[3:])
