"""Kinds of backbones with prompts: the reference against timm and a restatement, the fast path against the reference.

Swin, whose tokens stand in windows, has tests of its own.
"""

import warnings

import pytest
import timm
import torch
from timm.layers import HybridEmbed, PatchDropoutWithIndices
from torch import nn

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, unsupported_reason
from insvp_fast.methods import MethodViT, PromptMethod, Prompts
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.testing import DEVICE, relative_error
from tests.model.parity import assert_bf16_within_budget, assert_equal_numbers, assert_replaced_modules_are_noticed

TINY = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
OFF = {"global_prompt": False, "patch_prompt": False, "common_prompt": False, "specific_prompt": False}
CONFIG = InsVPConfig(prompt_length=3, global_prompt=False, specific_prompt=False)
COMMON = InsVPConfig(prompt_length=3, prompted_blocks=(1,), **OFF | {"common_prompt": True})
NAMES = {
    "EVA": "eva_giant_patch14_224",
    "EVA-02 with packed layers": "eva02_tiny_patch14_224",
    "EVA-02 with three layers": "eva02_base_patch14_224",
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3 with biases": "vit_small_patch16_dinov3_qkvb",
    "Perception Encoder": "vit_pe_core_tiny_patch16_384",
    "axial rotations": "vit_small_patch16_rope_224",
    "mixed rotations": "vit_small_patch16_rope_mixed_224",
    "norms behind": "eva02_base_patch14_224",
    "grouped queries": "vit_small_patch16_rope_224",
    "dynamic size": "vit_small_patch16_dinov3",
    "BEiT": "beit_base_patch16_224",
    "BEiT with one bias for all blocks": "beitv2_base_patch16_224",
    "BEiT without a bias": "beit_base_patch16_224",
    "a table of relative positions": "vit_relpos_base_patch16_clsgap_224",
    "relative positions, norms behind": "vit_relpos_base_patch32_plus_rpn_256",
    "one network of relative positions": "vit_srelpos_small_patch16_224",
    "NaFlexVit": "naflexvit_base_patch16_gap",
    "NaFlexVit with axial rotations": "naflexvit_base_patch16_parfac_gap",
    "NaFlexVit with a convolution": "naflexvit_base_patch16_siglip",
    "NaFlexVit with mixed rotations": "naflexvit_base_patch16_gap",
    "hybrid": "vit_tiny_patch16_224",
    "CaiT": "cait_xxs24_224",
    "distilled DeiT": "deit_tiny_distilled_patch16_224",
}
TOKEN = {"class_token": True, "global_pool": "token"}


def hybrid_embed(**arguments):
    """A network that makes one token of eight by eight pixels."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU())
    return HybridEmbed(network, **arguments)


OPTIONS = {
    "norms behind": {"use_post_norm": True, "init_values": None},
    "grouped queries": {"num_heads": 4, "num_kv_heads": 2, "qkv_fused": False, "qk_norm": True},
    "dynamic size": {"dynamic_img_size": True, "global_pool": "token", "qk_norm": True},
    "BEiT with one bias for all blocks": {
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "global_pool": "token",
    },
    "BEiT without a bias": {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "global_pool": "token"},
    "a table of relative positions": {"global_pool": "token", "rel_pos_type": "bias", "qk_norm": True},
    "relative positions, norms behind": TOKEN,
    "NaFlexVit with a convolution": TOKEN | {"embed_proj_type": "conv", "pre_norm": True},
    "NaFlexVit with axial rotations": {"rope_type": "axial", "patchify_channels_last": False},
    "NaFlexVit with mixed rotations": TOKEN | {"rope_type": "mixed"},
    "hybrid": {"embed_layer": hybrid_embed, "patch_size": 4, "dynamic_img_size": True},
}
ANY_SIZE = ("dynamic size", "NaFlexVit with axial rotations", "hybrid")
FAST = [kind for kind in NAMES if kind != "CaiT"]


def backbone_of(kind, **options):
    """With random numbers in all that timm sets to 0 or 1, the biases of keys among it, which are buffers."""
    torch.manual_seed(0)
    backbone = timm.create_model(NAMES[kind], num_classes=5, **TINY | OPTIONS.get(kind, {}) | options).eval()
    with torch.no_grad():
        biases = [tensor for name, tensor in backbone.named_buffers() if name.endswith("k_bias")]
        for tensor in (*backbone.parameters(), *biases):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return backbone.to(DEVICE)


def images(batch=2, size=TINY["img_size"]):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *size, device=DEVICE)


@pytest.mark.parametrize("kind", NAMES)
def test_without_prompts_the_reference_is_timm(kind):
    backbone, image = backbone_of(kind).requires_grad_(False), images()
    expected = backbone(image)
    found = InsVPReference(backbone, None, InsVPConfig(**OFF))(image)
    assert torch.equal(found, expected)


def turn(x, rotation, prefix, half):
    """Pairs of features of [B, heads, S, d] as complex numbers, those behind the prefix times the patch's own."""
    sine, cosine = rotation.chunk(2, dim=-1)
    d = x.shape[-1] // 2
    first, second = (slice(0, d), slice(d, None)) if half else (slice(0, None, 2), slice(1, None, 2))
    turned, rest = x.clone(), x[:, :, prefix:]
    product = torch.complex(rest[..., first], rest[..., second]) * torch.complex(cosine, sine)[..., first]
    turned[:, :, prefix:, first], turned[:, :, prefix:, second] = product.real, product.imag
    return turned


