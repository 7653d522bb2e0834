"""``insvp doctor``."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from insvp_fast import InsVPConfig
from insvp_fast.bench import timing
from insvp_fast.commands import cli, diagnostics, doctor
from insvp_fast.runtime import native
from insvp_fast.training.recipe import BUILTIN_BACKBONE
from tests.commands.finished_run import finish


def test_doctor_shows_the_environment(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("torch ", torch.__version__, "native CPU library", "CPU products", "attention", "accelerate"):
        assert text in printed


def test_doctor_times_products(monkeypatch, capsys):
    alternate = timing.alternate
    monkeypatch.setattr(timing, "alternate", lambda runs, rounds: alternate(runs, 1))
    assert cli.main(["doctor", "--products"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"products in fp32 +F\.linear \d+.* GFLOP/s\nproducts in bf16 +\S.* \d+.* GFLOP/s\n", printed)


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
    versions = dict.fromkeys((*doctor.REQUIRED, *doctor.FOR_TRAINING), "1") | {
        "torch": torch_version,
        "torchvision": vision,
    }
    found = list(doctor._package_warnings(versions))
    assert len(found) == warned
    assert not warned or "operator torchvision::nms" in found[0]


def test_doctor_warns_of_a_gpu_that_is_not_used(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    versions = dict.fromkeys((*doctor.REQUIRED, *doctor.FOR_TRAINING), "1") | {
        "torch": "2.15.0+cpu",
        "torchvision": "0.30.0+cpu",
    }
    assert any("torch is built for CPUs" in text for text in doctor._package_warnings(versions))


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
    assert not any("normalized" in text for text in diagnostics.adapter_warnings(right))
    assert any(
        "vit_shapes_32 were trained with mean 0.5" in text
        for text in diagnostics.adapter_warnings(wrong_here, BUILTIN_BACKBONE)
    )


@pytest.mark.parametrize("command", [["info"], ["doctor", "--adapter"]], ids=["info", "doctor"])
def test_no_value_of_an_adapter_is_a_traceback(command, run, tmp_path, capsys):
    adapter, refused = rewritten(run, tmp_path / "adapter"), 0
    original = json.loads((adapter / "adapter_config.json").read_text())
    for key in original:
        for value in (None, 5, "x", [1], [], {"name": 5, "mean": 5}, {}):
            (adapter / "adapter_config.json").write_text(json.dumps(original | {key: value}))
            failed = cli.main([*command, str(adapter)])
            assert (f"{adapter / 'adapter_config.json'}: " in capsys.readouterr().err) == bool(failed)
            refused += failed
    assert refused


def test_doctor_warns_of_augreg_weights_around_a_released_adapter(run, tmp_path):
    released = InsVPConfig.released().to_dict()
    for tag, warned in (("augreg_in21k", True), ("orig_in21k", False)):
        name = {"name": f"hf-hub:timm/vit_base_patch16_224.{tag}"}
        adapter = rewritten(run, tmp_path / tag, backbone=name, insvp=released)
        assert any("orig_in21k; with the others" in text for text in diagnostics.adapter_warnings(adapter)) == warned


def test_doctor_tells_a_specific_prompter_that_was_never_trained(run, tmp_path):
    untrained = rewritten(run, tmp_path / "untrained")
    assert any("looks untrained" in text for text in diagnostics.adapter_warnings(untrained))
    tensors = load_file(untrained / "adapter_model.safetensors")
    tensors["specific_prompter.conv2.weight"] += 0.05 * torch.randn_like(tensors["specific_prompter.conv2.weight"])
    trained = rewritten(run, tmp_path / "trained")
    (trained / "adapter_model.safetensors").unlink()
    save_file(tensors, trained / "adapter_model.safetensors")
    assert not any("looks untrained" in text for text in diagnostics.adapter_warnings(trained))


def test_doctor_says_that_a_run_is_not_finished(run, tmp_path):
    def told() -> bool:
        return f"not finished: `insvp train --resume {tmp_path}`" in " ".join(diagnostics.run_warnings(tmp_path))

    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert told()
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert not told()


def test_doctor_warns_of_a_run_that_waits_for_its_data(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    for share, warned in ((0.6, True), (0.1, False)):
        finish(tmp_path, 0.5, data_wait=share)
        assert any("waiting for images" in text for text in diagnostics.run_warnings(tmp_path)) == warned
