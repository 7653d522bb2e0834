"""Each format of exported files, written from a tiny model, loaded and run on other sizes than it was traced with."""

import copy
import dataclasses
import importlib
import logging
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT
from insvp_fast.data import transform_for
from insvp_fast.data.images import Images
from insvp_fast.errors import CheckpointError, ExportError
from insvp_fast.export import FORMATS, ExportedModel, Facts, export_model, formats, load, measure_loss, onnx, programs
from insvp_fast.export.graph import Graph, standard_model
from insvp_fast.export.parity import Parity, check_parity
from insvp_fast.export.preprocessing import ExportedPreprocessing
from insvp_fast.testing import make_pair, relative_error
from tests.export.test_preprocessing import settings

onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install -e '.[export]'")

CLASSES = ["ant", "bee", "fox, red", "Käfer", "猫"]


@pytest.fixture(scope="module")
def model() -> InsVPViT:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1}
    _, fast = make_pair("vit_tiny_patch16_224", InsVPConfig(prompt_length=3), len(CLASSES), **sizes)
    fast.class_names, fast.preprocessing = CLASSES, settings()
    return fast.cpu().eval()


def pictures(count: int, height: int, width: int) -> list[Image.Image]:
    pixels = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [*map(Image.fromarray, pixels)]


def assert_threads_can_share(exported):
    """Each gets the logits that it would alone."""
    batches = [torch.randn(count, *exported.facts.input[1:]) for count in (1, 2, 3)]
    alone = [*map(exported, batches)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(exported, batches), alone))


def assert_right(exported, model, count, height, width):
    """The logits of images of this size are the reference's in double precision, in whatever order their memory is."""
    images = pictures(count, height, width)
    prepared = torch.stack([*map(exported.facts.prepare, images)])
    found = exported(prepared)
    assert torch.equal(exported(prepared.mT.contiguous().mT), found)
    exact = standard_model(model).double()
    inputs = torch.stack([*map(transform_for(model.preprocessing), images)]).double()
    assert found.dtype == torch.float32 and relative_error(found, exact(inputs)) < 1e-5
    exact.float()  # the parameters are the model's


@pytest.fixture
def file(tmp_path):
    return lambda format: tmp_path / f"model{FORMATS[format].suffix}"


def test_standard_models_share_the_parameters(model):
    standard = standard_model(model)
    assert type(standard) is InsVPReference and not standard.training
    shared = dict(standard.named_parameters())
    assert all(shared[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())


def test_torch_keeps_the_operations(model, file):
    with torch.autocast("cpu", torch.bfloat16):  # which changes nothing
        done = export_model(model, file("torch"), "torch", preprocess=True, channels_last=True)
    assert done.operations > 10 and not done.notes
    exported = load(file("torch"))
    assert exported.facts == done.facts and exported.facts.class_names == CLASSES
    assert exported.facts.input == [None, None, None, 3] and exported.facts.inside == "resize, crop, normalize"
    assert_right(exported, model, 2, 300, 41)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aoti_keeps_the_operations(model, file):
    done = export_model(model, file("aoti"), "aoti")
    assert done.operations > 10
    exported = load(file("aoti"))
    assert exported.facts == done.facts and exported.facts.preprocessing == settings()
    assert_right(exported, model, 3, 40, 44)
    assert_threads_can_share(exported)


def test_onnx_holds_standard_operators_and_all_preprocessing(model, file):
    done = export_model(model.train(), file("onnx"), "onnx", preprocess=True, channels_last=True)
    assert [p.batch for p in done.parity] == [1, 7] and done.operations == 0
    content = importlib.import_module("onnx").load(file("onnx"))
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
    assert not content.functions and not {node.domain for node in content.graph.node} - {""}
    session = onnxruntime.InferenceSession(file("onnx"))
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("images", ["batch", "height", "width", 3])]
    assert [(x.name, x.shape) for x in session.get_outputs()] == [("logits", ["batch", 5])]
    exported = load(file("onnx"))
    assert exported.facts == done.facts
    assert_right(exported, model, 2, 300, 41)


