"""The class token's attention against its formula in double precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.errors import InsVPError
from insvp_fast.figures.attention import class_attention
from insvp_fast.figures.grad_cam import grad_cam
from insvp_fast.methods import create_model

SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def xcit() -> InsVPViT:
    backbone = Xcit(img_size=(16, 40), patch_size=8, embed_dim=48, depth=1, num_heads=3, cls_attn_layers=1)
    return InsVPViT(backbone, 3, InsVPConfig(common_prompt=False, specific_prompt=False))


def vit(**changes) -> VisionTransformer:
    return VisionTransformer(img_size=(16, 40), **(SIZES | changes))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "reg_tokens": 2}])
@torch.no_grad()
def test_it_is_the_softmax_of_the_class_tokens_scores(changes):
    torch.manual_seed(0)
    model = InsVPViT(vit(**changes), 3, InsVPConfig(prompt_length=2)).double().eval()
    images, inputs = torch.randn(3, 3, 16, 40, dtype=torch.float64), []
    before, plain = model(images), copy.deepcopy(model)
    found = class_attention(model.train(), images)

    plain.backbone.blocks[-1].norm1.register_forward_hook(lambda module, args, output: inputs.append(output))
    with pytest.warns(UserWarning, match="general path"):
        plain(images)
    attn = plain.backbone.blocks[-1].attn
    q, k, _ = attn.qkv(inputs[0]).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    assert q.shape[2] == 1 + changes.get("reg_tokens", 0) + 2 + 10  # class token, registers, prompts, patches
    weights = (attn.q_norm(q)[:, :, :1] @ attn.k_norm(k).mT / 4).softmax(-1)[:, :, 0].mean(1)
    patches = weights[:, -10:].unflatten(1, (1, 2, 5))
    expected = F.interpolate(patches, (16, 40), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)

    assert model.training and torch.equal(model.eval()(images), before)  # nothing is left behind
    assert model.backbone.blocks[-1].attn.fused_attn == attn.fused_attn


def test_of_a_method_that_looks_twice_it_is_that_of_the_prompted_image():
    """DAM-VP finds the prompt of an image by the features of the bare one."""
    model, images = create_model("dam_vp", vit(), 3, num_prompts=2, padding=4), torch.randn(3, 3, 16, 40)
    model.method.fit([images, torch.randn(3, 3, 16, 40)])
    bare = create_model("linear", copy.deepcopy(model.backbone), 3)
    expected = class_attention(bare, model.image_prompt(images).prompted)
    torch.testing.assert_close(class_attention(model, images), expected)
    assert (expected - class_attention(bare, images)).abs().max() > 1e-4
    assert grad_cam(model, images, [0, 1, 2]).amax() > 0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: xcit(), "no attention of a Xcit: expected a class token, and blocks with timm's attention"),
        (lambda: InsVPViT(vit(class_token=False, global_pool="avg"), 3), "expected a class token"),
        (lambda: create_model("dualprompt", vit(), 3), "the method attends in its own way"),
        (lambda: create_model("lora", vit(), 3), "its method changes the backbone"),
    ],
)
def test_there_may_be_none(model, reason):
    with pytest.raises(InsVPError, match=reason):
        class_attention(model(), torch.randn(1, 3, 16, 40))
