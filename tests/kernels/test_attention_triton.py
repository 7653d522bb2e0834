"""The Triton attention against the specification in double precision; what the compiler makes of it for real chips."""

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import attention

from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.testing import assert_within_budget, relative_error

SHAPES = [  # B, S, T, heads, d
    (2, 23, 17, 2, 16),
    (1, 37, 37, 1, 64),  # T = S; two blocks of queries in the backward
    (2, 5, 1, 3, 8),  # one query; S and d below the smallest tile
    (1, 115, 67, 1, 32),  # two blocks of queries in the forward, three tiles of keys, the last ones ragged
    (1, 70, 1, 1, 32),  # whole blocks of rows that ask no query
    (1, 19, 18, 1, 80),  # widths that no tile has
    (1, 19, 3, 2, 96),
    (1, 33, 20, 1, 128),
]


def inputs(B, S, T, heads, d, dtype, device):
    return torch.randn(B, T, heads * d, device=device).to(dtype), torch.randn(B, S, 3 * heads * d, device=device).to(
        dtype
    )


def results(grad, qkv, heads, scale, forward=attention.attention_fwd, backward=attention.attention_bwd):
    """Output and gradients by name."""
    T = grad.shape[1]
    parts = backward(grad, qkv, heads, T, scale).chunk(3, dim=-1)
    return dict(zip(("d_q", "d_k", "d_v"), parts, strict=True), out=forward(qkv, heads, T, scale))


def specified(grad, qkv, heads, scale):
    return results(grad, qkv, heads, scale, attention_reference, attention_bwd_reference)


def check(grad, qkv, heads, scale):
    """fp32: 1e-5 of the norm. 16 bit: twice the error of the specification run in that dtype, plus one rounding."""
    actual, plain = results(grad, qkv, heads, scale), specified(grad, qkv, heads, scale)
    for name, exact in specified(grad.double(), qkv.double(), heads, scale).items():
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
    """Scores of thousands: the softmax chooses a key. The error is that of the scores, whoever computes them."""
    grad, qkv = inputs(2, 29, 20, 2, 16, dtype, device)
    actual, plain = results(grad, 8 * qkv, 2, 4.0), specified(grad, 8 * qkv, 2, 4.0)
    for name, exact in specified(grad.double(), 8 * qkv.double(), 2, 4.0).items():
        assert actual[name].isfinite().all(), name
        assert_within_budget(actual[name], plain[name], exact, dtype, name)


def test_strides_are_taken_as_they_are(device, poison):
    """Rows of a longer buffer, a gradient that is a view or expanded, and columns that are not contiguous."""
    grad, qkv = inputs(3, 21, 18, 2, 16, torch.float16, device)
    expected = results(grad, qkv, 2, 0.3)
    longer = torch.cat([qkv, qkv], dim=1)[:, :21]
    across = grad.transpose(0, 1).contiguous().transpose(0, 1)
    columns = qkv.mT.contiguous().mT
    for view in (results(across, longer, 2, 0.3), results(grad, columns, 2, 0.3)):
        assert all(torch.equal(view[name], expected[name]) and not view[name].isnan().any() for name in expected)
    check(grad[:1, :1].expand(3, 18, -1), qkv, 2, 0.3)


def test_results_are_contiguous(device):
    grad, qkv = inputs(2, 7, 5, 2, 16, torch.float16, device)
    assert attention.attention_fwd(qkv, 2, 5, 1.0).is_contiguous()
    assert attention.attention_bwd(grad, qkv, 2, 5, 1.0).is_contiguous()


def test_empty_batch(device):
    grad, qkv = inputs(0, 7, 5, 2, 16, torch.float16, device)
    assert attention.attention_fwd(qkv, 2, 5, 1.0).shape == (0, 5, 32)
    assert attention.attention_bwd(grad, qkv, 2, 5, 1.0).shape == (0, 7, 96)


def test_same_inputs_same_bits(device, poison):
    """Also where the blocks of queries are shared out among programs, as they are for few heads."""
    grad, qkv = inputs(1, 75, 70, 1, 16, torch.float16, device)
    once, again = (results(grad, qkv, 1, 0.25) for _ in range(2))
    many = results(*(x.expand(80, -1, -1) for x in (grad, qkv)), 1, 0.25) if device.type == "cuda" else once
    for name in once:
        assert torch.equal(once[name], again[name]) and torch.equal(once[name][0], many[name][0]), name


