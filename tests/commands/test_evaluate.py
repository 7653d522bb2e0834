"""``insvp eval``."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.commands import cli, evaluate
from insvp_fast.commands.options import make_folder
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.evaluation import evaluate_run
from insvp_fast.training.load import Run, load_run, own_test_data
from insvp_fast.training.recipe import Recipe
from tests.commands.finished_run import CLASSES, noise, with_random_head, write_run


def test_eval_reports_what_scikit_learn_reports(run, images, probabilities, capsys):
    assert cli.main(["eval", str(run)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((run / "eval.json").read_text())
    labels = [CLASSES.index(Path(file).parent.name) for file in probabilities]
    scores = torch.stack(list(probabilities.values())).numpy()
    found = scores.argmax(1)
    assert report["images"] == len(labels) == 16
    assert report["confusion"] == confusion_matrix(labels, found, labels=range(6)).tolist()
    assert report["top1"] == pytest.approx((found == labels).mean())
    assert report["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(6)))
    assert report["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, found))
    assert (report["class_names"], report["protocol"], report["data"]) == (CLASSES, "paper", str(images))
    assert f"top-1 {report['top1']:.2%}   top-5 {report['top5']:.2%}" in printed and "protocol paper" in printed
    pixels = np.asarray(Image.open(run / "eval.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 5


def test_eval_on_other_data_keeps_the_runs_own_results(run, images, tmp_path, capsys):
    other = tmp_path / "other"
    for name in CLASSES:
        (other / "val" / name).mkdir(parents=True)
        os.link(images / "test" / "ant" / "0.png", other / "val" / name / "0.png")
    assert cli.main(["eval", str(run), "--data", str(other), "--output", str(tmp_path), "--batch-size", "5"]) == 0
    report = json.loads((tmp_path / "eval-other.json").read_text())
    assert (report["images"], report["mean_per_class"]) == (6, pytest.approx(1 / 6))
    assert (tmp_path / "eval-other.png").exists() and not (run / "eval-other.json").exists()


def test_eval_takes_a_batch_of_one_image_where_training_mixed_two(images, tmp_path):
    model = with_random_head(InsVPViT(load_backbone(), len(CLASSES), InsVPConfig(prompt_length=2)))
    run = write_run(tmp_path / "run", images, model, CLASSES, mixup=0.5)
    assert cli.main(["eval", str(run), "--batch-size", "1"]) == 0


def test_eval_scores_fewer_classes_by_their_names(run, images, tmp_path, capsys):
    """Two of six, which in a folder of their own would be classes 0 and 1."""
    for name in ("cat", "fox, red"):
        shutil.copytree(images / "test" / name, tmp_path / "few" / "val" / name)
    assert cli.main(["eval", str(run), "--data", str(tmp_path / "few"), "--output", str(tmp_path)]) == 0
    assert cli.main(["eval", str(run), "--output", str(tmp_path)]) == 0
    few, every = (json.loads((tmp_path / name).read_text()) for name in ("eval-few.json", "eval.json"))
    rows = [
        row if name in ("cat", "fox, red") else [0] * 6 for name, row in zip(CLASSES, every["confusion"], strict=True)
    ]
    assert few["confusion"] == rows and few["class_names"] == CLASSES
    assert list(every["per_class"]) == CLASSES
    kept = {name: share if name in ("cat", "fox, red") else None for name, share in every["per_class"].items()}
    assert few["per_class"] == kept


@pytest.mark.parametrize("retrain", [True, False])
def test_images_of_val_are_among_those_of_training_where_it_took_them(retrain, tmp_path, threads):
    threads(1)
    random, names = np.random.default_rng(0), ["ant", "bee"]
    for split in ("train", "val", "test"):
        for name in names:
            noise(tmp_path / "data" / split / name / "0.png", random)
    model = with_random_head(InsVPViT(load_backbone(), 2, InsVPConfig(prompt_length=2)))
    run = write_run(tmp_path / "run", tmp_path / "data", model, names, retrain=retrain)
    note = evaluate_run(run, str(tmp_path / "data" / "val")).facts["note"]
    assert ("2 of its 2 images are among those of training" in note) is retrain


@pytest.mark.parametrize(
    ("data", "name"),
    [(".", "here"), ("a/few.csv", "few.csv"), ("vtab/dtd", "vtab-dtd"), ("dtd", "dtd"), ("birds", "birds")],
)
def test_results_on_other_data_have_its_name(data, name, tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path / "here"))
    Path("birds").symlink_to(tmp_path)
    assert evaluate._name(data) == name


def test_eval_looks_at_its_folder_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("insvp_fast.training.evaluation.evaluate_run", None)  # nothing is tested
    (tmp_path / "file").touch()
    assert cli.main(["eval", str(run), "--output", str(tmp_path / "file")]) == 1
    assert "file: no folder can be made there" in capsys.readouterr().err


def test_eval_refuses_other_classes(run, tmp_path, capsys):
    (tmp_path / "test" / "wolf").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "wolf" / "0.png")
    assert cli.main(["eval", str(run), "--data", str(tmp_path)]) == 1
    assert "found the class wolf: expected some of the 6 classes of train: ant, bee" in capsys.readouterr().err
    assert cli.main(["eval", str(run), "--data", ""]) == 1
    assert "--data is '': no such folder or list" in capsys.readouterr().err


def test_data_of_another_kind_and_none_at_all_are_refused(run, images, tmp_path):
    place = images / "test" / "ant" / "0.png"
    (tmp_path / "all.csv").write_text(f"path,labels,split\n{place},ant;bee,train\n{place},ant,test\n")
    with pytest.raises(DataError, match="found several labels per image, expected one label, as the model was trained"):
        evaluate_run(run, str(tmp_path / "all.csv"))
    with pytest.raises(TrainingError, match="is an adapter, which does not say what it is tested on: expected `data`"):
        evaluate_run(run / "adapter")


def test_a_run_is_not_tested_on_images_that_training_may_have_seen(images, tmp_path):
    model = with_random_head(InsVPViT(load_backbone(), len(CLASSES), InsVPConfig(prompt_length=2)))
    model.trained_on = {"undivided_sha256": "0" * 64, "split_seed": 0}  # of other images
    run = write_run(tmp_path / "run", images / "test", model, CLASSES)
    with pytest.raises(DataError, match="training divided it, and its images have changed: the model may have seen"):
        evaluate_run(run)
    own = load_run(run)
    recipe = dataclasses.replace(own.recipe, data=str(images))  # which has a test split by now
    assert len(own_test_data(own._replace(recipe=recipe))) == 16


def test_images_are_loaded_as_in_training_unless_told_otherwise():
    trained, adapter = (Run(recipe, None, {}, None) for recipe in (Recipe(batch_size=3, workers=1), None))
    assert trained.loading(None, None) == (3, 1) and trained.loading(5, 0) == (5, 0)
    assert adapter.loading(None, None) == (Recipe.batch_size, Recipe.workers)
