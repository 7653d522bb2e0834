"""What the fast plan assumes of a model, in tables, and whether a model is so.

The fast plan computes what timm's modules and the prompters say without calling them. That is right only for what it
stands in for, so a module that is not in the tables, or is there with another type or value, sends the model down the
general path, which calls every module. Listed are also the modules that the plan leaves out because they do nothing,
such as a dropout in evaluation mode.

``torch.compile`` asks while it traces, and traces anew where a module has been replaced, hooked (not so torch 2.11),
trained or set to training. Other changes to a model that is compiled need ``torch.compiler.reset()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Format, LayerNorm, LayerScale, Mlp, PatchDropout, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import reference
from insvp_fast.coverage.snapshot import HOOKS, Snapshot
from insvp_fast.runtime import torch_private

__all__ = ["Planned", "covers", "dtypes_fit", "unsupported_reason"]

ANY = object()


class Rule(NamedTuple):
    """A module of exactly this type, with these attributes and parameters, no others, no buffers and no hooks."""

    type: type[nn.Module]
    attributes: Mapping[str, Any]
    parameters: Mapping[str, bool]  # whether each has to be there
    rate: str | None  # of a dropout: the attribute that has to be 0, unless the module is in evaluation mode


def rule(
    cls: type[nn.Module],
    read: str = "",
    *,
    needs: str = "",
    may_have: str = "",
    rate: str | None = None,
    **expected: Any,
) -> Rule:
    """A ``Rule``; ``read`` names attributes of any value: the plan reads them, or they decide nothing."""
    parameters = dict.fromkeys(needs.split(), True) | dict.fromkeys(may_have.split(), False)
    return Rule(cls, dict.fromkeys(read.split(), ANY) | expected, parameters, rate)


IDENTITY = rule(nn.Identity)
OFF = (IDENTITY, rule(nn.Dropout, "p inplace", rate="p"))  # dropouts that do nothing
DROPOUT = (IDENTITY, rule(nn.Dropout, "p", inplace=False))  # a dropout that the plan calls: its input is kept
PATH_OFF = (IDENTITY, rule(DropPath, "drop_prob scale_by_keep", rate="drop_prob"))
PATCHES_OFF = (IDENTITY, rule(PatchDropout, "prob num_prefix_tokens ordered", rate="prob"))
SCALE = (IDENTITY, rule(LayerScale, "init_values", needs="gamma", inplace=False))
LINEAR = (rule(nn.Linear, "in_features out_features", needs="weight", may_have="bias"),)
CALLED = ()  # a module that the plan calls as the reference does, whatever it is

Table = dict[str, tuple[Rule, ...]]


def _norm(width: int) -> tuple[Rule, ...]:
    plain = rule(nn.LayerNorm, "eps elementwise_affine", needs="weight", may_have="bias", normalized_shape=(width,))
    return plain, plain._replace(type=LayerNorm, attributes={**plain.attributes, "_fast_norm": False})


def _vision_transformer(vit: VisionTransformer, patch_size: int) -> Table:
    sides, dynamic, width = (patch_size, patch_size), vit.dynamic_img_size, vit.embed_dim
    embedding = {
        "patch_size": sides,
        "flatten": not dynamic,
        "output_fmt": Format.NHWC if dynamic else Format.NCHW,
        "dynamic_img_pad": False,
    }
    projection = _convolution(sides, padding=(0, 0), dilation=(1, 1))
    table = {
        # the root's attributes count where timm's methods read them, which both paths call
        "": (rule(VisionTransformer, " ".join(vars(vit)), may_have="cls_token reg_token pos_embed"),),
        "patch_embed": (rule(PatchEmbed, "img_size grid_size num_patches strict_img_size", **embedding),),
        "patch_embed.proj": (projection._replace(parameters={"weight": True, "bias": False}),),
        "patch_embed.norm": (IDENTITY,),
        "pos_drop": OFF,
        "patch_drop": PATCHES_OFF,
        "norm_pre": CALLED,
        "blocks": (rule(nn.Sequential), rule(nn.ModuleList)),
        "norm": (IDENTITY, *_norm(width)),
        "fc_norm": CALLED,
        "attn_pool": CALLED,
        "head_drop": CALLED,
        "head": CALLED,
    }
    for j, block in enumerate(vit.blocks):
        table |= {f"blocks.{j}{path}": rules for path, rules in _block(block, width).items()}
    return table


def _block(block: nn.Module, width: int) -> Table:
    attn = getattr(block, "attn", None)
    heads, head_width = getattr(attn, "num_heads", 1), getattr(attn, "head_dim", 1)
    attention = {"attn_dim": width, "head_dim": width // max(heads, 1), "scale": head_width**-0.5, "gate": None}
    if getattr(getattr(attn, "attn_drop", None), "p", 0):
        attention["training"] = False  # the fused attention asks it instead of attn_drop
    inner = (IDENTITY, *_norm(head_width))
    return {
        "": (rule(Block),),
        ".norm1": _norm(width),
        ".attn": (rule(Attention, "num_heads fused_attn", **attention),),
        ".attn.qkv": LINEAR,
        ".attn.q_norm": inner,
        ".attn.k_norm": inner,
        ".attn.attn_drop": OFF,
        ".attn.norm": (IDENTITY, *_norm(width)),
        ".attn.proj": LINEAR,
        ".attn.proj_drop": OFF,
        ".ls1": SCALE,
        ".drop_path1": PATH_OFF,
        ".norm2": _norm(width),
        ".mlp": (rule(Mlp),),
        ".mlp.fc1": LINEAR,
        ".mlp.act": (rule(nn.GELU, approximate="none"),),
        ".mlp.drop1": OFF,
        ".mlp.norm": (IDENTITY,),
        ".mlp.fc2": LINEAR,
        ".mlp.drop2": OFF,
        ".ls2": SCALE,
        ".drop_path2": PATH_OFF,
    }


def _convolution(stride: tuple[int, int], padding: object, dilation: tuple[int, int]) -> Rule:
    convolution = rule(nn.Conv2d, "in_channels out_channels kernel_size output_padding", needs="weight bias")
    decided = {"stride": stride, "padding": padding, "dilation": dilation}
    fixed = {"groups": 1, "padding_mode": "zeros", "transposed": False}
    return convolution._replace(attributes={**convolution.attributes, **decided, **fixed})


def _same_convolution(prompter: nn.Module, name: str, dilation: int | None = None) -> tuple[Rule, ...]:
    if dilation is None:  # the plan reads it, and has one for both axes
        own = getattr(getattr(prompter, name, None), "dilation", 1)
        dilation = own[0] if isinstance(own, tuple) and own else 1
    return (_convolution((1, 1), "same", (dilation, dilation)),)


# Of the prompters themselves any class will do, since it is their own forward that asks; of the patch prompter, which
# is not called, any with the forward of the reference.


def _global_prompter(prompter: nn.Module) -> Table:
    convolutions = {name: _same_convolution(prompter, name) for name in ("conv1", "conv2")}
    return {"": (rule(type(prompter)),), **convolutions, "dropout": DROPOUT}


def _specific_prompter(prompter: nn.Module) -> Table:
    convolutions = {name: _same_convolution(prompter, name, 1) for name in ("conv1", "conv2", "conv3")}
    return {"": (rule(type(prompter), "token_channels grid"),), **convolutions, "dropout": DROPOUT}


def _patch_prompter(prompter: nn.Module) -> Table:
    linear = (rule(nn.Linear, "in_features out_features", needs="weight bias"),)
    own = type(prompter) if type(prompter).forward is reference.PatchPrompter.forward else reference.PatchPrompter
    return {"": (rule(own, "patch_size"),), "fc1": linear, "fc2": linear, "dropout": OFF}


def unsupported_reason(part: nn.Module) -> str | None:
    """Why the fast plan does not cover a model, or one of its prompters, in words; None if it does.

    Args:
        part: an ``InsVPViT``, of which the backbone is asked, or a ``GlobalPrompter``, ``PatchPrompter`` or
            ``SpecificPrompter``: each takes its own fast or general path.
    """
    return _passing_reason(part) or _examine(part)[0]


class Planned(nn.Module):
    """A part of a model that takes the fast plan or the general path."""

    @torch.compiler.assume_constant_result  # of a method: as an argument a module would not be a constant to torch 2.11
    def _is_covered(self) -> bool:
        return _judge(self)


def covers(part: nn.Module) -> bool:
    """Whether the fast plan covers ``part`` as it is now; a warning tells, once, why it does not."""
    if not isinstance(part, Planned):
        return not torch.compiler.is_compiling() and _judge(part)
    if torch.compiler.is_compiling():
        _guard(part)
    return part._is_covered()


def dtypes_fit(image: Tensor, *weights: Tensor) -> bool:
    """Whether PyTorch would multiply them, as they are or by a cast of autocast, which leaves fp64 alone."""
    dtypes = {image.dtype, *(weight.dtype for weight in weights)}
    casts = torch.is_autocast_enabled(image.device.type) and image.is_floating_point() and torch.float64 not in dtypes
    return len(dtypes) == 1 or casts


def _guard(module: nn.Module) -> int:
    """Read what nothing else reads while a model is traced, so that PyTorch traces anew when it changes."""
    read = len(module._forward_hooks) + len(module._forward_pre_hooks) + module.training
    for child in module.children():
        read += _guard(child)
    return read


class _Memo:
    """What was found of a part, and what that rests on; a copy of the part starts anew."""

    def __init__(self) -> None:
        self.found: tuple[tuple[object, ...], str | None, Snapshot] | None = None
        self.told: str | None = None  # in a warning

    def __reduce__(self) -> Any:
        return _Memo, ()


def _judge(part: nn.Module) -> bool:
    memo = vars(part).setdefault("_memo", _Memo())
    reason = _passing_reason(part)
    if reason is None:
        found, key = memo.found, _key(part)
        if found is None or found[0] != key or not found[2].holds():
            reason, modules = _examine(part)
            found = memo.found = key, reason, Snapshot(modules)
        reason = found[1]
    if reason is not None and reason != memo.told:
        warnings.warn(f"{type(part).__name__} takes the general path, exact but not fast: {reason}", stacklevel=3)
    memo.told = reason
    return reason is None


def _key(part: nn.Module) -> tuple[object, ...]:
    """What of a model decides besides its backbone's modules: which backbone, and its patches' side."""
    return (part.backbone, part.patch_size) if isinstance(part, reference.InsVPReference) else (part,)


def _passing_reason(part: nn.Module) -> str | None:
    """What is asked each time: what outside of the model changes what calling a module does, and the model's own."""
    if torch_private.global_hooks():
        return "there is a hook for all modules"
    for (owner, name), own in _FUNCTIONS.items():
        if getattr(owner, name) is not own:
            return f"{owner.__name__}.{name} has been replaced"
    if torch_private.function_modes():
        return "a torch function mode is under way"
    if torch_private.transforming():
        return "a transform of torch.func or forward-mode differentiation is under way"
    return _own_reason(part) if isinstance(part, reference.InsVPReference) else None


