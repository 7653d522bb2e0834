"""The prompters against those of the reference."""

import copy

import pytest
import torch
from torch import nn

from insvp_fast import InsVPConfig, prompters, reference
from insvp_fast.testing import assert_within_budget, relative_error

PAPER = InsVPConfig(prompt_length=2)
RELEASED = InsVPConfig.released(prompt_length=3)


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


def test_large_images_are_pooled_as_by_the_reference():
    expected, fast = pair("SpecificPrompter", PAPER)
    image = torch.randn(1, 3, 272, 272)  # windows of 17 x 17, more than the operation takes
    assert relative_error(fast(image), expected.double()(image.double())) < 1e-5
