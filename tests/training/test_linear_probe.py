"""Softmax regression on frozen features, and heads that begin as one."""

import pytest
import torch
from safetensors.torch import load_file

from insvp_fast.errors import InsVPError
from insvp_fast.training import trainer
from insvp_fast.training.linear_probe import fit_linear_probe
from insvp_fast.training.run import train
from tests.training.small_runs import quick, read_records


def _features(images: int, classes: int, width: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    labels = torch.arange(images) % classes
    means = 40 * torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    return 7 + means[labels] + 50 * torch.randn(images, width, generator=generator), labels


@pytest.mark.parametrize(("classes", "strength"), [(2, 1e-3), (3, 1e-3), (5, 1.0)])
def test_it_is_the_minimum_of_the_penalized_loss(classes, strength):
    train, val = _features(61, classes), _features(23, classes)
    probe = fit_linear_probe(train, val, classes, [strength])
    weight, bias = probe.weight.requires_grad_(), probe.bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(train[0].double() @ weight.T + bias, train[1], reduction="sum")
    gradients = torch.autograd.grad(strength * loss + weight.square().sum() / 2, [weight, bias])
    assert all(gradient.abs().max() < 1e-6 * strength * len(train[0]) for gradient in gradients)  # convex: one minimum


def test_the_penalty_is_chosen_on_val_and_of_equals_the_strongest():
    train, val = _features(40, 4), _features(200, 4)
    strengths = [1e-9, 1e-4, 1e-3, 1e1]
    each = [fit_linear_probe(train, val, 4, [C]).val_accuracy for C in strengths]
    assert len(set(each)) > 1
    best = fit_linear_probe(train, val, 4, strengths)
    assert (best.C, best.val_accuracy) == (strengths[each.index(max(each))], max(each))
    assert fit_linear_probe(train, train, 4, [1e1, 1e2, 1e3]).C == 1e1 or max(each) < 1


def test_a_class_without_images_is_never_predicted():
    features, classes = _features(40, 3)
    probe = fit_linear_probe((features, classes + 1), (features, classes + 1), 5)
    predicted = (features.double() @ probe.weight.T + probe.bias).argmax(1)
    assert set(predicted.tolist()) == {1, 2, 3}


def test_a_run_is_never_worse_on_val_than_the_probe_it_begins_with(pictures, tmp_path, monkeypatch):
    accuracies = iter([0.75, 0.5, 0.25, 1.0])  # of epoch 0, of both epochs on val, and of the kept one on test
    monkeypatch.setattr(trainer, "evaluate_accuracy", lambda *_: next(accuracies))
    run = train(quick(pictures, tmp_path, epochs=2, head_init="probe"))
    assert read_records(run)[-1]["kept_epoch"] == 0


def test_a_resumed_run_does_not_begin_again(pictures, tmp_path, monkeypatch):
    settings = {"epochs": 2, "head_init": "probe"}
    whole = train(quick(pictures, tmp_path / "whole", **settings))
    save = trainer.Trainer.save

    def save_and_stop(self):
        save(self)
        raise InsVPError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", save_and_stop)
        with pytest.raises(InsVPError, match="stopped"):
            train(quick(pictures, tmp_path / "stopped", **settings))
    part = next((tmp_path / "stopped").iterdir())
    monkeypatch.setattr(trainer, "fit_head", None)
    resumed = train(resume=part)
    ends = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_head_of_several_layers_is_refused(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.InsVPViT, "get_classifier", lambda _: torch.nn.Identity())
    with pytest.raises(InsVPError, match="`head_init` is probe: expected a head that is one linear layer"):
        train(quick(pictures, tmp_path, head_init="probe"))
