"""Models whose methods or modules are not the package's: what the reference would call is called, by a bank as well."""

import copy
import functools
import sys
import threading
import types

import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_map

from insvp_fast import AdapterBank, InsVPConfig, InsVPReference, InsVPViT
from insvp_fast.testing import DEVICE, relative_error, trained_gradients
from tests.model.test_model import images as images_without_ties

CONFIGS = {
    "paper": InsVPConfig(prompt_length=3, global_dropout=0.0),
    "prompted": InsVPConfig(prompt_length=3, global_dropout=0.0, specific_input="prompted", simam=True),
    "carried": InsVPConfig(prompt_length=3, global_dropout=0.0, prompted_blocks=1, carry_prompts=True),
}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}


def make_models(config, change=lambda model: None, **sizes):
    """The reference and the fast model, with the same change of both."""
    backbone = timm.create_model("vit_tiny_patch16_224", **(SIZES | sizes))
    reference = InsVPReference(copy.deepcopy(backbone), 5, CONFIGS[config])
    fast = InsVPViT(backbone, 5, CONFIGS[config])
    fast.load_state_dict(reference.state_dict())
    for model in (reference, fast):
        torch.manual_seed(1)  # of new modules
        change(model)
    return reference.to(DEVICE), fast.to(DEVICE)


def images(count=2):
    return torch.randn(count, 3, 32, 32, device=DEVICE)


def find_methods(config):
    """The methods of the reference that a forward pass calls, of the model and of its prompters: (path, name)."""
    model, found = make_models(config)[0], {}
    paths = {id(module): path for path, module in model.named_modules()}

    def note(frame, event, _):
        name, first = frame.f_code.co_name, frame.f_locals.get("self")
        method = getattr(type(first), name, None)
        own = event == "call" and id(first) in paths and frame.f_globals["__name__"].startswith("insvp_fast.")
        if own and isinstance(method, types.FunctionType) and method.__code__ is frame.f_code:
            found[paths[id(first)], name] = None

    sys.setprofile(note)
    try:
        model(images().to(DEVICE))
    finally:
        sys.setprofile(None)
    return list(found)


METHODS = {config: find_methods(config) for config in CONFIGS}
CASES = [(config, *method) for config, methods in METHODS.items() for method in methods]


def shifted(x):
    """Another tensor, by what no norm takes away."""
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        return x
    return x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device).square()


def override(path, name, where):
    def change(model):
        module = model.get_submodule(path)
        usual = getattr(type(module), name)

        def own(self, *args, **kwargs):
            return tree_map(shifted, usual(self, *args, **kwargs))

        if where == "instance":
            setattr(module, name, types.MethodType(own, module))
        else:
            method = functools.wraps(usual)(own) if where == "decorator" else own
            module.__class__ = type("Own", (type(module),), {name: method})

    return change


def test_the_methods_are_found():
    names = {name for _, _, name in CASES}
    assert names > {
        "forward",
        "forward_head",
        "prompt_image",
        "specific_prompt",
        "feature_prompt",
        "block_prompts",
        "trunk",
    }


@pytest.mark.parametrize("where", ["class", "decorator", "instance"])
@pytest.mark.parametrize(("config", "path", "name"), CASES)
@pytest.mark.filterwarnings("ignore:.*takes the general path")
def test_an_own_method_is_called(config, path, name, where):
    reference, fast = make_models(config, override(path, name, where))
    plain = make_models(config)[0]
    plain.load_state_dict(reference.state_dict())
    image = images_without_ties(plain)
    expected, values = trained_gradients(reference, image), trained_gradients(fast, image)
    assert relative_error(plain(image), expected["logits"]) > 1e-3  # so that it matters whether it is called
    for key, value in values.items():
        assert relative_error(value, expected[key]) < 1e-4, key
    with torch.no_grad():
        reference.eval(), fast.eval()
        for _ in range(2):  # the second pass may be a program
            assert relative_error(fast(image), reference(image)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*takes the general path")
@torch.no_grad()
def test_compiled_code_calls_a_method_that_is_replaced_later():
    """Each in its turn: a model is traced once more for each, and called as it was traced first in between."""
    reference, fast = (model.eval() for model in make_models("paper", depth=1))
    torch.compiler.reset()
    image, compiled = images(), torch.compile(fast, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2 * len(METHODS["paper"])):
        assert relative_error(compiled(image), reference(image)) < 1e-5
        for path, name in METHODS["paper"]:
            for model in (reference, fast):
                override(path, name, "instance")(model)
            assert relative_error(compiled(image), reference(image)) < 1e-5, (path, name)
            for model in (reference, fast):
                delattr(model.get_submodule(path), name)
            assert relative_error(compiled(image), reference(image)) < 1e-5, (path, name)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="elsewhere masks of the reference depend on each call")
