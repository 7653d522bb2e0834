"""The chips that the kernels are compiled and checked for, and what every launcher asks before it launches."""

import functools

import torch
import triton
from torch import Tensor

PROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}  # multiprocessors: they bound the grids of two-stage sums
INTERPRETED = triton.knobs.runtime.interpret


@functools.cache
def arch(device: torch.device) -> int | str | None:
    """The row of the tables of launch parameters that serves this device, if any."""
    if device.type != "cuda":
        return 90  # the interpreter: any row will do
    if torch.version.hip:
        return "gfx942" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94") else None
    return {8: 80, 9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0])


@functools.cache
def shared_memory(device: torch.device) -> float:
    """Bytes that a program may have; AMD's kernels are compiled within theirs."""
    if device.type != "cuda" or torch.version.hip:
        return float("inf")
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def require(operation: str, x: Tensor) -> int | str:
    """The row of the tables for the device of `x`; raises RuntimeError where the kernels cannot run."""
    if not x.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"{operation}: the Triton kernels run on CUDA and ROCm tensors, not on {x.device}; "
            "on CPU only in the interpreter (TRITON_INTERPRET=1 set before triton is imported)"
        )
    row = arch(x.device)
    if row is None:
        raise RuntimeError(f"{operation}: the Triton kernels do not know the {torch.cuda.get_device_name(x.device)}")
    return row
