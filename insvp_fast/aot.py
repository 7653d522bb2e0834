"""Compile every Triton kernel for chips that are not here and print what the compiler made of it, as JSON.

``python -m insvp_fast.aot [target ...]`` takes 80, 90, 100 (NVIDIA) and gfx942 (AMD), all four by default. An entry of
the list tells the kernel with its case, the target, ``registers`` of a thread, ``spills`` (NVIDIA: local loads and
stores, AMD: spilled registers), ``stack`` bytes (NVIDIA), ``shared`` bytes and ``matrix``, the number of matrix
instructions, of which ``wgmma`` (NVIDIA) are of warp groups. Where ``TRITON_INTERPRET=1`` nothing can be compiled, and
it refuses.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from insvp_fast.kernels.gpu import attention, superpose

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program may have
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
OPTIONS = ("num_warps", "num_stages")


class Case(NamedTuple):
    """One kernel to compile: its run-time arguments' types in `signature`, everything else in `constants`.

    `multiples` names the integers that are multiples of 16 at this shape, which the launcher finds out by itself.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()


def superpose_cases(arch: int | str) -> Iterator[Case]:
    """The image prompt of a 224 image, patch 16 and 14, as the launchers of `kernels.gpu.superpose` would launch it."""
    scalars = {"M": "i32", "global_weight": "fp32", "patch_weight": "fp32"}
    weights = {"w1_ptr": "*fp32", "b1_ptr": "*fp32", "w2_ptr": "*fp32", "b2_ptr": "*fp32"}
    variants = [(16, torch.bfloat16, torch.bfloat16), (16, torch.float32, torch.float32)]
    # One chip each is enough for the rest, and the run stays short.
    if arch == 80:
        variants.append((14, torch.float16, torch.float16))
    if arch == 90:
        variants.append((16, torch.float32, torch.bfloat16))
    for P, image, tokens in variants:
        x, y = POINTERS[image], POINTERS[tokens]
        shape, strides = (2, 3, 224, 224), (3 * 224 * 224, 224 * 224, 224, 1)

        def constants(kind: str, shape=shape, P=P, dtypes=(image, tokens), strides=strides) -> dict[str, Any]:
            return {**superpose.constants(kind, shape, P, 16, dtypes, arch), "IMAGE": strides}

        label = f"P{P}-{x[1:]}-{y[1:]}"
        yield Case(
            f"superpose_fwd-{label}",
            superpose._superpose_fwd_kernel,
            {"image_ptr": x, "global_ptr": y, **weights, "tokens_ptr": y, "hidden_ptr": "*fp32", **scalars},
            {**constants("fwd"), "GLOBAL": strides, "HAS_GLOBAL": True},
        )
        yield Case(
            f"superpose_bwd-{label}",
            superpose._superpose_bwd_kernel,
            {"grad_ptr": y, "hidden_ptr": "*fp32", "w1_ptr": "*fp32", "w2_ptr": "*fp32", "d_hidden_ptr": "*fp32"}
            | {"d_image_ptr": x, "d_global_ptr": y, **scalars},
            {**constants("bwd"), "NEED_IMAGE": True, "NEED_GLOBAL": True},
        )
        yield Case(
            f"superpose_bwd_weight-{label}",
            superpose._superpose_bwd_weight_kernel,
            {"grad_ptr": y, "image_ptr": x, "hidden_ptr": "*fp32", "d_hidden_ptr": "*fp32"}
            | {"dw1_ptr": "*fp32", "db1_ptr": "*fp32", "dw2_ptr": "*fp32", "db2_ptr": "*fp32"}
            | {"M": "i32", "patch_weight": "fp32"},
            constants("bwd_weight"),
        )


def attention_cases(arch: int | str) -> Iterator[Case]:
    """ViT-B/16 with 9 prompts and with as many as `attention.covers` says, as the launchers would launch them."""
    H, d = 12, 64
    shapes = [(torch.bfloat16, 197, 206), (torch.float16, 197, 240)]
    # One chip each is enough for the rest, and the run stays short: ViT-B/32; a class token that asks alone.
    if arch == 80:
        shapes.append((torch.bfloat16, 50, 59))
    if arch == 90:
        shapes.append((torch.bfloat16, 1, 206))
    for dtype, T, S in shapes:
        x, label = POINTERS[dtype], f"T{T}-S{S}-{POINTERS[dtype][1:]}"
        fwd, bwd = (attention.constants(kind, H, T, S, d, dtype, arch) for kind in ("fwd", "bwd"))
        yield Case(
            f"attention_fwd-{label}",
            attention._attention_fwd_kernel,
            {"qkv_ptr": x, "out_ptr": x, "log2_scale": "fp32"},
            fwd | {"QKV": (S * 3 * H * d, 3 * H * d)},
        )
        yield Case(
            f"attention_bwd-{label}",
            attention._attention_bwd_kernel,
            {"grad_ptr": x, "qkv_ptr": x, "d_qkv_ptr": x, "scale": "fp32", "log2_scale": "fp32"},
            bwd | {"GRAD": (T * H * d, H * d), "QKV": (S * 3 * H * d, 3 * H * d)},
        )


def cases(target: str) -> list[Case]:
    """Every kernel of the package at its main shapes, with the launch parameters for `target`."""
    arch = int(target) if target.isdigit() else target
    return [*superpose_cases(arch), *attention_cases(arch)]


def compile_case(case: Case, target: str):
    """Compile one case; pointers count as aligned to 16 bytes, as the launcher sees those of PyTorch's allocator."""
    options = {name: case.constants[name] for name in OPTIONS}
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
    """What the compiler made of one case."""
    compiled = compile_case(case, target)
    found = {"kernel": case.name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        return found | {"matrix": text.count("v_mfma"), "registers": registers, "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)
    found |= {"registers": _number(r"REG:(\d+)", usage), "stack": _number(r"STACK:(\d+)", usage)}
    found["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    found["matrix"] = len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass))
    found["wgmma"] = len(re.findall(r"\bHGMMA\b", sass))
    return found


def _facts_of(target: str, index: int) -> dict[str, Any]:
    return facts(cases(target)[index], target)


def main() -> int:
    """Print the facts for the targets named on the command line."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("nothing can be compiled where TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    targets = sys.argv[1:] or list(TARGETS)
    work = [(target, i) for target in targets for i in range(len(cases(target)))]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        print(json.dumps([*pool.map(_facts_of, *zip(*work, strict=True))], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
