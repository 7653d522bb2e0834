"""Backbones by everything that names one, and adapters that find theirs again."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from timm import create_model
from timm.models._hub import save_for_hf
from torch import nn

from insvp_fast import InsVPConfig, InsVPReference
from insvp_fast.checkpoints import backbone as builder
from insvp_fast.checkpoints import files
from insvp_fast.checkpoints.adapter import AdapterCheckpoint
from insvp_fast.checkpoints.backbone import create_backbone, hub_id, is_name, save_backbone, source_of
from insvp_fast.checkpoints.state_dict import backbone_sha256
from insvp_fast.commands import cli
from insvp_fast.errors import CheckpointError, InsVPError
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.evaluation import evaluate_run
from insvp_fast.training.prediction import load_classifier, predict
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train

NAME = "test_vit"
CONFIG = InsVPConfig(prompt_length=2)


class Model(AdapterCheckpoint, InsVPReference):
    pass


def original(**arguments) -> nn.Module:
    torch.manual_seed(1)
    return create_model(NAME, num_classes=7, **arguments)


def timm_folder(folder: Path, safe: bool, **arguments) -> str:
    save_for_hf(original(**arguments), str(folder), safe_serialization=safe)
    return str(folder)


def train_file(file: Path, **more) -> str:
    """What timm's train.py writes: tensors, numbers, and its options as a Namespace."""
    options = argparse.Namespace(model=NAME, lr=0.1, img_size=None, model_kwargs={}, gp=None)
    torch.save({"epoch": 3, "arch": NAME, "state_dict": original().state_dict(), "args": options} | more, file)
    return str(file)


def plain_file(file: Path, metadata: dict[str, str] | None = None) -> str:
    safetensors.torch.save_file(original().state_dict(), file, metadata)
    return str(file)


def text_file(file: Path) -> str:
    file.write_text("no weights")
    return str(file)


def relative(path: str) -> str:
    return os.path.relpath(path)


SOURCES = {
    "folder": lambda at: timm_folder(at / "saved", safe=True),
    "folder of a pickle": lambda at: timm_folder(at / "saved", safe=False),
    "local-dir": lambda at: "local-dir:" + timm_folder(at / "saved", safe=True),
    "relative local-dir": lambda at: "local-dir:" + relative(timm_folder(at / "saved", safe=True)),
    "a path with @ and spaces": lambda at: timm_folder(at / "my @models" / "v.1", safe=True),
    "NAME@FILE": lambda at: f"{NAME}@" + plain_file(at / "weights.safetensors"),
    "relative NAME@FILE": lambda at: f"{NAME}@" + relative(plain_file(at / "weights.safetensors")),
    "NAME@FILE of train.py": lambda at: f"{NAME}@" + train_file(at / "best @1.pth.tar"),
    "file of train.py": lambda at: train_file(at / "best.pth.tar"),
    "file that says its architecture": lambda at: plain_file(at / "w.safetensors", {"architecture": NAME}),
}
FILES = [name for name in SOURCES if "folder" not in name]


