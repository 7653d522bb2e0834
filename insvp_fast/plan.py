"""What the fast plan assumes of a model, in one table, and whether a model is so.

The fast plan computes what timm's modules and the prompters say, without calling them. That is right only for modules
that are exactly what it stands in for, so whatever is not in the tables below, or is there with another value, sends
the model down the general path, which calls every module. Not only the modules that the plan computes are listed, but
also those that it leaves out because they change nothing, such as a dropout in evaluation mode.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.layers import DropPath, Format, LayerNorm, LayerScale, Mlp, PatchDropout, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import reference

__all__ = ["covers", "unsupported_reason"]

ANY = object()  # an attribute that the plan reads itself, or that decides nothing


class Is(NamedTuple):
    """A module of exactly this type, without hooks, whose attributes have these values and no others are there."""

    type: type[nn.Module]
    attributes: Mapping[str, Any] = MappingProxyType({})
    parameters: tuple[str, ...] = ()  # those that have to be there
    optional: tuple[str, ...] = ()
    rate: str | None = None  # the attribute with the rate of a dropout, which has to be 0 or the module in evaluation
