"""Compile every Triton kernel ahead of time, without a GPU, and print facts about the compiled code as JSON.

``python -m tools.aot [--all] [target ...]``: targets are 80, 90, 100 (NVIDIA) and gfx942 (AMD), by default all four;
``--all`` adds more of the shapes that attention covers. With ``TRITON_INTERPRET=1`` nothing can be compiled, and the
exit status is 2. The entries of the list have these keys:

    kernel, target   the name of the case, and what it was compiled for
    registers        of a thread
    spills           NVIDIA: loads and stores of local memory; AMD: spilled registers
    stack            NVIDIA: bytes of a thread
    shared           bytes of a program
    matrix           matrix instructions
    wgmma            NVIDIA: those of warp groups among them
    wide, narrow     loads and stores of global memory, with 16 bytes per lane and with fewer, where they are limited
    shortcomings     what is worse than the kernel allows
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.aot_cases import CHECKED, Case, cases

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}  # bytes of a program
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_case(case: Case, target: str):
    """Compile one case, with pointers aligned to 16 bytes, as PyTorch's allocator gives them."""
    options = {name: case.constants[name] for name in OPTIONS if name in case.constants}
    constants = {name: value for name, value in case.constants.items() if name not in OPTIONS}
    order = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in order}
    aligned = [name for name in order if signature[name].startswith("*") or name in case.multiples]
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the compiler's report"
    return int(found[1])


def facts(case: Case, target: str) -> dict[str, Any]:
    """Compile one case and read the facts from the compiled code."""
    compiled = compile_case(case, target)
    found = {"kernel": case.name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        found |= {"matrix": text.count("v_mfma"), "registers": registers, "spills": spills}
        return found | _widths(r"\b(?:global|buffer)_(?:load|store)_(\w+)", text)
    text = compiled.asm["ptx"]
    found["matrix"] = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", text))
    found["wgmma"] = len(re.findall(r"\bwgmma\.mma_async\b", text))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        found |= {"registers": _number(r"REG:(\d+)", usage), "stack": _number(r"STACK:(\d+)", usage), "spills": 0}
        if found["stack"] == 0 and "narrow" not in _limits(case.name, target):
            return found  # to disassemble takes a third of the time
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)
    found["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return found | _widths(r"\b(?:LDG|STG)\.([\w.]+)", sass)


def _widths(accesses: str, text: str) -> dict[str, int]:
    wide = [re.search(r"\b(?:128|256|dwordx4)\b", kind) is not None for kind in re.findall(accesses, text)]
    return {"wide": sum(wide), "narrow": len(wide) - sum(wide)}


def _limits(kernel: str, target: str) -> dict[str, int]:
    """The most of each fact that a kernel may have; the compiler's version decides whether it has more."""
    nvidia, most = target != "gfx942", {"spills": 0, "stack": 0, "shared": SHARED_LIMIT[target]}
    if kernel.startswith("activation"):
        most["narrow"] = int("_code" in kernel and not nvidia)  # 8 values per lane, written as 8 bytes
    if kernel.startswith("gate") and "-D2730" not in kernel:  # whose rows are not aligned
        most["narrow"] = 0
    if kernel.startswith("rotate") and "-d88" not in kernel:  # whose halves are not aligned
        most["narrow"] = 0 if nvidia or "-pairs" in kernel else 4  # 4 numbers per lane of half a head
    if kernel.startswith("norm_insert"):
        most["narrow"] = 2  # the statistics, one number per row
        if nvidia:
            most["shared"] = 0  # each row belongs to one warp
            most["registers"] = 168  # of 65,536: room for 12 warps of two rows, with 70 KB of loads in flight
    if kernel.startswith("conv_pool_bwd_weight"):
        most |= {"spills": 8, "stack": 16}  # on an H200 a quarter faster than the tiles without any
    if kernel == "superpose_fwd-P16-bf16-bf16" and nvidia:
        most["registers"] = 128  # room for 16 warps, which keep enough loads in flight
    return most


def shortcomings(fact: dict[str, Any]) -> list[str]:
    """What is worse than the kernel allows, with the limit."""
    limits = _limits(fact["kernel"], fact["target"]).items()
    return [f"{fact[name]} {name}, at most {limit}" for name, limit in limits if fact.get(name, 0) > limit]


def _facts_of(target: str, index: int, every_shape: bool) -> dict[str, Any]:
    found = facts(cases(target, every_shape)[index], target)
    return found | {"shortcomings": shortcomings(found)}


def main() -> int:
    """Print the facts for the targets on the command line."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("nothing can be compiled with TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog="python -m tools.aot")
    parser.add_argument("targets", nargs="*", metavar="target", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--all", action="store_true", help="every shape instead of the main ones")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    work = [(target, i, options.all) for target in targets for i in range(len(cases(target, options.all)))]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        found = [*pool.map(_facts_of, *zip(*work, strict=True))]
    print(json.dumps(found, indent=1))
    if triton.__version__ not in CHECKED:
        print(f"triton {triton.__version__} is not one of the checked versions: {', '.join(CHECKED)}", file=sys.stderr)
    for fact in found:
        if fact["shortcomings"]:
            print(f"{fact['kernel']} on {fact['target']}: {'; '.join(fact['shortcomings'])}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
