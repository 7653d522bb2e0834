"""The GPU architectures that the kernels are compiled and checked for, and the checks before every launch."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}  # of A100, H100, B200 and MI300X
INTERPRETED = triton.knobs.runtime.interpret


@functools.cache
def arch(device: torch.device) -> int | str | None:
    """The architecture whose launch parameters a device uses, as in ``MULTIPROCESSORS``; None if there is none."""
    if device.type != "cuda":
        return 90  # in the interpreter any architecture will do
    if torch.version.hip:
        return "gfx942" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94") else None
    return {8: 80, 9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0])


@functools.cache
def shared_memory(device: torch.device) -> float:
    """Bytes of shared memory that a program can have; infinite on AMD, where every kernel is compiled to fit."""
    if device.type != "cuda" or torch.version.hip:
        return float("inf")
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def require_arch(operation: str, x: Tensor) -> int | str:
    """The architecture of the device of ``x``; raises RuntimeError where the kernels cannot run."""
    if not x.is_cuda and not INTERPRETED:
        raise RuntimeError(
            f"{operation}: the Triton kernels run on CUDA and ROCm tensors, not on {x.device}; "
            "on CPU only in the interpreter (TRITON_INTERPRET=1 set before triton is imported)"
        )
    found = arch(x.device)
    if found is None:
        raise RuntimeError(f"{operation}: the Triton kernels do not know the {torch.cuda.get_device_name(x.device)}")
    return found


def launch_options(num_warps: int, num_stages: int, fused: bool = True) -> dict[str, int]:
    """Options of a launch; ``fused`` products and sums are rounded once, which Triton 3.10 does no longer by itself."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fused}


def operands(dtype: torch.dtype, arch: int | str) -> dict[str, object]:
    """The dtype of operands of matrix products, and how they are multiplied where it is fp32: to its full accuracy."""
    compute = tl.float32 if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))
    return {"COMPUTE": compute, "PRECISION": "ieee" if isinstance(arch, str) else "tf32x3"}
