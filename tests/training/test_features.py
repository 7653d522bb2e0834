"""Uneven classes, several labels per image, early stopping, warm starts and the range test, from the command line."""

import copy
import csv
import itertools
import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from insvp_fast.commands import cli
from insvp_fast.data import Data, transform_for
from insvp_fast.data.images import Images
from insvp_fast.errors import InsVPError
from insvp_fast.training import load, lr_finder
from insvp_fast.training import run as run_module
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing
from insvp_fast.training.evaluation import evaluate_run
from insvp_fast.training.loss import Loss
from insvp_fast.training.lr_finder import RangeTest, range_test
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import find_lr, train
from insvp_fast.training.trainer import Trainer
from insvp_fast.training.warm_start import _require_same_division
from tests.training.small_runs import make_folder, quick, read_records
from tests.training.test_trainer import give_scores


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    for name in ("plot_curves", "plot_prompts"):  # which take longer than the training
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)


def command(data, tmp_path, *options):
    """Train on a folder from the command line; returns the exit status."""
    common = ["--epochs", "1", "--batch-size", "8", "--no-probe", "--amp", "off", "--prompt-length", "2"]
    return cli.main(["train", "--data", str(data), "--output", str(tmp_path), *common, *options])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """9 dark images, and one light one."""
    folder = make_folder(tmp_path_factory.mktemp("data") / "uneven", {"train": 9, "val": 2, "test": 3})
    for i in range(1, 9):
        (folder / "train" / "light" / f"{i}.png").unlink()
    return folder


def test_rare_classes_are_weighed_and_drawn(uneven, tmp_path, monkeypatch, capsys):
    seen, train_batch = [], Trainer.train_batch

    def spy(self, images, targets):
        seen.append((self.loss.weights, targets.tolist()))
        return train_batch(self, images, targets)

    monkeypatch.setattr(Trainer, "train_batch", spy)
    metric = ["--metric", "mean_per_class"]
    assert command(uneven, tmp_path, "--class-weights", "auto", "--sampling", "balanced", *metric) == 0
    assert sorted(target for _, targets in seen for target in targets) == [0] * 5 + [1] * 5
    torch.testing.assert_close(seen[0][0], torch.tensor([10 / 18, 5.0]))
    *_, epoch, result = read_records(tmp_path / "uneven-1")
    assert result["metric"] == "mean_per_class"
    assert {"val_accuracy", "val_mean_per_class", "val_f1", "val_loss"} <= epoch.keys()
    assert "keeps the best epoch by per class on val" in capsys.readouterr().out


class TestSeveralLabels:
    """Images that are dark or light, and may be red besides."""

    @pytest.fixture(autouse=True)
    def _data(self, monkeypatch):
        noise = np.random.default_rng(0)
        labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).repeat(3, 1)
        pixels = noise.integers(0, 60, (12, 36, 33, 3)) + 160 * labels[:, 1].numpy().astype(int)[:, None, None, None]
        pixels[..., 0] += 30 * labels[:, 2].numpy().astype(int)[:, None, None]
        preprocessing = resolve_preprocessing(load_backbone())
        images = Images(pixels.astype(np.uint8), labels).with_transform(transform_for(preprocessing))
        names, augmentation = ["dark", "light", "red"], {"augmentation": "none", "hflip": 0.0}
        data = Data(images, images, images, names, images, augmentation, "paper", images, preprocessing, True, {})
        monkeypatch.setattr(run_module, "load_data", lambda *_, **__: data)
        monkeypatch.setattr(load, "load_test_data", lambda *_, **__: images)

    def test_training_and_eval(self, tmp_path, capsys):
        mixing = ["--mixup", "0.5", "--label-smoothing", "0.1", "--class-weights", "auto"]
        assert command("scenes", tmp_path, *mixing, "--epochs", "2", "--probe") == 0
        run = tmp_path / "scenes-1"
        _, probe, *epochs, result = read_records(run)
        assert (probe["test_map"], probe["metric"]) == (1, "map")  # its training images
        assert result["metric"] == "map" and "test_accuracy" not in result
        assert all({"val_map", "val_f1", "val_f1_micro", "val_loss"} <= epoch.keys() for epoch in epochs)
        assert result["test_map"] > 0.6  # chance is 0.5
        printed = capsys.readouterr().out
        assert "images, 3 classes, several labels per image, such as dark and red\n" in printed
        assert f"val mAP {epochs[0]['val_map']:6.1%}" in printed and "test mAP" in printed
        assert json.loads((run / "config.json").read_text())["multi_label"] is True

        assert cli.main(["eval", str(run)]) == 0
        report = json.loads((run / "eval.json").read_text())
        assert report["map"] == pytest.approx(result["test_map"], abs=1e-6)
        assert list(report["per_class"]) == ["dark", "light", "red"] and "confusion" not in report
        assert not (run / "eval.png").exists()
        assert re.search(r"mAP \d+\.\d+%   macro F1 .*   micro F1 ", capsys.readouterr().out)


