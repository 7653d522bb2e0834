"""Show the environment that InsVP runs in, and warn about known problems of the installation, of a run (--run) or of an
adapter (--adapter). The exit status is 1 only if something cannot work at all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from insvp_fast import __version__
from insvp_fast.commands.diagnostics import adapter_warnings, run_warnings
from insvp_fast.commands.options import add_json

SUMMARY = "show the environment, and warn about known problems"
REQUIRED = ("torch", "torchvision", "timm", "triton", "numpy")
FOR_TRAINING = ("accelerate", "scikit-learn", "matplotlib", "rich")
OPTIONAL = ("xformers", "tensorboard", "wandb", "scipy", "datasets")  # shown if installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="RUN", help="check a run folder as well")
    parser.add_argument("--adapter", metavar="FOLDER", help="check an adapter folder as well")
    parser.add_argument(
        "--products", action="store_true", help="time what can multiply by frozen weights here, for a few seconds"
    )
    add_json(parser)


def run(run: str | None, adapter: str | None, products: bool) -> dict[str, Any]:
    _print("insvp_fast", f"{__version__} in {Path(__file__).parents[1]}")
    versions = {name: _version(name) for name in (*REQUIRED, *FOR_TRAINING, *OPTIONAL)}
    _print("python", f"{platform.python_version()} on {platform.platform()}")
    for name, version in versions.items():
        if version or name not in OPTIONAL:
            _print(name, version or "not installed")
    warnings, errors, machine = list(_package_warnings(versions)), [], {}
    try:
        for label, value in chain(_describe_machine(), _time_products() if products else ()):
            _print(label, value)
            machine[label] = str(value)
        warnings += _machine_warnings()
        warnings += run_warnings(Path(run)) if run else []
        warnings += adapter_warnings(Path(adapter)) if adapter else []
    except (ImportError, RuntimeError, OSError) as error:  # as of an extension for another version of torch
        errors.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    print()
    for text in warnings:
        print(f"warning: {text}")
    if not warnings and not errors:
        print("no problems found")
    every_version = {"insvp_fast": __version__, "python": platform.python_version(), **versions}
    return {"versions": every_version, "machine": machine, "warnings": warnings, "errors": errors}


def _version(name: str) -> str | None:
    """The version of a package, with the build that it is (+cpu, +cu132, +rocm7), without importing it."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(name) if name in ("torch", "torchvision") else None
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    # the metadata of wheels from the package index lacks the build
    full = re.search(r"__version__ = '([^']+)'", file.read_text()) if file and file.is_file() else None
    return full[1] if full else version


def _package_warnings(versions: dict[str, str | None]) -> Iterator[str]:
    torch, vision = (re.search(r"\+(cpu|cu\d+|rocm[\d.]+)", versions[name] or "") for name in ("torch", "torchvision"))
    if torch and vision and torch[1] != vision[1]:
        yield (
            f"torch is built for {torch[1]} and torchvision for {vision[1]}: importing timm may fail with `operator"
            " torchvision::nms does not exist`; install both from one index"
        )
    if torch and torch[1] == "cpu" and shutil.which("nvidia-smi"):
        yield "there is an NVIDIA driver, but torch is built for CPUs: no GPU is used"
    missing = [name for name in FOR_TRAINING if not versions[name]]
    if missing:
        yield f"{', '.join(missing)} not installed: insvp train needs pip install 'insvp-fast[train]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1 is set: Triton kernels run in its interpreter, thousands of times slower"


def _describe_machine() -> Iterator[tuple[str, object]]:
    import torch

    from insvp_fast import native_status
    from insvp_fast.ops.attention import cpu_attention
    from insvp_fast.runtime import hardware, products

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield "torch is built for", build if torch.version.cuda or torch.version.hip else "CPUs only"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "GPU", "none"
    yield "CPU", f"{hardware.cpu_name()}, {hardware.instruction_set()}, {torch.get_num_threads()} threads"
    yield "native library", native_status()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    yield "CPU products", ", ".join(f"{name} {products.cpu_provider(dtype)}" for name, dtype in dtypes.items())
    if torch.cuda.is_available():
        backends = ", ".join(f"{name} {hardware.sdpa_backend(dtype, 'cuda')}" for name, dtype in dtypes.items())
        yield "attention", f"PyTorch's: {backends}"
    else:
        yield "attention", ", ".join(f"{name} {cpu_attention(dtype)}" for name, dtype in dtypes.items())


def _time_products() -> Iterator[tuple[str, object]]:
    """The rates of the products of a ViT-B/16's block with two images, by what multiplies."""
    import torch

    from insvp_fast import InsVPConfig
    from insvp_fast.bench.floor import BlockProducts
    from insvp_fast.bench.timing import alternate

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        block = BlockProducts("vit_base_patch16_224", InsVPConfig(), 2, dtype, depth=1)
        rates = block.rates(alternate(block.runs, rounds=7))
        yield f"products in {name}", ", ".join(f"{by} {rate / 1e9:.0f}" for by, rate in rates.items()) + " GFLOP/s"


def _machine_warnings() -> Iterator[str]:
    from insvp_fast import native_status
    from insvp_fast.runtime.native import available

    available()  # raises if INSVP_FAST_NATIVE=1 demands a library that is not there
    if not (status := native_status()):
        yield f"{status}; everything works, but slower on CPUs"


def _print(label: str, value: object) -> None:
    print(f"{label:20} {value}")
