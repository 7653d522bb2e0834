"""The backbones that have a fast path: what is supported of each family, and how it runs.

To add a family write a file like ``vision_transformer.py``, with the functions that ``BackboneFamily`` lists, and enter
it below. Its structure has to be in ``insvp_fast/reference``, which says what is computed.
"""

from __future__ import annotations

from collections.abc import Hashable

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from insvp_fast import ops
from insvp_fast.backbones import eva, naflexvit, relative_position, swin, vision_transformer
from insvp_fast.backbones.family import BackboneFamily, BlockOptions
from insvp_fast.backbones.layers import has_gated_mlp

__all__ = [
    "FAMILIES",
    "BackboneFamily",
    "BlockOptions",
    "attention_choices",
    "embeds_by_operations",
    "family_of",
    "has_gated_mlp",
    "only_operations",
]

FAMILIES: dict[type[nn.Module], BackboneFamily] = {
    VisionTransformer: vision_transformer,
    SwinTransformer: swin,
    Eva: eva,
    NaFlexVit: naflexvit,
    Beit: relative_position,
    VisionTransformerRelPos: relative_position,
}


def family_of(backbone: nn.Module) -> BackboneFamily | None:
    """The family of a backbone, by its type or a base of that; None if there is no fast path for it."""
    for cls, family in FAMILIES.items():
        if isinstance(backbone, cls):
            return family
    return None


def only_operations(
    backbone: nn.Module, block: int, options: BlockOptions, num_tokens: int, num_queries: int | None
) -> bool:
    """Whether a block calls nothing but operations, if no keys and values are appended.

    ``num_queries``: how many of the tokens ask, as in ``forward_block``.
    """
    if options.attention not in ("auto", "native"):  # the others call PyTorch's functions
        return False
    ask = getattr(family_of(backbone), "only_operations", lambda *_: False)
    answer: bool = ask(backbone, block, options, num_tokens, num_queries)
    return answer


def embeds_by_operations(backbone: nn.Module) -> Hashable:
    """Whether the embedding of this backbone calls nothing but operations, as it is now; and what decides over them.

    False if it calls others. What the table of the backbone's modules has need not be told.
    """
    answer: Hashable = getattr(family_of(backbone), "embeds_by_operations", lambda _: False)(backbone)
    return answer


def attention_choices(backbone: nn.Module) -> tuple[str, ...]:
    """The implementations of attention, of ``ops.ATTENTION``, that the blocks of a backbone can be run with."""
    choices: tuple[str, ...] = getattr(family_of(backbone), "attention_choices", lambda _: ops.ATTENTION)(backbone)
    return choices
