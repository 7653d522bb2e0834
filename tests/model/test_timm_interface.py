"""timm's interface: intermediates, pruning, layers for layer decay, names in the registry, what timm's utilities do."""

import copy
import functools
import inspect
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, freeze

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, timm_models, timm_script, unsupported_reason
from insvp_fast.methods import create_model as create_method_model
from insvp_fast.methods.lora import LoRA
from insvp_fast.methods.model import MethodViT
from insvp_fast.methods.table import CLASSES
from insvp_fast.methods.tuned import TunedViT
from insvp_fast.methods.tuning import Tuning
from insvp_fast.methods.vfpt import VFPT
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.testing import DEVICE, make_pair
from insvp_fast.training.load import load_run

TINY = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32}
SWIN = {"embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 64, "window_size": 2}
NAME = "insvp_vit_tiny_patch16_224"
# a prefix of class and register tokens, none at all, and blocks that only the general path knows
BACKBONES = {
    "fast": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "no prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "general": ("vit_tiny_patch16_224", {"act_layer": torch.nn.Hardswish}),
}


NO_PROMPTS = InsVPConfig(global_prompt=False, patch_prompt=False, common_prompt=False, specific_prompt=False)


def make(backbone="fast", dtype=torch.float64, **config):
    name, arguments = BACKBONES[backbone]
    _, model = make_pair(name, InsVPConfig(prompt_length=3, **config), 5, **TINY | arguments)
    return model.to(dtype).eval()


def images(height=32, width=32, dtype=torch.float64):
    return torch.randn(2, 3, height, width, dtype=dtype, device=DEVICE)


def blocks_one_by_one(model, image):
    """The tokens behind each block without prompts, and the features: the equations, from stock modules."""
    backbone, prompted = model.backbone, model.image_prompt(image).prompted
    p_s = model.specific_prompt(image, prompted)
    h, n, after = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(prompted))), model.num_prefix_tokens, []
    for j, block in enumerate(backbone.blocks):
        p_j = model.feature_prompt(j, p_s, len(image))
        L = 0 if p_j is None else p_j.shape[1]
        h = block(h if p_j is None else torch.cat([h[:, :n], p_j, h[:, n:]], 1))
        h = torch.cat([h[:, :n], h[:, n + L :]], 1)
        after.append(h)
    return after, backbone.norm(h)


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_intermediates_are_the_tokens_behind_the_blocks(backbone, recompute):
    model, image = make(backbone, prompted_blocks=(0, 2)), images()
    model.recompute = recompute
    after, features = blocks_one_by_one(model, image)
    n = model.num_prefix_tokens
    found, maps = model.forward_intermediates(image, indices=[-1, 1], return_prefix_tokens=True, output_fmt="NLC")
    torch.testing.assert_close(found, features)
    for one, h in zip(maps, (after[1], after[3]), strict=True):
        patches, prefix = one if n else (one, h[:, :0])
        torch.testing.assert_close(patches, h[:, n:])
        torch.testing.assert_close(prefix, h[:, :n])
    (only,) = model.get_intermediate_layers(image, [2], reshape=True, norm=True)
    expected = model.backbone.norm(after[2])[:, n:].transpose(1, 2).reshape(2, 48, 2, 2)
    torch.testing.assert_close(only, expected)
    stopped = model.forward_intermediates(image, 3, stop_early=True, output_dict=True, return_prefix_tokens=True)
    assert len(stopped["image_intermediates"]) == 3 and ("image_intermediates_prefix" in stopped) == (n > 0)
    early, _ = model.forward_intermediates(image, [0], stop_early=True)
    torch.testing.assert_close(early, model.backbone.norm(after[0]))


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "naflexvit_base_patch16_parfac_gap",
    ],
)
def test_intermediates_of_other_backbones(name):
    tiny = TINY | ({"patch_size": 16} if name.startswith("eva") else {})
    if name.startswith("naflex"):
        tiny["img_size"] = None
    model = timm.create_model(f"insvp_{name}", num_classes=3, prompt_length=2, **tiny).eval()
    image = torch.randn(2, 3, 32, 32)
    features, [last] = model.forward_intermediates(image, 1, norm=True, output_fmt="NLC")
    torch.testing.assert_close(features, model.forward_features(image))
    assert torch.equal(last, features[:, model.num_prefix_tokens :])
    (expected,) = model.get_intermediate_layers(image, [1])
    model.prune_intermediate_layers([1])
    torch.testing.assert_close(model.get_intermediate_layers(image), [expected])
    classifier = model.default_cfg["classifier"]
    layers = (classifier,) if isinstance(classifier, str) else classifier
    model.reset_classifier(5, "avg" if "gap" in name else "token")
    classifiers = model.get_classifier()
    classifiers = [classifiers] if isinstance(classifiers, torch.nn.Module) else [*classifiers]
    assert classifiers == [model.get_submodule(layer) for layer in layers]
    assert {f"{layer}.weight" for layer in layers} <= {*model.state_dict()} and model(image).shape == (2, 5)


