"""A model that is changed after its first forward pass has the reference's numbers, or raises as the reference does."""

import contextlib
import copy
import dataclasses
import functools
import json
import operator
import pickle
import pkgutil
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors

from insvp_fast import InsVPConfig, InsVPViT, coverage, unsupported_reason
from insvp_fast.coverage import surroundings
from insvp_fast.testing import DEVICE, make_pair, relative_error, trained_gradients

pytestmark = pytest.mark.filterwarnings("ignore:.*takes the general path:UserWarning")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
RATES = {"drop_rate": 0.3, "pos_drop_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3}
CONFIG = InsVPConfig(prompt_length=3, global_dropout=0.0)


@functools.cache
def originals(**kwargs):
    torch.manual_seed(0)
    return make_pair("vit_tiny_patch16_224", CONFIG, **TINY | kwargs)


@functools.cache
def pickled_originals(**kwargs):
    return pickle.dumps(originals(**kwargs))


@functools.cache
def image():
    torch.manual_seed(3)
    return torch.randn(2, 3, 32, 32)


def in_use(change, **kwargs):
    """A reference and a fast model, both changed, the latter after a forward pass."""
    models = pickle.loads(pickled_originals(**kwargs))  # a thousand times: in two thirds of the time of a deep copy
    with torch.no_grad():
        assert unsupported_reason(models[1]) is None
        models[1](image())
    for model in models:
        torch.manual_seed(1)
        change(model)
    return models


def numbers(model, dtype=torch.float32):
    try:
        return trained_gradients(model, image().to(dtype))
    except Exception as error:
        return error


def problem(change, **kwargs):
    """What is wrong after a change, if anything."""
    reference, fast = in_use(change, **kwargs)
    expected, values = numbers(reference), numbers(fast)
    if isinstance(expected, Exception) or isinstance(values, Exception):
        both = isinstance(expected, Exception) and isinstance(values, Exception)
        return None if both else f"reference: {expected!r:.200}, fast: {values!r:.200}"
    if values.keys() != expected.keys():
        return f"gradients of {sorted(expected.keys() ^ values.keys())}"
    if max_error(values, expected) < 1e-5:
        return None
    # the difference may be rounding: compare both with double precision, if the change allows that
    exact = numbers(copy.deepcopy(reference).double(), torch.float64)
    if isinstance(exact, Exception) or max_error(values, exact) > max(1e-5, 2 * max_error(expected, exact)):
        return f"off by {max_error(values, expected):.0e}"
    return None


def test_a_problem_is_found(monkeypatch):
    monkeypatch.setattr(coverage, "covers", lambda part, obstacle=None: True)
    for path in ("backbone.blocks.0.drop_path1", "backbone.blocks.1.mlp.drop2"):
        assert problem(replaced(path)).startswith("off by")
    assert problem(at("specific_prompter.conv2", HOOKS["forward hook"])).startswith("off by")


def max_error(values, exact):
    return max(relative_error(value, exact[name]) for name, value in values.items())


def at(path, change):
    return lambda model: change(model.get_submodule(path))


class Adapter(nn.Module):
    """Adds something to the output of a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return y + 0.3 * y.tanh()


def replaced(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapter(model.get_submodule(path)))

    return change


def with_own_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def doubled(module, args, result):
    return 2 * result


HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(doubled),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:])),
    "backward hook": lambda m: m.register_full_backward_hook(
        lambda module, inputs, outputs: (2 * inputs[0], *inputs[1:])
    ),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],)),
    "own forward": with_own_forward,
}


def other_values(value):
    """Other values of an attribute, of its type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, max(value // 2, 1)]
    if isinstance(value, float):
        return [1.5 * value + 0.1, 0.0]
    if isinstance(value, tuple) and value and all(isinstance(v, int) for v in value):
        return [(value[0] + 1, *value[1:]), (*value[:-1], value[-1] + 1), tuple(v + 1 for v in value)]
    if not isinstance(value, str):
        return []
    return {"zeros": ["circular", "reflect"], "same": ["valid", 0, 1], "none": ["tanh"], "token": ["avg"]}.get(
        value, []
    )


def changes(path, module):
    """Every change to one module, by name."""
    yield "replaced", replaced(path)
    for name, hook in HOOKS.items():
        yield name, at(path, hook)
    for name, value in vars(module).items():
        if name == "training" or (name.startswith("_") and name != "_fast_norm"):
            continue
        for other in other_values(value):
            yield f"{name}={other}", at(path, lambda m, name=name, other=other: setattr(m, name, other))
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        yield f"{name} trained or not", at(path, lambda m, name=name: getattr(m, name).requires_grad_())
        yield f"no {name}", at(path, lambda m, name=name: setattr(m, name, None))
        yield f"{name} in another dtype", at(path, lambda m, name=name: setattr(m, name, other_dtype(getattr(m, name))))
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        yield "spectral norm", at(path, spectral_norm)
        yield "parametrization", at(path, lambda m: parametrizations.weight_norm(m))
        yield "own parametrization", at(path, lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()))


def other_dtype(parameter):
    return nn.Parameter(parameter.detach().double(), requires_grad=parameter.requires_grad)


PATHS = [path for path, _ in originals()[0].named_modules() if path and not path.startswith("head")]
LAST_BLOCK = [path for path in PATHS if path.startswith("backbone.blocks.1")]


@pytest.mark.parametrize("path", [path for path in PATHS if path not in LAST_BLOCK])
def test_a_changed_module(path):
    module = originals()[0].get_submodule(path)
    problems = {name: found for name, change in changes(path, module) if (found := problem(change))}
    assert not problems


@pytest.mark.parametrize("path", LAST_BLOCK)
def test_a_changed_module_of_the_last_block(path):
    """Its rules are those of the first block; here, that there are any."""
    assert problem(replaced(path)) is None and problem(at(path, HOOKS["forward hook"])) is None


@pytest.mark.parametrize("path", ["backbone", *(path for path in PATHS if path.startswith("backbone."))])
def test_a_backbone_in_training_mode(path):
    assert problem(at(path, lambda module: module.train()), **RATES) is None


@pytest.mark.parametrize("path", ["backbone", "backbone.patch_drop"])
def test_patch_dropout_in_training_mode(path):
    assert problem(at(path, lambda module: module.train()), **RATES, patch_drop_rate=0.3) is None


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False), nn.RMSNorm(16), nn.Tanh()]
)
def test_one_norm_of_queries_or_keys(name, norm):
    norm = copy.deepcopy(norm).requires_grad_(False)
    for block in (0, 1):
        change = at(f"backbone.blocks.{block}.attn", lambda m: setattr(m, name, copy.deepcopy(norm)))
        assert problem(change) is None


