"""window_attention against its formula in double precision and against timm's module, and as a PyTorch operator."""

import functools

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops.window_attention import window_attention_reference
from insvp_fast.runtime import native
from insvp_fast.testing import assert_within_budget, relative_error
from tests.gradients import DTYPES, copies, with_gradients

NEEDS_LIBRARY = pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
IMPLS = ("auto", pytest.param("native", marks=NEEDS_LIBRARY), "sdpa")


def operands(B, L, n, w, heads, d, dtype=torch.float32, masked=True):
    """qkv, and windows that hold the tokens in a random order, some pairs of which are masked."""
    torch.manual_seed(B + L + n + w)
    qkv = torch.randn(B, n * w + L, 3 * heads * d).to(dtype).requires_grad_()
    windows = torch.randperm(n * w).view(n, w).int()
    mask = -100.0 * torch.randint(0, 2, (n, w, w)) if masked else None
    return qkv, heads, windows, torch.randn(heads, w, w), mask, d**-0.5


def loop(qkv, heads, windows, bias, mask, scale):
    """The definition, one window after the other, with none of the operation's code."""
    T = windows.numel()
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    rows = []
    for window, (tokens, prompts) in enumerate((t.tolist(), [*range(T, qkv.shape[1])]) for t in windows):
        scores = scale * q[:, :, tokens] @ k[:, :, tokens + prompts].mT
        w = len(tokens)
        for summand in (bias, None if mask is None else mask[window]):
            if summand is not None:
                scores[..., :w, :w] += summand.to(scores)
        rows.append(scores.softmax(-1) @ v[:, :, tokens + prompts])
    found = torch.cat(rows, dim=2)[:, :, windows.flatten().long().argsort()]
    return found.transpose(1, 2).flatten(2)


