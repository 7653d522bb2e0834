"""Runs around backbones without blocks that prompts can be put into: image prompts, and methods without prompts."""

import csv
import io
import json

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model

from insvp_fast.commands import cli
from insvp_fast.errors import TrainingError
from insvp_fast.training.models import build_model
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.trainer import Trainer
from tests.training.killed_runs import outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*takes the general path")
NO_TOKENS = ["--no-common-prompt", "--no-specific-prompt"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """What ``--backbone`` takes for small convolutional networks with random weights, by their names in timm."""
    folder, found = tmp_path_factory.mktemp("backbones"), {}
    torch.manual_seed(0)
    for name in ("test_resnet", "test_convnext"):
        save_file(create_model(name).state_dict(), folder / f"{name}.safetensors")
        found[name] = f"{name}@{folder / name}.safetensors"
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", ["--method", "full"]),
        ("test_convnext", NO_TOKENS),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_they_are_trained_and_used_like_others(name, options, backbones, pictures, tmp_path, capsys):
    command = ["train", "--data", str(pictures), "--backbone", backbones[name], "--epochs", "1", "--batch-size", "6"]
    assert cli.main([*command, *options, "--amp", "off", "--output", str(tmp_path)]) == 0
    run = tmp_path / f"{pictures.name}-1"
    *_, result = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert cli.main(["eval", str(run)]) == 0
    assert json.loads((run / "eval.json").read_text())["top1"] == result["test_accuracy"]
    capsys.readouterr()
    assert cli.main(["predict", str(run / "adapter"), str(pictures / "test")]) == 0
    _, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    hits = [name == file.split("/")[-2] for file, name, _ in rows]
    assert sum(hits) / len(hits) == result["test_accuracy"]
    for other in (["tsne", run], ["prompts", run, pictures / "test" / "dark"], ["train", "--resume", run]):
        assert cli.main([*map(str, other)]) == 0


@pytest.mark.parametrize("options", [{"method": "full"}, {"common_prompt": False, "specific_prompt": False}])
def test_an_interrupted_run_goes_on_with_the_same_bits(options, backbones, pictures, tmp_path, monkeypatch):
    """With the statistics of batch norms that are trained."""
    common = {"data": str(pictures), "batch_size": 6, "epochs": 2, "save_steps": 1, "probe": False, "pictures": False}
    recipe = Recipe(backbone=backbones["test_resnet"], amp="off", output=str(tmp_path), **common | options)
    whole, step, steps = train(recipe), Trainer._step, iter([True] * 4)
    monkeypatch.setattr(Trainer, "_step", lambda *args: step(*args) if next(steps, False) else _interrupt())
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    assert outcome(train(resume=tmp_path / f"{pictures.name}-2")) == outcome(whole)


@pytest.mark.parametrize("study", ["table5", "figure7"])
def test_studies_of_prompts_in_blocks_refuse_them(study, backbones, tmp_path, capsys):
    command = ["paper", study, "--backbone", backbones["test_resnet"], "--output", str(tmp_path)]
    assert cli.main(command) == 1
    assert "expected --common-prompt and --specific-prompt to be off" in capsys.readouterr().err


def _interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "test_resnet",
            {},
            "^`backbone` is test_resnet: .*: expected `common_prompt` and `specific_prompt` to be off",
        ),
        ("test_resnet", {"method": "lora"}, "`method` is lora: lora in a ResNet: expected timm's Attention"),
        ("test_resnet", {"method": "vpt_deep"}, "`method` is vpt_deep: the backbone has no blocks"),
        (
            "inception_v3",
            {"common_prompt": False, "specific_prompt": False},
            "299x299 pixels.*`patch_prompt` to be",
        ),
        ("inception_v3", {"method": "full", "recompute": "block"}, "`method` is full: gradient checkpointing"),
    ],
)
def test_what_they_cannot_have_is_refused_before_the_work(name, settings, message):
    with pytest.raises(TrainingError, match=message):
        build_model(settings.get("method", "insvp"), Recipe(backbone=name, **settings), create_model(name), 2)
