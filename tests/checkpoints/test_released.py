"""Checkpoints of the authors' code give the authors' numbers, told by an independent restatement of their forward."""

from __future__ import annotations

import json
import pickle
import warnings
from functools import cache, lru_cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm import create_model
from torch import Tensor
from torch.func import functional_call

from benchmarks.released import Released
from insvp_fast.checkpoints.adapter import AdapterCheckpoint
from insvp_fast.checkpoints.released import to_released
from insvp_fast.config import RELEASED_PREPROCESSING, InsVPConfig
from insvp_fast.errors import CheckpointError
from insvp_fast.model import InsVPViT
from insvp_fast.reference import InsVPReference


class Reference(AdapterCheckpoint, InsVPReference):
    pass


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TokenPrompt:UserWarning"),
    pytest.mark.filterwarnings("ignore:InsVPViT takes the general path:UserWarning"),
]
models = pytest.mark.parametrize("model_type", [Reference, InsVPViT], ids=["reference", "fast"])

# images, blocks, prompted blocks, prompt length, kernels, SimAM
CASES = [
    (1, 2, 2, 16, (7, 9, 3), False),
    (2, 3, 2, 9, (9, 5, 3), True),
    (1, 2, 1, 20, (7, 9, 3), True),
    pytest.param((1, 12, 12, 16, (7, 9, 3), False), marks=pytest.mark.slow),
]


def oracle_of(
    depth: int, layers: int, length: int, kernels: tuple[int, int, int], classes: int = 7, simam: bool = False
) -> Released:
    backbone = create_model("vit_base_patch16_224", depth=depth, num_classes=classes)
    return Released(backbone, layers, length, kernels, simam=simam).eval()


def random_state_dict(*sizes, classes: int = 7) -> dict[str, Tensor]:
    """Random weights under the keys of the authors' code, of sizes that let each part show in the logits."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in ((name, tensor.shape) for name, tensor in oracle_of(*sizes, classes).state_dict().items()):
        noise = torch.randn(shape, generator=generator)
        if name == "prompts":
            tensors[name] = torch.rand(shape, generator=generator) * 2 - 1
        elif name.endswith("bias"):
            tensors[name] = 0.1 * noise
        elif "norm" in name:
            tensors[name] = 1 + 0.1 * noise
        elif name in ("backbone.cls_token", "backbone.pos_embed"):
            tensors[name] = noise * (1 if "cls" in name else 0.2)
        else:
            gain = 2 if name.startswith("TokenPrompt") else 1.5 if "qkv" in name else 1
            tensors[name] = gain * noise * shape[1:].numel() ** -0.5
    return tensors


def forward(tensors: dict[str, Tensor], image: Tensor, simam: bool = False) -> Tensor:
    """The logits of the authors' code with these weights, whose shapes tell the sizes."""
    depth = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("backbone.blocks."))
    kernels = tuple(tensors[f"TokenPrompt.conv{i}.weight"].shape[-1] for i in (1, 2, 3))
    model = oracle_of(depth, *tensors["prompts"].shape[:2], kernels, len(tensors["backbone.head.bias"]), simam)
    return functional_call(model, tensors, image)


@cache
def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@cache
def small() -> dict[str, Tensor]:
    return random_state_dict(1, 1, 9, (9, 5, 3))


@lru_cache(maxsize=1)  # the two models of a case follow each other
@torch.no_grad()
def oracle(*case) -> tuple[dict[str, Tensor], Tensor]:
    batch, *sizes, simam = case
    tensors = random_state_dict(*sizes)
    return tensors, forward(tensors, images(batch), simam)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@models
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_gives_the_logits_of_the_authors_code(model_type, case):
    tensors, logits = oracle(*case)
    model = model_type.from_released(tensors, simam=case[-1])
    assert not model.training
    assert error(model(images(case[0])), logits) < 1e-5


@torch.no_grad()
def test_the_oracle_sees_every_part():
    reference = forward(small(), images())
    for part in ("prompts", "TokenPrompt", "meta_net.", "meta_net_2."):
        without = {key: value * 0 if key.startswith(part) else value for key, value in small().items()}
        assert error(forward(without, images()), reference) > 1e-3, part
    assert error(forward(small(), images(), simam=True), reference) > 1e-3


