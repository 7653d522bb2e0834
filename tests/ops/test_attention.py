"""attention against its formula in double precision, and as a PyTorch operator."""

import functools
import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from insvp_fast import ops
from insvp_fast.ops.attention import _Bwd, _flash_reason, _Fwd, attention_reference
from insvp_fast.ops.registry import implementation
from insvp_fast.runtime import hardware, native, torch_private
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import DTYPES, copies, with_gradients

NEEDS_LIBRARY = pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
CPU = ("auto", pytest.param("native", marks=NEEDS_LIBRARY), "explicit", "flash")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "queries"), [(0, 5, 4), (1, 17, 17), (3, 21, 12), (2, 9, 1)])
@pytest.mark.parametrize("impl", CPU)
def test_attention(impl, dtype, B, S, queries):
    if impl == "native" and dtype == torch.float16:
        pytest.skip("the native library has no fp16")
    inputs = [torch.randn(B, S, 3 * 24).to(dtype).requires_grad_()]
    exact = with_gradients(lambda t: attention_reference(t, 3, queries, 0.4), copies(inputs, torch.float64))
    plain = with_gradients(lambda t: attention_reference(t, 3, queries, 0.4), inputs)
    fast = with_gradients(lambda t: ops.attention(t, 3, queries, 0.4, impl=impl), inputs)
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, rough, expected, dtype)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack([x, -x], -1)[..., 0],
    "rows with gaps": lambda x: torch.cat([x, -x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[..., :1].expand_as(x),
    "of one image": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", [*CPU, "sdpa", "reference"])
def test_attention_of_any_layout(impl, dtype, layout):
    if impl == "native" and dtype == torch.float16:
        pytest.skip("the native library has no fp16")
    qkv, grad = layout(torch.randn(2, 21, 72).to(dtype)), layout(torch.randn(2, 12, 24).to(dtype))
    results = []
    dense, wide = (qkv.contiguous(), grad.contiguous()), (qkv.double(), grad.double())
    for (x, g), how in (((qkv, grad), impl), (dense, impl), (wide, "reference")):
        x = x.detach().requires_grad_()
        out = ops.attention(x, 3, 12, 0.4, impl=how)
        results.append((out, *torch.autograd.grad(out, x, g)))
    for value, of_dense, exact in zip(*results, strict=True):
        assert_within_budget(value, of_dense, exact, dtype)  # PyTorch may take another kernel


@pytest.mark.parametrize("impl", CPU)
def test_attention_gradcheck_and_opcheck(impl):
    qkv = torch.randn(2, 5, 3 * 4, dtype=torch.float64, requires_grad=True)
    if impl != "native":  # which has no fp64
        assert torch.autograd.gradcheck(lambda t: ops.attention(t, 2, 3, 0.5, impl=impl), [qkv])
    for dtype in (torch.float32, torch.bfloat16):
        x = qkv.detach().to(dtype)
        opcheck(torch.ops.insvp_fast.attention_fwd.default, (x, 2, 3, 0.5, impl))
        out, logsumexp = torch.ops.insvp_fast.attention_fwd(x, 2, 3, 0.5, impl)
        kept = out if logsumexp.numel() else None
        arguments = (torch.randn_like(out), x, kept, logsumexp, 2, 3, 0.5, impl)
        opcheck(torch.ops.insvp_fast.attention_bwd.default, arguments)


def image_by_image(attend, num_keys):
    """Attention to some first tokens, by attention to all tokens of one image after another."""
    return lambda x: torch.cat([attend(x[b : b + 1, :keys]) for b, keys in enumerate(num_keys)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "queries", "num_keys"), [(17, 12, (17, 12, 13)), (9, 1, (1, 9)), (66, 50, (65, 50, 66))])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto", pytest.param("native", marks=NEEDS_LIBRARY), "explicit"])
def test_attention_to_as_many_keys_as_an_image_has(impl, dtype, S, queries, num_keys):
    if impl == "native" and dtype == torch.float16:
        pytest.skip("the native library has no fp16")
    qkv = torch.randn(len(num_keys), S, 3 * 24)
    for image, keys in zip(qkv, num_keys, strict=True):
        image[keys:] = 100.0  # whoever looks there sees it
    inputs, keys = [qkv.to(dtype).requires_grad_()], torch.tensor(num_keys)
    alone = image_by_image(lambda t: attention_reference(t, 3, queries, 0.4), num_keys)
    exact, plain = (with_gradients(alone, x) for x in (copies(inputs, torch.float64), inputs))
    fast = with_gradients(lambda t: ops.attention(t, 3, queries, 0.4, num_keys=keys, impl=impl), inputs)
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        if dtype == torch.float32:
            assert relative_error(value, expected) < 1e-5
        else:
            assert_within_budget(value, rough, expected, dtype)
    if impl in ("native", "explicit"):
        alone = image_by_image(lambda t: ops.attention(t, 3, queries, 0.4, impl=impl), num_keys)
        assert all(map(torch.equal, fast, with_gradients(alone, inputs)))
        values = [
            ops.attention(inputs[0], 3, queries, 0.4, num_keys=n, impl=impl)
            for n in (None, keys.new_full(keys.shape, S))
        ]
        assert torch.equal(*values)


@pytest.mark.parametrize("impl", ["auto", pytest.param("native", marks=NEEDS_LIBRARY), "explicit"])
def test_attention_with_num_keys_is_an_operator(impl):
    torch.compiler.reset()  # or functions compiled before would reach the limit
    qkv, keys = torch.randn(2, 6, 3 * 8), torch.tensor([4, 6])
    opcheck(torch.ops.insvp_fast.attention_fwd.default, (qkv, 2, 3, 0.5, impl, keys))
    grad, none = torch.randn(2, 3, 8), torch.empty(0)
    opcheck(torch.ops.insvp_fast.attention_bwd.default, (grad, qkv, None, none, 2, 3, 0.5, impl, keys))
    named = functools.partial(ops.attention, num_heads=2, num_queries=3, scale=0.5, num_keys=keys, impl=impl)
    compiled = torch.compile(named, fullgraph=True, backend="aot_eager")
    x = [qkv.requires_grad_()]
    assert all(map(torch.equal, with_gradients(compiled, x), with_gradients(named, x)))
    if impl != "native":  # which has no fp64
        x = qkv.detach().double().requires_grad_()
        assert torch.autograd.gradcheck(lambda t: ops.attention(t, 2, 3, 0.5, num_keys=keys, impl=impl), [x])


def test_attention_refuses_numbers_of_keys_that_are_no_tensor():
    with pytest.raises(ValueError, match=r"num_keys is \[5, 5\]: expected a tensor, torch.int64 \(2,\) on cpu"):
        ops.attention(torch.randn(2, 5, 24), 1, 4, 0.5, num_keys=[5, 5])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([3, 6], r"num_keys is \[3, 6\]: expected 4 to 5, queries to tokens"),
        ([2, 5], r"num_keys is \[2, 5\]: expected 4 to 5"),
        ([5], r"num_keys is torch.int64 \(1,\) on cpu: expected torch.int64 \(2,\) on cpu"),
        ([5.0, 5.0], "num_keys is torch.float32"),
    ],
)
def test_attention_refuses_numbers_of_keys_that_do_not_fit(keys, message):
    qkv = torch.randn(2, 5, 24)
    with pytest.raises(ValueError, match=message):
        ops.attention(qkv, 1, 4, 0.5, num_keys=torch.tensor(keys))
    with pytest.raises(ValueError, match=message):
        ops.query_attention(qkv[:, :4, :8], qkv[..., 8:], 1, 0.5, num_keys=torch.tensor(keys))


@pytest.mark.parametrize("impl", ["flash", "xformers", "triton"])
def test_attention_that_cannot_leave_out_keys_says_so(impl):
    with pytest.raises(RuntimeError, match=f'impl="{impl}" cannot'):
        ops.attention(torch.randn(1, 5, 24), 1, 4, 0.5, num_keys=torch.tensor([4]), impl=impl)
    if impl == "flash":  # which "auto" would take here, but for the keys
        operands = _Fwd(torch.randn(1, 5, 24), 1, 4, 0.5, torch.tensor([4]))
        assert _flash_reason(operands) == "cannot leave out keys: it does not take num_keys"


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("flash", ["works", "makes numbers of NaN", "is absent"])
def test_what_attention_takes(monkeypatch, available, wide, flash):
    if available and not native.native_status():
        pytest.skip(str(native.native_status()))
    if not available:
        monkeypatch.setattr(native, "available", lambda *dtypes: False)
    monkeypatch.setattr(hardware, "wide_vectors", lambda: wide)
    monkeypatch.setattr(torch_private, "HAS_FLASH", flash != "is absent")
    monkeypatch.setattr(torch_private, "FLASH_KEEPS_NAN", flash == "works")
    qkv = torch.randn(2, 5, 24)
    expected = "explicit" if wide or flash != "works" else "flash"
    expected = "native" if available and native.native_status().isa != "generic" else expected
    operands = _Fwd(qkv, 2, 3, 0.5)
    assert implementation("attention_fwd", "auto", operands) == expected
    out, logsumexp = torch.ops.insvp_fast.attention_fwd(qkv, 2, 3, 0.5, "auto")
    assert bool(logsumexp.numel()) == (expected == "flash")
    kept = out if logsumexp.numel() else None
    assert implementation("attention_bwd", "auto", _Bwd(out, qkv, kept, logsumexp, 2, 3, 0.5)) == expected


@pytest.mark.parametrize("impl", ["reference", "sdpa", *CPU])
def test_attention_by_name_compiles_whole(impl):
    inputs = [torch.randn(2, 21, 3 * 24, requires_grad=True)]
    exact = with_gradients(lambda t: attention_reference(t, 3, 12, 0.4), copies(inputs, torch.float64))
    named = functools.partial(ops.attention, num_heads=3, num_queries=12, scale=0.4, impl=impl)
    compiled = torch.compile(named, fullgraph=True, backend="aot_eager")
    for value, expected in zip(with_gradients(compiled, inputs), exact, strict=True):
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
def test_a_named_attention_says_what_it_computes_in(impl, dtypes, dtype, device):
    if impl == "native" and not native.native_status():
        pytest.skip(str(native.native_status()))
    if dtype in dtypes:
        return
    message = f'impl="{impl}" cannot compute in {dtype}: expected {" or ".join(map(str, dtypes))}'
    with pytest.raises(RuntimeError, match=message):
        ops.attention(torch.randn(2, 5, 24).to(device if impl == "triton" else "cpu", dtype), 2, 3, 0.5, impl=impl)


