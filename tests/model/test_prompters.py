"""The prompters against those of the reference, and their operations ``ops.conv`` and ``ops.conv_pool``."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

from insvp_fast import InsVPConfig, ops, prompters, reference
from insvp_fast.testing import assert_within_budget, relative_error

PAPER = InsVPConfig(prompt_length=2)
RELEASED = InsVPConfig.released(prompt_length=3)


# operations


def operands(dtype=torch.float32, B=2, C=3, size=(9, 10), out=4, kernel=(3, 5)):
    shapes = (B, C, *size), (out, C, *kernel), (out,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run_conv(x, weight, bias, **kwargs):
    return ops.conv(x, weight, bias, 2, 7, 8, True, **kwargs)


def run_conv_pool(x, weight, bias, **kwargs):
    return ops.conv_pool(x, weight, bias, 8, 8, 4, **kwargs)


def with_gradients(function, inputs, seed=1):
    y = function(*inputs)
    torch.manual_seed(seed)
    return [y, *torch.autograd.grad(y, inputs, torch.randn(y.shape, dtype=torch.float64).to(y))]


@pytest.mark.parametrize("run", [run_conv, run_conv_pool])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operations_in_every_dtype(run, dtype):
    """The numbers are those of PyTorch's modules, also in dtypes that the native library does not have."""

    def plain(x, weight, bias):
        y = F.conv2d(x, weight, bias, padding="same", dilation=2 if run is run_conv else 1)
        if run is run_conv:
            return reference.crop_center(y.relu(), 7, 8)
        return F.leaky_relu(F.max_pool2d(reference.crop_center(y, 8, 8), 4))

    inputs = operands(dtype)
    exact = with_gradients(plain, [t.detach().double().requires_grad_() for t in inputs])
    for value, rough, expected in zip(with_gradients(run, inputs), with_gradients(plain, inputs), exact, strict=True):
        assert value.dtype == dtype and value.shape == expected.shape
        assert_within_budget(value, rough, expected, dtype)


@pytest.mark.parametrize("run", [run_conv, run_conv_pool])
def test_gradcheck(run):
    assert torch.autograd.gradcheck(run, operands(torch.float64, B=1, C=2, out=2))


def test_opcheck():
    x, weight, bias = (t.detach() for t in operands())
    fwd = torch.ops.insvp_fast.conv_fwd.default
    opcheck(fwd, (x, weight, bias, 2, 7, 8, True, torch.bfloat16))
    y = fwd(x, weight, bias, 2, 7, 8, True, torch.float32)
    for mask, need_x in ((y, True), (None, False)):
        opcheck(torch.ops.insvp_fast.conv_bwd.default, (y, x, mask, weight, 2, 7, 8, need_x))
    fwd = torch.ops.insvp_fast.conv_pool_fwd.default
    opcheck(fwd, (x, weight, bias, 8, 8, 4, 0.01, torch.bfloat16))
    y, chosen = fwd(x, weight, bias, 8, 8, 4, 0.01, torch.float32)
    for need_x in (True, False):
        opcheck(torch.ops.insvp_fast.conv_pool_bwd.default, (y, x, y, chosen, weight, 8, 8, 4, 0.01, need_x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel", [(3, 5), (4, 2), (25, 11)])
def test_written_out_gradients_are_those_of_autograd(kernel, relu):
    x, weight, _ = inputs = operands(torch.float64, kernel=kernel)
    y, *expected = with_gradients(lambda *t: reference.conv(*t, 2, 7, 8, relu), inputs)
    torch.manual_seed(1)
    grad = torch.randn_like(y)
    got = reference.conv_bwd(grad * (y > 0) if relu else grad, x, weight, 2, 7, 8)
    torch.testing.assert_close(got, tuple(expected))
    y, *expected = with_gradients(lambda *t: reference.conv_pool(*t, 8, 9, 1, 0.3)[0], inputs)
    _, chosen = reference.conv_pool(*inputs, 8, 9, 1, 0.3)
    torch.manual_seed(1)
    torch.testing.assert_close(
        reference.conv_pool_bwd(torch.randn_like(y), x, y, chosen, weight, 8, 9, 1, 0.3), tuple(expected)
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, w, b: ops.conv(x, w[:, :1], b, 1, 9, 10), "expected"),
        (lambda x, w, b: ops.conv(x, w, b[:1], 1, 9, 10), "expected"),
        (lambda x, w, b: ops.conv(x, w, b, 1, 10, 10), "a centre of 10x10: expected at most 9x10"),
        (lambda x, w, b: ops.conv_pool(x, w, b, 8, 8, 3), "in windows of 3x3"),
        (lambda x, w, b: ops.conv_pool(x, w, b, 8, 8, 17), "windows of 17x17"),
        (lambda x, w, b: ops.conv_pool(x, w, b, 8, 8, 4, -0.1), r"negative_slope=-0\.1"),
    ],
)
def test_wrong_arguments_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run(*operands())


