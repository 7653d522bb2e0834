"""The graph that is exported: a model, perhaps in standard operators, behind its preprocessing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from insvp_fast import __version__
from insvp_fast.data.lists import escaped
from insvp_fast.errors import ExportError, InsVPError
from insvp_fast.export.facts import ALL, NOTHING, Facts
from insvp_fast.export.preprocessing import ExportedPreprocessing
from insvp_fast.methods import DAMVP, VFPT, TunedViT
from insvp_fast.methods.load import AnyModel
from insvp_fast.methods.vfpt import fold_transform
from insvp_fast.model import InsVPViT
from insvp_fast.reference import InsVPReference, PromptMethod
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.reference.structure import in_channels
from insvp_fast.reference.structures import structure_of

__all__ = ["Graph", "capture", "refusal", "standard_model"]


class Graph(NamedTuple):
    """A captured model and what is written beside it; ``axes`` names the open dimensions of its input."""

    program: ExportedProgram
    facts: Facts
    axes: dict[int, str]

    @property
    def operations(self) -> int:
        """The number of calls of this package's operations."""
        return sum(str(node.target).startswith("insvp_fast.") for node in self.program.graph.nodes)


def standard_model(model: AnyModel) -> nn.Module:
    """The same function in PyTorch's own operators, with the parameters of ``model``: its reference.

    A ``TunedViT`` is its own.
    """
    if isinstance(model, TunedViT):
        return model
    backbone = copy.deepcopy(model.backbone)
    if isinstance(model, InsVPViT):
        reference: PromptedReference = InsVPReference(backbone, model.num_classes, model.config)
    else:
        method = copy.deepcopy(model.method)
        reference = PromptedReference(backbone, model.num_classes, method=lambda _: method)
        if isinstance(method, DAMVP):
            method.attach(PromptedReference(backbone, method=PromptMethod))
    reference.load_state_dict(model.state_dict(), assign=True)
    if isinstance(reference.method, VFPT):
        fold_transform(reference.method)
    return reference.eval()


def capture(
    model: AnyModel, *, standard: bool, inside: str = NOTHING, channels_last: bool = False, batch: int | None = None
) -> Graph:
    """Trace a model in evaluation mode, with an open batch unless ``batch`` fixes it.

    Args:
        standard: trace the reference rather than the operations of this package.
        inside: the steps of the preprocessing that are part of the graph, as in ``Facts``.
        channels_last: images are [B, H, W, C].

    Raises:
        ExportError: if preprocessing is asked for and unknown or not of RGB images, the batch is not positive, or the
            model cannot be traced.
    """
    if batch is not None and batch < 1:
        raise ExportError(f"the batch is {batch}: expected 1 or more images, or None for any number")
    if inside != NOTHING and model.preprocessing is None:
        raise ExportError("the adapter does not say how images are prepared: expected its preprocessing to be saved")
    C, H, W = _image_shape(model)
    if inside != NOTHING and C != 3:
        raise ExportError(f"the channels of the images are {C}: expected 3 where preprocessing is inside")
    with refusal("the model cannot be rebuilt in standard operators"):
        module: nn.Module = (standard_model(model) if standard else model).eval()
    if inside != NOTHING:
        assert model.preprocessing is not None
        module = nn.Sequential(ExportedPreprocessing(model.preprocessing, inside == ALL, channels_last), module)
    shape: list[int | None] = [batch, C, *((None, None) if inside == ALL else (H, W))]
    axes = {0: "batch"} if batch is None else {}
    if inside == ALL:
        axes |= {2: "height", 3: "width"}
    if channels_last:
        shape = [shape[0], *shape[2:], C]
        axes = {max(axis - 1, 0): name for axis, name in axes.items()}
    facts = Facts(
        class_names=None if model.class_names is None else list(map(escaped, model.class_names)),
        multi_label=model.multi_label,
        exif_rotation=model.exif_rotation,
        preprocessing=model.preprocessing,
        inside=inside,
        input=shape,
        insvp_fast_version=__version__,
    )
    example = torch.zeros([size or {"batch": 2}.get(axes[axis], H + axis) for axis, size in enumerate(shape)])
    return Graph(_trace(module, example.to(facts.dtype), axes), facts, axes)


def _trace(module: nn.Module, example: Tensor, axes: dict[int, str]) -> ExportedProgram:
    dimensions = {axis: Dim(name) for axis, name in axes.items()}
    with torch.no_grad(), refusal("torch.export cannot trace the model"):
        # not strict, it would replace the calls of all modules, which the fast path takes for a change of the model
        program = torch.export.export(module, (example,), strict=True, dynamic_shapes=(dimensions,))
        program = program.run_decompositions({})  # of autograd functions to the operators in them
    _skip_resampling(program)
    return program


def _skip_resampling(program: ExportedProgram) -> None:
    """Leave out bicubic resampling to the same size, which is the identity and which OpenVINO cannot convert.

    timm resamples position embeddings in every export of a backbone that has ``dynamic_img_size``.
    """
    for node in [*program.graph.nodes]:
        if str(node.target) != "aten._upsample_bicubic2d_aa.vec":
            continue
        source = node.args[0]
        sizes = [tuple(x.meta["val"].shape) for x in (source, node)]
        if all(isinstance(size, int) for size in sum(sizes, ())) and sizes[0] == sizes[1]:
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
    program.graph_module.recompile()


@contextmanager
def refusal(problem: str) -> Iterator[None]:
    """Turn errors of a converter, which have many types and lines, into one sentence.

    Raises:
        ExportError: for any of them.
    """
    try:
        yield
    except (InsVPError, MemoryError):
        raise
    except Exception as error:
        lines = (line.strip().removeprefix("-- ") for line in str(error).splitlines())
        headlines = ":", "Model wasn't fully converted."  # of OpenVINO, which names the operation below
        said = (line for line in lines if line and not line.endswith(headlines))
        raise ExportError(f"{problem}: {next(said, type(error).__name__)}") from error


def _image_shape(model: AnyModel) -> tuple[int, int, int]:
    if model.preprocessing is not None:
        C, H, W = model.preprocessing["input_size"]
        return C, H, W
    backbone: Any = model.backbone
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    H, W = size or backbone.pretrained_cfg["input_size"][1:]
    return in_channels(backbone, structure_of(backbone).patch_size(backbone)), H, W
