"""The facts that a timing means nothing without: hardware, versions, and which implementations were in use."""

from __future__ import annotations

import os
import platform
from typing import Any

import timm
import torch

from insvp_fast.bench.jobs import AUTOCAST_DTYPES
from insvp_fast.runtime import hardware, products
from insvp_fast.runtime.native import native_status
from insvp_fast.testing import DEVICE

__all__ = ["machine_facts"]


def machine_facts() -> dict[str, Any]:
    """Facts by name, as they stand in a file of results."""
    facts: dict[str, Any] = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    facts["attention"] = {
        precision: hardware.sdpa_backend(dtype or torch.float32, DEVICE) for precision, dtype in AUTOCAST_DTYPES.items()
    }
    if DEVICE.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "hip": torch.version.hip}
        return facts | {"cudnn": torch.backends.cudnn.version(), "state": hardware.gpu_state()}
    how = {str(dtype).removeprefix("torch."): products.cpu_provider(dtype) for dtype in (torch.float32, torch.bfloat16)}
    instructions = hardware.instruction_set()
    return facts | {
        "device": f"{hardware.cpu_name()}, {instructions}, {torch.get_num_threads()} threads",
        "instructions": instructions,
        "bf16 products": hardware.has_products(torch.bfloat16),
        "frozen products": how,
        "native library": str(native_status()),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }
