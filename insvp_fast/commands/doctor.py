"""Show what InsVP runs with on this machine, and warn about known traps: in the installation, and with --run or
--adapter in what was trained. The exit status is 1 only if something cannot work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from insvp_fast import __version__
from insvp_fast.commands.traps import adapter_traps, run_traps

SUMMARY = "show the environment and warn about known traps"
PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "accelerate", "scikit-learn", "matplotlib", "tqdm")
OPTIONAL = ("xformers", "tensorboard", "wandb", "scipy", "h5py", "datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="RUN", help="look into a run folder as well")
    parser.add_argument("--adapter", metavar="FOLDER", help="look into an adapter folder as well")


def run(run: str | None, adapter: str | None) -> int:
    _say("insvp_fast", f"{__version__} in {Path(__file__).parents[1]}")
    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    _say("python", f"{platform.python_version()} on {platform.platform()}")
    for name in (*PACKAGES, *(name for name in OPTIONAL if versions[name])):
        _say(name, versions[name] or "not installed")
    warnings, failures = list(_package_traps(versions)), []
    try:
        for label, value in _machine():
            _say(label, value)
        warnings += _machine_traps()
        warnings += run_traps(Path(run)) if run else []
        warnings += adapter_traps(Path(adapter)) if adapter else []
    except (ImportError, RuntimeError, OSError) as error:  # an extension of another build, a library demanded in vain
        failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    print()
    for text in warnings:
        print(f"warning: {text}")
    for text in failures:
        print(f"insvp: error: {text}", file=sys.stderr)
    if not warnings and not failures:
        print("nothing suspicious found")
    return 1 if failures else 0


def _version(name: str) -> str | None:
    """The version of a package, with the build it is for (+cpu, +cu132, +rocm7), without importing it."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(name) if name in ("torch", "torchvision") else None
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    # the wheels of the package index have the build in this file only
    full = re.search(r"__version__ = '([^']+)'", file.read_text()) if file and file.is_file() else None
    return full[1] if full else version


def _package_traps(versions: dict[str, str | None]) -> Iterator[str]:
    torch, vision = (re.search(r"\+(cpu|cu\d+|rocm[\d.]+)", versions[name] or "") for name in ("torch", "torchvision"))
    if torch and vision and torch[1] != vision[1]:
        yield (
            f"torch is built for {torch[1]} and torchvision for {vision[1]}: importing timm may fail with `operator"
            " torchvision::nms does not exist`; install both from one index"
        )
    if torch and torch[1] == "cpu" and shutil.which("nvidia-smi"):
        yield "there is an NVIDIA driver, but torch is built for CPUs: no GPU is used"
    missing = [name for name in PACKAGES[5:] if not versions[name]]
    if missing:
        yield f"{', '.join(missing)} not installed: insvp train needs pip install 'insvp-fast[train]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1 is set: Triton kernels run in its interpreter, thousands of times slower"


def _machine() -> Iterator[tuple[str, object]]:
    import torch

    from insvp_fast import bench, native_status
    from insvp_fast.ops.attention import cpu_attention
    from insvp_fast.runtime import products

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield "torch is built for", built if torch.version.cuda or torch.version.hip else "CPUs only"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "GPU", "none"
    yield "CPU", f"{bench.cpu_name()}, {bench.instructions()}, {torch.get_num_threads()} threads"
    yield "native library", native_status()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    yield "CPU products", ", ".join(f"{name} {products.cpu_provider(dtype)}" for name, dtype in types.items())
    if torch.cuda.is_available():
        backends = ", ".join(f"{name} {bench.sdpa_backend(dtype)}" for name, dtype in types.items())
        yield "attention", f"PyTorch's: {backends}"
    else:
        yield "attention", ", ".join(f"{name} {cpu_attention(dtype)}" for name, dtype in types.items())


def _machine_traps() -> Iterator[str]:
    from insvp_fast import native_status
    from insvp_fast.runtime.native import available

    available()  # raises where the library is demanded and not there
    if not (status := native_status()):
        yield f"{status}; everything works, but on CPUs slower"


def _say(label: str, value: object) -> None:
    print(f"{label:20} {value}")
