"""Whether the Triton kernels can run."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["missing"]


@cache
def missing(device: torch.device) -> str | None:
    """Why they cannot run on this device, to be read behind 'impl="triton"'; None if they can."""
    try:
        from insvp_fast.kernels.gpu import chip
    except ImportError as error:
        return f"cannot run here: {error}"
    if device.type != "cuda" and not chip.INTERPRETED:
        return f"cannot run here: it computes on CUDA and ROCm devices, not on {device}"
    return f"cannot run here: its kernels are not made for {device}" if chip.arch(device) is None else None
