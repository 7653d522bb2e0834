"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from insvp_fast.errors import CheckpointError
from insvp_fast.export.facts import ExportedModel, Facts
from insvp_fast.export.graph import Graph, refusal

__all__ = ["OPSET", "load_onnx", "quantize_onnx", "write_onnx"]

OPSET = 18


def write_onnx(graph: Graph, file: Path) -> None:
    """Write an ONNX file with input ``images``, output ``logits``; weights above 2 GB are in a file beside it."""
    with refusal("torch.onnx cannot convert the model"):
        program = torch.onnx.export(
            graph.program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(graph.axes,),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(graph.facts.to_metadata())
    program.save(file, external_data=False)


def load_onnx(file: Path) -> ExportedModel:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise CheckpointError(f"{file}: ONNX Runtime cannot load it: {error}") from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return ExportedModel(run, Facts.from_metadata(session.get_modelmeta().custom_metadata_map, file))


def quantize_onnx(source: Path, file: Path) -> None:
    """Weights of the matrix products in 8 bits, one scale a column; their other operands are rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().disabled = True  # it advises to infer shapes first, which the exporter did
    try:
        quantize_dynamic(
            source, file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
    finally:
        logging.getLogger().disabled = False