@pytest.mark.parametrize("kind", SOURCES)
def test_an_adapter_finds_the_backbone_that_it_was_trained_with(kind, tmp_path, monkeypatch):
    backbone = load_backbone(SOURCES[kind](tmp_path))
    expected = backbone_sha256(original(), torch.float32)
    assert backbone_sha256(backbone, torch.float32) == expected
    model = Model(backbone, 3, CONFIG).eval()
    model.save_pretrained(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    recorded = described["backbone"]["name"]
    assert recorded == described["base_model_name_or_path"]
    assert str(tmp_path) in f"/{os.path.normpath(recorded.partition('/')[2])}"  # a relative path may lead over `..`
    assert (
        "base_model:" not in (tmp_path / "adapter" / "README.md").read_text()
    )  # of the Hub, which has no such weights
    monkeypatch.chdir("/")  # a relative path was made absolute
    again = Model.from_pretrained(tmp_path / "adapter")
    assert backbone_sha256(again.backbone, torch.float32) == expected
    images = torch.randn(2, 3, *backbone.patch_embed.img_size)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_backbone_that_is_gone_or_another_is_told(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    Model(load_backbone(source), 3, CONFIG).save_pretrained(tmp_path / "adapter")
    place = Path(source_of(load_backbone(source)).rpartition("local-dir:")[2].removeprefix(f"{NAME}.r160_in1k@"))
    (place if place.is_file() else next(place.glob("*model.*"))).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: .*give backbone=") as caught:
        Model.from_pretrained(tmp_path / "adapter")
    assert str(place) in str(caught.value)

    torch.manual_seed(2)
    other = create_model(NAME, num_classes=0)
    with pytest.raises(CheckpointError, match="the backbone has sha256"):
        Model.from_pretrained(tmp_path / "adapter", other)


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1}, {"in_chans": 5}], ids=str)
@pytest.mark.parametrize("made", ["timm's local-dir", "timm's file"])
def test_backbones_that_timm_made_are_recorded_alike(made, arguments, tmp_path):
    """A user of the library builds the backbone with timm alone."""
    if made == "timm's file":
        overlay = {"file": plain_file(tmp_path / "w.safetensors"), "num_classes": 7}
        backbone = create_model(NAME, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
        assert source_of(backbone) == f"{NAME}.r160_in1k@{tmp_path / 'w.safetensors'}"
    else:
        place = "local-dir:" + timm_folder(tmp_path / "saved", True)
        backbone = create_model(place, pretrained=True, num_classes=0, **arguments)
        assert source_of(backbone) == f"local-dir:{tmp_path / 'saved'}"
    assert hub_id(backbone) is None
    Model(backbone, 3, CONFIG).save_pretrained(tmp_path / "adapter")
    again = Model.from_pretrained(tmp_path / "adapter")
    assert backbone_sha256(again.backbone, torch.float32) == backbone_sha256(backbone, torch.float32)
    assert arguments or backbone_sha256(backbone, torch.float32) == backbone_sha256(original(), torch.float32)


def test_a_tag_that_timm_does_not_know_is_left_out_beside_a_file(tmp_path):
    model = create_model(NAME)
    model.pretrained_cfg = model.pretrained_cfg | {"tag": "mine"}
    save_for_hf(model, str(tmp_path / "folder"))
    torch.save(model.state_dict(), file := tmp_path / "weights.pth")
    backbone = create_backbone(f"local-dir:{tmp_path / 'folder'}", checkpoint=file)
    assert source_of(backbone) == f"{NAME}@{file}"


def test_the_shipped_backbone_is_found_again(tmp_path):
    Model(load_backbone(), 3, CONFIG).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["backbone"]["name"] == "vit_shapes_32"
    again = Model.from_pretrained(tmp_path)
    assert backbone_sha256(again.backbone, torch.float32) == backbone_sha256(load_backbone(), torch.float32)


@pytest.mark.parametrize("arguments", [{"img_size": 96}, {"depth": 3}, {"class_token": False, "global_pool": "avg"}])
def test_the_arguments_of_a_saved_model_are_kept(arguments, tmp_path):
    """In a folder of timm, in a checkpoint of train.py and in what ``insvp convert`` keeps."""
    expected = original(**arguments)
    for kind in ("folder", "train.py", "kept"):
        place = tmp_path / kind
        if kind == "folder":
            timm_folder(place, safe=True, **arguments)
        elif kind == "train.py":
            given = {"img_size": arguments.get("img_size"), "gp": arguments.get("global_pool")}
            rest = {key: value for key, value in arguments.items() if key not in ("img_size", "global_pool")}
            options = argparse.Namespace(model_kwargs=rest, **given)
            train_file(place, state_dict=expected.state_dict(), args=options)
        else:
            place = place.with_suffix(".safetensors")
            kept = original(**arguments)
            kept.reset_classifier(0)
            save_backbone(kept, place)
            assert source_of(kept).endswith(f"@{place}")
        backbone = load_backbone(str(place))
        assert backbone_sha256(backbone, torch.float32) == backbone_sha256(expected, torch.float32)
        assert backbone.global_pool == expected.global_pool
        Model(backbone, 3, CONFIG).save_pretrained(tmp_path / "adapter")
        again = Model.from_pretrained(tmp_path / "adapter").backbone
        assert again.patch_embed.img_size == expected.patch_embed.img_size and len(again.blocks) == len(expected.blocks)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "state_dict", "model"])