SHAPES = [
    # B, L, n, w, heads, d
    (0, 2, 2, 3, 2, 4),
    (1, 0, 1, 17, 1, 8),
    (2, 9, 4, 9, 3, 8),
    (3, 1, 3, 1, 2, 5),
    (1, 20, 2, 49, 2, 32),
    (1, 5, 1, 130, 1, 24),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_window_attention(impl, dtype, shape):
    if impl == "native" and dtype == torch.float16:
        pytest.skip("the native library has no fp16")
    qkv, *rest = operands(*shape, dtype, masked=sum(shape) % 2 == 0)
    exact = with_gradients(lambda t: window_attention_reference(t, *rest), copies([qkv], torch.float64))
    plain = with_gradients(lambda t: window_attention_reference(t, *rest), [qkv])
    fast = with_gradients(lambda t: ops.window_attention(t, *rest, impl=impl), [qkv])
    for value, rough, expected in zip(fast, plain, exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        for part in zip(*(t.chunk(3 if value is fast[1] else 1, -1) for t in (value, rough, expected)), strict=True):
            assert_within_budget(*part, dtype)


@pytest.mark.parametrize("shape", [(2, 3, 3, 4, 2, 4), (1, 1, 2, 4, 1, 3)])
@pytest.mark.parametrize("parts", ["bias mask", "bias", "mask", ""])
def test_the_formula_and_its_gradient(shape, parts):
    qkv, heads, windows, bias, mask, scale = operands(*shape, torch.float64)
    bias, mask = bias if "bias" in parts else None, mask if "mask" in parts else None
    rest = heads, windows, bias, mask, scale
    exact = with_gradients(lambda t: loop(t, *rest), [qkv])
    for impl in ("reference", "sdpa"):  # "reference" differentiates by the formula that is written out
        named = functools.partial(ops.window_attention, impl=impl)
        for value, expected in zip(with_gradients(lambda t, f=named: f(t, *rest), [qkv]), exact, strict=True):
            assert relative_error(value, expected) < 1e-12
    if qkv.numel() < 100:
        assert torch.autograd.gradcheck(lambda t: ops.window_attention(t, *rest), [qkv])


@pytest.mark.parametrize("added", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_bias_and_mask_of_other_dtypes(impl, added):
    if impl == "native" and added == torch.float64:
        pytest.skip("the native library has no double precision")
    for dtype in DTYPES if impl != "native" else DTYPES[:2]:
        qkv, heads, windows, bias, mask, scale = operands(2, 3, 3, 4, 2, 4, dtype)
        for summands in ((bias.to(added), mask), (bias, mask.to(added)), (None, mask.to(added))):
            rest = heads, windows, *summands, scale
            exact = with_gradients(lambda t, rest=rest: loop(t, *rest), copies([qkv], torch.float64))
            plain = with_gradients(lambda t, rest=rest: loop(t, *rest), [qkv])
            found = with_gradients(lambda t, rest=rest: ops.window_attention(t, *rest, impl=impl), [qkv])
            for value, rough, expected in zip(found, plain, exact, strict=True):
                assert value.dtype == dtype
                assert_within_budget(value, rough, expected, dtype)


@pytest.mark.parametrize("grid", [(4, 4), (8, 4)])
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_timms_shifted_windows(impl, grid):
    """A permutation is what timm gets by rolling and cutting."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(12, grid, num_heads=3, window_size=4 if grid == (8, 4) else 2, shift_size=1).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, *grid, 12)
    (h, w), (H, W) = block.window_size, grid
    rolled = torch.arange(H * W).view(H, W).roll([-s for s in block.shift_size], (0, 1))
    windows = rolled.view(H // h, h, W // w, w).transpose(1, 2).reshape(-1, h * w).int()
    bias = block.attn._get_rel_pos_bias()[0].detach()
    qkv = block.attn.qkv(x).flatten(1, 2).detach()
    out = ops.window_attention(qkv, 3, windows, bias, block.attn_mask, block.attn.scale, impl=impl)
    expected = block._attn(x)
    torch.testing.assert_close(block.attn.proj(out).view_as(expected), expected)


@NEEDS_LIBRARY
def test_the_native_one_is_taken(monkeypatch):
    if native.native_status().isa != "generic":
        taken = []
        monkeypatch.setattr(native, "window_attention_fwd", lambda *a: taken.append(a) or torch.zeros(2, 36, 24))
        ops.window_attention(*operands(2, 9, 4, 9, 3, 8))
        assert taken


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_window_attention_is_an_operator(impl):
    for dtype in (torch.float32, torch.bfloat16):
        qkv, *rest = operands(2, 3, 3, 4, 2, 4, dtype)
        qkv = qkv.detach()
        opcheck(torch.ops.insvp_fast.window_attention_fwd.default, (qkv, *rest, impl))
        opcheck(torch.ops.insvp_fast.window_attention_bwd.default, (torch.randn(2, 12, 8).to(dtype), qkv, *rest, impl))


@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_window_attention_compiles(impl):
    torch.compiler.reset()  # or functions compiled before would reach the limit
    qkv, heads, *rest = operands(2, 3, 3, 4, 2, 4)
    torch.compiler.reset()  # of what other tests compiled, whose number has a limit
    named = functools.partial(ops.window_attention, impl=impl)
    compiled = torch.compile(named, fullgraph=True, backend="aot_eager")
    exact = with_gradients(lambda t: loop(t, heads, *rest), copies([qkv], torch.float64))
    for value, expected in zip(with_gradients(lambda t: compiled(t, heads, *rest), [qkv]), exact, strict=True):
        assert relative_error(value, expected) < 1e-5


def test_window_attention_refuses_what_it_cannot_do():
    qkv, heads, windows, bias, mask, scale = operands(2, 3, 3, 4, 2, 4)
    for change, message in [
        ({"impl": "fastest"}, "impl='fastest': expected one of"),
        ({"num_heads": 5}, "in 5 equal heads"),
        ({"windows": windows.long()}, r"windows is torch.int64 \(3, 4\): expected int32"),
        ({"windows": windows.repeat(2, 1)}, r"n\*w up to 15 tokens"),
        ({"bias": bias[:1]}, r"bias has shape \(1, 4, 4\): expected \(2, 4, 4\)"),
        ({"bias": bias.clone().requires_grad_()}, "for a frozen bias"),
        ({"mask": mask.clone().requires_grad_()}, "for a frozen mask"),
        ({"mask": mask[:2]}, r"mask has shape \(2, 4, 4\): expected \(3, 4, 4\)"),
    ]:
        given = {"num_heads": heads, "windows": windows, "bias": bias, "mask": mask, "scale": scale} | change
        with pytest.raises(ValueError, match=message):
            ops.window_attention(qkv, **given)
    with pytest.raises(RuntimeError, match='impl="native" '):
        ops.window_attention(qkv.double(), heads, windows, bias, mask, scale, impl="native")