def _own_reason(model: reference.InsVPReference) -> str | None:
    for name in ("forward_features", "forward_head", "run_block"):
        if name in vars(model) or not getattr(type(model), name).__module__.startswith("insvp_fast."):
            return f"the model has a {name} of its own"
    L, common = model.config.prompt_length, model.common_prompts
    if common is not None and common.shape[1] != L:
        return f"common_prompts has {common.shape[1]} prompts: expected prompt_length={L}"
    # prompts that run on into blocks without their own ask queries too
    later = range(model.prompted_blocks[0], len(model.backbone.blocks)) if model.prompted_blocks else ()
    carried = model.config.carry_prompts and not set(later) <= set(model.prompted_blocks)
    return "carry_prompts with blocks that have no prompts of their own" if carried else None


def _examine(part: nn.Module) -> tuple[str | None, list[nn.Module]]:
    """The reason, and the modules that were looked at."""
    name, root, table = _table(part)
    frozen, seen = name == "backbone", {}
    for path, module in _modules(root, table):
        seen[path] = module
        if reason := _difference(module, table.get(path), frozen) or _compiled(path, module):
            return f"{name}{'.' * bool(path)}{path} {reason}", [*seen.values()]
    if missing := next((path for path, rules in table.items() if rules != CALLED and path not in seen), None):
        return f"{name}.{missing} is missing", [*seen.values()]
    dtypes = {p.dtype for module in seen.values() for p in module._parameters.values() if p is not None}
    if frozen and len(dtypes) > 1:
        return f"{name} has parameters in {' and '.join(sorted(map(str, dtypes)))}: expected one dtype", [
            *seen.values()
        ]
    return None, [*seen.values()]


