"""Each script in examples/ runs on a small input, as a process of its own, and leaves an adapter that can be loaded."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.config import RELEASED_PREPROCESSING
from insvp_fast.data import transform_for
from insvp_fast.data.decode import to_rgb
from insvp_fast.methods import MethodViT
from insvp_fast.training.prediction import load_classifier, predict

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="only a checkout has examples/")


def run(name: str, *arguments: object, launcher: tuple[str, ...] = ()) -> str:
    """What the script prints."""
    command = [sys.executable, *launcher, EXAMPLES / name, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


def require(package: str, install: str = "-e '.[examples]'") -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {install}")


def accuracy(printed: str) -> float:
    """In percent."""
    return float(re.search(r"test.accuracy\D*([\d.]+)%", printed)[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The adapter that pytorch_loop.py writes, and what it prints."""
    adapter = tmp_path_factory.mktemp("pytorch") / "adapter"
    return adapter, run("pytorch_loop.py", "--epochs", 1, "--output", adapter)


def test_the_plain_loop_learns_digits(trained):
    adapter, printed = trained
    assert accuracy(printed) > 40  # of ten classes, after one epoch
    model = InsVPViT.from_pretrained(adapter)
    assert model.class_names == [str(digit) for digit in range(10)]
    assert model.preprocessing["input_size"] == [3, 32, 32]


def test_inference_classifies_files_as_the_model_does(trained, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)).save(file)
    lines = run("inference.py", trained[0], *files, "--batch-size", 2).splitlines()
    assert [line.split(": ")[0] for line in lines] == list(map(str, files))
    model = InsVPViT.from_pretrained(trained[0])
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((32, 32), 3)) for file in files])
    with torch.inference_mode():
        found = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).argmax(1)
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == [model.class_names[i] for i in found]


def test_a_bank_classifies_files_with_each_adapter(trained, tmp_path):
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
    printed = run("adapter_bank.py", file, "--adapters", *(f"{name}={trained[0]}" for name in ("one", "other")))
    model = InsVPViT.from_pretrained(trained[0])
    with torch.inference_mode():
        found = model(torch.from_numpy(np.asarray(Image.open(file))).permute(2, 0, 1)[None]).argmax().item()
    lines = [line.split(" (")[0] for line in printed.splitlines()]
    assert lines == [f"{file}: {name}: {model.class_names[found]}" for name in ("one", "other")]


def test_photographs_are_turned_and_may_have_several_labels(trained, tmp_path):
    model, file = InsVPViT.from_pretrained(trained[0]), tmp_path / "turned.png"
    model.multi_label = True
    model.save_pretrained(tmp_path / "adapter")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)).save(file, exif=exif)
    (prediction,) = predict(load_classifier(tmp_path / "adapter"), [file], top_k=10)
    chances = [f"{name} ({chance:.1%})" for name, chance in prediction.ranking if chance >= 0.5]
    printed = run("inference.py", tmp_path / "adapter", file).strip().removeprefix(f"{file}: ")
    assert chances and sorted(printed.split(", ")) == sorted(chances)
    printed = run("adapter_bank.py", file, "--adapters", f"one={tmp_path / 'adapter'}").strip()
    assert printed == f"{file}: one: {chances[0]}"


def test_timm_trains_it():
    printed = run("timm_training.py", "--fake", "--epochs", 2)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_trainer_of_transformers_trains_it(tmp_path):
    require("transformers")
    printed = run("huggingface_trainer.py", "--epochs", 1, "--output", tmp_path)
    assert accuracy(printed) > 30
    (checkpoint,) = tmp_path.glob("checkpoint-*/model.safetensors")
    assert not [key for key in load_file(checkpoint) if "backbone" in key]
    InsVPViT.from_pretrained(tmp_path)


