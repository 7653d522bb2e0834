"""``insvp bench``, its package and the scripts in benchmarks/ at tiny sizes, and the determinism of a training step."""

import contextlib
import functools
import json
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, parity, results, waterfall
from benchmarks.models import make_model, without_dropout
from insvp_fast import InsVPConfig, InsVPReference
from insvp_fast.bench import models, report
from insvp_fast.bench.floor import BlockProducts, needed_flops, require_known
from insvp_fast.bench.jobs import forward_backward, inference, training_step
from insvp_fast.bench.machine import machine_facts
from insvp_fast.bench.tables import format_products, line
from insvp_fast.bench.timing import compare, median_and_spread, saved_mb_per_image
from insvp_fast.checkpoints.released import to_ours
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
        model = models.make_model(provider, "vit_tiny_patch16_224", InsVPConfig.released(), **TINY)
        step = training_step(model, 3, None)
        torch.manual_seed(5)  # of the dropouts
        return [step()["loss"].item() for _ in range(3)]

    first = losses()
    assert losses() == first
    assert len(set(first)) == 3  # it does train


@pytest.mark.parametrize("provider", ["bare", "insvp_fast"])
def test_a_job_that_runs_again_adds_nothing_to_the_gradients_before(provider):
    model = models.make_model(provider, "vit_tiny_patch16_224", without_dropout(InsVPConfig()), **TINY)
    run = forward_backward(model, 2, None)
    assert model.training == (provider != "bare")  # which trains nothing
    first = {name: value.clone() for name, value in run().items()}
    for name, value in run().items():
        assert relative_error(value, first[name]) < 1e-5, name
    assert inference(model, 2, None)()["logits"].is_inference() and not model.training


def test_the_release_gives_the_gradients_of_the_reference():
    config = without_dropout(InsVPConfig.released(prompt_length=2, specific_kernels=(3, 3, 3)))

    def values(provider):
        model = make_model(provider, BASE, config, depth=1)
        return to_ours(forward_backward(model, 1, None)())

    expected, as_released, frozen = map(values, ("reference", "released", "released frozen"))
    assert frozen.keys() == expected.keys() < as_released.keys()  # these hold the backbone's too
    assert "backbone.blocks.0.mlp.fc1.weight" in as_released
    for key, value in expected.items():
        assert relative_error(as_released[key], value) < 1e-5, key
        assert relative_error(frozen[key], value) < 1e-5, key
    with pytest.raises(ValueError, match="in its own configuration only"):
        make_model("released", BASE, InsVPConfig())


def test_the_release_trains_as_released():
    config = InsVPConfig.released(prompt_length=2, specific_kernels=(3, 3, 3))
    model = make_model("released", BASE, config, depth=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step(model, 1, None)()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"prompts", "meta_net", "meta_net_2", "backbone"}
    assert torch.equal(model.backbone.blocks[0].mlp.fc1.weight, before["backbone.blocks.0.mlp.fc1.weight"])
    assert model.backbone.blocks[0].mlp.fc1.weight.grad is not None  # computed for nothing


def test_parity_sees_a_wrong_value():
    config = without_dropout(InsVPConfig())
    for provider in ("bare", "insvp_fast"):
        values = forward_backward(models.make_model(provider, "vit_tiny_patch16_224", config, **TINY), 2, None)()
        arguments = provider, None, "vit_tiny_patch16_224", 2, config
        assert parity.assert_parity(values, *arguments, **TINY)["error of gradients"] < 1e-5
        name = next(reversed(values))
        with pytest.raises(AssertionError, match="relative error"):
            parity.assert_parity(values | {name: 1.001 * values[name]}, *arguments, **TINY)
        del values[name]
        with pytest.raises(AssertionError, match="lacks"):
            parity.assert_parity(values, *arguments, **TINY)


def test_parity_on_a_gpu_is_judged_by_the_references_own_error(monkeypatch):
    values = {torch.float64: torch.tensor([1.0]), torch.float32: torch.tensor([1.001])}
    monkeypatch.setattr(parity, "expected", lambda kind, dtype, *rest: {"logits": values[dtype]})
    arguments = "insvp_fast", None, BASE, 2, InsVPConfig()
    for device, error, right in (("cuda", 0.0015, True), ("cuda", 0.0025, False), ("cpu", 0.0015, False)):
        monkeypatch.setattr(parity, "DEVICE", torch.device(device))
        with contextlib.nullcontext() if right else pytest.raises(AssertionError, match="logits: relative error"):
            parity.assert_parity({"logits": torch.tensor([1 + error])}, *arguments)


