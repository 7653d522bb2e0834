"""Whether an exported file computes what the model does, and what 8-bit weights cost."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from insvp_fast.data import transform_for
from insvp_fast.data.images import Images
from insvp_fast.errors import ExportError
from insvp_fast.export.facts import NOTHING, ExportedModel, Facts
from insvp_fast.methods.load import AnyModel
from insvp_fast.probabilities import decide
from insvp_fast.testing import relative_error

__all__ = ["TOLERANCE", "Loss", "Parity", "check_parity", "measure_loss", "run_in_new_process"]

TOLERANCE = 1e-5  # of logits in fp32, relative: as between the fast path and the reference


class Parity(NamedTuple):
    """How far the logits of a batch are from the model's."""

    batch: int
    relative_error: float
    largest_difference: float

    def __str__(self) -> str:
        errors = f"relative error {self.relative_error:.1e}, largest difference {self.largest_difference:.1e}"
        return f"batch {self.batch}: {errors}"


def check_parity(model: AnyModel, run: Callable[[list[Tensor]], list[Tensor]], facts: Facts) -> list[Parity]:
    """Compare the logits of noise in batches of 1 and 7, or of the fixed batch.

    Args:
        run: gives the file's logits of each batch.

    Raises:
        ExportError: if a relative error is above ``TOLERANCE``.
    """
    generator = torch.Generator().manual_seed(0)
    images, inputs = zip(*(_noise(facts, batch, generator) for batch in facts.batches), strict=True)
    results = []
    for batch, found, image in zip(facts.batches, run(list(images)), inputs, strict=True):
        with torch.no_grad():
            expected = model(image)
        results.append(Parity(batch, relative_error(found, expected), (found - expected).abs().max().item()))
        if not results[-1].relative_error <= TOLERANCE:  # nor NaN
            raise ExportError(f"the exported logits are not the model's: {results[-1]}: expected {TOLERANCE:.0e}")
    return results


def _noise(facts: Facts, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images for the file, and the same for the model."""
    if facts.inside == NOTHING:
        images = torch.randn([batch, *(size or 1 for size in facts.input[1:])], generator=generator)
        return images, images
    assert facts.preprocessing is not None
    H, W = facts.preprocessing["input_size"][-2:]
    side = (3 * H + 1, W + 5, 3) if batch == 1 else (H + 3, 2 * W + 1, 3)
    pictures = [
        Image.fromarray(torch.randint(256, side, dtype=torch.uint8, generator=generator).numpy()) for _ in range(batch)
    ]
    transform = transform_for(facts.preprocessing)
    return torch.stack([*map(facts.prepare, pictures)]), torch.stack([*map(transform, pictures)])


def run_in_new_process(file: Path, batches: list[Tensor]) -> list[Tensor]:
    """The logits of each batch by a file that another Python process loads.

    Raises:
        ExportError: with the last line of what it printed, if it fails.
    """
    code = (
        "import sys; from safetensors.torch import load_file, save_file; from insvp_fast.export import load;"
        "run, batches = load(sys.argv[1]), load_file(sys.argv[2]);"
        "save_file({name: run(images) for name, images in batches.items()}, sys.argv[3])"
    )
    with tempfile.TemporaryDirectory() as folder:
        source, result = f"{folder}/images", f"{folder}/logits"
        save_file({str(i): images.contiguous() for i, images in enumerate(batches)}, source)
        done = subprocess.run([sys.executable, "-c", code, file, source, result], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ExportError(f"a new process cannot run the exported file: {lines[-1]}")
        logits = load_file(result)
        return [logits[str(i)] for i in range(len(batches))]


class Loss(NamedTuple):
    """How a file's answers differ from the model's on some images.

    An answer is the likeliest class of an image, or of a model for several labels per image whether it has a label.
    """

    images: int
    accuracy_before: float | None  # the share of right answers; None where classes are unknown
    accuracy_after: float | None
    agreement: float  # the share of equal answers
    largest_difference: float  # of two logits
    multi_label: bool = False


@torch.no_grad()
def measure_loss(model: AnyModel, exported: ExportedModel, images: Images) -> Loss:
    """Classify images one by one with both; a class of -1 is unknown."""
    assert model.preprocessing is not None
    transform = transform_for(model.preprocessing)
    batch = exported.facts.input[0] or 1
    before, after = [], []
    for index in range(len(images)):
        image = images.decode(index)
        before.append(model(transform(image)[None]))
        after.append(exported(exported.facts.prepare(image)[None].repeat(batch, 1, 1, 1))[:1])
    logits = torch.cat(before), torch.cat(after)
    first, second = map(decide, logits) if model.multi_label else (each.argmax(1) for each in logits)
    classes = torch.as_tensor(images.classes)
    known = bool((classes >= 0).all())
    return Loss(
        len(images),
        (first == classes).double().mean().item() if known else None,
        (second == classes).double().mean().item() if known else None,
        (first == second).double().mean().item(),
        (logits[1] - logits[0]).abs().max().item(),
        model.multi_label,
    )