def test_a_named_native_operation_says_where_it_computes(monkeypatch):
    if native.native_status():
        with pytest.raises(RuntimeError, match='impl="native" cannot run here: it computes on the CPU, not on meta'):
            ops.attention(torch.empty(2, 5, 24, device="meta"), 2, 3, 0.5, impl="native")
    absent = native.NativeStatus(False, None, "native CPU library not in use: switched off")
    monkeypatch.setattr(native, "native_status", lambda: absent)
    monkeypatch.setattr(native, "available", lambda *dtypes: False)
    with pytest.raises(RuntimeError, match='impl="native" cannot run here: native CPU library not in use'):
        ops.attention(torch.empty(2, 5, 24), 2, 3, 0.5, impl="native")


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
    torch.testing.assert_close(value, attention_reference(qkv, 3, 12, 0.4))


@pytest.mark.parametrize("queries", [5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_by_sdpa_differentiates_twice(queries, dtype):
    """And in a transform of torch.func."""
    qkv = torch.randn(2, 9, 3 * 8, dtype=dtype, requires_grad=True)
    function = functools.partial(ops.attention, num_heads=2, num_queries=queries, scale=0.4, impl="sdpa")
    exact = with_gradients(lambda t: attention_reference(t, 2, queries, 0.4), copies([qkv], torch.float64))
    for value, expected in zip(with_gradients(function, [qkv]), exact, strict=True):
        assert relative_error(value, expected) < 1e-6
    if dtype == torch.float64:
        with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's that has second derivatives
            assert torch.autograd.gradgradcheck(function, [qkv])
    assert torch.func.grad(lambda t: function(t).sum())(qkv).shape == qkv.shape


@pytest.fixture
def gpu(monkeypatch):
    """Tensors on a GPU that have no numbers."""
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    monkeypatch.setattr(chip, "arch", lambda device: 90)
    monkeypatch.setattr(chip, "shared_memory", lambda device: float("inf"))
    with FakeTensorMode():
        yield "cuda"


@pytest.mark.parametrize(("dtype", "S", "padded", "covered"), [
    (torch.bfloat16, 206, False, True),
    (torch.float16, 240, False, True),
    (torch.float16, 241, False, False),
    (torch.float32, 206, False, False),
    (torch.bfloat16, 206, True, False),
])  # fmt: skip
def test_attention_on_gpus(gpu, dtype, S, padded, covered):
    """PyTorch's forward pass, of which nothing is kept for backward where that is a kernel of this package."""
    qkv, kept = torch.empty(2, S, 3 * 24, dtype=dtype, device=gpu, requires_grad=True), []
    num_keys = torch.empty(2, dtype=torch.int64, device=gpu) if padded else None
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        out = ops.attention(qkv, 3, 12, 0.4, num_keys=num_keys)
    assert out.shape == (2, 12, 24) and out.dtype == dtype and out.device.type == gpu and out.is_contiguous()
    assert (sum(t.numel() for t in kept) == qkv.numel()) == covered
    operands = _Bwd(out, qkv, None, torch.empty(0, device=gpu), 3, 12, 0.4, num_keys)
    assert implementation("attention_fwd", "auto", _Fwd(qkv, 3, 12, 0.4, num_keys)) == "sdpa"
    assert (implementation("attention_bwd", "auto", operands) == "triton") == covered


@pytest.mark.parametrize("queries", [5, 9])
def test_the_kernels_of_attention_fit_in(queries):
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    qkv = torch.randn(2, 9, 3 * 24).half().requires_grad_()
    plain = with_gradients(lambda t: attention_reference(t, 3, queries, 0.4), [qkv])
    exact = with_gradients(lambda t: attention_reference(t, 3, queries, 0.4), copies([qkv], torch.float64))
    values = with_gradients(lambda t: ops.attention(t, 3, queries, 0.4, impl="triton"), [qkv])
    for value, rough, expected in zip(values, plain, exact, strict=True):
        assert_within_budget(value, rough, expected, torch.float16)
    out, nothing = torch.ops.insvp_fast.attention_fwd(qkv, 3, queries, 0.4, "sdpa")  # as on GPUs
    assert_within_budget(out, plain[0], exact[0], torch.float16)
    assert out.is_contiguous() and not nothing.numel()
    with pytest.raises(RuntimeError, match='impl="triton" cannot compute in torch.float32: expected torch.bfloat16 or'):
        ops.attention(qkv.float(), 3, queries, 0.4, impl="triton")
    with pytest.raises(RuntimeError, match=f'impl="triton" does not cover {queries} of 241 tokens of 8 numbers'):
        ops.attention(torch.zeros(1, 241, 24).half(), 1, queries, 0.4, impl="triton")
