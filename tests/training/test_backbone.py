"""The backbones of a run."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model

from insvp_fast.errors import InsVPError
from insvp_fast.training.backbone import load_backbone

ASSET = Path(__file__).parents[2] / "insvp_fast" / "assets" / "vit_shapes_32"


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
    with pytest.raises(InsVPError, match="`backbone` is vit_huger: timm has no model vit_huger, and there is no"):
        load_backbone("vit_huger")
    with pytest.raises(InsVPError, match="no such file"):
        load_backbone("test_vit@nowhere.pth")
    save_file(create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(InsVPError, match="`backbone` is test_resnet@.*: a ResNet takes image prompts alone"):
        load_backbone(f"test_resnet@{tmp_path / 'resnet.safetensors'}")
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