# prompters


def pair(kind: str, config: InsVPConfig, embed_dim: int = 48):
    """The reference's prompter and ours with the same weights; a width of 48 = 3·4² pools to 16x16, then 4x4."""
    own, plain = getattr(prompters, kind), getattr(reference, kind)
    arguments = (3, config) if kind == "GlobalPrompter" else (3, 4, embed_dim, config)
    expected = plain(*arguments)
    fast = own(*arguments)
    fast.load_state_dict(expected.state_dict())
    return expected, fast


def outcome(prompter, image, seed=0, autocast=None):
    image = image.detach().clone().requires_grad_()
    torch.manual_seed(seed)  # of the dropout masks
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = prompter(image)
    torch.manual_seed(1)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, [image, *prompter.parameters()], grad)]


KINDS = ["GlobalPrompter", "SpecificPrompter"]
SIZES = [
    (32, 32),  # windows of 2 x 2
    (53, 58),  # 3 x 3, with borders cut off
    (20, 40),  # windows that are not square
    (12, 16),  # smaller than the pooled map: windows overlap
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_prompters_are_the_references_under_the_same_masks(kind, config, size, batch):
    expected, fast = pair(kind, config)
    image = torch.randn(batch, 3, *size)
    exact = outcome(expected.double(), image.double())
    for value, want in zip(outcome(fast, image), exact, strict=True):
        assert value.shape == want.shape and value.dtype == torch.float32
        assert relative_error(value, want) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    expected, fast = pair(kind, PAPER)
    image = torch.randn(0, 3, 32, 32)
    got = outcome(fast, image)
    assert got[0].shape == expected(image).shape
    assert all((value == 0).all() for value in got[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompters_under_autocast(kind, config, dtype):
    expected, fast = pair(kind, config)
    image = torch.randn(2, 3, 32, 32)
    exact = outcome(copy.deepcopy(expected).double(), image.double())
    plain = outcome(expected, image, autocast=dtype)
    for value, rough, want in zip(outcome(fast, image, autocast=dtype), plain, exact, strict=True):
        assert value.dtype == rough.dtype
        assert_within_budget(value, rough, want, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_weights_run_through_the_modules(kind):
    expected, fast = pair(kind, PAPER)
    image = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    assert fast.to(torch.bfloat16)(image).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # as PyTorch's convolutions do
        expected(image)
    with pytest.raises(RuntimeError):
        pair(kind, PAPER)[1](image)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_prompters_compile_whole(kind, autocast):
    _, fast = pair(kind, InsVPConfig(global_dropout=0.0, prompt_length=2))
    image = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for value, want in zip(outcome(compiled, image, 0, autocast), outcome(fast, image, 0, autocast), strict=True):
        assert torch.equal(value, want)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def use_a_subclass(conv):
    conv.__class__ = Doubled


def add_a_hook(conv):
    conv.register_forward_hook(lambda module, args, y: 2 * y)


def patch_forward(conv):
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)


def parametrize(conv):
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(conv, name, Twice())


@pytest.mark.parametrize("change", [use_a_subclass, add_a_hook, patch_forward, parametrize])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_convolutions_are_not_bypassed(kind, change):
    """A last convolution with twice the result gives twice the prompt."""
    _, fast = pair(kind, PAPER)
    fast, image = fast.eval(), torch.randn(1, 3, 32, 32)
    plain = fast(image)
    change(fast.conv2 if kind == "GlobalPrompter" else fast.conv3)
    torch.testing.assert_close(fast(image), 2 * plain)
