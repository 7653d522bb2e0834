"""The training loop against a plain restatement in double precision, on the batches that it made."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

from insvp_fast.training.loss import Loss
from insvp_fast.training.run import train
from insvp_fast.training.trainer import Trainer
from tests.training.small_runs import quick

MIXED = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.5, "label_smoothing": 0.1, "warmup": 0.2}


def recorded(monkeypatch, recipe) -> tuple[torch.nn.Module, list[tuple], dict]:
    """The model before training, (number in its epoch, images, targets, smoothing) of each batch, what was trained."""
    models: list[torch.nn.Module] = []
    batches: list[tuple] = []
    train_batch, mix = Trainer.train_batch, Loss.mix

    def train_batch_and_record(self, images, classes):
        models.extend([] if models else [copy.deepcopy(self.model)])
        batches.append((self.batch,))
        return train_batch(self, images, classes)

    def mix_and_record(self, images, targets):
        images, targets, smoothing = mix(self, images, targets)
        batches[-1] += (images.clone(), targets.clone(), smoothing)
        return images, targets, smoothing

    monkeypatch.setattr(Trainer, "train_batch", train_batch_and_record)
    monkeypatch.setattr(Loss, "mix", mix_and_record)
    run = train(recipe)
    monkeypatch.undo()
    return models[0], batches, load_file(run / "adapter" / "adapter_model.safetensors")


def restate(model, batches, recipe) -> tuple[dict[str, torch.Tensor], list[float]]:
    """AdamW on the mean cross-entropy of ``recipe.accumulate`` batches, with the learning rates of the release.

    Returns the weights, and the norms of the gradients of the steps.
    """
    trained = {name: p for name, p in model.double().named_parameters() if p.requires_grad}
    undecayed = {k for k, p in trained.items() if (p.ndim == 1 or "common_prompts" in k) and not recipe.released}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    steps: list[list] = []
    norms: list[float] = []
    for batch in batches:
        steps += [] if batch[0] % recipe.accumulate else [[]]
        steps[-1].append(batch[1:])
    rising = round(recipe.warmup * len(steps))
    for t, step in enumerate(steps, 1):
        fraction = (t - 1 - rising) / (len(steps) - rising)
        lr = recipe.lr * (t / rising if t <= rising else (1 + math.cos(math.pi * fraction)) / 2)
        loss = torch.zeros((), dtype=torch.float64)
        for images, targets, smoothing in step:
            logits = model(images.double())
            if targets.ndim == 1:
                targets = torch.eye(logits.shape[1])[targets]
            targets = targets.double() * (1 - smoothing) + smoothing / logits.shape[1]
            loss = loss - (targets * logits.log_softmax(1)).sum() / sum(len(images) for images, *_ in step)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        norms.append(norm.item())
        scale = min(1.0, recipe.clip_grad / norms[-1]) if recipe.clip_grad else 1.0
        with torch.no_grad():
            for name, gradient in zip(trained, (scale * gradient for gradient in gradients), strict=True):
                p, (first, second) = trained[name], moments[name]
                first.lerp_(gradient, 0.1), second.lerp_(gradient**2, 0.001)
                p *= 1 - lr * (0 if name in undecayed else recipe.weight_decay)
                p -= lr * first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return trained, norms


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 5, "accumulate": 2, "weight_decay": 0.5} | MIXED,
        {
            "batch_size": 5,
            "accumulate": 3,
            "weight_decay": 1.0,
            "label_smoothing": 0.1,
            "warmup": 0.3,
            "released": True,
        },
        {"batch_size": 5, "clip_grad": 1.0},
    ],
)
def test_training_is_what_its_settings_say(pictures, tmp_path, monkeypatch, settings):
    # without dropout, which a restatement would draw anew
    dropouts = {f"{prompt}_dropout": 0.0 for prompt in ("global", "patch", "common", "specific")}
    recipe = quick(pictures, tmp_path, epochs=2, lr=1e-2, retrain=True, **dropouts, **settings)
    model, batches, found = recorded(monkeypatch, recipe)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    weights, norms = restate(model, batches, recipe)
    assert not recipe.clip_grad or min(norms) < recipe.clip_grad < max(norms)
    for name, p in weights.items():
        moved = (p - before[name]).norm()
        # Adam divides a gradient by its size: where it is near 0, fp32's rounding of it moves the weight as far
        assert moved > 0 and (found[name].double() - p).norm() < 2e-3 * moved, name