def test_openvino_normalizes_and_rounds_weights(model, file):
    done = export_model(model, file("openvino"), "openvino", preprocess=True, batch=3, int8=True)
    assert "resizing and cropping are not inside" in done.notes[0]
    assert [p.batch for p in done.parity] == [3]  # before rounding
    exported = load(file("openvino"))
    assert exported.facts == done.facts and exported.facts.class_names == CLASSES
    assert exported.facts.input == [3, 3, 32, 32] and exported.facts.inside == "normalize"
    assert sorted(path.suffix for path in file("openvino").parent.iterdir()) == [".bin", ".xml"]
    parameters = sum(p.numel() for p in model.parameters())
    assert file("openvino").with_suffix(".bin").stat().st_size < 2 * parameters
    loss = measure_loss(model, exported, Images([np.asarray(image) for image in pictures(4, 50, 60)], [-1] * 4))
    assert loss.accuracy_before is None and loss.images == 4
    assert 0 < loss.largest_difference < 0.1


def test_threads_can_share_a_file_of_openvino_which_takes_an_empty_batch(model, file):
    export_model(model, file("openvino"), "openvino")
    exported = load(file("openvino"))
    assert_threads_can_share(exported)
    assert exported(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


# What is not written


@pytest.fixture
def facts():
    """Of a file that has nothing inside."""
    about = {"class_names": None, "preprocessing": settings(), "insvp_fast_version": "0"}
    return Facts(inside="nothing", input=[None, 3, 32, 32], **about)


def test_wrong_logits_are_refused(model, facts):
    def run(batches, change):
        with torch.no_grad():
            return [change(model(images)) for images in batches]

    errors = [p.relative_error for p in check_parity(model, lambda batches: run(batches, lambda y: y), facts)]
    assert errors == [0, 0]
    bare = dataclasses.replace(facts, preprocessing=None)  # unknown, and not needed where nothing of it is inside
    (less, _) = check_parity(model, lambda batches: run(batches, lambda y: y - 1e-6), bare)
    assert less.largest_difference == pytest.approx(1e-6, rel=0.5)
    assert str(Parity(7, 1e-6, 2e-5)) == "batch 7: relative error 1.0e-06, largest difference 2.0e-05"
    for change in (lambda y: y * (1 + 2e-5), lambda y: y.roll(1, 0) if len(y) > 1 else y, lambda y: y * float("nan")):
        with pytest.raises(ExportError, match="the exported logits are not the model's: batch"):
            check_parity(model, lambda batches, change=change: run(batches, change), facts)


@pytest.mark.parametrize(
    ("inside", "size", "change"),
    [
        ("normalize", 32, lambda pixels: pixels.flip(-1)),  # BGR
        ("normalize", 32, lambda pixels: pixels.roll(1, 0) if len(pixels) > 1 else pixels),
        ("resize, crop, normalize", None, lambda pixels: pixels.clamp(max=250)),
        (
            "resize, crop, normalize",
            None,
            lambda pixels: pixels[:, 1:] if pixels.shape[1] > pixels.shape[2] else pixels,
        ),
        ("resize, crop, normalize", None, lambda pixels: pixels[:, :, 1:] if pixels.shape[2] > 50 else pixels),
    ],
)
def test_wrong_preprocessing_inside_is_refused(inside, size, change, model, facts):
    """Whatever a file does to images otherwise than training, be it to tall ones alone, or to wide ones."""
    facts = dataclasses.replace(facts, inside=inside, input=[None, size, size, 3])
    prepare = ExportedPreprocessing(facts.preprocessing, size is None, True)

    def run(batches, change=lambda pixels: pixels):
        with torch.no_grad():
            return [model(prepare(change(images))) for images in batches]

    assert all(p.relative_error < 1e-6 for p in check_parity(model, run, facts))
    with pytest.raises(ExportError, match="the exported logits are not the model's: batch"):
        check_parity(model, lambda batches: run(batches, change), facts)


@pytest.mark.parametrize(
    ("script", "reason"),
    [("printf 'Traceback\\nSomeError: why\\n' >&2; exit 1", "SomeError: why"), ("exit 3", "exit status 3")],
)
@pytest.mark.parametrize("format", ["torch", "aoti"])
def test_a_process_that_cannot_run_a_file_is_told(format, script, reason, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ExportError, match=f"a new process cannot run the exported file: {reason}$"):
        formats._run(format, tmp_path / "x.pt2", [torch.zeros(1)])


def test_a_loss_is_of_the_answers_and_of_classes_only_where_all_are_known(model, facts):
    two = dataclasses.replace(facts, input=[2, 3, 32, 32])  # images at once, of which the file takes no other number
    pixels = np.stack([*map(np.asarray, pictures(4, 32, 32))])
    with torch.no_grad():
        logits = torch.cat([model(facts.prepare(Image.fromarray(image))[None]) for image in pixels])
    classes = [*logits[:3].argmax(1).tolist(), logits[3].argmin().item()]  # the last is wrong before, and right after
    turned = measure_loss(model, ExportedModel(lambda images: -model(images), two), Images(pixels, classes))
    assert turned[:4] == (4, 0.75, 0.25, 0)
    unknown = Images(pixels, [*classes[:3], -1])
    less = measure_loss(model, ExportedModel(lambda images: model(images) - 0.25, two), unknown)
    assert less[:4] == (4, None, None, 1) and less.largest_difference == pytest.approx(0.25, rel=1e-5)


def test_a_file_of_before_is_replaced_by_one_of_the_model_in_fp32(model, file, facts, monkeypatch):
    def capture(model, **_):
        assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
        return SimpleNamespace(facts=facts, operations=0)

    monkeypatch.setattr(formats, "capture", capture)
    monkeypatch.setattr(formats, "check_parity", lambda *_: [])
    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(write=lambda _, file: file.write_bytes(b"new")))
    file("onnx").write_bytes(b"of before")
    export_model(copy.deepcopy(model).bfloat16().train(), file("onnx"), "onnx")
    assert file("onnx").read_bytes() == b"new" and [*file("onnx").parent.iterdir()] == [file("onnx")]