def _table(part: nn.Module) -> tuple[str, nn.Module, Table]:
    """The name of what is examined, it, and what it has to be."""
    if isinstance(part, reference.InsVPReference):
        return "backbone", part.backbone, _vision_transformer(part.backbone, part.patch_size)
    if isinstance(part, reference.GlobalPrompter):
        return "global_prompter", part, _global_prompter(part)
    if isinstance(part, reference.SpecificPrompter):
        return "specific_prompter", part, _specific_prompter(part)
    return "patch_prompter", part, _patch_prompter(part)


def _modules(root: nn.Module, table: Table) -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()``, but shared modules under each of their names, and none that is called."""
    pending = [("", root)]
    while pending:
        path, module = pending.pop()
        if table.get(path) != CALLED:
            yield path, module
            children = ((f"{path}.{key}".removeprefix("."), m) for key, m in module._modules.items() if m is not None)
            pending += reversed(list(children))


def _difference(module: nn.Module, rules: tuple[Rule, ...] | None, frozen: bool) -> str | None:
    """What is not as one of the rules says, to be read behind the name of the module."""
    if rules is None:
        return f"({_name(type(module))}) is not known to the fast plan"
    fitting = next((one for one in rules if one.type is type(module)), None)
    if fitting is None:
        return f"is a {_name(type(module))}: expected {' or '.join(_name(one.type) for one in rules)}"
    state = vars(module)
    if any(state.get(hooks) for hooks in HOOKS):
        return "has a hook"
    if own := next((name for name in state if callable(getattr(fitting.type, name, None))), None):
        return f"has a {own} of its own"
    if hidden := state.keys() & (module._modules.keys() | module._parameters.keys()):
        return f"has an attribute that hides its {min(hidden)}"
    if fitting.rate is not None and module.training and getattr(module, fitting.rate, 0) != 0:
        return f"is in training mode with {fitting.rate}={getattr(module, fitting.rate)}"
    return _other_attributes(state, fitting) or _other_tensors(module, fitting, frozen)


def _compiled(path: str, module: nn.Module) -> str | None:
    """A module in a part that is compiled by itself may be compiled to anything."""
    return "is compiled by itself" if path and module._compiled_call_impl is not None else None


def _name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"


def _other_attributes(state: dict[str, Any], rule: Rule) -> str | None:
    for name, value in state.items():
        known = name in rule.attributes or name.startswith("_") or name == "training"
        if not known or isinstance(value, Tensor):
            return f"has an attribute {name!r} that the fast plan does not know"
    for name, expected in rule.attributes.items():
        if expected is not ANY and (name not in state or state[name] != expected):
            return f"has {name}={state.get(name)!r}: expected {expected!r}"
    return None


def _other_tensors(module: nn.Module, rule: Rule, frozen: bool) -> str | None:
    for name, required in rule.parameters.items():
        if required and module._parameters.get(name) is None:
            return f"has no parameter {name}"
    for name in module._buffers:
        return f"has a buffer {name}"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        plain = type(parameter) in (nn.Parameter, Tensor) and parameter.layout == torch.strided
        if name not in rule.parameters or not plain:
            return f"has a {type(parameter).__name__} {name!r} that the fast plan does not know"
        if frozen and parameter.requires_grad:
            return f"has a {name} that is trained"
    return None


_CLASSES = (
    *(VisionTransformer, PatchEmbed, Block, Attention, Mlp, LayerNorm, LayerScale, DropPath, PatchDropout),
    *(nn.LayerNorm, nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.Identity),
    *(reference.GlobalPrompter, reference.PatchPrompter, reference.SpecificPrompter),
)


def _as_released(owner: Any, name: str) -> Any:
    """A function as it is; None if somebody has already put one from elsewhere in its place."""
    own = getattr(owner, name)
    return own if own.__module__.partition(".")[0] in ("torch", "timm", "insvp_fast") else None


# what the modules of the tables come down to, as it was when this was imported
_FUNCTIONS = {
    (owner, name): _as_released(owner, name)
    for owner, names in (
        *((cls, "forward __call__") for cls in _CLASSES),
        (VisionTransformer, "_pos_embed pool forward_head"),
        (nn.Conv2d, "_conv_forward"),
        (F, "scaled_dot_product_attention linear conv2d layer_norm gelu leaky_relu max_pool2d adaptive_max_pool2d pad"),
    )
    for name in names.split()
}