def heads_of(attn, x):
    """Queries, keys and values, [B, heads, S, d]."""
    if getattr(attn, "qkv", None) is None:
        parts = [layer(x) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
    else:
        parts = attn.qkv(x).chunk(3, dim=-1)
    if getattr(attn, "q_bias", None) is not None:
        parts = [part + bias for part, bias in zip(parts, (attn.q_bias, attn.k_bias, attn.v_bias), strict=True)]
    d = x.shape[-1] // attn.num_heads
    q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in parts)
    of_head = [head * k.shape[1] // attn.num_heads for head in range(attn.num_heads)]
    norms = [getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm")]
    return norms[0](q), norms[1](k)[:, of_head], v[:, of_head]


def attend(attn, x, prompts, rotation, bias):
    """Each token asks all tokens, and all prompts, which have neither a rotation nor a bias."""
    (q, k, v), (_, k_prompts, v_prompts) = heads_of(attn, x), heads_of(attn, prompts)
    if rotation is not None:
        q, k = (turn(t, rotation, attn.num_prefix_tokens, attn.rotate_half) for t in (q, k))
    scores, scores_of_prompts = (q @ keys.mT * q.shape[-1] ** -0.5 for keys in (k, k_prompts))
    scores = torch.cat([scores if bias is None else scores + bias, scores_of_prompts], dim=-1)
    talk = [getattr(attn, name, nn.Identity()) for name in ("proj_l", "proj_w")]  # of heads, in CaiT
    p = talk[1](talk[0](scores.movedim(1, -1)).softmax(dim=-2)).movedim(-1, 1)
    out = (p @ torch.cat([v, v_prompts], dim=2)).transpose(1, 2).flatten(2)
    return attn.proj(getattr(attn, "norm", nn.Identity())(out))


def block_with_prompts(block, h, prompts, rotation, bias):
    prompts = prompts.expand(len(h), -1, -1)
    own = getattr(block.attn, "rel_pos", None)
    if own is not None:
        bias = own.get_bias()
    elif getattr(block.attn, "relative_position_bias_table", None) is not None:
        bias = block.attn._get_rel_pos_bias()
    if "PostNorm" in type(block).__name__ or "ResPost" in type(block).__name__:
        h = h + block.norm1(attend(block.attn, h, prompts, rotation, bias))
        return h + block.norm2(block.mlp(h))
    scales = [getattr(block, f"ls{i}", None) or Scale(getattr(block, f"gamma_{i}", None)) for i in (1, 2)]
    h = h + scales[0](attend(block.attn, block.norm1(h), block.norm1(prompts), rotation, bias))
    return h + scales[1](block.mlp(block.norm2(h)))


class Scale(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def forward(self, x):
        return x if self.gamma is None else self.gamma * x


@pytest.mark.parametrize("kind", NAMES)
def test_with_prompts_the_reference_is_its_restatement(kind):
    """In the last block, whose input and arguments are taken from timm's own forward pass."""
    model = InsVPReference(backbone_of(kind), None, COMMON).double().requires_grad_(False)
    backbone, seen = model.backbone, {}

    def keep(block, args, kwargs, output):
        seen.update(kwargs, input=args[0])

    handle = backbone.blocks[1].register_forward_hook(keep, with_kwargs=True)
    backbone.forward_features(images().double())
    handle.remove()
    bias = seen.get("shared_rel_pos_bias", seen.get("shared_rel_pos"))
    h = block_with_prompts(backbone.blocks[1], seen["input"], model.common_prompts[0], seen.get("rope"), bias)
    h = backbone.norm(backbone.forward_cls(h) if kind == "CaiT" else h)
    torch.testing.assert_close(model(images().double()), model.forward_head(h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", FAST)
def test_logits_and_gradients(kind):
    reference, fast, image = pair(kind)
    assert relative_error(fast.forward_features(image), reference.forward_features(image)) < 1e-5
    assert_equal_numbers(reference, fast, image, settings=({}, {"fold_norm": False, "recompute": "block"}))


def pair(kind, **options):
    reference = InsVPReference(backbone_of(kind, **options), 7, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the general path would warn
        fast = InsVPViT(backbone_of(kind, **options), 7, CONFIG)
    fast.load_state_dict(reference.state_dict())
    size = (32, 56) if kind in ANY_SIZE else TINY["img_size"]
    return reference.to(DEVICE), fast.to(DEVICE), images(3, size)


@pytest.mark.parametrize("amp", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("kind", FAST)
def test_bf16(kind, amp):
    assert_bf16_within_budget(*pair(kind), autocast=amp)


@pytest.mark.parametrize("kind", ["EVA-02 with packed layers", "BEiT", "distilled DeiT", "NaFlexVit", "hybrid"])
def test_an_empty_batch_and_inference(kind):
    """Weights that are packed in inference mode serve in training too."""
    reference, fast, image = pair(kind)
    assert fast(image[:0]).shape == (0, 7)
    with torch.inference_mode():
        assert relative_error(fast(image), reference(image)) < 1e-5
    assert_equal_numbers(reference, fast, image)


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias"])
@pytest.mark.parametrize("kind", ["EVA-02 with packed layers", "BEiT"])
def test_a_changed_bias_is_seen(kind, name):
    reference, fast, image = pair(kind)
    before = fast(image)
    for model in (reference, fast):
        with torch.no_grad():
            getattr(model.backbone.blocks[0].attn, name).add_(torch.linspace(-1, 1, 48, device=DEVICE))
    after = reference(image)
    assert relative_error(fast(image), after) < 1e-5
    # what is added to all keys alike changes no softmax, unless the keys are rotated behind
    assert relative_error(before, after) > 1e-4 or (kind, name) == ("BEiT", "k_bias")


@pytest.mark.parametrize("name", ["cls_token", "dist_token", "pos_embed"])
def test_a_changed_token_or_position_is_seen(name):
    reference, fast, image = pair("distilled DeiT")
    before = fast(image)
    for model in (reference, fast):
        getattr(model.backbone, name).data.add_(torch.linspace(-1, 1, 48, device=DEVICE))
    assert relative_error(fast(image), reference(image)) < 1e-5 < relative_error(before, reference(image))


def test_a_changed_patch_embedding_is_seen():
    """The fast path multiplies by a view of it, in which the channels come first."""
    reference, fast, image = pair("NaFlexVit")
    before = fast(image)
    for model in (reference, fast):
        model.backbone.embeds.proj.weight.data.mul_(1.5)
    assert relative_error(fast(image), reference(image)) < 1e-5 < relative_error(before, reference(image))


def test_a_network_that_makes_the_tokens_is_called():
    """So that it may be anything, and be trained."""
    reference, fast, image = pair("hybrid")
    for model in (reference, fast):
        network = model.backbone.patch_embed.backbone
        network[2] = nn.Sigmoid()
        network[0].weight.requires_grad_()
        network[1].register_forward_hook(lambda module, given, out: 2 * out)
    assert unsupported_reason(fast) is None
    assert_equal_numbers(reference, fast, image)


class Sums(PromptMethod):
    """Sums of tokens, as trained multiples, which run on in the last block."""

    reads_tokens = carry_prompts = True

    def __init__(self, geometry):
        super().__init__(geometry)
        self.prompted_blocks = (0,)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 48))

    def block_prompts(self, block, context, batch, tokens=None):
        return Prompts(tokens.cumsum(1)[:, ::4] * self.scale) if block == 0 else None


@pytest.mark.parametrize("kind", ["DINOv3", "NaFlexVit", "NaFlexVit with mixed rotations", "BEiT"])
def test_prompts_that_read_tokens_and_run_on(kind, monkeypatch):
    monkeypatch.setattr(Sums, "carry_prompts", kind != "BEiT")
    reference = PromptedReference(backbone_of(kind), 7, method=Sums).to(DEVICE)
    fast = MethodViT(backbone_of(kind), 7, method=Sums).to(DEVICE)
    fast.load_state_dict(reference.state_dict())
    assert unsupported_reason(fast) is None
    assert_equal_numbers(reference, fast, images())


class Ragged(PromptMethod):
    """Four prompts, of which the images of a batch take one, two and so on, or all of them ``taken``."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.prompted_blocks = (0, 1)
        self.prompts = nn.Parameter(torch.randn(4, 48))
        self.taken = None

    def block_prompts(self, block, context, batch, tokens=None):
        prompts = self.prompts.expand(batch, -1, -1)
        if self.taken is not None:
            return Prompts(prompts[:, : self.taken])
        return Prompts(prompts, torch.arange(batch, device=prompts.device) + 1)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("kind", ["EVA-02 with packed layers", "NaFlexVit with mixed rotations"])
def test_each_image_has_its_own_number_of_prompts(kind, pool):
    reference = PromptedReference(backbone_of(kind, global_pool=pool), 7, method=Ragged).to(DEVICE)
    fast = MethodViT(backbone_of(kind, global_pool=pool), 7, method=Ragged).to(DEVICE)
    fast.load_state_dict(reference.state_dict())
    assert unsupported_reason(fast) is None
    together = fast(images(3))
    for i, image in enumerate(images(3).split(1)):
        reference.method.taken = i + 1
        assert relative_error(together[i : i + 1], reference(image)) < 1e-5
    reference.method.taken = None
    fast.backbone.blocks[0].register_forward_hook(lambda *_: None)
    for general in (reference, fast):
        with pytest.raises(ValueError, match="the prompts of block 0 have lengths: expected none, but"):
            general(images(3))


def test_packed_patches_are_no_images():
    _, fast, _ = pair("NaFlexVit")
    with pytest.raises(TypeError, match="image is a dict: expected a tensor"):
        fast({"patches": torch.zeros(1, 2, 192)})
    with pytest.raises(ValueError, match=r"image has shape \(1, 2, 192\): expected \[B, 3, H, W\]"):
        fast.forward_features(torch.zeros(1, 2, 192))


def drop_patches(backbone):
    backbone.patch_drop = PatchDropoutWithIndices(0.5).train()


CHANGES = {  # to the path of a module and what is done to it; the reason that is given
    "no key bias": ("EVA-02 with packed layers", "blocks.0.attn", lambda m: setattr(m, "k_bias", None), "k_bias"),
    "a bias of the layer": (
        "BEiT",
        "blocks.0.attn.qkv",
        lambda m: m.register_parameter("bias", nn.Parameter(torch.ones(144), requires_grad=False)),
        "bias",
    ),
    "other prefix tokens": ("DINOv3", "blocks.1.attn", lambda m: setattr(m, "num_prefix_tokens", 2), "num_prefix"),
    "trained rotations": ("mixed rotations", "rope", lambda m: m.freqs.requires_grad_(), "is trained"),
    "random rotations": (
        "DINOv3",
        "rope",
        lambda m: (setattr(m, "aug_active", True), setattr(m, "shift_coords", 0.5), m.train()),
        "training",
    ),
    "a trained bias": (
        "one network of relative positions",
        "shared_rel_pos.mlp.fc1",
        lambda m: m.weight.requires_grad_(),
        "is trained",
    ),
    "padding": ("NaFlexVit", "embeds", lambda m: setattr(m, "dynamic_img_pad", True), "dynamic_img_pad=True"),
    "a norm of pixels": ("NaFlexVit", "embeds", lambda m: setattr(m, "norm_input", nn.Tanh()), "norm_input=Tanh()"),
    "a function of pixels": ("NaFlexVit", "embeds", lambda m: setattr(m, "norm_input", torch.tanh), "norm_input="),
    "patches of another size": ("NaFlexVit", "embeds", lambda m: setattr(m, "patch_size", (4, 4)), "patch_size=(4, 4)"),
    "a layer that is said to be none": ("NaFlexVit", "embeds", lambda m: setattr(m, "is_linear", False), "is_linear"),
    "patches in a row": ("NaFlexVit", "embeds", lambda m: setattr(m, "flatten", True), "flatten=True"),
    "other tokens before the patches": (
        "NaFlexVit",
        "",
        lambda m: setattr(m, "num_prefix_tokens", 2),
        "num_prefix_tokens=2",
    ),
    "mixed rotations that are none": (
        "NaFlexVit",
        "",
        lambda m: setattr(m, "rope_is_mixed", True),
        "rope_is_mixed=True",
    ),
    "a hooked embedding": (
        "NaFlexVit",
        "embeds.proj",
        lambda m: m.register_forward_hook(lambda *_: None),
        "embeds.proj has a hook",
    ),
    "another norm of patches": ("NaFlexVit", "embeds", lambda m: setattr(m, "norm", nn.Tanh()), "embeds.norm"),
    "dropped patches and positions": ("NaFlexVit", "embeds", lambda m: setattr(m, "pos_drop", nn.Tanh()), "pos_drop"),
    "another last norm": ("NaFlexVit with a convolution", "", lambda m: setattr(m, "norm", nn.Tanh()), "backbone.norm"),
    "patches dropped by index": ("NaFlexVit", "", drop_patches, "patch_drop is in training mode with prob=0.5"),
    "a hooked rotation": (
        "NaFlexVit with axial rotations",
        "rope",
        lambda m: m.register_forward_hook(lambda *_: None),
        "rope has a hook",
    ),
    "other rotations": (
        "NaFlexVit with axial rotations",
        "",
        lambda m: setattr(m, "rope_is_mixed", True),
        "rope_is_mixed=True",
    ),
    "another mixing of rotations": ("DINOv3", "", lambda m: setattr(m, "rope_mixed", True), "rope_mixed=True"),
    "fewer tokens before the patches": (
        "DINOv3",
        "",
        lambda m: (setattr(m, "num_prefix_tokens", 2), [setattr(b.attn, "num_prefix_tokens", 2) for b in m.blocks]),
        "num_prefix_tokens=2",
    ),
    "another scale": ("DINOv3", "blocks.1.attn", lambda m: setattr(m, "scale", 0.5), "scale=0.5"),
    "a norm of attended values": ("DINOv3", "blocks.1.attn", lambda m: setattr(m, "norm", nn.Tanh()), "attn.norm"),
    "a gate": ("DINOv3", "blocks.1.attn", lambda m: setattr(m, "gate", torch.tanh), "gate="),
    "dropped patches": ("DINOv3", "", drop_patches, "patch_drop is in training mode with prob=0.5"),
    "dropped positions": ("DINOv3", "", lambda m: setattr(m, "pos_drop", nn.Tanh()), "pos_drop"),
    "a dropped path": ("DINOv3", "blocks.1", lambda m: setattr(m, "drop_path1", nn.Tanh()), "drop_path1"),
    "dropped attention": (
        "DINOv3",
        "blocks.1.attn",
        lambda m: (setattr(m.attn_drop, "p", 0.5), setattr(m, "training", True)),
        "training=True",
    ),
    "another scale of BEiT": ("BEiT", "blocks.1.attn", lambda m: setattr(m, "scale", 0.5), "scale=0.5"),
    "another width of heads": (
        "a table of relative positions",
        "blocks.1.attn",
        lambda m: setattr(m, "head_dim", 8),
        "head_dim=8",
    ),
    "dropped attention of BEiT": (
        "BEiT",
        "blocks.1.attn",
        lambda m: (setattr(m.attn_drop, "p", 0.5), setattr(m, "training", True)),
        "training=True",
    ),
    "another norm": ("Perception Encoder", "", lambda m: setattr(m, "norm", nn.BatchNorm1d(6)), "BatchNorm1d"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_numbers_takes_the_general_path(change):
    kind, path, function, words = CHANGES[change]
    _, fast, _ = pair(kind)
    function(fast.backbone.get_submodule(path))
    assert words in unsupported_reason(fast)


@pytest.mark.parametrize("kind", FAST)
def test_every_replaced_module_takes_the_general_path(kind):
    called = {"patch_embed"} if kind == "hybrid" else set()
    assert_replaced_modules_are_noticed(pair(kind)[1], called)


OF_NAFLEX = "timm.models.naflexvit"
REPLACED = {
    "DINOv3": ("timm.layers.pos_embed_sincos.rot", "timm.models.eva.apply_rot_embed_cat"),
    "NaFlexVit": (
        f"{OF_NAFLEX}.batch_patchify",
        f"{OF_NAFLEX}.NaFlexEmbeds.forward",
        f"{OF_NAFLEX}.NaFlexEmbeds._apply_learned_pos_embed",
        f"{OF_NAFLEX}.NaFlexVit._forward_embeds",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REPLACED.items() for name in names])
def test_replaced_functions(kind, name, monkeypatch):
    _, fast, _ = pair(kind)
    assert unsupported_reason(fast) is None
    monkeypatch.setattr(name, lambda *args, **kwargs: None)
    assert unsupported_reason(fast).endswith("has been replaced")


def test_compiles_whole():
    _, fast, image = pair("mixed rotations", depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert relative_error(compiled(image), fast(image)) < 1e-5


def convolutional():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


def test_a_convolutional_network_takes_image_prompts():
    config = InsVPConfig(common_prompt=False, specific_prompt=False, global_dropout=0.0)
    image, backbone = images(size=(32, 48)), convolutional().to(DEVICE)
    model = InsVPReference(convolutional(), None, config).to(DEVICE)
    prompted = model.image_prompt(image).prompted
    assert relative_error(prompted, image) > 1e-2
    torch.testing.assert_close(model(image), backbone(prompted), rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="ResNet, which has no fast path"):
        fast = InsVPViT(convolutional(), None, config).to(DEVICE)
    fast.load_state_dict(model.state_dict())
    assert relative_error(fast(image), model(image)) < 1e-5


HEADS = {  # that are more than a layer of pooled features
    "a convolution": ("resnetv2_18", {"layers": (1, 1), "channels": (16, 32)}),
    "with the pooling": ("samvit_base_patch16", {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind):
    name, arguments = HEADS[kind]
    backbone, image = timm.create_model(name, num_classes=5, **arguments).eval().to(DEVICE), images(size=(32, 32))
    expected = backbone(image)
    model = InsVPReference(backbone, None, InsVPConfig(**OFF))
    torch.testing.assert_close(model(image), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_list_of_heads_is_refused(monkeypatch):
    backbone = convolutional()
    monkeypatch.setattr(backbone, "get_classifier", lambda: nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    with pytest.raises(TypeError, match="the ResNet has 2 heads: expected one"):
        InsVPReference(backbone)


def test_a_convolutional_network_takes_no_feature_prompts():
    with pytest.raises(ValueError, match="a ResNet has no blocks that prompts can be put into, it takes image prompts"):
        InsVPViT(convolutional(), 5)


def test_rotations_of_another_number_of_patches_are_refused():
    reference, fast, image = pair("EVA-02 with three layers")
    for model, error in ((reference, RuntimeError), (fast, ValueError)):
        model.backbone.rope.pos_embed = model.backbone.rope.pos_embed[:1]
        with pytest.raises(error, match="rotations of 1" if model is fast else "must match"):
            model(image)


@pytest.mark.filterwarnings("ignore:.*takes the general path:UserWarning")
@pytest.mark.parametrize("kind", ["BEiT without a bias", "distilled DeiT"])
def test_tokens_and_vectors_of_other_shapes(kind):
    """Prefix tokens of each image, and vectors that are broadcast: the general path takes them."""
    reference, fast, image = pair(kind)
    for name, x in [*fast.backbone.named_parameters()]:
        path, _, leaf = name.rpartition(".")
        if leaf.endswith(("token", "bias", "gamma_1", "gamma_2")) and not path.startswith(("head", "norm")):
            number = nn.Parameter(
                torch.stack([x[0] * factor for factor in (1, 2, 3)]) if x.ndim > 1 else x[None], False
            )
            old = [getattr(model.backbone.get_submodule(path), leaf) for model in (reference, fast)]
            for model in (reference, fast):
                setattr(model.backbone.get_submodule(path), leaf, number)
            try:
                expected = reference(image)
            except RuntimeError:  # of a norm, say
                with pytest.raises((RuntimeError, ValueError)):
                    fast(image)
            else:
                assert relative_error(fast(image), expected) < 1e-5, name
            for model, parameter in zip((reference, fast), old, strict=True):
                setattr(model.backbone.get_submodule(path), leaf, parameter)