def test_infers_the_configuration():
    model = Reference.from_released(random_state_dict(3, 2, 20, (7, 9, 3), classes=11), simam=True)
    assert model.config == InsVPConfig.released(prompt_length=20, prompted_blocks=2, simam=True)
    assert (model.num_classes, len(model.backbone.blocks)) == (11, 3)
    assert model.preprocessing["crop_pct"] == 0.875

    wide = small() | {"meta_net.0.weight": torch.ones(5, 768), "meta_net.0.bias": torch.ones(5)}
    wide |= {"meta_net.2.weight": torch.ones(768, 5), "meta_net_2.0.weight": torch.ones(4, 3, 7, 7)}
    wide |= {"meta_net_2.0.bias": torch.ones(4), "meta_net_2.2.weight": torch.ones(3, 4, 5, 5)}
    config = Reference.from_released(wide).config
    assert (config.patch_hidden, config.global_hidden, config.global_kernels) == (5, 4, (7, 5))
    assert config.specific_kernels == (9, 5, 3)


@models
@torch.no_grad()
def test_prompts_that_the_file_lacks_are_switched_off(model_type):
    def without(*parts: str) -> dict[str, Tensor]:
        return {key: value for key, value in small().items() if not key.startswith(parts)}

    def silenced(*parts: str) -> dict[str, Tensor]:
        return {key: value * 0 if key.startswith(parts) else value for key, value in small().items()}

    plain = model_type.from_released(without("meta_net", "TokenPrompt"))
    assert plain.config == InsVPConfig.released(
        prompt_length=9, specific_prompt=False, global_prompt=False, patch_prompt=False
    )
    assert error(plain(images()), forward(silenced("meta_net", "TokenPrompt"), images())) < 1e-5
    generated = model_type.from_released(without("prompts"))
    assert not generated.config.common_prompt
    assert error(generated(images()), forward(silenced("prompts"), images())) < 1e-5


@pytest.mark.parametrize(("prefix", "suffix"), [("module.", ".safetensors"), ("module._orig_mod.", ".pth")])
def test_reads_files_wrapped_by_ddp_and_compile(tmp_path: Path, prefix, suffix):
    file = tmp_path / f"best_model{suffix}"
    tensors = {prefix + key: value for key, value in small().items()}
    if suffix == ".pth":
        torch.save({"state_dict": tensors, "epoch": 3}, file)
    else:
        safetensors.torch.save_file(tensors, file)
    state = Reference.from_released(file).state_dict()
    assert torch.equal(state["specific_prompter.conv1.weight"], small()["TokenPrompt.conv1.weight"])
    assert torch.equal(state["backbone.pos_embed"], small()["backbone.pos_embed"])


@torch.no_grad()
def test_a_given_backbone_gets_the_weights_of_the_file():
    backbone = create_model("vit_base_patch16_224", depth=1)
    model = Reference.from_released(small(), backbone)
    assert model.backbone is backbone
    assert error(model(images()), forward(small(), images())) < 1e-5


def test_leaves_the_given_state_dict_alone():
    tensors = {key: value.clone() for key, value in small().items()}
    model = Reference.from_released(tensors)
    with torch.no_grad():
        model.common_prompts[0].zero_()
    assert all(torch.equal(tensors[key], small()[key]) for key in small())


@torch.no_grad()
def test_becomes_an_adapter(tmp_path: Path):
    model = Reference.from_released(small())
    assert model.preprocessing == RELEASED_PREPROCESSING and model.preprocessing is not RELEASED_PREPROCESSING
    model.save_pretrained(tmp_path)
    backbone = create_model("vit_base_patch16_224", depth=1)
    backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    again = Reference.from_pretrained(tmp_path, backbone)
    assert torch.equal(again(images()), model(images()))
    assert again.preprocessing == model.preprocessing
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["backbone"]["name"]
    assert recorded == "vit_base_patch16_224.orig_in21k"  # as `insvp convert` records it


@pytest.mark.filterwarnings("default:.*TokenPrompt:UserWarning")
def test_says_that_the_specific_prompter_is_untrained():
    with pytest.warns(UserWarning, match="TokenPrompt") as caught:
        Reference.from_released(small())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reference.from_released({key: value for key, value in small().items() if not key.startswith("TokenPrompt")})


def _drop(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in small().items() if key not in keys}