@pytest.mark.filterwarnings("ignore:.*has no fast path")
def test_an_own_specific_prompter_with_dropout_is_given_the_layout_of_the_reference():
    """Its masks are drawn in the order of memory."""

    def change(model):
        model.specific_prompter = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), *tokens_of_pixels(3))

    reference, fast = make_models("prompted", change)
    image = images().to(memory_format=torch.channels_last)
    expected, values = trained_gradients(reference, image), trained_gradients(fast, image)
    for key, value in values.items():
        assert relative_error(value, expected[key]) < 1e-4, key


def replace(path, make):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, make(model.get_submodule(path)))

    return change


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(
        lambda module, args, out: tree_map(shifted, out)
    )


def tokens_of_pixels(count):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, count * 48), nn.Unflatten(1, (count, 48)))


class OfTheBackbone(nn.Module):
    """A prompter that reads what the backbone makes of the image."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.linear = backbone, nn.Linear(48, 3 * 48)

    def forward(self, image):
        return self.linear(self.backbone.patch_embed(image).mean(1)).unflatten(1, (3, 48))


class Louder(InsVPViT):
    def __call__(self, image):
        return 2 * super().__call__(image)


class LouderReference(InsVPReference):
    def __call__(self, image):
        return 2 * super().__call__(image)


def call_louder(model):
    model.__class__ = Louder if isinstance(model, InsVPViT) else LouderReference


CHANGES = {
    "a call of its own": call_louder,
    "a prompter that holds the backbone": lambda model: setattr(
        model, "specific_prompter", OfTheBackbone(model.backbone)
    ),
    "another global prompter": replace("global_prompter", lambda _: nn.Conv2d(3, 3, 1)),
    "another specific prompter": replace("specific_prompter", lambda _: tokens_of_pixels(3)),
    "another dilation": lambda model: setattr(model.global_prompter.conv1, "dilation", (3, 3)),
    "another kernel": replace("specific_prompter.conv1", lambda _: nn.Conv2d(3, 3, 3, padding="same")),
    "another head": replace("head", lambda head: nn.Sequential(head, nn.Softmax(-1))),
    "no global prompter": lambda model: setattr(model, "global_prompter", None),
    "no common prompts": lambda model: setattr(model, "common_prompts", None),
    "other blocks": lambda model: setattr(model, "prompted_blocks", (0,)),
    **{f"a hook of {path or 'the model'}": hook(path) for path in ("", "head", "global_prompter", "specific_prompter")},
}
CHANGES |= {
    f"an own {path} {name} of the {where}": override(path, name, where)
    for path, name in METHODS["paper"]
    for where in ("class", "instance")
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*takes the general path")
@torch.no_grad()
def test_a_bank_computes_what_a_changed_model_does(change):
    reference, changed = (model.eval() for model in make_models("paper", CHANGES[change]))
    bank = AdapterBank(copy.deepcopy(changed.backbone))
    usual = make_models("paper")[1].eval()
    usual.backbone.load_state_dict(changed.backbone.state_dict())
    bank.add("changed", changed)
    bank.add("usual", usual)
    names, image = ["changed", "usual", "changed"], images(3)
    values, expected = bank(image, names), reference(image)
    assert relative_error(values[0::2], expected[0::2]) < 1e-5
    assert relative_error(values[1:2], usual(image[1:2])) < 1e-5


def test_a_model_that_cannot_be_copied_is_refused():
    model = make_models("paper")[1]
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="the InsVPViT cannot be copied by copy.deepcopy: .*lock"):
        AdapterBank(copy.deepcopy(model.backbone)).add("locked", model)


@pytest.mark.parametrize("change", ["two tokens", "no prompts", "specific_prompt", "prompt_image"])
@torch.no_grad()
def test_a_bank_with_other_prompts_than_a_configuration_names(change):
    """In a family whose blocks take no padding, so that images with fewer prompts must run by themselves."""
    backbone = timm.create_model("vit_relpos_small_patch16_224", **SIZES)
    for parameter in backbone.parameters():  # not the small scales of its layers
        parameter.add_(0.1 * torch.randn_like(parameter))
    config = InsVPConfig(prompt_length=3, common_prompt=False)
    models = {name: InsVPViT(copy.deepcopy(backbone), 5, config).eval() for name in ("usual", "changed")}
    changed = models["changed"]
    if change in ("two tokens", "no prompts"):
        changed.specific_prompter = tokens_of_pixels(2) if change == "two tokens" else None
    elif change == "specific_prompt":
        changed.specific_prompt = lambda image, prompted: changed.specific_prompter(image)[:, :1]
    else:
        changed.prompt_image = lambda image: (image, changed.specific_prompter(image)[:, :1])
    bank, image = AdapterBank.from_pretrained(backbone, models).to(DEVICE), images()
    values = bank(image, ["usual", "changed"])
    for row, x, model in zip(values, image, models.values(), strict=True):
        assert relative_error(row[None], model.to(DEVICE)(x[None])) < 1e-5
