"""Each operation against the reference's function of the same name in double precision, and as a PyTorch operator."""

import functools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from insvp_fast import ops, reference
from insvp_fast.runtime import hardware, native, products
from insvp_fast.runtime.products import Frozen
from insvp_fast.testing import assert_within_budget, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def superpose_inputs(B=2, C=3, grid=(2, 3), P=4, R=5, dtype=torch.float32, grad=True):
    K = C * P * P
    shapes = [(B, C, grid[0] * P, grid[1] * P)] * 2
    images = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    weights = [torch.randn(shape) / shape[-1] ** 0.5 for shape in ((R, K), (R,), (K, R), (K,))]
    return [t.requires_grad_(grad) for t in (*images, *weights)], P


def with_gradients(function, inputs):
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    grads = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in out]
    return [*out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grads)]


def copies(inputs, dtype):
    return [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]


# ------------------------------------------------------------------------------------------------------------ superpose


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
@settings(max_examples=12)
@given(
    B=st.sampled_from([0, 1, 3]),
    C=st.sampled_from([1, 3]),
    grid=st.sampled_from([(1, 1), (2, 3), (3, 1)]),
    P=st.sampled_from([4, 8, 14, 16]),
    R=st.sampled_from([1, 5, 16]),
    prompt=st.booleans(),
)
def test_superpose(impl, B, C, grid, P, R, prompt):
    if impl == "native" and not native.available():
        pytest.skip(str(native.native_status()))
    inputs, _ = superpose_inputs(B, C, grid, P, R)
    inputs[0] = inputs[0].detach().mT.contiguous().mT.requires_grad_()  # not contiguous

    def run(function, inputs, **kwargs):
        image, p_g, *weights = inputs
        return function(image, p_g if prompt else None, *weights, P, 0.7, 0.3, **kwargs)

    if not prompt:
        inputs[1].requires_grad_(False)
    exact = with_gradients(lambda *t: run(reference.superpose, t), copies(inputs, torch.float64))
    fast = with_gradients(lambda *t: run(ops.superpose, t, impl=impl), inputs)
    for value, expected in zip(fast, exact, strict=True):
        tolerance = 1e-5 if value.numel() > 1 else 1e-4  # a single sum of both signs may cancel
        assert value.shape == expected.shape and relative_error(value, expected) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_superpose_in_low_precision(dtype):
    inputs, P = superpose_inputs(P=16, dtype=dtype)
    exact = with_gradients(lambda *t: reference.superpose(*t, P, 0.7, 0.3), copies(inputs, torch.float64))
    plain = with_gradients(lambda *t: reference.superpose(*t, P, 0.7, 0.3), copies(inputs, dtype))
    fast = with_gradients(lambda *t: ops.superpose(*t, P, 0.7, 0.3), inputs)
    assert fast[0].dtype == dtype
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert_within_budget(value, rough, expected, dtype)


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_superpose_of_8_bit_images(impl, dtype):
    if impl == "native" and (not native.available() or dtype == torch.float16):
        pytest.skip("nothing that the native library covers")
    (_, prompt, *weights), P = superpose_inputs()
    image, scale, shift = torch.randint(256, prompt.shape, dtype=torch.uint8), torch.rand(3) / 50, torch.randn(3)
    inputs = [prompt, *weights]
    fast = with_gradients(
        lambda *t: ops.superpose(image, *t, P, 0.7, 0.3, dtype=dtype, scale=scale, shift=shift, impl=impl), inputs
    )
    values = reference.normalize(image, scale.double(), shift.double())
    exact = with_gradients(lambda *t: reference.superpose(values, *t, P, 0.7, 0.3), copies(inputs, torch.float64))
    plain = with_gradients(
        lambda *t: reference.superpose(values.to(dtype or torch.float32), *t, P, 0.7, 0.3),
        copies(inputs, dtype or torch.float32),
    )
    assert fast[0].dtype == (dtype or torch.float32)
    for value, rough, truth in zip(fast, plain, exact, strict=True):
        assert_within_budget(value, rough, truth, dtype or torch.float32)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_superpose_wants_scale_and_shift_for_8_bit_images_alone(kind):
    (_, prompt, *weights), P = superpose_inputs(grad=False)
    image, vector = torch.zeros(prompt.shape, dtype=kind), torch.ones(3)
    wrong = [{"scale": vector}, {"shift": vector}, {} if kind == torch.uint8 else {"scale": vector, "shift": vector}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected scale and shift for uint8"):
            ops.superpose(image, prompt, *weights, P, 0.7, 0.3, **arguments)
    with pytest.raises(ValueError, match=r"shift is torch.float32 \(2,\): expected torch.float32 \(3,\)"):
        ops.superpose(image.byte(), prompt, *weights, P, 0.7, 0.3, scale=vector, shift=vector[:2])


def test_superpose_gradcheck():
    inputs, P = superpose_inputs(B=1, C=1, grid=(1, 2), P=2, R=3, dtype=torch.float64)
    inputs = copies(inputs, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ops.superpose(*t, P, 0.7, 0.3), inputs)


def test_superpose_opcheck():
    inputs, P = superpose_inputs(grad=False)
    opcheck(torch.ops.insvp_fast.superpose_fwd.default, (*inputs, P, 0.7, 0.3, torch.float32, None, None))
    tokens, hidden = torch.ops.insvp_fast.superpose_fwd(*inputs, P, 0.7, 0.3, torch.float32, None, None)
    for needs in ((True, True), (False, False)):
        arguments = (torch.randn_like(tokens), inputs[0], hidden, inputs[2], inputs[4], P, 0.7, 0.3, *needs, None, None)
        opcheck(torch.ops.insvp_fast.superpose_bwd.default, arguments)
    image, affine = (50 * inputs[0].abs()).byte(), (torch.rand(3), torch.rand(3))
    opcheck(torch.ops.insvp_fast.superpose_fwd.default, (image, *inputs[1:], P, 0.7, 0.3, torch.float32, *affine))
    arguments = (torch.randn_like(tokens), image, hidden, inputs[2], inputs[4], P, 0.7, 0.3, False, True, *affine)
    opcheck(torch.ops.insvp_fast.superpose_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_superpose_compiles_whole(dynamic):
    inputs, P = superpose_inputs()
    compiled = torch.compile(
        lambda *t: ops.superpose(*t, P, 0.7, 0.3), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for value, expected in zip(
        with_gradients(compiled, inputs), with_gradients(lambda *t: ops.superpose(*t, P, 0.7, 0.3), inputs), strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "image of 8x12 pixels: expected multiples of the patch side 5"),
        (
            {"global_prompt": torch.zeros(1, 3, 8, 12)},
            r"global_prompt has shape \(1, 3, 8, 12\): expected that of the image, \(2, 3, 8, 12\)",
        ),
        ({"w2": torch.zeros(48, 4)}, r"w2 has shape \(48, 4\): expected \(48, 5\)"),
        ({"impl": "cuda"}, "impl='cuda': expected one of"),
    ],
)
def test_superpose_refuses(change, message):
    inputs, P = superpose_inputs()
    names = ("image", "global_prompt", "w1", "b1", "w2", "b2")
    arguments = (
        dict(zip(names, inputs, strict=True)) | {"patch_size": P, "global_weight": 0.7, "patch_weight": 0.3} | change
    )
    with pytest.raises(ValueError, match=message):
        ops.superpose(**arguments)


# --------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype, weight_dtype):
    weight, bias = torch.randn(48, 33).to(weight_dtype), torch.randn(48).to(weight_dtype)
    inputs = [torch.randn(2, 5, 33).to(dtype).requires_grad_()]
    exact = with_gradients(
        lambda x: torch.nn.functional.linear(x, weight.double(), bias.double()), copies(inputs, torch.float64)
    )
    plain = with_gradients(lambda x: torch.nn.functional.linear(x, weight.to(dtype), bias.to(dtype)), inputs)
    fast = with_gradients(lambda x: ops.linear(x, weight, bias), inputs)
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, rough, expected, dtype)


