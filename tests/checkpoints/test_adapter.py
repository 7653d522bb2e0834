"""Adapters: what is saved comes back bit by bit, and what does not fit is refused before anything is touched."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import pickle
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard, hub_mixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm import create_model
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from insvp_fast.checkpoints import files
from insvp_fast.checkpoints.adapter import AdapterCheckpoint
from insvp_fast.checkpoints.adapter_config import AdapterConfig, BackboneRecord
from insvp_fast.checkpoints.backbone import create_backbone, save_backbone, shipped_backbone, unlike_timm
from insvp_fast.checkpoints.files import read_metadata
from insvp_fast.checkpoints.state_dict import assign, backbone_sha256
from insvp_fast.config import InsVPConfig
from insvp_fast.data.transforms import transform_for
from insvp_fast.errors import CheckpointError, InsVPError
from insvp_fast.methods import create_model as create_method_model
from insvp_fast.methods import load_model
from insvp_fast.model import InsVPViT
from insvp_fast.reference import InsVPReference


class Reference(AdapterCheckpoint, InsVPReference):
    pass


models = pytest.mark.parametrize("model_type", [Reference, InsVPViT], ids=["reference", "fast"])
pytestmark = pytest.mark.filterwarnings("ignore:.* takes the general path:UserWarning")

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
SMALL = InsVPConfig(prompt_length=2, specific_kernels=(3, 3, 3))
CLASSES = ["cat", "dog", "œuf"]
SIZE_AND_MEAN = {"input_size": [3, 32, 32], "mean": (0.5, 0.5, 0.5)}
PREPROCESSING = SIZE_AND_MEAN | {"std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def make_backbone(seed: int = 0, **kwargs: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    return create_model(NAME, **(SIZES | kwargs))


def make_model(model_type: type = Reference, config: InsVPConfig = SMALL, seed: int = 0) -> Any:
    return model_type(make_backbone(seed), 3, config).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model(images().to(dtype))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path, CLASSES, PREPROCESSING)
    return tmp_path


def edit(folder: Path, change: Any) -> None:
    """Change the description in place."""
    values = json.loads((folder / FILES[1]).read_text())
    change(values)
    (folder / FILES[1]).write_text(json.dumps(values))


# Round trips


@models
def test_comes_back_bit_by_bit(tmp_path, model_type):
    model = make_model(model_type)
    assert model.save_pretrained(tmp_path / "new" / "adapter", CLASSES, PREPROCESSING) is None
    again = model_type.from_pretrained(tmp_path / "new" / "adapter", make_backbone())
    assert type(again) is model_type
    assert not again.training
    assert torch.equal(logits(again), logits(model))
    assert again.config == model.config
    assert again.class_names == model.class_names == CLASSES
    assert again.preprocessing == model.preprocessing == PREPROCESSING | {"mean": [0.5] * 3}
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_one_class_reads_what_another_wrote(folder):
    assert torch.equal(logits(Reference.from_pretrained(folder, make_backbone())), logits(make_model()))
    torch.testing.assert_close(logits(InsVPViT.from_pretrained(folder, make_backbone())), logits(make_model()))


configs = st.builds(
    InsVPConfig,
    global_prompt=st.booleans(),
    patch_prompt=st.booleans(),
    common_prompt=st.booleans(),
    specific_prompt=st.booleans(),
    image_weights=st.floats(0, 1) | st.tuples(st.floats(-2, 2), st.integers(0, 3)),
    prompt_length=st.integers(0, 3),
    prompted_blocks=st.none() | st.integers(0, 2) | st.sampled_from([(), (0,), (1,), (0, 1)]),
    carry_prompts=st.booleans(),
    patch_hidden=st.integers(1, 5),
    global_kernels=st.sampled_from([(3, 3), (1, 5)]),
    specific_kernels=st.just((3, 1, 3)),
    specific_input=st.sampled_from(["image", "prompted"]),
    simam=st.booleans(),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs, classes=st.integers(0, 4))
def test_any_configuration_comes_back(tmp_path, config, classes):
    model = Reference(make_backbone(), classes, config).eval()
    model.save_pretrained(tmp_path)
    again = Reference.from_pretrained(tmp_path, make_backbone())
    assert again.config == config
    assert torch.equal(logits(again), logits(model))


@models
def test_saves_what_is_trained_and_nothing_of_the_backbone(tmp_path, model_type):
    model = make_model(model_type).to(memory_format=torch.channels_last)  # whatever the order of its memory
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    saved = safetensors.torch.load_file(tmp_path / FILES[2])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], p) for name, p in trained.items())
    assert not all(p.is_contiguous() for p in trained.values())
    assert not any(key.startswith("backbone") for key in saved)
    assert read_metadata(tmp_path / FILES[2]) == {"format": "pt"}  # which others' loaders ask for


def test_saves_a_frozen_prompter_too(tmp_path):
    model = make_model()
    model.specific_prompter.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Reference.from_pretrained(tmp_path, make_backbone())), logits(model))


def test_refuses_to_lose_trained_weights_of_the_backbone(tmp_path):
    model = make_model()
    model.backbone.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"backbone.norm.weight is trainable: expected a frozen backbone"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@models
def test_refuses_to_lose_any_attribute_that_was_changed_by_hand(model_type, tmp_path):
    """Of the model and its prompters; its configuration and number of classes are saved."""
    model, tried = make_model(model_type), []
    for name, part in make_model().named_modules():
        if name.partition(".")[0] in ("backbone", "head"):
            continue
        own = model.get_submodule(name)
        for key, value in vars(part).items():
            if key.startswith("_") or key in ("training", "config", "num_classes"):
                continue
            setattr(own, key, "another")
            path = f"{name}.{key}".lstrip(".")
            with pytest.raises(ValueError, match=f"^{re.escape(path)} is another: expected .*all that is saved"):
                model.save_pretrained(tmp_path / "adapter")
            setattr(own, key, value)
            tried.append(path)
    assert {"global_prompter.conv1.dilation", "patch_prompter.dropout.p", "prompted_blocks"} < {*tried}
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("method", ["insvp", "lora"])
def test_refuses_to_lose_methods_that_were_replaced(method, tmp_path):
    """But for the forward of the model itself, which libraries of training wrap."""
    model: Any = make_model() if method == "insvp" else create_method_model(method, make_backbone(), 3)
    parts = {"head": (model.head, "forward")}
    if method == "insvp":
        parts |= {"": (model, "specific_prompt"), "global_prompter": (model.global_prompter, "forward")}
    for name, (part, replaced) in parts.items():
        setattr(part, replaced, lambda *args: None)
        with pytest.raises(
            ValueError, match=f"{name and f'{name}.'}{replaced} is replaced: expected that of the class"
        ):
            model.save_pretrained(tmp_path / "adapter")
        delattr(part, replaced)
    assert not (tmp_path / "adapter").exists()
    model.forward = functools.partial(model.forward)
    model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("method", ["insvp", "lora"])
def test_an_adapter_that_cannot_be_described_leaves_files_and_model_as_they_are(method, tmp_path):
    def make() -> Any:
        return make_model(seed=1) if method == "insvp" else create_method_model(method, make_backbone(), 3)

    make().save_pretrained(tmp_path, CLASSES, PREPROCESSING)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = make()
    for names, preprocessing, message in (
        (["a", "b"], None, "class_names has 2 names"),
        ("cat", None, "class_names is 'cat': expected a list of names"),
        (None, "timm", "preprocessing is 'timm': expected arguments of timm.data.create_transform"),
        (None, transform_for(PREPROCESSING), "preprocessing is Compose"),
        (CLASSES[::-1], PREPROCESSING | {"color_jitter": np.float32(0.4)}, "float32 is not JSON serializable"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path, names, preprocessing)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert model.class_names is model.preprocessing is None
    model.trained_on = {"split_seed": 0, "undivided_sha256": None, "where": Path()}
    with pytest.raises(ValueError, match="Path is not JSON serializable: expected numbers, text, lists"):
        model.save_pretrained(tmp_path, CLASSES[::-1])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_sign_that_was_put_off_is_saved(tmp_path):
    model = make_model()
    model.head.weight.data = torch._neg_view(torch.randn(3, 48))
    sha256 = backbone_sha256(model.backbone, torch.float32)
    weight = model.backbone.norm.weight
    weight.data = torch._neg_view(-weight.data)
    assert backbone_sha256(model.backbone, torch.float32) == sha256
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Reference.from_pretrained(tmp_path, model.backbone)), logits(model))


def test_hooks_of_the_backbone_are_no_matter(tmp_path):
    """They may belong to what cannot be copied."""

    class Watching:
        def __init__(self):
            self.own_lock = threading.Lock()

        def watch(self, module, args, output):
            pass

    model = make_model()
    for part in (model.backbone, model.backbone.blocks[0]):
        part.register_forward_hook(Watching().watch)
    model.save_pretrained(tmp_path / "adapter")
    assert model.backbone._forward_hooks


@pytest.mark.parametrize("change", ["replaced", "added", "removed"])
def test_refuses_to_lose_modules(change, tmp_path):
    model = make_model()
    if change == "replaced":
        model.global_prompter.conv1 = nn.Identity()
    elif change == "added":
        model.patch_prompter.more = nn.Identity()
    else:
        model.specific_prompter = None
    with pytest.raises(
        ValueError, match=r"(conv1|more) is Identity: expected|specific_prompter is None: expected Spec"
    ):
        model.save_pretrained(tmp_path / "adapter")


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T


@pytest.mark.parametrize("method", ["insvp", "vpt_deep", "lora", "full", "mlp_3"])
@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Cosine(48, 3), "head.* is Cosine: expected"),
        (nn.Sequential(nn.Dropout(), nn.Linear(48, 3)), "head.* is (Sequential|Dropout): expected Linear"),
        (nn.Linear(48, 3, bias=False), "head.bias has the shape None|head is Linear: expected Sequential"),
        (nn.Linear(48, 5), "head.out_features is 5|head is Linear: expected Sequential"),
    ],
    ids=["cosine", "dropout", "no bias", "five"],
)
def test_refuses_a_head_that_would_not_come_back(method, head, message, tmp_path):
    model = make_model(InsVPViT) if method == "insvp" else create_method_model(method, make_backbone(), 3)
    model.save_pretrained(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in FILES[1:]]
    model.head = head
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in FILES[1:]] == before


@pytest.mark.parametrize(("method", "has_remedy"), [("insvp", True), ("vpt_deep", True), ("lora", False)])
def test_a_head_of_other_classes_is_refused_with_the_way_to_give_it(method, has_remedy, tmp_path):
    model = make_model(InsVPViT) if method == "insvp" else create_method_model(method, make_backbone(), 3)
    model.head = nn.Linear(48, 5)
    with pytest.raises(ValueError, match="^head.out_features is 5: expected 3, ") as refused:
        model.save_pretrained(tmp_path)
    assert has_remedy == str(refused.value).endswith("; reset_classifier(5) gives it a head of so many classes")


@pytest.mark.parametrize("method", ["insvp", "vpt_deep", "lora"])
@pytest.mark.parametrize(
    "arguments",
    [{"num_heads": 6}, {"act_layer": "silu"}, {"dynamic_img_size": True}, {"in_chans": 1}, {"in_chans": 5}],
    ids=str,
)
def test_the_arguments_of_the_shipped_backbone_come_back(method, arguments, tmp_path):
    if method == "insvp":
        model = InsVPViT("vit_shapes_32", 3, pretrained=True, **arguments)
    else:
        model = create_method_model(method, "vit_shapes_32", 3, pretrained=True, backbone_kwargs=arguments)
    model.eval().save_pretrained(tmp_path)
    size = (48, 64) if "dynamic_img_size" in arguments else (32, 32)
    image = torch.randn(2, arguments.get("in_chans", 3), *size)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).eval()(image), model(image))


def test_the_description_says_what_to_build(folder):
    values = json.loads((folder / FILES[1]).read_text())
    backbone = values["backbone"]
    assert (values["peft_type"], values["format_version"], values["num_classes"]) == ("INSVP", 1, 3)
    assert values["base_model_name_or_path"] == f"timm/{NAME}.augreg_in21k_ft_in1k"
    assert backbone["name"] == f"{NAME}.augreg_in21k_ft_in1k"
    assert backbone["arguments"] == SIZES | {
        "img_size": [32, 32],
        "in_chans": 3,
        "num_classes": 0,
        "global_pool": "token",
    }
    assert backbone["sha256"] == backbone_sha256(make_backbone(seed=0), torch.float32)
    assert backbone["sha256_but_positions"] == backbone_sha256(make_backbone(seed=0), torch.float32, positions=False)
    assert InsVPConfig.from_dict(values["insvp"]) == SMALL


def test_the_card_carries_the_metadata(folder):
    card = ModelCard.load(folder / FILES[0])
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("insvp_fast", "apache-2.0")
    assert (data["pipeline_tag"], data["base_model"]) == ("image-classification", f"timm/{NAME}.augreg_in21k_ft_in1k")
    assert "insvp" in data["tags"]
    assert "10.1145/3664647.3681233" in card.text


def test_builds_the_recorded_backbone(tmp_path):
    file = tmp_path / "backbone.safetensors"
    safetensors.torch.save_file(make_backbone(num_classes=0).state_dict(), file)
    overlay = {"pretrained_cfg_overlay": {"file": str(file), "num_classes": 0}}
    model = Reference(NAME, 3, SMALL, pretrained=True, **SIZES, **overlay).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = Reference.from_pretrained(tmp_path / "adapter", **overlay)
    assert torch.equal(logits(again), logits(model))
    named = Reference.from_pretrained(tmp_path / "adapter", NAME, **overlay)
    assert torch.equal(logits(named), logits(model))


def test_a_backbone_that_timm_did_not_make_must_be_given(tmp_path):
    torch.manual_seed(0)
    backbone = VisionTransformer(**SIZES)
    model = Reference(copy.deepcopy(backbone), 3, SMALL).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Reference.from_pretrained(tmp_path, backbone)), logits(model))
    with pytest.raises(CheckpointError, match=r"backbone.name is null: expected the backbone itself"):
        Reference.from_pretrained(tmp_path)
    assert "not made by timm" in (tmp_path / FILES[0]).read_text()


def activate(backbone: Any) -> None:
    backbone.blocks[1].mlp.act = nn.ReLU()


class Doubled(nn.Identity):
    def forward(self, x):
        return 2 * x


CHANGES = {
    "blocks.0.ls1 is 'tests.checkpoints.test_adapter.Doubled': expected 'absent'": lambda backbone: setattr(
        backbone.blocks[0], "ls1", Doubled()
    ),
    "blocks.0.drop_path2 is 'torch.nn.modules.linear.Identity with a forward of its own': expected 'absent'": (
        lambda backbone: setattr(backbone.blocks[0].drop_path2, "forward", lambda x: 2 * x)
    ),
    "norm.eps is 0.1: expected 1e-06": lambda backbone: setattr(backbone.norm, "eps", 0.1),
    "blocks.0.attn.scale is 1.0: expected ": lambda backbone: setattr(backbone.blocks[0].attn, "scale", 1.0),
    "blocks.1.mlp.act is 'torch.nn.modules.activation.ReLU': expected 'torch.nn.modules.activation.GELU'": activate,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["insvp", "vpt_deep", "lora"])
def test_a_backbone_that_was_changed_besides_weights_must_be_given(method, change, when, tmp_path):
    """An adapter's files name the backbone and hold the sum of its weights, which are the same."""

    def changed(backbone: Any) -> Any:
        CHANGES[change](backbone)
        return backbone

    own = changed(make_backbone()) if when == "before" else make_backbone()
    model: Any = InsVPViT(own, 3, SMALL).eval() if method == "insvp" else create_method_model(method, own, 3).eval()
    if when == "after":
        changed(model.backbone)
    with pytest.warns(UserWarning, match=re.escape(f"is not what {NAME}.augreg_in21k_ft_in1k names: {change}")):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="backbone.name is null: expected the backbone itself"):
        load_model(tmp_path)
    if method == "insvp":
        card = (tmp_path / FILES[0]).read_text()
        assert "augreg_in21k_ft_in1k`, but changed by hand, to be given as `backbone=`" in card
        assert 'from_pretrained("<this folder or repository>", backbone=backbone)' in card
    assert torch.equal(logits(load_model(tmp_path, changed(make_backbone()))), logits(model))


