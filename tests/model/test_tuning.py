"""Methods that change the backbone, and DAM-VP: each against a restatement, what it trains, and what it saves."""

import copy
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from insvp_fast import InsVPViT, unsupported_reason
from insvp_fast.checkpoints.backbone import save_backbone
from insvp_fast.errors import CheckpointError, DataError, TrainingError
from insvp_fast.methods import CLASSES, METHODS, MethodViT, PromptMethod, TunedViT, create_model, load_model
from insvp_fast.testing import relative_error, trained_gradients

NAME = "vit_tiny_patch16_224"
SIZE = {"img_size": (48, 32), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "reg_tokens": 1}
OPTIONS = {
    "linear": {},
    "full": {},
    "partial_1": {},
    "mlp_3": {},
    "bias": {},
    "adapter": {},
    "adaptformer": {"hidden": 5, "scale": 0.3},
    "lora": {"rank": 2, "alpha": 3.0},
    "ssf": {},
    "sidetune": {"channels": [4, 5]},
    "vp": {"padding": 5},
    "vpt_shallow": {"length": 5},
    "vpt_deep": {"length": 5},
    "e2vpt": {"length": 4, "num_keys": 3},
    "vfpt": {"length": 5},
    "vapt": {"length": 4, "kernel": 2, "hidden": 5},
    "dualprompt": {"general_blocks": [0], "general_length": 2, "expert_blocks": [1, 2], "expert_length": 3},
    "dam_vp": {"num_prompts": 3, "padding": 5},
}
TUNINGS = [name for name, cls in CLASSES.items() if issubclass(cls, TunedViT.KIND)]
OPERATIONS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def randomize(module):
    """What begins as zeros or ones is random too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make(name, **options):
    backbone = randomize(timm.create_model(NAME, **SIZE))
    return randomize(create_model(name, backbone, 6, **OPTIONS[name] | options))


def fitted(model):
    """DAM-VP needs images first."""
    if hasattr(model.method, "fit"):
        model.method.fit([torch.randn(4, 3, 48, 32), torch.randn(5, 3, 48, 32)])
    return model


# The equations again, for one image at a time; `after(path, y, x)` is what becomes of an operation's output y.


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def norm(layer, x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(qkv, heads):
    q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, dim=1))
    scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(q.shape[2])
    weights = scores.exp() / scores.exp().sum(2, keepdim=True)
    return torch.einsum("hst,thd->shd", weights, v).flatten(1)


def features(backbone, image, after=lambda path, y, x: y):
    """The class token behind the last norm, [D]."""
    proj = backbone.patch_embed.proj
    patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(24, -1)
    x = after("patch_embed.proj", patches @ proj.weight.flatten(1).T + proj.bias, None)
    x = torch.cat([backbone.cls_token[0], backbone.reg_token[0], x]) + backbone.pos_embed[0]
    for j, block in enumerate(backbone.blocks):

        def op(name, y, x=None, at=f"blocks.{j}."):
            return after(at + name, y, x)

        y = op("norm1", norm(block.norm1, x))
        y = attend(op("attn.qkv", linear(block.attn.qkv, y), y), block.attn.num_heads)
        x = x + op("attn.proj", linear(block.attn.proj, y))
        read = op("norm2", norm(block.norm2, x))
        hidden = gelu(op("mlp.fc1", linear(block.mlp.fc1, read)))
        x = x + op("mlp", op("mlp.fc2", linear(block.mlp.fc2, hidden)), read)
    return after("norm", norm(backbone.norm, x), None)[0]


def adapter(model):
    def after(path, y, x):
        if not path.endswith("mlp"):
            return y
        branch = model.method.branches[int(path.split(".")[1])]
        return y + linear(branch.up, gelu(linear(branch.down, y)))

    return after


def adaptformer(model):
    def after(path, y, x):
        if not path.endswith("mlp"):
            return y
        branch = model.method.branches[int(path.split(".")[1])]
        return y + 0.3 * linear(branch.up, linear(branch.down, x).clamp_min(0))

    return after


def lora(model):
    def after(path, y, x):
        if not path.endswith("qkv"):
            return y
        branch = model.method.branches[int(path.split(".")[1])]
        change = [
            branch.q_up.weight @ branch.q_down.weight,
            torch.zeros(48, 48),
            branch.v_up.weight @ branch.v_down.weight,
        ]
        return y + x @ (3 / 2 * torch.cat(change)).T

    return after


def ssf(model):
    paths = ["patch_embed.proj", *(f"blocks.{j}.{name}" for j in range(3) for name in OPERATIONS), "norm"]
    branches = dict(zip(paths, model.method.branches, strict=True))
    return lambda path, y, x: branches[path].scale * y + branches[path].shift if path in branches else y


def conv(layer, image):
    windows = F.unfold(image[None], 3, padding=1, stride=2)[0]
    sides = [-(-side // 2) for side in image.shape[1:]]
    return (layer.weight.flatten(1) @ windows + layer.bias[:, None]).unflatten(1, sides)


def restate(model, name, image):
    after = {f.__name__: f for f in (adapter, adaptformer, lora, ssf)}.get(name)
    f = features(model.backbone, image, after(model)) if after else features(model.backbone, image)
    if name == "sidetune":
        side = model.method.side
        maps = conv(side[2], conv(side[0], image).clamp_min(0)).clamp_min(0)
        blend = 1 / (1 + torch.exp(-model.method.alpha))
        f = blend * f + (1 - blend) * linear(side[6], maps.mean((1, 2)))
    if name == "mlp_3":
        return linear(model.head[4], linear(model.head[2], linear(model.head[0], f).clamp_min(0)).clamp_min(0))
    return linear(model.head, f)


@pytest.mark.parametrize("name", TUNINGS)
def test_it_says_what_the_equations_say(name):
    model = make(name).double().eval()
    image = torch.randn(3, 3, 48, 32, dtype=torch.float64)
    expected = torch.stack([restate(model, name, one) for one in image])
    torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11)


def trained_parameters(name):
    """How many parameters a method trains, by its equations: D = 48, 3 blocks, 24 patches of 8x8x3, 6 classes."""
    D, J, head = 48, 3, 6 * 48 + 6
    biases = D + 3 * D + D + D + 4 * D + D  # of a block
    block, outside = biases + 2 * D + (3 + 1 + 4 + 4) * D * D, 3 * 64 * D + D + 2 * D + 26 * D + 2 * D
    frame = 3 * (2 * 5 * 32 + 2 * 38 * 5)
    return (
        head
        + {
            "linear": 0,
            "full": outside + J * block,
            "partial_1": block + 2 * D,
            "mlp_3": 2 * (D * D + D),
            "bias": D + J * biases + D,
            "adapter": J * (2 * D * (D // 8) + D // 8 + D),
            "adaptformer": J * (2 * D * 5 + 5 + D),
            "lora": J * 2 * 2 * 2 * D,
            "ssf": 2 * (D + J * biases + D),
            "sidetune": 3 * 4 * 9 + 4 + 4 * 5 * 9 + 5 + 5 * D + D + 1,
            "vp": frame,
            "vpt_shallow": 5 * D,
            "vpt_deep": J * 5 * D,
            "e2vpt": J * (4 + 3) * D,
            "vfpt": J * 5 * D,
            "vapt": 4 * D + 2 * 5 * D + (J - 1) * (2 * D + 4 + 4 * 5 * 3 + 4),
            "dualprompt": (2 + 3 + 3) * 2 * D,
            "dam_vp": 3 * frame,
        }[name]
    )


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained(name):
    """So many parameters; a step changes all of them, and nothing else."""
    model = fitted(make(name)).train()
    assert model.get_nb_trainable_parameters()[0] == trained_parameters(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(torch.randn(9, 3, 48, 32)), torch.arange(9) % 6).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    unread = {
        key for key in trained if name == "dam_vp" and key.startswith("method.frames")
    }  # of clusters without images
    assert changed <= trained and trained - changed <= unread


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_of_any_method_comes_back(name, tmp_path):
    original = timm.create_model(NAME, **SIZE)
    model = create_model(name, copy.deepcopy(original), 6, **OPTIONS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if name == "e2vpt":
        model.method.token_mask[0, 0] = 0
    fitted(model).save_pretrained(
        tmp_path,
        class_names=list("abcdef"),
        preprocessing={"input_size": [3, 48, 32], "mean": [0.5] * 3, "std": (1, 1, 2)},
    )
    buffers = {"dam_vp": {"method.centers"}, "e2vpt": {"method.token_mask", "method.segment_mask"}}.get(name, set())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == buffers | {key for key, p in model.named_parameters() if p.requires_grad}
    loaded = load_model(tmp_path, copy.deepcopy(original))
    image = torch.randn(3, 3, 48, 32)
    assert type(loaded) is type(model) and not loaded.training and torch.equal(loaded(image), model(image))
    assert loaded.class_names == list("abcdef") and loaded.preprocessing["std"] == [1, 1, 2]
    with pytest.raises(CheckpointError, match="not an InsVP adapter"):
        InsVPViT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="sha256"):
        load_model(tmp_path, randomize(original))
    if name == "full":  # nothing of the recorded backbone is needed but its shape
        assert torch.equal(load_model(tmp_path)(image), model(image))


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_comes_back_in_its_dtypes(name, tmp_path):
    original = timm.create_model(NAME, **SIZE)
    save_backbone(original, tmp_path / "backbone.safetensors")
    source = str(tmp_path / "backbone.safetensors")
    model = create_model(name, source, 6, pretrained=True, **OPTIONS[name]).eval()
    fitted(model).bfloat16().save_pretrained(tmp_path / "bf16")
    image = torch.randn(3, 3, 48, 32, dtype=torch.bfloat16)
    loaded = load_model(tmp_path / "bf16")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(loaded(image), model(image))
    # around a given backbone, in its dtype
    given = load_model(tmp_path / "bf16", copy.deepcopy(original))
    assert {value.dtype for value in given.state_dict().values()} == {torch.float32}
    # trained in fp32 around a backbone in bf16
    model = create_model(name, copy.deepcopy(original).bfloat16(), 6, **OPTIONS[name])
    for part in (model.method, model.head):
        randomize(part.float())
    trained = {key: value.clone() for key, value in model._adapter().items()}
    model.save_pretrained(tmp_path / "mixed")
    loaded = load_model(tmp_path / "mixed", copy.deepcopy(original).bfloat16())
    torch.testing.assert_close(loaded._adapter(), trained, rtol=0, atol=0, equal_nan=True)


def test_adapters_are_told_apart(tmp_path):
    backbone = timm.create_model(NAME, **SIZE)
    InsVPViT(copy.deepcopy(backbone), 6).save_pretrained(tmp_path / "insvp")
    create_model("lora", copy.deepcopy(backbone), 6).save_pretrained(tmp_path / "lora")
    assert type(load_model(tmp_path / "insvp", copy.deepcopy(backbone))) is InsVPViT
    with pytest.raises(CheckpointError, match="lora is not for a MethodViT: expected load_model"):
        MethodViT.from_pretrained(tmp_path / "lora", backbone)
    config = tmp_path / "lora" / "adapter_config.json"
    text = config.read_text()
    for old, new, message in (
        ('"lora"', '"loro"', "method is 'loro': expected one of"),
        ('"options": {}', '"options": {"rank": 0}', "rank=0: expected an integer of at least 1"),
        ('"options": {}', '"options": {"rank": 3}', r"shape \(8, 48\): expected \(3, 48\)"),
        ('"class_names": null', '"class_names": ["a"]', "class_names has 1 names: expected one for each of the 6"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "lora", copy.deepcopy(backbone))


@pytest.mark.parametrize("name", ["lora", "ssf", "bias"])
def test_merged_into_the_weights_it_is_the_same_function(name):
    """Then it is a plain backbone, which the fast path takes."""
    model = make(name).double().eval()
    image = torch.randn(3, 3, 48, 32, dtype=torch.float64)
    plain = MethodViT(model.method.merged(model.backbone), method=PromptMethod)
    plain.head = copy.deepcopy(model.head)
    assert unsupported_reason(plain) is None
    torch.testing.assert_close(plain(image), model(image), rtol=1e-11, atol=1e-11)


def test_what_cannot_be_merged_says_so():
    for name, kind in {"adapter": "Serial", "adaptformer": "Parallel", "sidetune": "side network"}.items():
        model = make(name)
        with pytest.raises(ValueError, match=f"a {kind} cannot be folded into the weights of a backbone"):
            model.method.merged(model.backbone)


def test_a_backbone_is_of_one_model():
    backbone = timm.create_model(NAME, **SIZE)
    create_model("lora", backbone, 6)
    with pytest.raises(ValueError, match="the backbone has the branches of another model: expected a copy"):
        create_model("ssf", backbone, 6)


def test_blocks_are_computed_again_in_backward():
    model, image = make("lora").train(), torch.randn(2, 3, 48, 32)
    plain = trained_gradients(model, image)
    model.set_grad_checkpointing()
    again = trained_gradients(model, image)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)


def test_weights_without_biases_are_merged_too():
    layers = {"qkv_bias": False, "norm_layer": lambda width, **k: nn.LayerNorm(width, elementwise_affine=False, **k)}
    model = randomize(create_model("ssf", timm.create_model(NAME, **SIZE, **layers), 6)).double().eval()
    merged = model.method.merged(model.backbone)
    image = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    expected = model.backbone.forward_features(image)
    torch.testing.assert_close(merged.forward_features(image), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["adaptformer", "lora", "ssf", "dam_vp"])
def test_a_copy_is_a_model_of_its_own(name):
    model = fitted(make(name)).eval()
    twin, image = copy.deepcopy(model), torch.randn(2, 3, 48, 32)
    before = model(image)
    assert torch.equal(twin(image), before)
    randomize(twin)
    assert relative_error(twin(image), before) > 1e-3 and torch.equal(model(image), before)


def test_what_is_frozen_stays_in_evaluation_mode():
    for name, expected in {"lora": set(), "mlp_3": set(), "partial_1": {"blocks.2", "norm"}, "full": {""}}.items():
        model = create_model(name, timm.create_model(NAME, **SIZE, proj_drop_rate=0.5), 6).train()
        training = {key for key, module in model.backbone.named_modules() if module.training}
        assert {key for key in training if key in expected} == expected
        assert all(
            any(key == one or key.startswith(f"{one}.") or not one for one in expected | {"fc_norm"})
            for key in training
        )
        assert model.head.training and not any(module.training for module in model.eval().modules())


def test_other_backbones():
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 1), "num_heads": (2, 4)}
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, **arguments)
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, embed_dim=48, num_heads=3)
    convnet = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    works = {
        swin: ["full", "bias", "mlp_3", "partial_1", "lora", "sidetune"],
        eva: ["full", "bias", "mlp_3", "partial_1", "sidetune"],
        convnet: ["full", "bias", "mlp_3", "sidetune"],
    }
    for backbone, names in works.items():
        image = torch.randn(2, 3, *((28, 28) if backbone is eva else (32, 32)))
        for name in TUNINGS:
            if name in names:
                model = create_model(name, copy.deepcopy(backbone), 5).train()
                model(image).square().sum().backward()
                grads = [p.grad for p in model.parameters() if p.requires_grad]
                assert all(grad is not None for grad in grads)
            else:
                with pytest.raises(ValueError, match=rf"{name} in a \w+: expected .*(timm|Attention)"):
                    create_model(name, copy.deepcopy(backbone), 5)
    changed = create_model("lora", swin, 5)
    before = changed(torch.ones(1, 3, 32, 32))
    assert relative_error(randomize(changed.method) and changed(torch.ones(1, 3, 32, 32)), before) > 1e-3


def test_the_biases_of_relative_positions_are_biases():
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 1), "num_heads": (2, 4)}
    model = create_model("bias", timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, **arguments), 5)
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.backbone.named_parameters() if "bias" in name}
    assert sum(name.endswith("relative_position_bias_table") for name in trained) == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank=0: expected an integer of at least 1"),
        ("mlp_3", {"layers": 1}, "layers=1: expected an integer of at least 2"),
        ("adapter", {"reduction": 64}, "reduction=64: expected at most the width, 48"),
        ("sidetune", {"channels": []}, "channels is empty"),
        ("dam_vp", {"num_prompts": 0}, "num_prompts=0: expected an integer of at least 1"),
        ("parallel", {}, "adaptformer in a backbone with a ParallelScalingBlock: expected timm's VisionTransformer"),
        ("distilled", {}, "the backbone has two heads"),
        ("rms", {}, "ssf in a backbone with a RmsNorm: expected linear layers, LayerNorm and PatchEmbed"),
    ],
)
def test_what_cannot_be_is_said_at_once(name, options, message):
    backbone = {
        "parallel": lambda: timm.create_model(
            NAME, **SIZE, block_fn=timm.models.vision_transformer.ParallelScalingBlock
        ),
        "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
        "rms": lambda: timm.create_model(NAME, **SIZE, norm_layer=timm.layers.RmsNorm),
    }.get(name, lambda: timm.create_model(NAME, **SIZE))()
    method = {"parallel": "adaptformer", "distilled": "bias", "rms": "ssf"}.get(name, name)
    with pytest.raises(ValueError, match=message):
        create_model(method, backbone, 6, **options)


# DAM-VP


def average_linkage(points, count):
    """Clusters as sets of rows, joined two by two: those with the least mean distance between their members."""
    clusters = [[i] for i in range(len(points))]
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    while len(clusters) > count:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i)]
        i, j = min(pairs, key=lambda pair: distance[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean())
        clusters[j] += clusters.pop(i)
    return clusters


def test_dam_vp_says_what_the_paper_says():
    model = make("dam_vp").double().eval()
    images = torch.randn(3, 7, 3, 48, 32, dtype=torch.float64)
    model.method.fit(((batch, None) for batch in images), num_images=17)
    points = torch.stack([features(model.backbone, one) for one in images.flatten(0, 1)[:17]])
    centers = torch.stack([points[members].mean(0) for members in average_linkage(points.detach().numpy(), 3)])
    order = [(model.method.centers - center).norm(dim=1).argmin().item() for center in centers]
    assert sorted(order) == [0, 1, 2]
    torch.testing.assert_close(model.method.centers[order], centers.detach(), rtol=1e-10, atol=1e-10)
    expected, chosen = [], set()
    for image in images[0]:
        nearest = ((features(model.backbone, image) - centers) ** 2).sum(1).argmin().item()
        chosen.add(nearest)
        frame, prompted = model.method.frames[order[nearest]], image.clone()
        prompted[:, :5] += frame.top
        prompted[:, 43:] += frame.bottom
        prompted[:, 5:43, :5] += frame.left
        prompted[:, 5:43, 27:] += frame.right
        expected.append(linear(model.head, features(model.backbone, prompted)))
    assert len(chosen) > 1 and unsupported_reason(model) is None
    torch.testing.assert_close(model(images[0]), torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_dam_vp_needs_images_first():
    model = make("dam_vp")
    with pytest.raises(TrainingError, match=r"DAM-VP has no clusters yet: expected model\.method\.fit"):
        model(torch.randn(1, 3, 48, 32))
    with pytest.raises(DataError, match="DAM-VP has 3 prompts: expected as many images, found 2"):
        model.method.fit([torch.randn(2, 3, 48, 32)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(model)(torch.randn(1, 3, 48, 32))


def test_every_method_has_a_description_that_needs_no_torch():
    assert METHODS.keys() == CLASSES.keys() == OPTIONS.keys()
    program = "import insvp_fast.method_names, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
