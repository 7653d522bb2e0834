"""What the figures of ``insvp bench`` and of benchmarks/ stand for: operations, seconds, bytes and errors."""

import json
import math
from datetime import date
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn import functional

from benchmarks import bench_gelu, bench_norm_insert, bench_superpose, results
from benchmarks.operations import DTYPES, evaluate
from insvp_fast import InsVPConfig
from insvp_fast.bench import floor, models, tables, timing
from insvp_fast.bench.floor import BlockProducts, needed_flops
from insvp_fast.bench.jobs import AUTOCAST_DTYPES
from insvp_fast.runtime import products
from insvp_fast.testing import DEVICE, relative_error, saved_bytes
from tools import speed

TINY, CUT = "vit_tiny_patch16_224", {"img_size": 32, "depth": 1}


def vit_multiplications(model, L, asked):
    """Those of the frozen products and of attention, block by block; ``asked``: the tokens that the head reads."""
    D, hidden, N = model.embed_dim, model.blocks[0].mlp.fc1.out_features, model.patch_embed.num_patches
    T = N + model.num_prefix_tokens
    frozen, attention = N * 3 * math.prod(model.patch_embed.patch_size) * D, 0
    for j in range(len(model.blocks)):
        queries = asked if j == len(model.blocks) - 1 else T
        frozen += 2 * queries * D * D + 2 * (T + L) * D * D  # queries and projection, keys and values
        frozen += 2 * queries * D * hidden
        attention += 2 * queries * (T + L) * D  # scores, and the sum of the values
    return frozen, attention


