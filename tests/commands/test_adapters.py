"""``insvp eval`` and ``insvp predict`` with an adapter instead of a run, and with test-time augmentation."""

import copy
import csv
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.checkpoints.backbone import create_backbone, save_backbone
from insvp_fast.commands import cli
from insvp_fast.data import load_data, load_test_data, transform_for
from insvp_fast.data.decode import read_image
from insvp_fast.errors import CheckpointError, DataError, TrainingError
from insvp_fast.export import Facts
from insvp_fast.methods import MethodViT, create_model
from insvp_fast.methods.load import load_model
from insvp_fast.training import evaluation
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing
from insvp_fast.training.load import Run, adapter_sha256, load_run, own_test_data
from insvp_fast.training.loader import Loader
from insvp_fast.training.prediction import load_classifier, predict
from insvp_fast.training.recipe import Recipe
from tests.commands.finished_run import CLASSES

IMAGES = resolve_preprocessing(load_backbone())


def printed(capsys, *arguments: object) -> str:
    assert cli.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments: object) -> str:
    assert cli.main(list(map(str, arguments))) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def results(folder: Path, name: str = "eval-animals.json") -> dict:
    report = json.loads((folder / name).read_text())
    return {key: report[key] for key in ("top1", "top5", "confusion", "class_names")}


@pytest.fixture
def bare(run, tmp_path) -> Path:
    """The run's adapter, as `insvp convert` would write it: without class names."""
    InsVPViT.from_pretrained(run / "adapter").save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": None}))
    return file.parent


def test_an_adapter_predicts_as_its_run(run, images, capsys):
    command = [images / "test", "--top-k", 3, "--batch-size", 4]
    assert printed(capsys, "predict", run / "adapter", *command) == printed(capsys, "predict", run, *command)


def test_an_adapter_is_tested_as_its_run(run, images, bare, tmp_path, capsys):
    assert "--data" in refusal(capsys, "eval", run / "adapter")
    for split in ("train", "test"):
        shutil.copytree(images / "test", tmp_path / "animals" / split)
    for name, source in (("run", run), ("adapter", run / "adapter"), ("names of the data", bare)):
        printed(capsys, "eval", source, "--data", tmp_path / "animals", "--output", tmp_path / name)
    expected = results(tmp_path / "run")
    assert expected["class_names"] == CLASSES and len(set(map(tuple, expected["confusion"]))) > 1
    assert results(tmp_path / "adapter") == results(tmp_path / "names of the data") == expected
    printed(capsys, "eval", run / "adapter", "--data", images)
    assert results(run / "adapter") == expected


def test_an_adapter_without_class_names_is_told_them(run, images, bare, tmp_path, capsys):
    assert "--class-names" in refusal(capsys, "predict", bare, images)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    named = ["--class-names", tmp_path / "names.txt"]
    assert printed(capsys, "predict", bare, images, *named) == printed(capsys, "predict", run, images)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8-sig")  # as Windows writes it
    named.append("--top-k=6")
    assert printed(capsys, "predict", bare, images, *named) == printed(capsys, "predict", run, images, "--top-k=6")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert "2 class names are given: expected 6" in refusal(capsys, "predict", bare, images, *named)
    (tmp_path / "names.txt").write_text("\n".join(reversed(CLASSES)))
    assert "expected the same" in refusal(capsys, "predict", run, images, *named)
    assert "digits has 10: expected --class-names" in refusal(capsys, "eval", bare, "--data", "digits")