@pytest.mark.parametrize("method", ["insvp", "lora"])
def test_a_given_backbone_that_computes_otherwise_than_the_recorded_one_is_told(method, tmp_path):
    """Of the same weights, but with another number of heads, or changed by hand."""
    own = make_backbone()
    model: Any = InsVPViT(own, 3, SMALL) if method == "insvp" else create_method_model(method, own, 3)
    model.save_pretrained(tmp_path)
    warned = "the adapter was trained around a backbone that computes otherwise: "
    with pytest.warns(UserWarning, match=warned + "blocks.0.attn.num_heads is 3: expected 2"):
        load_model(tmp_path, make_backbone(num_heads=3))
    changed = make_backbone()
    activate(changed)
    with pytest.warns(UserWarning, match=warned + "blocks.1.mlp.act is "):
        load_model(tmp_path, changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path, make_backbone(dynamic_img_size=True, drop_path_rate=0.1))


def test_a_named_backbone_that_computes_otherwise_than_the_recorded_one_is_told(tmp_path):
    """Of the same weights: by another name, or with another argument."""
    file = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_file(create_model(f"{NAME}", pretrained=False, **SIZES).state_dict(), file)
    other = "vit_base_patch32_clip_quickgelu_224"
    InsVPViT(f"{other}@{file}", 3, SMALL, pretrained=True, **SIZES, pre_norm=False).save_pretrained(tmp_path)
    told = "the adapter was trained around a backbone that computes otherwise: "
    with pytest.warns(UserWarning, match=f"{told}blocks.0.mlp.act is .*GELU.*: expected .*QuickGELU"):
        InsVPViT.from_pretrained(tmp_path, f"vit_base_patch32_clip_224@{file}")
    with pytest.warns(UserWarning, match=f"{told}blocks.0.attn.num_heads is 3: expected 2"):
        InsVPViT.from_pretrained(tmp_path, num_heads=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = file.rename(tmp_path / "moved.safetensors")
        InsVPViT.from_pretrained(tmp_path, f"{other}@{moved}", dynamic_img_size=True)


UNCHANGED: dict[str, Any] = {
    "a head": lambda backbone: backbone.reset_classifier(7),
    "pooling": lambda backbone: backbone.reset_classifier(7, "avg"),
    "the size of images": lambda backbone: backbone.set_input_size((48, 64)),
    "recomputation": lambda backbone: backbone.set_grad_checkpointing(),
    "precision": lambda backbone: backbone.half().eval().requires_grad_(False),
    "an attribute of others": lambda backbone: setattr(backbone.blocks[0], "seen", 3),
}


@pytest.mark.parametrize("change", UNCHANGED)
@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_what_timm_does_to_a_backbone_leaves_it_the_one_that_it_names(drop, change):
    rates = dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "drop_path_rate"), drop)
    backbone = make_backbone(**rates)
    UNCHANGED[change](backbone)
    assert unlike_timm(backbone) is None


