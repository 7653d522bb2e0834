"""What people would run instead: other programs that compute inference of the same models on a CPU.

Each is an optional package. They get PyTorch's number of threads and the precision of autocast, and are built in the
first forward pass, for its batch.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from insvp_fast.bench import models
from insvp_fast.bench.jobs import AUTOCAST_DTYPES
from insvp_fast.export.graph import standard_model
from insvp_fast.runtime import hardware
from insvp_fast.testing import DEVICE

__all__ = ["PEERS", "make_peer", "missing"]

PEERS = ("bare freezing", "bare openvino", "bare onnxruntime", "insvp_fast openvino", "insvp_fast onnxruntime")
PACKAGES = {"freezing": (), "openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
Infer = Callable[[Tensor], Tensor]


def missing(provider: str, job: str, precision: str) -> str | None:
    """Why one of ``PEERS`` cannot be timed here, or None; None for every other provider."""
    if provider not in PEERS:
        return None
    by = provider.split(" ")[1]
    if DEVICE.type != "cpu":
        return f"{provider} left out: peers are compared on CPUs"
    if job != "inference":
        return f"{provider} left out: it has no {job}"
    for package in PACKAGES[by]:
        if importlib.util.find_spec(package) is None:
            return f"{provider} left out: {package} is not installed"
    if by == "onnxruntime" and precision != "fp32":
        return f"{provider} left out: its products on CPUs are in fp32 only"
    if not hardware.has_products(AUTOCAST_DTYPES[precision] or torch.float32):
        return f"{provider} left out: this CPU has no products in {precision}"
    return None


def make_peer(provider: str, name: str, config: Any = None, **kwargs: Any) -> nn.Module:
    """One of ``PEERS``, with the weights of the same model of ``insvp_fast.bench.models``."""
    kind, by = provider.split(" ")
    model = models.make_model(kind, name, config, **kwargs).eval()
    img_size = getattr(model, "backbone", model).patch_embed.img_size
    if kind == "insvp_fast":
        model = standard_model(model)
    if by == "freezing":  # now, not in a run: others that were compiled before would be compiled again
        torch.compiler.reset()
    return Peer(model, BUILD[by], img_size)


class Peer(nn.Module):
    """Logits of a model by another program."""

    def __init__(self, model: nn.Module, build: Callable[[nn.Module, Tensor, bool], Infer], img_size: Any) -> None:
        super().__init__()
        self.model, self.build = model, build
        self.backbone = SimpleNamespace(patch_embed=SimpleNamespace(img_size=img_size))  # all that ``make_images`` asks
        self.infer: Infer | None = None

    def forward(self, image: Tensor) -> Tensor:
        bf16 = torch.is_autocast_enabled("cpu")
        if self.infer is None:
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
                self.infer = self.build(self.model, image.clone(), bf16)
            for _ in range(2):  # a compiler may wait for a second call
                self.infer(image)
        return self.infer(image)


def _freezing(model: nn.Module, image: Tensor, bf16: bool) -> Infer:
    """torch.compile that takes the weights for constants, and packs them."""
    from torch._inductor import config

    compiled = torch.compile(model, dynamic=False, fullgraph=True)

    def infer(image: Tensor) -> Tensor:
        with torch.no_grad(), config.patch(freezing=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return compiled(image)

    return infer


def _openvino(model: nn.Module, image: Tensor, bf16: bool) -> Infer:
    import openvino

    converted = openvino.convert_model(_trace(model, image), input=[openvino.PartialShape(list(image.shape))])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    compiled = openvino.compile_model(converted, "CPU", settings)
    return lambda image: torch.from_numpy(compiled(image.numpy(), share_inputs=True)[0])


def _onnxruntime(model: nn.Module, image: Tensor, bf16: bool) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        program = torch.onnx.export(_trace(model, image), dynamo=True, input_names=["images"], verbose=False)
        assert program is not None
        program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"images": image.numpy()})[0])


def _trace(model: nn.Module, image: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (image,), strict=True).run_decompositions({})


BUILD: dict[str, Callable[[nn.Module, Tensor, bool], Infer]] = {
    "freezing": _freezing,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}