def test_weights_are_found_in_a_checkpoint(key, tmp_path):
    state = {f"module.{name}": value for name, value in original().state_dict().items()}
    torch.save({key: state, "epoch": 1}, tmp_path / "weights.pth")
    backbone = load_backbone(f"{NAME}@{tmp_path / 'weights.pth'}")
    assert backbone_sha256(backbone, torch.float32) == backbone_sha256(original(), torch.float32)


@pytest.mark.parametrize("holder", ["state_dict", "args", "arch", "epoch"])
def test_nothing_is_unpickled_but_tensors_and_options(holder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    class Options(argparse.Namespace):
        __reduce__ = Trap.__reduce__

    for trap in (Trap(), Options(), argparse.Namespace(model_kwargs=Trap())):
        file = train_file(tmp_path / "weights.pth", **{holder: trap})
        for source in (file, f"{NAME}@{file}"):
            with pytest.raises(InsVPError, match="weights.pth: found a truncated file or one with code"):
                load_backbone(source)
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / "config.json").write_text(json.dumps({"architecture": NAME}))
        (tmp_path / "saved" / "pytorch_model.bin").write_bytes(Path(file).read_bytes())
        with pytest.raises(InsVPError):
            load_backbone(str(tmp_path / "saved"))
    assert not (tmp_path / "sprung").exists()


def broken_folder(at: Path, change) -> str:
    folder = timm_folder(at / "saved", safe=True)
    change(Path(folder))
    return folder