@pytest.mark.parametrize("command", ["prompts", "serve", "demo"])
def test_every_command_takes_what_it_asks_for(command, images, bare, tmp_path, monkeypatch, capsys):
    """The class names and the backbone of an adapter that names neither."""
    served, file = [], bare / "adapter_config.json"
    if command == "serve":
        pytest.importorskip("starlette")
        monkeypatch.setattr(pytest.importorskip("uvicorn"), "run", lambda app, **_: served.append(app))
    stub = SimpleNamespace(create_demo=lambda classifier, *_: served.append(classifier), serve_demo=lambda *_: 1 / 0)
    monkeypatch.setitem(sys.modules, "insvp_fast.demo", stub)  # which needs gradio
    more = [images / "test" / "ant" / "0.png"] if command == "prompts" else []
    config = json.loads(file.read_text())
    config["backbone"]["name"] = None
    file.write_text(json.dumps(config))
    assert "expected the backbone itself, as --backbone" in refusal(capsys, command, bare, *more)
    named = ["--backbone", "vit_shapes_32"]
    assert "expected --class-names" in refusal(capsys, command, bare, *more, *named)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    named += ["--class-names", tmp_path / "names.txt"]
    if command == "demo":
        with pytest.raises(ZeroDivisionError):
            printed(capsys, command, bare, *named)
        assert served[0].class_names == CLASSES
    else:
        assert printed(capsys, command, bare, *more, *named)
    if command == "serve":
        assert "for 2 models: expected one RUN" in refusal(capsys, command, bare, f"other={bare}", *named)


@pytest.mark.parametrize("command", ["predict", "prompts", "serve", "export", "eval"])
def test_images_without_three_channels_are_refused_before_the_work(command, images, tmp_path, capsys):
    if command == "serve":
        pytest.importorskip("uvicorn", reason="needs the extra `serve`")
    backbone = timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=32, patch_size=8, depth=1)
    save_backbone(backbone, gray := tmp_path / "gray.safetensors")
    model = InsVPViT(create_backbone(str(gray), num_classes=0), len(CLASSES), InsVPConfig(prompt_length=2))
    preprocessing = resolve_preprocessing(model.backbone)
    model.save_pretrained(adapter := tmp_path / "adapter", class_names=CLASSES, preprocessing=preprocessing)
    recipe = Recipe(data=str(images), backbone=str(gray))
    config = {"recipe": recipe.to_dict(), "preprocessing": preprocessing, "class_names": CLASSES}
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    message = "it takes images [1, H, W]: expected 3 channels: images are read as RGB"
    train = ["train", "--data", images, "--backbone", gray, "--output", tmp_path / "runs"]
    assert f"--backbone is {gray}: {message}" in refusal(capsys, *train)
    assert not (tmp_path / "runs").exists()
    more = {"predict": [images], "prompts": [images], "serve": [], "export": ["--format", "torch"]}
    for source in (adapter, tmp_path / "run"):
        assert message in refusal(capsys, command, source, *more.get(command, ["--data", images]))


