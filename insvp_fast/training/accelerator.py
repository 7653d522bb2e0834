"""The device, precision and processes of a run, by Accelerate."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast_object_list,
    find_executable_batch_size,
    gather_object,
)
from torch import nn

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

from insvp_fast.errors import InsVPError, TrainingError
from insvp_fast.runtime import hardware
from insvp_fast.training.recipe import Recipe

__all__ = ["create_accelerator", "find_batch_size", "from_main", "peak_memory", "resolve_amp"]

T = TypeVar("T")

# how long processes wait for the one that fills the cache or downloads data; PyTorch's 10 minutes would end the run
PATIENCE = timedelta(hours=12)
TENSOR_CORES = (7, 0)  # the compute capability of the first GPUs with them; before, fp16 may be slower than fp32


def create_accelerator(amp: str = "off", trackers: tuple[str, ...] = ()) -> Accelerator:
    """An accelerator of this precision, even if an earlier run of this process had another one.

    Raises:
        TrainingError: if the hardware lacks the precision, or a tracker is not installed.
    """
    if amp == "fp16" and not torch.accelerator.is_available():
        raise TrainingError("`amp` is fp16: that needs a GPU; on a CPU use bf16 or off")
    for name in trackers:
        if find_spec(name) is None:
            raise TrainingError(f"`trackers` has {name}: it is not installed; pip install {name}")
    AcceleratorState._reset_state()
    # without a GPU, Accelerate would take the processes of a launcher for independent ones
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        cpu=distributed and not torch.accelerator.is_available(),
        mixed_precision="no" if amp == "off" else amp,
        log_with=list(trackers) or None,
        project_dir="." if trackers else None,  # until there is a run folder
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def from_main(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """What the main process computes, sent to all processes, which may not share a disk.

    Its ``InsVPError`` or ``OSError`` is raised in all of them: otherwise they would wait for it.
    """
    found: tuple[Any, Exception | None] = None, None
    if accelerator.is_main_process:
        try:
            found = compute(), None
        except (InsVPError, OSError) as error:
            found = None, error
    value, problem = broadcast_object_list([found])[0]
    if problem is not None:
        raise problem
    return value


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors held on a GPU, or that this process held in RAM, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def resolve_amp(amp: str) -> str:
    """What ``auto`` stands for: the 16 bits that this machine multiplies fast, bf16 before fp16, or off."""
    if amp != "auto":
        return amp
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability() >= TENSOR_CORES else "off"
    return "bf16" if not torch.accelerator.is_available() and hardware.has_products(torch.bfloat16) else "off"


def find_batch_size(recipe: Recipe, model: nn.Module, size: tuple[int, ...], accelerator: Accelerator) -> Recipe:
    """The recipe with the largest batch, of at most ``batch_size`` images, whose backward fits into memory.

    ``model`` is moved to the device. All processes use the smallest batch size that one of them found.

    Args:
        size: of an image, [C, H, W].

    Raises:
        TrainingError: if not even one image fits.
    """
    model = model.to(accelerator.device).train()

    @find_executable_batch_size(starting_batch_size=recipe.batch_size)
    def attempt(batch_size: int) -> int:
        images = torch.zeros(batch_size, *size, device=accelerator.device)
        classes = torch.zeros(batch_size, dtype=torch.long, device=accelerator.device)
        with accelerator.autocast():
            loss = F.cross_entropy(model(images).float(), classes)
        loss.backward()
        return batch_size

    try:
        found = attempt()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        raise TrainingError("`auto_batch`: not even one image fits into memory; try `recompute` block") from error
    return dataclasses.replace(recipe, batch_size=min(gather_object([found])), auto_batch=False)