def test_the_authors_code_is_an_import(tmp_path, monkeypatch):
    (tmp_path / "theirs_of_test.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("INSVP_RELEASE_MODEL", "theirs_of_test:make")
    assert make_model("authors", BASE).out_features == 3
    monkeypatch.setenv("INSVP_RELEASE_MODEL", "theirs_of_test")
    with pytest.raises(ValueError, match="INSVP_RELEASE_MODEL=theirs_of_test: expected <module>:<factory>"):
        make_model("authors", BASE)


def test_rows_and_spread():
    assert median_and_spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert median_and_spread([3.0]) == (3.0, 3.0, 3.0)
    rows = compare("training step", "fp32", ["bare", "insvp_fast"], "vit_tiny_patch16_224", 2, 2, **TINY)
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio p20"] <= rows[1]["ratio"] <= rows[1]["ratio p80"]
    for row in compare("inference", "fp32", ["bare", "reference", "insvp_fast"], "vit_tiny_patch16_224", 1, 1, **TINY):
        assert row["error"] < 1e-5
        assert row["provider"] in line(row)


def test_the_floor_is_of_the_best_product_in_the_same_round():
    block = BlockProducts("test_vit", InsVPConfig(prompt_length=3), 2, torch.float32)
    T, D, hidden = 101, 64, 192
    assert block.flops == 2 * 2 * ((T + 3) * 3 * D * D + T * D * D + 2 * T * D * hidden)
    for run in block.runs.values():
        run()
    block.runs = {"slow": None, "fast": None}
    seconds = {"slow": [2.0, 4.0, 6.0], "fast": [1.0, 2.0, 4.0]}
    assert block.rates(seconds) == {"slow": block.flops / 4, "fast": block.flops / 2}
    assert block.floor_ratio([30.0, 40.0, 120.0], 10 * block.flops, seconds) == 3.0  # of 3, 2 and 3


NAMES = "test_vit vit_giant_patch14_dinov2 swin_tiny_patch4_window7_224 beit_base_patch16_224 eva02_tiny_patch14_224"
NAMES += " vit_base_patch16_rope_224"


@pytest.mark.parametrize("name", NAMES.split())
def test_the_bare_backbone_needs_what_pytorch_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).requires_grad_(False)
        image = torch.empty(1, 3, *model.patch_embed.img_size, requires_grad=True)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        y = model(image)
    assert needed_flops("bare", name, InsVPConfig(), False) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    products = backward.get_flop_counts()["Global"][torch.ops.aten.bmm]  # four; the fifth makes the scores again
    total = forward.get_total_flops() + backward.get_total_flops() + products / 4
    assert needed_flops("bare", name, InsVPConfig(), True) == total


def test_prompts_cost_keys_and_values_and_the_last_block_asks_once():
    config = InsVPConfig(global_prompt=False, patch_prompt=False, specific_prompt=False, prompt_length=5)
    (T, D, hidden), L = (101, 64, 192), 5
    forward = [needed_flops(kind, "test_vit", config, False) for kind in ("bare", "reference")]
    depth = len(timm.create_model("test_vit").blocks)
    prompts = depth * L * 2 * D * D + ((depth - 1) * T + 1) * L * 2 * D  # keys and values, scores and sums
    saved = (T - 1) * (2 * D * (D + hidden) + T * 2 * D)
    assert forward[1] - forward[0] == 2 * (prompts - saved)
    whole = InsVPConfig(prompt_length=5)
    model, image = InsVPReference(timm.create_model("test_vit"), None, whole), torch.randn(1, 3, 160, 160)
    with FlopCounterMode(display=False) as counter:
        model.specific_prompt(image, model.image_prompt(image).prompted)
    prompters = needed_flops("reference", "test_vit", whole, False) - forward[1]
    assert 0.7 < prompters / counter.get_total_flops() <= 1  # the reference convolves what pooling does not read


def saved_row(provider, **values):
    row = {"job": "inference", "precision": "fp32", "provider": provider, "model": BASE, "batch": 8, "ratio": 1.0}
    return row | {"images per second": 2.0} | values  # as the oldest files have it, without configuration and spread


