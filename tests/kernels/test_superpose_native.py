"""The native superposition against the same mathematics in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, assert_close, assert_same_bits, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]  # an element left unwritten is NaN
GLOBAL_WEIGHT, PATCH_WEIGHT = 0.7, 0.3


def unfold(x: Tensor, P: int) -> Tensor:
    B, C, H, W = x.shape
    return x.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // P**2, C * P * P)


def formula(image, global_prompt, w1, b1, w2, b2, P: int, kept=None) -> tuple[Tensor, Tensor]:
    u = unfold(image, P)
    hidden = torch.relu(u @ w1.T + b1)
    patch_prompt = hidden @ w2.T + b2
    tokens = u + PATCH_WEIGHT * (patch_prompt if kept is None else patch_prompt * unfold(kept, P))
    return tokens if global_prompt is None else tokens + GLOBAL_WEIGHT * unfold(global_prompt, P), hidden


def inputs(B: int, C: int, H: int, W: int, P: int, R: int, dtypes=(F32, F32, F32)) -> tuple[tuple[Tensor, ...], Tensor]:
    """(image, global_prompt, w1, b1, w2, b2) and the gradient; ``dtypes`` of image, global prompt and tokens."""
    torch.manual_seed(B + 10 * C + 100 * P + R)
    K, N = C * P * P, (H // P) * (W // P)
    weights = torch.randn(R, K) / K**0.5, torch.randn(R), torch.randn(K, R) / R**0.5, torch.randn(K)
    image, global_prompt = (torch.randn(B, C, H, W).to(dtype) for dtype in dtypes[:2])
    return (image, global_prompt, *weights), torch.randn(B, N, K).to(dtypes[2])


def check(args: tuple[Tensor, ...], grad: Tensor, P: int, kept: Tensor | None = None) -> None:
    """Forward and every gradient against float64 autograd."""
    leaves = [x.double().requires_grad_() for x in args]
    tokens64, hidden64 = formula(*leaves, P, kept)
    expected = torch.autograd.grad(tokens64, leaves, grad.double())

    tokens, hidden = native.superpose_fwd(*args, P, GLOBAL_WEIGHT, PATCH_WEIGHT, grad.dtype, kept)
    assert (tokens.dtype, hidden.dtype) == (grad.dtype, F32)
    assert_close("tokens", tokens, tokens64.detach())
    assert_close("hidden", hidden, hidden64.detach())

    image, _, w1, _, w2, _ = args
    got = native.superpose_bwd(grad, image, hidden, w1, w2, P, GLOBAL_WEIGHT, PATCH_WEIGHT, True, True, kept)
    assert [x.dtype for x in got] == [image.dtype, grad.dtype, F32, F32, F32, F32]
    for name, out, want in zip(("image", "global", "w1", "b1", "w2", "b2"), got, expected, strict=True):
        assert_close(f"d_{name}", out, want)


SHAPES = [
    (1, 3, 32, 32, 16, 16),  # the usual patch, fewer patches than a tile
    (3, 3, 48, 80, 16, 16),  # non-square
    (1, 3, 28, 42, 14, 5),  # a patch size that is no multiple of a vector; R in blocks and single rows
    (3, 1, 40, 24, 8, 1),
    (1, 1, 12, 20, 4, 5),  # a patch size below the vector width, K below one step
    (3, 3, 64, 96, 4, 16),  # 1,152 patches: several chunks of weight gradients
    (4, 1, 160, 160, 4, 2),  # 6,400 patches: the most chunks
    (1, 3, 64, 32, 32, 16),  # rows whose length is a power of two
    (1, 1, 16, 16, 8, 300),  # more hidden units than a patch has pixels
    (0, 3, 32, 32, 16, 16),  # no image: weight gradients are zero
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_fp32(isa, shape):
    check(*inputs(*shape), P=shape[4])


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, BF16, BF16), (F32, F32, BF16), (BF16, F32, F32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_parity_bf16(isa, shape, dtypes):
    check(*inputs(*shape, dtypes), P=shape[4])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_under_a_mask(isa, shape):
    args, grad = inputs(*shape)
    check(args, grad, shape[4], torch.rand(args[0].shape) < 0.7)


def test_a_mask_of_another_image_is_refused():
    args, _ = inputs(2, 3, 32, 48, 16, 5)
    for kept, error in ((args[0] > 0)[:1], ValueError), (args[0], TypeError):
        with pytest.raises(error, match="kept has"):
            native.superpose_fwd(*args, 16, GLOBAL_WEIGHT, PATCH_WEIGHT, F32, kept)


def test_without_global_prompt(isa):
    (image, _, *weights), _ = inputs(2, 3, 32, 48, 16, 16)
    tokens, _ = native.superpose_fwd(image, None, *weights, 16, GLOBAL_WEIGHT, PATCH_WEIGHT, F32)
    assert_close("tokens", tokens, formula(image.double(), None, *(w.double() for w in weights), 16)[0])


@pytest.mark.parametrize(("need_image", "need_global"), [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed(isa, need_image, need_global):
    (image, global_prompt, w1, b1, w2, b2), grad = inputs(2, 3, 32, 48, 16, 5)
    _, hidden = native.superpose_fwd(image, global_prompt, w1, b1, w2, b2, 16, GLOBAL_WEIGHT, PATCH_WEIGHT, F32)
    args = (grad, image, hidden, w1, w2, 16, GLOBAL_WEIGHT, PATCH_WEIGHT)
    everything = native.superpose_bwd(*args, True, True)
    got = native.superpose_bwd(*args, need_image, need_global)
    assert [x.numel() > 0 for x in got] == [need_image, need_global, True, True, True, True]
    for out, want in zip(got, everything, strict=True):
        assert out.numel() == 0 or torch.equal(out, want)


def test_noncontiguous_inputs():
    args, grad = inputs(2, 3, 32, 48, 16, 5)
    tokens, hidden = native.superpose_fwd(*args, 16, GLOBAL_WEIGHT, PATCH_WEIGHT, F32)
    strided = [x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in (*args, grad, hidden)]
    assert not any(x.is_contiguous() for x in strided)
    *args2, grad2, hidden2 = strided
    assert torch.equal(native.superpose_fwd(*args2, 16, GLOBAL_WEIGHT, PATCH_WEIGHT, F32)[0], tokens)
    rest = 16, GLOBAL_WEIGHT, PATCH_WEIGHT, True, True
    want = native.superpose_bwd(grad, args[0], hidden, args[2], args[4], *rest)
    got = native.superpose_bwd(grad2, args2[0], hidden2, args2[2], args2[4], *rest)
    assert_same_bits([got, want])


def test_same_bits_for_every_number_of_threads(isa, threads):
    args, grad = inputs(3, 3, 64, 96, 4, 16)
    runs = []
    for n in (1, 2, 3, 2):
        threads(n)
        tokens, hidden = native.superpose_fwd(*args, 4, GLOBAL_WEIGHT, PATCH_WEIGHT, F32)
        grads = native.superpose_bwd(
            grad, args[0], hidden, args[2], args[4], 4, GLOBAL_WEIGHT, PATCH_WEIGHT, True, True
        )
        runs.append((tokens, hidden, *grads))
    assert_same_bits(runs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_pixel_stays_in_its_patch(isa, bad):
    (image, *rest), _ = inputs(1, 1, 12, 12 * 30, 12, 5)  # K = 144 is padded, 30 patches: three tiles
    image[0, 0, 5, 12 * 7 + 3] = bad
    tokens, _ = native.superpose_fwd(image, *rest, 12, GLOBAL_WEIGHT, PATCH_WEIGHT, F32)
    assert (~tokens[0].isfinite()).any(1).nonzero().flatten().tolist() == [7]


def test_bf16_rounding_is_that_of_torch(isa):
    """Ties, the largest values, subnormals and NaN: with weights of zero the gradient is passed on as it is."""
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, 1e-40, 0.0, float("inf"), float("nan")])
    image = values.repeat(8).reshape(1, 1, 8, 8)
    w, hidden = torch.zeros(1, 64), torch.zeros(1, 1, 1)
    grad = image.reshape(1, 1, 64)
    d_image, *_ = native.superpose_bwd(grad, image.to(BF16), hidden, w, w.T, 8, 1.0, 1.0, True, False)
    torch.testing.assert_close(d_image, image.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_wrong_arguments_are_refused():
    (image, global_prompt, *weights), grad = inputs(1, 3, 32, 32, 16, 5)
    rest = (*weights, 16, 1.0, 1.0, F32)
    with pytest.raises(TypeError, match=r"image has dtype torch\.float16"):
        native.superpose_fwd(image.half(), global_prompt, *rest)
    with pytest.raises(TypeError, match="tokens cannot have dtype"):
        native.superpose_fwd(image, global_prompt, *rest[:-1], torch.float16)
    with pytest.raises(TypeError, match=r"w1 has dtype torch\.bfloat16"):
        native.superpose_fwd(image, global_prompt, weights[0].bfloat16(), *rest[1:])
    with pytest.raises(ValueError, match="global_prompt is on meta"):
        native.superpose_fwd(image, global_prompt.to("meta"), *rest)
    with pytest.raises(ValueError, match=r"global_prompt has shape .* expected \(1, 3, 32, 32\)"):
        native.superpose_fwd(image, global_prompt[:, :1], *rest)
    with pytest.raises(ValueError, match="32x32 is not a multiple of the patch size 12"):
        native.superpose_fwd(image, global_prompt, *weights, 12, 1.0, 1.0, F32)
    with pytest.raises(ValueError, match="hidden has shape"):
        native.superpose_bwd(grad, image, grad, weights[0], weights[2], 16, 1.0, 1.0, True, True)
