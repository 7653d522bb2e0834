"""The Triton attention against the reference in float64."""

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import attention, chip

from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.testing import assert_within_budget, relative_error

SHAPES = [  # B, S, T, heads, d
    (2, 23, 17, 2, 16),
    (1, 37, 37, 1, 64),  # T = S; two blocks of queries in backward
    (2, 5, 1, 3, 8),  # one query; S and d below the smallest tile
    (1, 115, 67, 1, 32),  # two blocks of queries in forward, three tiles of keys, the last ones partial
    (1, 70, 1, 1, 32),  # whole blocks of rows without a query
    (1, 19, 18, 1, 80),  # widths of no tile
    (1, 19, 3, 2, 96),
    (1, 33, 20, 1, 128),
]


def inputs(B, S, T, heads, d, dtype, device):
    grad, qkv = torch.randn(B, T, heads * d, device=device), torch.randn(B, S, 3 * heads * d, device=device)
    return grad.to(dtype), qkv.to(dtype)


def computed(grad, qkv, heads, scale, forward=attention.attention_fwd, backward=attention.attention_bwd):
    """Output and gradients by name."""
    T = grad.shape[1]
    parts = backward(grad, qkv, heads, T, scale).chunk(3, dim=-1)
    return dict(zip(("d_q", "d_k", "d_v"), parts, strict=True), out=forward(qkv, heads, T, scale))


def expected(grad, qkv, heads, scale):
    return computed(grad, qkv, heads, scale, attention_reference, attention_bwd_reference)


def check(grad, qkv, heads, scale):
    """fp32: 1e-5 of the norm. 16 bits: twice the error of the reference in that dtype, plus one rounding."""
    actual, plain = computed(grad, qkv, heads, scale), expected(grad, qkv, heads, scale)
    for name, exact in expected(grad.double(), qkv.double(), heads, scale).items():
        assert actual[name].dtype == qkv.dtype
        if qkv.dtype == torch.float32:
            assert relative_error(actual[name], exact) <= 1e-5, name
        else:
            assert_within_budget(actual[name], plain[name], exact, qkv.dtype, name)
    assert not actual["d_q"][:, grad.shape[1] :].any()


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request, device):
    if request.param == torch.float32 and device.type == "cuda":
        pytest.skip("fp32 is for the interpreter")
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, device, poison):
    if shape[-1] > 64 and device.type == "cuda":
        pytest.skip("wide heads are for the interpreter")
    check(*inputs(*shape, dtype, device), shape[3], shape[4] ** -0.5)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_the_scale_may_have_any_sign(scale, dtype, device):
    check(*inputs(1, 21, 18, 2, 16, dtype, device), 2, scale)


def test_large_scores(dtype, device, poison):
    """Scores of thousands, whose softmax selects one key: its errors are those of the scores, and gradients cancel."""
    (grad, qkv), scale = inputs(2, 29, 20, 2, 16, dtype, device), 4.0
    qkv *= 8
    q, k, v = (t.transpose(1, 2) for t in qkv.double().unflatten(-1, (3, 2, 16)).unbind(2))
    q, d_out = q[:, :, :20], grad.double().unflatten(-1, (2, 16)).transpose(1, 2)
    scores = scale * q @ k.mT
    p, d_p = scores.softmax(-1), (d_out @ v.mT).abs()
    d_scores = scale * p * (d_p + (p * d_p).sum(-1, keepdim=True))  # as large as where nothing cancels
    sizes = {"d_q": d_scores @ k.abs(), "d_k": d_scores.mT @ q.abs(), "d_v": p.mT @ d_out.abs(), "out": p @ v.abs()}
    allowed = torch.finfo(torch.float32).eps * scores.abs().max() + torch.finfo(dtype).eps
    actual = computed(grad, qkv, 2, scale)
    for name, exact in expected(grad.double(), qkv.double(), 2, scale).items():
        assert (actual[name] - exact).norm() <= allowed * sizes[name].norm(), name