SETTINGS = {
    "global pool": at("backbone", lambda m: setattr(m, "global_pool", "avg")),
    "position embedding": at("backbone", lambda m: setattr(m, "_pos_embed", lambda x: 2 * type(m)._pos_embed(m, x))),
    "dilated patches": at("backbone.patch_embed.proj", lambda m: vars(m).update(dilation=(2, 2), padding=(4, 4))),
    "patch prompter a convolution": lambda m: setattr(m, "patch_prompter", nn.Conv2d(3, 3, 3, padding=1)),
    "patch prompter on larger patches": at("patch_prompter", lambda m: vars(m).update(patch_size=4)),
    "grouped convolutions": at(
        "global_prompter", lambda m: setattr(m, "conv2", nn.Conv2d(6, 3, 3, padding="same", groups=3))
    ),
    "even kernels": at("specific_prompter", lambda m: setattr(m, "conv1", nn.Conv2d(3, 3, 6, padding="same"))),
    "dilated specific prompter": at("specific_prompter.conv2", lambda m: setattr(m, "dilation", (2, 2))),
    "swapped weights": lambda m: [
        torch.utils.swap_tensors(p, nn.Parameter(1.5 * p.detach(), p.requires_grad)) for p in list(m.parameters())
    ],
    "pruned blocks": at("backbone", lambda m: setattr(m, "blocks", nn.ModuleList([m.blocks[1]]))),
    "unknown child": at("backbone.blocks.0", lambda m: setattr(m, "adapter", nn.Linear(48, 48))),
    "linear backbone weight from a network": at("backbone.blocks.0.mlp.fc1", lambda m: weight_from_a_network(m)),
    "half of the backbone in fp64": at("backbone.blocks.1", lambda m: m.double()),
}