def test_a_run_stops_early_also_when_it_was_interrupted(pictures, tmp_path, monkeypatch, capsys):
    recipe = quick(pictures, tmp_path, metric="f1", patience=2, epochs=9)
    give_scores(monkeypatch, accuracy=[0.0] * 3, f1=[0.5, 0.75, 0.75])  # the third epoch is no better than the second
    with pytest.raises(StopIteration):  # there is no fourth score
        train(recipe)
    give_scores(monkeypatch, accuracy=[0.0] * 2, f1=[0.6, 0.9])
    *epochs, result = read_records(train(resume=tmp_path / "pictures-1"))
    assert (len(epochs), result["trained_epochs"], result["kept_epoch"]) == (4, 4, 3)
    assert "stopped early after 4 of 9 epochs: no better f1 since epoch 2" in capsys.readouterr().out


def test_stopping_early_needs_a_split_to_select_on(pictures, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(pictures, tmp_path, "--patience", "3", "--retrain")
    assert "--patience is 3: expected 0 with --retrain" in capsys.readouterr().err


@pytest.fixture(scope="module")
def first_run(pictures, tmp_path_factory):
    return train(quick(pictures, tmp_path_factory.mktemp("runs")))


def test_a_run_begins_with_another_adapter(first_run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", lambda *_: None)  # nothing is learned
    assert command(pictures, tmp_path, "--init-from", str(first_run / "adapter")) == 0
    assert f"begins with the weights of {first_run / 'adapter'}\n" in capsys.readouterr().out
    before, after = (
        load_file(run / "adapter/adapter_model.safetensors") for run in (first_run, tmp_path / "pictures-1")
    )
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_resumed_run_does_without_the_adapter_it_began_with(first_run, pictures, tmp_path):
    source = shutil.copytree(first_run / "adapter", tmp_path / "adapter")
    run = train(quick(pictures, tmp_path, init_from=str(source)))
    shutil.rmtree(source)
    assert train(resume=run) == run


def test_an_adapter_that_has_seen_the_test_images_is_refused(tmp_path):
    data = make_folder(tmp_path / "undivided", {".": 6})
    run = train(quick(data, tmp_path, split_seed=1))
    shutil.copytree(data, tmp_path / "copy")
    for place in ("undivided", "copy"):
        match = rf"init_from.* was trained on images of {place} that are tested here: expected `split_seed` 1"
        with pytest.raises(InsVPError, match=match):
            train(quick(tmp_path / place, tmp_path, split_seed=2, init_from=str(run)))


@pytest.mark.parametrize("change", ["another", "none"])
def test_a_run_is_tested_on_its_own_test_images(change, tmp_path):
    """Not on others that are there by now, nor on a part of what it was trained on."""
    data = make_folder(tmp_path / "photos", {"train": 6, "test": 2})
    run = train(quick(data, tmp_path))
    assert evaluate_run(run).metrics.images == 4
    if change == "another":
        shutil.copy(data / "train/dark/0.png", data / "test/light/new.png")
    else:
        shutil.rmtree(data / "test")
    with pytest.raises(InsVPError, match="found . other test images than in training"):
        evaluate_run(run)
    tested = evaluate_run(run, str(data))
    assert tested.metrics.images == {"another": 5, "none": 12}[change]
    assert change == "another" or "12 of its 12 images are among those of training" in tested.facts["note"]


def test_data_without_files_are_the_same_by_their_name():
    """Their digest may be of the class numbers alone."""
    cats, dogs = ({"data": f"hfds/{name}", "undivided_sha256": "1f", "split_seed": 1} for name in ("cats", "dogs"))
    _require_same_division(cats, dogs | {"split_seed": 2})
    with pytest.raises(InsVPError, match="trained on images of hfds/cats that are tested here"):
        _require_same_division(cats, cats | {"split_seed": 2})


def test_a_head_of_other_classes_is_drawn_anew(first_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", lambda *_: None)
    data = make_folder(tmp_path / "other", {"train": 3, "val": 1}, ("dim", "bright"))  # as many, but others
    run = train(quick(data, tmp_path, init_from=str(first_run)))
    assert "its head is of 2 other classes, a new one is drawn" in capsys.readouterr().out
    before, after = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (first_run, run))
    differ = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert differ == {"head.weight", "head.bias"}


def test_a_rate_is_found(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "range_test", partial(range_test, steps=15))
    assert command(pictures, tmp_path, "--find-lr", "--accumulate", "2") == 0
    suggested = float(re.search(r"suggested: --lr (\S+)", capsys.readouterr().out)[1])
    rows = list(csv.DictReader((tmp_path / "pictures-lr" / "lr.csv").open()))
    assert 3 < len(rows) <= 15
    rates = [float(row["rates"]) for row in rows]
    assert suggested in [pytest.approx(rate, rel=0.05) for rate in rates]
    assert np.diff(np.log(rates)) == pytest.approx(np.log(1e7) / 14)
    assert Image.open(tmp_path / "pictures-lr" / "lr.png").size[0] > 300
    assert [path.name for path in tmp_path.iterdir()] == ["pictures-lr"]


@pytest.mark.parametrize("is_main_process", [True, False])
def test_one_process_alone_prints_the_rate(is_main_process, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "find_lr", lambda recipe: 0.0056)
    monkeypatch.setattr(PartialState, "is_main_process", is_main_process)
    assert command(pictures, tmp_path, "--find-lr") == 0
    assert capsys.readouterr().out.count("suggested: --lr 0.0056") == is_main_process


def test_a_range_test_begins_alike_each_time_and_not_as_a_probe(pictures, tmp_path, monkeypatch):
    heads = []

    def stop(trainer):
        assert not trainer.begins_as_probe
        heads.append(trainer.trained["head.weight"].detach().clone())
        raise InsVPError("enough")

    monkeypatch.setattr(run_module, "range_test", stop)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.raises(InsVPError, match="enough"):
            find_lr(quick(pictures, tmp_path, head_init="probe"))
    assert torch.equal(*heads)


def test_no_rate_is_found_of_a_loss_that_is_not_a_number(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Loss, "__call__", lambda self, logits, *_: logits.sum() * float("nan"))
    assert command(pictures, tmp_path, "--find-lr") == 1
    assert "the loss is nan at the lowest learning rate, 1e-06: expected a finite one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_steepest_fall_of_the_loss_is_suggested():
    rates = np.geomspace(1e-5, 1, 51)
    loss = 2 - np.tanh(4 * (np.log10(rates) + 2.5)) + 50 * rates**2  # falls most at 10^-2.5
    loss[:3] = 90, 60, 30  # but for the noise of the first steps
    found = RangeTest(rates.tolist(), loss.tolist(), loss.tolist())
    assert found.suggestion() == pytest.approx(10**-2.5)
    with pytest.raises(InsVPError, match="the loss fell at no learning rate from 1e-06 to 0.0001"):
        RangeTest([1e-6, 1e-5, 1e-4], [1.0, 1.1, 2.0], [1.0, 1.1, 2.0]).suggestion()


def test_a_range_test_ends_at_four_times_the_least_loss_and_scales_its_rates(monkeypatch):
    rates, accelerator = [], SimpleNamespace(num_processes=2)
    trainer = SimpleNamespace(accelerator=accelerator, epoch=0, batch=0, steps_per_epoch=9, lr_of=None)
    trainer.recipe, trainer.state, trainer.restore = Recipe(batch_size=16, lr_scale="linear"), dict, dict

    def losses(trainer):  # which grow so slowly that none is four times the one before
        for step in itertools.count():
            rates.append(trainer.lr_of(step))
            yield 1.0 + step

    monkeypatch.setattr(lr_finder, "_losses_of_steps", losses)
    found = range_test(trainer, steps=50)
    assert 3.5 < found.smoothed[-1] <= 4
    assert rates[0] == pytest.approx(found.rates[0] * 2 * 16 / 64)


def test_a_range_test_leaves_no_trace(pictures, tmp_path, monkeypatch):
    def tested(self):
        self._train_epoch()
        before = copy.deepcopy(self.state())
        assert len(range_test(self, steps=4, highest=1e-2).rates) == 4  # more than an epoch
        for one, two in zip(tree_leaves(before), tree_leaves(self.state()), strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        assert self.lr_of(0) == pytest.approx(1e-3)
        raise InsVPError("enough")

    monkeypatch.setattr(Trainer, "fit", tested)
    with pytest.raises(InsVPError, match="enough"):
        train(quick(pictures, tmp_path, ema=0.9, mixup=0.4, lr=3e-3, epochs=1, warmup=0.9))
