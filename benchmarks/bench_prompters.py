"""The convolutional prompters as modules: the reference's, with PyTorch's convolutions, and this package's."""

import functools

import pytest
import torch
from torch import nn

from insvp_fast import InsVPConfig, prompters, reference
from insvp_fast.testing import DEVICE, relative_error

BATCH = 8 if DEVICE.type == "cpu" else 256
CONFIGS = {"paper": InsVPConfig(global_dropout=0.0), "release": InsVPConfig.released(global_dropout=0.0)}


@functools.cache
def make_prompters(kind, preset):
    """The reference's prompter and ours, with the same weights."""
    arguments = (3, CONFIGS[preset]) if kind == "GlobalPrompter" else (3, 16, 768, CONFIGS[preset])
    made = [getattr(home, kind)(*arguments).eval().to(DEVICE) for home in (reference, prompters)]
    made[1].load_state_dict(made[0].state_dict())
    return dict(zip(("reference", "insvp_fast"), made, strict=True))


@functools.cache
def image(preset, kind, batch):
    """Images; the release's specific prompter reads the prompted image, which has a gradient."""
    needs_gradient = preset == "release" and kind == "SpecificPrompter"
    return torch.randn(batch, 3, 224, 224, device=DEVICE, requires_grad=needs_gradient)


def run(prompter: nn.Module, x: torch.Tensor, amp: bool, backward: bool) -> list[torch.Tensor]:
    inputs = [t for t in (x, *prompter.parameters()) if t.requires_grad]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp), torch.set_grad_enabled(backward):
        y = prompter(x)
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))] if backward else [y]


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("preset", list(CONFIGS))
@pytest.mark.parametrize("kind", ["GlobalPrompter", "SpecificPrompter"])
@pytest.mark.parametrize("provider", ["reference", "insvp_fast"])
def bench_prompters(benchmark, tiny, provider, kind, preset, direction, amp):
    benchmark.group = f"{kind} {preset} {direction} {'bf16 autocast' if amp else 'fp32'}"
    x, backward = image(preset, kind, 1 if tiny else BATCH), direction != "forward"
    prompter = make_prompters(kind, preset)[provider]

    results = benchmark.pedantic(lambda: run(prompter, x, amp, backward), rounds=10, warmup_rounds=2)
    if not amp:  # in 16 bits another pixel may be the maximum; tests/model/test_prompters.py has the bounds
        expected = run(make_prompters(kind, preset)["reference"], x, False, backward)
        for value, want in zip(results, expected, strict=True):
            # the reference itself is off by up to 1e-3: PyTorch's sum of 400,000 gradients for a bias
            assert relative_error(value, want) < 4e-3
