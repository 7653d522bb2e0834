"""What the settings of a recipe change in training."""

import json
from functools import partialmethod
from types import SimpleNamespace

import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file

from insvp_fast import InsVPConfig
from insvp_fast.errors import InsVPError
from insvp_fast.training import accelerator, models, run_logger, trainer
from insvp_fast.training.average import WeightAverage
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.trainer import Trainer
from tests.training.killed_runs import TIMES
from tests.training.small_runs import SMALL, quick, read_records


def give_scores(monkeypatch, **scores):
    """Let each evaluation have the next of these scores."""
    columns = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
    given = iter([SimpleNamespace(scores=lambda found=column: found | {"loss": 0.0}) for column in columns])
    monkeypatch.setattr(trainer, "compute_metrics", lambda *_: next(given))


def test_diverging_loss_stops_with_advice(few_digits, tmp_path):
    recipe = Recipe(output=str(tmp_path), lr=1e30, probe=False, **SMALL)
    with pytest.raises(InsVPError, match=r"the loss became (nan|inf) in epoch 1/3.*lower `lr`"):
        train(recipe)


@pytest.mark.parametrize("released", [False, True])
def test_the_release_decays_every_trained_tensor(released, tmp_path, few_digits, monkeypatch):
    seen = []

    def stop(training):
        seen.append(training.optimizer)
        raise InsVPError("enough")

    monkeypatch.setattr(Trainer, "fit", stop)
    recipe = Recipe(output=str(tmp_path), released=released, prompt_length=2, weight_decay=0.3, probe=False, **SMALL)
    with pytest.raises(InsVPError, match="enough"):
        train(recipe)
    decays = {group["weight_decay"] for group in seen[0].param_groups}
    assert decays == ({0.3} if released else {0.0, 0.3})


def test_the_best_epoch_is_kept_the_last_of_equals(pictures, tmp_path, monkeypatch):
    give_scores(monkeypatch, accuracy=[0.5, 0.75, 0.75, 0.25, 1.0])
    run = train(quick(pictures, tmp_path, epochs=4))
    best, adapter = (run / name / "adapter_model.safetensors" for name in ("best", "adapter"))
    assert best.read_bytes() == adapter.read_bytes()
    result = read_records(run)[-1]
    assert {key: value for key, value in result.items() if key not in TIMES} == {
        "model": "InsVP",
        "test_accuracy": 1.0,
        "test_loss": 0.0,
        "metric": "top1",
        "trained_parameters": sum(tensor.numel() for tensor in load_file(adapter).values()),
        "trained_epochs": 4,
        "kept_epoch": 3,
        "kept_score": 0.75,
        "selected_on": "val",
        "protocol": "paper",
    }


def test_selection_on_the_test_images_is_named(pictures, tmp_path, capsys):
    run = train(quick(pictures, tmp_path, select_on="test"))
    epoch, result = read_records(run)
    assert epoch["test_accuracy"] == result["test_accuracy"]
    assert result["selected_on"] == "test"
    assert "protocol paper, epoch selected on test, tested on test" in capsys.readouterr().out


def test_retraining_takes_train_and_val_and_the_last_epoch(pictures, tmp_path, capsys, monkeypatch):
    counts, train_batch = [], Trainer.train_batch

    def counted(self, images, targets):
        counts.append(len(images))
        return train_batch(self, images, targets)

    monkeypatch.setattr(Trainer, "train_batch", counted)
    run = train(quick(pictures, tmp_path, retrain=True, epochs=2))
    *epochs, result = read_records(run)
    assert [(record["val_accuracy"], record["val_loss"]) for record in epochs] == [(None, None)] * 2
    assert (result["kept_epoch"], result["selected_on"]) == (2, None)
    assert sum(counts) == 2 * (18 + 8)
    assert not (run / "best").exists()
    assert "trained on train and val, last epoch" in capsys.readouterr().out
    assert json.loads((run / "last" / "state.json").read_text())["epoch"] == 2


