"""Every kind of block, norm, MLP and activation of timm's Vision Transformers: the fast model against the reference."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from timm.models.vitamin import GeGluMlp
from torch import nn

from insvp_fast import InsVPConfig, InsVPViT, unsupported_reason
from insvp_fast.backbones import BlockOptions
from insvp_fast.testing import DEVICE, make_pair, relative_error
from tests.model.parity import assert_bf16_within_budget, assert_equal_numbers, assert_replaced_modules_are_noticed

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
CONFIG = InsVPConfig(prompt_length=3, global_prompt=False, specific_prompt=False)
KINDS = {
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "PyTorch's tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "quick GELU": {"act_layer": "quick_gelu"},
    "SiLU": {"act_layer": "silu"},
    "SwiGLU packed": {"mlp_layer": SwiGLUPacked},
    "SwiGLU": {"mlp_layer": SwiGLU, "act_layer": "silu", "proj_bias": False},
    "GeGLU of ViTamin": {"mlp_layer": GeGluMlp},
    "the gate last": {"mlp_layer": GluMlp, "act_layer": "quick_gelu"},
    "MLP norm": {"scale_mlp_norm": True},
    "SwiGLU with a norm": {"mlp_layer": SwiGLU, "act_layer": "silu", "scale_mlp_norm": True},
    "RMSNorm": {"norm_layer": "rmsnorm", "qk_norm": True, "pre_norm": True, "scale_attn_norm": True},
    "norm of patches": {"embed_norm_layer": "layernorm"},
    "RMSNorm of patches": {"embed_norm_layer": "rmsnorm", "dynamic_img_size": True},
    "parallel things": {"block_fn": ParallelThingsBlock, "init_values": 0.3, "qk_norm": True},
    "three things": {"block_fn": partial(ParallelThingsBlock, num_parallel=3), "mlp_layer": SwiGLUPacked},
    "parallel scaling": {"block_fn": ParallelScalingBlock, "init_values": 0.3},
    "parallel scaling of ViT-22B": {
        "block_fn": ParallelScalingBlock,
        "qkv_bias": False,
        "qk_norm": True,
        "norm_layer": RmsNorm,
    },
    "one projection": {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True), "act_layer": "gelu_tanh"},
    "norm behind": {"block_fn": ResPostBlock, "init_values": 0.3, "qkv_bias": False},
    "norm behind SwiGLU": {"block_fn": ResPostBlock, "mlp_layer": SwiGLUPacked, "norm_layer": "rmsnorm"},
}


def pair(kind, **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the general path would warn
        models = make_pair("vit_tiny_patch16_224", CONFIG, **TINY | KINDS[kind] | options)
    return *models, torch.randn(2, 3, 32, 32, device=DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind):
    """One token, then all; then with what is not the default."""
    assert_equal_numbers(*pair(kind))
    others = {"fold_norm": False, "recompute": "mlp"}
    assert_equal_numbers(*pair(kind, global_pool="avg", reg_tokens=1), settings=({}, others))


@pytest.mark.parametrize("amp", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind, amp):
    assert_bf16_within_budget(*pair(kind), autocast=amp)


def test_compiles_whole():
    _, fast, image = pair("SwiGLU with a norm", depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert relative_error(compiled(image), fast(image)) < 1e-5


class Louder(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


def reorder(children):
    children["attn"] = children.pop("attn")  # now the last


CHANGES = {  # to the path of a module and what is done to it
    "another norm of ViTamin": ("GeGLU of ViTamin", "blocks.0.mlp", lambda m: setattr(m, "norm", nn.Tanh())),
    "another activation": ("tanh GELU", "blocks.1.mlp", lambda m: setattr(m, "act", nn.ReLU())),
    "a subclass": ("tanh GELU", "blocks.1.mlp", lambda m: setattr(m, "act", Louder())),
    "a form of GELU": ("PyTorch's tanh GELU", "blocks.1.mlp.act", lambda m: setattr(m, "approximate", "none")),
    "the other half": ("SwiGLU packed", "blocks.0.mlp", lambda m: setattr(m, "gate_last", True)),
    "two activations": ("SwiGLU packed", "blocks.0.mlp", lambda m: setattr(m, "act", nn.Sigmoid())),
    "an RMSNorm of the hidden layer": ("MLP norm", "blocks.0.mlp", lambda m: setattr(m, "norm", RmsNorm(192))),
    "one epsilon": ("RMSNorm", "blocks.0.norm2", lambda m: setattr(m, "eps", 0.5)),
    "another norm": ("RMSNorm", "blocks.0", lambda m: setattr(m, "norm1", nn.RMSNorm(48))),
    "a thing more": ("parallel things", "blocks.0.ffns", lambda m: m.append(copy.deepcopy(m[0]))),
    "things in another order": ("parallel things", "blocks.0.attns.1", lambda m: reorder(m._modules)),
    "a thing without a scale": ("parallel things", "blocks.0.attns.1", lambda m: delattr(m, "ls")),
    "a scale": ("parallel things", "blocks.0.attns.1", lambda m: setattr(m, "ls", nn.Tanh())),
    "another split": (
        "parallel scaling",
        "blocks.0",
        lambda m: vars(m).update(in_split=[96, 144, 48, 48], head_dim=16),
    ),
    "two biases": (
        "parallel scaling",
        "blocks.0",
        lambda m: setattr(m, "mlp_bias", nn.Parameter(torch.ones(192), requires_grad=False)),
    ),
    "dropout": ("parallel scaling", "blocks.0", lambda m: (m.train(), setattr(m.attn_drop, "p", 0.5))),
    "a gate": ("tanh GELU", "blocks.0.attn", lambda m: setattr(m, "gate", torch.tanh)),
    "a norm behind": ("norm behind", "blocks.0", lambda m: setattr(m, "norm1", nn.Tanh())),
    "a norm of patches": ("norm of patches", "patch_embed", lambda m: setattr(m, "norm", nn.Softmax(-1))),
}


@pytest.mark.filterwarnings("ignore:.*takes the general path:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module(change):
    kind, path, function = CHANGES[change]
    reference, fast, image = pair(kind)
    before = fast(image)
    for model in (reference, fast):
        function(model.backbone.get_submodule(path))
        model.backbone.requires_grad_(False)
    if (expected := result(reference, image)) != "raises":
        assert relative_error(result(fast, image), expected) < 1e-6 < relative_error(before, expected)
    else:
        assert result(fast, image) == "raises"


@pytest.mark.parametrize("kind", KINDS)
def test_every_replaced_module_takes_the_general_path(kind):
    assert_replaced_modules_are_noticed(pair(kind)[1])


def result(model, image):
    torch.manual_seed(1)
    try:
        return model(image)
    except RuntimeError:
        return "raises"


def test_replaced_functions(monkeypatch):
    for kind, name in (
        ("quick GELU", "timm.layers.activations.quick_gelu"),
        ("RMSNorm", "timm.layers.norm.rms_norm"),
        ("SiLU", "torch.nn.functional.silu"),
        ("SwiGLU", "timm.layers.mlp.SwiGLU.forward"),
        ("parallel things", "torch.nn.Sequential.forward"),
    ):
        _, fast, _ = pair(kind)
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *args, **kwargs: None)
            assert unsupported_reason(fast).endswith("has been replaced")


def test_nearly_all_names_are_fast():
    """Of timm's architectures, made tiny, one of each kind."""
    fast = (
        "vit_base_patch32_siglip_256",
        "vit_so400m_patch16_siglip_gap_256",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_giant_patch14_reg4_dinov2",
        "vit_base_patch16_xp_224",
        "vit_pwee_patch16_reg1_gap_256",
        "vit_small_patch16_18x2_224",
        "vit_base_patch16_rpn_224",
        "beit3_base_patch16_224",
        "aimv2_large_patch14_224",
        "test_vit4",
    )
    for name in fast:
        backbone = timm.create_model(name, embed_dim=48, num_heads=3, depth=1)
        assert unsupported_reason(InsVPViT(backbone, 3, CONFIG)) is None, name


def test_layer_scales_are_folded_but_into_weights_of_fp16():
    """There a weight times a small scale has few bits."""
    for dtype, fold_norm in itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False)):
        options = BlockOptions(dtype, fold_norm, "auto", "pre", (1, 1), None)
        assert options.folds_scale == (fold_norm and dtype != torch.float16)
