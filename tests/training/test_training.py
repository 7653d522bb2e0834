"""Training end to end on small data, the run folder it leaves, and what reads that folder."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm import create_model

from insvp_fast import InsVPConfig
from insvp_fast.data import sources as data_module
from insvp_fast.data import transform_for
from insvp_fast.errors import InsVPError
from insvp_fast.training import device, journal, loop
from insvp_fast.training import run as run_module
from insvp_fast.training.backbone import load_backbone, preprocessing_of
from insvp_fast.training.evaluation import evaluate_run
from insvp_fast.training.loop import rate
from insvp_fast.training.prediction import predict
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import insvp_config, load_run, train, train_one
from insvp_fast.training.waiting import Waiting
from tools import pretrain_backbone

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "insvp_fast" / "assets" / "vit_shapes_32"
SMALL = {"epochs": 3, "batch_size": 16, "amp": "off"}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # two threads that wait for each other are slow on a busy machine


@pytest.fixture
def few_digits(monkeypatch):
    """The first 300 digits instead of all."""
    everything = load_digits()
    few = SimpleNamespace(images=everything.images[:300], target=everything.target[:300], target_names=range(10))
    monkeypatch.setattr(data_module, "load_digits", lambda: few)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on few digits: its folder, the models as they came out of training, and the same run once more."""
    with pytest.MonkeyPatch.context() as patch:
        few_digits.__wrapped__(patch)
        models = []
        patch.setattr(run_module, "train_one", lambda *args: models.append(train_one(*args)) or models[-1])
        recipe = Recipe(output=str(tmp_path_factory.mktemp("runs")), **SMALL)
        first, again = train(recipe), train(recipe)
        yield SimpleNamespace(folder=first, again=again, insvp=models[0], probe=models[1], recipe=recipe)


def make_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """An image folder of 40x48 noise pictures, whose brightness tells the class."""
    noise = np.random.default_rng(0)
    for part, count in parts.items():
        for level, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 90, (40, 48, 3)) + level * 160
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- the run folder


def test_metrics_are_complete_and_better_than_chance(digits_run):
    records = records_of(digits_run.folder)
    for model in ("InsVP", "linear probe"):
        *epochs, last = [record for record in records if record["model"] == model]
        assert [record["epoch"] for record in epochs] == [1, 2, 3]
        assert all(0 <= record["val_accuracy"] <= 1 and record["images_per_s"] > 0 for record in epochs)
        assert epochs[-1]["loss"] < epochs[0]["loss"]
        assert 0 <= last["test_accuracy"] <= 1
        kept = max(epochs, key=lambda record: (record["val_accuracy"], record["epoch"]))
        assert (last["kept_epoch"], last["selected_on"], last["protocol"]) == (kept["epoch"], "val", "paper")
    assert records[3]["test_accuracy"] > 0.3  # chance is 0.1