@pytest.mark.parametrize("size", [[3, 64, 64], [3, 30, 30]])
@pytest.mark.parametrize("command", ["predict", "prompts", "eval"])
def test_images_of_a_size_that_the_backbone_does_not_take_are_refused_before_the_work(
    command, size, run, images, tmp_path, capsys
):
    folder = shutil.copytree(run, tmp_path / "run")
    for source, name in ((folder, "config.json"), (folder / "adapter", "adapter_config.json")):
        config = json.loads((source / name).read_text())
        config["preprocessing"]["input_size"] = size
        (source / name).write_text(json.dumps(config))
        said = refusal(capsys, command, source, *(["--data", images] if command == "eval" else [images]))
        assert f"{source}: in {name} preprocessing.input_size is {size}: expected a size of images" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"preprocessing": None},
            "is not a run folder of `insvp train`: in config.json preprocessing is None: expected",
        ),
        ({"class_names": "abcdef"}, "is not a run folder .*: in config.json class_names is 'abcdef': expected list"),
        ({"images_sha256": []}, r"is not a run folder .*: in config.json images_sha256 is \[\]: expected dict"),
        (
            {"class_names": CLASSES[1:]},
            ": in config.json class_names has 5 names: expected one for each of the 6 class",
        ),
        ({"preprocessing": {}}, ": in config.json preprocessing has no input_size: expected"),
        ({"preprocessing": IMAGES | {"input_size": [3, 2**40, 2**40]}}, "expected a size of images that the model tak"),
    ],
    ids=str,
)
def test_what_a_run_says_of_its_model_is_checked_as_in_an_adapter(wrong, message, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    (tmp_path / "adapter").symlink_to(run / "adapter")
    with pytest.raises(TrainingError, match=f"^{tmp_path}.*{message}"):
        load_run(tmp_path)


def test_a_run_has_its_own_weights_and_says_what_its_adapter_does_not(run, tmp_path):
    save_backbone(load_backbone(), weights := tmp_path / "own.safetensors")
    config = json.loads((run / "config.json").read_text())
    config["recipe"] |= {"checkpoint": str(weights), "exif_rotation": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = Path(shutil.copytree(run / "adapter", tmp_path / "adapter")) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": None, "preprocessing": None}))
    model = load_run(tmp_path).model
    assert (model.class_names, model.preprocessing, model.exif_rotation) == (CLASSES, IMAGES, False)
    assert model.backbone.pretrained_cfg["file"] == str(weights)
    weights.rename(moved := tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="own.safetensors: there is no such file"):
        load_run(tmp_path)
    assert load_run(tmp_path, f"vit_shapes_32@{moved}").class_names == CLASSES
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(TrainingError, match="has no adapter that can be loaded: there is no such folder, training was"):
        load_run(tmp_path, "vit_shapes_32")


def test_class_names_are_a_list(bare):
    with pytest.raises(ValueError, match="class_names is 'abcdef': expected a list of names"):
        load_run(bare, class_names="abcdef")


def test_the_digest_of_an_adapter_is_of_what_its_model_is_made_of(tmp_path):
    (adapter := tmp_path / "run" / "adapter").mkdir(parents=True)
    digests = []
    for content in (b"1", b"2"):
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (adapter / name).write_bytes(content)
            if content == b"2":
                digests.append(adapter_sha256(adapter))
        digests.append(adapter_sha256(tmp_path / "run"))
    first, config, weights, card, last = digests
    assert len({first, config, weights}) == 3 and weights == card == last


def test_an_adapter_has_no_test_images():
    with pytest.raises(TrainingError, match="an adapter does not say where its test images are: expected a run folder"):
        own_test_data(Run(None, None, {}, CLASSES))


def test_a_backbone_for_images_of_any_size_is_given_them(tmp_path):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, dynamic_img_size=True).bfloat16()
    model = InsVPViT(backbone, 2, InsVPConfig(prompt_length=2))
    preprocessing = resolve_preprocessing(model.backbone) | {"input_size": [3, 64, 48]}
    model.save_pretrained(tmp_path, class_names=["a", "b"], preprocessing=preprocessing)
    classifier = load_classifier(tmp_path, backbone)
    assert classifier.logits(torch.zeros(1, *classifier.image_shape)).shape == (1, 2)


@pytest.mark.parametrize(
    ("method", "size", "reason"),
    [
        ("insvp", 36, "36x36 pixels: expected multiples of the patch size 16"),
        ("vp", 64, "expected 32x32 pixels, as the frame has"),
        ("vapt", 64, "images have 16 patches: expected 4"),
        ("vpt_deep", 36, None),
        ("lora", 36, None),
    ],
)
def test_a_size_that_the_backbone_takes_and_the_prompts_do_not_is_refused_at_loading(method, size, reason, tmp_path):
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 2, "dynamic_img_size": True, "dynamic_img_pad": True}
    backbone = timm.create_model("vit_tiny_patch16_224", **sizes)
    own = copy.deepcopy(backbone)
    if method == "insvp":
        model = InsVPViT(own, 2, InsVPConfig(prompt_length=2))
    else:
        model = create_model(method, own, 2, **{"kernel": 2} if method == "vapt" else {})
    preprocessing = resolve_preprocessing(model.backbone) | {"input_size": [3, size, size]}
    model.save_pretrained(tmp_path, class_names=["a", "b"], preprocessing=preprocessing)
    if reason is None:
        classifier = load_classifier(tmp_path, backbone)
        assert classifier.logits(torch.zeros(1, *classifier.image_shape)).shape == (1, 2)
        return
    message = rf"input_size is \[3, {size}, {size}\]: expected a size of images that the model takes .*{reason}"
    with pytest.raises(TrainingError, match=message):
        load_classifier(tmp_path, backbone)


def test_a_backbone_without_a_name_is_asked_for(run, images, bare, capsys):
    file = bare / "adapter_config.json"
    config = json.loads(file.read_text())
    config["backbone"]["name"] = None
    file.write_text(json.dumps(config | {"class_names": CLASSES}))
    assert "expected the backbone itself, as --backbone" in refusal(capsys, "predict", bare, images)
    given = printed(capsys, "predict", bare, images, "--backbone", "vit_shapes_32")
    assert given == printed(capsys, "predict", run, images)


