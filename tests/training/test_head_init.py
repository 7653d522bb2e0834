"""Training that begins from a linear probe."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from insvp_fast.errors import InsVPError
from insvp_fast.training import linear_probe, trainer
from insvp_fast.training.linear_probe import begins_as_probe, fit_linear
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.trainer import Trainer
from tests.training.small_runs import quick, read_records


def test_a_run_is_never_worse_on_val_than_the_probe_it_begins_with(pictures, tmp_path, monkeypatch, capsys):
    evaluate, seen, scores = Trainer._evaluate_epoch, [], iter([0.75, 0.5, 0.25])

    def evaluate_and_pretend(self):
        seen.append(evaluate(self)["val_accuracy"])
        return evaluate(self) | {"val_accuracy": next(scores)}

    monkeypatch.setattr(Trainer, "_evaluate_epoch", evaluate_and_pretend)
    run = train(quick(pictures, tmp_path, epochs=2, head_init="probe"))
    *epochs, result = read_records(run)
    assert [(epoch["epoch"], epoch["val_accuracy"]) for epoch in epochs] == [(0, 0.75), (1, 0.5), (2, 0.25)]
    assert result["kept_epoch"] == 0
    assert "epoch 0" in capsys.readouterr().out
    assert seen[0] == 1  # the classes differ in brightness, and nothing is trained yet but the head


def test_a_resumed_run_does_not_begin_again(pictures, tmp_path, monkeypatch):
    settings = {"epochs": 2, "head_init": "probe", "save_steps": 1}
    whole = train(quick(pictures, tmp_path / "whole", **settings))
    save = Trainer.save

    def save_and_stop(self):
        save(self)
        raise InsVPError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_stop)
        with pytest.raises(InsVPError, match="stopped"):
            train(quick(pictures, tmp_path / "stopped", **settings))
    part = next((tmp_path / "stopped").iterdir())
    monkeypatch.setattr(trainer, "start_as_probe", None)
    resumed = train(resume=part)  # in the first epoch
    assert [record.get("epoch") for record in read_records(resumed)] == [0, 1, 2, None]
    ends = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_head_begins_with_images_that_are_not_augmented(pictures, tmp_path, monkeypatch):
    seen, fit = [], fit_linear
    monkeypatch.setattr(linear_probe, "fit_linear", lambda train, *rest: seen.append(train.inputs) or fit(train, *rest))
    for augmentation in ("none", "timm"):
        train(quick(pictures, tmp_path, head_init="probe", augmentation=augmentation))
    assert torch.equal(*seen)


def test_the_head_begins_with_features_in_the_precision_of_training(pictures, tmp_path, monkeypatch):
    precisions, read = [], linear_probe.read_features

    def noted(*arguments):
        precisions.append(torch.is_autocast_enabled("cpu"))
        return read(*arguments)

    def stop(*_):
        raise InsVPError("enough")

    monkeypatch.setattr(linear_probe, "read_features", noted)
    monkeypatch.setattr(linear_probe, "fit_linear", stop)
    with pytest.raises(InsVPError, match="enough"):
        train(quick(pictures, tmp_path, head_init="probe", amp="bf16"))
    assert precisions == [True, True]


@pytest.mark.parametrize("settings", [{"head_init": "random"}, {"released": True}, {"init_from": "adapter"}])
def test_by_default_a_head_of_one_linear_layer_begins_as_a_probe(settings):
    layer = torch.nn.Linear(2, 2)
    linear, deep = (SimpleNamespace(head=head) for head in (layer, torch.nn.Sequential(layer, layer)))
    assert begins_as_probe(Recipe(), linear) and not begins_as_probe(Recipe(), deep)
    assert not begins_as_probe(Recipe(**settings), linear)
