"""The backbones of a run."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model
from timm.layers import resample_abs_pos_embed

from insvp_fast.checkpoints.backbone import save_backbone
from insvp_fast.errors import InsVPError
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing

ASSET = Path(__file__).parents[2] / "insvp_fast" / "assets" / "vit_shapes_32"


def test_shipped_backbone_is_what_its_description_says():
    weights, facts = ASSET.with_suffix(".safetensors").read_bytes(), json.loads(ASSET.with_suffix(".json").read_text())
    assert len(weights) < 4_000_000
    assert hashlib.sha256(weights).hexdigest() == facts["sha256"]
    backbone = load_backbone()
    assert backbone.patch_embed.img_size == (32, 32)
    assert backbone.embed_dim == 3 * 8 * 8
    assert next(backbone.parameters()).dtype == torch.float32


@pytest.mark.parametrize("size", [80, 208])
def test_another_size_is_timms_own_with_these_weights(size, tmp_path):
    save_file(create_model("test_vit").state_dict(), file := tmp_path / "weights.safetensors")
    expected = create_model(
        "test_vit", img_size=size, num_classes=0, pretrained=True, pretrained_cfg_overlay={"file": file}
    )
    backbone = load_backbone(f"test_vit@{file}", img_size=size)
    images = torch.rand(2, 3, size, size)
    assert torch.equal(backbone(images), expected(images))
    for preset in ("timm", "insvp"):
        assert resolve_preprocessing(backbone, preset)["input_size"] == [3, size, size]


@pytest.mark.parametrize("size", [24, 56])
def test_the_shipped_backbone_in_another_size(size):
    """Its position embeddings resampled, as timm does, and nothing else changed."""
    native, backbone = load_backbone(), load_backbone(img_size=size)
    grid = (size // 8, size // 8)
    expected = resample_abs_pos_embed(native.pos_embed, grid, (4, 4), native.num_prefix_tokens)
    assert torch.equal(backbone.pos_embed, expected)
    state = native.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items() if key != "pos_embed")


def test_a_size_that_patches_do_not_divide_is_refused(tmp_path):
    with pytest.raises(InsVPError, match=r"^`img_size` is 36: expected a multiple of 8, the side of a patch$"):
        load_backbone(img_size=36)
    save_backbone(create_model("test_resnet"), file := tmp_path / "resnet.safetensors")
    with pytest.raises(InsVPError, match=f"^`img_size` is 64: expected none, as {file} has no image size$"):
        load_backbone(str(file), img_size=64)


def test_timms_way_of_cropping_is_taken_over():
    backbone = load_backbone()
    backbone.pretrained_cfg |= {"crop_mode": "squash"}
    assert resolve_preprocessing(backbone)["crop_mode"] == "squash"