def test_an_adapter_is_tested_on_what_training_held_out(run, images, bare, tmp_path, capsys):
    def test(source: object, data: object, *options: object) -> tuple[int, str]:
        command = ["eval", source, "--data", data, "--output", tmp_path / "results", *options]
        assert cli.main([*map(str, command), "--json"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["images"], printed.err

    shutil.copytree(images / "test", tmp_path / "animals")
    for name in CLASSES:  # at least four of each, to be divided
        for i in range(4):
            shutil.copy(images / "test" / "ant" / f"{i}.png", tmp_path / "animals" / name / f"more-{i}.png")
    model = InsVPViT.from_pretrained(run / "adapter")
    data = load_data(str(tmp_path / "animals"), model.preprocessing, 3)
    model.trained_on = json.loads(json.dumps(data.origin))
    model.save_pretrained(tmp_path / "adapter")
    moved = (tmp_path / "animals").rename(tmp_path / "moved")
    count, said = test(tmp_path / "adapter", moved)
    assert count == len(data.test) < 40 and "may be among them" not in said
    tested = load_test_data(
        str(moved), model.preprocessing, 3, CLASSES, undivided_sha256=data.origin["undivided_sha256"]
    )
    assert tested.indices == data.test.indices
    shutil.copy(images / "test" / "ant" / "0.png", moved / "ant" / "new.png")
    count, said = test(tmp_path / "adapter", moved)
    assert count == 41 and "all 41 images are tested" in said and "not the images that training divided; to" in said
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    count, said = test(bare, moved, "--class-names", tmp_path / "names.txt")
    assert count == 41 and "the adapter does not say which images it was trained on" in said
    assert "give as --data a folder with a test split" in said
    assert "may be among them" not in test(tmp_path / "adapter", images)[1]


def test_an_adapter_that_does_not_say_how_images_are_prepared_is_told_how_to(tmp_path):
    model = InsVPViT(load_backbone(), 5, InsVPConfig(prompt_length=2))
    model.save_pretrained(tmp_path, [*"abcde"])
    with pytest.raises(TrainingError, match="save_pretrained as preprocessing=timm.data.resolve_model_data_config"):
        load_classifier(tmp_path)
    model.save_pretrained(tmp_path, preprocessing=timm.data.resolve_model_data_config(model))
    assert load_classifier(tmp_path).image_shape == (3, 32, 32)


@pytest.mark.parametrize("turned", [True, False])
def test_every_way_in_turns_images_as_training_did(turned, run, tmp_path, monkeypatch):
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    exif[0x0112] = 6
    photo = tmp_path / "photo.jpg"
    Image.fromarray(pixels).resize((48, 36)).save(photo, exif=exif)
    model = InsVPViT.from_pretrained(run / "adapter")
    model.exif_rotation = turned
    model.save_pretrained(tmp_path / "adapter")
    expected = transform_for(model.preprocessing)(read_image(photo, exif_rotation=turned))
    other = transform_for(model.preprocessing)(read_image(photo, exif_rotation=not turned))
    assert (expected - other).abs().max() > 0.5
    classifier, seen = load_classifier(tmp_path / "adapter"), []
    monkeypatch.setattr(classifier, "model", lambda images: seen.extend(images) or torch.zeros(len(images), 6))
    list(predict(classifier, [str(photo)]))
    with photo.open("rb") as upload:  # as the server and the demo read it
        seen.append(classifier.images([upload])[0][0])
    about = {"class_names": None, "preprocessing": model.preprocessing, "input": [None, 3, 32, 32]}
    turns = load_model(tmp_path / "adapter").exif_rotation
    facts = Facts(inside="nothing", insvp_fast_version="0", exif_rotation=turns, **about)
    with Image.open(photo) as opened:
        seen.append(Facts.from_metadata(facts.to_metadata(), "file").prepare(opened))
    seen.append(facts.prepare(read_image(photo, exif_rotation=turned)))  # which is not turned twice
    assert len(seen) == 4 and all(torch.equal(image, expected) for image in seen)


@pytest.mark.parametrize("kind", [MethodViT, InsVPViT])
def test_adapters_of_all_methods_are_loaded(kind, run, images, tmp_path, capsys):
    if kind is MethodViT:
        torch.manual_seed(0)
        model = create_model("vpt_deep", load_backbone(), len(CLASSES), length=3)
        torch.nn.init.normal_(model.head.weight)
        model.save_pretrained(tmp_path, CLASSES, resolve_preprocessing(load_backbone()))
    folder = tmp_path if kind is MethodViT else run / "adapter"
    model = load_model(folder)
    assert type(model) is kind and not model.training
    transform = transform_for(model.preprocessing)
    for file, name, probability in list(csv.reader(io.StringIO(printed(capsys, "predict", folder, images / "test"))))[
        1:
    ]:
        with torch.inference_mode():
            best = model(transform(Image.open(file))[None]).softmax(1)[0].max(0)
        assert (CLASSES[best.indices], pytest.approx(best.values.item(), abs=1e-4)) == (name, float(probability))


def test_flips_average_logits(run, images, tmp_path, capsys):
    model = load_model(run / "adapter").double()
    transform, hits = transform_for(model.preprocessing), 0
    lines = printed(capsys, "predict", run, images / "test", "--tta", "flip", "--format", "jsonl", "--top-k", 6)
    for line in map(json.loads, lines.splitlines()):
        image = transform(Image.open(line["file"])).double()[None]
        with torch.inference_mode():
            once, mirrored = model(image), model(image.flip(-1))
        probabilities = ((once + mirrored) / 2).softmax(1)[0]
        other = (once.softmax(1) + mirrored.softmax(1))[0] / 2
        found = torch.tensor([dict(zip(line["classes"], line["probabilities"], strict=True))[name] for name in CLASSES])
        torch.testing.assert_close(found.double(), probabilities, rtol=0, atol=5e-6)
        assert (found - other).abs().max() > 1e-3 or probabilities.max() > 0.99
        hits += CLASSES[probabilities.argmax()] == Path(line["file"]).parent.name
    assert f"top-1 {hits / 16:.2%}" in printed(capsys, "eval", run, "--tta", "flip", "--output", tmp_path)


@pytest.mark.parametrize("form", ["given", "by its ending"])
def test_parquet_holds_what_csv_holds(form, run, images, probabilities, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert "--output" in refusal(capsys, "predict", run, images, "--format", "parquet")
    file = tmp_path / ("out.parquet" if form == "by its ending" else "out")
    options = ["--format", "parquet"] if form == "given" else []
    printed(capsys, "predict", run, images / "test", "--top-k", 2, "--output", file, *options)
    table = parquet.read_table(file)
    assert table.schema.names == ["file", "class", "probability", "class_2", "probability_2"]
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "float", "string", "float"]
    for row in table.to_pylist():
        best = probabilities[row["file"]].topk(2)
        assert [row["class"], row["class_2"]] == [CLASSES[index] for index in best.indices]
        # the relative error of a small probability is the error of its logit, here 15 with 1e-5 of it
        assert [row["probability"], row["probability_2"]] == pytest.approx(best.values.tolist(), rel=1.5e-4)


@pytest.mark.parametrize("turned", [True, False])
def test_eval_turns_images_as_training_did(turned, run, images, tmp_path, monkeypatch):
    model = InsVPViT.from_pretrained(run / "adapter")
    model.exif_rotation = turned
    model.save_pretrained(tmp_path)
    seen = []

    class Spy(Loader):
        def __init__(self, dataset, *rest):
            seen.append(dataset.exif_rotation)
            super().__init__(dataset, *rest)

    monkeypatch.setattr(evaluation, "Loader", Spy)
    evaluation.evaluate_run(tmp_path, data=str(images))
    assert seen == [turned]
    own = load_run(run)
    own.model.exif_rotation = turned
    assert own_test_data(own).exif_rotation == turned
    with pytest.raises(DataError, match="cub in nowhere: no such folder"):
        own_test_data(own._replace(recipe=dataclasses.replace(own.recipe, data="cub", root="nowhere")))
