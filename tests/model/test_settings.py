"""Every setting on every kind of backbone: the constructor refuses it in words, or the model runs."""

import copy

import pytest
import timm
import torch
from timm.layers import SwiGLU

from insvp_fast import InsVPConfig, InsVPViT, ops
from insvp_fast.runtime import native
from insvp_fast.testing import DEVICE

TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 2, "num_classes": 3}
BACKBONES = {
    "ViT": ("vit_tiny_patch16_224", TINY),
    "ViT with SwiGLU": ("vit_tiny_patch16_224", TINY | {"mlp_layer": SwiGLU}),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
    "EVA-02": ("eva02_tiny_patch14_224", TINY | {"img_size": 28}),
    "BEiT": ("beit_base_patch16_224", TINY),
    "relative positions": ("vit_relpos_small_patch16_224", TINY),
    "CaiT": ("cait_xxs24_224", TINY),
}
ATTENTION = [{"attention": name} for name in ops.ATTENTION]
KEPT = [{"recompute": what, "gelu_in_8_bits": coded} for what in ("none", "mlp", "block") for coded in (False, True)]
PROMPTS = [{"carry_prompts": True, "prompted_blocks": 1}, {"common_prompt": False, "specific_prompt": False}]
SETTINGS = [*ATTENTION, *KEPT, {"fold_norm": False}, *PROMPTS]
# what only the machine decides, which a model may leave again
ABSENT = {"triton", "xformers", *(() if native.available() and DEVICE.type == "cpu" else ("native",))}


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize("kind", BACKBONES)
def test_what_the_constructor_takes_runs(kind):
    name, arguments = BACKBONES[kind]
    backbone = timm.create_model(name, **arguments).to(DEVICE)
    image, refused, failed = torch.randn(2, 3, *[arguments["img_size"]] * 2, device=DEVICE), [], []
    for settings in SETTINGS:
        own = {key: value for key, value in settings.items() if hasattr(InsVPConfig(), key)}
        options = {key: value for key, value in settings.items() if key not in own}
        try:
            model = InsVPViT(copy.deepcopy(backbone), config=InsVPConfig(prompt_length=2, **own), **options)
        except ValueError as error:
            refused.append((settings, str(error)))
            continue
        try:
            model(image).sum().backward()
        except RuntimeError as error:
            failed.append((settings, str(error)))
    assert all("expected" in message for _, message in refused), refused
    assert all(settings.get("attention") in ABSENT and "impl=" in message for settings, message in failed), failed
    assert {"recompute": "mlp", "gelu_in_8_bits": True} in (given := [settings for settings, _ in refused])
    assert ({"attention": "flash"} in given) == (kind in ("Swin", "BEiT", "relative positions"))


def test_refused_settings_leave_the_model_as_it_was():
    name, arguments = BACKBONES["Swin"]
    model = InsVPViT(timm.create_model(name, **arguments), config=InsVPConfig(prompt_length=2))
    with pytest.raises(ValueError, match=r"attention='flash': expected one of \['auto'.* for a SwinTransformer"):
        model.attention = "flash"
    model.gelu_in_8_bits = True
    with pytest.raises(ValueError, match="recompute='mlp' keeps nothing of GELU: expected gelu_in_8_bits=False"):
        model.recompute = "mlp"
    with pytest.raises(ValueError, match="recompute='all': expected"):
        model.recompute = "all"
    assert (model.attention, model.recompute, model.gelu_in_8_bits) == ("auto", "none", True)
    gated = InsVPViT(timm.create_model("vit_tiny_patch16_224", **BACKBONES["ViT with SwiGLU"][1]))
    with pytest.raises(ValueError, match="the gated MLPs of this VisionTransformer do not go with it"):
        gated.gelu_in_8_bits = True
