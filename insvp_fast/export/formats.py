"""The formats of exported files, and writing one: captured, written, loaded again, compared, and only then in place."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from insvp_fast.data.images import Images
from insvp_fast.errors import CheckpointError, ExportError
from insvp_fast.export.facts import ALL, NORMALIZE, NOTHING, ExportedModel, Facts
from insvp_fast.export.graph import Graph, capture
from insvp_fast.export.onnx import OPSET, load_onnx, quantize_onnx, write_onnx
from insvp_fast.export.openvino import load_openvino, quantize_openvino, write_openvino
from insvp_fast.export.parity import Loss, Parity, check_parity, measure_loss, run_in_new_process
from insvp_fast.export.preprocessing import resize_reason
from insvp_fast.export.programs import is_aoti, load_aoti, load_torch, write_aoti, write_torch
from insvp_fast.methods.load import AnyModel

__all__ = ["FORMATS", "Export", "Format", "export_model", "load", "require_packages"]


class Format(NamedTuple):
    """How files of a format are written and loaded."""

    title: str
    suffix: str
    packages: tuple[str, ...]  # of the extra `export`
    write: Callable[[Graph, Path], None]
    load: Callable[[Path], ExportedModel]
    quantize: Callable[[Path, Path], None] | None = None
    quantizer: tuple[str, ...] = ()  # further packages


ONNX = "onnxscript", "onnxruntime"
FORMATS = {
    "onnx": Format(f"ONNX, opset {OPSET}", ".onnx", ONNX, write_onnx, load_onnx, quantize_onnx),
    "torch": Format("torch.export", ".pt2", (), write_torch, load_torch),
    "aoti": Format("AOTInductor", ".pt2", (), write_aoti, load_aoti),
    "openvino": Format("OpenVINO", ".xml", ("openvino",), write_openvino, load_openvino, quantize_openvino, ("nncf",)),
}
KEEPS_OPERATIONS = ("torch", "aoti")


class Export(NamedTuple):
    """What was written."""

    files: list[Path]  # two where the weights have one of their own
    facts: Facts
    operations: int  # calls of this package's operations; with none, the file runs without it
    parity: list[Parity]  # with int8, of the file before
    notes: list[str]
    loss: Loss | None = None  # with int8, of the file after; None without images


def export_model(
    model: AnyModel,
    file: str | Path,
    format: str,
    *,
    preprocess: bool = False,
    channels_last: bool = False,
    batch: int | None = None,
    standard: bool = False,
    int8: bool = False,
    images: Images | None = None,
) -> Export:
    """Write a model to a file that computes its logits in fp32 on the CPU; nothing is written unless it does.

    Args:
        model: is set to evaluation mode and fp32.
        format: one of ``FORMATS``.
        preprocess: take 8-bit images of any size [B, 3, H, W]. Resizing and cropping are inside if the pixels come out
            as in training, else only normalization: ``Export.facts`` says which.
        channels_last: with ``preprocess``, images are [B, H, W, 3].
        batch: the only number of images that the file takes; None for any.
        standard: use PyTorch's own operators alone, also in "torch" and "aoti"; the other formats always do.
        int8: round the weights of the matrix products to 8 bits ("onnx" and "openvino"), after the comparison.
        images: what ``Export.loss`` is measured on, before the file is in place.

    Raises:
        ExportError: if a package is missing, an option has no meaning, there is no such folder, the model has no
            values, the file's logits are not the model's, or a file of weights would replace one that is not of an
            export.
        DataError: if one of the images cannot be read.
    """
    require_packages(format, int8)
    how, file, notes = FORMATS[format], Path(file), []
    _check(model, file, how.suffix)
    if channels_last and not preprocess:
        raise ExportError("`channels_last` without `preprocess`: expected both, as it is the order of 8-bit images")
    model = model.cpu().float().eval()
    inside = ALL if preprocess else NOTHING
    if preprocess and model.preprocessing is not None and (reason := _resize_reason(model, format)):
        inside = NORMALIZE
        notes.append(f"resizing and cropping are not inside: {reason}")
    standard = standard or format not in KEEPS_OPERATIONS
    # the caller's autocast would be captured, and compared with itself
    with torch.autocast("cpu", enabled=False), TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        graph = capture(model, standard=standard, inside=inside, channels_last=channels_last, batch=batch)
        draft = Path(folder) / file.name
        how.write(graph, draft)
        parity = check_parity(model, partial(_run, format, draft), graph.facts)
        if int8:
            assert how.quantize is not None
            (Path(folder) / "int8").mkdir()
            how.quantize(draft, draft := Path(folder) / "int8" / file.name)
        places = {part: file.parent / part.name for part in sorted(filter(Path.is_file, draft.parent.iterdir()))}
        for place in places.values():
            if place.exists() and not file.exists():
                raise ExportError(f"{place} is there without {file}, as no export leaves it: expected another name")
        loss = None if images is None else measure_loss(model, how.load(draft), images)
        for part, place in places.items():
            os.replace(part, place)
    return Export([*places.values()], graph.facts, graph.operations, parity, notes, loss)


def _check(model: AnyModel, file: Path, suffix: str) -> None:
    """Refuse a file that cannot be written, another model, and one without values, before any work."""
    if not isinstance(model, AnyModel):
        raise ExportError(f"the model is a {type(model).__name__}: expected an InsVPViT, a MethodViT or a TunedViT")
    if file.suffix != suffix:
        raise ExportError(f"the file is {file}: expected a name that ends in {suffix}")
    if file.is_dir() or not file.parent.is_dir():
        problem = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise ExportError(f"the file is {file}: {problem}: expected a file in a folder that exists")
    if meta := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ExportError(f"{meta[0]} is on the meta device, without values: expected a model with its weights loaded")


def _resize_reason(model: AnyModel, format: str) -> str | None:
    if format == "openvino":
        return "OpenVINO computes them in fp32, which puts one pixel in a thousand off by one level"
    assert model.preprocessing is not None
    return resize_reason(model.preprocessing)


def _run(format: str, file: Path, batches: list[Tensor]) -> list[Tensor]:
    """The logits of each batch; by a file for PyTorch in a process that has not seen the model."""
    if format in KEEPS_OPERATIONS:
        return run_in_new_process(file, batches)
    return [*map(FORMATS[format].load(file), batches)]


def require_packages(format: str, int8: bool = False) -> None:
    """Check that what a format needs is installed.

    Raises:
        ExportError: if not, if there is no such format, or no ``int8`` for it.
    """
    if format not in FORMATS:
        raise ExportError(f"the format is {format}: expected one of {', '.join(FORMATS)}")
    how = FORMATS[format]
    if int8 and how.quantize is None:
        able = " or ".join(name for name, other in FORMATS.items() if other.quantize)
        raise ExportError(f"8-bit weights in the format {format}: expected {able}")
    for package in how.packages + how.quantizer * int8:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"{package} is not installed: pip install 'insvp-fast[export]'")


def load(file: str | Path) -> ExportedModel:
    """Load a file of any format, to run on the CPU; its operations of this package are declared by the import.

    Loading a .pt2 file can run code that is in it: load only those that you trust.

    Raises:
        CheckpointError: if it is no such file.
        ExportError: if a package is missing.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file")
    names = [name for name, how in FORMATS.items() if how.suffix == file.suffix]
    if not names:
        suffixes = ", ".join(sorted({how.suffix for how in FORMATS.values()}))
        raise CheckpointError(f"{file}: expected a file of `insvp export`, {suffixes}")
    name = names[0] if len(names) == 1 else "aoti" if is_aoti(file) else "torch"
    require_packages(name)
    return FORMATS[name].load(file)