def test_a_file_that_does_not_load_is_not_left(model, file, facts, monkeypatch):
    monkeypatch.setattr(formats, "capture", lambda model, **_: Graph(None, facts, {}))
    broken = FORMATS["onnx"]._replace(write=lambda graph, file: file.write_bytes(b"half a file"))
    monkeypatch.setitem(FORMATS, "onnx", broken)
    file("onnx").write_bytes(b"of before")
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot load it"):
        export_model(model, file("onnx"), "onnx")
    assert file("onnx").read_bytes() == b"of before" and len([*file("onnx").parent.iterdir()]) == 1


def test_weights_of_something_else_are_not_replaced(model, file):
    weights = file("openvino").with_suffix(".bin")
    weights.write_bytes(b"of something else")
    with pytest.raises(ExportError, match=r"model.bin is there without .*model.xml, as no export leaves it: expected"):
        export_model(model, file("openvino"), "openvino")
    assert weights.read_bytes() == b"of something else" and [*weights.parent.iterdir()] == [weights]


def test_aoti_without_a_compiler(file, facts):
    program = torch.export.export(torch.nn.Linear(32, 5), (torch.zeros(2, 3, 32, 32),))
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/bin/false")}),
        pytest.raises(ExportError, match="AOTInductor, which needs a C.. compiler, failed: .*No working C.. compiler"),
    ):
        programs.write_aoti(Graph(program, facts, {}), file("aoti"))


def test_the_advice_of_the_quantizer_is_not_printed_and_other_lines_are(monkeypatch, caplog):
    quantization = pytest.importorskip("onnxruntime.quantization")

    def fail(*_, **__):
        logging.warning("infer shapes first")
        raise ValueError("no such file")

    monkeypatch.setattr(quantization, "quantize_dynamic", fail)
    with pytest.raises(ValueError, match="no such file"):
        onnx.quantize_onnx("in.onnx", "out.onnx")
    logging.warning("after it")
    assert caplog.messages == ["after it"]