def test_a_backbone_for_images_of_another_size_is_the_one_that_it_names():
    assert unlike_timm(create_backbone("test_vit", pretrained=False, img_size=96), {}) is None


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224"])
def test_other_backbones_are_those_that_timm_names(name):
    with torch.device("meta"):
        backbone = create_model(name)
        backbone.set_input_size((448, 448))
    assert unlike_timm(backbone) is None
    backbone.norm = nn.LayerNorm(3)
    assert "norm" in str(unlike_timm(backbone))


def test_a_model_that_needs_values_to_be_built_is_recorded(tmp_path):
    """As some that users register do: nothing can be built of it without memory, and no number is drawn for it."""

    @register_model
    def vit_of_values(pretrained=False, **arguments):
        assert [rate.item() for rate in torch.linspace(0, 0.1, 2)][1] > 0
        backbone = VisionTransformer(**SIZES | {"num_classes": 0} | {k: arguments[k] for k in arguments if k in SIZES})
        backbone.pretrained_cfg = {"architecture": "vit_of_values"}
        return backbone

    backbone, state = create_model("vit_of_values"), torch.get_rng_state()
    assert unlike_timm(backbone) is None and torch.equal(state, torch.get_rng_state())
    activate(backbone)
    assert "mlp.act" in str(unlike_timm(backbone))


