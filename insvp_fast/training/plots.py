"""The plots of a run: learning curves, prompts, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from insvp_fast.reference import InsVPReference

__all__ = ["plot_confusion", "plot_curves", "plot_prompts"]

MAX_NAMED = 40  # with more classes, their names beside a confusion matrix could not be read


def plot_curves(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Training loss and validation accuracy over the epochs, one line per model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"loss": "training loss", "val_accuracy": "validation accuracy"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for model in dict.fromkeys(record["model"] for record in records):
            own = [record for record in records if record["model"] == model and record.get(key) is not None]
            axes.plot([r["epoch"] for r in own], [r[key] for r in own], marker=".", label=model)
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(file, dpi=120)


@torch.inference_mode()
def plot_prompts(model: InsVPReference, images: Tensor, preprocessing: dict[str, Any], file: Path) -> None:
    """One column per image [B, 3, H, W]: the image, the parts of its prompt, the prompt, and the prompted image."""
    prompt = model.eval().image_prompt(images)
    candidates: dict[str, Tensor | None] = {
        "image": _denormalize(images, preprocessing),
        "global prompt": _to_gray_range(prompt.global_),
        "patch prompt": _to_gray_range(prompt.patch),
        "image prompt": _to_gray_range(prompt.prompt),
        "prompted image": _denormalize(prompt.prompted, preprocessing),
    }
    rows = {name: pictures for name, pictures in candidates.items() if pictures is not None}
    figure = Figure(figsize=(1.2 * len(images) + 1.2, 1.25 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(images), squeeze=False)
    for (name, pictures), row in zip(rows.items(), panels, strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=8)
    figure.savefig(file, dpi=120)


def plot_confusion(confusion: Tensor, class_names: Sequence[str], file: Path) -> None:
    """The confusion matrix [true class, predicted class], each row normalized to 1; with few classes, labeled."""
    fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    classes = len(class_names)
    side = min(12.0, 3 + 0.3 * classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class", title="fraction of the true class's images")
    if classes <= MAX_NAMED:
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=7)
        axes.set_yticks(range(classes), class_names, fontsize=7)
        for row, column in confusion.nonzero().tolist():
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, shrink=0.8)
    figure.savefig(file, dpi=120)


def _denormalize(images: Tensor, preprocessing: dict[str, Any]) -> Tensor:
    """Pixels in [0, 1], from a model's input."""
    mean, std = (images.new_tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).float()


def _to_gray_range(prompt: Tensor | None) -> Tensor | None:
    """Pixels in [0, 1]: 0 becomes gray, and the largest magnitude of each prompt becomes black or white."""
    if prompt is None:
        return None
    largest = prompt.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    return (0.5 + 0.5 * prompt / largest).float()