def hidden_by(value):
    """An attribute that hides the child of the same name."""
    return lambda name: lambda module: object.__setattr__(module, name, value)


def reordered(backbone):
    backbone.blocks = nn.ModuleList(backbone.blocks)
    blocks = backbone.blocks._modules
    blocks["0"] = blocks.pop("0")


def as_buffer(linear):
    bias = 2 * linear.bias.detach()
    del linear.bias
    linear.register_buffer("bias", bias)


LOUDER = torch.nn.functional.linear, torch.nn.functional.conv2d, torch.Tensor.expand


class LouderProducts:
    """A tensor with which some functions return 1.5 times their results."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return 1.5 * y.as_subclass(torch.Tensor) if function in LOUDER else y


class LouderParameter(LouderProducts, nn.Parameter):
    pass


SETTINGS |= {
    "a child deleted, a function there": at(
        "backbone", lambda m: (delattr(m, "patch_drop"), setattr(m, "patch_drop", lambda x: 2 * x))
    ),
    "a child hidden": at("backbone", hidden_by(nn.Tanh())("patch_drop")),
    "a child of a block hidden": at("backbone.blocks.0", hidden_by(nn.Tanh())("drop_path2")),
    "a parameter hidden": at("backbone.blocks.0.mlp.fc1", hidden_by(torch.ones(192))("bias")),
    "own forward_head": lambda m: setattr(m, "forward_head", lambda x: m.head(x.mean(1))),
    "own apply_block": lambda m: setattr(m, "apply_block", lambda block, h, p_j: (2 * block(h), None)),
    "own forward_features": lambda m: setattr(m, "forward_features", lambda x: 2 * type(m).forward_features(m, x)),
    "a parameter of another class": at(
        "backbone.blocks.0.mlp.fc1", lambda m: setattr(m.weight, "__class__", LouderParameter)
    ),
    "a sparse weight": at("backbone.blocks.0.mlp.fc1", lambda m: setattr(m, "weight", sparse(m.weight))),
    "a compiled block": at(
        "backbone.blocks.0", lambda m: m.compile(backend=lambda graph, _: lambda *a: (2 * graph(*a)[0],))
    ),
    "blocks in another order": at("backbone", reordered),
    "a prompt of another class": at("common_prompts", lambda m: setattr(m[1], "__class__", LouderParameter)),
    "prompts of one number each": at("common_prompts", lambda m: setattr(m, "1", nn.Parameter(m[1].detach()[:, :1]))),
    "a global prompt of one channel": lambda m: setattr(m, "global_prompter", nn.Conv2d(3, 1, 3, padding=1)),
    "a common prompt that is lazily negated": at("common_prompts", lambda m: negate(m[0])),
    "a trained weight that is lazily negated": at("patch_prompter.fc1", lambda m: negate(m.weight)),
    "prompts of another number": at("common_prompts", lambda m: setattr(m, "1", nn.Parameter(m[1].detach()[:2]))),
    "a configuration of another number": lambda m: setattr(m, "config", dataclasses.replace(m.config, prompt_length=2)),
    "a dilation of one number": at("global_prompter.conv1", lambda m: setattr(m, "dilation", 2)),
    "a prompter of something else": at("global_prompter", lambda m: setattr(m, "conv1", nn.MaxPool2d(3, 1, 1))),
    "scales of heads": at(
        "backbone.blocks.0.attn",
        lambda m: vars(m).update(fused_attn=False, scale=torch.tensor([0.1, 0.2, 0.3])[:, None, None]),
    ),
    "a bias that is a buffer": at("backbone.blocks.0.mlp.fc1", as_buffer),
    "a dropout in place": at("specific_prompter", lambda m: setattr(m, "dropout", nn.Dropout(0.0, inplace=True))),
    "a lazy layer": at("backbone.blocks.0.mlp", lambda m: setattr(m, "fc2", nn.LazyLinear(48))),
    "a lazy layer of a prompter": at("patch_prompter", lambda m: setattr(m, "fc2", nn.LazyLinear(192))),
    "an array for a number": at("backbone", lambda m: setattr(m, "num_classes", np.array([5, 5]))),
    "an activation of another class": at("backbone.blocks.0.mlp.act", lambda m: setattr(m, "__class__", nn.Tanh)),
    "an activation for a dropout": at("specific_prompter", lambda m: setattr(m, "dropout", nn.ReLU(inplace=True))),
}


def negate(p):
    """Keep the numbers, in memory of the other sign."""
    p.data = torch.complex(torch.zeros_like(p), -p).detach().conj().imag


def sparse(weight):
    return nn.Parameter(weight.detach().to_sparse_csr(), requires_grad=False)


def weight_from_a_network(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight * nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_changed_setting(setting):
    assert problem(SETTINGS[setting]) is None


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["gamma", "bias", "data of bias"])
def test_a_parameter_of_a_single_number(name, shape):
    """A layer scale for all channels, say."""
    number = torch.full(shape, 0.3, device=DEVICE)

    def change(model):
        block = model.backbone.blocks[0]
        if name == "data of bias":
            block.mlp.fc1.bias.data = number
        else:
            setattr({"gamma": block.ls1, "bias": block.attn.proj}[name], name, nn.Parameter(number, False))

    assert problem(change, init_values=0.1) is None


def other_shapes(x):
    """Of a tensor: those that can be broadcast to its own, and those of several images."""
    size = tuple(x.shape)
    ones = [(*size[:i], 1, *size[i + 1 :]) for i in range(x.ndim)]
    shapes = {(1, *size), (2, *size), *ones} | ({size[1:], (2, *size[1:])} if size[:1] == (1,) else set())
    return sorted(shapes - {size})


def given_shape(x, shape):
    """Numbers of a tensor in another shape; several images have different ones."""
    if x.numel() < torch.Size(shape).numel():
        return torch.stack([x.reshape(shape[1:]), 1.1 * x.reshape(shape[1:])])
    return x.flatten()[: torch.Size(shape).numel()].reshape(shape).clone()


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.3, "reg_tokens": 2, "no_embed_class": True, "qk_norm": True}],
    ids=["plain", "more"],
)
def test_parameters_of_other_shapes(options):
    """Each parameter of the patch embedding, the first block and the patch prompter, in shapes that may fit."""
    wrong, known = {}, {name for name, _ in originals()[1].named_parameters()} - {"backbone.pos_embed"}
    for name, x in originals(**options)[1].named_parameters():
        if name.startswith(("backbone.blocks.1.", "backbone.head", "global", "specific", "common")):
            continue
        if options and name in known:
            continue
        for shape in other_shapes(x.detach()):
            number = given_shape(x.detach(), shape)

            def change(model, name=name, number=number):
                parent, _, leaf = name.rpartition(".")
                old = getattr(model.get_submodule(parent), leaf)
                setattr(model.get_submodule(parent), leaf, nn.Parameter(number.clone(), old.requires_grad))

            if found := problem(change, **options):
                wrong[name, shape] = found
    assert wrong == {}


@pytest.mark.parametrize("kernel", [(4, 16), (2, 32), (4, 4), (1, 1)])
@pytest.mark.parametrize("whole", [True, False], ids=["layer", "weight alone"])
def test_patches_projected_by_another_kernel(kernel, whole):
    """Even one with as many pixels as a patch."""

    def change(model):
        projection = nn.Conv2d(3, 48, kernel, stride=8).requires_grad_(False)
        if whole:
            model.backbone.patch_embed.proj = projection
        else:
            model.backbone.patch_embed.proj.weight = projection.weight

    assert problem(change, pos_embed="none") is None
    assert problem(change) is None


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}], ids=str)
def test_the_one_token_of_a_small_image_is_broadcast(options):
    """To all positions, where the size of the image is not checked."""
    models = in_use(lambda model: setattr(model.backbone.patch_embed, "strict_img_size", False), **options)
    reference, fast = (trained_gradients(model, image()[..., :8, :8]) for model in models)
    assert max_error(fast, reference) < 1e-5


@contextlib.contextmanager
def hook_for_all_modules(register, hook):
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def test_hooks_for_all_modules():
    _, fast = models = in_use(lambda model: None)

    def doubled_linear(module, args, result):
        return 2 * result if isinstance(module, nn.Linear) else None

    with hook_for_all_modules(nn.modules.module.register_module_forward_hook, doubled_linear):
        reference, values = map(numbers, models)
        assert unsupported_reason(fast) == "there is a hook for all modules"
    assert max_error(values, reference) < 1e-5
    assert unsupported_reason(fast) is None and max_error(numbers(fast), numbers(models[0])) < 1e-5


PATCHED = [
    ("timm.layers.attention.Attention", "forward"),
    ("timm.models.vision_transformer.Block", "__call__"),
    ("timm.models.vision_transformer.VisionTransformer", "pool"),
    ("timm.models.vision_transformer.VisionTransformer", "_pos_embed"),
    ("torch.nn.Linear", "__call__"),
    ("torch.nn.Conv2d", "_conv_forward"),
    ("insvp_fast.reference.GlobalPrompter", "forward"),
    ("torch.nn.functional", "scaled_dot_product_attention"),
    ("torch.nn.functional", "linear"),
    ("torch.nn.functional", "conv2d"),
    ("torch.nn.functional", "softmax"),
    ("torch", "layer_norm"),
    ("torch.Tensor", "relu"),
    ("torch.Tensor", "softmax"),
    ("torch.nn.Module", "_call_impl"),
]


@pytest.mark.parametrize(("owner", "name"), PATCHED)
def test_a_replaced_function(monkeypatch, owner, name):
    _, fast = models = in_use(lambda model: None)
    own = getattr(pkgutil.resolve_name(owner), name)
    monkeypatch.setattr(f"{owner}.{name}", lambda *args, **kwargs: 1.5 * own(*args, **kwargs))
    reference, values = map(numbers, models)
    assert max_error(values, reference) < 1e-5
    assert unsupported_reason(fast).endswith(f"{name} has been replaced")


class Wrapped:
    """As functools.partial, with the name of what it calls."""

    def __init__(self, function):
        functools.update_wrapper(self, function)


WRITTEN_ELSEWHERE = {
    "another package's": lambda owner: json.loads,
    "another package's in C": lambda owner: operator.neg,
    "that calls PyTorch's and has its name": lambda owner: functools.wraps(owner.softmax)(lambda *a: owner.softmax(*a)),
    "that calls PyTorch's in C and has its name": lambda owner: functools.wraps(owner.linear)(
        lambda *a: owner.linear(*a)
    ),
    "compiled": lambda owner: torch.compile(lambda x: x),
    "partial": lambda owner: functools.partial(owner.softmax, dim=0),
    "an object": lambda owner: Wrapped(owner.softmax),
}


@pytest.mark.parametrize("replace", WRITTEN_ELSEWHERE.values(), ids=WRITTEN_ELSEWHERE)
def test_a_function_that_was_written_elsewhere_counts_as_replaced(replace, monkeypatch):
    monkeypatch.setattr(surroundings, "_WATCHED", {})
    owner = ModuleType("owner")
    owner.linear, owner.relu, owner.softmax = nn.functional.linear, torch.Tensor.relu, nn.functional.softmax
    surroundings.watch("linear relu softmax", owner)
    assert surroundings.surroundings_reason() is None
    owner.patched = replace(owner)
    surroundings.watch("patched", owner)
    assert surroundings.surroundings_reason() == "owner.patched has been replaced"


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_no_fast_path_is_traced_by_jit():
    reasons = []

    def ask(x):
        reasons.append(surroundings.surroundings_reason())
        return x + 1

    torch.jit.trace(ask, torch.zeros(1), check_trace=False)
    assert reasons == ["torch.jit.trace is active"] and surroundings.surroundings_reason() is None


class Halved(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return 0.5 * y if function is torch.nn.functional.gelu else y


def test_a_function_mode():
    _, fast = models = in_use(lambda model: None)
    with Halved():
        reference, values = (model(image()) for model in models)
    assert relative_error(values, reference) < 1e-5 < relative_error(fast(image()), reference)
    with torch.device("cpu"):  # a mode of PyTorch that changes no result
        assert coverage.covers(fast)


class Louder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return 1.5 * y if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else y


def test_a_dispatch_mode():
    _, fast = models = in_use(lambda model: None)
    with Louder():
        reference, values = map(numbers, models)
        assert unsupported_reason(fast) == "a torch dispatch mode is active"
    assert max_error(values, reference) < 1e-5
    with FakeTensorMode():  # which changes no result
        assert coverage.covers(fast)


def test_saved_weights_that_are_written_as_pytorch_allows():
    """It keeps what was saved, by a dispatch mode."""
    reference, fast = in_use(lambda model: None)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = fast(image()).square().sum()
        with torch.no_grad():
            fast.backbone.blocks[0].attn.qkv.weight.mul_(1.5)
        loss.backward()
    reference(image()).square().sum().backward()
    for p, exact in zip(fast.parameters(), reference.parameters(), strict=True):
        assert p.grad is exact.grad is None or relative_error(p.grad, exact.grad) < 1e-5


class LouderImage(LouderProducts, torch.Tensor):
    pass


class PlainImage(torch.Tensor):
    pass


def test_images_of_other_classes():
    reference, fast = in_use(lambda model: None)
    for kind in (LouderImage, PlainImage):
        values, expected = (model(image().as_subclass(kind)) for model in (fast, reference))
        assert relative_error(values.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor)) < 1e-5
    with pytest.warns(UserWarning, match="image is of the class LouderImage, which has operations of its own"):
        fast(image().as_subclass(LouderImage))
    with warnings.catch_warnings(action="error"):
        values = fast(tv_tensors.Image(image()))
    assert relative_error(values, reference(image())) < 1e-5


class Noisy(nn.Module):
    """Common prompts with noise, drawn at each look."""

    def __init__(self, prompts):
        super().__init__()
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, i):
        return self.prompts[i] + 0.1 * torch.randn_like(self.prompts[i])

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


def test_common_prompts_that_are_looked_at_as_often_as_in_the_reference():
    results = []
    for model in in_use(lambda m: setattr(m, "common_prompts", Noisy(m.common_prompts))):
        torch.manual_seed(4)
        results.append(model(image()))
    assert relative_error(*results) < 1e-5


@pytest.mark.parametrize("path", ["backbone.blocks.1.mlp.fc2", "backbone.patch_embed.proj", "patch_prompter.fc1"])
def test_a_weight_that_is_lazily_negated_once_programs_are_there(path):
    reference, fast = in_use(lambda model: None)
    with torch.no_grad():
        for _ in range(3):
            fast(image())
        negate(fast.get_submodule(path).weight)
        assert relative_error(fast(image()), reference(image())) < 1e-5


def test_unchanged_models_take_the_fast_path():
    for variant in ({}, RATES, {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True}, {"dynamic_img_size": True}):
        _, fast = in_use(lambda model: None, **variant)
        for part in (fast, fast.global_prompter, fast.patch_prompter, fast.specific_prompter):
            assert unsupported_reason(part) is None and coverage.covers(part)
        for mode in (True, False):
            fast.train(mode)
            assert coverage.covers(fast)


def test_a_reason_is_reported_once_and_may_disappear():
    _, fast = in_use(lambda model: None)
    drop = fast.backbone.blocks[1].mlp.drop2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast.backbone.blocks[1].mlp.drop2 = nn.Tanh()
        for _ in range(3):
            fast(image())
    reason = "backbone.blocks.1.mlp.drop2 is torch's Tanh: expected torch's Identity or torch's Dropout"
    assert [str(w.message) for w in caught] == [f"InsVPViT takes the general path, exact but not fast: {reason}"]
    fast.backbone.blocks[1].mlp.drop2 = drop
    assert unsupported_reason(fast) is None and coverage.covers(fast)
    hook = drop.register_forward_hook(doubled)
    assert not coverage.covers(fast)
    hook.remove()
    assert coverage.covers(fast)


def test_a_reason_tells_classes_of_one_name_apart():
    _, fast = in_use(lambda model: None)
    fast.backbone.blocks[1].attn.proj.__class__ = type("Linear", (nn.Linear,), {"__module__": "torch.elsewhere"})
    reason = "backbone.blocks.1.attn.proj is torch.elsewhere.Linear: expected torch's Linear"
    assert unsupported_reason(fast) == reason


def test_modules_without_a_fast_path():
    reference, fast = in_use(lambda model: setattr(model, "patch_prompter", nn.Conv2d(3, 3, 3, padding=1)))
    with pytest.warns(
        UserWarning, match="Conv2d takes the general path, exact but not fast: torch's Conv2d has no fast"
    ):
        fast(image())
    with pytest.raises(TypeError, match="part is insvp_fast's InsVPReference: expected an InsVPViT or one of its"):
        unsupported_reason(reference)
    with pytest.raises(TypeError, match="part is torch's Conv2d"):
        unsupported_reason(fast.patch_prompter)
    fast.backbone = nn.Sequential(fast.backbone)
    assert unsupported_reason(fast) == "backbone is torch's Sequential, which has no fast path"


def test_no_warning_for_the_dropout_of_a_configuration():
    model = InsVPViT("vit_tiny_patch16_224", 3, InsVPConfig.released(prompt_length=2, carry_prompts=False), **TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (True, False, True):
            model.train(mode)(image())


def test_a_copy_is_examined_by_itself():
    _, fast = in_use(lambda model: None)
    twin = copy.deepcopy(fast)
    assert coverage.covers(twin)
    twin.backbone.blocks[0].attn.proj_drop = nn.Tanh()
    assert coverage.covers(fast) and not coverage.covers(twin)


COMPILED = {
    "a replaced module": replaced("backbone.blocks.0.drop_path1"),
    "a hook of the backbone": at("backbone.blocks.0.mlp.drop2", HOOKS["forward hook"]),
    "a hook of a prompter": at("specific_prompter.conv2", HOOKS["forward hook"]),
    "training": at("backbone", lambda m: m.train()),
}


@pytest.mark.parametrize("change", COMPILED)
def test_compiled_models_are_traced_again(change):
    torch._dynamo.reset()
    reference, fast = in_use(lambda model: None, depth=1)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    if "hook" not in change or torch.__version__ >= "2.12":  # 2.11 does not trace again for a hook
        compiled(image())
    for model in (reference, fast):
        COMPILED[change](model)
    assert relative_error(compiled(image()), reference(image())) < 1e-5


def test_the_backbone_of_a_model_is_replaced():
    _, fast = in_use(lambda model: None)
    other = InsVPViT(copy.deepcopy(originals(qk_norm=True)[1].backbone), 10, CONFIG)
    fast.backbone = other.backbone
    fast.backbone.blocks[0].ls1 = nn.Tanh()
    assert not coverage.covers(fast)


def gradient(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return torch.func.grad(lambda ps: torch.func.functional_call(model, ps, (x,)).square().sum())(parameters)


TRANSFORMS = {
    "vmap": lambda model, x: torch.func.vmap(lambda one: model(one[None])[0])(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](torch.ones(len(x), 10, device=x.device))[0],
    "gradients by the parameters": lambda model, x: torch.cat([g.flatten() for g in gradient(model, x).values()]),
    "gradients of each image": lambda model, x: torch.func.vmap(lambda one: gradient(model, one[None])["head.bias"])(x),
    "a functional call": lambda model, x: torch.func.functional_call(
        model, {name: 1.5 * p.detach() for name, p in model.named_parameters()}, (x,)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_take_the_general_path(transform):
    reference, fast = (model.eval() for model in in_use(lambda model: None))
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no forward-mode derivative on CPUs
        values, expected = (TRANSFORMS[transform](model, image()) for model in (fast, reference))
    assert relative_error(values, expected) < 1e-5
    assert coverage.covers(fast)


def test_the_warning_is_of_the_code_that_called_the_model():
    with pytest.warns(UserWarning, match="takes the general path") as told:
        InsVPViT("vit_tiny_patch16_224", 10, img_size=32, act_layer="relu")
    assert told[0].filename == __file__
    model = InsVPViT("vit_tiny_patch16_224", 10, img_size=32)
    model.backbone.blocks[0].mlp.act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has a hook") as told:
        model(torch.randn(1, 3, 32, 32))
    assert told[0].filename == __file__