def test_stages_of_swin():
    model = timm.create_model("insvp_swin_tiny_patch4_window7_224", prompt_length=2, num_classes=3, **SWIN).eval()
    image = torch.randn(2, 3, 64, 64)
    features, maps = model.forward_intermediates(image, norm=True)
    torch.testing.assert_close(features, model.forward_features(image))
    assert torch.equal(maps[3], features.permute(0, 3, 1, 2))
    assert [one.shape[1:] for one in maps] == [(24, 16, 16), (48, 8, 8), (96, 4, 4), (192, 2, 2)]
    plain = InsVPReference.block_outputs(model, image, [1, 2])  # of each block, on the general path
    torch.testing.assert_close(maps[:2], [h.permute(0, 3, 1, 2) for h in plain], rtol=1e-4, atol=1e-5)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.2.blocks.0", "layers.3.blocks.0"]
    assert [layers[f"common_prompts.{i}"] for i in range(5)] == [layers[f"backbone.{b}.norm1.weight"] for b in blocks]
    assert layers["head.weight"] > layers["common_prompts.4"] > layers["common_prompts.1"] > layers["common_prompts.0"]
    assert all(layer == 0 for name, layer in layers.items() if "_prompter." in name)
    taken = model.prune_intermediate_layers([0, 1])
    torch.testing.assert_close(model.forward_intermediates(image, taken, intermediates_only=True), maps[:2])
    sum(one.sum() for one in model.forward_intermediates(image, taken, intermediates_only=True)).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert len(timm.create_model("insvp_swin_tiny_patch4_window7_224", features_only=True, **SWIN)(image)) == 4


def test_intermediates_have_gradients_and_take_the_fast_path(monkeypatch):
    monkeypatch.setattr(PromptedReference, "block_outputs", None)
    model, image = make(dtype=torch.float32).train(), images(dtype=torch.float32)
    model.global_prompter.dropout.p = 0
    gradients = []
    for recompute in ("none", "block"):
        model.recompute = recompute
        model.zero_grad()
        maps = model.forward_intermediates(image, [0, 2], intermediates_only=True)
        sum(one.square().mean() for one in maps).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 17 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert model.common_prompts[2].grad.abs().sum() > 0 and model.common_prompts[3].grad is None


@pytest.mark.filterwarnings("ignore:.*takes the general path")
def test_intermediates_where_only_the_image_is_prompted():
    backbone = timm.create_model("test_resnet", num_classes=3)
    model = InsVPViT(backbone, config=InsVPConfig(common_prompt=False, specific_prompt=False)).eval()
    image = torch.randn(2, 3, 32, 32)
    _, maps = model.forward_intermediates(image)
    expected = backbone.forward_intermediates(model.image_prompt(image).prompted, intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    with pytest.raises(TypeError, match="output_dict"):  # timm's signature of this model has none
        model.forward_intermediates(image, output_dict=True)


@pytest.mark.filterwarnings("ignore:.*takes the general path")
def test_intermediates_without_the_class_token_of_the_last_blocks():
    tiny = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = InsVPViT(timm.create_model("cait_xxs24_224", **tiny), config=InsVPConfig(prompt_length=2)).eval()
    image = torch.randn(2, 3, 32, 32)
    features, [one] = model.forward_intermediates(image, 1, return_prefix_tokens=True)
    assert one.shape == (2, 32, 2, 2) and features.shape == (2, 5, 32)


def test_intermediates_refuse_what_they_do_not_know():
    model = make()
    with pytest.raises(ValueError, match="output_fmt='NHWC': expected 'NCHW' or 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NHWC")
    with pytest.raises(ValueError, match="is_causal=True: expected False"):
        model.forward_intermediates(images(), is_causal=True)
    with pytest.raises(ValueError, match=r"shape \(2, 7, 7\): expected \(7, 7\) or \(2, 1, 7, 7\)"):
        model(images(), attn_mask=torch.ones(2, 7, 7))
    with pytest.raises(ValueError, match=r"attn_mask has dtype torch.int64: expected torch.bool"):
        model(images(), attn_mask=torch.ones(7, 7, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize(
    ("name", "tiny"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1,), "num_heads": (1,), "window_size": 2}),
        ("beit_base_patch16_224", TINY),
        ("test_resnet", {}),
    ],
)
def test_a_mask_is_refused_where_blocks_take_none(name, tiny):
    model = InsVPViT(
        timm.create_model(name, num_classes=3, **tiny | {"img_size": 32} if tiny else {}), config=NO_PROMPTS
    )
    for forward in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=rf"the attention of a {type(model.backbone).__name__} takes none"):
            forward(images(dtype=torch.float32), attn_mask=torch.ones(7, 7))