def test_the_loss_of_transformers_is_that_of_the_labels():
    require("transformers")
    module = importlib.import_module("insvp_fast.huggingface")
    model = module.InsVPForImageClassification(InsVPViT("vit_shapes_32", 3)).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([[1, 0, 1], [0, 0, 1]])
    logits = model.model(images)
    torch.testing.assert_close(model(images, labels.argmax(1)).loss, F.cross_entropy(logits, labels.argmax(1)))
    torch.testing.assert_close(model(images, labels.argmax(1).int()).loss, F.cross_entropy(logits, labels.argmax(1)))
    for several in (labels, labels.float(), labels.bool()):
        with pytest.raises(
            ValueError, match=r"labels are .*\[2, 3\]: expected integers \[2\], or multi_label = True on"
        ):
            model(images, several)
    with pytest.raises(ValueError, match="the model has one class: expected two or more"):
        module.InsVPForImageClassification(InsVPViT("vit_shapes_32", 1))(images, labels[:, 1])
    model.model.multi_label = True
    with pytest.raises(ValueError, match=r"labels are \[2\]: expected 0 or 1 for each class, \[2, 3\]"):
        model(images, labels[:, 1])
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(model(images, labels).loss, expected)
    assert model.main_input_name == "pixel_values"
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        model.model.recompute = "none"
        model.activation_checkpointing_enable(**{name: {"use_reentrant": False}})
        assert model.model.recompute == "block"
    with pytest.raises(ValueError, match="use_reentrant': 'x'"):
        model.activation_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "x"})
    with pytest.raises(ValueError, match="preprocessing is None: expected"):
        module.image_processor(None)


@pytest.mark.parametrize("pixels", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pixel_values_are_cast_as_by_the_models_of_transformers(pixels, dtype):
    require("transformers")
    module = importlib.import_module("insvp_fast.huggingface")
    model = module.InsVPForImageClassification(InsVPViT("vit_shapes_32", 3)).eval().to(dtype)
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).remainder(251).to(pixels)  # all exact in 8 bits
    expected = model.model(images if pixels == torch.uint8 else images.to(dtype))
    assert expected.dtype == dtype and torch.equal(model(images).logits, expected)


class InEightBits(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("rounded", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.rounded * self.scale)


@pytest.mark.filterwarnings("ignore:.*takes the general path")
def test_a_backbone_in_8_bits_takes_pixel_values_of_transformers():
    require("transformers")
    module = importlib.import_module("insvp_fast.huggingface")
    backbone = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=2)
    model = InsVPViT(backbone, 3)
    for name, layer in [*backbone.named_modules()]:
        if isinstance(layer, nn.Linear):
            backbone.set_submodule(name, InEightBits(layer))
    images = torch.randn(2, 3, 384, 384)
    assert torch.equal(module.InsVPForImageClassification(model.eval())(images).logits, model(images))


def test_the_state_of_transformers_may_lack_its_own_backbone_alone():
    require("transformers")
    model = importlib.import_module("insvp_fast.huggingface").InsVPForImageClassification(InsVPViT("vit_shapes_32", 3))
    other = nn.ModuleDict({"model": nn.ModuleDict({"backbone": nn.Linear(2, 2)})})
    state = model.state_dict()
    assert model.load_state_dict(state) == ([], [])
    for parts in ({"first": other, "own": model}, {"own": model, "other": other}, {"own": model, "own2": other}):
        missing, unexpected = nn.ModuleDict(parts).load_state_dict({f"own.{key}": state[key] for key in state}, False)
        name = next(name for name in parts if name != "own")
        assert missing == [f"{name}.model.backbone.{key}" for key in ("weight", "bias")] and unexpected == []
    with pytest.raises(RuntimeError, match="head.weight"):
        model.load_state_dict({key: value for key, value in state.items() if key != "model.head.weight"})


@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible:UserWarning")
@pytest.mark.parametrize("multi_label", [False, True])
def test_the_trainer_of_transformers_smooths_single_labels(multi_label, tmp_path):
    require("transformers")
    transformers = importlib.import_module("transformers")
    model = importlib.import_module("insvp_fast.huggingface").InsVPForImageClassification(InsVPViT("vit_shapes_32", 3))
    model.model.multi_label = multi_label
    arguments = transformers.TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    trainer = transformers.Trainer(model.eval(), arguments)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([[1, 0, 1], [0, 0, 1]])}
    batch["labels"] = batch["labels"] if multi_label else batch["labels"].argmax(1)
    loss = trainer.compute_loss(model, dict(batch))
    logits = model.model(batch["pixel_values"])
    smoothed = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1) if not multi_label else None
    torch.testing.assert_close(loss, model(**batch).loss if smoothed is None else smoothed)
    assert model.config.num_labels == 3
    model.model.class_names = ["ant", "bee", "cat"]
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    model.model.reset_classifier(2)
    assert model.config.num_labels == 2


