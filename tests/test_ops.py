"""Each operation against the reference's function of the same name in double precision, and as a PyTorch operator."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from insvp_fast import cpu, frozen, native, ops, reference
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
    values = reference.normalise(image, scale.double(), shift.double())
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
    opcheck(torch.ops.insvp_fast.superpose_fwd.default, (*inputs, P, 0.7, 0.3, torch.float32))
    tokens, hidden = torch.ops.insvp_fast.superpose_fwd(*inputs, P, 0.7, 0.3, torch.float32)
    for needs in ((True, True), (False, False)):
        arguments = (torch.randn_like(tokens), inputs[0], hidden, inputs[2], inputs[4], P, 0.7, 0.3, *needs)
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
    half, single = ("widened", "native") if how == "widened native" else (how, how)
    monkeypatch.setattr(frozen, "cpu_product", lambda dtype: single if dtype == torch.float32 else half)


@pytest.mark.parametrize("how", ["packed", "native", "widened", "plain"])
@pytest.mark.parametrize("shape", [(7, 33), (0, 33), (2, 3, 33)])
def test_every_product(monkeypatch, how, shape):
    multiply_by(monkeypatch, how)
    weight, bias, x, grad = torch.randn(48, 33), torch.randn(48), torch.randn(shape), torch.randn(*shape[:-1], 48)
    for _ in range(2):  # the second call finds what the first has kept
        assert relative_error(frozen.linear(x, weight, bias, 0, 48), x.double() @ weight.double().T + bias) < 1e-6
        assert relative_error(frozen.linear_bwd(grad, weight, 0, 48), grad.double() @ weight.double()) < 1e-6


@pytest.mark.parametrize("how", ["packed", "native", "widened native", "widened", "plain"])
def test_kept_forms_are_never_stale(monkeypatch, how):
    multiply_by(monkeypatch, how)
    x = torch.randn(4, 32, dtype=torch.float32 if how in ("packed", "native") else torch.bfloat16)
    layer = torch.nn.Linear(32, 16).requires_grad_(False)

    def check():
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        assert relative_error(frozen.linear(x, layer.weight, layer.bias, 0, 16), exact) < 2e-2

    check()
    layer.weight.mul_(-2)
    check()
    layer.load_state_dict({"weight": torch.randn(16, 32), "bias": torch.randn(16)})
    check()
    layer.double()
    check()
    layer.weight = torch.nn.Parameter(torch.randn(16, 32), requires_grad=False)
    check()


def test_the_native_product_is_used_with_avx2_alone():
    native_product = frozen.cpu_product(torch.float32) == "native"
    assert native_product == (native.native_status().isa == "avx2" and not cpu.wide_vectors())
    assert frozen.cpu_product(torch.float64) == "plain"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_a_widened_product_is_rounded_once(monkeypatch, dtype, weight_dtype):
    multiply_by(monkeypatch, "widened native")
    weight, bias = torch.randn(48, 33).to(weight_dtype), torch.randn(48)
    x, grad = torch.randn(7, 33).to(dtype), torch.randn(7, 48).to(dtype)
    for y, exact in (
        (frozen.linear(x, weight, bias, 0, 48), x.double() @ weight.double().T + bias),
        (frozen.linear_bwd(grad, weight, 0, 48), grad.double() @ weight.double()),
    ):
        assert y.dtype == dtype
        assert relative_error(y, exact) < torch.finfo(dtype).eps / 2


def test_kept_forms_die_with_their_weight():
    frozen.forget()
    weight, x = torch.randn(8, 4), torch.randn(2, 4, dtype=torch.float64)
    frozen.linear(x, weight, None, 0, 8)
    assert len(frozen._forms) == 1
    del weight
    assert not frozen._forms


def test_kept_forms_follow_a_parameter_made_again_on_the_same_memory():
    """Its version counter starts anew, so that of the old one says nothing."""
    weight, x = torch.randn(8, 4), torch.randn(2, 4, dtype=torch.float64)
    for _ in range(3):
        parameter = torch.nn.Parameter(weight.data, requires_grad=False)
        assert relative_error(frozen.linear(x, parameter, None, 0, 8), x @ weight.double().T) < 1e-6
        weight.mul_(-3)


def test_forget_is_for_what_no_counter_sees():
    weight, x = torch.randn(8, 4), torch.randn(2, 4, dtype=torch.float64)
    frozen.linear(x, weight, None, 0, 8)
    weight.numpy()[:] = 1
    frozen.forget()
    assert relative_error(frozen.linear(x, weight, None, 0, 8), x.sum(1, keepdim=True).expand(2, 8)) < 1e-6


def test_threads_share_the_kept_forms():
    x, errors = torch.randn(2, 4, dtype=torch.float64), []

    def work():
        for _ in range(200):
            weight = torch.randn(8, 4)
            errors.append(relative_error(frozen.linear(x, weight, None, 0, 8), x @ weight.double().T))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 800 and max(errors) < 1e-6


def test_compiled_graphs_find_the_kept_forms(monkeypatch):
    made, pack = [], frozen._pack
    monkeypatch.setattr(frozen, "cpu_product", lambda dtype: "packed")
    monkeypatch.setattr(frozen, "_pack", lambda matrix: made.append(1) or pack(matrix))
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


def test_linear_gradcheck():
    x, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.linear(x, weight, None), [x])


def test_norm_insert_gradcheck():
    inputs = [torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 3, 2)]
    weight, bias = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ops.norm_insert(*t, weight, bias, 1e-6), inputs)


def test_gelu():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(ops.gelu(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))


def test_linear_refuses_a_trained_weight():
    with pytest.raises(ValueError, match="frozen weights"):
        ops.linear(torch.randn(2, 3), torch.randn(4, 3, requires_grad=True), None)


def test_linear_opcheck():
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4)
    opcheck(torch.ops.insvp_fast.linear.default, (x, weight, bias, 1, 3))
    opcheck(torch.ops.insvp_fast.linear_bwd.default, (torch.randn(2, 5, 2), weight, 1, 3))


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


def test_norm_insert_keeps_the_stream_wide_and_the_product_narrow():
    residual, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    stream, normed = ops.norm_insert(residual, branch, None, torch.ones(8), torch.zeros(8), 1e-6, dtype=torch.bfloat16)
    assert stream.dtype == torch.float32 and normed.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "queries"), [(0, 5, 4), (1, 17, 17), (3, 21, 12), (2, 9, 1)])
def test_attention(monkeypatch, explicit, dtype, B, S, queries):
    monkeypatch.setattr(cpu, "explicit_attention", lambda dtype: explicit)
    inputs = [torch.randn(B, S, 3 * 24).to(dtype).requires_grad_()]
    exact = with_gradients(lambda t: reference.attention(t, 3, queries, 0.4), copies(inputs, torch.float64))
    plain = with_gradients(lambda t: reference.attention(t, 3, queries, 0.4), inputs)
    fast = with_gradients(lambda t: ops.attention(t, 3, queries, 0.4), inputs)
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, rough, expected, dtype)


@pytest.mark.parametrize("explicit", [False, True])
def test_attention_gradcheck_and_opcheck(monkeypatch, explicit):
    monkeypatch.setattr(cpu, "explicit_attention", lambda dtype: explicit)
    qkv = torch.randn(2, 5, 3 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.attention(t, 2, 3, 0.5), [qkv])
    qkv = qkv.detach().float()
    opcheck(torch.ops.insvp_fast.attention_fwd.default, (qkv, 2, 3, 0.5))
    out, logsumexp = torch.ops.insvp_fast.attention_fwd(qkv, 2, 3, 0.5)
    arguments = (torch.randn_like(out), qkv, None if explicit else out, logsumexp, 2, 3, 0.5)
    opcheck(torch.ops.insvp_fast.attention_bwd.default, arguments)
