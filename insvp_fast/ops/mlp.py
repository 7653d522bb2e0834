"""The activation of the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gelu"]


def gelu(x: Tensor) -> Tensor:
    """GELU in its exact (erf) form, any shape and floating dtype; kept for backward: ``x``."""
    return torch.nn.functional.gelu(x)