@pytest.mark.parametrize(("pool", "saves"), [("token", True), ("avg", False), ("avgmax", False)])
def test_the_last_block_asks_for_all_that_the_head_reads(pool, saves):
    none = {f"{name}_prompt": False for name in ("global", "patch", "common", "specific")}
    config = InsVPConfig(**none, prompt_length=0)
    with torch.device("meta"):
        model = InsVPReference(timm.create_model("test_vit", global_pool=pool), 0, config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, 160, 160, device="meta"))
    needed = needed_flops("reference", "test_vit", config, False, global_pool=pool)
    T, D, hidden = 101, 64, 192
    saved = 2 * (T - 1) * (2 * D * (D + hidden) + T * 2 * D) if saves else 0
    assert needed == counter.get_total_flops() - saved


def test_a_pooling_whose_operations_are_not_known_is_refused():
    with pytest.raises(ValueError, match="pooling whose operations are known, found AttentionPoolLatent"):
        require_known(timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="map"))


def test_results_are_merged(tmp_path, monkeypatch):
    row, mine = saved_row("bare"), saved_row("insvp_fast", config="paper", ratio=0.5)
    monkeypatch.setattr(results, "date", SimpleNamespace(today=lambda: date(2026, 1, 31)))
    path = results.save([mine, row], folder=tmp_path)
    monkeypatch.undo()
    results.save([saved_row("insvp_fast", ratio=0.5, **{"images per second": 4.0})], folder=tmp_path)  # "paper" as well
    results.save([mine], "waterfall", tmp_path)
    saved = json.loads(path.read_text())
    assert [(row["provider"], row["images per second"]) for row in saved["rows"]] == [
        ("insvp_fast", 4.0),
        ("bare", 2.0),
    ]
    assert [row["date"] for row in saved["rows"]] == [saved["machine"]["date"], "2026-01-31"]
    assert saved["waterfall"][0].items() >= mine.items()
    assert saved["machine"]["torch"] == torch.__version__
    assert path.name.endswith(f"torch{torch.__version__}.json")


@pytest.fixture
def pages(tmp_path):
    """A README and a page on performance with nothing but old tables."""
    files = tmp_path / "README.md", tmp_path / "performance.md"
    for file in files:
        file.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    return files


def write_results(folder, instructions, torch_version, rows, day=None, **sections):
    machine = {"device": f"CPU, {instructions}", "instructions": instructions, "torch": torch_version}
    machine |= {"date": day} if day else {}
    path = folder / f"{instructions}-{torch_version}.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows, **sections}))


def test_tables_stand_between_the_markers(tmp_path, pages):
    mine = saved_row("insvp_fast", ratio=0.5, **{"images per second": 4.0, "ratio p20": 0.4, "ratio p80": 0.6})
    fall = {"technique": "exact savings", "seconds": 1.0, "saved MB per image": 3.0}
    fall = mine | fall | {"error of logits": 1e-6, "error of gradients": 2e-6}
    steps = [fall, fall | {"technique": "more", "ratio": 0.25, "peak MB": 9.0}]
    write_results(tmp_path, "AVX512-BF16", "2.15.0", [mine, saved_row("bare")], waterfall=steps)
    write_results(tmp_path, "AVX2", "2.15.0", [saved_row("bare", **{"images per second": 1.0})])
    write_results(tmp_path, "AVX512-AMX", "2.14.0", [saved_row(name, batch=1) for name in ("bare", "insvp_fast")])
    for _ in range(2):
        results.write_tables(tmp_path, *pages)
    short, full = (page.read_text() for page in pages)
    for text in (short, full):
        assert text.startswith("before\n<!-- results -->\n")
        assert text.endswith("\n<!-- end of results -->\nafter\n")
        assert "old" not in text
    title = "CPU, AVX512-BF16, torch 2.15.0"
    assert f"| {title} | inference | fp32 | 8 | 2.00 images/s | 4.00 images/s | 0.50 (0.40-0.60) |  |" in short
    assert short.index("| CPU, AVX512-AMX, torch 2.14.0 |") < short.index(f"| {title} |")
    assert "AVX2" not in short and short.count("| inference | fp32 | 1 |") == 1
    assert "| bare timm model | 1.00 | 1.00 |" in full  # the other machine's
    assert full.index("| bare timm model | 2.00 | 1.00 |") < full.index("| InsVPViT | 4.00 | 0.50 (0.40-0.60) |")
    cells = "1.0000 | 0.50 | 0.25 (0.40-0.60) | 3 MB, peak 9 MB | 1e-06, 2e-06 |"
    assert f"| more | {BASE}, inference, fp32, batch 8 | {cells}" in full


def test_the_short_table_is_of_the_last_measurement_and_the_largest_batch(tmp_path, pages):
    for version, day, speed in (("2.9.0", None, 1.0), ("2.15.0", "2026-11-01", 3.0), ("2.14.0", "2026-10-31", 2.0)):
        rows = [
            saved_row(name, batch=n, **{"images per second": speed * n})
            for n in (8, 4)
            for name in ("bare", "insvp_fast")
        ]
        others = [saved_row("bare", batch=64), saved_row("insvp_fast", batch=16, config="released")]
        write_results(tmp_path, "AVX512-BF16", version, rows + others, day)
    results.write_tables(tmp_path, *pages)
    lines = pages[0].read_text().splitlines()
    assert lines[2:-2] == [
        f"|  | {BASE} | precision | batch | bare timm ViT | InsVPViT | time ratio | floor ratio |",
        "|---|---|---|---|---|---|---|---|",
        "| CPU, AVX512-BF16, torch 2.15.0 | inference | fp32 | 8 | 24.00 images/s | 24.00 images/s | 1.00 |  |",
    ]


def test_the_short_table_shows_latency_and_what_was_compared_with_the_floor(tmp_path, pages):
    floor = {"floor ratio": 1.234, "products": {"F.linear": 202e9, "native library": 216e9}}
    rows = [saved_row(name, batch=n) | floor for name in ("bare", "insvp_fast") for n in (8, 1)]
    rows[-1].pop("floor ratio"), rows[-1].pop("products")  # of an image by itself, as measured long ago
    write_results(tmp_path, "AVX512-BF16", "2.15.0", rows)
    results.write_tables(tmp_path, *pages)
    short, full = (page.read_text().splitlines()[4:-2] for page in pages)
    assert short == [
        "| CPU, AVX512-BF16, torch 2.15.0 | inference | fp32 | 8 | 2.00 images/s | 2.00 images/s | 1.00 | 1.23 |",
        "|  | inference | fp32 | 1 | 2.00 images/s | 2.00 images/s | 1.00 |  |",
    ]
    assert f"| {BASE}, inference | fp32 | 8 | InsVPViT | 2.00 | 1.00 | 1.23 |  |  |" in full
    rates = "F.linear 202, native library 216"
    assert full[-1] == f"products in fp32, batch 8, GFLOP/s: {rates}; products in fp32, batch 1, GFLOP/s: {rates}"


def test_rates_of_products_are_the_lowest_and_the_highest_of_all_rows():
    rates = ({"F.linear": 202e9, "native library": 7.6e9}, {"F.linear": 99e9}, {"F.linear": 1000e9, "tiles": 8.2e9})
    text = format_products([saved_row("bare", products=products) for products in rates])
    assert text == "products in fp32, batch 8, GFLOP/s: F.linear 99-1000, native library 8, tiles 8"


def test_tables_want_markers_and_a_machine_to_show(tmp_path, pages):
    write_results(tmp_path, "AVX2", "2.15.0", [saved_row("bare")])
    with pytest.raises(ValueError, match="AVX512-BF16"):
        results.write_tables(tmp_path, *pages)
    write_results(tmp_path, "AVX512-BF16", "2.15.0", [saved_row("bare")])
    for text in ("no markers", "<!-- results -->\nno end"):
        pages[1].write_text(text)
        with pytest.raises(ValueError, match=r"performance.md has no lines `<!-- results -->`"):
            results.write_tables(tmp_path, *pages)


def test_the_published_tables_are_those_of_the_saved_results(tmp_path):
    copies = [tmp_path / page.name for page in (results.README, results.PERFORMANCE)]
    for copy, page in zip(copies, (results.README, results.PERFORMANCE), strict=True):
        copy.write_text(page.read_text())
    results.write_tables(results.FOLDER, *copies)
    for copy, page in zip(copies, (results.README, results.PERFORMANCE), strict=True):
        assert copy.read_text() == page.read_text(), f"run `python -m benchmarks.results` to bring {page} up to date"