def test_one_program_walks_all_queries(device, monkeypatch, poison):
    _, qkv = inputs(1, 75, 70, 1, 16, torch.float16, device)
    shared = attention.attention_fwd(qkv, 1, 70, 0.25)
    monkeypatch.setattr(attention.chip, "PROCESSORS", dict.fromkeys(attention.chip.PROCESSORS, 1))
    assert torch.equal(attention.attention_fwd(qkv.expand(2, -1, -1), 1, 70, 0.25)[1:], shared)


def test_nan_stays_in_its_query_and_its_image(device):
    _, qkv = inputs(2, 9, 7, 1, 16, torch.float16, device)
    qkv[0, 3, 0] = float("nan")  # in q
    out = attention.attention_fwd(qkv, 1, 7, 0.25)
    assert out[0, 3].isnan().all() and out.isnan().sum() == 16


def test_refusals(device, monkeypatch):
    grad, qkv = inputs(1, 7, 5, 2, 16, torch.float16, device)
    for T in (0, 8):
        with pytest.raises(ValueError, match="1 to 7"):
            attention.attention_fwd(qkv, 2, T, 1.0)
    monkeypatch.setattr(attention.chip, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        attention.attention_bwd(grad.cpu(), qkv.cpu(), 2, 5, 1.0)


@pytest.mark.parametrize("S", [1, 15, 16, 59, 197, 206, 213, 217, 256])
def test_tiles_cover_the_keys_once(S):
    tiles = attention.key_tiles(S)
    assert [first for first, _ in tiles] == [sum(size for _, size in tiles[:i]) for i in range(len(tiles))]
    assert S <= sum(size for _, size in tiles) < S + 16


@pytest.fixture(scope="module")
def facts(aot):
    return [fact for fact in aot if fact["kernel"].startswith("attention")]


def test_no_kernel_was_compiled_to_a_stub(facts):
    assert facts and all(fact["matrix"] >= 8 for fact in facts)


def test_hopper_uses_wgmma(facts):
    """64 x 208 scores are 26 instructions of warp groups, where those of single warps would be hundreds."""
    hopper = [fact for fact in facts if fact["target"] == "90"]
    assert hopper and all(fact["wgmma"] == fact["matrix"] for fact in hopper), hopper


def test_a_hopper_multiprocessor_has_two_forward_programs(facts):
    """One computes while the other loads: 4 warps, 64 K registers, 228 KB of shared memory with 1 KB per program."""
    fact = next(f for f in facts if f["target"] == "90" and f["kernel"] == "attention_fwd-H12-T197-S206-bf16")
    assert 2 * 4 * 32 * fact["registers"] <= 65536 and 2 * (fact["shared"] + 1024) <= 228 * 1024


class Recorder:
    """Stands in for a kernel and notes the arguments of its launch."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


def test_the_cases_are_what_the_launchers_launch(monkeypatch):
    from tools.aot import cases

    monkeypatch.setattr(attention.chip, "INTERPRETED", True)
    expected = [case for case in cases("90") if case.name.endswith("H12-T197-S206-bf16")]
    launches: list = []
    for name in ("_attention_fwd_kernel", "_attention_bwd_kernel"):
        monkeypatch.setattr(attention, name, Recorder(launches))
    grad, qkv = (torch.zeros(16, rows, width, dtype=torch.bfloat16) for rows, width in ((197, 768), (206, 2304)))
    attention.attention_fwd(qkv, 12, 197, 0.125)
    attention.attention_bwd(grad, qkv, 12, 197, 0.125)
    for case, (_, args, kwargs) in zip(expected, launches, strict=True):
        assert len(args) == len(case.signature)
        assert {**kwargs, "COMPUTE": None} == {**case.constants, "COMPUTE": None}  # the interpreter computes in fp32
    # 192 heads for 2 x 132 places: two programs a head; the backward needs one
    assert [grid for grid, _, _ in launches] == [(192, 2), (192,)]
