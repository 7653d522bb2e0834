"""Layers of timm that several families have: what the fast path requires of them, and how they run as operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, GluMlp, LayerNorm, LayerScale, Mlp, RmsNorm, SwiGLU, activations
from timm.layers import norm as timm_norms
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.coverage import Rule, Table, rule, watch
from insvp_fast.coverage.rules import DROPOUT_OFF, IDENTITY, LINEAR
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts

__all__ = [
    "DROP_PATH_OFF",
    "LAYER_SCALE",
    "Affine",
    "activation_name",
    "activation_requirements",
    "forward_mlp",
    "has_gated_mlp",
    "in_own_dtype",
    "is_operation",
    "mlp_requirements",
    "norm_insert",
    "norm_requirements",
]

# What is supported

DROP_PATH_OFF = (IDENTITY, rule(DropPath, "drop_prob scale_by_keep", dropout_rate="drop_prob"))
LAYER_SCALE = (IDENTITY, rule(LayerScale, "init_values", required="gamma", inplace=False))

ACTIVATIONS: dict[type[nn.Module], str] = {  # to the names of ``ops.mlp``; PyTorch's GELU has an attribute for its form
    nn.SiLU: "silu",
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
}

watch("forward __call__", LayerNorm, LayerScale, DropPath, RmsNorm, nn.LayerNorm)
watch("forward __call__", Mlp, GluMlp, SwiGLU, GeGluMlp, nn.GELU, *ACTIVATIONS)
watch("layer_norm gelu silu softmax", F)
watch("layer_norm", torch)
watch("softmax", torch.Tensor)  # of attention that is not fused
watch("rms_norm", F, timm_norms)
watch("quick_gelu", activations)


def norm_requirements(width: int) -> tuple[Rule, ...]:
    """LayerNorm of PyTorch or timm, or timm's RmsNorm, of this width."""
    plain = rule(nn.LayerNorm, "eps elementwise_affine", required="weight", optional="bias", normalized_shape=(width,))
    of_timm = plain._replace(type=LayerNorm, attributes={**plain.attributes, "_fast_norm": False})
    return plain, of_timm, of_timm._replace(type=RmsNorm, parameters={"weight": True})


def activation_requirements(activation: nn.Module | None) -> tuple[Rule, ...]:
    """An activation that has a name in ``ops.mlp``."""
    approximate = "tanh" if getattr(activation, "approximate", "none") == "tanh" else "none"
    others = (rule(cls, "inplace" if cls is nn.SiLU else "") for cls in ACTIVATIONS)
    return rule(nn.GELU, approximate=approximate), *others


def activation_name(activation: nn.Module) -> str:
    """What ``ops.mlp`` calls an activation that ``activation_requirements`` allows."""
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS[type(activation)]


def mlp_requirements(mlp: nn.Module | None) -> Table:
    """One of timm's MLPs, perhaps gated, perhaps with a norm of the hidden layer; by paths that begin with a point."""
    if isinstance(mlp, GeGluMlp):
        return _geglu_requirements(mlp)
    layers = {".fc1_g": LINEAR, ".fc1_x": LINEAR} if isinstance(mlp, SwiGLU) else {".fc1": LINEAR}
    fc2 = getattr(mlp, "fc2", None)
    hidden_norms = norm_requirements(getattr(fc2, "in_features", 0))[:2]  # of ``gated_mlp``, which has no RMSNorm
    return {
        "": (rule(Mlp), rule(GluMlp, "gate_last", chunk_dim=-1), rule(SwiGLU)),
        **layers,
        ".act": activation_requirements(getattr(mlp, "act", None)),
        ".drop1": DROPOUT_OFF,
        ".norm": (IDENTITY, *hidden_norms),
        ".fc2": LINEAR,
        ".drop2": DROPOUT_OFF,
    }


def _geglu_requirements(mlp: GeGluMlp) -> Table:
    """The MLP of ViTamin, which has a norm of its own before it."""
    return {
        "": (rule(GeGluMlp),),
        ".norm": norm_requirements(getattr(getattr(mlp, "w0", None), "in_features", 0)),
        **dict.fromkeys((".w0", ".w1", ".w2"), LINEAR),
        ".act": activation_requirements(getattr(mlp, "act", None)),
        ".drop1": DROPOUT_OFF,
        ".drop2": DROPOUT_OFF,
    }


