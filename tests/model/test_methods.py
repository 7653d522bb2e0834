"""The methods besides InsVP: each against a plain restatement of its equations, and the fast path against that."""

import copy
import inspect
import math
import re
import warnings
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, ops, unsupported_reason
from insvp_fast.backbones import BlockOptions, vit_blocks
from insvp_fast.methods import (
    CLASSES,
    MethodViT,
    PromptMethod,
    Prompts,
    TunedViT,
    VPTDeep,
    create_model,
)
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.testing import DEVICE, assert_within_budget, relative_error, trained_gradients

NAME = "vit_tiny_patch16_224"
SIZE = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 4, "reg_tokens": 1}
OPTIONS = {
    "linear": {},
    "vpt_deep": {"length": 5, "projection": 7, "blocks": [0, 1, 3]},
    "vpt_shallow": {"length": 5},
    "vp": {"padding": 5},
    "e2vpt": {"length": 4, "num_keys": 3, "segments": 8},
    "vapt": {"length": 4, "kernel": 2, "hidden": 5},
    "vfpt": {"length": 5, "fraction": 0.7},
    "dualprompt": {"general_length": 2, "general_blocks": [0], "expert_length": 3, "expert_blocks": [1, 3]},
}


def make_pair(name, options=None, **kwargs):
    """The reference and the fast model with the same random weights; what begins as zeros or ones is random too."""
    backbone = timm.create_model(NAME, **SIZE | kwargs)
    method = partial(CLASSES[name], **OPTIONS[name] if options is None else options)
    model = PromptedReference(copy.deepcopy(backbone), 6, method=method).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in model.method.buffers():  # E2VPT's masks
            buffer.bernoulli_(0.7)
    fast = MethodViT(backbone, 6, method=method).to(DEVICE)
    fast.load_state_dict(model.state_dict())
    return model, fast


# The equations again, in other words: one token and one head at a time where that is simple, with explicit sums.


def attend(attn, y, more):
    """Attention of the normed tokens [S, D] of one image to themselves and to further keys and values, [M, D] each."""
    q, k, v = (y @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=-1)
    if more is not None:
        k, v = torch.cat([more[0], k]), torch.cat([more[1], v])
    outputs, d = [], q.shape[1] // attn.num_heads
    for i in range(0, q.shape[1], d):
        scores = torch.exp(q[:, i : i + d] @ k[:, i : i + d].T / math.sqrt(d))
        outputs.append(scores / scores.sum(1, keepdim=True) @ v[:, i : i + d])
    return torch.cat(outputs, dim=1) @ attn.proj.weight.T + attn.proj.bias


def norm(layer, x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, False, keepdim=True) + layer.eps) * layer.weight + (
        layer.bias
    )


def run_block(block, x, more=None):
    x = x + attend(block.attn, norm(block.norm1, x), more)
    hidden = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    return x + hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def restate(model, image, name):
    """The logits of one image [C, H, W]."""
    backbone, method = model.backbone, model.method
    image = vp(method, image) if name == "vp" else image
    x = backbone._pos_embed(backbone.patch_embed(image[None]))[0]
    T, carried = len(x), x[:0]
    for j, block in enumerate(backbone.blocks):
        p, more = RESTATED[name](method, j, x) if name in RESTATED else (None, None)
        p = carried if p is None else p
        z = run_block(block, torch.cat([x, p]), more)
        x, carried = z[:T], z[T:] if name == "vpt_shallow" else x[:0]
    return norm(backbone.norm, x)[0] @ model.head.weight.T + model.head.bias


def vp(method, image):
    image, p, (H, W) = image.clone(), len(method.top[0]), image.shape[1:]
    image[:, :p] += method.top
    image[:, H - p :] += method.bottom
    image[:, p : H - p, :p] += method.left
    image[:, p : H - p, W - p :] += method.right
    return image


def vpt_deep(method, j, x):
    if j not in (0, 1, 3):
        return None, None
    return method.prompts[(0, 1, 3).index(j)] @ method.projection.weight.T + method.projection.bias, None


def vpt_shallow(method, j, x):
    return (method.prompts[0] if j == 0 else None), None


def e2vpt(method, j, x):
    p, keys = method.prompts[j].clone(), method.keys_values[j][0]
    for i in range(len(p)):
        for r, kept in enumerate(method.segment_mask[j, i]):
            p[i, 6 * r : 6 * (r + 1)] *= kept * method.token_mask[j, i]  # 8 segments of 6
    return p, (keys, keys)


