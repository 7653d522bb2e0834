"""What the fast plan assumes of a model, in tables, and whether a model is so.

The fast plan computes what timm's modules and the prompters say without calling them. That is right only for what it
stands in for, so a module that is not in the tables, or is there with another type or value, sends the model down the
general path, which calls every module. Listed are also the modules that the plan leaves out because they do nothing,
such as a dropout in evaluation mode.

``torch.compile`` asks while it traces, and traces anew where a module has been replaced, hooked or set to training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_ as is_same
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, Format, LayerNorm, LayerScale, Mlp, PatchDropout, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import reference, torch_private

__all__ = ["covers", "unsupported_reason"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ANY = object()


class Is(NamedTuple):
    """A module of exactly this type, with these attributes and parameters, no others, and no hooks."""

    type: type[nn.Module]
    attributes: Mapping[str, Any]
    parameters: Mapping[str, bool]  # whether each has to be there
    rate: str | None  # of a dropout: the attribute that has to be 0, unless the module is in evaluation mode


def is_(
    type: type[nn.Module],
    read: str = "",
    *,
    needs: str = "",
    may_have: str = "",
    rate: str | None = None,
    **expected: Any,
) -> Is:
    """An ``Is``; ``read`` names the attributes that may have any value: the plan reads them, or they decide nothing."""
    parameters = dict.fromkeys(needs.split(), True) | dict.fromkeys(may_have.split(), False)
    return Is(type, dict.fromkeys(read.split(), ANY) | expected, parameters, rate)


IDENTITY = is_(nn.Identity)
OFF = (IDENTITY, is_(nn.Dropout, "p inplace", rate="p"))  # dropouts that do nothing
PATH_OFF = (IDENTITY, is_(DropPath, "drop_prob scale_by_keep", rate="drop_prob"))
PATCHES_OFF = (IDENTITY, is_(PatchDropout, "prob num_prefix_tokens ordered", rate="prob"))
SCALE = (IDENTITY, is_(LayerScale, "init_values", needs="gamma", inplace=False))
LINEAR = (is_(nn.Linear, "in_features out_features", needs="weight", may_have="bias"),)
CALLED = ()  # a module that the plan calls as the reference does, whatever it is

Table = dict[str, tuple[Is, ...]]


def _norm(width: int) -> tuple[Is, ...]:
    plain = is_(nn.LayerNorm, "eps elementwise_affine", needs="weight", may_have="bias", normalized_shape=(width,))
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
        "": (is_(VisionTransformer, " ".join(vars(vit)), may_have="cls_token reg_token pos_embed"),),
        "patch_embed": (is_(PatchEmbed, "img_size grid_size num_patches strict_img_size", **embedding),),
        "patch_embed.proj": (projection._replace(parameters={"weight": True, "bias": False}),),
        "patch_embed.norm": (IDENTITY,),
        "pos_drop": OFF,
        "patch_drop": PATCHES_OFF,
        "norm_pre": CALLED,
        "blocks": (is_(nn.Sequential), is_(nn.ModuleList)),
        "norm": (IDENTITY, *_norm(width)),
        "fc_norm": CALLED,
        "attn_pool": CALLED,
        "head_drop": CALLED,
        "head": CALLED,
    }
    for j, block in enumerate(vit.blocks):
        table |= {f"blocks.{j}{path}": rule for path, rule in _block(block, width).items()}
    return table


def _block(block: nn.Module, width: int) -> Table:
    attn = getattr(block, "attn", None)
    heads, head_width = getattr(attn, "num_heads", 1), getattr(attn, "head_dim", 1)
    attention = {"attn_dim": width, "head_dim": width // max(heads, 1), "scale": head_width**-0.5, "gate": None}
    if getattr(getattr(attn, "attn_drop", None), "p", 0):
        attention["training"] = False  # the fused attention asks it instead of attn_drop
    inner = (IDENTITY, *_norm(head_width))
    return {
        "": (is_(Block),),
        ".norm1": _norm(width),
        ".attn": (is_(Attention, "num_heads fused_attn", **attention),),
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
        ".mlp": (is_(Mlp),),
        ".mlp.fc1": LINEAR,
        ".mlp.act": (is_(nn.GELU, approximate="none"),),
        ".mlp.drop1": OFF,
        ".mlp.norm": (IDENTITY,),
        ".mlp.fc2": LINEAR,
        ".mlp.drop2": OFF,
        ".ls2": SCALE,
        ".drop_path2": PATH_OFF,
    }


def _convolution(stride: tuple[int, int], padding: object, dilation: tuple[int, int]) -> Is:
    convolution = is_(nn.Conv2d, "in_channels out_channels kernel_size output_padding", needs="weight bias")
    decided = {"stride": stride, "padding": padding, "dilation": dilation}
    fixed = {"groups": 1, "padding_mode": "zeros", "transposed": False}
    return convolution._replace(attributes={**convolution.attributes, **decided, **fixed})


def _same_convolution(conv: nn.Module, dilation: int | None = None) -> tuple[Is, ...]:
    if dilation is None:  # the plan reads it, and has one for both axes
        dilation = next(iter(getattr(conv, "dilation", (1,))), 1)
    return (_convolution((1, 1), "same", (dilation, dilation)),)


def _global_prompter(prompter: nn.Module) -> Table:
    convolutions = {name: _same_convolution(getattr(prompter, name)) for name in ("conv1", "conv2")}
    return {"": (is_(type(prompter)),), **convolutions, "dropout": CALLED}


def _specific_prompter(prompter: nn.Module) -> Table:
    convolutions = {name: _same_convolution(getattr(prompter, name), 1) for name in ("conv1", "conv2", "conv3")}
    return {"": (is_(type(prompter), "token_channels grid"),), **convolutions, "dropout": CALLED}


def _patch_prompter(prompter: nn.Module) -> Table:
    linear = (is_(nn.Linear, "in_features out_features", needs="weight bias"),)
    return {"": (is_(reference.PatchPrompter, "patch_size"),), "fc1": linear, "fc2": linear, "dropout": OFF}


def unsupported_reason(part: nn.Module) -> str | None:
    """Why the fast plan does not cover a model, or one of its prompters, in words; None if it does.

    Args:
        part: an ``InsVPViT``, of which the backbone is asked, or a ``GlobalPrompter``, ``PatchPrompter`` or
            ``SpecificPrompter``: each takes its own fast or general path.
    """
    return _surroundings() or _carries_prompts(part) or _examine(part)[0]


def covers(part: nn.Module) -> bool:
    """Whether the fast plan covers ``part`` as it is now; a warning tells, once, why it does not."""
    if torch.compiler.is_compiling():
        _read_hooks(part)
    return _judge(part)


def _read_hooks(module: nn.Module) -> int:
    """Read what is traced nowhere else: PyTorch then traces anew where a module is replaced, hooked or trained."""
    read = len(module._forward_hooks) + len(module._forward_pre_hooks) + module.training
    for child in module.children():
        read += _read_hooks(child)
    return read


@torch.compiler.assume_constant_result
def _judge(part: nn.Module) -> bool:
    memo = vars(part).setdefault("_memo", Memo())
    reason = _surroundings() or _carries_prompts(part)
    if reason is None and memo.holds(part):
        reason = memo.reason
    elif reason is None:
        reason, modules = _examine(part)
        memo.keep(part, reason, modules)
    if reason is not None and reason != memo.told:
        warnings.warn(f"{type(part).__name__} takes the general path, exact but not fast: {reason}", stacklevel=3)
    memo.told = reason
    return reason is None


def _surroundings() -> str | None:
    """What outside of the model changes what calling a module does."""
    if torch_private.global_hooks():
        return "there is a hook for all modules"
    if [type.forward for type in _TYPES] != _FORWARDS or VisionTransformer._pos_embed is not _POS_EMBED:
        return "a class of timm or PyTorch has had a method replaced"
    if torch_private.transforming():
        return "a transform of torch.func or forward-mode differentiation is under way"
    return None


def _carries_prompts(part: nn.Module) -> str | None:
    """Prompts that run on into blocks without their own ask queries too, which only the general path has."""
    if not isinstance(part, reference.InsVPReference) or not part.config.carry_prompts or not part.prompted_blocks:
        return None
    blocks = range(part.prompted_blocks[0], len(part.backbone.blocks))
    return (
        None
        if set(blocks) <= set(part.prompted_blocks)
        else "carry_prompts with blocks that have no prompts of their own"
    )


def _examine(part: nn.Module) -> tuple[str | None, list[nn.Module]]:
    """The reason, and the modules that were looked at."""
    name, root, table = _table(part)
    seen = []
    for path, module in _modules(root, table):
        seen.append(module)
        if reason := _difference(module, table.get(path), frozen=root is not part):
            return f"{name}{'.' * bool(path)}{path} {reason}", seen
    dtypes = {p.dtype for module in seen for p in module._parameters.values() if p is not None}
    if root is not part and len(dtypes) > 1:
        return f"{name} has parameters in {' and '.join(sorted(map(str, dtypes)))}: expected one dtype", seen
    return None, seen


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


def _difference(module: nn.Module, rules: tuple[Is, ...] | None, frozen: bool) -> str | None:
    """What is not as the rule says, to be read behind the name of the module."""
    if rules is None:
        return f"({type(module).__name__}) is not known to the fast plan"
    rule = next((rule for rule in rules if rule.type is type(module)), None)
    if rule is None:
        return f"is a {type(module).__name__}: expected {' or '.join(rule.type.__name__ for rule in rules)}"
    state = vars(module)
    if any(state.get(hooks) for hooks in HOOKS):
        return "has a hook"
    if own := next((name for name in state if callable(getattr(rule.type, name, None))), None):
        return f"has a {own} of its own"
    if rule.rate is not None and module.training and getattr(module, rule.rate, 0) != 0:
        return f"is in training mode with {rule.rate}={getattr(module, rule.rate)}"
    return _other_attributes(state, rule) or _other_parameters(module, rule, frozen)


def _other_attributes(state: dict[str, Any], rule: Is) -> str | None:
    for name, expected in rule.attributes.items():
        if expected is not ANY and (name not in state or state[name] != expected):
            return f"has {name}={state.get(name)!r}: expected {expected!r}"
    for name, value in state.items():
        unknown = name not in rule.attributes and not name.startswith("_") and name != "training"
        if unknown or isinstance(value, Tensor):
            return f"has an attribute {name!r} that the fast plan does not know"
    return None


def _other_parameters(module: nn.Module, rule: Is, frozen: bool) -> str | None:
    for name, required in rule.parameters.items():
        if required and module._parameters.get(name) is None:
            return f"has no {name}"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name not in rule.parameters or type(parameter) not in (nn.Parameter, Tensor):
            return f"has a {type(parameter).__name__} {name!r} that the fast plan does not know"
        if frozen and parameter.requires_grad:
            return f"has a {name} that is trained"
    return None


_TYPES = (
    *(VisionTransformer, PatchEmbed, Block, Attention, Mlp, LayerNorm, LayerScale, DropPath, PatchDropout),
    *(nn.LayerNorm, nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.Identity, reference.PatchPrompter),
)
_FORWARDS, _POS_EMBED = [type.forward for type in _TYPES], VisionTransformer._pos_embed


def _flags_of(parameter: Tensor | None) -> object:
    return parameter is None or (parameter.requires_grad, parameter.dtype)


class Memo:
    """What was found of a part, and what that rests on: all that is in the modules that were looked at.

    To look takes milliseconds, to see that nothing has changed since a tenth of one. A copy of the part starts anew.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.told: str | None = None  # in a warning
        self._key: tuple[object, ...] | None = None

    def __reduce__(self) -> Any:
        return Memo, ()

    def keep(self, part: nn.Module, reason: str | None, modules: list[nn.Module]) -> None:
        """Remember ``reason`` for as long as ``holds``."""
        self.reason, self._key, self._modules = reason, _key(part), modules
        self._types = [*map(type, modules)]
        self._state = [state for m in modules for state in (vars(m), m._modules)]
        self._copies = [*map(dict, self._state)]
        self._hooks = [vars(m).get(name) for m in modules for name in HOOKS]
        self._named = [m._parameters for m in modules]
        self._parameters = _values(self._named)
        self._flags = [*map(_flags_of, self._parameters)]

    def holds(self, part: nn.Module) -> bool:
        """Whether everything is as it was; never where there are hooks."""
        if self._key is None or self._key != _key(part) or any(self._hooks):
            return False
        try:
            same = [*map(type, self._modules)] == self._types and self._state == self._copies
        except (RuntimeError, ValueError):  # tensors and arrays, which have no plain equality
            return False
        parameters = _values(self._named)
        same = same and len(parameters) == len(self._parameters) and all(map(is_same, parameters, self._parameters))
        return same and [*map(_flags_of, parameters)] == self._flags


def _values(dictionaries: list[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, dictionaries))]


def _key(part: nn.Module) -> tuple[object, ...]:
    """What of a model decides besides its backbone's modules: which backbone, and its patches' side."""
    return (part.backbone, part.patch_size) if isinstance(part, reference.InsVPReference) else (part,)
