"""``insvp predict``."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from insvp_fast import InsVPViT
from insvp_fast.commands import cli
from insvp_fast.data.decode import read_image
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from tests.commands.finished_run import CLASSES


def test_predict_agrees_with_the_model(run, images, probabilities, capsys):
    assert cli.main(["predict", str(run), str(images / "test"), "--top-k", "2"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["file", "class", "probability", "class_2", "probability_2"]
    assert [row[0] for row in rows] == list(probabilities)
    for file, *pairs in rows:
        best = probabilities[file].topk(2)
        assert pairs[::2] == [CLASSES[index] for index in best.indices]
        assert [float(p) for p in pairs[1::2]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_predict_writes_json_lines(run, images, probabilities, tmp_path, capsys):
    file, lines = str(images / "test" / "ant" / "0.png"), tmp_path / "lines.jsonl"
    options = ["--format", "jsonl", "--top-k", "99", "--output", str(lines)]
    assert cli.main(["predict", str(run), file, *options]) == 0
    line = json.loads(lines.read_text())
    assert line["file"] == file and sorted(line["classes"]) == CLASSES
    assert line["probabilities"] == pytest.approx(probabilities[file].sort(descending=True).values.tolist(), abs=1e-5)
    assert capsys.readouterr().out == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.fixture(scope="module", params=[True, False], ids=["turned", "as stored"])
def numbered(request, tmp_path_factory) -> SimpleNamespace:
    """A trained run whose classes are numbers, told apart by the color of photographs that lie on their side."""
    root, exif = tmp_path_factory.mktemp("numbered"), Image.Exif()
    exif[0x0112] = 6
    colors = {"1": (250, 20, 20), "2": (20, 250, 20), "10": (20, 20, 250)}
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        for name, color in colors.items():
            (root / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40, 40), color)
                image.paste((128, 128, 128), (0, 0, 15, 35 + i // 2))
                image.save(root / "data" / part / name / f"{i}.jpg", exif=exif)
    options = {"probe": False, "epochs": 6, "batch_size": 8, "lr": 3e-3, "exif_rotation": request.param}
    run = train(Recipe(data=str(root / "data"), output=str(root / "runs"), **options))
    return SimpleNamespace(run=run, data=root / "data", rotation=request.param)


def test_classes_that_are_numbers_are_named_in_every_output(numbered, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("1", "2", "10"):
        os.link(numbered.data / "test" / name / "0.jpg", flat / f"picture {name} é.JPG")
    assert cli.main(["predict", str(numbered.run), str(flat)]) == 0
    _, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert {file: name for file, name, _ in rows} == {f"{flat}/picture {name} é.JPG": name for name in ("1", "2", "10")}
    assert cli.main(["predict", str(numbered.run), str(flat), "--format", "jsonl", "--top-k", "9"]) == 0
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert sorted(line["classes"]) == ["1", "10", "2"] and f"picture {line['classes'][0]} é" in line["file"]
    assert cli.main(["eval", str(numbered.run), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["class_names"] == ["1", "10", "2"] and report["per_class"] == {"1": 1.0, "10": 1.0, "2": 1.0}
    config = json.loads((numbered.run / "config.json").read_text())
    about = json.loads((numbered.run / "adapter" / "adapter_config.json").read_text())
    assert config["class_names"] == about["class_names"] == ["1", "10", "2"]


def test_a_run_remembers_whether_photographs_were_turned(numbered, tmp_path, capsys):
    """Pixels without EXIF, as training saw them, get the same probabilities; turned otherwise they get others."""
    photograph = numbered.data / "test" / "2" / "0.jpg"
    for name, rotation in (("seen", numbered.rotation), ("other", not numbered.rotation)):
        read_image(photograph, exif_rotation=rotation).save(tmp_path / f"{name}.png")
    files = [str(photograph), str(tmp_path / "seen.png"), str(tmp_path / "other.png")]
    assert cli.main(["predict", str(numbered.run), *files, "--format", "jsonl", "--top-k", "3"]) == 0
    found, seen, other = (json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines())
    assert found == pytest.approx(seen, abs=1e-5) and found != pytest.approx(other, abs=1e-4)
    assert json.loads((numbered.run / "config.json").read_text())["recipe"]["exif_rotation"] is numbered.rotation


@pytest.mark.parametrize("multi_label", [False, True])
def test_probabilities_that_are_no_numbers_are_an_error(run, images, multi_label, tmp_path, capsys):
    model = InsVPViT.from_pretrained(run / "adapter")
    model.multi_label = multi_label
    torch.nn.init.constant_(model.head.bias[2:3], torch.nan)
    model.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "rows.csv"
    assert cli.main(["predict", str(tmp_path / "adapter"), str(images), "--output", str(output)]) == 1
    assert "the logits of the model are infinite or not a number: expected finite ones" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("name", ["é ü.png", "猫 1.png", os.fsdecode(b"latin \xe9.png")], ids=["latin", "cat", "bytes"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("where", ["printed", "file"])
def test_file_names_of_every_kind_are_written(run, images, name, form, where, tmp_path, capsys):
    shutil.copy(images / "test" / "ant" / "0.png", tmp_path / name)
    output = ["--output", str(tmp_path / "lines")] if where == "file" else []
    assert cli.main(["predict", str(run), str(tmp_path), "--format", form, *output]) == 0
    printed = capsys.readouterr().out
    lines = (tmp_path / "lines").read_text(encoding="utf-8") if where == "file" else printed
    if form == "jsonl":
        assert Path(json.loads(lines)["file"]) == tmp_path / name
    else:
        assert lines.splitlines()[1].startswith(f"{tmp_path / name}".encode(errors="backslashreplace").decode())


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A folder with a picture, half a picture, and a text."""
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.png").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("no picture, and nobody says so")
    return tmp_path