def vapt(method, j, x):
    if j == 0:
        return method.prompts[0], None
    D = x.shape[1]
    grid = norm(method.norms[j - 1], x[2:]).T.reshape(1, D, 6, 4)  # behind class and register token
    kernel = method.kernels[j - 1].expand(D, 1, 2, 2)
    y = F.conv2d(grid, kernel, groups=D).reshape(D, 15) @ method.averages[j - 1].reshape(4, 15).T
    y = (y + method.biases[j - 1].T).T
    return y + torch.clamp(y @ method.fc1.weight.T, min=0) @ method.fc2.weight.T, None


def vfpt(method, j, x):
    p = method.prompts[j]
    n, D = 3, p.shape[1]  # floor(0.7 * 5) prompts
    rows, columns = (torch.outer(r, r) * 2 * math.pi / len(r) for r in (torch.arange(s).double() for s in (n, D)))
    real = rows.cos() @ p[:n] @ columns.cos() - rows.sin() @ p[:n] @ columns.sin()
    return torch.cat([real, p[n:]]), None


def dualprompt(method, j, x):
    if j not in (0, 1, 3):
        return None, None
    return None, method.keys_values[(0, 1, 3).index(j)].chunk(2, dim=1)


RESTATED = {f.__name__: f for f in (vpt_deep, vpt_shallow, e2vpt, vapt, vfpt, dualprompt)}


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_says_what_the_equations_say(name):
    model = make_pair(name)[0].double().cpu().eval()
    image = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    expected = torch.stack([restate(model, one, name) for one in image])
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", OPTIONS)
def test_fast_path_has_the_numbers_of_the_reference(name, pool):
    """In training, under the same dropout masks, for odd batches; gradients of all that is trained."""
    model, fast = make_pair(name, global_pool=pool)
    assert unsupported_reason(fast) is None
    for batch in (3, 0):
        image = torch.randn(batch, 3, 48, 32, device=DEVICE)
        exact = trained_gradients(copy.deepcopy(model).double(), image.double())
        plain, values = trained_gradients(model, image), trained_gradients(fast, image)
        assert values.keys() == exact.keys() == {"logits", *(n for n, p in fast.named_parameters() if p.requires_grad)}
        for key, value in values.items() if batch else ():
            allowed = max(1e-5, 2 * relative_error(plain[key], exact[key]))
            assert relative_error(value, exact[key]) <= allowed, f"{key}: {relative_error(value, exact[key]):.1e}"
    fast.recompute = "block"
    image = torch.randn(3, 3, 48, 32, device=DEVICE)
    again = trained_gradients(fast, image)
    fast.recompute = "none"
    assert all(torch.equal(value, again[key]) for key, value in trained_gradients(fast, image).items())


@pytest.mark.parametrize("name", ["vpt_shallow", "e2vpt", "vapt", "vfpt"])
def test_16_bits(name):
    model, fast = make_pair(name)
    image = torch.randn(3, 3, 48, 32, device=DEVICE)
    exact = trained_gradients(copy.deepcopy(model).double(), image.double())
    plain, values = (trained_gradients(m, image, autocast=torch.bfloat16) for m in (model, fast))
    for key, value in values.items():
        assert_within_budget(value, plain[key], exact[key], torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "queries"),
    [("vpt_deep", [26] * 4), ("e2vpt", [26] * 4), ("vpt_shallow", [31, 31, 31, 26]), ("dualprompt", [26] * 4)],
)
def test_only_prompts_that_run_on_ask_queries(name, queries, monkeypatch):
    _, fast = make_pair(name, global_pool="avg")
    asked, attention = [], ops.attention
    monkeypatch.setattr(
        ops, "attention", lambda qkv, heads, T, *a, **k: asked.append(T) or attention(qkv, heads, T, *a, **k)
    )
    fast(torch.randn(1, 3, 48, 32, device=DEVICE))
    assert asked == queries  # of 24 patches, a class token and a register


