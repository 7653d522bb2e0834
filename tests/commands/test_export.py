"""``insvp export``."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from insvp_fast import export
from insvp_fast.commands import cli
from insvp_fast.commands.export import FILES
from insvp_fast.data import transform_for
from insvp_fast.errors import ExportError
from insvp_fast.export import ExportedModel, Facts, measure_loss
from insvp_fast.export.formats import Export
from insvp_fast.methods.load import load_model
from tests.commands.finished_run import CLASSES, write_run_of_several_labels


def test_the_formats_are_those_of_the_package():
    suffixes = {name: Path(file).suffix for name, file in FILES.items()}
    assert suffixes == {name: how.suffix for name, how in export.FORMATS.items()}


def test_onnx_with_8_bit_weights_tells_the_accuracy_lost(run, probabilities, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "animals.onnx"
    assert cli.main(["export", str(run), "--format", "onnx", "--int8", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "format: ONNX, opset 18, standard operators only" in printed
    assert "images: float32 [batch, 3, 32, 32]; inside: nothing" in printed
    assert re.search(r"parity: batch 7: relative error \d\.\de-0[678]", printed)
    right = sum(CLASSES[p.argmax()] == name.split("/")[-2] for name, p in probabilities.items())
    assert f"before {right / len(probabilities):.2%}" in printed
    assert re.search(r"int8: 16 images, the same class for \d+\.\d\d%; logits differ by at most [\d.]+\n", printed)
    assert [entry.name for entry in tmp_path.iterdir()] == ["animals.onnx"]
    assert export.load(file).facts.class_names == CLASSES


def test_8_bit_weights_for_several_labels_per_image(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    run = write_run_of_several_labels(tmp_path)
    model, images = load_model(run / "adapter"), tmp_path.glob("*.png")
    transform = transform_for(model.preprocessing)
    with torch.inference_mode():
        found = torch.cat([model(transform(Image.open(file))[None]) > 0 for file in sorted(images)])
    labels = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]])
    before = (found == labels).double().mean()
    assert cli.main(["export", str(run), "--format", "onnx", "--int8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"int8: right labels \d+\.\d\d%, before {before:.2%} \([+-]", printed)
    assert re.search(r"int8: 6 images, the same labels for \d+\.\d\d%; logits differ by at most [\d.]+\n", printed)
    options = ["--format", "onnx", "--int8", "--images", str(tmp_path / "0.png")]
    assert cli.main(["export", str(run / "adapter"), *options]) == 0  # whose labels are not known
    printed = capsys.readouterr().out
    assert "right labels" not in printed and "1 images, the same labels" in printed


def test_a_model_of_the_hub_is_exported_to_here(run, tmp_path, monkeypatch):
    asked, model = [], load_model(run / "adapter")

    def write(model, file, format, **options):
        asked.append((model, file, format))
        raise ExportError("not written")

    monkeypatch.setattr("insvp_fast.methods.load.load_model", lambda source, *_: asked.append(source) or model)
    monkeypatch.setattr("insvp_fast.export.export_model", write)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "someone/birds", "--format", "torch"]) == 1
    assert asked == ["someone/birds", (model, Path("model.pt2"), "torch")]


def test_an_adapter_is_tried_on_given_images(run, images, tmp_path, capsys, monkeypatch):
    def write(model, file, format, images, **options):
        about = {"class_names": model.class_names, "preprocessing": model.preprocessing, "insvp_fast_version": "0"}
        facts = Facts(inside="nothing", input=[None, 3, 32, 32], **about)
        loss = measure_loss(model, ExportedModel(lambda x: model(x) + 0.25, facts), images)
        file.write_bytes(b"")
        return Export([file], facts, 0, [], ["a note"], loss)

    monkeypatch.setattr("insvp_fast.export.export_model", write)
    monkeypatch.setattr("insvp_fast.export.formats.require_packages", lambda *_: None)
    adapter, file = str(run / "adapter"), tmp_path / "a.onnx"
    options = ["--format", "onnx", "--int8", "--images", str(images / "test" / "ant"), "--output", str(file)]
    assert cli.main(["export", adapter, *options]) == 0
    printed = capsys.readouterr().out
    assert "a note" in printed and "top-1" not in printed
    assert "int8: 5 images, the same class for 100.00%; logits differ by at most 0.25" in printed


def test_an_image_that_cannot_be_read_leaves_the_file_of_before(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    file, broken = tmp_path / "a.onnx", tmp_path / "broken.png"
    file.write_bytes(b"of before")
    broken.write_bytes(b"")
    options = ["--format", "onnx", "--int8", "--images", str(broken), "--output", str(file)]
    assert cli.main(["export", str(run / "adapter"), *options]) == 1
    assert "broken.png" in capsys.readouterr().err and file.read_bytes() == b"of before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.onnx", "broken.png"]


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("", ["onnx"], r"expected a run folder \(config.json\) or an adapter folder \(adapter_config.json\)"),
        ("run", ["onnx", "--images", "x.png"], "--images: expected with --int8"),
        ("run/adapter", ["onnx", "--int8"], "--int8 of an adapter: expected --images"),
        ("run", ["onnx", "--output", f"{__file__}/x.onnx"], "no folder can be made there"),
        ("run", ["torch", "--channels-last"], "--channels-last without --preprocess: expected both"),
        ("run", ["torch", "--int8"], "8-bit weights in the format torch: expected onnx or openvino"),
        ("run", ["torch", "--output", "x.onnx"], "the file is x.onnx: expected a name that ends in .pt2"),
    ],
)
def test_what_cannot_be_exported(what, options, message, run, tmp_path, capsys):
    folder = str(run) + what.removeprefix("run") if what else str(tmp_path)
    assert cli.main(["export", folder, "--format", *options]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_an_adapter_beside_the_config_of_another_program_is_no_run(run, tmp_path, capsys):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (folder / "config.json").write_text("{}")
    assert cli.main(["export", str(folder), "--format", "onnx", "--int8"]) == 1
    assert "--int8 of an adapter: expected --images" in capsys.readouterr().err


def test_a_missing_package_is_named_before_any_work(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["export", str(run), "--format", "openvino"]) == 1
    printed = capsys.readouterr().err
    assert printed == "insvp: error: openvino is not installed: pip install 'insvp-fast[export]'\n"