def multiply_by(monkeypatch, how):
    if "native" in how and not native.available():
        pytest.skip(str(native.native_status()))
    singles = {"widened": "plain", "widened native": "native"}
    half, single = ("widened", singles[how]) if how in singles else (how, how)
    monkeypatch.setattr(products, "cpu_product", lambda dtype: single if dtype == torch.float32 else half)


@pytest.mark.parametrize("how", ["packed", "native", "widened", "plain"])
@pytest.mark.parametrize("shape", [(33,), (7, 33), (0, 33), (2, 3, 33), (2, 1, 3, 33)])
def test_every_product(monkeypatch, how, shape):
    multiply_by(monkeypatch, how)
    weight, bias, x, grad = torch.randn(48, 33), torch.randn(48), torch.randn(shape), torch.randn(*shape[:-1], 48)
    for _ in range(2):  # the second call finds what the first has kept
        assert relative_error(products.linear(x, Frozen(weight, bias)), x.double() @ weight.double().T + bias) < 1e-6
        assert relative_error(products.linear_bwd(grad, Frozen(weight)), grad.double() @ weight.double()) < 1e-6


def test_which_product_is_used():
    vectors = native.native_status().isa not in (None, "generic")
    assert (products.cpu_product(torch.float32) == "native") == vectors
    if not hardware.has_products(torch.float16):
        assert products.cpu_product(torch.float16) == "widened"
    assert products.cpu_product(torch.float64) == "plain"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_widened_product_is_rounded_once(monkeypatch, dtype, weight_dtype):
    multiply_by(monkeypatch, "widened native")
    weight, bias = torch.randn(48, 33).to(weight_dtype), torch.randn(48)
    x, grad = torch.randn(7, 33).to(dtype), torch.randn(7, 48).to(dtype)
    for y, exact in (
        (products.linear(x, Frozen(weight, bias)), x.double() @ weight.double().T + bias),
        (products.linear_bwd(grad, Frozen(weight)), grad.double() @ weight.double()),
    ):
        assert y.dtype == dtype
        assert relative_error(y, exact) < torch.finfo(dtype).eps / 2


