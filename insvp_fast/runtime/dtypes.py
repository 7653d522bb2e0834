"""The dtype of arithmetic."""

from __future__ import annotations

import torch

__all__ = ["widened"]


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic for tensors of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