WRONG = {
    "of another model": (
        {"conv.weight": torch.ones(1)},
        r"not a checkpoint of the authors' code: found \['conv.weight'\]",
    ),
    "no backbone": ({"prompts": torch.ones(1, 9, 768)}, r"not a checkpoint of the authors' code: found \['prompts'\]"),
    "a bare backbone": ({"backbone.cls_token": torch.ones(1, 1, 768)}, "not a checkpoint of the authors' code"),
    "no tensors": ({"backbone.cls_token": 3}, "expected a state dict of dense tensors"),
    "a key missing": (_drop("backbone.norm.bias"), r"backbone.norm.bias is missing: expected shape \(768,\)"),
    "a kernel missing": (_drop("TokenPrompt.conv2.weight"), "TokenPrompt.conv2.weight is missing"),
    "half an image prompt": (_drop(*(k for k in small() if k.startswith("meta_net_2"))), "expected both or neither"),
    "a key too many": (small() | {"simam.weight": torch.ones(2)}, r"the unexpected simam.weight of shape \(2,\)"),
    "a wrong shape": (
        small() | {"meta_net.2.weight": torch.ones(768, 8)},
        r"meta_net.2.weight has shape \(768, 8\): expected \(768, 16\)",
    ),
    "two prompt lengths": (
        small() | {"prompts": torch.ones(1, 8, 768)},
        r"prompts has shape \(1, 8, 768\): expected \(1, 9, 768\)",
    ),
    "an even kernel": (
        small() | {"meta_net_2.0.weight": torch.ones(6, 3, 4, 4)},
        r"not those of the authors' code: global_kernels=\(4, 25\)",
    ),
    "flat prompts": (small() | {"prompts": torch.ones(9, 768)}, r"shape \(9, 768\): expected \(1, 9, 768\)"),
    "a single number": (
        small() | {"backbone.head.weight": torch.ones(())},
        r"the unexpected backbone.head.weight of shape \(\)",
    ),
    "a kernel that is a number": (
        small() | {"TokenPrompt.conv1.weight": torch.ones(())},
        "the shapes are not those of the authors' code",
    ),
    "integers": (
        small() | {"prompts": torch.ones(1, 9, 768).char()},
        "prompts has dtype torch.int8: expected floating",
    ),
    "a sparse tensor": (small() | {"prompts": torch.ones(1, 9, 768).to_sparse()}, "expected a state dict of dense ten"),
    "more prompts than blocks": (small() | {"prompts": torch.ones(2, 9, 768)}, "prompted_blocks=2 asks for block 1"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_refuses_what_is_not_such_a_checkpoint(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        Reference.from_released(tensors)


def test_refuses_other_classes_and_other_backbones():
    for wanted in (0, 5):
        with pytest.raises(CheckpointError, match=f"backbone.head has 7 classes: expected {wanted}"):
            Reference.from_released(small(), num_classes=wanted)
    with pytest.raises(CheckpointError, match=r"backbone.cls_token has shape \(1, 1, 768\): expected \(1, 1, 192\)"):
        Reference.from_released(small(), "vit_tiny_patch16_224")
    backbone = create_model("vit_base_patch16_224", depth=2)
    head = backbone.head
    with pytest.raises(CheckpointError, match=r"backbone.blocks.1.norm1.weight is missing"):
        Reference.from_released(small(), backbone)
    assert backbone.head is head
    with pytest.raises(ValueError, match="belong to a backbone given by name"):
        Reference.from_released(small(), backbone, img_size=224)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_unpickles_no_code(tmp_path: Path):
    torch.save({"backbone.x": Bomb(tmp_path / "marker")}, tmp_path / "best_model.pth")
    with pytest.raises(CheckpointError, match=r"best_model.pth: found a truncated file or one with code"):
        Reference.from_released(tmp_path / "best_model.pth")
    assert not (tmp_path / "marker").exists()
    (tmp_path / "best_model.pth").write_text("junk\n")
    with pytest.raises(CheckpointError, match=r"not tensors of torch.save$"):
        Reference.from_released(tmp_path / "best_model.pth")
    for protocol in (2, 4):  # of which torch advises to trust the file, and warns
        (tmp_path / "best_model.pth").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "marker")}, protocol))
        with warnings.catch_warnings(action="error"), pytest.raises(CheckpointError) as refused:
            Reference.from_released(tmp_path / "best_model.pth")
        assert "weights_only" not in str(refused.value) and not (tmp_path / "marker").exists()


def test_refuses_truncated_files(tmp_path: Path):
    torch.save(small(), tmp_path / "best_model.pth")
    content = (tmp_path / "best_model.pth").read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 10):
        (tmp_path / "best_model.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"best_model\.pth"):
            Reference.from_released(tmp_path / "best_model.pth")


def test_prompts_are_stacked_by_their_numbers():
    """A file of twelve blocks lists 10 before 2."""
    tensors = {f"common_prompts.{i}": torch.full((2, 3), float(i)) for i in (0, 1, 10, 11, *range(2, 10))}
    assert to_released(tensors)["prompts"][:, 0, 0].tolist() == list(range(12))
    tensors["common_prompts.3"] = torch.zeros(2, 4)
    with pytest.raises(CheckpointError, match=r"the prompts have widths \[3, 4\]: expected one"):
        to_released(tensors)
