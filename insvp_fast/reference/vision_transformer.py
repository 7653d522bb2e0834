"""timm's ``VisionTransformer`` with prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from insvp_fast.reference.structure import Prompts, Stream, require_plain, square_side

__all__ = [
    "SUPPORTS",
    "apply_block",
    "block_reason",
    "embed",
    "final_norm",
    "insert",
    "insert_in_mask",
    "patch_size",
    "require_block",
    "split",
    "widths",
]

SUPPORTS = frozenset({"reads_tokens", "gives_keys_values", "carry_prompts", "attn_mask"})


def patch_size(backbone: VisionTransformer) -> int:
    """P, the side of the backbone's patches; of a hybrid, of what each token comes from in the grid of the image."""
    return square_side(*backbone.patch_embed.feat_ratio(as_scalar=False))


def widths(backbone: VisionTransformer) -> list[int]:
    """D of each block."""
    return [backbone.embed_dim] * len(backbone.blocks)


def embed(backbone: VisionTransformer, image: Tensor) -> Tensor:  # [B, C, H, W] -> [B, T, D]
    """Patch and position embedding, and prefix tokens (eq. 1)."""
    tokens = backbone._pos_embed(backbone.patch_embed(image))
    embedded: Tensor = backbone.norm_pre(backbone.patch_drop(tokens))
    return embedded


def insert(tokens: Tensor, prompts: Prompts, prefix: int) -> Tensor:
    """Prompts [B, L, D] between the first ``prefix`` tokens and the others, [B, T+L, D]."""
    return torch.cat([tokens[:, :prefix], prompts.tokens.to(tokens.dtype), tokens[:, prefix:]], dim=1)


def split(z: Tensor, length: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``insert``: tokens [B, T, D] and the ``length`` prompts, [B, L, D]."""
    return torch.cat([z[:, :prefix], z[:, prefix + length :]], dim=1), z[:, prefix : prefix + length]


def insert_in_mask(mask: Tensor | None, prompts: Prompts, prefix: int) -> Tensor | None:
    """A mask [..., T, T] with rows and columns for prompts, [..., T+L, T+L]: nothing of them is masked."""
    if mask is None:
        return None
    for dim in (-2, -1):
        before, after = mask.tensor_split([prefix], dim)
        unmasked = torch.zeros_like if mask.is_floating_point() else torch.ones_like
        own = unmasked(mask.narrow(dim, 0, 1)).repeat_interleave(prompts.tokens.shape[1], dim)
        mask = torch.cat([before, own, after], dim)
    return mask


def apply_block(
    backbone: VisionTransformer, block: int, h: Tensor | Stream, prompts: Prompts | None
) -> tuple[Tensor | Stream, Tensor | None]:
    """A block of tokens [B, T, D] and prompts, which stand between prefix tokens and patches (eq. 2 and 11)."""
    run, prefix, outputs = backbone.blocks[block], backbone.num_prefix_tokens, None
    z, mask = (h.tokens, h.attn_mask) if isinstance(h, Stream) else (h, None)
    if prompts is not None:
        z, mask = insert(z, prompts, prefix), insert_in_mask(mask, prompts, prefix)
    if prompts is not None and prompts.keys_values is not None:
        z = _run_with_keys_values(run, z, prompts.keys_values, mask)
    else:
        z = run(z) if mask is None else run(z, attn_mask=mask)  # (2)
    if prompts is not None:
        z, outputs = split(z, prompts.tokens.shape[1], prefix)  # (11)
    return (h._replace(tokens=z) if isinstance(h, Stream) else z), outputs


def block_reason(block: Any) -> str | None:
    """Why keys and values cannot be put into a block, or None: another class than timm's may compute something else."""
    attn: Any = getattr(block, "attn", None)
    if type(block) is Block and type(attn) is Attention and attn.gate is None:
        return None
    return (
        f"a block is a {type(block).__name__} with a {type(attn).__name__}: expected timm's Block with an Attention"
        " without a gate, into which keys and values can be put"
    )


def require_block(block: Any) -> None:
    """Raise TypeError for a block into which keys and values cannot be put."""
    if reason := block_reason(block):
        raise TypeError(reason)


def _run_with_keys_values(block: Any, x: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
    """timm's ``Block.forward`` with further keys and values."""
    require_block(block)
    require_plain(block, Block)
    require_plain(block.attn, Attention)
    x = x + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), keys_values, mask)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend(attn: Attention, x: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, S, d]
    more_k, more_v = keys_values.to(v.dtype).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    k, v = torch.cat([attn.k_norm(k).to(v.dtype), more_k], dim=2), torch.cat([v, more_v], dim=2)
    if mask is not None:
        mask = F.pad(mask, (0, more_k.shape[2]), value=not mask.is_floating_point())
    dropout, q = attn.attn_drop.p if attn.training else 0.0, attn.q_norm(q).to(v.dtype)
    attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=attn.scale)
    projected: Tensor = attn.proj_drop(attn.proj(attn.norm(attended.transpose(1, 2).flatten(2))))
    return projected


def final_norm(backbone: VisionTransformer, h: Tensor | Stream) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(h.tokens if isinstance(h, Stream) else h)
    return normed