def masks(T):
    """Of timm's shapes; every query attends to itself."""
    own = torch.eye(T, dtype=torch.bool)
    yield from (own | (torch.rand(shape) < 0.5) for shape in [(T, T), (2, 1, T, T), (1, 3, T, T)])
    yield from (torch.randn(shape, dtype=torch.float64) for shape in [(T, T), (2, 1, T, T), (2, 1, 1, T)])


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"])
def test_a_mask_without_prompts_is_that_of_the_bare_model(name):
    tiny = {"img_size": 28 if "eva" in name else 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    tiny |= {"img_size": None, "init_values": 1.0} if "naflex" in name else {}
    bare, image = timm.create_model(name, **tiny).double().eval(), images(28, 28) if "eva" in name else images()
    model, T = InsVPViT(copy.deepcopy(bare), config=NO_PROMPTS).eval(), bare.forward_features(image).shape[1]
    for mask in masks(T):
        found = model.forward_features(image, attn_mask=mask)
        torch.testing.assert_close(found, bare.forward_features(image, attn_mask=mask), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, model.forward_features(image), rtol=1e-3)


def masked_blocks(model, image, mask):
    """The tokens behind the last block: attention written out, in which prompts are seen by all, and see all."""
    prompted, T = model.image_prompt(image).prompted, mask.shape[-1]
    p_s, backbone = model.specific_prompt(image, prompted), model.backbone
    h = backbone._pos_embed(backbone.patch_embed(prompted))
    bias = torch.where(mask, 0.0, -torch.inf).double() if mask.dtype == torch.bool else mask
    for j, block in enumerate(backbone.blocks):
        z = torch.cat([h, model.feature_prompt(j, p_s, len(image))], 1)  # behind the tokens: attention has no order
        q, k, v = block.attn.qkv(block.norm1(z)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 4
        scores[..., :T, :T] += bias
        z = z + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = (z + block.mlp(block.norm2(z)))[:, :T]
    return h


def test_a_masked_prompted_model_is_the_written_out_one():
    model, image = make(), images()
    with pytest.warns(UserWarning, match="takes the general path, exact but not fast: attn_mask was given"):
        model(image, attn_mask=torch.ones(7, 7, dtype=torch.bool))
    for mask in masks(7):
        expected = masked_blocks(model, image, mask)
        found, [last] = model.forward_intermediates(image, 1, output_fmt="NLC", attn_mask=mask)
        torch.testing.assert_close(last, expected[:, 3:], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, model.norm(expected), rtol=1e-10, atol=1e-10)
        ours, theirs = (
            torch.autograd.grad(h.square().sum(), [*model.common_prompts]) for h in (found, model.norm(expected))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model(image, attn_mask=mask), model.head(found[:, 0]))
    assert unsupported_reason(model) is None


@pytest.mark.parametrize(("indices", "kept"), [([1], (0,)), ([0, 2], (0, 2)), (1, (0, 2, 3))])
def test_pruning_drops_blocks_with_their_prompts(indices, kept):
    model, image = make(prompted_blocks=(0, 2, 3)), images()
    expected = model.forward_intermediates(image, indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    found = model.train().forward_intermediates(image, taken, norm=True, intermediates_only=True)
    model.eval()
    torch.testing.assert_close(model.forward_intermediates(image, taken, intermediates_only=True), expected)
    sum(one.sum() for one in found).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert model.prompted_blocks == kept == model.config.prompted_blocks and len(model.common_prompts) == len(kept)
    assert model(image).shape == (2, 7, 48) and model.num_classes == 0


def test_pruning_all_prompted_blocks_leaves_the_image_prompt():
    model, image = make(prompted_blocks=(3,)), images()
    (expected,) = model.forward_intermediates(image, [1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert model.common_prompts is None and model.specific_prompter is None
    torch.testing.assert_close(model.forward_intermediates(image, 1, intermediates_only=True), [expected])


@pytest.mark.parametrize("size", [(48, 32), 64])
def test_another_image_size_is_that_of_a_resized_backbone(size):
    model = make()
    keys, frozen = [*model.state_dict()], [p.requires_grad for p in model.parameters()]
    expected = copy.deepcopy(model)
    height, width = size if isinstance(size, tuple) else (size, size)
    expected.backbone.set_input_size((height, width))
    model.set_input_size(size)
    image = images(height, width)
    torch.testing.assert_close(model(image), expected.train(False)(image), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_features(image), blocks_one_by_one(model, image)[1])
    assert [*model.state_dict()] == keys and [p.requires_grad for p in model.parameters()] == frozen
    with pytest.raises(ValueError, match="patch_size=8: expected 16"):
        model.set_input_size(patch_size=8)


def test_layer_decay_knows_where_what_is_trained_stands():
    model = make(prompted_blocks=(1, 2, 3))
    optimizer = create_optimizer_v2(model, "adamw", 1e-3, weight_decay=0.1, layer_decay=0.5)
    blocks = {f"common_prompts.{i}": f"backbone.blocks.{i + 1}.norm1.weight" for i in range(3)}
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert scales["head.weight"] == 1 and [scales[name] for name in blocks] == [0.5**3, 0.5**2, 0.5]
    assert {scales[name] for name in scales if "prompter" in name} == {0.5**5}
    assert {decays[name] for name in blocks} == {0} and decays["specific_prompter.conv1.weight"] == 0.1
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert all(layers[name] == layers[of_block] for name, of_block in blocks.items())
    bare = timm.create_model("vit_tiny_patch16_224", **TINY)
    for name, layer in group_parameters(bare, bare.group_matcher(), reverse=True).items():
        assert layers[name if name.startswith("head") else f"backbone.{name}"] == layer


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize(
    "make_model", [InsVPViT, functools.partial(MethodViT, method=VFPT), functools.partial(TunedViT, method=LoRA)]
)
def test_a_backbone_that_is_trained_decays_as_without_prompts(name, make_model):
    bare = timm.create_model(name, num_classes=3, **(SWIN if name.startswith("swin") else TINY))
    model = make_model(copy.deepcopy(bare)).requires_grad_(True)

    def kept(of):
        optimizer = create_optimizer_v2(of, "adamw", 1e-3, weight_decay=0.1)
        undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
        return {name for name, p in of.named_parameters() if id(p) in undecayed}

    of_bare, of_backbone = kept(bare), {key for key in kept(model) if key.startswith("backbone.")}
    assert of_backbone == {f"backbone.{key}" for key in of_bare if not key.startswith("head")} != set()
    assert any(len(bare.get_parameter(key).shape) > 1 for key in of_bare)  # by name, not by shape


@pytest.mark.parametrize("method", ["full", "bias", "lora", "sidetune", "vp"])
def test_images_and_layers_of_a_method_are_those_of_its_backbone(method):
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    bare.pretrained_cfg = bare.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "input_size": (3, 32, 32)}
    make_model = TunedViT if issubclass(CLASSES[method], Tuning) else MethodViT
    model = make_model(copy.deepcopy(bare), method=CLASSES[method])
    assert resolve_model_data_config(model) == resolve_model_data_config(bare)
    assert model.get_submodule(model.default_cfg["first_conv"]) is model.backbone.patch_embed.proj
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    for name, layer in group_parameters(bare, bare.group_matcher(), reverse=True).items():
        assert layers[name if name.startswith("head") else f"backbone.{name}"] == layer
    assert all(layers[name] == layers["head.weight"] for name in layers if name.startswith("method."))


@pytest.mark.filterwarnings("ignore:.*takes the general path")
def test_layers_of_a_backbone_that_names_them_by_a_function():
    backbone = timm.create_model("cait_xxs24_224", **TINY)  # the blocks with a class token are the last ones as well
    expected = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    model = InsVPViT(backbone, config=InsVPConfig(prompt_length=2, prompted_blocks=(1, 3)))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    for ours, of_backbone in {"common_prompts.0": "blocks.1.norm1.weight", "head.weight": "head.weight"}.items():
        assert layers[ours] == expected[of_backbone]
    assert layers["common_prompts.1"] == layers["backbone.blocks_token_only.1.norm1.weight"] == 4
    optimizer = create_optimizer_v2(model, "adamw", 1e-3, layer_decay=0.5)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**n for n in (5, 3, 1, 0)}


def test_utilities_of_timm(tmp_path):
    model, image = timm.create_model(NAME, num_classes=3, prompt_length=2, **TINY).eval(), torch.randn(2, 3, 32, 32)
    average, prompts = ModelEmaV3(model, decay=0.5), model.common_prompts[1]
    with torch.no_grad():
        before = prompts.clone()
        prompts.add_(1)
    average.update(model)
    torch.testing.assert_close(average.module.common_prompts[1], before + 0.5)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing and model.recompute == "block"
    transform = create_transform(**resolve_model_data_config(model))
    assert "Normalize" in str(transform)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.config == model.config and torch.equal(again(image), model(image))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4).head.out_features == 4
    model.init_weights()
    assert not torch.equal(prompts, before + 1) and prompts.abs().max() <= 1
    assert torch.equal(model.backbone.cls_token, average.module.backbone.cls_token)
    freeze(model, ["global_prompter", "head"])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "patch_prompter",
        "specific_prompter",
        "common_prompts",
    }


def test_properties_are_the_backbones_and_have_no_keys_of_their_own():
    model = make()
    for name in ("blocks", "norm", "fc_norm", "attn_pool", "patch_embed", "feature_info", "embed_dim", "in_chans"):
        assert getattr(model, name) is getattr(model.backbone, name)
    assert (model.num_prefix_tokens, model.num_reg_tokens, model.has_class_token) == (3, 2, True)
    assert (model.head_hidden_size, model.global_pool, model.dynamic_img_size) == (48, "token", False)
    assert {name for name, _ in model.named_children()} == {
        "backbone",
        "global_prompter",
        "patch_prompter",
        "specific_prompter",
        "common_prompts",
        "head",
    }


def test_torchscript_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch.jit.script does not take InsVPViT: use torch.export.export"):
        torch.jit.script(torch.nn.Sequential(make()))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_of_the_general_path():
    model = make().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(image)
    traced = torch.jit.trace(model, image)
    torch.testing.assert_close(traced(image), expected)
    image_only = InsVPViT("resnet18", 3, InsVPConfig(common_prompt=False, specific_prompt=False)).eval()
    for one in (model, image_only):
        assert dict(inspect.getmembers(one))["training"] is False  # nothing that is asked for raises


# the registry


def test_names_have_the_tags_and_weights_of_their_backbones():
    for family in timm_models.FAMILIES:
        names = timm.list_models(module=family)
        assert names and {f"insvp_{name}" for name in names} <= {*timm.list_models("insvp_*")}
    plain = {*timm.list_models(module=["vision_transformer", "deit"], pretrained=True)}
    assert {f"insvp_{name}" for name in plain} <= {*timm.list_models("insvp_*", pretrained=True)}
    for tag in ("", ".augreg_in21k"):
        own, cfg = (timm.get_pretrained_cfg(f"{prefix}vit_base_patch16_224{tag}") for prefix in ("insvp_", ""))
        assert own.hf_hub_id == cfg.hf_hub_id and own.tag == cfg.tag and own.mean == cfg.mean
        assert (own.first_conv, own.classifier) == ("backbone.patch_embed.proj", "head")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("insvp_vit_base_patch16_224.no_such_tag")
    with pytest.raises(ValueError, match="expected none for vit_shapes_32, which is shipped"):
        timm.create_model("insvp_vit_shapes_32", pretrained=True, pretrained_cfg_overlay={"file": "weights.pth"})


def test_arguments_reach_the_configuration_the_model_and_the_backbone(tmp_path):
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=7, global_pool="avg", **TINY)
    torch.save(weights.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 7}
    arguments = {"prompt_length": 4, "prompted_blocks": (1,), "recompute": "mlp", "global_pool": "avg", **TINY}
    model = timm.create_model(NAME, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay, **arguments)
    assert model.config == InsVPConfig(prompt_length=4, prompted_blocks=(1,)) and model.recompute == "mlp"
    assert torch.equal(model.head.weight, weights.head.weight) and model.global_pool == "avg"
    assert torch.equal(model.backbone.blocks[3].mlp.fc1.weight, weights.blocks[3].mlp.fc1.weight)
    assert model.default_cfg["architecture"] == NAME
    assert model.backbone.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    again = timm.create_model(NAME, num_classes=7, checkpoint_path=str(tmp_path / "model.pth"), **arguments)
    assert torch.equal(again.common_prompts[0], model.common_prompts[0])
    described = timm.create_model(NAME, pretrained_cfg=timm.get_pretrained_cfg(NAME).to_dict(), **TINY)
    assert described.backbone.pretrained_cfg["first_conv"] == "patch_embed.proj"
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(NAME, not_an_argument=1, **TINY)
    with pytest.raises(ValueError, match="prompt_length=-1"):
        timm.create_model(NAME, prompt_length=-1, **TINY)
    with pytest.warns(UserWarning, match="drop_path_rate without effect"):
        timm.create_model(NAME, drop_path_rate=0.1, **TINY)