@pytest.mark.parametrize("blocks", [[0], [1], [0, 2], [1, 2, 3]])
def test_prompts_run_on_to_the_next_that_replace_them(blocks):
    class Carried(VPTDeep):
        carry_prompts = True

    backbone, method = timm.create_model(NAME, **SIZE), partial(Carried, length=3, dropout=0.0, blocks=blocks)
    model = PromptedReference(copy.deepcopy(backbone), 6, method=method)
    fast = MethodViT(backbone, 6, method=method)
    fast.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(fast(image), model(image), rtol=1e-5, atol=1e-5)
    assert unsupported_reason(fast) is None


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
def test_vpt_is_insvp_with_switches(name):
    config = getattr(InsVPConfig, name)(5, common_dropout=0.0)
    insvp = InsVPReference(timm.create_model(NAME, **SIZE), 6, config)
    model = create_model(name, copy.deepcopy(insvp.backbone), 6, length=5, dropout=0.0)
    model.head.load_state_dict(insvp.head.state_dict())
    with torch.no_grad():
        for own, given in zip(model.method.prompts, insvp.common_prompts, strict=True):
            own.copy_(given)
    image = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(model(image), insvp(image), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@pytest.mark.parametrize("name", ["dualprompt", "vpt_shallow"])
def test_a_mask_leaves_prompts_and_keys_alone(name):
    model = make_pair(name)[1].eval()
    image, T = torch.randn(2, 3, 48, 32, device=DEVICE), 2 + 6 * 4
    for nothing in (torch.ones(T, T, dtype=torch.bool), torch.zeros(2, 1, T, T)):
        masked = model(image, attn_mask=nothing.to(DEVICE))
        torch.testing.assert_close(masked, model(image), rtol=1e-5, atol=1e-5)
    only_itself = model(image, attn_mask=torch.eye(T, dtype=torch.bool, device=DEVICE))
    assert not torch.allclose(only_itself, masked, rtol=1e-2) and only_itself.isfinite().all()


def test_named_configurations():
    assert InsVPConfig.vpt_deep(length=7).prompt_length == 7
    assert InsVPConfig.vpt_shallow(common_dropout=0.0) == InsVPConfig.vpt_deep(
        prompted_blocks=1, carry_prompts=True, common_dropout=0.0
    )
    model = InsVPViT(timm.create_model(NAME, **SIZE), 6, InsVPConfig.linear_probe())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def assert_uniform(tensor, bound):
    """Of a large sample: it is uniform in (-bound, bound)."""
    assert 0.99 * bound < tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("share", [True, False])
def test_e2vpt_begins_as_the_authors_tensors_of_each_head(share):
    method = create_model("e2vpt", NAME, 6, backbone_kwargs=SIZE, num_keys=50, segments=8, share=share).method
    assert method.geometry.num_heads == 3
    for tensor in method.keys_values:
        assert tensor.shape == (1 if share else 2, 50, 48)
        assert_uniform(tensor, math.sqrt(6 * 3 / (50 * 48)))


def test_vpt_begins_with_one_bound_in_all_stages_of_a_swin():
    """That of the first stage, as in the authors' code; of a projection, that of its width."""
    swin = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)}
    method = create_model("vpt_deep", "swin_tiny_patch4_window7_224", 6, backbone_kwargs=swin, length=200).method
    assert [p.shape[1] for p in method.prompts] == [32, 64]
    for prompts in method.prompts:
        assert_uniform(prompts, math.sqrt(6 / (3 * 2**2 + 32)))
    method = create_model("vpt_deep", NAME, 6, backbone_kwargs=SIZE, length=900, projection=7, blocks=[2]).method
    assert_uniform(method.prompts[0], math.sqrt(6 / (3 * 8**2 + 7)))


def test_scores_of_masks_are_the_derivatives_and_the_lowest_are_pruned():
    model = make_pair("e2vpt")[0].double().cpu().eval()
    method, image = model.method, torch.randn(2, 3, 48, 32, dtype=torch.float64)
    tokens, segments = method.importance(lambda: model(image).square().sum())
    assert not method.token_mask.requires_grad
    for mask, score, place in ((method.token_mask, tokens, (1, 2)), (method.segment_mask, segments, (2, 3, 5))):
        before, step, values = mask[place].item(), 1e-5, []
        for value in (before - step, before + step):
            mask[place] = value
            values.append(model(image).square().sum().item())
        mask[place] = before
        assert abs(values[1] - values[0]) / (2 * step) == pytest.approx(score[place].item(), rel=1e-6, abs=1e-9)
    method.prune((tokens, segments), tokens=0.25, segments=0.5)
    assert (method.token_mask == 0).sum() == 4 and (method.segment_mask == 0).sum() == 64
    assert tokens[method.token_mask == 0].max() <= tokens[method.token_mask == 1].min()
    with pytest.raises(ValueError, match="tokens=2: expected 0 to 1"):
        method.prune((tokens, segments), tokens=2, segments=0)


