"""The Triton superposition against equations 5 to 7 in float64, written with PyTorch's operations."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip, superpose

NAMES = ("tokens", "hidden", "d_image", "d_global", "dw1", "db1", "dw2", "db2")
WEIGHTS = (0.7, 0.3)  # of the global and of the patch prompt, as in the paper


def formula(image, prompt, w1, b1, w2, b2, P, kept=None):
    """The equations one by one; ``prompt`` and ``kept`` may be None."""
    u = F.unfold(image, P, stride=P).transpose(1, 2)
    hidden = F.linear(u, w1, b1).relu()
    patch = F.linear(hidden, w2, b2)
    if kept is not None:
        patch = patch * F.unfold(kept.to(image.dtype), P, stride=P).transpose(1, 2)
    tokens = u + WEIGHTS[1] * patch
    if prompt is not None:
        tokens = tokens + WEIGHTS[0] * F.unfold(prompt, P, stride=P).transpose(1, 2)
    return tokens, hidden


def inputs(B, C, H, W, P, R, dtype, device, with_prompt=True):
    K = C * P * P
    image = torch.randn(B, C, H, W, device=device).to(dtype)
    prompt = torch.randn(B, C, H, W, device=device).to(dtype) if with_prompt else None
    w1, b1 = torch.randn(R, K, device=device) / K**0.5, torch.randn(R, device=device) * 0.1
    w2, b2 = torch.randn(K, R, device=device) / R**0.5, torch.randn(K, device=device) * 0.1
    grad = torch.randn(B, (H // P) * (W // P), K, device=device).to(dtype)
    return (image, prompt, w1, b1, w2, b2), grad


def expected(tensors, grad, P, dtype, kept=None):
    """Tokens, hidden and all gradients by autograd in ``dtype``; d_global is None without a global prompt."""
    tensors = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
    tokens, hidden = formula(*tensors, P, kept)
    present = [t for t in tensors if t is not None]
    gradients = iter(torch.autograd.grad(tokens, present, grad.to(dtype)))
    d_image, d_global, *rest = [None if t is None else next(gradients) for t in tensors]
    return dict(zip(NAMES, (tokens, hidden, d_image, d_global, *rest), strict=True))


def computed(tensors, grad, P, need_image=True, kept=None):
    image, prompt, w1, _, w2, _ = tensors
    tokens, hidden = superpose.superpose_fwd(*tensors, P, *WEIGHTS, grad.dtype, kept=kept)
    need_global = prompt is not None
    gradients = superpose.superpose_bwd(grad, image, hidden, w1, w2, P, *WEIGHTS, need_image, need_global, kept=kept)
    return dict(zip(NAMES, (tokens, hidden, *gradients), strict=True))


def check(actual, tensors, grad, P, dtype, kept=None):
    """fp32: 1e-5 of the largest value. 16 bits: twice the error of the formula in that dtype, plus one rounding."""
    exact = expected(tensors, grad, P, torch.float64, kept)
    plain = expected(tensors, grad, P, dtype, kept)
    for name, truth in exact.items():
        if truth is None or truth.numel() == 0:
            continue
        scale = truth.abs().max()
        error = (actual[name].double() - truth).abs().max()
        if dtype == torch.float32:
            budget = 1e-5 * scale
        else:
            budget = 2 * (plain[name].double() - truth).abs().max() + torch.finfo(dtype).eps * scale
        assert error <= budget, f"{name}: error {error:.2e} over budget {budget:.2e}"


SHAPES = [  # B, C, H, W, P, R
    (2, 3, 32, 48, 16, 16),  # the main case: K = 768, not a power of two
    (1, 1, 16, 12, 4, 1),  # K = 16 is less than a tile; one hidden unit, padded to 16
    (3, 3, 56, 40, 8, 5),  # 105 patches: the last block is partial and spans images
    (3, 3, 28, 42, 14, 16),  # K = 588: the last tile of K is partial
    (1, 1, 64, 32, 32, 17),  # 17 hidden units, padded to 32; the largest patch
    (3, 1, 72, 88, 8, 16),  # 297 patches: several blocks
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, device, poison):
    tensors, grad = inputs(*shape, dtype, device)
    P, kept = shape[4], None
    if shape[1] == 1:  # with dropout
        kept = torch.rand(tensors[0].shape, device=device) < 0.7
    actual = computed(tensors, grad, P, kept=kept)
    check(actual, tensors, grad, P, dtype, kept)
    assert actual["tokens"].dtype == actual["d_image"].dtype == actual["d_global"].dtype == dtype
    assert actual["hidden"].dtype == actual["dw1"].dtype == torch.float32


def test_dropout_of_everything(device, poison):
    """What is left knows nothing of the patch prompter; masks and images have any strides."""
    tensors, grad = inputs(2, 3, 16, 24, 8, 16, torch.float32, device)
    image = tensors[0].to(memory_format=torch.channels_last)
    none = torch.zeros(image.shape, dtype=torch.bool, device=device).mT.contiguous().mT
    actual = computed((image, *tensors[1:]), grad, 8, kept=none)
    check(actual, tensors, grad, 8, torch.float32, none)
    assert not any(actual[name].any() for name in ("dw1", "db1", "dw2", "db2"))


def test_without_global_prompt(device, poison):
    tensors, grad = inputs(2, 3, 32, 16, 8, 16, torch.float32, device, with_prompt=False)
    actual = computed(tensors, grad, 8)
    check(actual, tensors, grad, 8, torch.float32)
    assert actual["d_global"].shape == (0,)


def test_unneeded_image_gradient_is_empty_and_the_rest_is_unchanged(device, poison):
    tensors, grad = inputs(2, 3, 16, 24, 8, 16, torch.float32, device)
    both, without = computed(tensors, grad, 8), computed(tensors, grad, 8, need_image=False)
    assert without.pop("d_image").shape == (0,)
    for name, value in without.items():
        assert torch.equal(value, both[name]), name


@pytest.mark.parametrize("layout", ["channels_last", "cropped", "expanded"])
def test_noncontiguous_inputs(layout, device, poison):
    (image, prompt, *weights), grad = inputs(2, 3, 16, 24, 8, 16, torch.float32, device)
    if layout == "channels_last":
        image = image.to(memory_format=torch.channels_last)
        prompt = prompt.to(memory_format=torch.channels_last)
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "cropped":
        image = F.pad(image, (1, 2, 3, 4))[:, :, 3:-4, 1:-2]
    else:
        image, grad = image[:1].expand(2, -1, -1, -1), grad[:, :1].expand(-1, 6, -1)
    tensors = (image, prompt, *(w.t().contiguous().t() if w.ndim == 2 else w for w in weights))
    actual = computed(tensors, grad, 8)
    check(actual, tensors, grad, 8, torch.float32)
    assert actual["d_image"].is_contiguous() and actual["d_global"].is_contiguous()


def test_fp32_image_with_16_bit_tokens_is_exact_before_the_last_rounding(device, poison):
    tensors, grad = inputs(2, 3, 16, 24, 8, 16, torch.float32, device)
    grad = grad.half()
    actual = computed(tensors, grad, 8)
    truth = expected(tensors, grad, 8, torch.float64)
    torch.testing.assert_close(actual["tokens"].double(), truth["tokens"], rtol=2**-11, atol=1e-4)
    for name in ("hidden", "d_image", "dw1", "db1", "dw2", "db2"):
        assert (actual[name].double() - truth[name]).abs().max() <= 1e-5 * truth[name].abs().max(), name
    assert actual["tokens"].dtype == actual["d_global"].dtype == torch.float16
    assert actual["d_image"].dtype == torch.float32


def eight_bit(B, C, H, W, device):
    """An 8-bit image, its scale and shift, columns of one table, and the values that it stands for."""
    image = torch.randint(256, (B, C, H, W), dtype=torch.uint8, device=device)
    table = torch.stack([torch.rand(C, device=device) / 50 + 0.01, torch.randn(C, device=device)], 1)
    scale, shift = table.unbind(1)
    return image, scale, shift, image.double() * scale[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:4:2], ids=str)
def test_8_bit_images(shape, dtype, device, poison):
    B, C, H, W, P = shape[:5]
    (_, prompt, *weights), grad = inputs(*shape, dtype, device)
    image, scale, shift, values = eight_bit(B, C, H, W, device)
    image = image.to(memory_format=torch.channels_last)  # as image decoders write them
    tokens, hidden = superpose.superpose_fwd(image, prompt, *weights, P, *WEIGHTS, dtype, scale, shift)
    gradients = superpose.superpose_bwd(
        grad, image, hidden, weights[0], weights[2], P, *WEIGHTS, False, True, scale, shift
    )
    actual = dict(zip(NAMES, (tokens, hidden, *gradients), strict=True))
    assert actual.pop("d_image").shape == (0,) and tokens.dtype == dtype
    truth = expected((values, prompt, *weights), grad, P, torch.float64)
    for name, value in actual.items():
        rounded = dtype == torch.bfloat16 and name in ("tokens", "d_global")
        budget = (2.0**-7 if rounded else 1e-5) * truth[name].abs().max()  # the interpreter truncates bf16
        assert (value.double() - truth[name]).abs().max() <= budget, name


def test_gradients_have_the_dtype_of_their_weight(device):
    (image, prompt, *weights), grad = inputs(1, 3, 16, 16, 8, 16, torch.float16, device)
    actual = computed((image, prompt, *(w.half() for w in weights)), grad, 8)
    assert all(actual[name].dtype == torch.float16 for name in ("dw1", "db1", "dw2", "db2"))


def test_empty_batch(device):
    tensors, grad = inputs(0, 3, 16, 24, 8, 16, torch.float32, device)
    actual = computed(tensors, grad, 8)
    assert actual["tokens"].shape == (0, 6, 192) and actual["hidden"].shape == (0, 6, 16)
    assert actual["d_image"].shape == (0, 3, 16, 24)
    assert all(not actual[name].any() for name in ("dw1", "db1", "dw2", "db2"))


def test_same_inputs_same_bits(device, poison):
    tensors, grad = inputs(3, 3, 56, 40, 8, 16, torch.float32, device)
    once, again = computed(tensors, grad, 8), computed(tensors, grad, 8)
    for name in NAMES:
        assert torch.equal(once[name], again[name]), name


def test_a_split_sums_several_blocks_of_patches(device, monkeypatch, poison):
    monkeypatch.setattr(chip, "MULTIPROCESSORS", dict.fromkeys(chip.MULTIPROCESSORS, 3))
    tensors, grad = inputs(4, 3, 64, 80, 8, 16, torch.float32, device)
    check(computed(tensors, grad, 8), tensors, grad, 8, torch.float32)


def test_nan_is_not_hidden_by_relu(device):
    tensors, grad = inputs(1, 3, 8, 16, 8, 16, torch.float32, device)
    tensors[0][0, 0, 0, 0] = float("nan")
    actual = computed(tensors, grad, 8)
    assert actual["hidden"][0, 0].isnan().all() and actual["tokens"][0, 0].isnan().all()
    assert not actual["tokens"][0, 1].isnan().any()
    truth = expected(tensors, grad, 8, torch.float64)["db1"].float()
    torch.testing.assert_close(actual["db1"], truth)  # the gradient passes where ReLU gave NaN


def test_units_that_only_fill_a_tile_make_no_nan(device):
    (image, _, w1, *weights), grad = inputs(1, 3, 8, 8, 8, 8, torch.float32, device, with_prompt=False)
    image[0, 1, 2, 3], w1 = torch.inf, -w1.abs()  # no unit of the layer is active
    tensors = image, None, w1, *weights
    torch.testing.assert_close(
        computed(tensors, grad, 8)["tokens"], expected(tensors, grad, 8, torch.float64)["tokens"].float()
    )


def test_the_hidden_width_is_bounded(device):
    tensors, grad = inputs(1, 3, 8, 8, 8, 129, torch.float32, device)
    with pytest.raises(ValueError, match="1 to 128"):
        computed(tensors, grad, 8)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(chip, "INTERPRETED", False)
    tensors, grad = inputs(1, 3, 8, 8, 8, 16, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        computed(tensors, grad, 8)


@pytest.mark.parametrize("arch", list(chip.MULTIPROCESSORS))
@pytest.mark.parametrize("R", [1, 16, 17, 64, 128])
def test_the_weight_grid_is_bounded(arch, R):
    for P, M in ((4, 1), (16, 50176), (32, 10**6)):
        config = superpose.launch_config("bwd_weight", 3 * P * P, R, torch.bfloat16, arch)
        splits = superpose.weight_splits(M, 3 * P * P, config, arch)
        programs = splits * -(-3 * P * P // config["BLOCK_K"])
        assert splits == 1 or 1 < programs <= 2 * chip.MULTIPROCESSORS[arch]