def test_images_are_prepared_in_the_size_that_was_set(tmp_path):
    """And so after the adapter is saved and loaded."""
    model = InsVPViT("vit_shapes_32", 2, pretrained=True)
    model.set_input_size(32)
    assert model.preprocessing is None
    model.save_pretrained(tmp_path, ["a", "b"], resolve_model_data_config(model) | {"input_size": (3, 32, 32)})
    model.set_input_size((64, 40))
    model.save_pretrained(tmp_path)
    again = load_run(tmp_path)
    assert (
        again.preprocessing["input_size"] == [3, 64, 40] and again.preprocessing["mean"] == model.preprocessing["mean"]
    )
    with torch.no_grad():
        assert torch.equal(again.model(image := torch.randn(1, 3, 64, 40)), model.eval()(image))


def test_a_drop_rate_without_effect_is_told_once(tmp_path):
    """However a frozen backbone gets it."""
    told, shipped = "drop_rate without effect, the frozen backbone", "vit_shapes_32"
    InsVPViT(shipped, 2, pretrained=True).save_pretrained(tmp_path)
    for make in (
        lambda: timm.create_model(f"insvp_{shipped}", drop_rate=0.1),
        lambda: InsVPViT(shipped, 2, drop_rate=0.1),
        lambda: InsVPViT.from_pretrained(tmp_path, drop_rate=0.1),
        lambda: create_method_model("vpt_deep", shipped, 2, backbone_kwargs={"drop_rate": 0.1}),
    ):
        with pytest.warns(UserWarning, match=told) as warned:
            make()
        assert [one.filename for one in warned] == [__file__]


