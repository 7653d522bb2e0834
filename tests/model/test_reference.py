"""The reference against timm, PyTorch's operators and autograd."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, reference
from insvp_fast.errors import CheckpointError
from insvp_fast.methods.lora import LoRA
from insvp_fast.methods.model import MethodViT
from insvp_fast.methods.tuned import TunedViT
from insvp_fast.ops import Blend, PatchWeights
from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.ops.norm_insert import norm_insert_bwd_reference, norm_insert_reference
from insvp_fast.ops.superpose import superpose_bwd_reference, superpose_reference

PROMPTED = InsVPViT("vit_tiny_patch16_224", img_size=32, depth=1)
OFF = {"global_prompt": False, "patch_prompt": False, "common_prompt": False, "specific_prompt": False}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def fails_late(backbone):
    LoRA(backbone)
    raise ValueError("too late")


FAILING = {
    "configuration": lambda backbone: InsVPReference(backbone, 7, InsVPConfig(prompted_blocks=(99,))),
    "fast configuration": lambda backbone: InsVPViT(backbone, config=InsVPConfig(prompted_blocks=(99,))),
    "attention": lambda backbone: InsVPViT(backbone, 7, attention="none"),
    "recompute": lambda backbone: InsVPViT(backbone, recompute="all"),
    "method": lambda backbone: MethodViT(backbone, method=fails_late),
    "tuning": lambda backbone: TunedViT(backbone, method=fails_late),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_constructor_that_fails_leaves_the_backbone_as_it_was(kind):
    """Or the next one would find it without its head."""
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    twin, head, image = copy.deepcopy(backbone), backbone.head, torch.randn(2, 3, 32, 32)
    with pytest.raises((ValueError, AttributeError)):
        FAILING[kind](backbone)
    assert backbone.head is head and backbone.training and all(p.requires_grad for p in backbone.parameters())
    assert torch.equal(backbone(image), twin(image))
    assert InsVPViT(backbone).num_classes == 5


def test_a_backbone_is_at_no_time_in_training_mode():
    """It may be that of other models, which run in other threads."""
    model, seen = InsVPReference("vit_tiny_patch16_224", 3, img_size=32, depth=1), []
    for module in model.backbone.modules():
        module.train = lambda mode=True, module=module: (seen.append(mode), type(module).train(module, mode))[1]
    for mode in (True, False):
        assert model.train(mode).training == model.global_prompter.dropout.training == mode
    assert seen and not any(seen)
    with pytest.raises(ValueError, match="mode=1: expected True or False"):
        model.train(1)


@pytest.mark.parametrize("shape", [(0, 3, 8, 12), (2, 1, 16, 8), (3, 3, 28, 42)])
def test_unfold_is_that_of_pytorch(shape):
    P = 14 if shape[-1] == 42 else 4
    image = double(*shape)
    patches = reference.unfold(image, P)
    assert torch.equal(reference.fold(patches, P, *shape[-2:]), image)
    if shape[0]:
        assert torch.equal(patches, F.unfold(image, P, stride=P).mT)


def test_patches_that_do_not_fill_the_image_are_refused():
    with pytest.raises(ValueError, match="image has 50x48 pixels: expected multiples of the patch size 16"):
        reference.unfold(torch.zeros(1, 3, 50, 48), 16)


def test_simam_is_its_formula_pixel_by_pixel():
    image = double(2, 3, 5, 4)
    result = reference.simam(image)
    for b in range(2):
        for c in range(3):
            x = image[b, c]
            deviation = (x - x.mean()) ** 2
            energy = deviation / (4 * (deviation.sum() / 19 + 1e-3)) + 0.5
            torch.testing.assert_close(result[b, c], x / (1 + (-energy).exp()))


def test_all_prompts_off_is_the_bare_backbone():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    image = torch.randn(3, 3, 32, 32)
    expected = backbone(image)
    model = InsVPReference(backbone, None, InsVPConfig(**OFF))
    assert torch.equal(model(image), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_feature_prompts_block_by_block():
    """Prompts are blended, stand between class token and patches, and their outputs are discarded."""
    config = InsVPConfig(global_prompt=False, patch_prompt=False, prompt_length=4, feature_weights=(0.25, 3.0))
    model = InsVPReference("vit_tiny_patch16_224", 5, config, img_size=32, depth=2)
    backbone, image = model.backbone, torch.randn(2, 3, 32, 32)
    p_s = model.specific_prompter(image)
    h = backbone._pos_embed(backbone.patch_embed(image))
    for j, block in enumerate(backbone.blocks):
        prompts = 0.25 * model.common_prompts[j] + 3.0 * p_s
        z = block(torch.cat([h[:, :1], prompts, h[:, 1:]], dim=1))
        h = torch.cat([z[:, :1], z[:, 5:]], dim=1)
    torch.testing.assert_close(model(image), model.head(backbone.norm(h)[:, 0]), rtol=0, atol=0)


def test_carried_prompts_stay_in_the_sequence():
    config = InsVPConfig(
        prompt_length=3, prompted_blocks=1, carry_prompts=True, specific_prompt=False, global_dropout=0.0
    )
    model = InsVPReference("vit_tiny_patch16_224", 5, config, img_size=32, depth=3)
    image, backbone = torch.randn(2, 3, 32, 32), model.backbone
    h = backbone._pos_embed(backbone.patch_embed(model.image_prompt(image).prompted))
    z = torch.cat([h[:, :1], model.common_prompts[0].expand(2, -1, -1), h[:, 1:]], dim=1)
    torch.testing.assert_close(model(image), model.head(backbone.norm(backbone.blocks(z))[:, 0]), rtol=1e-6, atol=1e-6)


def test_image_prompt_parts():
    model = InsVPReference(
        "vit_tiny_patch16_224", 5, InsVPConfig(image_weights=(2.0, -0.5)), img_size=32, depth=1
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    parts = model.image_prompt(image)
    torch.testing.assert_close(parts.prompt, 2 * parts.global_ - 0.5 * parts.patch)
    torch.testing.assert_close(parts.prompted, image + parts.prompt)
    hidden = F.unfold(image, 16, stride=16).mT @ model.patch_prompter.fc1.weight.T + model.patch_prompter.fc1.bias
    patches = hidden.clamp_min(0) @ model.patch_prompter.fc2.weight.T + model.patch_prompter.fc2.bias
    torch.testing.assert_close(parts.patch, F.fold(patches.mT, (32, 32), 16, stride=16), rtol=1e-5, atol=1e-6)


def test_dilated_kernels_span_what_the_released_dense_ones_do():
    paper, released = InsVPConfig(), InsVPConfig.released()
    spans = [
        [d * (k - 1) + 1 for k, d in zip(c.global_kernels, c.global_dilations, strict=True)] for c in (paper, released)
    ]
    assert spans == [[11, 25], [11, 25]]


@pytest.mark.parametrize(
    ("width", "patch", "expected"),
    [
        (768, 16, (3, 16)),
        (192, 8, (3, 8)),
        (192, 16, (3, 8)),
        (384, 16, (6, 8)),
        (1024, 14, (4, 16)),
        (1280, 14, (5, 16)),
        (768, 32, (3, 16)),
    ],
)
def test_token_grid(width, patch, expected):
    channels, grid = reference.SpecificPrompter.token_grid(width, patch)
    assert (channels, grid) == expected and channels * grid**2 == width


@pytest.mark.parametrize(
    ("side", "patch_size", "width", "first", "second"),
    [
        pytest.param(224, 16, 768, [(i, i + 4) for i in range(8, 216, 4)], slice(2, 50), id="as released"),
        pytest.param(40, 8, 96, [(i, i + 2) for i in range(4, 36, 2)], slice(2, 14), id="a small grid"),
        pytest.param(
            24,
            8,
            192,
            [(24 * i // 28, -(-24 * (i + 1) // 28)) for i in range(28)],
            slice(2, 26),
            id="windows that overlap",
        ),
    ],
)
def test_specific_prompter_pools_windows_on_the_center(side, patch_size, width, first, second):
    prompter = reference.SpecificPrompter(3, patch_size, width, InsVPConfig(prompt_length=2)).double()
    image = double(1, 3, side, side)
    x = F.leaky_relu(F.conv2d(image, prompter.conv1.weight, prompter.conv1.bias, padding=3))
    for dim in (2, 3):
        x = torch.stack([x.narrow(dim, start, end - start).amax(dim) for start, end in first], dim)
    x = F.leaky_relu(F.conv2d(x, prompter.conv2.weight, prompter.conv2.bias, padding=4))
    x = F.max_pool2d(x[:, :, second, second], 3)
    x = F.conv2d(x, prompter.conv3.weight, prompter.conv3.bias, padding=1)
    torch.testing.assert_close(prompter(image), x.reshape(1, 2, width))


def test_superpose_gradients_written_out():
    P, R, K = 2, 3, 3 * 4
    image, p_g = double(2, 3, 4, 6).requires_grad_(), double(2, 3, 4, 6).requires_grad_()
    weights = [double(*shape).requires_grad_() for shape in ((R, K), (R,), (K, R), (K,))]
    grad = double(2, 6, K)
    out = superpose_reference(image, p_g, PatchWeights(*weights), Blend(P, 0.7, -0.3))
    expected = torch.autograd.grad(out, [image, p_g, *weights], grad)
    hidden = F.linear(reference.unfold(image, P), weights[0], weights[1]).relu()
    written = superpose_bwd_reference(grad, image, hidden, weights[0], weights[2], Blend(P, 0.7, -0.3))
    for value, exact in zip(written, expected, strict=True):
        torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("center", [True, False])
def test_norm_insert_gradients_written_out(center):
    residual, branch, prompts = (double(2, n, 6).requires_grad_() for n in (5, 5, 3))
    weight, bias = double(6), double(6)
    outputs = norm_insert_reference(residual, branch, prompts, weight, bias, 1e-6, center)
    grads = double(2, 5, 6), double(2, 8, 6)
    expected = torch.autograd.grad(outputs, [residual, branch, prompts], grads)
    tokens = torch.cat([residual + branch, prompts], dim=1)
    deviation = tokens - tokens.mean(-1, keepdim=True) if center else tokens
    rstd = (deviation.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    d_residual, d_prompts = norm_insert_bwd_reference(*grads, deviation * rstd, rstd, weight, center)
    for value, exact in zip((d_residual, d_residual, d_prompts), expected, strict=True):
        torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("queries", [1, 4, 7])
def test_attention_is_sdpa_and_its_gradient_written_out(queries):
    qkv = double(2, 7, 3 * 8).requires_grad_()
    out = attention_reference(qkv, 2, queries, 0.3)
    q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in qkv.chunk(3, -1))
    sdpa = F.scaled_dot_product_attention(q[:, :, :queries], k, v, scale=0.3).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, sdpa)
    grad = double(*out.shape)
    (expected,) = torch.autograd.grad(out, qkv, grad)
    torch.testing.assert_close(attention_bwd_reference(grad, qkv, 2, queries, 0.3), expected)


def test_frozen_is_frozen_and_in_eval():
    model = InsVPReference("vit_tiny_patch16_224", 5, img_size=32, depth=1, proj_drop_rate=0.5, drop_path_rate=0.5)
    assert model.training and not any(m.training for m in model.backbone.modules())
    assert model.global_prompter.training and model.eval() is model and not model.global_prompter.training
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"global_prompter", "patch_prompter", "specific_prompter", "common_prompts", "head"}


def test_common_prompts_start_uniform():
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=3)
    torch.manual_seed(0)
    model = InsVPReference(backbone, config=InsVPConfig.vpt_deep(7, prompted_blocks=(0, 2)))
    torch.manual_seed(0)
    assert torch.equal(torch.stack([*model.common_prompts]), torch.empty(2, 7, 192).uniform_(-1, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": torch.nn.Linear(2, 2)}, TypeError, "backbone is a Linear, without forward_features: expected a"),
        ({"backbone": "levit_128s"}, TypeError, "LevitDistilled has 2 heads: expected one"),
        ({"backbone": "resnet18"}, ValueError, "a ResNet has no blocks that prompts can be put into"),
        (
            {"backbone": "vit_tiny_patch16_224", "patch_size": (16, 8)},
            ValueError,
            "the backbone has 16x8 patches: expected square ones",
        ),
        (
            {"backbone": "vit_tiny_patch16_224", "depth": 2, "config": InsVPConfig(prompted_blocks=3)},
            ValueError,
            "asks for block 2",
        ),
        ({"backbone": VisionTransformer}, TypeError, "backbone is the class VisionTransformer: expected a model"),
        *(
            (
                {"backbone": f"insvp_{name}"},
                (CheckpointError, TypeError),
                "with prompts: expected its backbone|backbone has prompts",
            )
            for name in ("vit_tiny_patch16_224", "vit_shapes_32")
        ),
        (
            {"backbone": PROMPTED},
            TypeError,
            "backbone has prompts, as a model of the class InsVPViT: expected one without",
        ),
        ({"backbone": "vit_tiny_patch16_224", "config": {"prompt_length": 2}}, TypeError, "config is a dict: expected"),
        *(
            ({"backbone": "vit_tiny_patch16_224", "num_classes": number}, ValueError, "num_classes=.*: expected an int")
            for number in (-1, 1.5, "3", True, ["cat", "dog"])
        ),
    ],
)
@pytest.mark.parametrize("model", [InsVPReference, InsVPViT])
def test_unfit_backbones_and_arguments_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model(**arguments)


@pytest.mark.parametrize("model", [InsVPReference, InsVPViT])
@pytest.mark.parametrize("blocks", [[], [2], [-2], [0, 5]], ids=str)
def test_blocks_that_there_are_not_are_refused(model, blocks):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(ValueError, match="expected at least one of -1 to 1"):
        model(backbone).block_outputs(torch.randn(1, 3, 32, 32), blocks)


def test_the_input_of_the_first_block_is_its_own_output():
    backbone, image = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), torch.randn(1, 3, 32, 32)
    expected = backbone._pos_embed(backbone.patch_embed(image))
    config = InsVPConfig(**OFF)
    for model in (InsVPReference(copy.deepcopy(backbone), 3, config), InsVPViT(backbone, 3, config)):
        first, second = model.block_outputs(image, [0, -1])
        assert torch.allclose(first, expected, atol=1e-6) and not torch.allclose(second, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_images_of_other_dtypes_are_refused(dtype):
    model = InsVPViT(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    for call in (model, model.forward_features, lambda image: model.block_outputs(image, [0])):
        with pytest.raises(TypeError, match=f"image is {dtype}: expected floating-point numbers, or torch.uint8"):
            call(torch.ones(1, 3, 32, 32).to(dtype))


@pytest.mark.parametrize("layout", ["torch._mkldnn", "torch.sparse_coo", "nested"])
def test_images_that_are_not_dense_are_refused(layout):
    model, image = InsVPViT(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)), torch.ones(1, 3, 32, 32)
    others = {
        "torch._mkldnn": image.to_mkldnn,
        "torch.sparse_coo": image.to_sparse,
        "nested": lambda: torch.nested.nested_tensor([*image], layout=torch.strided),
    }
    for call in (model, model.forward_features, lambda image: model.block_outputs(image, [0])):
        with pytest.raises(TypeError, match=f"image is {layout}: expected a dense tensor"):
            call(others[layout]())