def test_compiled_graphs_find_packed_weights(monkeypatch):
    made, pack = [], products._pack
    monkeypatch.setattr(products, "cpu_product", lambda dtype: "packed")
    monkeypatch.setattr(products, "_pack", lambda matrix: made.append(1) or pack(matrix))
    weight = torch.randn(16, 8)
    compiled = torch.compile(lambda x: ops.linear(x, weight, None, rows=(4, 12)), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(3, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        assert relative_error(grad, weight[4:12].sum(0).expand(3, 8)) < 1e-6
    assert len(made) == 2  # forward and backward, once each


@pytest.mark.parametrize("how", ["packed", "native", "widened", "plain"])
def test_rows_of_a_convolutions_weight(monkeypatch, how):
    multiply_by(monkeypatch, how)
    weight, bias, x = torch.randn(12, 3, 2, 2), torch.randn(12), torch.randn(5, 12, requires_grad=True)
    y = ops.linear(x, weight.to(memory_format=torch.channels_last), bias, rows=(2, 9))
    exact = x.double() @ weight[2:9].flatten(1).double().T + bias[2:9]
    assert relative_error(y, exact) < 1e-6
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert relative_error(grad, weight[2:9].flatten(1).sum(0).expand(5, 12)) < 1e-6


def test_queries_of_few_and_keys_of_all():
    weight, bias, gain, shift = (torch.randn(n, dtype=torch.float64) for n in ((12, 4), (12,), (4,), (4,)))
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    run = lambda x: ops.qkv_few(x, 2, weight, bias, gain=gain, shift=shift)  # noqa: E731
    exact = torch.nn.functional.linear(gain * x + shift, weight, bias)
    q, kv = run(x)
    assert relative_error(q, exact[:, :2, :4]) < 1e-14 and relative_error(kv, exact[..., 4:]) < 1e-14
    assert torch.autograd.gradcheck(run, [x])
    with pytest.raises(ValueError, match="frozen weights"):
        ops.qkv_few(x, 2, weight.requires_grad_(), bias)


def test_linear_gradcheck():
    x, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.linear(x, weight, None), [x])


def test_linear_refuses_a_trained_weight():
    with pytest.raises(ValueError, match="frozen weights"):
        ops.linear(torch.randn(2, 3), torch.randn(4, 3, requires_grad=True), None)


def test_linear_opcheck():
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4)
    gain, shift = torch.randn(6), torch.randn(6)
    opcheck(torch.ops.insvp_fast.linear.default, (x, weight, bias, gain, shift, 1, 3))
    opcheck(torch.ops.insvp_fast.linear_bwd.default, (torch.randn(2, 5, 2), weight, bias, gain, shift, 1, 3))


