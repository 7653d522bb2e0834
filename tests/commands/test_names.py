"""Names of classes and files that are no UTF-8, or hold what ends a line or a cell, by every command."""

import csv
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from insvp_fast.commands import cli
from insvp_fast.data.folders import image_files
from insvp_fast.export import FORMATS, load
from insvp_fast.training.prediction import load_classifier
from tests.commands.finished_run import noise

NAMES = sorted([os.fsdecode(b"caf\xe9"), "a\rb", 'c\n"d",e', "plain"])
SHOWN = [name.encode(errors="backslashreplace").decode() for name in NAMES]
FILE = os.fsdecode(b'\xff"\r\n,.png')


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> SimpleNamespace:
    """A run that was trained on folders and files of such names."""
    root, random = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    for name in NAMES:
        for split in ("train", "val", "test"):
            for file in (FILE, "plain.png"):
                noise(root / "data" / split / name / file, random)
    options = ["--epochs", "1", "--no-probe", "--batch-size", "4", "--workers", "0"]
    assert cli.main(["train", "--data", str(root / "data"), "--output", str(root), *options]) == 0
    assert (root / "data-1" / "prompts.png").stat().st_size > 0
    return SimpleNamespace(run=root / "data-1", test=root / "data" / "test")


def text_of(file: str) -> str:
    return file.encode(errors="backslashreplace").decode()


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl", "printed"])
def test_predict(form, odd, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet") if form == "parquet" else None
    output = [] if form == "printed" else ["--output", str(tmp_path / f"out.{form}")]
    assert cli.main(["predict", str(odd.run), str(odd.test), "--top-k", "4", *output]) == 0
    if form == "jsonl":
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
        assert [row["file"] for row in rows] == image_files(odd.test)
        assert all(sorted(row["classes"]) == sorted(SHOWN) for row in rows)
        return
    if parquet:
        columns = parquet.read_table(tmp_path / "out.parquet").to_pydict()
        names = [columns[f"class{end}"] for end in ("", "_2", "_3", "_4")]
        files, classes = columns["file"], list(zip(*names, strict=True))
    else:
        text = capsys.readouterr().out if form == "printed" else (tmp_path / "out.csv").read_bytes().decode()
        _, *rows = csv.reader(io.StringIO(text, newline=""))
        files, classes = [row[0] for row in rows], [row[1::2] for row in rows]
    assert files == list(map(text_of, image_files(odd.test)))
    assert all(sorted(row) == sorted(SHOWN) for row in classes)


@pytest.mark.parametrize("command", ["eval", "tsne", "report", "prompts"])
def test_what_is_drawn_and_printed(command, odd):
    images = [str(odd.test)] if command == "prompts" else []
    assert cli.main([command, str(odd.run), *images]) == 0


@pytest.mark.parametrize("form", ["onnx", "openvino", "torch"])
def test_export(form, odd, tmp_path, capsys):
    for package in FORMATS[form].packages:
        pytest.importorskip(package)
    file = tmp_path / f"model{FORMATS[form].suffix}"
    assert cli.main(["export", str(odd.run), "--format", form, "--output", str(file)]) == 0
    assert load(file).facts.class_names == SHOWN


def test_serve(odd, monkeypatch, capsys):
    uvicorn, testclient = pytest.importorskip("uvicorn"), pytest.importorskip("starlette.testclient")
    pytest.importorskip("python_multipart")
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append(app))
    assert cli.main(["serve", os.fsdecode(b"run\xe9=") + str(odd.run)]) == 0
    content = Path(image_files(odd.test)[0]).read_bytes()
    with testclient.TestClient(served[0]) as client:
        answer = client.post("/predict", content=content, headers={"Content-Type": "image/png"}).json()
        assert sorted(answer["predictions"][0]["classes"]) == sorted(SHOWN)
        assert client.get("/models").json()["models"][r"run\udce9"]["classes"] == SHOWN
        assert client.get("/metrics").status_code == 200


def test_demo(odd):
    pytest.importorskip("gradio")
    from insvp_fast import demo

    label, _, _ = demo._explain(load_classifier(odd.run), image_files(odd.test)[0], 10_000)
    assert sorted(label) == sorted(SHOWN) and torch.tensor([*label.values()]).sum() == pytest.approx(1)
