"""The precision of a run: what `auto` stands for, and the scaling of fp16's gradients, by a scaler on the CPU."""

import json
from itertools import pairwise

import pytest
import torch

from insvp_fast.training import run as run_module
from insvp_fast.training.accelerator import create_accelerator, resolve_amp
from insvp_fast.training.run import train
from insvp_fast.training.trainer import Trainer
from tests.training.killed_runs import outcome
from tests.training.small_runs import quick


@pytest.mark.parametrize(
    ("capability", "has_bf16", "expected"),
    [
        ((9, 0), True, "bf16"),
        ((8, 0), True, "bf16"),
        ((7, 5), False, "fp16"),
        ((7, 0), False, "fp16"),
        ((6, 1), False, "off"),
    ],
)
def test_auto_is_the_fast_16_bits_of_the_gpu(capability, has_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # V100 and T4 emulate bf16, which PyTorch counts as support unless it is told not to
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_amp("auto") == expected
    assert [resolve_amp(amp) for amp in ("bf16", "fp16", "off")] == ["bf16", "fp16", "off"]


@pytest.fixture
def scaled(monkeypatch):
    """Runs whose gradients are scaled as in fp16; ``steps`` are the head's weights and the scale after each step.

    The third step has an infinite gradient. Every second good step doubles the scale.
    """
    steps = []

    def create(*arguments):
        accelerator = create_accelerator(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return accelerator

    step = Trainer._step

    def overflowing(self, number):
        if number == 2:
            self.trained["head.weight"].grad[0, 0] = float("inf")
        step(self, number)
        steps.append((self.trained["head.weight"].detach().clone(), self.accelerator.scaler.get_scale()))

    monkeypatch.setattr(run_module, "create_accelerator", create)
    monkeypatch.setattr(Trainer, "_step", overflowing)
    for name in ("plot_curves", "plot_prompts"):  # which take longer than the training
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)
    return steps


def test_scaled_gradients(scaled, pictures, tmp_path, monkeypatch):
    """An infinite one skips its step alone, the others change nothing, and a resumed run goes on with its scale."""
    recipe, step = quick(pictures, tmp_path, batch_size=4, save_steps=1), Trainer._step
    whole = train(recipe)
    expected = list(scaled)
    weights, scales = zip(*expected, strict=True)
    assert [scale / 2.0**10 for scale in scales] == [1, 2, 1, 1, 2]
    assert [torch.equal(*pair) for pair in pairwise(weights)] == [False, True, False, False]

    def interrupted(self, number):
        if number == 4:  # between the two good steps that double the scale
            raise KeyboardInterrupt
        step(self, number)

    scaled.clear()
    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.setattr(Trainer, "_step", step)
    folder = train(resume=whole.with_name("pictures-2"))
    assert [scale for _, scale in scaled] == list(scales)
    assert outcome(folder) == outcome(whole)
    states = [json.loads((run / "last" / "state.json").read_text())["scaler"] for run in (whole, folder)]
    assert states[0] == states[1] and states[0]["scale"] == scales[-1]

    def unscaled(self, number):
        if number == 2:  # a power of 2 scales exactly: up to here both runs are the same to the bit
            raise KeyboardInterrupt
        assert self.accelerator.scaler is None
        self.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)  # whose scale the fixture reads
        step(self, number)
        self.accelerator.scaler = None

    scaled.clear()
    monkeypatch.setattr(run_module, "create_accelerator", create_accelerator)
    monkeypatch.setattr(Trainer, "_step", unscaled)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert all(torch.equal(plain, weight) for (plain, _), weight in zip(scaled, weights[:2], strict=True))
