"""The commands beside train, on a run folder of the shipped backbone with an untrained adapter."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.commands import cli, doctor, sweep, traps
from insvp_fast.data import transform_for
from insvp_fast.data.decode import read_image
from insvp_fast.recipes import read
from insvp_fast.runtime import native
from insvp_fast.training.backbone import load_backbone, preprocessing_of
from insvp_fast.training.evaluation import figures_of
from insvp_fast.training.figures import draw_confusion
from insvp_fast.training.recipe import BUILTIN, Recipe
from insvp_fast.training.run import train

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox, red"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """An image folder with a test part of 5, 4, 3, 2, 1 and 0 pictures of noise."""
    noise, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "animals"
    for label, name in enumerate(CLASSES):
        (folder / "test" / name).mkdir(parents=True)
        (folder / "train" / name).mkdir(parents=True)
        for i in range(5 - label or 1):
            pixels = noise.integers(0, 255, (40, 44, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "test" / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """A finished run folder, without any training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "animals-1"
    recipe = Recipe(data=str(images), batch_size=4, probe=False, output=str(folder.parent))
    backbone = load_backbone()
    model = InsVPViT(backbone, len(CLASSES), InsVPConfig(prompt_length=4))
    torch.nn.init.normal_(model.head.weight)
    preprocessing = preprocessing_of(backbone)
    model.save_pretrained(folder / "adapter", class_names=CLASSES, preprocessing=preprocessing)
    config = {"recipe": recipe.to_dict(), "preprocessing": preprocessing, "class_names": CLASSES, "tested_on": "test"}
    (folder / "config.json").write_text(json.dumps(config))
    finish(folder, 0.5)
    return folder


@pytest.fixture(scope="module")
def chances(run, images) -> dict[str, torch.Tensor]:
    """The probabilities of each test image by the model itself, file by file."""
    model = InsVPViT.from_pretrained(run / "adapter", backbone=load_backbone())
    transform = transform_for(preprocessing_of(load_backbone()))
    files = sorted((images / "test").rglob("*.png"))
    with torch.inference_mode():
        return {str(file): model(transform(Image.open(file))[None]).softmax(1)[0] for file in files}