def test_same_seed_same_metrics_in_another_folder(digits_run):
    assert (digits_run.folder.name, digits_run.again.name) == ("digits-1", "digits-2")
    first, again = (
        [
            {key: value for key, value in record.items() if key not in ("images_per_s", "data_wait")}
            for record in records_of(folder)
        ]
        for folder in (digits_run.folder, digits_run.again)
    )
    assert first == again
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (digits_run.folder, digits_run.again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_config_is_resolved(digits_run):
    config = json.loads((digits_run.folder / "config.json").read_text())
    assert Recipe(**config["recipe"]) == digits_run.recipe
    assert config["insvp"] == digits_run.insvp.config.to_dict()
    assert config["images"] == {"train": 210, "val": 30, "test": 60}
    assert config["class_names"] == list("0123456789")


@pytest.mark.parametrize("name", ["curve.png", "prompts.png"])
def test_pictures_show_something(digits_run, name):
    pixels = np.asarray(Image.open(digits_run.folder / name).convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 5


def test_adapter_gives_the_logits_of_the_trained_model(digits_run):
    images = torch.rand(5, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_run(digits_run.folder).model(images), digits_run.insvp.eval()(images))


def test_eval_repeats_the_test_accuracy(digits_run, few_digits):
    assert evaluate_run(digits_run.folder)[1].top1 == records_of(digits_run.folder)[3]["test_accuracy"]


def test_predict_agrees_with_the_model(digits_run, tmp_path):
    digits = load_digits()
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, picture in zip(files, digits.images, strict=False):
        Image.fromarray(np.rint(picture * (255 / 16)).astype(np.uint8)).save(file)
    transform = transform_for(preprocessing_of(load_backbone()))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.inference_mode():
        chances = digits_run.insvp.eval()(images).softmax(1)
    for row, file, chance in zip(predict(digits_run.folder, files), files, chances, strict=True):
        ((name, share),) = row.ranking
        assert (row.file, name) == (file, str(chance.argmax().item()))
        assert share == pytest.approx(chance.max().item(), abs=1e-5)


def test_predict_names_the_file_that_is_no_image(digits_run, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (row,) = predict(digits_run.folder, [str(tmp_path / "text.png")])
    assert not row.ranking and "text.png: not an image" in row.error


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InsVPError, match="not a run folder"):
        evaluate_run(tmp_path)


def test_a_run_that_was_interrupted_has_no_adapter(digits_run, tmp_path):
    shutil.copy(digits_run.folder / "config.json", tmp_path)
    with pytest.raises(InsVPError, match="has no adapter"):
        evaluate_run(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the loop


def test_probe_trains_the_head_alone(digits_run):
    trained = {name for name, parameter in digits_run.probe.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    assert {name for name, _ in digits_run.probe.named_parameters() if not name.startswith("backbone.")} == trained


@pytest.mark.parametrize("which", ["insvp", "probe"])
def test_backbone_stays_as_it_was(digits_run, which):
    before, after = load_backbone().state_dict(), getattr(digits_run, which).backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rate_rises_then_falls():
    rates = [rate(step, 100, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_diverging_loss_stops_with_advice(few_digits, tmp_path):
    recipe = Recipe(output=str(tmp_path), lr=1e30, **SMALL)
    with pytest.raises(InsVPError, match=r"the loss became (nan|inf) in epoch 1/3.*lower --lr"):
        train(recipe)


def test_prompt_length_is_the_presets_unless_given():
    assert insvp_config(Recipe(backbone="vit_base_patch16_224")).prompt_length == 9
    assert insvp_config(Recipe(released=True)).prompt_length == 16
    assert insvp_config(Recipe()).prompt_length == 4
    assert insvp_config(Recipe(prompt_length=3)).prompt_length == 3


# ------------------------------------------------------------------------------------------------------- image folders


def test_training_on_an_image_folder(tmp_path, capsys):
    folder = make_folder(tmp_path / "brightness", {"train": 24, "val": 4, "test": 6})
    run = train(Recipe(data=str(folder), output=str(tmp_path / "runs"), probe=False, epochs=5, batch_size=8, lr=3e-3))
    assert run.name == "brightness-1"
    lines = capsys.readouterr().out
    assert "\r" not in lines  # no bar where there is no terminal
    assert lines.count("images/s") == 5
    assert records_of(run)[-1]["test_accuracy"] > 0.9
    assert evaluate_run(run, str(folder))[1].top1 == records_of(run)[-1]["test_accuracy"]
    files = [str(folder / "test" / name / "0.png") for name in ("dark", "light")]
    assert [row.ranking[0][0] for row in predict(run, files)] == ["dark", "light"]


@pytest.mark.parametrize("released", [False, True])
def test_the_release_decays_every_trained_tensor(released, tmp_path, few_digits, monkeypatch):
    seen = []

    def stop(training):
        seen.append(training.optimiser)
        raise InsVPError("enough")

    monkeypatch.setattr(loop.Training, "fit", stop)
    recipe = Recipe(output=str(tmp_path), released=released, prompt_length=2, weight_decay=0.3, probe=False, **SMALL)
    with pytest.raises(InsVPError, match="enough"):
        train(recipe)
    decays = {group["weight_decay"] for group in seen[0].param_groups}
    assert decays == ({0.3} if released else {0.0, 0.3})


def test_the_command_in_mixed_precision_with_the_released_preset(tmp_path):
    folder = make_folder(tmp_path / "pictures", {"train": 8, "val": 2})
    options = [
        "--data",
        str(folder),
        "--output",
        str(tmp_path / "runs"),
        "--amp",
        "bf16",
        "--released",
        "--epochs",
        "1",
    ]
    command = [sys.executable, "-m", "insvp_fast", "train", *options, "--prompt-length", "2", "--no-probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "epoch   1/1  loss" in done.stdout
    assert done.stdout.endswith(f"run folder: {tmp_path / 'runs' / 'pictures-1'}\n")
    config = json.loads((tmp_path / "runs" / "pictures-1" / "config.json").read_text())
    assert config["insvp"]["image_weights"] == [2.0, 1.0]
    assert config["tested_on"] == "val"  # there is no test


def test_eval_refuses_data_with_other_classes(digits_run, tmp_path):
    with pytest.raises(
        InsVPError, match="found the class dark, light, expected some of the 10 classes of train: 0, 1, 2"
    ):
        evaluate_run(digits_run.folder, str(make_folder(tmp_path, {"test": 1})))


# -------------------------------------------------------------------------------------------------------- the settings


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "pictures", {"train": 9, "val": 4, "test": 4})


def quick(pictures: Path, tmp_path: Path, **settings) -> Recipe:
    common = {"epochs": 1, "batch_size": 8, "probe": False, "amp": "off", "prompt_length": 2}
    return Recipe(data=str(pictures), output=str(tmp_path), **(common | settings))


def test_the_best_epoch_is_kept_the_last_of_equals(pictures, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.75, 0.25, 1.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(accuracies))
    run = train(quick(pictures, tmp_path, epochs=4))
    best, adapter = (run / name / "adapter_model.safetensors" for name in ("best", "adapter"))
    assert best.read_bytes() == adapter.read_bytes()
    assert records_of(run)[-1] == {
        "model": "InsVP",
        "test_accuracy": 1.0,
        "trained_parameters": sum(tensor.numel() for tensor in load_file(adapter).values()),
        "kept_epoch": 3,
        "selected_on": "val",
        "protocol": "paper",
    }


def test_selection_on_the_test_images_is_named(pictures, tmp_path, capsys):
    run = train(quick(pictures, tmp_path, select_on="test"))
    epoch, result = records_of(run)
    assert epoch["test_accuracy"] == result["test_accuracy"]
    assert result["selected_on"] == "test"
    assert "protocol paper, epoch selected on test, tested on test" in capsys.readouterr().out


def test_retraining_takes_train_and_val_and_the_last_epoch(pictures, tmp_path, capsys):
    run = train(quick(pictures, tmp_path, retrain=True, epochs=2))
    *epochs, result = records_of(run)
    assert [record["val_accuracy"] for record in epochs] == [None, None]
    assert (result["kept_epoch"], result["selected_on"]) == (2, None)
    assert not (run / "best").exists()
    assert "trained on train and val, last epoch" in capsys.readouterr().out
    assert json.loads((run / "last" / "state.json").read_text())["epoch"] == 2


def test_an_average_is_what_is_kept(pictures, tmp_path, monkeypatch):
    weights, step = [], loop.Training._step

    def recorded(self, number):
        step(self, number)
        weights.append(self.trained["head.weight"].detach().clone())

    monkeypatch.setattr(loop.Training, "_step", recorded)
    run = train(quick(pictures, tmp_path, ema=0.9, retrain=True, epochs=2))
    kept = load_file(run / "adapter" / "adapter_model.safetensors")["head.weight"]
    average = weights[0].double()
    for number, weight in enumerate(weights[1:], 1):  # timm's warm-up: the decay begins low
        average = average.lerp(weight.double(), max(0.1, (1 + number) ** (-2 / 3)))
    torch.testing.assert_close(kept.double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(kept, weights[-1])


def test_mixing_smooths_targets_and_drops_an_odd_image(pictures, tmp_path, monkeypatch):
    seen, cross_entropy = [], torch.nn.functional.cross_entropy

    def spy(logits, targets, **how):
        seen.append((len(logits), targets.detach().clone(), how["label_smoothing"]))
        return cross_entropy(logits, targets, **how)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    mixing = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "label_smoothing": 0.2}
    train(quick(pictures, tmp_path, batch_size=5, **mixing))  # 18 images: 5, 5, 5 and 3
    assert [size for size, *_ in seen] == [4, 4, 4, 2]
    assert all(smoothing == 0 for *_, smoothing in seen)
    for size, targets, _ in seen:
        assert targets.shape == (size, 2)
        assert targets.min() >= 0.1 - 1e-6
        torch.testing.assert_close(targets.sum(1), torch.ones(size))


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute": "mlp"},
        {"recompute": "block"},
        pytest.param({"compile": "prompters"}, marks=pytest.mark.slow),
        pytest.param({"compile": "model"}, marks=pytest.mark.slow),
    ],
)
def test_how_it_is_computed_changes_nothing(pictures, tmp_path, monkeypatch, settings):
    # without dropout, for which compiled code draws other masks
    monkeypatch.setattr(run_module, "insvp_config", lambda _: InsVPConfig(prompt_length=2, global_dropout=0.0))
    plain, other = (train(quick(pictures, tmp_path, **more)) for more in ({}, settings))
    for one, two in zip(records_of(plain), records_of(other), strict=True):
        assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=1e-4)
        assert one.get("test_accuracy") == two.get("test_accuracy")


def test_rates_scale_with_the_images_of_a_step():
    accelerator = device.start()
    for scale, factor in {"none": 1, "linear": 4, "sqrt": 2}.items():
        recipe = Recipe(batch_size=32, accumulate=8, lr_scale=scale)
        assert device.scaled_lr(recipe, 1e-3, accelerator) == pytest.approx(factor * 1e-3)


def test_the_largest_batch_that_fits_is_found(pictures, tmp_path, monkeypatch, capsys):
    forward = run_module.InsVPViT.forward

    def small(self, images):
        if len(images) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(self, images)

    monkeypatch.setattr(run_module.InsVPViT, "forward", small)
    run = train(quick(pictures, tmp_path, auto_batch=True))
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    assert (recipe["batch_size"], recipe["auto_batch"]) == (5, False)
    assert "batch size 5" in capsys.readouterr().out


def test_a_slow_loader_is_told_once(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(journal, "SLOW_LOADER", -1.0)
    train(quick(pictures, tmp_path, epochs=3))
    lines = capsys.readouterr().out
    assert lines.count("the loader is the limit") == 1
    assert "data_wait" in records_of(tmp_path / "pictures-1")[0]


def test_waiting_is_what_the_loader_takes(monkeypatch):
    waiting = Waiting(torch.device("cpu"))
    clock = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for _ in range(2):
        with waiting:
            pass
    assert waiting.seconds() == 0.75


def test_a_tracker_that_is_not_installed_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(InsVPError, match="--trackers has wandb: it is not installed; pip install wandb"):
        train(quick(pictures, tmp_path, trackers=("wandb",)))


def test_trackers_log_into_the_run_folder(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    run = train(quick(pictures, tmp_path, trackers=("tensorboard",)))
    assert list((run / "insvp_fast").glob("events.*"))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("accumulate", 0, "at least 1"),
        ("lr_scale", "double", "one of none, linear, sqrt"),
        ("ema", 1.0, r"a number in \[0, 1\)"),
        ("mix_prob", 2.0, r"a number in \[0, 1\]"),
        ("specific_kernels", (7, 8, 3), "three odd positive integers"),
        ("trackers", ("mlflow",), "some of tensorboard, wandb"),
        ("epochs", "ten", "a value of type int"),
        ("data", None, "a value of type str"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(field, value, expected):
    with pytest.raises(InsVPError, match=f"--{field.replace('_', '-')} is .*: expected {expected}"):
        Recipe(**{field: value})


def test_a_recipe_comes_back_from_json():
    recipe = Recipe(specific_kernels=(7, 9, 3), trackers=("wandb",), root="images", seed=4)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


# ------------------------------------------------------------------------------------------------------------ backbones


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_timm_backbone_from_a_file(tmp_path, suffix):
    torch.manual_seed(1)
    expected, file = create_model("test_vit", num_classes=7), tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": expected.state_dict(), "epoch": 3}, file)
    else:
        save_file(expected.state_dict(), file)
    backbone = load_backbone(f"test_vit@{file}")
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_a_pickle_with_code_is_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"state_dict": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(InsVPError, match="weights.pth: found a truncated file or one with code, .* getattr"):
        load_backbone("test_vit", str(tmp_path / "weights.pth"))
    assert not (tmp_path / "sprung").exists()


def test_wrong_backbones_are_refused(tmp_path):
    with pytest.raises(InsVPError, match="--backbone is vit_huger: timm has no model vit_huger, and there is no"):
        load_backbone("vit_huger")
    with pytest.raises(InsVPError, match="a ResNet: expected a Vision Transformer"):
        load_backbone(f"resnet10t@{__file__}")
    with pytest.raises(InsVPError, match="no such file"):
        load_backbone("test_vit@nowhere.pth")
    save_file({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InsVPError, match="not weights of this model"):
        load_backbone(f"test_vit@{tmp_path / 'other.safetensors'}")


def test_shipped_backbone_is_what_its_description_says():
    weights, facts = ASSET.with_suffix(".safetensors").read_bytes(), json.loads(ASSET.with_suffix(".json").read_text())
    assert len(weights) < 4_000_000
    assert hashlib.sha256(weights).hexdigest() == facts["sha256"]
    backbone = load_backbone()
    assert backbone.patch_embed.img_size == (32, 32)
    assert backbone.embed_dim == 3 * 8 * 8
    assert next(backbone.parameters()).dtype == torch.float32


def test_the_output_must_be_a_folder(few_digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InsVPError, match="--output is .*file: no folder can be made there"):
        train(Recipe(output=str(tmp_path / "file"), **SMALL))


def test_scenes_are_the_same_for_the_same_seed():
    (first, labels), (again, same), (other, _) = (pretrain_backbone.draw_scenes(16, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert all(torch.equal(labels[name], same[name]) for name in labels)
    assert not torch.equal(first, other)
    assert first.shape == (16, 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1


def test_pretraining_repeats_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_backbone, "HELD_OUT", 8)
    for name in ("first", "again"):
        backbone, held_out = pretrain_backbone.pretrain(steps=2, batch=4, lr=1e-3, seed=0)
        pretrain_backbone.write(backbone, tmp_path / name, {"accuracy_on_unseen_scenes": held_out})
    first, again = (json.loads((tmp_path / name / "vit_shapes_32.json").read_text()) for name in ("first", "again"))
    assert first == again