def test_the_state_is_saved_as_often_as_asked_and_before_the_test(pictures, tmp_path, monkeypatch):
    saved, save = [], Trainer.save

    def noted(self):
        saved.append((self.epoch, self.batch, self.result is not None))
        save(self)

    monkeypatch.setattr(Trainer, "save", noted)
    give_scores(monkeypatch, accuracy=[0.5] * 4)
    recipe = quick(pictures, tmp_path, epochs=3, batch_size=9, save_every=2, save_steps=1)  # of 18 images
    train(recipe)
    within, ends = [(0, 1, False), (1, 1, False)], [(2, 0, False), (2, 1, False), (3, 0, False), (3, 0, True)]
    assert saved == within + ends


def test_a_best_epoch_that_was_being_replaced_is_put_back(pictures, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(quick(pictures, tmp_path))
    best = tmp_path / "pictures-1" / "best"
    best.rename(best.with_name("best.old"))
    train(resume=best.parent)
    assert best.is_dir() and not best.with_name("best.old").exists()


def test_an_average_is_what_is_kept(pictures, tmp_path, monkeypatch):
    weights, step = [], Trainer._step

    def recorded(self, number):
        step(self, number)
        weights.append(self.trained["head.weight"].detach().clone())

    monkeypatch.setattr(Trainer, "_step", recorded)
    run = train(quick(pictures, tmp_path, ema=0.9, retrain=True, epochs=2))
    kept = load_file(run / "adapter" / "adapter_model.safetensors")["head.weight"]
    average = weights[0].double()
    for number, weight in enumerate(weights[1:], 1):  # timm's warm-up: the decay begins low
        average = average.lerp(weight.double(), max(0.1, (1 + number) ** (-2 / 3)))
    torch.testing.assert_close(kept.double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(kept, weights[-1])


def test_mixing_smooths_targets_of_all_images(pictures, tmp_path, monkeypatch):
    seen, cross_entropy = [], torch.nn.functional.cross_entropy

    def spy(logits, targets, *weight, **how):
        if targets.ndim == 2:  # not an evaluation
            seen.append((len(logits), targets.detach().clone(), how["label_smoothing"]))
        return cross_entropy(logits, targets, *weight, **how)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    mixing = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "label_smoothing": 0.2}
    train(quick(pictures, tmp_path, batch_size=5, **mixing))  # 18 images: 5, 5, 5 and 3
    assert [size for size, *_ in seen] == [5, 5, 5, 3]
    assert all(smoothing == 0 for *_, smoothing in seen)
    for size, targets, _ in seen:
        assert targets.shape == (size, 2)
        assert targets.min() >= 0.1 - 1e-6
        torch.testing.assert_close(targets.sum(1), torch.ones(size))


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute": "mlp"},
        {"recompute": "block"},
        pytest.param({"compile": "prompters"}, marks=pytest.mark.slow),
        pytest.param({"compile": "model"}, marks=pytest.mark.slow),
    ],
)
def test_how_it_is_computed_changes_nothing(pictures, tmp_path, monkeypatch, settings):
    # without dropout, for which compiled code draws other masks
    monkeypatch.setattr(models, "insvp_config", lambda _: InsVPConfig(prompt_length=2, global_dropout=0.0))
    # traced and differentiated as with inductor, which takes twice as long and is tested in tests/model
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr("insvp_fast.training.run._plot_prompts", lambda *args: None)  # which would be traced too
    plain, other = (train(quick(pictures, tmp_path, batch_size=6, **more)) for more in ({}, settings))
    for one, two in zip(read_records(plain), read_records(other), strict=True):
        assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=1e-4)
        assert one.get("test_accuracy") == two.get("test_accuracy")


def test_the_largest_batch_that_fits_is_found(pictures, tmp_path, monkeypatch, capsys):
    forward = models.InsVPViT.forward

    def small(self, images):
        if len(images) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(self, images)

    monkeypatch.setattr(models.InsVPViT, "forward", small)
    run = train(quick(pictures, tmp_path, auto_batch=True))
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    assert (recipe["batch_size"], recipe["auto_batch"]) == (5, False)
    assert "batch size 5" in capsys.readouterr().out