def test_predict_names_the_file_that_is_no_image(run, damaged, capsys):
    lines = damaged / "lines.csv"
    assert cli.main(["predict", str(run), str(damaged), "--output", str(lines)]) == 1
    printed = capsys.readouterr().err
    assert f"{damaged / 'b.jpg'}: not an image that can be read" in printed and printed.count("\n") == 1
    assert not lines.exists()


def test_predict_skips_and_counts(run, damaged, capsys):
    assert cli.main(["predict", str(run), str(damaged), "--skip-unreadable"]) == 0
    printed = capsys.readouterr()
    assert [line.split(",")[0] for line in printed.out.splitlines()] == ["file", str(damaged / "a.jpg")]
    assert printed.err.endswith("insvp: skipped 2 of 3 files\n")


@pytest.mark.parametrize("path", ["nowhere.png", "empty"])
def test_predict_wants_images(run, path, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["predict", str(run), str(tmp_path / path)]) == 1
    assert str(tmp_path / path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "file"), [("predict", "out.csv"), ("export", "out.onnx"), ("tsne", "out.png"), ("report", "out.html")]
)
@pytest.mark.parametrize(("make", "found"), [(os.mkdir, "a folder"), (os.mkfifo, "a device or pipe")])
def test_what_is_no_file_is_told_before_the_work_and_stays(make, found, command, file, run, images, tmp_path, capsys):
    make(tmp_path / file)
    before = (tmp_path / file).stat()
    more = {"predict": [str(images / "test")], "export": ["--format", "onnx"]}.get(command, [])
    assert cli.main([command, str(run), *more, "--output", str(tmp_path / file)]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"insvp: error: --output is {tmp_path / file}: found {found}, expected the name of a file\n"
    assert printed.out == "" and [*tmp_path.rglob("*")] == [tmp_path / file]
    assert os.path.samestat((tmp_path / file).stat(), before)


def test_a_reader_that_stops_is_no_error(run, images):
    command = f"'{sys.executable}' -m insvp_fast predict '{run}' '{images}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "file,class,probability\n"
    assert "Traceback" not in done.stderr
