"""OpenVINO's files, an .xml with the graph and a .bin with the weights."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from insvp_fast.errors import CheckpointError
from insvp_fast.export.facts import ExportedModel, Facts
from insvp_fast.export.graph import Graph, refusal

__all__ = ["load_openvino", "quantize_openvino", "write_openvino"]

SECTION = "insvp_fast"  # of the metadata


def write_openvino(graph: Graph, file: Path) -> None:
    """Write both files, with input ``images`` and output ``logits``."""
    import openvino

    shape = openvino.PartialShape([-1 if size is None else size for size in graph.facts.input])
    with refusal("OpenVINO cannot convert the model"):
        model = openvino.convert_model(graph.program, input=[shape])
    model.inputs[0].get_tensor().set_names({"images"})
    model.outputs[0].get_tensor().set_names({"logits"})
    for name, value in graph.facts.to_metadata().items():
        model.set_rt_info(value, [SECTION, name])
    openvino.save_model(model, file, compress_to_fp16=False)


def load_openvino(file: Path) -> ExportedModel:
    """Load both files, for fp32 arithmetic on the CPU."""
    import openvino

    try:
        model = openvino.Core().read_model(file)
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise CheckpointError(f"{file}: OpenVINO cannot load it: {error}") from error
    entries = model.get_rt_info()[SECTION] if model.has_rt_info(SECTION) else {}
    if not isinstance(entries, dict):
        entries = {}  # another program's text under this name
    metadata = {name: entry.astype(str) for name, entry in entries.items() if not isinstance(entry, dict)}

    def run(images: Tensor) -> Tensor:
        # its pooling refuses an empty batch
        some = images if len(images) else images.new_zeros(1, *images.shape[1:])
        return torch.from_numpy(compiled(some.numpy())[0])[: len(images)]

    return ExportedModel(run, Facts.from_metadata(metadata, file))


def quantize_openvino(source: Path, file: Path) -> None:
    """Weights in 8 bits, which OpenVINO widens while it computes."""
    import openvino

    with contextlib.redirect_stdout(io.StringIO()):  # statistics and a progress bar
        import nncf

        model = nncf.compress_weights(openvino.Core().read_model(source))
    openvino.save_model(model, file, compress_to_fp16=False)
