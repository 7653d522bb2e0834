"""Files for PyTorch: programs of ``torch.export``, and packages that AOTInductor has compiled.

Both may hold operations of this package, which are there because this file imports them.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

from insvp_fast import ops  # noqa: F401  (declares torch.ops.insvp_fast)
from insvp_fast.errors import CheckpointError, ExportError
from insvp_fast.export.facts import ExportedModel, Facts
from insvp_fast.export.graph import Graph

__all__ = ["is_aoti", "load_aoti", "load_torch", "write_aoti", "write_torch"]

FACTS = "insvp_fast.json"


def write_torch(graph: Graph, file: Path) -> None:
    """Write a program for ``torch.export.load``, with the metadata in an extra file."""
    torch.export.save(graph.program, file, extra_files={FACTS: json.dumps(graph.facts.to_metadata())})


def load_torch(file: Path) -> ExportedModel:
    """Load a program; torch unpickles parts of it, so it can do whatever this process may do."""
    extra = {FACTS: ""}
    try:
        program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # of many types for other archives
        raise CheckpointError(f"{file}: torch.export cannot load it: {error}") from error
    try:
        metadata = json.loads(extra[FACTS])
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{file}: not written by `insvp export`: it has no {FACTS}") from error
    return ExportedModel(program.module(), Facts.from_metadata(metadata, file))


def write_aoti(graph: Graph, file: Path) -> None:
    """Compile a package for ``torch._inductor.aoti_load_package``.

    Raises:
        ExportError: if it cannot, as without a C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    try:
        configs = {"aot_inductor.metadata": graph.facts.to_metadata()}
        aoti_compile_and_package(graph.program, package_path=str(file), inductor_configs=configs)
    except InductorError as error:
        raise ExportError(f"AOTInductor, which needs a C++ compiler, failed: {str(error).splitlines()[0]}") from error


def load_aoti(file: Path) -> ExportedModel:
    """Load a package, which is machine code: it can do whatever this process may do."""
    from torch._inductor import aoti_load_package

    try:
        package = aoti_load_package(str(file))
        metadata = package.get_metadata()
    except Exception as error:  # of many types for other archives
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{file}: AOTInductor cannot load it: {reason}") from error
    return ExportedModel(package, Facts.from_metadata(metadata, file))


def is_aoti(file: Path) -> bool:
    """Whether a .pt2 file is a package rather than a program.

    Raises:
        CheckpointError: if it is neither.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/data/aotinductor/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file}: not a .pt2 file of PyTorch ({error})") from error