@pytest.mark.parametrize("how", ["packed", "native", "widened", "plain"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_norms_affine_map_is_folded_in(monkeypatch, how, weight_dtype):
    multiply_by(monkeypatch, how)
    weight, bias, gain, shift = (torch.randn(n).to(weight_dtype) for n in ((48, 33), (48,), (33,), (33,)))
    x = torch.randn(5, 33, requires_grad=True)
    for constant in (bias, None):
        y = ops.linear(x, weight, constant, gain=gain, shift=shift, rows=(3, 40))
        exact = (gain.double() * x.double() + shift.double()) @ weight[3:40].double().T
        exact = exact if constant is None else exact + constant[3:40].double()
        assert relative_error(y, exact) < 1e-6
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert relative_error(grad, (weight[3:40].double().sum(0) * gain.double()).expand(5, 33)) < 1e-6
    gain.mul_(-2)  # as after loading a state dict
    exact = (gain.double() * x.double()) @ weight.double().T
    assert relative_error(ops.linear(x, weight, None, gain=gain), exact) < 1e-6


# ------------------------------------------------------------------------------------------------------------------ mlp


def mlp_inputs(dtype=torch.float32, requires_grad=True):
    w1, b1, w2, b2, gain, shift = (torch.randn(n) / 6 for n in ((48, 33), (48,), (33, 48), (33,), (33,), (33,)))
    return torch.randn(2, 5, 33).to(dtype).requires_grad_(requires_grad), (w1, b1, w2, b2), (1 + gain, shift)


def plain_mlp(x, w1, b1, w2, b2, gain, shift):
    hidden = torch.nn.functional.linear(x * gain + shift, w1, b1)
    return torch.nn.functional.linear(torch.nn.functional.gelu(hidden), w2, b2)


@pytest.mark.parametrize("keep", ["pre", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["packed", "native", "widened", "plain"])
def test_mlp(monkeypatch, how, dtype, keep):
    if dtype == torch.float16 and how in ("packed", "native"):
        pytest.skip("no fp16 there")
    multiply_by(monkeypatch, how)
    x, weights, (gain, shift) = mlp_inputs(dtype)

    def plain(x):
        return plain_mlp(x, *(w.to(x.dtype) for w in (*weights, gain, shift)))

    exact, rough = with_gradients(plain, copies([x], torch.float64)), with_gradients(plain, [x])
    values = with_gradients(lambda x: ops.mlp(x, *weights, gain=gain, shift=shift, keep=keep), [x])
    for value, low, expected in zip(values, rough, exact, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, low, expected, dtype)


@pytest.mark.parametrize(("keep", "size"), [("pre", 4 * 2 * 5 * 48), ("code", 2 * 5 * 48), ("input", 4 * 2 * 5 * 33)])
def test_mlp_keeps_what_it_says(keep, size):
    x, weights, _ = mlp_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.mlp(x, *weights, keep=keep)
    assert sum(t.nbytes for t in kept if not any(t is w for w in weights)) == size


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_with_the_derivative_in_8_bits(dtype):
    """Half a step of 1/201 in a derivative of at most 1.13, and that at worst in the same direction everywhere."""
    x, weights, _ = mlp_inputs(dtype)
    exact, coarse = (with_gradients(lambda x, k=k: ops.mlp(x, *weights, keep=k), [x]) for k in ("pre", "code"))
    assert torch.equal(exact[0], coarse[0])
    assert 0 < relative_error(coarse[1], exact[1]) < 1e-2


@pytest.mark.parametrize("keep", ["pre", "code", "input", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_of_mlp_fit_in(monkeypatch, dtype, keep):
    """What runs on a GPU, with the kernels interpreted: the same products around them, in the same order."""
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(products, "cpu_product", lambda dtype: "plain")
    from insvp_fast.ops.mlp import _bwd, _bwd_cuda, _fwd, _fwd_cuda

    x, (w1, b1, w2, b2), affine = mlp_inputs(dtype, requires_grad=False)
    out, kept = _fwd_cuda(x, w1, b1, w2, b2, *affine, keep)
    plain_out, plain_kept = _fwd(x, w1, b1, w2, b2, *affine, keep)
    eps = 4 * torch.finfo(dtype).eps  # the interpreter truncates 16-bit stores
    assert relative_error(out, plain_out) < eps and kept.dtype == plain_kept.dtype and kept.shape == plain_kept.shape
    if keep != "nothing":
        kept, grad = x if keep == "input" else kept, torch.randn_like(x)
        values = [run(grad, kept, w1, b1, w2, b2, *affine, keep) for run in (_bwd_cuda, _bwd)]
        assert relative_error(*values) < eps


def test_mlp_gradcheck_opcheck_and_refusals():
    x, weights, affine = mlp_inputs(torch.float64)
    weights, affine = [w.double() for w in weights], [w.double() for w in affine]
    for keep in ("pre", "input"):
        function = lambda x, keep=keep: ops.mlp(x, *weights, gain=affine[0], shift=affine[1], keep=keep)  # noqa: E731
        assert torch.autograd.gradcheck(function, [x])
    x = x.detach()
    for keep in ("pre", "code", "input", "nothing"):
        opcheck(torch.ops.insvp_fast.mlp_fwd.default, (x, *weights, *affine, keep))
    for keep in ("pre", "code", "input"):
        pre = torch.randn(2, 5, 48).double()
        kept = {"pre": pre, "code": reference.gelu_code(pre), "input": x}[keep]
        arguments = (torch.randn_like(x), kept, *weights, *affine, keep)
        opcheck(torch.ops.insvp_fast.mlp_bwd.default, arguments)
    with pytest.raises(ValueError, match="keep='all': expected one of"):
        ops.mlp(x, *weights, keep="all")
    with pytest.raises(ValueError, match="frozen weights"):
        ops.mlp(x, weights[0].requires_grad_(), *weights[1:])


# ---------------------------------------------------------------------------------------------------------- norm_insert


@pytest.mark.parametrize("L", [None, 0, 1, 9])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_norm_insert(L, branch, compiled):
    weight, bias = torch.randn(24), torch.randn(24)
    inputs = [torch.randn(2, 7, 24, requires_grad=True)]
    inputs += [torch.randn(2, 7, 24, requires_grad=True)] * branch + [
        torch.randn(2, L or 0, 24, requires_grad=True)
    ] * (L is not None)

    def run(function, tensors):
        tensors = list(tensors)
        residual, added = tensors.pop(0), tensors.pop(0) if branch else None
        return function(
            residual, added, tensors.pop() if tensors else None, weight.to(residual), bias.to(residual), 1e-6
        )

    def fast(*t):
        return run(ops.norm_insert, t)

    exact = with_gradients(lambda *t: run(reference.norm_insert, t), copies(inputs, torch.float64))
    values = with_gradients(torch.compile(fast, fullgraph=True, backend="aot_eager") if compiled else fast, inputs)
    for value, expected in zip(values, exact, strict=True):
        assert value.shape == expected.shape and relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("branch", [True, False])
def test_norm_insert_gradcheck_and_opcheck(affine, branch):
    residual, added, prompts = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 3, 2))
    weights = [torch.randn(5, dtype=torch.float64) if affine else None for _ in range(2)]
    added = added if branch else None
    given = [t for t in (residual, added, prompts) if t is not None]

    def run(residual, *rest):
        return ops.norm_insert(residual, rest[0] if branch else None, rest[-1], *weights, 1e-6)

    assert torch.autograd.gradcheck(run, given)
    forward, backward = torch.ops.insvp_fast.norm_insert_fwd.default, torch.ops.insvp_fast.norm_insert_bwd.default
    tensors = [None if t is None else t.detach() for t in (residual, added, prompts)]
    opcheck(forward, (*tensors, *weights, 1e-6, torch.float64))
    _, normed, xhat, rstd = forward(*tensors, *weights, 1e-6, torch.float64)
    for grad in (tensors[0], None):
        kept = xhat if affine else normed
        opcheck(backward, (grad, torch.randn_like(normed), kept, rstd, weights[0], 3, torch.float64, torch.float32))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("branch", [True, False])
def test_the_kernels_of_norm_insert_fit_in(affine, branch):
    """What runs on a GPU, with the kernels interpreted, against what the operator does everywhere."""
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    from insvp_fast.ops.norm_insert import _bwd_cuda, _bwd_reference, _fwd_cuda, _fwd_reference

    residual, added, prompts = (torch.randn(2, n, 24) for n in (3, 3, 2))
    weights = [torch.randn(24) if affine else None for _ in range(2)]
    arguments = residual, added if branch else None, prompts, *weights, 1e-6, torch.float32
    forward = [run(*arguments) for run in (_fwd_cuda, _fwd_reference)]
    _, normed, xhat, rstd = forward[1]
    kept, grad_normed = xhat if affine else normed, torch.randn_like(normed)
    grads = [
        run(grad, grad_normed, kept, rstd, weights[0], 3, torch.float32, branch_dtype)
        for grad, branch_dtype in ((residual, torch.float32), (None, torch.float16))
        for run in (_bwd_cuda, _bwd_reference)
    ]
    for values, expected in (forward, grads[:2], grads[2:]):
        for value, exact in zip(values, expected, strict=True):
            assert value.dtype == exact.dtype and value.shape == exact.shape
            assert relative_error(value, exact) < (1e-3 if value.dtype == torch.float16 else 1e-6)


def test_norm_insert_keeps_the_stream_wide_and_the_product_narrow():
    residual, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    stream, normed = ops.norm_insert(residual, branch, None, torch.ones(8), torch.zeros(8), 1e-6, dtype=torch.bfloat16)
    assert stream.dtype == torch.float32 and normed.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.fixture(params=["native", "explicit", "flash"])
def way(request, monkeypatch):
    """Each of the three ways of attention on a CPU, whatever is best on this one."""
    native_covers = native.native_status() and request.param == "native"
    monkeypatch.setattr(hardware, "_native_attention", lambda dtype: native_covers and native.available(dtype))
    monkeypatch.setattr(hardware, "_explicit_attention", lambda dtype: request.param != "flash")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "queries"), [(0, 5, 4), (1, 17, 17), (3, 21, 12), (2, 9, 1)])
def test_attention(way, dtype, B, S, queries):
    inputs = [torch.randn(B, S, 3 * 24).to(dtype).requires_grad_()]
    exact = with_gradients(lambda t: reference.attention(t, 3, queries, 0.4), copies(inputs, torch.float64))
    plain = with_gradients(lambda t: reference.attention(t, 3, queries, 0.4), inputs)
    fast = with_gradients(lambda t: ops.attention(t, 3, queries, 0.4), inputs)
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, rough, expected, dtype)


