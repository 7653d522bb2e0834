"""Rules for modules: a type, its attributes and parameters; and how a module differs from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.coverage.snapshot import HOOKS
from insvp_fast.coverage.surroundings import home, watch

__all__ = [
    "CALLED",
    "DROPOUT_OFF",
    "IDENTITY",
    "LINEAR",
    "Rule",
    "Table",
    "convolution",
    "difference",
    "foreign",
    "full_name",
    "rule",
]

ANY = object()

# names of parameters
TOKENS = ("cls_token", "reg_token", "dist_token")
VECTORS = ("weight", "bias", "gamma", "gamma_1", "gamma_2", "q_bias", "v_bias", "mlp_bias")


class Rule(NamedTuple):
    """A module of exactly this type, with exactly these attributes, parameters and buffers, and without hooks."""

    type: type[nn.Module]
    attributes: Mapping[str, Any]  # the required value, or ANY
    parameters: Mapping[str, bool]  # whether it is required
    dropout_rate: str | None  # the attribute that has to be 0 in training mode
    buffers: tuple[str, ...] = ()  # that the fast path reads, so that they may hold anything, or be None


# path of a submodule -> the rules of which it has to satisfy one; every submodule has to be in the table
Table = dict[str, tuple[Rule, ...]]

# in a table: a module that the fast path calls, as the reference does, and that may therefore be anything
CALLED: tuple[Rule, ...] = ()


def rule(
    cls: type[nn.Module],
    free: str = "",
    *,
    required: str = "",
    optional: str = "",
    buffers: str = "",
    dropout_rate: str | None = None,
    **expected: Any,
) -> Rule:
    """A ``Rule`` from names separated by blanks.

    Args:
        cls: the type; a subclass is another type.
        free: attributes of any value, because the fast path reads them or the result does not depend on them.
        required, optional: parameters.
        buffers, dropout_rate: see ``Rule``.
        expected: attributes and the values that they need.
    """
    parameters = dict.fromkeys(required.split(), True) | dict.fromkeys(optional.split(), False)
    return Rule(cls, dict.fromkeys(free.split(), ANY) | expected, parameters, dropout_rate, tuple(buffers.split()))


# modules of PyTorch that several tables have
IDENTITY = rule(nn.Identity)
DROPOUT_OFF = (IDENTITY, rule(nn.Dropout, "p inplace", dropout_rate="p"))
LINEAR = (rule(nn.Linear, "in_features out_features", required="weight", optional="bias"),)


def convolution(stride: tuple[int, int], padding: object, dilation: tuple[int, int]) -> Rule:
    """A plain convolution with a bias, of any width and kernel."""
    return rule(
        nn.Conv2d,
        "in_channels out_channels kernel_size output_padding",
        required="weight bias",
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=1,
        padding_mode="zeros",
        transposed=False,
    )


watch("forward __call__", nn.Identity, nn.Dropout, nn.Linear, nn.Conv2d)
watch("_conv_forward", nn.Conv2d)
watch("linear conv2d", F)
watch("_call_impl __getattr__", nn.Module)


def difference(module: nn.Module, rules: tuple[Rule, ...] | None, frozen: bool) -> str | None:
    """How a module differs from all of its rules, as the rest of a sentence that starts with its name.

    Args:
        module: the module, without its children.
        rules: None if the table does not have the module.
        frozen: whether its parameters must not be trained.
    """
    if rules is None:
        return f"({full_name(type(module))}) is not known to the fast path"
    found = next((one for one in rules if one.type is type(module)), None)
    if found is None:
        name, expected = full_name(type(module)), [full_name(one.type) for one in rules]
        if name in expected:  # torch has several that are called Linear
            name = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"is {name}: expected {' or '.join(expected)}"
    state = vars(module)
    if any(state.get(hooks) for hooks in HOOKS):
        return "has a hook"
    if own := next((name for name in state if callable(getattr(found.type, name, None))), None):
        return f"has a {own} of its own"
    if hidden := state.keys() & (module._modules.keys() | module._parameters.keys() | module._buffers.keys()):
        return f"has an attribute that hides its {min(hidden)}"
    rate = found.dropout_rate
    if rate is not None and module.training and getattr(module, rate, 0) != 0:
        return f"is in training mode with {rate}={getattr(module, rate)}"
    return _different_attribute(module, found) or _different_tensor(module, found, frozen)


def foreign(owner: object, *names: str) -> str | None:
    """The first of these methods that an object has and that is not this package's."""
    for name in names:
        method = getattr(owner, name, None)
        ours = home(getattr(method, "__func__", method)).startswith("insvp_fast.")
        if name in getattr(owner, "__dict__", ()) or (method is not None and not ours):
            return name
    return None


def full_name(cls: type[nn.Module]) -> str:
    """A class in messages: the package that it is from, and its name."""
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"


def _different_attribute(module: nn.Module, rule: Rule) -> str | None:
    state = vars(module)
    for name, value in state.items():
        known = name in rule.attributes or name.startswith("_") or name == "training"
        if not known or isinstance(value, Tensor):
            return f"has an attribute {name!r} that the fast path does not know"
    for name, expected in rule.attributes.items():
        if expected is not ANY and (name not in state or state[name] != expected):
            return f"has {name}={getattr(module, name, None)!r}: expected {expected!r}"
    return None


def _different_tensor(module: nn.Module, rule: Rule, frozen: bool) -> str | None:
    for name, required in rule.parameters.items():
        if required and module._parameters.get(name) is None:
            return f"has no parameter {name}"
    for name, buffer in module._buffers.items():
        if name not in rule.buffers:
            return f"has a buffer {name}"
        if buffer is not None and not (type(buffer) is Tensor and _is_plain(buffer) and not buffer.requires_grad):
            return f"has a {type(buffer).__name__} {name!r} that the fast path does not know"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        plain = type(parameter) in (nn.Parameter, Tensor) and _is_plain(parameter)
        if name not in rule.parameters or not plain:
            return f"has a {type(parameter).__name__} {name!r} that the fast path does not know"
        if frozen and parameter.numel() == 1:
            return f"has a {name} of a single number, which fits by broadcasting alone"
        if (shape := _shape_that_fits(module, name, parameter)) != parameter.shape:
            return f"has a {name} of shape {tuple(parameter.shape)}: expected {tuple(shape)}"
        if frozen and parameter.requires_grad:
            return f"has a {name} that is trained"
    return None


def _shape_that_fits(module: Any, name: str, x: Tensor) -> Sequence[int]:
    """The shape that a parameter has where nothing is broadcast, and a convolution's weight is of the module's kernel.

    For parameters not named here any shape will do.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        kernel = module.kernel_size if isinstance(module, nn.Conv2d) else ()
        return (*x.shape[:2], *kernel) if name == "weight" else module.weight.shape[:1]
    if name == "relative_position_bias_table":
        return (*x.shape[:1], getattr(module, "num_heads", x.shape[-1]))
    if name in TOKENS:
        return (1, *x.shape[-2:])
    if name.startswith("pos_embed"):
        return (1, *x.shape[1:])
    return x.shape[-1:] if name in VECTORS else x.shape


def _is_plain(x: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers, not those of the other sign, which a trace does not see."""
    return x.layout == torch.strided and (torch.compiler.is_compiling() or not x.is_neg())
