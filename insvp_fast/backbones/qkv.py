"""The products that make queries, keys and values, as timm's attention modules have them.

They have one packed layer, ``qkv``, with or without a bias; or one whose bias is in three parts, ``q_bias``, ``k_bias``
and ``v_bias``; or three layers, ``q_proj``, ``k_proj`` and ``v_proj``, of which the last two may have fewer heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.layers import Affine, in_own_dtype, norm_requirements
from insvp_fast.coverage import Table, rule
from insvp_fast.coverage.rules import IDENTITY, LINEAR
from insvp_fast.ops import FrozenLinear
from insvp_fast.runtime import torch_private
from insvp_fast.runtime.prepack import packed

__all__ = ["BIASES", "bias_tensors", "is_one_product", "norm_heads", "project_q_kv", "project_qkv", "qkv_requirements"]

BIASES = ("q_bias", "k_bias", "v_bias")


def qkv_requirements(attn: nn.Module | None, head_width: int) -> Table:
    """What the fast path requires of the layers and of the norms of queries and keys, by paths that begin with a point.

    The biases in parts are tensors of the module itself: ``bias_tensors`` has their names.
    """
    head_norm = (IDENTITY, *norm_requirements(head_width))
    if getattr(attn, "qkv", None) is None:
        layers: Table = dict.fromkeys((".q_proj", ".k_proj", ".v_proj"), LINEAR)
    elif getattr(attn, "q_bias", None) is None:
        layers = {".qkv": LINEAR}
    else:  # timm would not read a bias that the layer itself has
        layers = {".qkv": (rule(nn.Linear, "in_features out_features", required="weight"),)}
    return {**layers, ".q_norm": head_norm, ".k_norm": head_norm}


def bias_tensors(attn: nn.Module | None) -> dict[str, str]:
    """The arguments of ``rule`` for an attention module's biases in parts, a buffer among them; nothing without any."""
    if getattr(attn, "q_bias", None) is None:
        return {}
    return {"required": "q_bias v_bias", "buffers": "k_bias" if getattr(attn, "k_bias", None) is not None else ""}


def project_qkv(attn: Any, y: Tensor, affine: Affine) -> Tensor:  # [B, S, D] -> [B, S, 3·D]
    """Queries, keys and values of what ``norm_insert`` returned, packed."""
    layers = _layers(attn, affine)
    if len(layers) == 1:
        return ops.linear(y, layers[0])
    q, k, v = (ops.linear(y, layer) for layer in layers)
    return torch.cat([q, _for_all_heads(attn, k), _for_all_heads(attn, v)], dim=-1)


def project_q_kv(attn: Any, y: Tensor, affine: Affine, num_queries: int) -> tuple[Tensor, Tensor]:
    """As ``project_qkv``, but queries of the first tokens alone: [B, num_queries, D] and, packed, [B, S, 2·D]."""
    layers = _layers(attn, affine)
    if len(layers) == 1:
        return ops.project_q_kv(y, num_queries, layers[0])
    q, *kv = (ops.linear(x, layer) for x, layer in zip((y[:, :num_queries], y, y), layers, strict=True))
    return q, torch.cat([_for_all_heads(attn, part) for part in kv], dim=-1)


def is_one_product(attn: Any) -> bool:
    """Whether queries, keys and values are one layer, or three of which one is made and kept."""
    return attn.qkv is not None or _become_one(attn.q_proj, attn.k_proj, attn.v_proj)


def _layers(attn: Any, affine: Affine) -> list[FrozenLinear]:
    """The packed layer, or the three layers of queries, keys and values.

    Three layers, or the parts of a bias, become one where that is kept: else it would be packed anew in each pass.
    """
    if attn.qkv is None:
        layers = attn.q_proj, attn.k_proj, attn.v_proj
        if not _become_one(*layers):
            return [FrozenLinear.of(layer, *affine) for layer in layers]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return [FrozenLinear(packed(weights, "weight", lambda: torch.cat(weights)), _whole_bias(biases), *affine)]
    if getattr(attn, "q_bias", None) is None:
        return [FrozenLinear.of(attn.qkv, *affine)]
    biases = [attn.q_bias, attn.k_bias, attn.v_bias]
    if not _is_kept(*biases):
        return [FrozenLinear(*layer, *affine) for layer in zip(attn.qkv.weight.chunk(3), biases, strict=True)]
    return [FrozenLinear(attn.qkv.weight, _whole_bias(biases), *affine)]


def _become_one(*layers: nn.Linear) -> bool:
    sizes = {layer.weight.shape for layer in layers}
    return len(sizes) == 1 and _is_kept(*(x for layer in layers for x in (layer.weight, layer.bias)))


def _whole_bias(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All parts of a bias, with zeros for one that is None; None if all are."""
    if (some := next((part for part in parts if part is not None), None)) is None:
        return None
    return packed(parts, "bias", lambda: torch.cat([torch.zeros_like(some) if x is None else x for x in parts]))


def _is_kept(*parts: Tensor | None) -> bool:
    """Whether what is made of these is kept; on a GPU it was not tried."""
    if torch.compiler.is_compiling() or torch_private.dispatches(parts):
        return False
    return all(x is None or (x.is_cpu and not x.is_inference()) for x in parts)


def _for_all_heads(attn: Any, x: Tensor) -> Tensor:
    """Keys or values of groups of heads, [B, S, D/g], for each of the heads in a group, [B, S, D]."""
    group = getattr(attn, "num_kv_groups", 1)
    if group == 1:
        return x
    heads: Tensor = x.unflatten(-1, (attn.num_heads // group, -1))
    return heads.repeat_interleave(group, dim=2).flatten(2)


def norm_heads(attn: Any, packed: Tensor, parts: int) -> Tensor:  # [B, S, parts·D]
    """Queries and keys (3 ``parts``) or keys (2) normalized by the module's norms; the values stay."""
    norms = (attn.q_norm, attn.k_norm)[3 - parts :]
    if all(isinstance(norm, nn.Identity) for norm in norms):
        return packed
    *normed, values = torch.unflatten(packed, -1, (parts, attn.num_heads, -1)).unbind(2)
    normed = [in_own_dtype(norm, x).to(packed.dtype) for norm, x in zip(norms, normed, strict=True)]
    return torch.stack([*normed, values], dim=2).flatten(2)