def test_transformers_prepares_images_as_timm_does():
    require("transformers")
    processor = importlib.import_module("insvp_fast.huggingface").image_processor(RELEASED_PREPROCESSING)
    pixels = [np.random.default_rng(i).integers(0, 255, (300, 240 + i, 3), dtype=np.uint8) for i in range(3)]
    files = [Image.fromarray(one) for one in pixels]
    expected = torch.stack([create_transform(**RELEASED_PREPROCESSING)(file) for file in files])
    assert torch.equal(processor(files, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("more", [{}, {"crop_border_pixels": 8}, {"normalize": False}])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_transformers_prepares_images_as_the_adapter_records(mode, more):
    require("transformers")
    preprocessing = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]} | more
    processor = importlib.import_module("insvp_fast.huggingface").image_processor(preprocessing)
    image = Image.effect_noise((60, 50), 90).convert("RGB").convert(mode)
    expected = transform_for(preprocessing)(to_rgb(image))
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], expected)


def test_lightning_trains_it(tmp_path):
    require("lightning")
    run("lightning_module.py", "--epochs", 1, "--output", tmp_path)
    (file,) = tmp_path.rglob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    model = InsVPViT.from_pretrained(tmp_path)
    own = {f"model.{name}": p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], p) for name, p in own.items())


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoints_of_lightning_hold_all_but_the_backbone(averaged, tmp_path):
    require("lightning")
    lightning = importlib.import_module("lightning")
    spec = importlib.util.spec_from_file_location("lightning_module", EXAMPLES / "lightning_module.py")
    spec.loader.exec_module(example := importlib.util.module_from_spec(spec))
    batches = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4) % 2), 2)

    def fit(epochs: int, checkpoint: Path | None = None) -> nn.Module:
        callbacks = [lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5)] if averaged else []
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet
        )
        config = InsVPConfig(global_dropout=0)  # whose masks no checkpoint continues
        torch.manual_seed(0)
        module = example.InsVP(InsVPViT("vit_shapes_32", 2, config), 1e-3)
        module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), 1e-3)
        trainer.fit(module, batches, ckpt_path=checkpoint)
        return module

    whole = fit(2)
    files = sorted(tmp_path.rglob("*.ckpt"))
    fit(1)
    (file,) = set(tmp_path.rglob("*.ckpt")) - set(files)
    resumed = fit(2, file)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    content = torch.load(file, weights_only=True)
    states = [content[name] for name in ("state_dict", "current_model_state") if name in content]
    assert len(states) == 1 + averaged
    assert not [key for state in states for key in state if "backbone" in key]
    del states[-1]["model.head.weight"]
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(RuntimeError, match=r"model\.head\.weight"):
        fit(2, tmp_path / "part.ckpt")


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run("multi_gpu.py", "--cpu", "--epochs", 1, "--output", tmp_path, launcher=launcher)
    assert "of 360 images, 2 processes" in printed
    assert accuracy(printed) > 25
    InsVPViT.from_pretrained(tmp_path)


def test_methods_are_compared(tmp_path):
    printed = run("prompt_methods.py", "--methods", "linear", "--epochs", 1, "--output", tmp_path)
    assert re.fullmatch(r"linear: test accuracy [\d.]+%, 1,930 trained parameters\n", printed)
    assert MethodViT.from_pretrained(tmp_path / "linear").class_names == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_ray_classifies_a_folder_as_predict_does(trained, tmp_path, monkeypatch):
    require("ray", install="'ray[data]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token into the home folder
    folder, predictions = tmp_path / "images", tmp_path / "predictions"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "note.txt").write_text("no image")
    run("ray_batch.py", trained[0], folder, "--output", predictions, "--batch-size", 4)
    table = pytest.importorskip("pyarrow.parquet").read_table(predictions)
    rows = {Path(row["path"]).name: row for row in table.to_pylist()}
    assert "not an image" in rows.pop("note.txt")["error"]
    classifier = load_classifier(trained[0])
    images = classifier.images([folder / name for name in rows])
    rankings = classifier.rank(classifier.logits(torch.stack([images[i][0] for i in range(5)])), 1)
    for row, ((name, probability),) in zip(rows.values(), rankings, strict=True):
        assert (row["class"], row["error"]) == (name, None)
        assert row["probability"] == pytest.approx(probability, abs=1e-5)
