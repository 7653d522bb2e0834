"""Backbone weights in every format: files are written here by other names, and give the outputs that they came from."""

import contextlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from timm import create_model
from torch import nn

from insvp_fast.checkpoints.backbone import create_backbone, weights_report
from insvp_fast.checkpoints.files import read_npz, read_torch, read_weights
from insvp_fast.checkpoints.state_dict import backbone_sha256
from insvp_fast.commands import cli
from insvp_fast.errors import CheckpointError

VIT, SMALL = "vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
CLIP, SIGLIP = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224"
DINOV2, DINOV3 = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
SWIN = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 2, "img_size": 32, "num_classes": 5}


def model_of(name: str = VIT, **arguments) -> nn.Module:
    """A tiny model whose weights are all random, also those that begin as zeros or ones."""
    torch.manual_seed(3)
    arguments = arguments if name.startswith("swin") else SMALL | {"img_size": 32} | arguments
    model = create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.2))
    return model


def renamed(state: dict, *rules: tuple[str, str], prefix: str = "") -> dict:
    for old, new in rules:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return {prefix + key: value.clone() for key, value in state.items()}


def body(model: nn.Module) -> dict:
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def noise(*names: str) -> dict:
    return {name: torch.randn(3, 3) for name in names}


# The formats: of a model, what somebody's file of it holds


def moco(model):
    base = renamed(body(model), prefix="module.base_encoder.")
    beside = noise(
        "module.base_encoder.head.0.weight", "module.momentum_encoder.cls_token", "module.predictor.0.weight"
    )
    return {"epoch": 300, "arch": "vit_base", "state_dict": base | beside, "optimizer": {"state": {}}}


def moco_linear(model):
    return {"arch": "vit_base", "best_acc1": torch.ones(1), "state_dict": renamed(model.state_dict(), prefix="module.")}


def mae(model):
    return {"model": body(model) | noise("mask_token", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")}


def dino(model):
    teacher = renamed(body(model), prefix="backbone.") | noise("head.mlp.0.weight", "head.last_layer.weight_g")
    student = {f"module.{key}": value + 1 for key, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 3, "dino_loss": {"center": torch.zeros(1, 3)}}


def dinov2(model):
    state = body(model) | noise("mask_token")
    position = torch.randn(1, 1, 32)
    original = state["cls_token"].clone()
    model.cls_token.data = original + position  # where timm keeps the sum
    registers = {"register_tokens": state.pop("reg_token"), "cls_token": original}
    return state | registers | {"pos_embed": torch.cat([position, state["pos_embed"]], dim=1)}


def dinov2_teacher(model):
    """Of a training in chunks of one block."""
    chunks = renamed(dinov2(model), (r"^blocks\.(\d)\.", r"blocks.\1.\1."), prefix="backbone.")
    return {"teacher": chunks | noise("dino_head.mlp.0.weight", "ibot_head.last_layer.weight_v")}


def dinov3(model):
    state = renamed(body(model), (r"\.gamma_(\d)", r".ls\1.gamma"), ("^reg_token", "storage_tokens"))
    for i in range(2):
        q, v = (state.pop(f"blocks.{i}.attn.{name}_bias", torch.zeros(32)) for name in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full((32,), 9.0), v])  # the mask hides that of keys
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
    return state | noise("mask_token", "rope_embed.periods")


def without_bias(model):
    """CLIP's projection has none."""
    model.head.bias.data.zero_()
    return model.state_dict()


def clip(model):
    names = (
        (r"^patch_embed\.proj", "conv1"),
        (r"^cls_token", "class_embedding"),
        (r"^pos_embed", "positional_embedding"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm(\d)", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"fc1", "c_fc"),
        (r"fc2", "c_proj"),
        (r"^blocks", "transformer.resblocks"),
        (r"^head\.weight", "proj"),
    )
    state = renamed(without_bias(model), *names, prefix="visual.")
    del state["visual.head.bias"]
    for key, take in {"class_embedding": (0, 0), "positional_embedding": (0,)}.items():
        state[f"visual.{key}"] = state[f"visual.{key}"][take]
    state["visual.proj"] = state["visual.proj"].T
    return state | noise("transformer.resblocks.0.ln_1.weight", "positional_embedding", "logit_scale", "context_length")


def open_clip(model):
    state = renamed(without_bias(model), prefix="visual.trunk.")
    state["visual.head.proj.weight"] = state.pop("visual.trunk.head.weight")
    del state["visual.trunk.head.bias"]
    return {"state_dict": state | noise("text.transformer.resblocks.0.ln_1.weight", "logit_scale", "logit_bias")}


def unpacked(state: dict, q: str, k: str, v: str) -> dict:
    """Query, key and value as tensors of their own."""
    out = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for name, part in zip((q, k, v), value.chunk(3), strict=True):
                out[key.replace("attn.qkv", name)] = part.clone()
        else:
            out[key] = value
    return out


HF_VIT = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^blocks", "encoder.layer"),
    (r"attn\.proj", "attention.output.dense"),
    (r"^norm\.", "layernorm."),
)
HF_MLP = (
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
)
BERT = [f"attention.attention.{name}" for name in ("query", "key", "value")]


def hf_vit(model):
    vit = renamed(unpacked(body(model), *BERT), *HF_VIT, *HF_MLP, prefix="vit.")
    head = {f"classifier.{key}": value for key, value in model.head.state_dict().items()}
    return vit | head | noise("vit.pooler.dense.weight")


def hf_dinov2(model):
    return renamed(unpacked(dinov2(model), *BERT), *HF_VIT, (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"))


HF_TOWER = (
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding.weight"),
    (r"^norm_pre", "pre_layrnorm"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks", "encoder.layers"),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^(encoder.*)attn\.proj", r"\1self_attn.out_proj"),
)
TEXT = ("text_model.embeddings.token_embedding.weight", "text_projection.weight", "logit_scale")


def hf_tower(state):
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    state = renamed(unpacked(state, *names), *HF_TOWER, prefix="vision_model.")
    state["vision_model.embeddings.position_embedding.weight"].squeeze_(0)
    return state | noise(*TEXT, "vision_model.embeddings.position_ids")  # a buffer of older versions


def hf_clip(model):
    state = hf_tower({key: value for key, value in without_bias(model).items() if not key.startswith("head.")})
    state["vision_model.embeddings.class_embedding"].squeeze_()
    return state | {"visual_projection.weight": model.head.weight}


def hf_siglip(model):
    pool = {key: value for key, value in body(model).items() if key.startswith("attn_pool.")}
    state = hf_tower({key: value for key, value in body(model).items() if key not in pool})
    pool = renamed(
        pool,
        (r"attn_pool\.latent", "probe"),
        (r"attn_pool\.proj", "attention.out_proj"),
        ("attn_pool.norm", "layernorm"),
    )
    for kind in ("weight", "bias"):
        parts = [pool.pop(f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        pool[f"attention.in_proj_{kind}"] = torch.cat(parts)
    return state | {f"vision_model.head.{key.removeprefix('attn_pool.')}": value for key, value in pool.items()}


def swin(model):
    """Microsoft's, where a stage ends with its downsampling."""
    state = renamed(model.state_dict(), (r"^layers\.1\.downsample", "layers.0.downsample"), (r"^head\.fc\.", "head."))
    return {"model": state | noise("layers.0.blocks.0.attn.relative_position_index", "layers.1.blocks.1.attn_mask")}


def beit(model):
    return {"module": model.state_dict() | noise("blocks.0.attn.relative_position_index")}


FORMATS = {  # name: format, writer, architecture, arguments, what is left out
    "timm": ("timm", lambda m: m.state_dict(), VIT, {}, None),
    "EMA": (
        "timm",
        lambda m: {"state_dict": noise("cls_token"), "state_dict_ema": m.state_dict()},
        VIT,
        {},
        "state_dict",
    ),
    "MoCo-v3": ("MoCo-v3", moco, VIT, {}, r"momentum encoder \(1 tensor\), projection head \(2 tensors\)"),
    "MoCo-v3, linear": ("timm", moco_linear, VIT, {}, None),
    "MAE": ("MAE", mae, VIT, {}, r"decoder \(2 tensors\), mask token"),
    "DINO": ("DINO", dino, VIT, {}, r"projection head \(2 tensors\), student \("),
    "DINOv2": ("DINOv2", dinov2, DINOV2, {"img_size": 28}, "mask token"),
    "DINOv2, teacher": ("DINO", dinov2_teacher, DINOV2, {"img_size": 28}, "mask token .*projection head"),
    "DINOv3": ("DINOv3", dinov3, DINOV3, {}, "buffers .*mask token"),
    "DINOv3 with biases": ("DINOv3", dinov3, f"{DINOV3}_qkvb", {}, "buffers .*mask token"),
    "CLIP": ("CLIP", clip, CLIP, {}, r"text tower \(4 tensors\)"),
    "open_clip": ("open_clip", open_clip, VIT, {}, r"text tower \(3 tensors\)"),
    "Hugging Face ViT": ("Hugging Face", hf_vit, VIT, {}, "pooler"),
    "Hugging Face DINOv2": ("Hugging Face", hf_dinov2, DINOV2, {"img_size": 28}, "mask token"),
    "Hugging Face CLIP": ("Hugging Face CLIP", hf_clip, CLIP, {}, r"buffers \(1 tensor\), .*text tower \(3 tensors\)"),
    "Hugging Face SigLIP": ("Hugging Face SigLIP", hf_siglip, SIGLIP, {}, r"text tower \(3 tensors\)"),
    "Swin": ("timm", swin, "swin_tiny_patch4_window7_224", SWIN, r"buffers \(2 tensors\)"),
    "BEiT": ("timm", beit, "beit_base_patch16_224", {}, "buffers"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_gives_the_outputs_of_its_model(kind, tmp_path):
    found, write, name, arguments, left_out = FORMATS[kind]
    model = model_of(name, **arguments)
    torch.save(write(model), tmp_path / "weights.pth")
    arguments = arguments if kind == "Swin" else SMALL | {"img_size": 32} | arguments
    images = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])

    backbone = create_backbone(f"{name}@{tmp_path / 'weights.pth'}", **arguments | {"num_classes": 0}).eval()
    assert torch.equal(backbone.forward_features(images), model.forward_features(images))
    assert weights_report(backbone).startswith(f"{found} weights")
    assert re.search(f"left out: .*{left_out}", weights_report(backbone)) if left_out else True
    if kind in ("timm", "MoCo-v3, linear", "CLIP", "open_clip", "Hugging Face ViT", "Hugging Face CLIP", "Swin"):
        whole = create_backbone(f"{name}@{tmp_path / 'weights.pth'}", **arguments).eval()
        assert torch.equal(whole(images), model(images))
        assert "head" not in weights_report(whole).replace("projection head", "")
    elif kind == "Hugging Face SigLIP":  # the pooling is part of it
        assert torch.equal(backbone(images), model.forward_head(model.forward_features(images), pre_logits=True))


# JAX


def jax(model, root="", original=True, stacked=False):
    """Google's names: kernels are transposed, with one axis for the heads."""
    state, heads = {key: value.numpy() for key, value in model.state_dict().items()}, 2
    mha, mlp, norm2 = (1, 3, 2) if original else (0, 0, 1)
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding" if original else "pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "cls_token" in state:
        out["cls"] = state["cls_token"]
    if "head.weight" in state:
        out |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}

    def attention(to, parts, proj):
        for name, (weight, bias) in parts.items():
            out[f"{to}/{name}/kernel"] = weight.T.reshape(-1, heads, len(weight) // heads)
            out[f"{to}/{name}/bias"] = bias.reshape(heads, -1)
        out[f"{to}/out/kernel"] = state[f"{proj}.weight"].T.reshape(heads, -1, len(state[f"{proj}.weight"]))
        out[f"{to}/out/bias"] = state[f"{proj}.bias"]

    def plain(to, source, kernel="kernel"):
        out[f"{to}/{kernel}"], out[f"{to}/bias"] = state[f"{source}.weight"].T, state[f"{source}.bias"]

    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        split = [np.split(state[f"{ours}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias")]
        parts = dict(zip(("query", "key", "value"), zip(*split, strict=True), strict=True))
        attention(f"{theirs}/MultiHeadDotProductAttention_{mha}", parts, f"{ours}.attn.proj")
        plain(f"{theirs}/LayerNorm_0", f"{ours}.norm1", "scale")
        plain(f"{theirs}/LayerNorm_{norm2}", f"{ours}.norm2", "scale")
        plain(f"{theirs}/MlpBlock_{mlp}/Dense_0", f"{ours}.mlp.fc1")
        plain(f"{theirs}/MlpBlock_{mlp}/Dense_1", f"{ours}.mlp.fc2")
    if "attn_pool.latent" in state:
        kv = [np.split(state[f"attn_pool.kv.{kind}"], 2) for kind in ("weight", "bias")]
        parts = dict(zip(("key", "value"), zip(*kv, strict=True), strict=True))
        parts["query"] = (state["attn_pool.q.weight"], state["attn_pool.q.bias"])
        attention("MAPHead_0/MultiHeadDotProductAttention_0", parts, "attn_pool.proj")
        plain("MAPHead_0/LayerNorm_0", "attn_pool.norm", "scale")
        plain("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1")
        plain("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2")
        out["MAPHead_0/probe"] = state["attn_pool.latent"]
    if stacked:  # all blocks in one array
        blocks = [{k: out.pop(k) for k in list(out) if f"encoderblock_{i}/" in k} for i in range(len(model.blocks))]
        for key, value in blocks[0].items():
            rest = [block[key.replace("encoderblock_0/", f"encoderblock_{i}/")] for i, block in enumerate(blocks)]
            assert rest[0] is value
            out[key.replace("encoderblock_0/", "encoderblock/")] = np.stack(rest)
    return {root + key: value for key, value in out.items()}


OPTIMIZER = {"opt/state/step": np.zeros(1, int)}
PRE_LOGITS = {"pre_logits/kernel": np.zeros((2, 2), np.float32)}
SIGLIP_JAX = {"root": "params/img/", "original": False}
JAX = {
    "augreg": (VIT, {}, {}, r"JAX weights"),
    "original": (VIT, {}, PRE_LOGITS, r"representation layer \(1 tensor\)"),
    "original, training": (VIT, {"root": "opt/target/"}, OPTIMIZER, r"optimizer \(1 tensor\)"),
    "SigLIP": (SIGLIP, SIGLIP_JAX, {"params/t": np.ones(1)}, r"text tower \(1 tensor\)"),
    "SigLIP, stacked": (SIGLIP, SIGLIP_JAX | {"stacked": True}, {}, r"JAX weights"),
}


@pytest.mark.parametrize("kind", JAX)
def test_an_npz_file_gives_the_outputs_of_its_model(kind, tmp_path):
    name, layout, more, report = JAX[kind]
    model = model_of(name, num_classes=0 if name == SIGLIP else 5)
    np.savez(tmp_path / "weights.npz", **jax(model, **layout), **more)
    arguments = SMALL | {"img_size": 32, "num_classes": model.num_classes}
    backbone = create_backbone(f"{name}@{tmp_path / 'weights.npz'}", **arguments).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), model(images))
    assert re.search(report, weights_report(backbone))


PIXELS = "patch_embed.proj.weight adapted from (32, 3, 16, 16) to"
ADAPTED = [
    ({"img_size": 64}, "pos_embed adapted from (1, 5, 32) to (1, 17, 32)"),
    ({"img_size": 32, "in_chans": 1}, f"{PIXELS} (32, 1, 16, 16)"),
    ({"img_size": 32, "in_chans": 2}, f"{PIXELS} (32, 2, 16, 16)"),
    ({"img_size": 32, "in_chans": 5}, f"{PIXELS} (32, 5, 16, 16)"),
]


@pytest.mark.parametrize(("arguments", "report"), ADAPTED)
@pytest.mark.parametrize("kind", ["npz", "timm", "HF"])
def test_other_sizes_and_channels_are_adapted_as_timm_does_and_said(kind, arguments, report, tmp_path):
    model, place = model_of(), tmp_path / ("weights.npz" if kind == "npz" else "weights.safetensors")
    if kind == "npz":
        np.savez(place, **jax(model))
    else:
        safetensors.torch.save_file(hf_vit(model) if kind == "HF" else model.state_dict(), place)
    backbone = create_backbone(f"{VIT}@{place}", **SMALL, **arguments)
    if kind != "npz":
        safetensors.torch.save_file(model.state_dict(), place)
    expected = create_model(VIT, **SMALL, **arguments, pretrained=True, pretrained_cfg_overlay=overlay(place))
    assert torch.equal(backbone.pos_embed, expected.pos_embed)
    assert backbone_sha256(backbone, torch.float32) == backbone_sha256(expected, torch.float32)
    assert report in weights_report(backbone)


def test_channels_of_files_are_those_of_rgb_images_or_the_models(tmp_path):
    """Others are not guessed."""
    model, place = model_of(in_chans=4), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), place)
    backbone = create_backbone(f"{VIT}@{place}", **SMALL, img_size=32, in_chans=4)
    assert backbone_sha256(backbone, torch.float32) == backbone_sha256(model, torch.float32)
    with pytest.raises(
        CheckpointError, match=r"patch_embed.proj.weight has shape \(32, 4, 16, 16\): expected \(32, 3, "
    ):
        create_backbone(f"{VIT}@{place}", **SMALL, img_size=32)


def test_resampling_is_told_from_the_position_of_the_class_token(tmp_path):
    source, arguments = f"{DINOV2}@{tmp_path / 'weights.pth'}", SMALL | {"num_classes": 0}
    torch.save(dinov2(model_of(DINOV2, img_size=28)), tmp_path / "weights.pth")
    assert "adapted" not in weights_report(create_backbone(source, **arguments, img_size=28))
    report = weights_report(create_backbone(source, **arguments, img_size=56))
    assert "pos_embed adapted from (1, 4, 32) to (1, 16, 32)" in report


def overlay(place) -> dict:
    return {"file": str(place), "num_classes": 5, "custom_load": place.suffix == ".npz"}


# Files


def test_the_commands_say_what_was_left_out(tmp_path, capsys):
    torch.save(moco(create_model("test_vit")), tmp_path / "moco.pth")
    assert cli.main(["info", f"test_vit@{tmp_path / 'moco.pth'}"]) == 0
    assert re.search(r"^weights +MoCo-v3 weights; left out: momentum encoder", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth", "index"])
def test_every_kind_of_file_is_read(suffix, tmp_path):
    model = model_of()
    if suffix == "index":
        file, state = tmp_path / "model.safetensors.index.json", model.state_dict()
        names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
        for shard in set(names.values()):
            safetensors.torch.save_file({k: v for k, v in state.items() if names[k] == shard}, tmp_path / shard)
        file.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        file = tmp_path / f"model.{suffix}"
        (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(model.state_dict(), file)
    backbone = create_backbone(f"{VIT}@{file}", **SMALL, img_size=32)
    assert backbone_sha256(backbone, torch.float32) == backbone_sha256(model, torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "found no index of safetensors"),
        ("3", "found no index of safetensors"),
        ("{}", "found no index of safetensors"),
        ('{"weight_map": 3}', "found no index of safetensors"),
        ('{"weight_map": {"a": "w.safetensors", "b": 3}}', "found no index of safetensors"),
        ('{"weight_map": {"a": ["w.safetensors"]}}', "found no index of safetensors"),
        ('{"weight_map": {"a": 3}}', "found the file 3: expected one beside it"),
        ('{"weight_map": {"a": "../w.safetensors"}}', "found the file '../w.safetensors': expected one beside it"),
        ('{"weight_map": {"a": "v.safetensors"}}', "found the file 'v.safetensors': expected one beside it"),
        (json.dumps({"weight_map": {"a": "v" * 300}}), "found the file 'v{300}': expected one beside it"),
        ("[" * 100_000, "found no index of safetensors"),
        ('{"weight_map": {"b": "w.safetensors"}}', r"differ in \['a', 'b'\]: expected the same tensors"),
    ],
)
def test_a_wrong_index_of_files_is_refused(content, message, tmp_path):
    folder, index = tmp_path / "in", tmp_path / "in" / "model.safetensors.index.json"
    folder.mkdir()
    for file in (tmp_path / "w.safetensors", folder / "w.safetensors"):
        safetensors.torch.save_file({"a": torch.ones(1)}, file)
    index.write_text(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors.index.json: .*{message}"):
        read_weights(index)


def test_a_head_of_another_size_is_left_out_with_a_warning(tmp_path):
    torch.save(model_of().state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"left out: head \(2 tensors\); no head that fits"):
        backbone = create_backbone(f"{VIT}@{tmp_path / 'w.pth'}", **SMALL | {"num_classes": 7}, img_size=32)
    assert backbone_sha256(backbone, torch.float32) == backbone_sha256(model_of(), torch.float32)


# Refusals


class Trap:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (self.place.touch, ())


def changed(state: dict, **changes) -> dict:
    return {key: value for key, value in (state | changes).items() if value is not None}


LANGUAGE_MODEL = ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight")
LOST_BIAS = {f"blocks.{i}.attn.qkv.bias": torch.ones(96) for i in range(2)}
WRONG = {
    "a language model": (lambda m: noise(*LANGUAGE_MODEL), "found the names .*transformer.h.0.*expected a VisionTr"),
    "an unknown tensor": (lambda m: m.state_dict() | noise("adapter.weight"), "found the unexpected adapter.weight"),
    "a block is missing": (
        lambda m: {k: v for k, v in m.state_dict().items() if "blocks.1" not in k},
        "not weights of this model: blocks.1.norm1.weight is missing",
    ),
    "a block too many": (lambda m: model_of(depth=3).state_dict(), "unexpected blocks.2.norm1.weight"),
    "no shape of a ViT": (
        lambda m: changed(hf_vit(m), **{"vit.embeddings.cls_token": torch.tensor(1.0)}),
        "not weights of this model: tuple index out of range",
    ),
    "another width": (lambda m: model_of(embed_dim=64).state_dict(), r"cls_token has shape \(1, 1, 64\)"),
    "a key is missing": (
        lambda m: changed(hf_vit(m), **{"vit.encoder.layer.0.attention.attention.key.weight": None}),
        r"blocks.0.attn.\* has the weight of \['q', 'v'\] only",
    ),
    "one name twice": (lambda m: moco(m)["state_dict"] | noise("cls_token"), "found cls_token twice"),
    "integers": (
        lambda m: {k: v.to(torch.int8) for k, v in m.state_dict().items()},
        "cls_token has dtype torch.int8: expected floating",
    ),
    "nothing": (lambda m: {}, "found the names \\[\\]"),
}


@pytest.mark.parametrize(("write", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_known_is_refused(write, message, tmp_path):
    torch.save(write(model_of()), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=f"weights.pth: .*{message}") as caught:
        create_backbone(f"{VIT}@{tmp_path / 'weights.pth'}", **SMALL, img_size=32)
    assert "\n" not in str(caught.value)


def test_biases_that_timm_would_lose_are_refused(tmp_path):
    torch.save(dinov3(model_of(f"{DINOV3}_qkvb")), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="blocks.0.attn.qkv.bias is not zero"):
        create_backbone(f"{DINOV3}@{tmp_path / 'weights.pth'}", **SMALL, img_size=32)


WRONG_NPZ = {
    "a block is missing": ({"Transformer/encoderblock_1/LayerNorm_0/scale": None}, "not weights of this model"),
    "a block too many": (
        {"Transformer/encoderblock_2/LayerNorm_0/bias": np.ones(32, np.float32)},
        "found 25,733 numbers",
    ),
    "one number for many": ({"Transformer/encoder_norm/bias": np.ones(1, np.float32)}, "not weights of this model"),
    "another width": ({"embedding/bias": np.ones(64, np.float32)}, "not weights of this model"),
    "an unknown name": ({"Transformer/encoderblock_1/LayerScale_0/scale": np.ones(32)}, "found .*LayerScale_0"),
    "integers": ({"embedding/bias": np.ones(32, int)}, "embedding/bias of int64"),
    "no ViT": ({"embedding/kernel": None}, "such as embedding/kernel"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_NPZ.values(), ids=WRONG_NPZ)
def test_a_wrong_npz_file_is_refused(changes, message, tmp_path):
    np.savez(tmp_path / "weights.npz", **changed(jax(model_of()), **changes))
    with pytest.raises(CheckpointError, match=f"weights.npz: .*{message}"):
        create_backbone(f"{VIT}@{tmp_path / 'weights.npz'}", **SMALL, img_size=32)


def test_an_npz_file_is_for_models_that_timm_reads_it_into(tmp_path):
    np.savez(tmp_path / "weights.npz", **jax(model_of()))
    with pytest.raises(CheckpointError, match="expected another one for a SwinTransformer"):
        create_backbone(f"swin_tiny_patch4_window7_224@{tmp_path / 'weights.npz'}", **SWIN)
    with pytest.raises(CheckpointError, match="not weights of this model: blocks.0.ls1.gamma is missing"):
        create_backbone(f"{VIT}@{tmp_path / 'weights.npz'}", **SMALL, img_size=32, init_values=1.0)


@pytest.mark.parametrize("position", [3, 12, 33, 60, 200])
def test_a_damaged_file_is_an_error_of_checkpoints(position, tmp_path):
    """Whichever of its many errors the unpickler raises."""
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    content = bytearray(file.read_bytes())
    for value in range(0, 256, 5):
        content[position] = value
        file.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            read_torch(file)


def test_a_damaged_or_foreign_npz_file_is_an_error_of_checkpoints(tmp_path):
    streams = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(streams[0], a=np.arange(1000))
    np.save(streams[1], np.ones(3))
    np.savez(streams[2], a=np.array([{}], dtype=object))
    whole, array, objects = (stream.getvalue() for stream in streams)
    damaged = whole[:60] + b"\xff" * 10 + whole[70:]
    for content in (b"", b"text", array, whole[:100], damaged, pickle.dumps({"a": 1})):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x.npz: found a truncated or foreign file in it: expected arrays"):
            read_npz(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(objects)
    with pytest.raises(CheckpointError, match=r"x.npz: found a pickle in it: expected arrays"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda file: torch.save({"a": Path()}, file), "one with code, .*: it asks for pathlib.PosixPath"),
        (lambda file: torch.save({"a": torch.ones(1)}, file, pickle_protocol=4), "not tensors of torch.save$"),
        (
            lambda file: torch.jit.save(torch.jit.script(nn.Identity()), file),
            "found a TorchScript archive, which is",
        ),
    ],
    ids=["path", "protocol", "TorchScript"],
)
def test_a_file_with_code_is_refused_in_one_error(save, message, tmp_path, recwarn):
    save(tmp_path / "x.pth")
    recwarn.clear()  # of what torch says about TorchScript
    with pytest.raises(CheckpointError, match=f"x.pth: .*{message}"):
        read_torch(tmp_path / "x.pth")
    assert not recwarn.list
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pth")


@pytest.mark.parametrize("file", ["weights.npz", "weights.pth", "weights.bin"])
def test_no_code_is_run(file, tmp_path):
    model, trap = model_of(), Trap(tmp_path / "sprung")
    if file.endswith("npz"):
        np.savez(tmp_path / file, **changed(jax(model), **{"pre_logits/kernel": np.array([trap], dtype=object)}))
    else:
        torch.save(moco(model) | {"args": trap}, tmp_path / file)
    with pytest.raises(CheckpointError, match=f"{file}: found a (truncated|pickle)"):
        create_backbone(f"{VIT}@{tmp_path / file}", **SMALL, img_size=32)
    assert not (tmp_path / "sprung").exists()


# The models of transformers themselves

HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
HF |= {"image_size": 32, "patch_size": 16, "num_labels": 5}
FEATURES = {"num_classes": 0}
TRANSFORMERS = {
    "ViTForImageClassification": ({}, VIT, {}, "logits"),
    "DeiTForImageClassificationWithTeacher": ({}, "deit_tiny_distilled_patch16_224", {}, "logits"),
    "Dinov2WithRegistersModel": ({}, DINOV2, FEATURES | {"patch_size": 16}, "last_hidden_state"),
    "DINOv3ViTModel": ({"num_register_tokens": 4}, f"{DINOV3}_qkvb", FEATURES, "last_hidden_state"),
    "CLIPVisionModelWithProjection": ({"projection_dim": 5}, CLIP, {}, "image_embeds"),
    "SiglipVisionModel": ({"hidden_act": "gelu"}, SIGLIP, FEATURES, "pooler_output"),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_models_of_transformers_and_of_timm_agree(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    arguments, name, ours, output = TRANSFORMERS[kind]
    epsilon = 1e-5 if kind.startswith(("CLIP", "DINOv3")) else 1e-6  # timm's
    torch.manual_seed(3)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**HF | {"layer_norm_eps": epsilon} | arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.2))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    backbone = create_backbone(f"{name}@{file}", **SMALL | {"img_size": 32} | ours).eval().double()
    images = torch.randn(2, 3, 32, 32).double()
    expected = getattr(model.double()(pixel_values=images), output)
    found = backbone.forward_features(images) if output == "last_hidden_state" else backbone(images)
    # rounded to fp32 are the rotation of DINOv3, and the sum of a class token and its position in DINOv2
    tolerance = 1e-6 if kind.upper().startswith("DINO") else 1e-13
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("part", [0, 2])
def test_a_bias_of_queries_or_of_values_alone_is_refused_too(part, tmp_path):
    weights = dinov3(model_of(f"{DINOV3}_qkvb"))
    for key, bias in weights.items():
        if key.endswith("attn.qkv.bias"):
            weights[key] = torch.cat([p if i == part else torch.zeros_like(p) for i, p in enumerate(bias.chunk(3))])
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.qkv.bias is not zero: expected a model with this bias"):
        create_backbone(f"{DINOV3}@{tmp_path / 'weights.pth'}", **SMALL, img_size=32)