def test_a_given_backbone_has_to_pool_as_in_training(tmp_path):
    swin = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    backbone = SwinTransformer(**swin, num_classes=2, global_pool="max")
    Reference(copy.deepcopy(backbone), 3, SMALL).save_pretrained(tmp_path)
    assert type(Reference.from_pretrained(tmp_path, copy.deepcopy(backbone))) is Reference
    backbone.reset_classifier(2, "avg")
    with pytest.raises(CheckpointError, match="the backbone has global_pool='avg': expected 'max'"):
        Reference.from_pretrained(tmp_path, backbone)


def test_the_pooling_of_a_convolutional_backbone_is_recorded(tmp_path):
    model = Reference("test_resnet", 3, InsVPConfig(common_prompt=False, specific_prompt=False), global_pool="max")
    model.save_pretrained(tmp_path)
    assert AdapterConfig.read(tmp_path / "adapter_config.json").backbone.global_pool == "max"


def test_says_how_images_were_turned_and_divided(folder):
    assert make_model().exif_rotation and make_model().trained_on is None
    model = Reference.from_pretrained(folder, make_backbone())
    model.exif_rotation, model.trained_on = False, {"data": "flowers", "split_seed": 3}
    model.save_pretrained(folder)
    found = Reference.from_pretrained(folder, make_backbone())
    assert (found.exif_rotation, found.trained_on) == (False, {"data": "flowers", "split_seed": 3})

    def as_before(values):
        for name in ("exif_rotation", "trained_on", "multi_label"):
            del values[name]
        del values["backbone"]["global_pool"]

    edit(folder, as_before)
    old = Reference.from_pretrained(folder, make_backbone())
    assert (old.exif_rotation, old.trained_on, old.multi_label) == (True, None, False)
    assert torch.equal(logits(old), logits(found))


def test_a_layer_type_among_the_arguments_is_not_recorded(tmp_path):
    Reference(make_backbone(norm_layer=nn.LayerNorm), 3, SMALL).save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILES[1]).read_text())["backbone"]["name"] is None


def test_knows_a_rounded_backbone(tmp_path):
    model = make_model().bfloat16()
    model.save_pretrained(tmp_path)
    again = Reference.from_pretrained(tmp_path, make_backbone().bfloat16())
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again, torch.bfloat16), logits(model, torch.bfloat16))
    original = Reference.from_pretrained(tmp_path, make_backbone())
    assert {p.dtype for p in original.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(original), logits(model, torch.bfloat16).float(), atol=0.1, rtol=0.1)

    built = Reference.from_pretrained(tmp_path, pretrained=False, allow_backbone_mismatch=True)
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}