def test_noncontiguous_inputs(device, poison):
    """Rows of a longer buffer, a gradient that is a view or expanded, and rows that are not contiguous."""
    grad, qkv = inputs(3, 21, 18, 2, 16, torch.float16, device)
    dense = computed(grad, qkv, 2, 0.3)
    longer = torch.cat([qkv, qkv], dim=1)[:, :21]
    across = grad.transpose(0, 1).contiguous().transpose(0, 1)
    columns = qkv.mT.contiguous().mT
    for view in (computed(across, longer, 2, 0.3), computed(grad, columns, 2, 0.3)):
        assert all(torch.equal(view[name], dense[name]) and not view[name].isnan().any() for name in dense)
    check(grad[:1, :1].expand(3, 18, -1), qkv, 2, 0.3)


def test_rows_far_apart_are_copied():
    """Offsets within an image have 32 bits, those of images 64."""
    for strides, far in (((2**33, 24, 1), False), ((24, 2**28, 1), False), ((24, 2**29, 1), True), ((40, 8, 2), True)):
        x = torch.empty_strided((2, 5, 24), strides, device="meta")
        assert (attention._with_contiguous_rows(x) is x) == (not far)


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_any_block_of_queries(rows, device, monkeypatch, poison):
    """Architectures differ in it: on a GPU only its own is right."""
    if device.type == "cuda":
        pytest.skip("for the interpreter")
    config = attention.launch_config
    monkeypatch.setattr(attention, "launch_config", lambda *args: config(*args) | {"BLOCK_T": rows})
    for S, T in ((37, 33), (21, 16)):
        grad, qkv = inputs(2, S, T, 2, 16, torch.float16, device)
        check(grad, qkv, 2, 0.25)


def test_results_are_contiguous(device):
    grad, qkv = inputs(2, 7, 5, 2, 16, torch.float16, device)
    assert attention.attention_fwd(qkv, 2, 5, 1.0).is_contiguous()
    assert attention.attention_bwd(grad, qkv, 2, 5, 1.0).is_contiguous()


def test_empty_batch(device):
    grad, qkv = inputs(0, 7, 5, 2, 16, torch.float16, device)
    assert attention.attention_fwd(qkv, 2, 5, 1.0).shape == (0, 5, 32)
    assert attention.attention_bwd(grad, qkv, 2, 5, 1.0).shape == (0, 7, 96)


def test_same_inputs_same_bits(device, poison):
    """Also where the queries of a head are split among programs, as they are for few heads."""
    grad, qkv = inputs(1, 75, 70, 1, 16, torch.float16, device)
    once, again = (computed(grad, qkv, 1, 0.25) for _ in range(2))
    many = computed(*(x.expand(80, -1, -1) for x in (grad, qkv)), 1, 0.25) if device.type == "cuda" else once
    for name in once:
        assert torch.equal(once[name], again[name]) and torch.equal(once[name][0], many[name][0]), name


def test_one_program_takes_all_queries(device, monkeypatch, poison):
    _, qkv = inputs(1, 75, 70, 1, 16, torch.float16, device)
    split = attention.attention_fwd(qkv, 1, 70, 0.25)
    monkeypatch.setattr(chip, "MULTIPROCESSORS", dict.fromkeys(chip.MULTIPROCESSORS, 1))
    assert torch.equal(attention.attention_fwd(qkv.expand(2, -1, -1), 1, 70, 0.25)[1:], split)


def test_nan_stays_in_its_query_and_its_image(device):
    _, qkv = inputs(2, 9, 7, 1, 16, torch.float16, device)
    qkv[0, 3, 0] = float("nan")  # in q
    out = attention.attention_fwd(qkv, 1, 7, 0.25)
    assert out[0, 3].isnan().all() and out.isnan().sum() == 16


def test_wrong_arguments_are_refused(device):
    _, qkv = inputs(1, 7, 5, 2, 16, torch.float16, device)
    for T in (0, 8):
        with pytest.raises(ValueError, match="1 to 7"):
            attention.attention_fwd(qkv, 2, T, 1.0)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(chip, "INTERPRETED", False)
    grad, qkv = inputs(1, 7, 5, 2, 16, torch.float16, "cpu")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        attention.attention_bwd(grad, qkv, 2, 5, 1.0)


@pytest.mark.parametrize("S", [1, 15, 16, 59, 197, 206, 213, 217, 256])
def test_tiles_cover_the_keys_once(S):
    tiles = attention.key_tiles(S)
    assert [first for first, _ in tiles] == [sum(size for _, size in tiles[:i]) for i in range(len(tiles))]
    assert S <= sum(size for _, size in tiles) < S + 16