def test_what_cannot_be_written(model, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"the file is .*x.bin: expected a name that ends in .pt2"):
        export_model(model, tmp_path / "x.bin", "torch")
    with pytest.raises(ExportError, match="the format is ONNX: expected one of onnx, torch, aoti, openvino"):
        export_model(model, tmp_path / "x.onnx", "ONNX")
    with pytest.raises(ExportError, match="the batch is 0: expected 1 or more images, or None"):
        export_model(model, tmp_path / "x.pt2", "torch", batch=0)
    with pytest.raises(ExportError, match="`channels_last` without `preprocess`: expected both"):
        export_model(model, tmp_path / "x.pt2", "torch", channels_last=True)
    with pytest.raises(ExportError, match="8-bit weights in the format torch: expected onnx or openvino"):
        export_model(model, tmp_path / "x.pt2", "torch", int8=True)
    with pytest.raises(ExportError, match="the file is .*/none/x.pt2: there is no folder .*/none: expected a"):
        export_model(model, tmp_path / "none" / "x.pt2", "torch")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match="the file is .*folder.pt2: it is a folder: expected a file"):
        export_model(model, tmp_path / "folder.pt2", "torch")
    with pytest.raises(ExportError, match="head.weight is on the meta device, without values: expected a"):
        export_model(copy.deepcopy(model).to("meta"), tmp_path / "x.pt2", "torch")
    monkeypatch.setattr(model, "preprocessing", None)
    with pytest.raises(ExportError, match="does not say how images are prepared"):
        export_model(model, tmp_path / "x.pt2", "torch", preprocess=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnxscript is not installed: pip install 'insvp-fast\[export\]'"):
        export_model(model, tmp_path / "x.onnx", "onnx")


def test_what_is_no_model_of_this_package_is_refused(tmp_path):
    with pytest.raises(ExportError, match="the model is a Linear: expected an InsVPViT, a MethodViT or a TunedViT"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "x.onnx", "onnx")


def test_what_cannot_be_loaded(tmp_path):
    for name in ("x.pt2", "x.bin"):
        (tmp_path / name).write_text("text")
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt2")
    for name, message in (
        ("weights.pt2", "torch.export cannot load it"),
        ("x.pt2", "not a .pt2 file"),
        ("none.pt2", "none.pt2: there is no such file"),
        ("x.bin", r"\.onnx, \.pt2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "metadata",
    [
        "[1]",
        "5",
        "null",
        "{}",
        '{"class_names": 5}',
        '{"class_names": "["}',
        '{"class_names": "%s"}' % ("[" * 100_000),
        "[" * 100_000,
        "",
    ],
    ids=range(9),
)
def test_programs_of_others_cannot_be_loaded(metadata, tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "x.pt2", extra_files={"insvp_fast.json": metadata})
    with pytest.raises(
        CheckpointError,
        match="x.pt2: not written by .*: (its metadata are .*: expected JSON under|it has no insvp_fast.json)",
    ):
        load(tmp_path / "x.pt2")


def test_packages_of_others_cannot_be_loaded(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("x/data/aotinductor/model/x.so", b"x")
    with pytest.raises(CheckpointError, match="x.pt2: AOTInductor cannot load it: ") as caught:
        load(tmp_path / "x.pt2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [[], ["class_names"], ["class_names", "of another program"]])
def test_files_of_others_for_openvino_cannot_be_loaded(path, tmp_path):
    openvino = pytest.importorskip("openvino")
    images = openvino.opset13.parameter([1, 3], np.float32)
    other = openvino.Model([openvino.opset13.relu(images)], [images])
    other.set_rt_info("text", ["insvp_fast", *path])
    openvino.save_model(other, tmp_path / "x.xml")
    with pytest.raises(CheckpointError, match=r"x.xml: not written by .*: its metadata are \{.*\}: expected"):
        load(tmp_path / "x.xml")