def test_refuses_the_rounded_copy_of_its_backbone(folder):
    with pytest.raises(CheckpointError, match="allow_backbone_mismatch"):
        Reference.from_pretrained(folder, make_backbone().bfloat16())
    model = Reference.from_pretrained(folder, make_backbone().bfloat16(), allow_backbone_mismatch=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_keeps_fp32_adapters_around_a_half_precision_backbone(tmp_path):
    model = make_model()
    model.backbone.bfloat16()
    model.save_pretrained(tmp_path)
    again = Reference.from_pretrained(tmp_path, make_backbone().bfloat16())
    assert again.head.weight.dtype == torch.float32
    assert torch.equal(again.common_prompts[1], model.common_prompts[1])


SWIN = {"embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 32, "window_size": 1}


@pytest.mark.parametrize(("name", "sizes"), [(NAME, SIZES), ("swin_tiny_patch4_window7_224", SWIN)])
def test_reads_common_prompts_that_are_stacked_by_width(tmp_path, name, sizes):
    torch.manual_seed(0)
    model = Reference(create_model(name, **sizes), 3, SMALL).eval()
    model.save_pretrained(tmp_path)
    backbone = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    old, prompts = safetensors.torch.load_file(tmp_path / FILES[2]), [*model.common_prompts]
    for i in range(len(prompts)):
        del old[f"common_prompts.{i}"]
    by_width = [torch.stack([p for p in prompts if p.shape[1] == width]) for width in model.prompt_widths]
    keys = ["common_prompts"] if name == NAME else [f"common_prompts.{i}" for i in range(4)]
    old |= dict(zip(keys, by_width, strict=True))
    safetensors.torch.save_file(old, tmp_path / FILES[2])
    again = Reference.from_pretrained(tmp_path, copy.deepcopy(model.backbone))
    assert torch.equal(again(images()), model(images()))
    in_module = nn.ModuleDict({"model": Reference(copy.deepcopy(model.backbone), 3, SMALL).eval()})
    in_module.load_state_dict({f"model.{key}": value for key, value in (backbone | old).items()})
    assert torch.equal(in_module["model"](images()), model(images()))


def test_says_that_timm_cannot_build_the_backbone(folder):
    edit(folder, lambda v: v["backbone"]["arguments"].update(flavour="sweet"))
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: timm does not build {NAME}.*'flavour'") as caught:
        Reference.from_pretrained(folder, pretrained=False)
    assert "elsewhere" not in str(caught.value)  # where the backbone would have no such argument either
    with pytest.raises(CheckpointError, match="adapter_config.json: timm has no model vit_unheard_of"):
        Reference.from_pretrained(folder, "vit_unheard_of")


# Another backbone


def test_refuses_another_backbone(folder):
    other = make_backbone(seed=1)
    found, expected = (backbone_sha256(make_backbone(seed), torch.float32) for seed in (1, 0))
    with pytest.raises(CheckpointError) as caught:
        Reference.from_pretrained(folder, other)
    for part in (str(folder / FILES[1]), found, expected, "backbone=", "allow_backbone_mismatch=True"):
        assert part in str(caught.value)
    model = Reference.from_pretrained(folder, other, allow_backbone_mismatch=True)
    assert torch.equal(model.common_prompts[0], make_model().common_prompts[0])
    assert model.backbone is other


@pytest.mark.parametrize("name", ["vit_shapes_32", NAME])
def test_refuses_a_backbone_for_images_of_another_size(name, tmp_path):
    """Its embeddings of positions are others, of which an adapter may record the size or the hash of the rest."""
    source = name
    if name == NAME:
        save_backbone(make_backbone(), file := tmp_path / "backbone.safetensors")
        source = str(file)
    Reference(create_backbone(source), 3, SMALL).save_pretrained(tmp_path)
    told = "the backbone is for images of 64x64 pixels: expected 32x32, those of the training. Give as backbone= .*mism"
    with pytest.raises(CheckpointError, match=told):
        Reference.from_pretrained(tmp_path, img_size=64)
    with pytest.raises(CheckpointError, match=told):
        Reference.from_pretrained(tmp_path, create_backbone(source, img_size=64))
    assert Reference.from_pretrained(tmp_path, img_size=64, allow_backbone_mismatch=True).num_classes == 3


@models
def test_another_number_of_classes_is_asked_of_a_new_head(model_type, folder):
    for wanted in (0, 7):  # no head, as timm says it, is another number too
        message = rf"adapter_config.json: the adapter has 3 classes: call reset_classifier\({wanted}\)"
        with pytest.raises(CheckpointError, match=message):
            model_type.from_pretrained(folder, make_backbone(), num_classes=wanted)
    model = model_type.from_pretrained(folder, make_backbone(), num_classes=3)
    assert model.num_classes == 3
    if model_type is InsVPViT:
        model.reset_classifier(7)
        model.save_pretrained(folder, class_names=list("abcdefg"))
        assert InsVPViT.from_pretrained(folder, make_backbone()).num_classes == 7


def test_a_backbone_of_the_same_weights_may_be_for_images_of_another_size():
    small, large = (
        create_backbone("swin_tiny_patch4_window7_224", False, **SWIN | {"img_size": size}) for size in (32, 64)
    )
    large.load_state_dict(small.state_dict())
    record = BackboneRecord.of(small)
    assert record._image_sizes(large) == ("64x64", "32x32")
    record.require_same_weights(large, "here")


def test_changed_embeddings_of_positions_are_another_backbone_unless_they_were_resampled():
    backbone = shipped_backbone("vit_shapes_32", num_classes=0)
    record = BackboneRecord.of(backbone)
    unnamed = dataclasses.replace(record, name=None, arguments=None)  # which says nothing of a size
    assert unnamed.unless("changed by hand") is unnamed
    backbone.pos_embed.data += 1
    for each in (record, unnamed):
        with pytest.raises(CheckpointError, match="^here: the backbone has sha256 .*: expected"):
            each.require_same_weights(backbone, "here")


def test_the_tensors_of_a_file_are_copied():
    """In its memory they may lie where products round otherwise."""
    model, given = make_model(), make_model().state_dict()
    assign(model, given, torch.float32)
    assert not {value.data_ptr() for value in model.state_dict().values()} & {v.data_ptr() for v in given.values()}


def test_one_changed_weight_makes_another_backbone():
    backbone = make_backbone()
    before = backbone_sha256(backbone, torch.float32)
    backbone.reset_classifier(17)
    assert backbone_sha256(backbone, torch.float32) == before
    with torch.no_grad():
        backbone.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert backbone_sha256(backbone, torch.float32) != before


def test_refuses_arguments_for_a_module_and_modules_of_another_kind(folder):
    with pytest.raises(ValueError, match=r"\['img_size'\] belong to a backbone given by name"):
        Reference.from_pretrained(folder, make_backbone(), img_size=64)
    with pytest.raises(TypeError, match="backbone is a Linear, without forward_features"):
        Reference.from_pretrained(folder, nn.Linear(2, 2))


@models
def test_arguments_of_the_model_are_not_the_backbones(model_type, folder):
    with pytest.raises(
        TypeError, match=r"^prompt_length is a field of .*: expected config=InsVPConfig\(prompt_length=4\)$"
    ):
        model_type("vit_shapes_32", 3, prompt_length=4)
    for argument in ({"prompt_length": 4}, {"config": SMALL}):
        with pytest.raises(TypeError, match="was given: expected none, the configuration is that of what is loaded"):
            model_type.from_pretrained(folder, **argument)
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'flavour'$"):
        model_type.from_pretrained(folder, pretrained=False, flavour="sweet")
    with pytest.raises(TypeError, match="recompute was given: expected none, it is an attribute to be set after load"):
        InsVPViT.from_pretrained(folder, recompute="block")


# Wrong files

WRONG_DESCRIPTIONS = {
    "another adapter": (lambda v: v.update(peft_type="LORA"), r"peft_type is 'LORA': expected 'INSVP'"),
    "a newer format": (lambda v: v.update(format_version=2, future=1), "format_version is 2: expected at most 1"),
    "an unknown key": (lambda v: v.update(extra=1), "extra is unknown: expected"),
    "an unknown backbone key": (lambda v: v["backbone"].update(extra=1), r"backbone\.extra is unknown: expected"),
    "an unknown field": (lambda v: v["insvp"].update(extra=1), r"unknown configuration keys \['extra'\]"),
    "a missing key": (lambda v: v.pop("num_classes"), "num_classes is missing, found"),
    "a missing hash": (lambda v: v["backbone"].pop("sha256"), r"backbone\.sha256 is missing, found"),
    "a wrong type": (lambda v: v.update(num_classes="3"), "num_classes is '3': expected int"),
    "a wrong value": (lambda v: v["insvp"].update(prompt_length=-1), "prompt_length=-1: expected an integer of at"),
    "a wrong dtype": (lambda v: v["backbone"].update(dtype="Tensor"), r"backbone\.dtype is 'Tensor': expected a flo"),
    "no float": (
        lambda v: v["backbone"].update(dtype="int64"),
        r"backbone\.dtype is 'int64': expected a flo",
    ),
    "no count": (lambda v: v.update(num_classes=-1, class_names=None), "num_classes is -1: expected at least 0"),
    "no count of an integer": (
        lambda v: v.update(num_classes=10**30, class_names=None),
        "num_classes=10{30}: expected",
    ),
    "no names": (lambda v: v.update(class_names=[1, 2, 3]), "class_names has 1: expected text"),
    "no size of a tensor": (lambda v: v["insvp"].update(prompt_length=2**62), "invalid|overflow"),
    "no such images": (
        lambda v: v["preprocessing"].update(mean="gray"),
        r"preprocessing\.mean is 'gray': expected a num",
    ),
    "a mean of two": (
        lambda v: v["preprocessing"].update(mean=[0.5, 0.5]),
        r"preprocessing\.mean is \[0\.5, 0\.5\]: expected one number, or 3",
    ),
    "a mean of none": (
        lambda v: v["preprocessing"].update(mean=[]),
        r"mean is \[\]: expected a number for each channel",
    ),
    "a deviation of 0": (
        lambda v: v["preprocessing"].update(std=[0.5, 0.0, 0.5]),
        "expected a positive number for each",
    ),
    "a crop of nothing": (
        lambda v: v["preprocessing"].update(crop_pct=0),
        r"crop_pct is 0: expected a number in \(0, ",
    ),
    "a side alone": (lambda v: v["preprocessing"].update(input_size=[3, 32]), "expected channels, height and width"),
    "a hash of numbers": (
        lambda v: v.update(trained_on={"split_seed": 0, "undivided_sha256": 3}),
        "trained_on has split_seed 0 and undivided_sha256 3: expected an int, a str",
    ),
    "no mean": (lambda v: v["preprocessing"].pop("mean"), "preprocessing has no mean: expected input_size, mean and"),
    "nothing about images": (lambda v: v.update(preprocessing={}), "preprocessing has no input_size"),
    "a mean beyond floats": (
        lambda v: v["preprocessing"].update(mean=[10**400] * 3),
        r"preprocessing\.mean is \[1000",
    ),
    "a file to read": (
        lambda v: v["backbone"]["arguments"].update(checkpoint_path="/etc/passwd"),
        r"backbone\.arguments: found the argument checkpoint_path: expected those of an architecture",
    ),
    "eight bits": (
        lambda v: v["backbone"].update(dtype="float8_e4m3fn"),
        r"backbone\.dtype is 'float8_e4m3fn': expected a floating dtype",
    ),
    "a deviation of two": (
        lambda v: v["preprocessing"].update(std=[0.5, 0.5]),
        r"preprocessing\.std is \[0\.5, 0\.5\]: expected one number, or 3",
    ),
    "a mean of three for one channel": (
        lambda v: v["preprocessing"].update(input_size=[1, 32, 32]),
        r"preprocessing\.mean is \[0\.5, 0\.5, 0\.5\]: expected one number, or 1",
    ),
    "no deviation": (
        lambda v: v["preprocessing"].pop("std"),
        "preprocessing has no std: expected input_size, mean and",
    ),
    "a side of nothing": (
        lambda v: v["preprocessing"].update(input_size=[3, 32, 0]),
        r"input_size is \[3, 32, 0\]: expected channels, height and width",
    ),
    "a crop of eleven": (
        lambda v: v["preprocessing"].update(crop_pct=11),
        r"crop_pct is 11: expected a number in \(0, ",
    ),
    "a mode of cropping": (lambda v: v["preprocessing"].update(crop_mode=3), "crop_mode is 3: expected text"),
    "an interpolation": (lambda v: v["preprocessing"].update(interpolation=3), "interpolation is 3: expected text"),
    "a seed of text": (
        lambda v: v.update(trained_on={"split_seed": "0"}),
        "trained_on has split_seed '0' and undivided_sha256 None: expected an int, a str",
    ),
    "too many names": (
        lambda v: v["class_names"].append("x"),
        "class_names has 4 names: expected one for each of the 3",
    ),
    "too few names": (lambda v: v["class_names"].pop(), "class_names has 2 names: expected one for each of the 3"),
    "a wrong list": (lambda v: v.update(class_names="cat"), r"class_names is 'cat': expected list \| None"),
    "too deep": (lambda v: v["insvp"].update(prompted_blocks=[5]), "asks for block 5"),
}


def refused(folder: Path, message: str, file: str) -> None:
    """The adapter is refused with a message that names the file, and the backbone is as it was."""
    backbone = make_backbone()
    before = backbone.head, backbone.training, backbone.head.weight.requires_grad
    with pytest.raises(CheckpointError, match=message) as caught:
        Reference.from_pretrained(folder, backbone)
    assert str(caught.value).startswith(str(folder / file))
    assert (backbone.head, backbone.training, backbone.pos_embed.requires_grad) == before


@pytest.mark.parametrize(("change", "message"), WRONG_DESCRIPTIONS.values(), ids=WRONG_DESCRIPTIONS)
def test_refuses_a_wrong_description(folder, change, message):
    edit(folder, change)
    refused(folder, message, FILES[1])


def places(values: Any, place: tuple = ()) -> Iterator[tuple]:
    """The keys and indices that lead to each value in JSON."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield *place, key
        yield from places(value, (*place, key))


HOSTILE = [None, -1, 10**18, 10**30, 10**400, math.nan, "x", [], ["x", 3], {"x": 1}]


@pytest.mark.filterwarnings("ignore:.*the position embeddings, resampled:UserWarning")
@pytest.mark.parametrize("method", ["insvp", "lora", "vpt_deep"])
def test_no_value_of_a_description_is_a_traceback(method, tmp_path):
    save_backbone(make_backbone(), tmp_path / "backbone.safetensors")
    backbone = create_backbone(str(tmp_path / "backbone.safetensors"), num_classes=0)
    own = copy.deepcopy(backbone)
    make = InsVPViT(own, 3, SMALL) if method == "insvp" else create_method_model(method, own, 3)
    make.trained_on = {"data": "x", "split_seed": 0, "splits": "in words", "undivided_sha256": None}
    make.save_pretrained(tmp_path, CLASSES, PREPROCESSING | {"crop_mode": "center"})
    original = json.loads((tmp_path / FILES[1]).read_text())
    refused = Counter()
    for *outer, last in places(original):
        for value in HOSTILE:
            if "arguments" in outer and isinstance(value, int):  # timm would build that many blocks
                continue
            values = copy.deepcopy(original)
            functools.reduce(operator.getitem, outer, values)[last] = value
            (tmp_path / FILES[1]).write_text(json.dumps(values))
            try:
                model = load_model(tmp_path, None if "backbone" in outer else copy.deepcopy(backbone))
                if model.preprocessing and (last, value) not in itertools.product((0, 1, 2), (10**18, 10**30, 10**400)):
                    transform_for(model.preprocessing)(Image.new("RGB", (40, 50)))
                refused[False] += 1
            except InsVPError:
                refused[True] += 1
    assert refused[True] > 2 * refused[False] > 0


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"architectures": []}', "\x80", "[" * 100_000])
def test_refuses_a_foreign_description(folder, content):
    (folder / FILES[1]).write_text(content, encoding="latin-1")
    refused(folder, "found no JSON|not an InsVP adapter", FILES[1])


WRONG_TENSORS = {
    "missing": (lambda t: t.pop("head.bias"), r"head\.bias is missing: expected shape \(3,\)"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), r"found the unexpected extra of shape \(2,\)"),
    "of the backbone": (lambda t: t.update({"backbone.norm.bias": torch.ones(48)}), "the unexpected backbone.norm"),
    "of another shape": (
        lambda t: t.update({"common_prompts.1": torch.ones(5, 48)}),
        r"common_prompts\.1 has shape \(5, 48\): expected \(2, 48\)",
    ),
    "all missing": (lambda t: t.clear(), "and 15 more"),
    "of integers": (
        lambda t: t.update({"head.bias": torch.ones(3, dtype=torch.int8)}),
        "head.bias has dtype torch.int8: expected floating-point numbers",
    ),
    "a single number": (
        lambda t: t.update({"common_prompts.0": torch.ones(())}),
        r"common_prompts\.0 has shape \(\): expected \(2, 48\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_refuses_wrong_tensors(folder, change, message):
    tensors = safetensors.torch.load_file(folder / FILES[2])
    change(tensors)
    safetensors.torch.save_file(tensors, folder / FILES[2])
    refused(folder, message, FILES[2])


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_refuses_a_truncated_file(folder, size):
    content = (folder / FILES[2]).read_bytes()
    (folder / FILES[2]).write_bytes(content[:size])
    refused(folder, "found a truncated or foreign file", FILES[2])


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("dump", [torch.save, lambda bomb, file: file.write_bytes(pickle.dumps(bomb))])
def test_unpickles_no_code(folder, dump):
    dump(Bomb(folder / "marker"), folder / FILES[2])
    refused(folder, "found a truncated or foreign file", FILES[2])
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("name", FILES[1:])
def test_refuses_a_folder_without_the_files(folder, name):
    (folder / name).unlink()
    refused(folder, f"not an adapter: found .*README.*: expected {name}", "")


def test_what_the_trainer_of_transformers_saves_is_no_adapter_yet(tmp_path):
    for name in ("model.safetensors", "training_args.bin"):
        (tmp_path / name).touch()
    with pytest.raises(
        CheckpointError, match=r"expected adapter_config.json; what the Trainer .* load_state_dict, into"
    ):
        Reference.from_pretrained(tmp_path)


# Saving


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_files(folder, monkeypatch, step):
    before = {name: (folder / name).read_bytes() for name in FILES}

    def interrupt(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, step, interrupt)
    with pytest.raises(OSError, match="no space left"):
        make_model(seed=1).save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_replaces_an_adapter_and_keeps_other_files(folder):
    (folder / "config.json").write_text("of a training run")
    (folder / FILES[0]).write_text("a card that somebody wrote")
    model = make_model(seed=1)
    model.save_pretrained(folder)
    assert (folder / "config.json").read_text() == "of a training run"
    assert (folder / FILES[0]).read_text() == "a card that somebody wrote"
    again = Reference.from_pretrained(folder, make_backbone(seed=1))
    assert torch.equal(logits(again), logits(model))
    assert again.class_names is None
    assert again.preprocessing is None


def test_class_names_of_every_kind_come_back(tmp_path):
    names = ["é ü", "猫", "latin \udce9"]  # the last as Python decodes a folder's name that is no UTF-8
    make_model().save_pretrained(tmp_path, class_names=names)
    assert Reference.from_pretrained(tmp_path, make_backbone()).class_names == names


def test_names_are_remembered_and_must_fit(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="class_names has 2 names: expected one for each of the 3 classes"):
        model.save_pretrained(tmp_path, ["a", "b"])
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path, CLASSES, PREPROCESSING)
    model.save_pretrained(tmp_path)
    assert Reference.from_pretrained(tmp_path, make_backbone()).class_names == CLASSES


@models
def test_the_mixin_leaves_the_constructor_alone(model_type):
    backbone = make_backbone()
    model = model_type(backbone, num_classes=3, config=SMALL)
    assert model.backbone is backbone
    assert model.config is SMALL
    assert model.class_names is model.preprocessing is None
    assert model_type(NAME, 3, **SIZES).config == InsVPConfig()


@models
def test_copies_and_keeps_its_names(tmp_path, model_type):
    model = make_model(model_type)
    model.save_pretrained(tmp_path, CLASSES, PREPROCESSING)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    other.class_names[0] = "lion"
    other.save_pretrained(tmp_path)
    assert model.class_names == CLASSES
    assert model_type.from_pretrained(tmp_path, make_backbone()).class_names[0] == "lion"


# The Hub


class FakeHub:
    """Stands in for ``HfApi`` and keeps what is uploaded."""

    uploaded: dict[str, Any]

    def __init__(self, token: str | None = None) -> None: ...

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Repository", (), {"repo_id": f"someone/{repo_id}"})

    def upload_folder(self, repo_id: str, folder_path: Path, **kwargs: Any) -> str:
        content = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        type(self).uploaded = {"repo_id": repo_id, "files": content, "commit_message": kwargs["commit_message"]}
        return "address of the commit"


def test_uploads_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(AdapterCheckpoint, "push_to_hub", lambda *args, **kwargs: pytest.fail("uploaded"))
    make_model().save_pretrained(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="uploaded"):
        make_model().save_pretrained(tmp_path, push_to_hub=True)
    names = []
    monkeypatch.setattr(AdapterCheckpoint, "push_to_hub", lambda model, name, **_: names.append(name))
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(".", push_to_hub=True)
    assert names == [tmp_path.name]


def test_uploads_the_three_files(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_mixin, "HfApi", FakeHub)
    address = make_model().save_pretrained(tmp_path / "flowers", CLASSES, push_to_hub=True, commit_message="New")
    assert address == "address of the commit"
    assert FakeHub.uploaded["repo_id"] == "someone/flowers"
    assert FakeHub.uploaded["commit_message"] == "New"
    assert FakeHub.uploaded["files"] == {file.name: file.read_bytes() for file in (tmp_path / "flowers").iterdir()}
    make_model().push_to_hub("petals")
    assert sorted(FakeHub.uploaded["files"]) == FILES
    with pytest.raises(ValueError, match="config was given: expected None"):
        make_model().push_to_hub("petals", config={"a": 1})


def test_downloads_the_two_files(folder, monkeypatch):
    asked = []

    def download(repo_id: str, name: str, **kwargs: Any) -> str:
        asked.append((repo_id, name, kwargs["revision"], kwargs["local_files_only"]))
        return str(folder / name)

    monkeypatch.setattr(files, "hf_hub_download", download)
    model = Reference.from_pretrained("someone/flowers", make_backbone(), revision="v2", local_files_only=True)
    assert asked == [("someone/flowers", name, "v2", True) for name in FILES[1:]]
    assert torch.equal(logits(model), logits(make_model()))


@pytest.mark.parametrize("place", ["someone/flowers", "not/an/adapter/anywhere"])
def test_says_that_an_adapter_cannot_be_had(tmp_path, place):
    with pytest.raises(CheckpointError, match=f"{place}: found no such folder, and no repository"):
        Reference.from_pretrained(place, make_backbone(), local_files_only=True, cache_dir=tmp_path)


def test_stays_offline_when_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="someone/flowers: found no such folder, and no repository"):
        Reference.from_pretrained("someone/flowers", make_backbone(), cache_dir=tmp_path)


def test_images_of_one_channel_are_described(tmp_path):
    model = Reference(make_backbone(in_chans=1), 3, SMALL)
    gray = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    model.save_pretrained(tmp_path, CLASSES, gray)
    assert Reference.from_pretrained(tmp_path, make_backbone(in_chans=1)).preprocessing == gray