def test_attention_gradcheck_and_opcheck(way):
    qkv = torch.randn(2, 5, 3 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.attention(t, 2, 3, 0.5), [qkv])
    qkv = qkv.detach().float()
    opcheck(torch.ops.insvp_fast.attention_fwd.default, (qkv, 2, 3, 0.5, "auto"))
    out, logsumexp = torch.ops.insvp_fast.attention_fwd(qkv, 2, 3, 0.5, "auto")
    arguments = (torch.randn_like(out), qkv, out if way == "flash" else None, logsumexp, 2, 3, 0.5, "auto")
    opcheck(torch.ops.insvp_fast.attention_bwd.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa", "native"])
def test_attention_by_name(impl):
    if impl == "native" and not native.native_status():
        pytest.skip(str(native.native_status()))
    inputs = [torch.randn(2, 21, 3 * 24, requires_grad=True)]
    exact = with_gradients(lambda t: reference.attention(t, 3, 12, 0.4), copies(inputs, torch.float64))
    named = functools.partial(ops.attention, num_heads=3, num_queries=12, scale=0.4, impl=impl)
    ways = [named] if impl == "native" else [named, torch.compile(named, fullgraph=True, backend="aot_eager")]
    for function in ways:
        for value, expected in zip(with_gradients(function, inputs), exact, strict=True):
            assert relative_error(value, expected) < 1e-5


def test_attention_refuses_what_it_cannot_do(monkeypatch):
    qkv = torch.randn(2, 5, 3 * 8)
    with pytest.raises(ValueError, match="impl='fastest': expected one of"):
        ops.attention(qkv, 2, 3, 0.5, impl="fastest")
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(RuntimeError, match="needs the package xformers"):
        ops.attention(qkv, 2, 3, 0.5, impl="xformers")


@pytest.mark.parametrize(
    ("impl", "dtypes"),
    [
        ("native", (torch.float32, torch.bfloat16)),
        ("triton", (torch.bfloat16, torch.float16)),
        ("xformers", (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_named_attention_says_what_it_computes_in(impl, dtypes, dtype):
    if dtype in dtypes:
        if impl != "native" or native.native_status():
            ops.require_attention(impl, dtype, torch.device("cpu"))
        return
    message = f'impl="{impl}" cannot compute in {dtype}: expected {" or ".join(map(str, dtypes))}'
    with pytest.raises(RuntimeError, match=message):
        ops.attention(torch.randn(2, 5, 24).to(dtype), 2, 3, 0.5, impl=impl)


def test_a_named_native_operation_says_where_it_computes(monkeypatch):
    if native.native_status():
        with pytest.raises(RuntimeError, match='impl="native" cannot run here: it computes on the CPU, not on meta'):
            ops.attention(torch.empty(2, 5, 24, device="meta"), 2, 3, 0.5, impl="native")
    absent = native.NativeStatus(False, None, "native CPU library not in use: switched off")
    monkeypatch.setattr(native, "native_status", lambda: absent)
    inputs, P = superpose_inputs(grad=False)
    for run in (
        lambda: ops.attention(torch.empty(2, 5, 24), 2, 3, 0.5, impl="native"),
        lambda: ops.superpose(*inputs, P, 0.7, 0.3, impl="native"),
    ):
        with pytest.raises(RuntimeError, match='impl="native" cannot run here: native CPU library not in use'):
            run()


@pytest.mark.parametrize(("impl", "refused"), [("native", torch.float16), ("triton", torch.float64)])
@pytest.mark.parametrize("which", ["image", "prompt", "weight", "result"])
def test_a_named_superpose_says_what_it_computes_in(impl, refused, which):
    if impl == "native" and not native.native_status():
        pytest.skip(str(native.native_status()))
    inputs, P = superpose_inputs(grad=False)
    if which != "result":
        index = {"image": 0, "prompt": 1, "weight": 4}[which]
        inputs[index] = inputs[index].to(refused)
    result = refused if which == "result" else torch.float32
    with pytest.raises(RuntimeError, match=f'impl="{impl}" cannot compute in {refused}: expected torch.float32'):
        ops.superpose(*inputs, P, 0.7, 0.3, dtype=result, impl=impl)


def test_attention_by_xformers(monkeypatch):
    """Its layout, [B, tokens, heads, d], by a stand-in."""

    def stand_in(q, k, v, scale):
        assert q.shape == (2, 12, 3, 8) and k.shape == v.shape == (2, 21, 3, 8)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = stand_in
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    qkv = torch.randn(2, 21, 3 * 24)
    value = ops.attention(qkv, 3, 12, 0.4, impl="xformers")
    torch.testing.assert_close(value, reference.attention(qkv, 3, 12, 0.4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "T"), [(0, 5, 1), (2, 9, 1), (3, 21, 4)])
def test_attention_of_few(dtype, B, S, T):
    inputs = [torch.randn(B, n, width).to(dtype).requires_grad_() for n, width in ((T, 24), (S, 48))]

    def plain(q, kv):
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
        return reference.merge_heads((0.4 * q @ k.mT).softmax(-1) @ v)

    exact, rough = with_gradients(plain, copies(inputs, torch.float64)), with_gradients(plain, inputs)
    fast = with_gradients(lambda q, kv: ops.attention_few(q, kv, 3, 0.4), inputs)
    for value, low, expected in zip(fast, rough, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, low, expected, dtype)


@pytest.mark.parametrize("queries", [5, 9])
def test_the_kernels_of_attention_fit_in(queries):
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    qkv = torch.randn(2, 9, 3 * 24).half().requires_grad_()
    plain = with_gradients(lambda t: reference.attention(t, 3, queries, 0.4), [qkv])
    exact = with_gradients(lambda t: reference.attention(t, 3, queries, 0.4), copies([qkv], torch.float64))
    values = with_gradients(lambda t: ops.attention(t, 3, queries, 0.4, impl="triton"), [qkv])
    for value, rough, expected in zip(values, plain, exact, strict=True):
        assert_within_budget(value, rough, expected, torch.float16)
    with pytest.raises(RuntimeError, match='impl="triton" cannot compute in torch.float32: expected torch.bfloat16 or'):
        ops.attention(qkv.float(), 3, queries, 0.4, impl="triton")
    with pytest.raises(RuntimeError, match='impl="triton" does not cover 241 tokens of 8 numbers in torch.float16'):
        ops.attention(torch.zeros(1, 241, 24).half(), 1, queries, 0.4, impl="triton")
