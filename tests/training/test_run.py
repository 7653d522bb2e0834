"""Training end to end on small data, the run folder it leaves, and what reads that folder."""

import json
import os
import platform
import shlex
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from insvp_fast import __version__
from insvp_fast.commands import cli
from insvp_fast.errors import InsVPError
from insvp_fast.training import run as run_module
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.evaluation import evaluate_run
from insvp_fast.training.load import load_run
from insvp_fast.training.prediction import load_classifier, predict
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train, train_candidate
from tests.training.killed_runs import TIMES, outcome
from tests.training.small_runs import SMALL, make_folder, read_records, use_few_digits


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on few digits: its folder, the models as they came out of training, and the same run once more."""
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        models = []
        patch.setattr(run_module, "train_candidate", lambda *args: models.append(train_candidate(*args)) or models[-1])
        recipe = Recipe(output=str(tmp_path_factory.mktemp("runs")), **SMALL)
        first, again = train(recipe), train(replace(recipe, pictures=False))
        yield SimpleNamespace(folder=first, again=again, probe=models[0], insvp=models[1], recipe=recipe)


def test_metrics_are_complete_and_better_than_chance(digits_run):
    records = read_records(digits_run.folder)
    *epochs, last = [record for record in records if record["model"] == "InsVP"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert all(0 <= record["val_accuracy"] <= 1 and record["images_per_s"] > 0 for record in epochs)
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    kept = max(epochs, key=lambda record: (record["val_accuracy"], record["epoch"]))
    assert (last["kept_epoch"], last["selected_on"], last["protocol"]) == (kept["epoch"], "val", "paper")
    fit, probe = [record for record in records if record["model"] == "linear probe"]
    assert (fit["epoch"], probe["kept_epoch"], probe["selected_on"]) == (1, None, "val")
    assert last["test_accuracy"] > 0.3 and probe["test_accuracy"] > 0.6  # chance is 0.1


def test_same_seed_same_metrics_in_another_folder(digits_run):
    assert (digits_run.folder.name, digits_run.again.name) == ("digits-1", "digits-2")
    first, again = (
        [{key: value for key, value in record.items() if key not in TIMES} for record in read_records(folder)]
        for folder in (digits_run.folder, digits_run.again)
    )
    assert first == again
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (digits_run.folder, digits_run.again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_config_is_resolved(digits_run):
    config = json.loads((digits_run.folder / "config.json").read_text())
    assert Recipe(**config["recipe"]) == digits_run.recipe
    assert config["augmentation"]["augmentation"] == "none"
    versions = {"insvp_fast": __version__, "torch": torch.__version__, "timm": timm.__version__}
    assert config["versions"] == versions | {"python": platform.python_version()}
    assert shlex.split(config["command"]) == sys.orig_argv
    assert config["working_folder"] == os.getcwd()
    assert config["insvp"] == digits_run.insvp.config.to_dict()
    assert config["images"] == {"train": 210, "val": 30, "test": 60}
    assert config["class_names"] == list("0123456789")


@pytest.mark.parametrize("name", ["curve.png", "prompts.png"])
def test_pictures_show_something(digits_run, name):
    pixels = np.asarray(Image.open(digits_run.folder / name).convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 5


def test_adapter_gives_the_logits_of_the_trained_model(digits_run):
    images = torch.rand(5, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_run(digits_run.folder).model(images), digits_run.insvp.eval()(images))


def test_eval_repeats_the_test_accuracy(digits_run, few_digits):
    assert evaluate_run(digits_run.folder)[1].top1 == read_records(digits_run.folder)[-1]["test_accuracy"]


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ("a.png", {}, "files='a.png': expected a list of files"),
        (["a.png"], {"top_k": 0}, "top_k=0: expected an integer of at least 1"),
        (["a.png"], {"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        (["a.png"], {"batch_size": -1}, "batch_size=-1: expected an integer of at least 1"),
    ],
)
def test_predict_refuses_what_would_classify_nothing(files, settings, message, digits_run):
    with pytest.raises(ValueError, match=message):
        next(predict(load_classifier(digits_run.folder), files, **settings))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InsVPError, match="not a run folder"):
        evaluate_run(tmp_path)


def test_a_run_that_was_interrupted_has_no_adapter(digits_run, tmp_path):
    shutil.copy(digits_run.folder / "config.json", tmp_path)
    with pytest.raises(InsVPError, match="has no adapter"):
        evaluate_run(tmp_path)


def test_probe_trains_the_head_alone(digits_run):
    trained = {name for name, parameter in digits_run.probe.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    assert {name for name, _ in digits_run.probe.named_parameters() if not name.startswith("backbone.")} == trained


@pytest.mark.parametrize("which", ["insvp", "probe"])
def test_backbone_stays_as_it_was(digits_run, which):
    before, after = load_backbone().state_dict(), getattr(digits_run, which).backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_on_an_image_folder(tmp_path, capsys):
    folder = make_folder(tmp_path / "brightness", {"train": 24, "val": 4, "test": 6})
    settings = {"probe": False, "pictures": False, "epochs": 5, "batch_size": 8, "lr": 3e-3}
    run = train(Recipe(data=str(folder), output=str(tmp_path / "runs"), **settings))
    assert run.name == "brightness-1"
    lines = capsys.readouterr().out
    assert "\r" not in lines  # no bar where there is no terminal
    assert lines.count("images/s") == 5
    assert read_records(run)[-1]["test_accuracy"] > 0.9
    assert evaluate_run(run, str(folder))[1].top1 == read_records(run)[-1]["test_accuracy"]
    files = [str(folder / "test" / name / "0.png") for name in ("dark", "light")]
    assert [row.ranking[0][0] for row in predict(load_classifier(run), files)] == ["dark", "light"]


def test_the_command_in_mixed_precision_with_the_released_preset(tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures", {"train": 8, "val": 2})
    options = ["--data", str(folder), "--output", str(tmp_path / "runs"), "--amp", "bf16", "--released"]
    assert cli.main(["train", *options, "--epochs", "1", "--prompt-length", "2", "--no-probe"]) == 0
    printed = capsys.readouterr().out
    assert "epoch   1/1  loss" in printed
    assert printed.endswith(f"run folder: {tmp_path / 'runs' / 'pictures-1'}\n")
    config = json.loads((tmp_path / "runs" / "pictures-1" / "config.json").read_text())
    assert config["insvp"]["image_weights"] == [2.0, 1.0]
    assert config["protocol"].startswith("paper: no test was found, so val is only tested on")


def test_eval_refuses_data_with_other_classes(digits_run, tmp_path):
    with pytest.raises(
        InsVPError, match="found the class dark, light: expected some of the 10 classes of train: 0, 1, 2"
    ):
        evaluate_run(digits_run.folder, str(make_folder(tmp_path, {"test": 1})))


def test_the_output_must_be_a_folder(few_digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InsVPError, match="`output` is .*file: no folder can be made there"):
        train(Recipe(output=str(tmp_path / "file"), **SMALL))


def test_a_cache_changes_no_number_and_config_says_what_training_adds(pictures, tmp_path, monkeypatch):
    """In another size of images too, in which the finished run is loaded again."""
    monkeypatch.setattr(run_module, "CACHE", tmp_path / "cache")
    for name in ("plot_curves", "plot_prompts"):  # which take longer than the training
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)
    settings = {"data": str(pictures), "img_size": 40, "augmentation": "timm", "hflip": 0.0, "epochs": 2, "amp": "off"}
    plain, fast = (
        train(Recipe(output=str(tmp_path), batch_size=8, probe=False, cache=cache, **settings))
        for cache in (False, True)
    )
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 3
    assert outcome(plain) == outcome(fast)
    config = json.loads((fast / "config.json").read_text())
    augmentation = config["augmentation"]
    assert (augmentation["augmentation"], augmentation["hflip"]) == ("timm", 0.0)
    assert [step.partition("(")[0] for step in augmentation["steps"]] == [
        "RandomResizedCropAndInterpolation",
        "ColorJitter",
        "MaybeToTensor",
        "Normalize",
    ]
    assert config["preprocessing"]["input_size"] == [3, 40, 40] and "augmentation" not in config["preprocessing"]
    assert load_run(fast).model.backbone.patch_embed.img_size == (40, 40)
    assert evaluate_run(fast)[1].top1 == read_records(fast)[-1]["test_accuracy"]
