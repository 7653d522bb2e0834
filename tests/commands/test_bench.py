"""The benchmarks work: tiny, each once. That seeds decide the bits of a training is told here too."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results, steps, waterfall
from insvp_fast import InsVPConfig, bench
from insvp_fast.commands import cli
from insvp_fast.testing import DEVICE, relative_error

ROOT = Path(__file__).parents[2]

BASE = "vit_base_patch16_224"
TINY = {"img_size": 32, "depth": 2}


@pytest.mark.slow
def test_every_benchmark_runs():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.parametrize("provider", ["reference", "insvp_fast"])
def test_the_same_seed_gives_the_same_bits(provider):
    def losses():
        model = bench.make_model(provider, "vit_tiny_patch16_224", InsVPConfig.released(), **TINY)
        step = bench.training_step(model, 3, None)
        torch.manual_seed(5)  # of the dropouts
        return [step()["loss"].item() for _ in range(3)]

    first = losses()
    assert losses() == first
    assert len(set(first)) == 3  # it does train


def test_the_release_gives_the_gradients_of_the_reference():
    config = steps.without_dropout(InsVPConfig.released(prompt_length=2, specific_kernels=(3, 3, 3)))

    def values(provider):
        model = steps.make_model(provider, BASE, config, depth=1)
        return {steps.to_ours(key): value for key, value in bench.forward_backward(model, 1, None)().items()}

    expected, as_released, frozen = map(values, ("reference", "released", "released frozen"))
    assert frozen.keys() == expected.keys() < as_released.keys()  # these hold the backbone's too
    assert "backbone.blocks.0.mlp.fc1.weight" in as_released
    for key, value in expected.items():
        assert relative_error(as_released[key], value) < 1e-5, key
        assert relative_error(frozen[key], value) < 1e-5, key
    with pytest.raises(ValueError, match="in its own configuration only"):
        steps.make_model("released", BASE, InsVPConfig())


def test_the_release_trains_as_released():
    config = InsVPConfig.released(prompt_length=2, specific_kernels=(3, 3, 3))
    model = steps.make_model("released", BASE, config, depth=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench.training_step(model, 1, None)()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"prompts", "meta_net", "meta_net_2", "backbone"}
    assert torch.equal(model.backbone.blocks[0].mlp.fc1.weight, before["backbone.blocks.0.mlp.fc1.weight"])
    assert model.backbone.blocks[0].mlp.fc1.weight.grad is not None  # computed for nothing


def test_parity_sees_a_wrong_value():
    config = steps.without_dropout(InsVPConfig())
    for provider in ("bare", "insvp_fast"):
        values = bench.forward_backward(bench.make_model(provider, "vit_tiny_patch16_224", config, **TINY), 2, None)()
        arguments = provider, None, "vit_tiny_patch16_224", 2, config
        assert steps.assert_parity(values, *arguments, **TINY)["error of gradients"] < 1e-5
        name = next(reversed(values))
        with pytest.raises(AssertionError, match="relative error"):
            steps.assert_parity(values | {name: 1.001 * values[name]}, *arguments, **TINY)
        del values[name]
        with pytest.raises(AssertionError, match="lacks"):
            steps.assert_parity(values, *arguments, **TINY)


def test_the_authors_code_is_an_import(tmp_path, monkeypatch):
    (tmp_path / "theirs_of_test.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    monkeypatch.setenv("INSVP_RELEASE_REPO", f"{tmp_path}:theirs_of_test:make")
    assert steps.make_model("authors", BASE).out_features == 3
    monkeypatch.setenv("INSVP_RELEASE_REPO", str(tmp_path))
    with pytest.raises(ValueError, match="expected <checkout>:<module>:<factory>"):
        steps.make_model("authors", BASE)


def test_rows_and_spread():
    assert bench.spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    rows = bench.compare("training step", "fp32", ["bare", "insvp_fast"], "vit_tiny_patch16_224", 2, 2, **TINY)
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio p20"] <= rows[1]["ratio"] <= rows[1]["ratio p80"]
    for row in bench.compare(
        "inference", "fp32", ["bare", "reference", "insvp_fast"], "vit_tiny_patch16_224", 1, 1, **TINY
    ):
        assert row["error"] < 1e-5
        assert row["provider"] in bench.line(row)


def test_results_are_merged_and_shown(tmp_path):
    row = {"job": "inference", "precision": "fp32", "provider": "bare", "model": BASE, "batch": 8, "ratio": 1.0}
    row |= {"images per second": 2.0}  # as older files have it, without configuration and spread
    mine = row | {"provider": "insvp_fast", "config": "paper", "ratio": 0.5, "ratio p20": 0.4, "ratio p80": 0.6}
    path = results.save([mine, row], folder=tmp_path)
    results.save([mine | {"images per second": 4.0}], folder=tmp_path)
    fall = {"technique": "exact savings", "seconds": 1.0, "saved MB per image": 3.0}
    fall |= {"error of logits": 1e-6, "error of gradients": 2e-6}
    results.save([mine | fall, mine | fall | {"technique": "more", "ratio": 0.25}], "waterfall", tmp_path)
    saved = json.loads(path.read_text())
    assert [(row["provider"], row["images per second"]) for row in saved["rows"]] == [
        ("insvp_fast", 4.0),
        ("bare", 2.0),
    ]
    assert saved["machine"]["torch"] == torch.__version__
    assert path.name.endswith(f"torch{torch.__version__}.json")

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    for _ in range(2):
        results.write_readme(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in text
    assert text.index("| bare timm ViT | 2.00 | 1.00 |") < text.index("| InsVPViT | 4.00 | 0.50 (0.40-0.60) |")
    assert f"| more | {BASE}, inference, fp32, batch 8 | 1.0000 | 0.50 | 0.25" in text


def test_the_waterfall_leaves_out_what_it_cannot_switch():
    rows = waterfall.techniques()
    assert rows[0].title == "release, as released"
    assert len({row.title for row in rows}) == len(rows) >= 6
    assert any(row.graph for row in rows) == (DEVICE.type == "cuda")


@pytest.mark.slow
def test_a_row_of_the_waterfall():
    command = [sys.executable, "-m", "benchmarks.waterfall", "--depth", "1", "--batch", "1", "--rounds", "1"]
    done = subprocess.run([*command, "--rows", "3", "4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| exact savings |") == (2 if DEVICE.type == "cpu" else 0)


@pytest.mark.slow
def test_the_gpu_script_reports_a_failing_section(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", file, "--sections", "graphs", "sdpa"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert ("failed" in found["graphs"]) == (DEVICE.type == "cpu")
    assert len(found["sdpa"]["rows"]) >= 2


def test_the_command_writes_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "compare", functools.partial(bench.compare, **TINY))
    file = tmp_path / "to" / "report.md"
    line = ["--report", str(file), "--model", "vit_tiny_patch16_224", "--batch-size", "1", "--rounds", "2"]
    assert cli.main(["bench", *line]) == 0
    text = file.read_text()
    assert torch.__version__ in text and bench.machine()["device"] in text
    assert "| InsVPViT |" in text
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "ratio" in capsys.readouterr().out


def test_the_command_refuses_no_rounds(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--rounds", "0"])
    assert stop.value.code == 2
    assert "argument --rounds: 0: expected at least 1" in capsys.readouterr().err


def test_double_precision_is_the_measure():
    exact = steps.expected("bare", torch.float64, None, "test_vit", 3, InsVPConfig())
    model = bench.make_model("bare", "test_vit")
    image, _ = bench.make_images(model, 3)
    assert relative_error(model(image), exact["logits"]) < 1e-6
    assert exact["image"].shape == image.shape