def test_a_batch_is_tried_in_the_mode_and_precision_of_training():
    seen, model = [], torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    model.register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_autocast_enabled("cpu"))))
    recipe = Recipe(batch_size=7, auto_batch=True)
    accelerator.find_batch_size(recipe, model, (3, 2, 2), accelerator.create_accelerator("bf16"))
    assert seen == [(True, True)]


def test_peak_memory_is_in_bytes():
    assert accelerator.peak_memory(torch.device("cpu")) > 0.9 * psutil.Process().memory_info().rss


def test_a_slow_loader_is_told_once(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_logger, "SLOW_LOADER", -1.0)
    train(quick(pictures, tmp_path, epochs=2))
    lines = capsys.readouterr().out
    assert lines.count("the loader is the limit") == 1
    assert "data_wait" in read_records(tmp_path / "pictures-1")[0]


def test_a_tracker_that_is_not_installed_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "find_spec", lambda name: None)
    with pytest.raises(InsVPError, match="`trackers` has wandb: it is not installed; pip install wandb"):
        train(quick(pictures, tmp_path, trackers=("wandb",)))


def test_the_final_accuracy_is_measured_in_fp32(pictures, tmp_path, monkeypatch):
    """As `insvp eval` does, and the release, whatever the precision of training."""
    precisions, evaluate = [], trainer.compute_metrics

    def spied(model, *arguments):
        found = set()
        note = model.head.register_forward_pre_hook(lambda *_: found.add(torch.is_autocast_enabled("cpu")))
        metrics = evaluate(model, *arguments)
        note.remove()
        precisions.append(found)
        return metrics

    monkeypatch.setattr(trainer, "compute_metrics", spied)
    train(quick(pictures, tmp_path, amp="bf16"))
    assert precisions == [{True}, {False}]  # of the epoch, of the result


def test_an_average_is_lent_and_the_weights_come_back():
    weight = torch.nn.Parameter(torch.zeros(2))
    average = WeightAverage({"weight": weight}, 0.9)
    weight.data.fill_(1)
    with average.in_place():
        assert weight.tolist() == [0, 0]
    assert weight.tolist() == [1, 1]


@pytest.fixture(scope="module")
def batch_norms(tmp_path_factory):
    """The name of a backbone whose stem has batch norms, which the method `full` trains."""
    folder = tmp_path_factory.mktemp("mci")
    sizes = {"img_size": 32, "depth": 1, "mlp_ratio": 1.0}
    model = timm.create_model("vit_base_mci_224", num_classes=0, **sizes)
    timm.models.save_for_hf(model, folder, model_config={"model_args": sizes})
    return f"local-dir:{folder}"


def statistics(file):
    return {key: value for key, value in load_file(file).items() if "running" in key}


def test_running_statistics_are_those_of_the_epoch_that_is_kept(batch_norms, pictures, tmp_path, monkeypatch):
    give_scores(monkeypatch, accuracy=[0.9, 0.1, 0.9])
    run = train(quick(pictures, tmp_path, backbone=batch_norms, method="full", epochs=2, prompt_length=None))
    best, kept = (statistics(run / name / "adapter_model.safetensors") for name in ("best", "adapter"))
    assert best.keys() == kept.keys() and len(best) > 0
    assert all(torch.equal(best[key], kept[key]) for key in best)


def test_running_statistics_are_resumed(batch_norms, pictures, tmp_path, monkeypatch):
    recipe = quick(pictures, tmp_path, backbone=batch_norms, method="full", epochs=2, prompt_length=None)
    whole, save = train(recipe), Trainer.save

    def stop(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    resumed = train(resume=tmp_path / "pictures-2")
    before, after = (load_file(run / "adapter/adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(before[key], after[key]) for key in before)