def test_the_waterfall_leaves_out_what_it_cannot_switch():
    rows = waterfall.techniques()
    assert rows[0].title == "release, as released"
    assert len({row.title for row in rows}) == len(rows) >= 6
    assert any(row.graph for row in rows) == (DEVICE.type == "cuda")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rows 99", "invalid choice: 99"),
        ("--rows -1", "invalid choice: -1"),
        ("--rounds 0", "--rounds: 0: expected at least 1"),
        ("--batch 0", "--batch: 0: expected at least 1"),
        ("--depth 0", "--depth: 0: expected at least 1"),
        ("--model vit_none", "--model is vit_none: timm has no such model"),
        ("--depth 1 --save", "--save --depth: expected the whole backbone"),
    ],
)
def test_arguments_of_the_waterfall_are_checked_first(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["waterfall", *arguments.split()])
    with pytest.raises(SystemExit):
        waterfall.main()
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_of_the_waterfall():
    command = [sys.executable, "-m", "benchmarks.waterfall", "--model", "vit_tiny_patch16_224", "--depth", "1"]
    command += ["--batch", "1", "--rounds", "1", "--rows", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


def test_the_gpu_script_keeps_what_it_has_measured_and_says_what_is_faster():
    def rows():
        row = {"operation": "attention", "batch": 64, "direction": "backward"}
        yield row | {"by": "sdpa", "us": 1600.0}
        yield row | {"by": "triton", "us": 744.0}
        yield {"operation": "another", "by": "triton", "us": 1.0}
        raise RuntimeError("broken")

    section, written = {"rows": []}, []
    gpu.measure(rows(), section, time.monotonic() + 60, lambda: written.append(len(section["rows"])))
    assert written == [1, 2, 3, 3] and "broken" in section["failed"]
    assert section["decisions"] == ["attention, batch 64, backward: triton, 0.744 ms against 1.6 (sdpa)"]
    late = {"rows": []}
    gpu.measure(rows(), late, time.monotonic() - 1, lambda: None)
    assert late["rows"] == [] and "no time left" in late["left out"]


def test_the_command_writes_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "compare", functools.partial(compare, **TINY))
    file = tmp_path / "to" / "report.md"
    arguments = ["--report", str(file), "--model", "vit_tiny_patch16_224", "--batch-size", "1", "--rounds", "2"]
    assert cli.main(["bench", *arguments]) == 0
    text = file.read_text()
    assert torch.__version__ in text and machine_facts()["device"] in text
    assert "| InsVPViT |" in text
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "ratio" in capsys.readouterr().out


def test_the_command_refuses_no_rounds(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--rounds", "0"])
    assert stop.value.code == 2
    assert "argument --rounds: 0: expected at least 1" in capsys.readouterr().err


def test_the_command_refuses_a_model_with_prompts_in_one_sentence(capsys):
    with warnings.catch_warnings(action="error"):
        assert cli.main(["bench", "--model", "insvp_vit_shapes_32"]) == 1
    expected = "expected a VisionTransformer, SwinTransformer, Beit or Eva of timm, found InsVPViT"
    assert capsys.readouterr().err == f"insvp: error: --model is insvp_vit_shapes_32: {expected}\n"


def test_double_precision_is_the_measure():
    exact = parity.expected("bare", torch.float64, None, "test_vit", 3, InsVPConfig())
    model = models.make_model("bare", "test_vit")
    image, _ = models.make_images(model, 3)
    assert relative_error(model(image), exact["logits"]) < 1e-6
    assert exact["image"].shape == image.shape


def test_what_reads_the_prompted_image_needs_the_gradient_of_its_input():
    def needed(specific_input, backward):
        config = InsVPConfig(prompt_length=5, specific_input=specific_input)
        return needed_flops("reference", "test_vit", config, backward)

    specific = InsVPReference(timm.create_model("test_vit"), None, InsVPConfig(prompt_length=5)).specific_prompter
    input_gradient = 2 * specific.conv1.weight.numel() * (3 * specific.grid + 4) ** 2
    assert needed("prompted", False) == needed("image", False)
    assert needed("prompted", True) - needed("image", True) == pytest.approx(input_gradient)


def test_the_bare_backbone_saves_what_the_gradient_of_its_image_needs():
    saved = saved_mb_per_image("bare", models.make_model("bare", "test_vit"), 2, None)
    depth, rows, width = len(timm.create_model("test_vit").blocks), 101, 64
    assert saved > depth * rows * width * 4 / 1e6
