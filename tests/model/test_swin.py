"""Swin: the reference against timm's own blocks, and the fast model against the reference."""

import copy
import types
import warnings

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch._subclasses import FakeTensorMode

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, ops, unsupported_reason
from insvp_fast.backbones.swin import embed
from insvp_fast.backbones.windows import tokens_of_windows
from insvp_fast.reference.swin import block_with_prompts
from insvp_fast.testing import DEVICE, make_pair, relative_error, saved_bytes, trained_gradients
from tests.model.parity import assert_equal_numbers, assert_low_precision, assert_replaced_modules_are_noticed
from tests.model.test_model import images

NAME = "swin_tiny_patch4_window7_224"
TINY = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
CONFIG = InsVPConfig(prompt_length=3, global_dropout=0, specific_kernels=(3, 3, 3))
VARIANTS = {  # that have a fast path
    "plain": {},
    "rectangular": {"img_size": (32, 48), "window_size": ((2, 4), (4, 3))},
    "three stages": {"img_size": 48, "window_size": (6, 3, 3), "depths": (1, 3, 2), "num_heads": (1, 2, 4)},
    "one window": {"img_size": 16, "depths": (2,), "num_heads": (2,)},
    "partitioned always": {"always_partition": True},
    "patch 2": {"img_size": 16, "patch_size": 2, "in_chans": 1},
    "other heads": {"head_dim": 5, "qkv_bias": False, "mlp_ratio": 1.5},
    "dropouts": dict.fromkeys(("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.5),
    "pooling": {"global_pool": "max"},
}
GENERAL = {  # have none, because
    "windows": ({"window_size": 3}, "blocks.0 has window_size=(3, 3): expected 'a divisor of the grid 8x8"),
    "one side of windows": ({"window_size": ((4, 3), 4)}, "blocks.0 has window_size=(4, 3): expected 'a divisor of"),
    "merging": ({"img_size": 20, "window_size": 5}, "layers.1 has input_resolution=(5, 5): expected 'even sides"),
    "merging of one side": (
        {"img_size": (16, 20), "window_size": ((4, 5), (2, 3))},
        "layers.1 has input_resolution=(4, 5): expected 'even sides",
    ),
    "image sizes": ({"dynamic_img_size": True}, "patch_embed has strict_img_size=False"),
}


def pair(config=CONFIG, **change):
    """Reference and fast model, with position biases that matter."""
    reference, fast = make_pair(NAME, config, **(TINY | change))
    with torch.no_grad():
        for name, parameter in fast.backbone.named_parameters():
            if "bias_table" in name:
                parameter.normal_()
    reference.load_state_dict(fast.state_dict())
    return reference, fast


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (8, 4), (9, 7), (3, 2)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_reference_without_prompts_is_timms_block(grid, dynamic, fused):
    torch.manual_seed(0)
    for shift in (0, 2):
        block = SwinTransformerBlock(12, grid, 3, window_size=4, shift_size=shift, dynamic_mask=dynamic).double().eval()
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        block.attn.fused_attn = fused
        h = torch.randn(2, *grid, 12, dtype=torch.float64)
        torch.testing.assert_close(block_with_prompts(block, h, h.new_empty(2, 0, 12)), block(h))


def test_prompts_are_further_keys_and_values_of_each_window():
    """One window of all tokens, and prompts: the attention of a ViT, with a bias for pairs of tokens."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(12, (3, 2), 3, window_size=(3, 2)).double().eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    h, prompts = torch.randn(2, 3, 2, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    tokens = torch.cat([h.flatten(1, 2), prompts], dim=1)
    q, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 2
    scores[..., :6, :6] += block.attn._get_rel_pos_bias()
    x = tokens + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    expected = (x + block.mlp(block.norm2(x)))[:, :6]
    torch.testing.assert_close(block_with_prompts(block, h, prompts).flatten(1, 2), expected)


def test_the_reference_refuses_other_blocks():
    class Other(SwinTransformerBlock):
        pass

    arguments = torch.randn(1, 4, 4, 8), torch.randn(1, 1, 8)
    with pytest.raises(TypeError, match="a block has a Other: expected timm's SwinTransformerBlock"):
        block_with_prompts(Other(8, (4, 4), 2), *arguments)
    block = SwinTransformerBlock(8, (4, 4), 2)
    block.attn.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(TypeError, match="a WindowAttention has a forward or hooks of its own, which would not run"):
        block_with_prompts(block, *arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbones(variant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the general path would warn
        reference, fast = pair(**VARIANTS[variant])
    assert_equal_numbers(reference, fast, images(fast))
    image = images(fast, 1)
    assert relative_error(fast.forward_features(image), reference.forward_features(image)) < 1e-5


@pytest.mark.parametrize("variant", GENERAL)
def test_general_path(variant):
    change, reason = GENERAL[variant]
    with pytest.warns(UserWarning, match="general path, exact but not fast"):
        reference, fast = pair(**change)
    assert reason in unsupported_reason(fast)
    assert_equal_numbers(reference, fast, images(fast))


@pytest.mark.parametrize(
    "switch",
    [
        {"prompt_length": 0},
        {"prompted_blocks": (1, 2)},
        {"prompted_blocks": (1, 3)},  # of one stage alone, a gradient of the prompter would be 0
        {"common_prompt": False},
        {"specific_prompt": False},
        {"specific_input": "prompted"},
        {"common_prompt": False, "specific_prompt": False},
    ],
    ids=str,
)
def test_configurations(switch):
    settings = {"prompt_length": 3, "global_dropout": 0, "specific_kernels": (3, 3, 3)} | switch
    reference, fast = pair(InsVPConfig(**settings))
    assert_equal_numbers(reference, fast, images(fast, 3))
    assert fast(images(fast, 0)).shape == (0, 10)  # which timm's blocks cannot do


@pytest.mark.parametrize(
    ("amp", "dtype"), [(True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16)], ids=str
)
def test_low_precision(amp, dtype):
    def make():
        reference, fast = pair()
        return reference, fast, images(fast, 4)

    assert_low_precision(make, amp, dtype)


@pytest.mark.parametrize(
    "options",
    [{"recompute": "mlp"}, {"recompute": "block"}, {"attention": "reference"}, {"attention": "sdpa"}],
    ids=str,
)
def test_options(options):
    reference, fast = pair()
    image = images(fast)
    kept = saved_bytes(fast, image)
    for name, value in options.items():
        setattr(fast, name, value)
    fast.fold_norm = False
    assert_equal_numbers(reference, fast, image)
    assert "recompute" not in options or saved_bytes(fast, image) < 0.9 * kept
    assert torch.equal(copy.deepcopy(fast)(image), fast(image))


def test_compiles_whole():
    _, fast = pair(InsVPConfig(global_prompt=False, patch_prompt=False, specific_prompt=False), depths=(2, 1))
    image = images(fast)
    expected = trained_gradients(fast, image)
    values = trained_gradients(torch.compile(fast, fullgraph=True, backend="aot_eager"), image)
    for name, value in expected.items():
        assert relative_error(values.get(name, values.get(f"_orig_mod.{name}")), value) < 1e-5, name


def test_windows_kept_in_inference_serve_in_training():
    _, fast = pair(img_size=64)
    image = images(fast)
    with torch.inference_mode():
        fast(image)
    trained_gradients(fast, image)
    tokens, of_another_device = torch.empty(0), torch.empty(0, device="meta")
    kept, other = (tokens_of_windows((8, 8), (4, 4), (2, 2), like) for like in (tokens, of_another_device))
    assert not kept.is_inference() and kept is tokens_of_windows((8, 8), (4, 4), (2, 2), tokens)
    # on a GPU another stream would read them unordered, and a graph would own them
    assert other is not tokens_of_windows((8, 8), (4, 4), (2, 2), of_another_device)


@pytest.mark.parametrize("name", ["relative_position_bias_table", "relative_position_index"])
@pytest.mark.parametrize("window", [4, 12])  # the index of 12 has 166 KB
def test_a_position_bias_follows_its_table_and_index(name, window):
    reference, fast = pair(img_size=16 * window, window_size=window)
    image = images(fast)
    with torch.no_grad():
        before = fast(image)
        for model in (reference, fast):
            tensor = getattr(model.backbone.layers[0].blocks[0].attn, name)
            tensor.data[-1] = tensor[0]  # which no version counter sees
        assert not torch.equal(fast(image), before)
        assert relative_error(fast(image), reference(image)) < 1e-5


def test_nothing_of_fake_tensors_is_kept():
    _, fast = pair(img_size=(48, 64), window_size=(3, 4))
    image = images(fast)
    for _ in range(2):  # before and after a real image
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            assert fast(mode.from_tensor(image)).shape[0] == len(image)
        assert fast(image).isfinite().all()


def test_whatever_the_buffers_hold_is_used(monkeypatch):
    """Also when it changes without notice to PyTorch, and where the model has been examined before."""
    reference, fast = pair()
    image = images(fast)
    fast(image)
    taken = []
    plain = ops.window_attention
    monkeypatch.setattr(ops, "window_attention", lambda *a, **k: taken.append(a) or plain(*a, **k))
    mask = torch.randn_like(fast.backbone.layers[0].blocks[1].attn_mask)
    for model in (reference, fast):
        block = model.backbone.layers[0].blocks[1]
        block.attn_mask.data.copy_(mask)
        index = block.attn.relative_position_index
        index.data.copy_(index.flip(0).clone())
    assert_equal_numbers(reference, fast, image)
    for model in (reference, fast):
        model.backbone.layers[0].blocks[1].attn_mask = None
    assert_equal_numbers(reference, fast, image)
    assert taken  # all of it on the fast path


def change_window(model):
    model.backbone.layers[0].blocks[0].window_size = (2, 2)


def add_hook(model):
    model.backbone.layers[1].downsample.reduction.register_forward_hook(lambda module, args, out: 2 * out)


def add_buffer(model):
    model.backbone.layers[0].blocks[0].register_buffer("other", torch.ones(1))


def train_a_bias(model):
    model.backbone.layers[0].blocks[0].attn.relative_position_bias_table.requires_grad_()


def replace_merging(model):
    merging = model.backbone.layers[1].downsample
    merging.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), merging)


def at(path, **changes):
    return lambda model: [setattr(model.backbone.get_submodule(path), *change) for change in changes.items()]


def train_attention(model):
    attn = model.backbone.layers[0].blocks[0].attn
    attn.attn_drop.p, attn.training = 0.5, True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_window, "window_size"),
        (add_hook, "has a hook"),
        (add_buffer, "has a buffer other"),
        (train_a_bias, "relative_position_bias_table that is trained"),
        (replace_merging, "has a forward of its own"),
        (train_attention, "blocks.0.attn has training=True"),
        (at("layers.0.blocks.1", dynamic_mask=True), "dynamic_mask=True"),
        (at("layers.0.blocks.0.attn.softmax", dim=-2), "dim=-2"),
        (at("layers.0.blocks.0.attn", attn_drop=nn.Tanh()), "attn.attn_drop is torch's Tanh"),
        (at("layers.0.blocks.0.attn", proj_drop=nn.Tanh()), "attn.proj_drop is torch's Tanh"),
        (at("layers.0.blocks.0", drop_path1=nn.Tanh()), "drop_path1 is torch's Tanh"),
        (at("layers.0.blocks.0", drop_path2=nn.Tanh()), "drop_path2 is torch's Tanh"),
        (at("layers.0.blocks.0", norm1=nn.Tanh()), "norm1 is torch's Tanh"),
        (at("layers.0.blocks.0", norm2=nn.Tanh()), "norm2 is torch's Tanh"),
        (at("layers.0", downsample=nn.Tanh()), "layers.0.downsample is torch's Tanh"),
        (at("layers.1.downsample", norm=nn.Tanh()), "downsample.norm is torch's Tanh"),
    ],
)
def test_what_the_fast_path_does_not_know_stops_it(change, reason):
    reference, fast = pair()
    assert unsupported_reason(fast) is None
    change(reference), change(fast)
    assert reason in unsupported_reason(fast)
    if change is not change_window:  # which timm refuses
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_equal_numbers(reference, fast, images(fast))


def test_every_replaced_module_takes_the_general_path():
    assert_replaced_modules_are_noticed(pair()[1], {"patch_embed.norm", "norm"})


def test_carried_prompts_are_refused():
    for model in (InsVPReference, InsVPViT):
        with pytest.raises(ValueError, match="expected a backbone of one width"):
            model(NAME, 5, InsVPConfig(carry_prompts=True), **TINY)


def test_adapters_and_8_bit_images(tmp_path):
    _, fast = pair()
    pixels = torch.randint(0, 256, images(fast).shape, dtype=torch.uint8, device=DEVICE)
    assert fast.eval()(pixels).shape == (2, 10)
    copied = InsVPViT(copy.deepcopy(fast.backbone), 10, CONFIG).eval().to(DEVICE)
    state = {name: value for name, value in fast.state_dict().items() if not name.startswith("backbone.")}
    copied.load_state_dict(state, strict=False)
    assert torch.equal(copied(pixels), fast(pixels))


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.Tanh()], ids=str)
def test_the_stream_begins_in_the_dtype_of_the_weights(norm):
    _, fast = pair()
    backbone = fast.cpu().backbone
    backbone.patch_embed.norm = norm.requires_grad_(False)
    patches = torch.randn(2, 64, 48)
    embedded, exact = (embed(backbone, x, (8, 8)) for x in (patches.bfloat16(), patches))  # as under autocast
    assert embedded.dtype == exact.dtype == torch.float32
    assert relative_error(embedded, exact) < 2e-2