NO_CONFIG = "expected config.json and weights, as timm saves them"
WRONG = {
    "no such name": (
        lambda at: "vit_unheard_of",
        "timm has no model vit_unheard_of, and there is no such folder or file",
    ),
    "no such tag": (lambda at: f"{NAME}.unheard_of", f"timm has no model {NAME}.unheard_of"),
    "no such name@": (lambda at: "vit_unheard_of@x.pth", "timm has no model vit_unheard_of"),
    "with prompts": (
        lambda at: f"insvp_{NAME}",
        f"insvp_{NAME} is a model with prompts: expected its backbone, {NAME}",
    ),
    "no such file": (lambda at: f"{NAME}@{at}/no.pth", "no.pth: there is no such file"),
    "no such folder": (lambda at: f"local-dir:{at}/no", "no: there is no such folder"),
    "an empty folder": (lambda at: str(at), NO_CONFIG),
    "without config": (lambda at: broken_folder(at, lambda f: (f / "config.json").unlink()), NO_CONFIG),
    "without weights": (lambda at: broken_folder(at, lambda f: (f / "model.safetensors").unlink()), NO_CONFIG),
    "truncated": (lambda at: broken_folder(at, lambda f: (f / "model.safetensors").write_bytes(b"x")), "saved"),
    "no JSON": (lambda at: broken_folder(at, lambda f: (f / "config.json").write_text("{")), "saved"),
    "JSON of a language model": (lambda at: broken_folder(at, lambda f: (f / "config.json").write_text("{}")), "saved"),
    "no architecture": (lambda at: plain_file(at / "w.safetensors"), "w.safetensors: found no architecture in it"),
    "an architecture of nobody": (
        lambda at: train_file(at / "w.pth", arch="visiontransformer"),
        "found the architecture 'visiontransformer', which timm does not know: expected NAME@",
    ),
    "an architecture without a name": (
        lambda at: train_file(at / "w.pth", arch=torch.zeros(2)),
        r"w.pth: found the architecture tensor\(\[0., 0.\]\), which timm does not know",
    ),
    "arguments without names": (
        lambda at: train_file(at / "w.pth", args=argparse.Namespace(model_kwargs=torch.zeros(2))),
        r"w.pth: found the arguments tensor\(\[0., 0.\]\): expected their names",
    ),
    "arguments under numbers": (
        lambda at: train_file(at / "w.pth", model_args={5: 1}),
        "w.pth: found the arguments {5: 1}: expected their names",
    ),
    "a list of arguments": (
        lambda at: plain_file(at / "w.safetensors", {"architecture": NAME, "model_args": "[1]"}),
        r"w.safetensors: found the arguments \[1\]: expected their names",
    ),
    "arguments in 100,000 lists": (
        lambda at: plain_file(at / "w.safetensors", {"architecture": NAME, "model_args": "[" * 100_000}),
        "w.safetensors: found model_args that are not JSON",
    ),
    "a name that no file can have": (lambda at: "x" * 300, "timm has no model x{300}, and there is no such folder"),
    "a file that cannot be": (lambda at: f"{NAME}@{'x' * 300}", "x{300}: there is no such file"),
    "a folder that cannot be": (lambda at: f"local-dir:{'x' * 300}", "x{300}: there is no such folder"),
    "no safetensors": (
        lambda at: str((at / "w.safetensors").write_text("x") and at / "w.safetensors"),
        "w.safetensors",
    ),
    "a convolutional net": (lambda at: f"resnet10t@{plain_file(at / 'w.safetensors')}", "expected a ResNet's"),
    "weights of another": (
        lambda at: f"vit_tiny_patch16_224@{plain_file(at / 'w.safetensors')}",
        "w.safetensors: not weights of this model",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_backbones_are_one_error(make, message, tmp_path):
    source = make(tmp_path)
    with pytest.raises(InsVPError, match=f"`backbone` is .*{message}") as caught:
        load_backbone(source)
    assert "\n" not in str(caught.value)


def test_a_name_of_timm_comes_before_a_folder(tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_name(NAME) and is_name(f"{NAME}.r160_in1k") and not is_name(f"{NAME}.pth")
    assert source_of(create_backbone(NAME, pretrained=False)) == f"{NAME}.r160_in1k"


# The commands


@pytest.mark.parametrize("kind", ["local-dir", "folder", "file of train.py", "NAME@FILE"])
def test_the_commands_take_it(kind, tmp_path, capsys):
    source = SOURCES[kind](tmp_path)
    assert cli.main(["info", source]) == 0
    assert backbone_sha256(original(), torch.float32) in capsys.readouterr().out
    options = {"backbone": source, "output": str(tmp_path / "runs"), "probe": False, "epochs": 1, "prompt_length": 1}
    pixels = torch.rand(2, 4, 40, 40, 3).mul(255).byte().numpy()
    for split in ("train", "val"):
        for name, images in zip(("2", "10"), pixels, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / split / name / f"{i}.png")
    run = train(Recipe(data=str(tmp_path), **options))
    facts, figures, _ = evaluate_run(run)
    assert figures.images == 8 and facts["class_names"] == ["10", "2"]  # as text, torchvision's order
    (row,) = predict(load_classifier(run), [str(tmp_path / "val" / "2" / "0.png")], top_k=5)
    assert {name for name, _ in row.ranking} == {"10", "2"}
    Model.from_pretrained(run / "adapter")


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint_path", "cache_dir", "pretrained", "scriptable", "exportable", "no_jit"),
        *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    ],
)
def test_arguments_of_others_load_no_other_file(name):
    builder.require_architecture_only({"img_size": 32, "depth": 1}, "here")
    with pytest.raises(CheckpointError, match=f"here: found the argument {name}: expected those of an architecture"):
        builder.require_architecture_only({"img_size": 32, name: "x"}, "here")


def test_the_hub_is_asked_for_weights_that_come_from_there(monkeypatch):
    asked = []
    monkeypatch.setattr(builder, "require_hub", lambda repository, _, revision: asked.append((repository, revision)))
    for name, arguments in (
        ("hf-hub:someone/flowers@v2", {}),
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"pretrained_cfg_overlay": {"file": "own.pth"}}),
    ):
        builder._require_weights(name, arguments)
    assert asked == [("someone/flowers", "v2"), ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", None)]


def test_a_revision_of_the_hub_is_no_file():
    assert Recipe(backbone="hf-hub:a/b@main", checkpoint="w.pth").checkpoint == "w.pth"
    with pytest.raises(InsVPError, match="expected a name without @FILE"):
        Recipe(backbone="a@b", checkpoint="w.pth")


# Offline

SLOW = "import socket, time; socket.getaddrinfo = lambda *a, **k: time.sleep(60)"  # a resolver that never answers
TIMED = """
import time
from concurrent.futures import ThreadPoolExecutor
from insvp_fast import InsVPViT
from insvp_fast.training.backbone import load_backbone

def said(call):
    start = time.perf_counter()
    try:
        call()
    except ValueError as error:
        return f"{time.perf_counter() - start} {error}"

calls = (
    lambda: load_backbone("vit_base_patch16_224"),
    lambda: load_backbone("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"),
    lambda: load_backbone("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k@main"),
    lambda: InsVPViT.from_pretrained("someone/flowers"),
)
with ThreadPoolExecutor() as pool:
    for line in pool.map(said, calls):
        print(line)
"""


def offline(code: str, place: Path) -> str:
    """What a process prints that finds no Hub, and a cache of it in ``place``."""
    env = os.environ | {
        "HF_HOME": str(place),
        "TORCH_HOME": str(place),
        "HF_ENDPOINT": "http://hub.invalid",
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Retrying" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("before", ["", SLOW, "import os; os.environ['HF_HUB_OFFLINE'] = '1'"], ids=["", "slow", "off"])
def test_offline_a_missing_backbone_is_said_within_five_seconds(before, tmp_path):
    lines = offline(before + TIMED, tmp_path).splitlines()
    assert len(lines) == 4
    for line in lines:
        seconds, message = line.split(" ", 1)
        assert float(seconds) < 5
        why = "HF_HUB_OFFLINE is set" if "OFFLINE" in before else "http://hub.invalid does not answer within 3 seconds"
        assert f"is not in the cache of the Hub, and {why}" in message


def test_what_is_in_the_cache_needs_no_hub(tmp_path):
    """The cache of the Hub, as it is after a download."""
    repository = tmp_path / "hub" / f"models--timm--{NAME}.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(create_model(NAME).state_dict(), snapshot / "model.safetensors")
    code = f"from insvp_fast.training.backbone import load_backbone; load_backbone('{NAME}'); print('loaded')"
    assert offline(code, tmp_path) == "loaded\n"


def test_another_revision_in_the_cache_does_not_do(tmp_path, monkeypatch):
    asked: list[float] = []
    monkeypatch.setattr(files, "_hub_answers", lambda seconds: asked.append(seconds))
    monkeypatch.setattr(files, "hf_hub_download", lambda place, name, **hub: name)
    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", False)
    repository = tmp_path / "models--someone--flowers"
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").touch()
    files.require_hub("someone/flowers", (".safetensors",), None, tmp_path)
    assert files.find_file("someone/flowers", "model.safetensors", {"cache_dir": tmp_path}) == Path("model.safetensors")
    assert asked == []
    with pytest.raises(CheckpointError, match="someone/flowers is not in the cache of the Hub, and .* not answer"):
        files.require_hub("someone/flowers", (".safetensors",), "v2", tmp_path)
    monkeypatch.setattr(files.constants, "HF_HUB_ETAG_TIMEOUT", 7)
    with pytest.raises(CheckpointError, match="does not answer within 7 seconds"):
        files.find_file("someone/flowers", "model.safetensors", {"cache_dir": tmp_path, "revision": "v2"})
    assert asked == [files.HUB_TIMEOUT, 7]