def swin_multiplications(model, L):
    frozen, attention = 56 * 56 * 3 * 4 * 4 * model.embed_dim, 0
    for i, stage in enumerate(model.layers):
        T, D = (56 // 2**i) ** 2, model.embed_dim * 2**i
        frozen += T * 2 * D * D if i else 0  # four tokens of half the width become one
        for _ in stage.blocks:
            frozen += 3 * (T * D * D) + 2 * L * D * D + T * D * D + 2 * T * D * 4 * D
            attention += 2 * T * (49 + L) * D
    return frozen, attention


def prompter_multiplications(config, side, patch, grid, widths):
    """Forward and backward; ``widths``: the channels of the tokens, of each last convolution."""
    c, R, L, N = config.global_hidden, config.patch_hidden, config.prompt_length, (side // patch) ** 2
    g1, g2 = (side**2 * 3 * c * k * k for k in config.global_kernels)
    p = N * 3 * patch**2 * R
    map1, base = 3 * grid + 4, min(widths)
    s1, s2 = L * 3 * config.specific_kernels[0] ** 2, base * L * L * config.specific_kernels[1] ** 2
    s3 = sum(base * L * width * L for width in widths) * config.specific_kernels[2] ** 2
    pooled = side // map1 * map1
    forward = g1 + g2 + 2 * p + pooled**2 * s1 + (3 * grid) ** 2 * s2 + grid**2 * s3
    reads = 2 if config.specific_input == "prompted" else 1  # of the image nobody asks for a gradient
    backward = g1 + 2 * g2 + p + 2 * p + reads * map1**2 * s1 + 2 * grid**2 * (s2 + s3)
    return forward, backward


@pytest.mark.parametrize(
    "config", [InsVPConfig(), InsVPConfig.released(carry_prompts=False)], ids=["paper", "released"]
)
@pytest.mark.parametrize(
    ("name", "asked", "kwargs", "geometry"),
    [
        ("vit_base_patch16_224", 1, {}, (224, 16, 16, [3])),
        ("deit_base_distilled_patch16_224", 2, {}, (224, 16, 16, [3])),
        ("vit_base_patch16_224", 197, {"global_pool": "avg"}, (224, 16, 16, [3])),
        ("vit_small_patch14_reg4_dinov2", 1, {"img_size": 224, "depth": 2}, (224, 14, 8, [6])),
        ("swin_base_patch4_window7_224", None, {}, (224, 4, 8, [2, 4, 8, 16])),
        ("beit_base_patch16_224", 197, {}, (224, 16, 16, [3])),
    ],
)
def test_insvp_needs_what_its_equations_say(name, asked, kwargs, geometry, config):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    L = config.prompt_length
    frozen, attention = swin_multiplications(model, L) if asked is None else vit_multiplications(model, L, asked)
    forward, backward = prompter_multiplications(config, *geometry)
    inference = 2 * (frozen + attention + forward)
    assert needed_flops("reference", name, config, False, **kwargs) == inference
    step = inference + 2 * (frozen + 2.5 * attention + backward)
    assert needed_flops("reference", name, config, True, **kwargs) == step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_of_a_block_are_made_by_all_that_can(dtype, monkeypatch):
    block = BlockProducts("swin_tiny_patch4_window7_224", InsVPConfig(prompt_length=3), 2, dtype)
    T, D = 14 * 14, 384  # the stage with the most blocks
    repeats = 10 if DEVICE.type == "cuda" else 1
    assert block.flops == repeats * 2 * 2 * ((T + 3) * 3 * D * D + T * D * D + 2 * T * D * 4 * D)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(floor.hardware, "has_products", lambda dtype: True)
        monkeypatch.setattr(products, "onednn_works", lambda dtype: True)
        monkeypatch.setattr(floor.native, "available", lambda dtype: True)
        assert floor._providers(dtype) == ["plain", "onednn", "native"]
        monkeypatch.setattr(products, "onednn_works", lambda dtype: False)
        assert floor._providers(dtype) == ["plain", "native"]
        monkeypatch.setattr(floor.native, "available", lambda dtype: False)
        assert floor._providers(dtype) == ["plain"]
        monkeypatch.setattr(floor.hardware, "has_products", lambda dtype: False)
        monkeypatch.setattr(products, "cpu_provider", lambda dtype: "widened")
        assert floor._providers(dtype) == ["widened"]


def test_a_product_is_made_by_what_its_name_says():
    x, layer = torch.randn(4, 64).bfloat16(), products.FrozenLinear(torch.randn(32, 64).bfloat16())
    made = {"plain": functional.linear, "widened": products.linear}
    made |= {"onednn": floor.torch_private.packed_linear} if products.onednn_works(x.dtype) else {}
    made |= {"native": floor.native.linear} if floor.native.available(x.dtype) else {}
    for how, function in made.items():
        product = floor._product(x, layer, how)
        assert product.func is function
        assert relative_error(product(), x.double() @ layer.weight.double().T) < 1e-2
    called: list[bool] = []
    floor._multiply([lambda: called.append(torch.is_inference_mode_enabled())] * 2)
    assert called == [True, True]


@pytest.mark.parametrize("part", ["patch_embed", "attn", "mlp", "block"])
def test_a_part_whose_operations_are_not_known_is_refused(part):
    with torch.device("meta"):
        model = timm.create_model(TINY, **CUT)
    floor.require_known(model)
    if part == "block":
        model.blocks.append(torch.nn.Identity())
    else:
        setattr(model if part == "patch_embed" else model.blocks[0], part, torch.nn.Identity())
    with pytest.raises(ValueError, match="whose operations are known, found Identity"):
        floor.require_known(model)


def test_runs_alternate_and_the_rounds_before_are_not_timed(monkeypatch):
    now, order = [0.0], []

    def run(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds.pop(0)

        return call

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    runs = {"a": run("a", [9.0, 5.0, 1.0, 2.0]), "b": run("b", [9.0, 5.0, 3.0, 4.0])}
    assert timing.alternate(runs, 2, warmup=20) == {
        "a": [1.0, 2.0],
        "b": [3.0, 4.0],
    }  # after 18 seconds, one more round
    assert order == ["a", "b"] * 4


@pytest.fixture
def rows_of(monkeypatch):
    """Rows of ``compare`` as if the bare model took 2, 8 and 4 seconds, and the other half, half and twice of that."""
    seconds = {"bare": [2.0, 8.0, 4.0], "other": [1.0, 4.0, 8.0]}
    built = []

    def rows(job, precision, other="insvp_fast", make=models.make_model, config="paper"):
        def alternate(runs, rounds):
            for name in (*runs, other):
                runs[name]()
            return {name: seconds["bare" if name == "bare" else "other"][:rounds] for name in runs}

        def products(*arguments, **kwargs):
            assert arguments[3] == (AUTOCAST_DTYPES[precision] or torch.float32)  # the floor is of the same precision
            built.append(BlockProducts(*arguments, **kwargs))
            return built[-1]

        monkeypatch.setattr(timing, "alternate", alternate)
        monkeypatch.setattr(timing, "BlockProducts", products)
        found = timing.compare(job, precision, ["bare", other], TINY, 4, 3, config, make=make, **CUT)
        return found, built[-1], seconds["other"]

    return rows


@pytest.mark.parametrize("job", ["inference", "training step"])
@pytest.mark.parametrize("kind", ["bare", "insvp_fast"])
def test_a_row_is_of_medians(rows_of, job, kind):
    rows, block, each = rows_of(job, "fp32")
    row = rows[kind == "insvp_fast"]
    assert (row["provider"], row["batch"], row["seconds"]) == (kind, 4, 4.0)
    assert row["images per second"] == 1.0
    ratio = 1.0 if kind == "bare" else 0.5  # the median of the ratios, and not the ratio of the medians
    assert row["ratio"] == ratio
    flops = 4 * needed_flops(kind, TINY, InsVPConfig(), job != "inference", **CUT)
    mine = [2.0, 8.0, 4.0] if kind == "bare" else each
    found = sorted(own * block.flops / (flops * product) for own, product in zip(mine, each, strict=True))[1]
    assert row["floor ratio"] == pytest.approx(found)
    assert row["products"] == dict.fromkeys(block.runs, block.flops / 4)


@pytest.mark.parametrize("provider", ["bare", "insvp_fast"])
def test_saved_bytes_are_of_one_image_in_the_precision_of_the_step(rows_of, provider):
    model = models.make_model(provider, TINY, InsVPConfig(), **CUT)
    for precision, amp in (("fp32", None), ("bf16", torch.bfloat16)):
        row = rows_of("training step", precision)[0][provider == "insvp_fast"]
        images, _ = models.make_images(model, 4)
        saved = saved_bytes(model.train(provider != "bare"), images.requires_grad_(provider == "bare"), amp)
        assert row["saved MB per image"] == pytest.approx(saved / 4 / 1e6)


@pytest.mark.parametrize("provider", ["bare", "insvp_fast"])
def test_the_error_is_of_the_timed_logits_in_the_precision_of_the_job(rows_of, provider):
    def scaled(kind, *arguments, **kwargs):
        model = models.make_model(kind, *arguments, **kwargs)
        with torch.no_grad():
            for parameter in model.get_classifier().parameters():
                parameter.mul_(1.25)
        return model

    place = provider == "insvp_fast"
    assert rows_of("inference", "fp32", make=scaled)[0][place]["error"] == pytest.approx(0.25, rel=1e-4)
    assert 1e-4 < rows_of("inference", "bf16")[0][place]["error"] < 5e-2


def test_weights_of_another_model_have_no_error(rows_of):
    def make(provider, *arguments, **kwargs):
        return models.make_model("reference" if provider == "authors" else provider, *arguments, **kwargs)

    bare, authors = rows_of("inference", "fp32", "authors", make)[0]
    assert "error" in bare and "error" not in authors
    assert "saved MB per image" in rows_of("training step", "fp32", "authors", make)[0][1]


def test_a_compiled_model_is_measured_as_its_kind(rows_of):
    def make(provider, *arguments, **kwargs):
        return models.make_model(provider.removesuffix(" compiled"), *arguments, **kwargs)

    bare, compiled = rows_of("inference", "fp32", "bare compiled", make, "released")[0]
    assert compiled["error"] < 1e-5 and bare["config"] == compiled["config"] == "released"


def test_the_bare_backbone_is_frozen_and_evaluated_and_images_are_random():
    first, second = (models.make_model("insvp_fast", TINY, **CUT).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    bare = models.make_model("bare", TINY, drop_rate=0.5, **CUT)
    assert not bare.training and not any(p.requires_grad for p in bare.parameters())
    images, targets = models.make_images(bare, 8)
    assert images.std() == pytest.approx(1, abs=0.1) and len(set(targets.tolist())) > 1
    inference = models.make_model("insvp_fast", TINY, **CUT).train()
    timing.JOBS["inference"](inference, 1, None)
    assert not inference.training


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["norm_insert", "gelu", "superpose"])
def test_an_operation_is_timed_by_the_bytes_that_it_cannot_do_without(name, precision):
    dtype = DTYPES[precision]
    make = {
        "norm_insert": lambda: bench_norm_insert.operation(2, dtype.itemsize, folded=True),
        "gelu": lambda: bench_gelu.operation(64, dtype.itemsize),
        "superpose": lambda: bench_superpose.operation(8, dtype.itemsize, autocast=True),
    }
    operation = make[name]()
    operands, saved = list(operation.make(dtype)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = operation.fast(*operands)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    grads = [torch.randn_like(y) for y in results]
    made = torch.autograd.grad(results, [t for t in operands if t.requires_grad], grads, retain_graph=True)
    kept = [t for t in saved if name != "superpose" or t.data_ptr() == operands[0].data_ptr()]  # else its weights
    forward, both = operation.nbytes
    # the weights of the patch prompter and the factor of each row are a hundredth
    assert forward == pytest.approx(stored([*operands, *results]), rel=2e-2)
    assert both - forward == pytest.approx(stored(grads) + stored(kept) + stored(made), rel=3e-2)
    assert len(evaluate(operation.plain, operands)) == len(results)


def stored(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def row(**values):
    found = {"job": "inference", "precision": "fp32", "provider": "bare", "model": TINY, "batch": 8, "config": "paper"}
    return found | {"ratio": 1.0, "images per second": 2.0, "seconds": 4.0} | values


def test_rows_of_a_file_keep_the_day_and_the_threads_that_were_the_files(tmp_path, monkeypatch):
    facts = {"device": "CPU (R)", "torch": "2.15.0"}
    monkeypatch.setattr(results, "date", SimpleNamespace(today=lambda: date(2026, 1, 31)))
    monkeypatch.setattr(results, "machine_facts", lambda: facts | {"OMP_WAIT_POLICY": "PASSIVE"})
    path = tmp_path / "cpu-r-torch2.15.0.json"
    old = {"date": "2025-12-01", "OMP_WAIT_POLICY": "ACTIVE"}
    sections = {"rows": [row(), row(batch=1, date="2025-11-01")], "waterfall": [row(technique="x")]}
    path.write_text(json.dumps({"machine": facts | old, **sections}))
    assert results.save([row(batch=2)], folder=tmp_path) == path
    saved = json.loads(path.read_text())
    days = [(row["date"], row["OMP_WAIT_POLICY"]) for row in (*saved["rows"], *saved["waterfall"])]
    first, last = ("2025-12-01", "ACTIVE"), ("2026-01-31", "PASSIVE")
    assert days == [first, ("2025-11-01", "ACTIVE"), last, first]
    results.save([row()], folder=tmp_path)
    other = json.loads(path.read_text())["rows"][2]
    assert [*other.items()] == [*saved["rows"][2].items()]  # in this order, so that `git diff` shows what is new
    different = [("job", "training step"), ("precision", "bf16"), ("provider", "insvp_fast"), ("model", "x")]
    for key, value in [*different, ("batch", 3), ("config", "released"), ("technique", "x")]:
        before = len(saved["rows"])
        results.save([row(**{key: value})], folder=tmp_path)
        saved = json.loads(path.read_text())
        assert len(saved["rows"]) == before + 1, key


def test_the_table_of_a_gpu_is_of_our_time_over_the_others():
    timed = {"bare": (8.0, 1.0), "bare compiled": (5.0, 0.6), "insvp_fast": (4.0, 0.5)}
    rows = [
        row(provider=name, model="vit_base_patch16_224", seconds=s, ratio=r, **{"images per second": 100 / s})
        for name, (s, r) in timed.items()
    ]
    machine = {"device": "GPU", "torch": "2.15.0"}
    assert results.gpu_tables([{"machine": machine | {"cuda": None}, "rows": rows}]) == []
    (text,) = results.gpu_tables([{"machine": machine | {"cuda": "13.0"}, "rows": rows}])
    cells = "| vit_base_patch16_224, inference | fp32 | 8 | 12 images/s | 20 images/s | 25 images/s | 0.50 | 0.80 |"
    assert text.splitlines()[-1] == cells


def test_the_step_of_a_waterfall_is_from_a_row_of_the_same_case():
    values = {"technique": "x", "saved MB per image": 1.0, "error of logits": 1e-6, "error of gradients": 1e-6}
    rows = [row(ratio=0.5, **values), row(ratio=0.25, **values)]
    assert results.waterfall_table(rows).splitlines()[-1].split(" | ")[3:5] == ["0.50", "0.25"]
    for other in ({"precision": "bf16"}, {"model": "y"}, {"batch": 4}):
        assert results.waterfall_table([rows[0], rows[1] | other]).splitlines()[-1].split(" | ")[3] == ""


def test_a_table_says_what_a_row_says():
    values = {"ratio p20": 0.2, "ratio p80": 0.8, "ratio": 0.5, "floor ratio": 1.25}
    text = tables.table([row(**values, error=3e-4), row(**values, **{"saved MB per image": 31.9})])
    title = f"| {TINY}, inference | fp32 | 8 | bare timm model | 2.00 | 0.50 (0.20-0.80) | 1.25 |"
    assert text.splitlines()[2:] == [f"{title}  | 3e-04 |", f"{title} 32 MB |  |"]
    assert tables.table([row(provider="authors")]).splitlines()[-1].split(" | ")[3] == "authors"  # has no other name
    told = "batch 8:   4.0000 s,      2.00 images/s, ratio 0.50 (0.20-0.80), floor ratio 1.25"
    assert tables.line(row(**values, error=3.14e-4)).endswith(f"{told}, error 3.1e-04")
    more = {"peak MB": 1234.4, "saved MB per image": 31.94}
    assert tables.line(row(**values, **more)).endswith(f"{told}, saved 31.9 MB/image, peak 1234 MB")


@pytest.mark.parametrize("trees", [("a", "b"), ("a", "a")])
def test_checkouts_are_timed_in_turns_also_if_they_are_the_same(trees, monkeypatch, capsys):
    times, asked = iter([2.0, 1.0, 4.0, 1.0]), []

    def seconds(tree, arguments):
        asked.append(str(tree))
        return {"inference fp32": next(times)}

    monkeypatch.setattr(speed, "seconds", seconds)
    monkeypatch.setattr("sys.argv", ["speed", *trees, "--pairs", "2"])
    speed.main()
    before, after = trees
    assert asked == [after, before, before, after]
    assert capsys.readouterr().out == "inference fp32: after/before 1.125 (0.250 to 2.000)\n"


@pytest.mark.parametrize("job", timing.JOBS)
@pytest.mark.parametrize("provider", ["bare", "insvp_fast"])
def test_both_models_run_every_job_under_the_same_autocast(provider, job):
    for amp, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = models.make_model(provider, TINY, InsVPConfig(), **CUT)
        assert timing.JOBS[job](model, 1, amp)()["logits"].dtype == dtype