def finish(folder: Path, accuracy: float, **more: object) -> None:
    records = [{"model": "InsVP", "epoch": 1, "loss": 1.0, "test_accuracy": 0.0} | more]  # an epoch is no result
    records += [{"model": "InsVP", "test_accuracy": accuracy, "trained_parameters": 7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


# ---------------------------------------------------------------------------------------------------------------- eval


def test_eval_reports_what_scikit_learn_reports(run, images, chances, capsys):
    assert cli.main(["eval", str(run)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((run / "eval.json").read_text())
    labels = [CLASSES.index(Path(file).parent.name) for file in chances]
    scores = torch.stack(list(chances.values())).numpy()
    found = scores.argmax(1)
    assert report["images"] == len(labels) == 16
    assert report["confusion"] == confusion_matrix(labels, found, labels=range(6)).tolist()
    assert report["top1"] == pytest.approx((found == labels).mean())
    assert report["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(6)))
    assert report["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, found))
    assert (report["class_names"], report["protocol"], report["data"]) == (CLASSES, "paper", str(images))
    assert report["tested_on"] == "test"
    assert f"top-1 {report['top1']:.2%}" in printed and "protocol paper" in printed
    pixels = np.asarray(Image.open(run / "eval.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 5


def test_eval_on_other_data_keeps_the_runs_own_figures(run, images, tmp_path, capsys):
    other = tmp_path / "other"
    for name in CLASSES:
        (other / "val" / name).mkdir(parents=True)
        os.link(images / "test" / "ant" / "0.png", other / "val" / name / "0.png")
    assert cli.main(["eval", str(run), "--data", str(other), "--output", str(tmp_path), "--batch-size", "5"]) == 0
    report = json.loads((tmp_path / "eval-other.json").read_text())
    assert (report["images"], report["mean_per_class"]) == (6, pytest.approx(1 / 6))
    assert (tmp_path / "eval-other.png").exists() and not (run / "eval-other.json").exists()


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


def test_eval_refuses_other_classes(run, tmp_path, capsys):
    (tmp_path / "test" / "wolf").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "wolf" / "0.png")
    assert cli.main(["eval", str(run), "--data", str(tmp_path)]) == 1
    assert "found the class wolf, expected some of the 6 classes of train: ant, bee" in capsys.readouterr().err


def test_classes_without_images_do_not_count():
    figures = figures_of(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 0, 1]]), among_five=5)
    assert figures.per_class == [0.75, None, 0.5]
    assert (figures.mean_per_class, figures.images) == (0.625, 6)
    assert (figures.top1, figures.top5) == (pytest.approx(4 / 6), pytest.approx(5 / 6))


def test_a_confusion_matrix_of_many_classes_is_drawn_without_names(tmp_path):
    draw_confusion(torch.eye(555, dtype=torch.int64), [f"class {i}" for i in range(555)], tmp_path / "birds.png")
    assert Image.open(tmp_path / "birds.png").size[0] < 2000


# ------------------------------------------------------------------------------------------------------------- predict


def test_predict_agrees_with_the_model(run, images, chances, capsys):
    assert cli.main(["predict", str(run), str(images / "test"), "--top-k", "2"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["file", "class", "probability", "class_2", "probability_2"]
    assert [row[0] for row in rows] == list(chances)
    for file, *pairs in rows:
        best = chances[file].topk(2)
        assert pairs[::2] == [CLASSES[index] for index in best.indices]
        assert [float(p) for p in pairs[1::2]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_predict_writes_json_lines(run, images, chances, tmp_path, capsys):
    file, lines = str(images / "test" / "ant" / "0.png"), tmp_path / "lines.jsonl"
    options = ["--format", "jsonl", "--top-k", "99", "--output", str(lines)]
    assert cli.main(["predict", str(run), file, *options]) == 0
    line = json.loads(lines.read_text())
    assert line["file"] == file and sorted(line["classes"]) == CLASSES
    assert line["probabilities"] == pytest.approx(chances[file].sort(descending=True).values.tolist(), abs=1e-5)
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


def test_a_reader_that_stops_is_no_error(run, images):
    command = f"'{sys.executable}' -m insvp_fast predict '{run}' '{images}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "file,class,probability\n"
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------- info


def test_info_on_a_run_counts_the_trained_parameters(run, capsys):
    assert cli.main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    model = InsVPViT.from_pretrained(run / "adapter", backbone=load_backbone())
    assert f"{model.get_nb_trainable_parameters()[0]:,} trained" in printed
    words = " ".join(printed.split())
    assert all(text in words for text in ("finished", "head 1,158", "classes 6: ant, bee", "prompt_length 4"))


def test_info_on_an_adapter_needs_no_torch(run):
    program = "import sys\nfrom insvp_fast import cli\ncli.main(sys.argv[1:])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, "info", str(run / "adapter")], check=True, capture_output=True)


def test_info_on_a_backbone_downloads_nothing(capsys):
    assert cli.main(["info", "vit_base_patch16_224"]) == 0
    printed = capsys.readouterr().out
    assert "85,798,656 frozen" in printed and "through the fast path" in printed
    model = InsVPViT("vit_base_patch16_224", num_classes=0)
    assert f"{model.get_nb_trainable_parameters()[0]:,} trained" in printed
    assert cli.main(["info", "resnet18"]) == 1
    assert cli.main(["info", "vit_huger"]) == 1


# ------------------------------------------------------------------------------------------------------------- convert


@pytest.fixture
def released_file(tmp_path) -> Path:
    """What the authors' code would save for a tiny backbone."""
    from insvp_fast.checkpoints.released import to_released

    config = InsVPConfig.released(prompt_length=4)
    model = InsVPViT("test_vit", num_classes=3, config=config)
    file = tmp_path / "best_model.pth"
    torch.save({to_released(key): value for key, value in model.state_dict().items()}, file)
    return file


def test_convert_makes_an_adapter_and_overwrites_nothing(released_file, capsys):
    command = ["convert", str(released_file), "--backbone", "test_vit", "--keep-backbone"]
    assert cli.main(command) == 0
    assert "TokenPrompt, the specific prompter, at its random initial values" in capsys.readouterr().out
    folder = released_file.with_suffix("")
    weights = load_file(folder / "backbone.safetensors")
    backbone = InsVPViT("test_vit", num_classes=0).backbone
    backbone.load_state_dict(weights)
    model = InsVPViT.from_pretrained(folder, backbone=backbone)
    original = torch.load(released_file, weights_only=True)
    assert torch.equal(model.head.weight, original["backbone.head.weight"])
    assert cli.main(command) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_convert_refuses_what_is_no_checkpoint(tmp_path, capsys):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    for file, message in (("other.pth", "not a checkpoint of the authors' code"), ("none.pth", "no such file")):
        assert cli.main(["convert", str(tmp_path / file)]) == 1
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "other").exists()


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_shows_the_environment(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("torch ", torch.__version__, "native CPU library", "CPU products", "attention", "accelerate"):
        assert text in printed


@pytest.mark.parametrize(
    ("torch_version", "vision", "warned"),
    [
        ("2.15.0+cpu", "0.30.0+cu132", True),
        ("2.15.0+cu126", "0.30.0+cu132", True),
        ("2.15.0+cu132", "0.30.0+cu132", False),
        ("2.15.0", "0.30.0+cu132", False),
        ("2.15.0+cpu", None, False),
    ],
)
def test_doctor_warns_of_builds_that_do_not_fit(torch_version, vision, warned, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    versions = dict.fromkeys(doctor.PACKAGES, "1") | {"torch": torch_version, "torchvision": vision}
    found = list(doctor._package_traps(versions))
    assert len(found) == warned
    assert not warned or "operator torchvision::nms" in found[0]


def test_doctor_warns_of_a_gpu_that_is_not_used(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    versions = dict.fromkeys(doctor.PACKAGES, "1") | {"torch": "2.15.0+cpu", "torchvision": "0.30.0+cpu"}
    assert any("torch is built for CPUs" in text for text in doctor._package_traps(versions))


def test_doctor_fails_where_the_library_is_demanded_in_vain(monkeypatch, capsys):
    def demand(*dtypes):
        raise RuntimeError("INSVP_FAST_NATIVE=1, but it is not built")

    monkeypatch.setattr(native, "available", demand)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "insvp: error: RuntimeError: INSVP_FAST_NATIVE=1, but it is not built\n"


def rewritten(run: Path, target: Path, **changes: object) -> Path:
    """The adapter of a run with other values in its description."""
    target.mkdir()
    os.link(run / "adapter" / "adapter_model.safetensors", target / "adapter_model.safetensors")
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for key, value in changes.items():
        about[key] = about[key] | value
    (target / "adapter_config.json").write_text(json.dumps(about))
    return target


def test_doctor_warns_of_statistics_that_are_not_the_weights_own(run, tmp_path, capsys):
    name = {"name": "vit_base_patch16_224.orig_in21k"}
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    wrong = rewritten(run, tmp_path / "wrong", backbone=name, preprocessing=imagenet)
    right = rewritten(run, tmp_path / "right", backbone=name)
    wrong_here = rewritten(run, tmp_path / "wrong_here", preprocessing=imagenet)  # the shipped one has no timm name
    assert cli.main(["doctor", "--adapter", str(wrong)]) == 0
    assert "mean 0.485/0.456/0.406" in capsys.readouterr().out
    assert not any("normalised" in text for text in traps.adapter_traps(right))
    assert any("vit_shapes_32 were trained with mean 0.5" in text for text in traps.adapter_traps(wrong_here, BUILTIN))


def test_doctor_warns_of_augreg_weights_around_a_released_adapter(run, tmp_path):
    released = InsVPConfig.released().to_dict()
    for tag, warned in (("augreg_in21k", True), ("orig_in21k", False)):
        name = {"name": f"hf-hub:timm/vit_base_patch16_224.{tag}"}
        adapter = rewritten(run, tmp_path / tag, backbone=name, insvp=released)
        assert any("orig_in21k; with the others" in text for text in traps.adapter_traps(adapter)) == warned


def test_doctor_tells_a_specific_prompter_that_was_never_trained(run, tmp_path):
    untrained = rewritten(run, tmp_path / "untrained")
    assert any("looks untrained" in text for text in traps.adapter_traps(untrained))
    tensors = load_file(untrained / "adapter_model.safetensors")
    tensors["specific_prompter.conv2.weight"] += 0.05 * torch.randn_like(tensors["specific_prompter.conv2.weight"])
    trained = rewritten(run, tmp_path / "trained")
    (trained / "adapter_model.safetensors").unlink()
    save_file(tensors, trained / "adapter_model.safetensors")
    assert not any("looks untrained" in text for text in traps.adapter_traps(trained))


def test_doctor_warns_of_a_run_that_waits_for_its_data(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    for share, warned in ((0.6, True), (0.1, False)):
        finish(tmp_path, 0.5, data_wait=share)
        assert any("waiting for images" in text for text in traps.run_traps(tmp_path)) == warned


# ---------------------------------------------------------------------------------------------------------------- data


def test_data_list_and_check(tmp_path, capsys, monkeypatch):
    from insvp_fast import data

    assert cli.main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 29 + 2 and "cub " in printed and "vtab/kitti " in printed

    class Report(SimpleNamespace):
        def __str__(self) -> str:
            return "cub: 200 classes"

    for ok, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(data, "check", lambda name, root, ok=ok: Report(ok=ok), raising=False)
        assert cli.main(["data", "check", "cub", "--root", str(tmp_path)]) == status
        assert capsys.readouterr().out == "cub: 200 classes\n"


# --------------------------------------------------------------------------------------------------------------- sweep

GRID = """
[recipe]
root = "data/{data}"
epochs = 2
probe = false
[grid]
data = ["cub", "dtd"]
lr = [1e-3, 0.01]
seed = [0, 1, 2]
"""


@pytest.fixture
def grid(tmp_path) -> Path:
    file = tmp_path / "grid.toml"
    file.write_text(GRID)
    return file


class Trainer:
    """Stands in for the processes of ``insvp train``: writes the files of a run, whose accuracy tells its settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.stops_at = folder, [], {}

    def __call__(self, arguments, launcher) -> int:
        self.commands.append(arguments)
        options = vars(cli._parser().parse_args(["train", *arguments]))
        options.pop("command"), options.pop("recipe")
        if resumed := options.pop("resume"):
            run, recipe = Path(resumed), Recipe(**json.loads((Path(resumed) / "config.json").read_text())["recipe"])
        else:
            recipe = Recipe(**options | {"amp": "bf16"})  # what `auto` stands for
            run = self.folder / f"{recipe.data}-{len(list(self.folder.glob('*/'))) + 1}"
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
        status = self.stops_at.get(len(self.commands), 0)
        if status == 130:
            raise KeyboardInterrupt
        if status == 0:
            finish(run, recipe.lr + 0.1 * recipe.seed + 0.5 * (recipe.data == "dtd"))
        return status


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Trainer:
    trainer = Trainer(tmp_path / "out")
    monkeypatch.setattr(sweep, "_train", trainer)
    return trainer


def test_a_sweep_trains_every_combination(grid, trainer, tmp_path, capsys):
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder)]) == 0
    first = ["--root", "data/cub", "--epochs", "2", "--no-probe", "--data", "cub", "--lr", "0.001", "--seed", "0"]
    assert trainer.commands[0] == [*first, "--output", str(trainer.folder)]
    assert len(trainer.commands) == 12
    header, *rows = csv.reader((trainer.folder / "results.csv").open())
    assert header == ["data", "lr", "protocol", "model", "runs", "planned", "mean", "std"]
    assert rows[3][:6] == ["dtd", "0.01", "paper", "InsVP", "3", "3"]
    assert [float(cell) for cell in rows[3][6:]] == pytest.approx([0.61, 0.1])
    table = (trainer.folder / "results.md").read_text()
    assert "| dtd | 0.01 | paper | InsVP | 3 of 3 | 61.00 ± 10.00 |" in table
    assert table in capsys.readouterr().out


def test_a_sweep_that_was_stopped_goes_on(grid, trainer, capsys):
    command = ["sweep", str(grid), "--output", str(trainer.folder)]
    trainer.stops_at = {2: 1, 4: 130}  # one run fails, and then somebody presses Ctrl-C
    assert cli.main(command) == 130
    assert len(trainer.commands) == 4
    assert "1 of 3" not in (trainer.folder / "results.md").read_text()
    assert "| 2 of 3 |" in (trainer.folder / "results.md").read_text()
    trainer.stops_at = {}
    assert cli.main(command) == 0
    assert [arguments[0] for arguments in trainer.commands[4:]] == ["--resume", "--resume", *["--root"] * 8]
    commands, folders = len(trainer.commands), sorted(trainer.folder.glob("*/"))
    assert cli.main(command) == 0
    assert (len(trainer.commands), sorted(trainer.folder.glob("*/"))) == (commands, folders)
    assert len(folders) == 12


@pytest.mark.parametrize("status", [0, 1, 130])
def test_a_run_is_a_process_of_its_own(status):
    program = f"import sys; assert sys.argv[1:] == ['-m', 'insvp_fast', 'train', '--lr', '1']; sys.exit({status})"
    expectation = pytest.raises(KeyboardInterrupt) if status == 130 else contextlib.nullcontext()
    with expectation:
        assert sweep._train(["--lr", "1"], [sys.executable, "-c", program]) == status


def test_failed_runs_are_counted(grid, trainer, capsys):
    trainer.stops_at = {1: 1, 2: -9}
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder)]) == 1
    assert "2 of 12 runs failed" in capsys.readouterr().err
    assert len(trainer.commands) == 12


def test_a_sweep_may_grow_and_start_from_recipes(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text('[recipe]\nroot = "r"\n[grid]\nrecipe = ["cub", "svhn"]\nreleased = [false, true]')
    entries = list(sweep.read_grid(file, tmp_path))
    assert [entry.recipe.prompt_length for entry in entries] == [9, 9, 9, 16]
    assert entries[3].recipe == replace(Recipe(**read("svhn", released=True)), root="r", output=str(tmp_path))
    assert entries[3].arguments == ["--recipe", "svhn", "--root", "r", "--released", "--output", str(tmp_path)]


def test_a_dry_run_trains_nothing(grid, trainer, capsys):
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder), "--dry-run"]) == 0
    assert not trainer.commands and not trainer.folder.exists()
    assert capsys.readouterr().out.count("insvp train ") == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[grid]\nlr = 1", "lr is 1: expected a list of values"),
        ("[grid]\nrate = [1]", "rate is no setting"),
        ("[seeds]\na = 1", "expected the tables [recipe] and [grid], found seeds"),
        ("[grid]\nepochs = [1, 0]", "--epochs is 0"),
        ("grid", "cannot read"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(content, message, tmp_path, trainer, capsys):
    (tmp_path / "grid.toml").write_text(content)
    assert cli.main(["sweep", str(tmp_path / "grid.toml"), "--output", str(trainer.folder)]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not trainer.commands