def test_a_method_of_ones_own():
    """A mean of the tokens as a prompt, and as a key that nobody announced."""

    class Mean(PromptMethod):
        reads_tokens = True

        def block_prompts(self, block, context, batch, tokens=None):
            mean = tokens.mean(1, keepdim=True)
            return Prompts(mean, keys_values=torch.cat([mean, mean], dim=2) if self.with_keys else None)

    Mean.with_keys = False
    backbone = timm.create_model(NAME, **SIZE)
    model, fast = PromptedReference(copy.deepcopy(backbone), 6, method=Mean), MethodViT(backbone, 6, method=Mean)
    fast.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(fast(image), model(image), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the method is a Mean: expected one of"):
        fast.save_pretrained("anywhere")
    Mean.with_keys = True
    with pytest.raises(ValueError, match="block 0 have keys_values: expected Mean.gives_keys_values=True"):
        fast(image)


def test_keys_and_values_beside_prompts_with_lengths_are_refused():
    """They would stand behind the padding, which the lengths cut off."""
    block = timm.create_model(NAME, **SIZE).blocks[0].requires_grad_(False)
    residual, tokens = torch.randn(2, 5, SIZE["embed_dim"]), torch.randn(2, 3, SIZE["embed_dim"])
    prompts = Prompts(tokens, torch.tensor([1, 3]))
    options = BlockOptions(torch.float32, True, "auto", "pre", (2, 2), None)
    assert vit_blocks.run_block(block, residual, None, prompts, options)[0].isfinite().all()
    prompts = prompts._replace(keys_values=torch.randn(2, 4, 2 * SIZE["embed_dim"]))
    for num_queries in (None, 1):
        with pytest.raises(ValueError, match="prompts have lengths and keys_values: expected one of them"):
            vit_blocks.run_block(block, residual, None, prompts, options, num_queries)


def test_settings_that_are_not_known_are_not_saved(tmp_path):
    """Else the model comes back with other settings of the same shapes, and other numbers."""
    model = MethodViT(NAME, 6, method=lambda geometry: CLASSES["vfpt"](geometry, fraction=0.2), **SIZE)
    with pytest.raises(ValueError, match="the settings of the VFPT are not known: expected method=VFPT, or a partial"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*takes the general path")
def test_hooks_that_would_not_run_are_refused():
    model = create_model("dualprompt", NAME, 6, backbone_kwargs=SIZE, **OPTIONS["dualprompt"])
    size = {key: value for key, value in SIZE.items() if key != "reg_tokens"}
    relative = InsVPReference(timm.create_model("vit_relpos_small_patch16_224", **size))
    image = torch.randn(1, 3, 48, 32)
    for one, attention in ((model, "Attention"), (relative.eval(), "RelPosAttention")):
        attn = one.backbone.blocks[-1].attn
        before = one(image)
        with attn.qkv.register_forward_hook(lambda module, given, out: 2 * out):
            assert not torch.equal(one(image), before)
        handle = attn.register_forward_hook(lambda module, given, out: 2 * out)
        with handle, pytest.raises(TypeError, match=f"a {attention} has a forward or hooks of its own"):
            one(image)


def test_timms_interface():
    """The tokens after each block are without prompts, and a method learns at the rate of the head."""
    model, fast = make_pair("vpt_shallow", options={"length": 5, "dropout": 0.0})
    image = torch.randn(2, 3, 48, 32, device=DEVICE)
    features, maps = fast.forward_intermediates(image, [0, 2, 3], output_fmt="NLC")
    blocks = model.block_outputs(image, [0, 2, 3])
    for found, expected in zip(maps, blocks, strict=True):
        torch.testing.assert_close(found, expected[:, 2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, model.forward_features(image), rtol=1e-5, atol=1e-5)
    groups = param_groups_layer_decay(fast, layer_decay=0.5)
    assert {p for g in groups for p in g["params"] if g["lr_scale"] == 1} == {
        *fast.head.parameters(),
        *fast.method.parameters(),
    }
    framed = create_model("vp", fast.backbone, 6, padding=5).to(DEVICE)
    parts = framed.image_prompt(image)
    assert parts.prompt[..., 5:-5, 5:-5].abs().max() == 0 and torch.equal(parts.prompted, framed.prompt_image(image)[0])
    for refused in (fast.init_weights, fast.prune_intermediate_layers):
        with pytest.raises(NotImplementedError, match="a MethodViT does not"):
            refused()


def test_several_widths():
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 1), "num_heads": (2, 4)}
    backbone = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, num_classes=0, **arguments)
    method = partial(VPTDeep, length=3, dropout=0.0)
    model = PromptedReference(copy.deepcopy(backbone), 6, method=method).to(DEVICE)
    fast = MethodViT(backbone, 6, method=method).to(DEVICE)
    fast.load_state_dict(model.state_dict())
    assert [tuple(p.shape) for p in fast.method.prompts] == [(3, 16), (3, 16), (3, 32)]
    assert unsupported_reason(fast) is None
    image = torch.randn(2, 3, 32, 32, device=DEVICE)
    exact, values = (trained_gradients(m, image) for m in (model, fast))
    assert max(relative_error(values[key], exact[key]) for key in exact) < 1e-5
    with pytest.raises(ValueError, match=r"the blocks have widths \[16, 32\]: this method expects one width"):
        create_model("e2vpt", copy.deepcopy(backbone), 6)


def test_other_backbones():
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=3, embed_dim=48, num_heads=3)
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=3, embed_dim=48, num_heads=3)
    for backbone in (eva, beit):
        size = backbone.patch_embed.img_size[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some take the general path
            models = [create_model(name, copy.deepcopy(backbone), 6) for name in ("vpt_deep", "vpt_shallow")]
            models.append(create_model("vapt", copy.deepcopy(backbone), 6, kernel=1))
        for model in models:
            plain = PromptedReference(copy.deepcopy(backbone), 6, method=partial(type(model.method), **model._options))
            plain.load_state_dict(model.state_dict())
            image = torch.randn(2, 3, size, size)
            torch.testing.assert_close(model.eval()(image), plain.eval()(image), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="E2VPT has gives_keys_values=True, which prompts in a .* cannot have"):
            create_model("e2vpt", copy.deepcopy(backbone), 6)
    post = timm.create_model(NAME, **SIZE | {"block_fn": timm.models.vision_transformer.ResPostBlock})
    message = "has gives_keys_values=True: a block is a ResPostBlock with a Attention: expected timm's Block"
    for name in ("dualprompt", "e2vpt"):
        with pytest.raises(ValueError, match=message):
            create_model(name, copy.deepcopy(post), 6, **OPTIONS[name])
    model = create_model("dualprompt", NAME, 6, backbone_kwargs=SIZE, **OPTIONS["dualprompt"])
    model.backbone.blocks = post.blocks
    with pytest.raises(TypeError, match="a block is a ResPostBlock"):
        model(torch.randn(1, 3, 48, 32))


class Returns(PromptMethod):
    """A method of one's own that returns what it is given."""

    def __init__(self, geometry, prompts=None, image=None, carry_prompts=False, prompted_blocks=()):
        super().__init__(geometry)
        self.prompts, self.image = prompts or {}, image
        self.carry_prompts, self.prompted_blocks = carry_prompts, prompted_blocks

    def prompt_image(self, image):
        return (image, None) if self.image is None else self.image

    def block_prompts(self, block, context, batch, tokens=None):
        return self.prompts.get(block)


SOME = Prompts(torch.zeros(1, 2, 48))


@pytest.mark.parametrize("kind", [PromptedReference, MethodViT])
@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (TypeError, {"prompts": {1: SOME.tokens}}, "Returns.block_prompts returns a Tensor for block 1: expected Prom"),
        (TypeError, {"image": torch.zeros(1, 3, 48, 32)}, "prompt_image returns a Tensor: expected the image and a"),
        (TypeError, {"image": torch.zeros(2, 3, 48, 32)}, "prompt_image returns a Tensor: expected the image and a"),
        (TypeError, {"image": (1, 2, 3)}, "prompt_image returns a tuple: expected the image and a context"),
        (ValueError, {"prompts": {0: SOME}}, r"block 0 has prompts of its own: .* Returns.prompted_blocks=\(\) alone"),
        (ValueError, {"prompts": {0: SOME}, "prompted_blocks": (0, 2)}, "block 2 has no prompts of its own: expected"),
    ],
)
def test_what_a_method_of_ones_own_may_not_return(kind, error, options, message):
    """Where prompts run on, the fast path plans by ``prompted_blocks``, the reference by what it gets."""
    model = kind(NAME, 6, method=partial(Returns, **options, carry_prompts=error is ValueError), **SIZE)
    with pytest.raises(error, match=message):
        model(torch.randn(1, 3, 48, 32))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vpt", {}, "method='vpt': expected one of"),
        ("vpt_deep", {"blocks": [4]}, "block 4 was chosen, but the backbone has blocks 0 to 3"),
        ("vp", {"padding": 17}, "padding=17: expected 1 to 16, half of a 48x32 image"),
        ("vfpt", {"fraction": 1.5}, "fraction=1.5: expected 0 to 1"),
        ("e2vpt", {"segments": 7}, "segments=7: expected a divisor of the width, 48"),
        ("vapt", {"kernel": 5}, "kernel=5: expected 1 to 4"),
        ("dualprompt", {"general_blocks": [2]}, "block 2 is in general_blocks and in expert_blocks"),
    ],
)
def test_what_cannot_be_is_said_at_once(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, NAME, 6, backbone_kwargs=SIZE, **options)


@pytest.mark.parametrize("model", [MethodViT, TunedViT])
@pytest.mark.parametrize("make", ["vpt_deep", None, nn.Identity, partial(nn.Linear, 3), MethodViT, nn.Identity()])
def test_what_makes_no_method_is_refused(model, make):
    with pytest.raises(TypeError, match=f"method=.*: expected a subclass of {model.KIND.__name__}; create_model takes"):
        model(NAME, 6, method=make, **SIZE)


@pytest.mark.parametrize("model", [PromptedReference, MethodViT, TunedViT])
@pytest.mark.parametrize("made", [None, nn.Identity()])
def test_a_function_that_makes_no_method_is_refused(model, made):
    kind = model.KIND.__name__ if hasattr(model, "KIND") else "PromptMethod"
    with pytest.raises(TypeError, match=f"method= makes a {type(made).__name__}: expected a {kind}"):
        model(NAME, 6, method=lambda _: made, **SIZE)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_method_of_the_other_kind_is_refused(name):
    other = TunedViT if issubclass(CLASSES[name], PromptMethod) else MethodViT
    with pytest.raises(
        TypeError, match=f"method={CLASSES[name].__name__}: expected a subclass of {other.KIND.__name__}"
    ):
        other(NAME, 6, method=CLASSES[name], **SIZE)


WRONG = {
    "int": [-1, 1.5, "4", True, [1], math.nan],
    "float": [math.nan, math.inf, "0.5", True, [0.5]],
    "bool": [],
    "Sequence[int]": [[-1], [0.5], ["1"], [True], "12", 3],
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_settings_of_every_method_are_checked(name):
    settings = [p for p in inspect.signature(CLASSES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for setting in settings:
        for value in WRONG[setting.annotation.removesuffix(" | None")]:
            with pytest.raises(ValueError, match=f"{setting.name}={re.escape(repr(value))}: expected "):
                create_model(name, NAME, 6, backbone_kwargs=SIZE, **{setting.name: value})


def test_image_sizes_that_the_parameters_do_not_fit():
    for name in ("vp", "vapt"):
        model = create_model(name, NAME, 6, backbone_kwargs=SIZE | {"dynamic_img_size": True}, **OPTIONS[name])
        with pytest.raises(ValueError, match="expected 48x32|expected 24, those of a fixed size"):
            model(torch.randn(1, 3, 32, 32))


def test_dualprompt_takes_the_blocks_of_the_paper_that_there_are():
    for depth, blocks in {2: (0, 1), 4: (0, 1, 2, 3), 6: (0, 1, 2, 3, 4)}.items():
        model = create_model("dualprompt", timm.create_model(NAME, **SIZE | {"depth": depth}), 6)
        assert model.method.prompted_blocks == blocks
        assert [len(pairs) for pairs in model.method.keys_values] == [5, 5, 20, 20, 20][: len(blocks)]


def test_prompts_of_vpt_begin_within_its_bound():
    model = create_model("vpt_deep", timm.create_model("vit_tiny_patch16_224", **SIZE), 3)
    bound = (6 / (3 * 8**2 + 48)) ** 0.5  # Xavier's for a map from a patch to a prompt
    assert 0.95 * bound < max(p.abs().max().item() for p in model.method.prompts) <= bound