# How they run


class Affine(NamedTuple):
    """The affine map of a norm, where it is folded into the product behind; else nothing."""

    gain: Tensor | None = None
    shift: Tensor | None = None


def norm_insert(
    norm: nn.LayerNorm | RmsNorm,
    residual: Tensor,
    branch: Tensor | None,
    prompts: Prompts | None,
    options: BlockOptions,
) -> tuple[Tensor, Tensor, Affine]:
    """The new residual [B, T, D], the normalized tokens and prompts [B, T+L, D], and the affine map left to apply."""
    folded, own = Affine(), _affine(norm)
    if options.fold_norm:
        folded, own = own, folded
    center, inserted = not isinstance(norm, RmsNorm), None if prompts is None else prompts.tokens
    return *ops.norm_insert(residual, branch, inserted, *own, norm.eps, center=center, dtype=options.dtype), folded


def _affine(norm: Any) -> Affine:
    return Affine(norm.weight, getattr(norm, "bias", None))


def in_own_dtype(norm: Any, x: Tensor) -> Tensor:
    """A norm between two products, computed and returned in the dtype of its weight."""
    if isinstance(norm, nn.Identity):
        return x
    normed: Tensor = norm(x.to(norm.weight.dtype))
    return normed


def forward_mlp(
    mlp: Mlp | GluMlp | SwiGLU | GeGluMlp, x: Tensor, affine: Affine, keep: str, scale: Tensor | None = None
) -> Tensor:
    """``scale`` times the MLP of what ``norm_insert`` returned, [..., D] -> [..., D]."""
    if isinstance(mlp, GeGluMlp):
        y = in_own_dtype(mlp.norm, _apply_affine(x, affine)).to(x.dtype)
        layers = FrozenLinear.of(mlp.w0), FrozenLinear.of(mlp.w1), FrozenLinear.of(mlp.w2, scale=scale)
        return ops.gated_mlp(y, *layers, activation=activation_name(mlp.act), keep=keep)
    activation, hidden_norm, fc2 = activation_name(mlp.act), mlp.norm, FrozenLinear.of(mlp.fc2, scale=scale)
    if isinstance(mlp, Mlp):
        gate, value = FrozenLinear.of(mlp.fc1, *affine), None
    else:
        gate, value = _gate_and_value(mlp, affine)
    if isinstance(hidden_norm, nn.Identity):
        if value is None:
            return ops.mlp(x, gate, fc2, activation=activation, keep=keep)
        return ops.gated_mlp(x, gate, value, fc2, activation=activation, keep=keep)
    fc2 = FrozenLinear.of(mlp.fc2, *_affine(hidden_norm), scale)
    return ops.gated_mlp(x, gate, value, fc2, activation=activation, eps=hidden_norm.eps, keep=keep)


def is_operation(mlp: nn.Module) -> bool:
    """Whether an MLP is one operation: GeGluMlp has a norm before it as well."""
    return isinstance(mlp, Mlp | GluMlp | SwiGLU)


def has_gated_mlp(backbone: nn.Module) -> bool:
    """Whether a module has an MLP that runs as ``ops.gated_mlp``: with a gate, or with a norm of the hidden layer."""
    return any(
        isinstance(mlp, GluMlp | SwiGLU | GeGluMlp) or (isinstance(mlp, Mlp) and not isinstance(mlp.norm, nn.Identity))
        for mlp in backbone.modules()
    )


def _apply_affine(x: Tensor, affine: Affine) -> Tensor:
    x = x if affine.gain is None else x * affine.gain
    return x if affine.shift is None else x + affine.shift


def _gate_and_value(mlp: GluMlp | SwiGLU, affine: Affine) -> tuple[FrozenLinear, FrozenLinear]:
    """What the activation is applied to, and what that is multiplied by."""
    if isinstance(mlp, SwiGLU):
        return FrozenLinear.of(mlp.fc1_g, *affine), FrozenLinear.of(mlp.fc1_x, *affine)
    whole, M = FrozenLinear.of(mlp.fc1, *affine), len(mlp.fc1.weight) // 2
    first, second = whole._replace(last=M), whole._replace(first=M)
    return (second, first) if mlp.gate_last else (first, second)
