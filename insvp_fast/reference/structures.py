"""The kinds of backbones that prompts can be put into."""

from __future__ import annotations

from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from insvp_fast.reference import cait, eva, image_only, naflexvit, relative_position, swin, vision_transformer
from insvp_fast.reference.structure import Structure

__all__ = ["STRUCTURES", "structure_of"]

STRUCTURES: dict[type[nn.Module], Structure] = {
    VisionTransformer: vision_transformer,
    SwinTransformer: swin,
    Eva: eva,
    NaFlexVit: naflexvit,
    Beit: relative_position,
    VisionTransformerRelPos: relative_position,
    Cait: cait,
}
OF_TIMM = ("forward_features", "forward_head", "get_classifier", "reset_classifier")


def structure_of(backbone: nn.Module) -> Structure:
    """The structure of a backbone, by its type or a base of that; other models of timm take image prompts only.

    Raises:
        TypeError: if it is a class, has prompts already, or has not the methods of timm's models.
    """
    if isinstance(backbone, type):
        raise TypeError(f"backbone is the class {backbone.__name__}: expected a model, which it makes when called")
    if hasattr(backbone, "prompted_blocks"):
        raise TypeError(
            f"backbone has prompts, as a model of the class {type(backbone).__name__}: expected one without"
        )
    for cls, structure in STRUCTURES.items():
        if isinstance(backbone, cls):
            return structure
    if missing := [name for name in OF_TIMM if not callable(getattr(backbone, name, None))]:
        raise TypeError(f"backbone is a {type(backbone).__name__}, without {missing[0]}: expected a model of timm")
    return image_only
