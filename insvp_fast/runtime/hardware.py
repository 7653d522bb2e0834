"""What this machine is and can do: names and instruction sets, fast products, PyTorch's attention kernel."""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
from functools import cache

import torch

from insvp_fast.runtime import torch_private

__all__ = ["cpu_name", "gpu_state", "has_products", "has_tiles", "instruction_set", "sdpa_backend", "wide_vectors"]


def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices in ``dtype`` at full speed.

    fp32 and wider always, 16 bits where oneDNN has instructions for it. Elsewhere PyTorch's 16-bit products are slower
    than widening the operands to fp32: without AVX-512 by far, as they are scalar code.
    """
    return bool(torch_private.HAS_PRODUCTS.get(dtype, True))


@cache
def has_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices in ``dtype`` tile by tile (AMX)."""
    name = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    return name is not None and bool(torch.cpu.get_capabilities().get(name, False))


def wide_vectors() -> bool:
    """Whether PyTorch runs its AVX-512 code here."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


# AMD's family and models, by which processors of one name and instruction set are told apart
_ZEN = {(25, model): "Zen 4" for model in (*range(0x10, 0x20), *range(0x60, 0xB0))}
_ZEN |= {(26, model): "Zen 5" for model in (*range(0x30), *range(0x40, 0x50), *range(0x60, 0x80))}


def cpu_name(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The processor's model name; for AMD's, with Zen 4 or Zen 5 behind it, which the name may leave out."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError), open(cpuinfo) as file:
        for line in file:
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())  # all processors are the first one
    name = facts.get("model name") or platform.processor() or platform.machine()
    if facts.get("vendor_id") != "AuthenticAMD":
        return name
    zen = _ZEN.get((int(facts.get("cpu family", -1)), int(facts.get("model", -1))))
    return f"{name}, {zen}" if zen else name


def instruction_set() -> str:
    """The instruction set that PyTorch uses on this CPU; AVX-512 is split by what it has for bf16 products."""
    level = torch.backends.cpu.get_cpu_capability()
    if level != "AVX512":
        return level
    found = torch.cpu.get_capabilities()
    if found.get("amx_tile", False):
        return "AVX512-AMX"
    return "AVX512-BF16" if found.get("avx512_bf16", False) else level


def gpu_state() -> str | None:
    """The power limit, the clock and the highest clock of the current GPU, as CSV of nvidia-smi; None without it."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = "--query-gpu=power.limit,clocks.sm,clocks.max.sm"
    # PyTorch's number of a GPU is not nvidia-smi's where CUDA_VISIBLE_DEVICES leaves some out
    uuid = torch.cuda.get_device_properties().uuid
    command = [tool, query, "--format=csv", f"--id=GPU-{uuid}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def sdpa_backend(dtype: torch.dtype, device: torch.device | str) -> str:
    """Which kernel PyTorch's attention takes for a ViT-B/16 with 9 prompts: 197 queries, 206 keys, 12 heads of 64."""
    q, k = (torch.empty(1, 12, length, 64, dtype=dtype, device=device) for length in (197, 206))
    return torch_private.sdpa_backend(q, k, k)
