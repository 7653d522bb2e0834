"""The names that Hugging Face's transformers gives the tensors of its vision models, and their shapes in timm."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from insvp_fast.checkpoints.state_dict import Rules
from insvp_fast.errors import CheckpointError

__all__ = ["DINOV3_RULES", "RULES", "SIGLIP_RULES", "pack"]

# ViT, ViT-MAE, DeiT, DINOv2 and the vision towers of CLIP and SigLIP; the prefix is that of a model with a head
RULES: Rules = (
    (r"^(vit|deit|dinov2|dinov2_with_registers|dinov3_vit|vision_model|model)\.", ""),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^(blocks\.\d+)\.(attention\.attention|self_attn|attention)\.(q|k|v)(uery|ey|alue|_proj)\.", r"\1.attn.\3."),
    (r"^(blocks\.\d+)\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.(layernorm_before|layer_norm1)\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.(layernorm_after|layer_norm2)\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layer_scale(\d)\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.mlp\.weights_in\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.weights_out\.", r"\1.mlp.fc2."),
    (r"^pre_layrnorm\.", "norm_pre."),  # the name is misspelled there
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)

SIGLIP_RULES: Rules = (
    *RULES,
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)

DINOV3_RULES: Rules = (*RULES, (r"^register_tokens$", "storage_tokens"))  # to Meta's name


def pack(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Renamed tensors in timm's shapes: query, key and value are one tensor, tokens have a batch dimension.

    Raises:
        CheckpointError: if the query, key or value of a block is missing.
    """
    gated = any(".mlp.gate_proj." in key for key in tensors)
    mlp = {"gate_proj": "w1", "up_proj": "w2" if gated else "fc1", "down_proj": "w3" if gated else "fc2"}
    packed: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if split := re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", key):
            parts.setdefault((split[1], split[3]), {})[split[2]] = value
        elif split := re.fullmatch(r"attn_pool\.qkv\.(weight|bias)", key):
            width = len(value) // 3
            packed[f"attn_pool.q.{split[1]}"], packed[f"attn_pool.kv.{split[1]}"] = value[:width], value[width:]
        elif split := re.fullmatch(r"(blocks\.\d+\.mlp\.)(gate|up|down)_proj(\..*)", key):
            packed[split[1] + mlp[f"{split[2]}_proj"] + split[3]] = value
        elif key in ("cls_token", "pos_embed"):
            packed[key] = value.reshape(1, -1, value.shape[-1])
        else:
            packed[key] = value
    for (block, kind), found in parts.items():
        if kind == "bias" and found.keys() == {"q", "v"}:  # DINOv3's keys have none
            found["k"] = torch.zeros_like(found["q"])
        if len(found) < 3:
            raise CheckpointError(f"{where}: {block}* has the {kind} of {sorted(found)} only: expected q, k and v")
        packed[f"{block}qkv.{kind}"] = torch.cat([found[name] for name in "qkv"])
    return packed
