"""``--amp`` of ``insvp eval`` and ``insvp predict``."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from insvp_fast.commands import cli
from insvp_fast.data import transform_for
from insvp_fast.methods import load_model
from insvp_fast.training.load import load_run
from insvp_fast.training.prediction import Classifier
from tests.commands.finished_run import CLASSES


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_bf16_is_that_of_autocast(tta, run, images, tmp_path, capsys):
    model = load_model(run / "adapter")
    transform, files = transform_for(model.preprocessing), sorted((images / "test").rglob("*.png"))
    batch = torch.stack([transform(Image.open(file)) for file in files])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        views = [batch, batch.flip(-1)] if tta == "flip" else [batch]
        logits = torch.stack([model(view).float() for view in views]).mean(0)
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    expected, losses, found = F.cross_entropy(logits, labels).item(), {}, {}
    for amp in ("off", "bf16"):
        options = ["--tta", tta, "--amp", amp]
        assert cli.main(["eval", str(run), "--output", str(tmp_path), *options]) == 0
        report = json.loads((tmp_path / "eval.json").read_text())
        assert report["amp"] == amp
        losses[amp] = report["loss"]
        capsys.readouterr()
        more = ["--format", "jsonl", "--top-k", "6"]
        assert cli.main(["predict", str(run), str(images / "test"), *options, *more]) == 0
        rows = map(json.loads, capsys.readouterr().out.splitlines())
        found[amp] = {row["file"]: dict(zip(row["classes"], row["probabilities"], strict=True)) for row in rows}
    assert losses["off"] != losses["bf16"] == pytest.approx(expected, rel=1e-3)
    for file, row in zip(files, logits.softmax(1), strict=True):
        assert [found["bf16"][str(file)][name] for name in CLASSES] == pytest.approx(row.tolist(), abs=1e-3)
    assert found["bf16"] != found["off"]


def test_the_precision_of_a_classifier_is_its_own(run):
    images = torch.randn(2, 3, 32, 32)
    first = Classifier(load_run(run), amp="bf16")
    found = first.logits(images)
    assert not torch.equal(Classifier(load_run(run)).logits(images), found)
    assert torch.equal(first.logits(images), found)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="GPUs compute in fp16")
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_what_a_machine_lacks_is_refused(command, run, images, tmp_path: Path, capsys):
    more = [str(images)] if command == "predict" else ["--output", str(tmp_path)]
    assert cli.main([command, str(run), *more, "--amp", "fp16"]) == 1
    assert "--amp is fp16: that needs a GPU" in capsys.readouterr().err