def test_features_only():
    model = timm.create_model(NAME, features_only=True, out_indices=(0, 2), in_chans=1, **TINY)
    maps = model(torch.randn(2, 1, 32, 32))
    assert [tuple(one.shape) for one in maps] == [(2, 48, 2, 2)] * 2
    assert model.feature_info.reduction() == [16, 16] and model.feature_info.channels() == [48, 48]
    assert len(model.model.blocks) == 3 and model.in_chans == 1 and model.default_cfg["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="feature_cls='hook': expected 'getter'"):
        timm.create_model(NAME, features_only=True, feature_cls="hook", **TINY)


def test_the_shipped_backbone_has_a_name():
    model = timm.create_model("insvp_vit_shapes_32", pretrained=True, num_classes=10, prompt_length=2)
    plain = InsVPViT("vit_shapes_32", 10, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.parameters(), plain.backbone.parameters(), strict=True))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(["nofile.py", "--model", "x"], "the script is nofile.py: no such file"), ([], "no script")],
)
def test_a_script_that_is_not_there_is_refused(arguments, found, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm_script.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        timm_script.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"timm_script: error: {found}") and "expected one of timm, such as validate.py" in error


def test_an_import_is_light_and_registers_the_names_when_timm_is_imported():
    light = "import sys, insvp_fast; assert 'torch' not in sys.modules"
    asked = "import importlib.util; assert importlib.util.find_spec('timm')"  # as transformers does
    code = f"{light}; {asked}; import insvp_fast.timm_interface, timm; assert timm.is_model({NAME!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_new_head_is_in_the_mode_of_the_model():
    model = make()
    for training in (False, True):
        model.train(training).reset_classifier(4)
        assert all(module.training == training for module in model.head.modules())


def test_the_classes_of_a_new_head_have_no_names(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, class_names=[*"abcde"])
    model.reset_classifier(5)
    assert model.class_names is None
