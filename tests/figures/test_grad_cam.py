"""Grad-CAM, against the last block and the paper's equations written out in double precision."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, unsupported_reason
from insvp_fast.errors import InsVPError
from insvp_fast.figures.embedding import collect_vectors
from insvp_fast.figures.grad_cam import grad_cam
from insvp_fast.figures.prompts import explain
from insvp_fast.testing import relative_error

OFF = dict.fromkeys(("global_prompt", "patch_prompt", "common_prompt", "specific_prompt"), False)
CLASSES = [2, 0]


def vit(**changes) -> VisionTransformer:
    settings = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2} | changes
    return VisionTransformer(**settings)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def restated(model: InsVPReference, images: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """Equations 1 and 2 of Selvaraju et al. for the normed patches of a ViT's last block, [B, H, W]."""
    backbone, last = model.backbone, len(model.widths) - 1
    _, p_s = model.prompt_image(images)
    (h,) = model.block_outputs(images, [last - 1])
    prompts, prefix = model.feature_prompt(last, p_s, len(images)), backbone.num_prefix_tokens
    block, z = backbone.blocks[last], torch.cat([h[:, :prefix], prompts, h[:, prefix:]], 1)
    normed = block.norm1(z)
    z = z + block.ls1(block.attn(normed))
    z = z + block.ls2(block.mlp(block.norm2(z)))
    z = torch.cat([z[:, :prefix], z[:, prefix + prompts.shape[1] :]], 1)
    scores = model.forward_head(backbone.norm(z))
    maps, (height, width) = [], (images.shape[2] // 8, images.shape[3] // 8)
    for i, index in enumerate(classes):
        (gradient,) = torch.autograd.grad(scores[i, index], normed, retain_graph=True)
        patches, alpha = normed[i, -height * width :], gradient[i, -height * width :].mean(0)
        cam = torch.stack([patch.dot(alpha) for patch in patches]).clamp(min=0)
        maps.append(cam.reshape(1, 1, height, width))
    return F.interpolate(torch.cat(maps), images.shape[2:], mode="bilinear")[:, 0].detach()


@pytest.mark.parametrize(
    "changes", [{}, {"reg_tokens": 3, "init_values": 0.5}, {"class_token": False, "global_pool": "avg"}]
)
def test_grad_cam_is_that_of_the_paper(changes):
    model = InsVPViT(vit(**changes), 4, InsVPConfig(prompt_length=5)).eval()
    reference = InsVPReference(copy.deepcopy(model.backbone), 4, model.config).eval()
    reference.load_state_dict(model.state_dict())
    exact = restated(reference.double(), pictures().double(), CLASSES)
    assert exact.amax((1, 2)).min() > 0
    assert relative_error(grad_cam(model, pictures(), CLASSES), exact) < 1e-5


def test_without_prompts_it_is_that_of_a_model_without_prompts():
    backbone = vit()
    model = InsVPViT(backbone, 4, InsVPConfig(prompt_length=5))
    bare = InsVPReference(copy.deepcopy(backbone), 4, InsVPConfig(**OFF))
    bare.head.load_state_dict(model.head.state_dict())
    cams = grad_cam(model, pictures(), CLASSES, prompts=False)
    assert relative_error(cams, grad_cam(bare.double(), pictures().double(), CLASSES)) < 1e-5
    assert relative_error(cams, grad_cam(model, pictures(), CLASSES)) > 1e-2


def test_of_a_convolutional_backbone_it_is_that_of_the_last_map():
    config = InsVPConfig(common_prompt=False, specific_prompt=False)
    model = InsVPReference(ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 16, 24, 32)), 4, config).eval().double()
    images = pictures().double()
    maps = model.backbone.forward_features(model.image_prompt(images).prompted)  # averaged, then a linear layer
    alpha = model.head.weight[CLASSES] / maps[0, 0].numel()
    exact = torch.einsum("bchw,bc->bhw", maps, alpha).relu()[:, None]
    exact = F.interpolate(exact, images.shape[2:], mode="bilinear")[:, 0].detach()
    assert exact.any() and relative_error(grad_cam(model, images, CLASSES), exact) < 1e-6  # it is in fp32


def test_of_swin_it_is_that_of_the_tokens_of_the_last_block():
    backbone = SwinTransformer(
        img_size=(32, 48), patch_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 2), window_size=2
    )
    model, images, normed = InsVPReference(backbone, 4, InsVPConfig(prompt_length=3)).eval(), pictures().double(), []
    found = grad_cam(model, pictures(), CLASSES)
    backbone.layers[-1].blocks[-1].norm1.register_forward_hook(lambda module, args, output: normed.append(output))
    scores = model.double()(images)[range(2), CLASSES].sum()
    (gradient,) = torch.autograd.grad(scores, normed[0])  # the prompts, which have no place, come after the tokens
    exact = (gradient.mean((1, 2), keepdim=True) * normed[0]).sum(3).relu()[:, None]
    exact = F.interpolate(exact, images.shape[2:], mode="bilinear")[:, 0].detach()
    assert exact.any() and relative_error(found, exact) < 1e-5


def test_it_leaves_no_trace():
    model = InsVPViT(vit(), 4, InsVPConfig(prompt_length=5)).train()
    before = model(pictures()[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grad_cam(model, pictures()[:0], []).shape == (0, 32, 48)
        grad_cam(model, pictures(), CLASSES)
    assert model.training and unsupported_reason(model) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before.requires_grad


def test_inference_mode_and_recomputation_change_nothing():
    model = InsVPViT(vit(), 4, InsVPConfig(prompt_length=5)).train()
    model.specific_prompter.eval()
    expected = grad_cam(model, pictures(), CLASSES)
    with torch.inference_mode():
        assert torch.equal(grad_cam(model, pictures(), CLASSES), expected)
    model.requires_grad_(False)
    model.set_grad_checkpointing(True)
    assert torch.equal(grad_cam(model, pictures(), CLASSES), expected)
    explain(model, pictures()), collect_vectors(model, [pictures()])
    assert model.training and model.head.training and not model.specific_prompter.conv1.training


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (ResPostBlock, "VisionTransformer: its head does not read"),  # its norm1 is behind attention
        (ParallelScalingBlock, "VisionTransformer: its blocks have no norm1"),
    ],
)
def test_a_backbone_without_such_features_is_refused(block, reason):
    model = InsVPReference(vit(block_fn=block), 4, InsVPConfig(prompt_length=5)).train()
    with pytest.raises(InsVPError, match=reason):
        grad_cam(model, pictures(), CLASSES)
    assert model.training
