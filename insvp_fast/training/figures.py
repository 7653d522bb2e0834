"""The pictures of a run: the learning curves, what the prompts look like, and which classes are confused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from insvp_fast.reference import InsVPReference

__all__ = ["draw_confusion", "draw_curves", "draw_prompts"]

NAMED = 40  # classes whose names can be read beside a confusion matrix


def draw_curves(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Training loss and validation accuracy over the epochs, one line per model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"loss": "training loss", "val_accuracy": "validation accuracy"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for model in dict.fromkeys(record["model"] for record in records):
            own = [record for record in records if record["model"] == model and record[key] is not None]
            axes.plot([r["epoch"] for r in own], [r[key] for r in own], marker=".", label=model)
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(file, dpi=120)


@torch.inference_mode()
def draw_prompts(model: InsVPReference, images: Tensor, preprocessing: dict[str, Any], file: Path) -> None:
    """One column per image [B, 3, H, W]: the image, the parts of its prompt, the prompt, and the prompted image."""
    parts = model.eval().image_prompt(images)
    every: dict[str, Tensor | None] = {
        "image": _as_picture(images, preprocessing),
        "global prompt": _as_relief(parts.global_),
        "patch prompt": _as_relief(parts.patch),
        "image prompt": _as_relief(parts.prompt),
        "prompted image": _as_picture(parts.prompted, preprocessing),
    }
    rows = {name: pictures for name, pictures in every.items() if pictures is not None}
    figure = Figure(figsize=(1.2 * len(images) + 1.2, 1.25 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(images), squeeze=False)
    for (name, pictures), line in zip(rows.items(), panels, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(file, dpi=120)


def draw_confusion(confusion: Tensor, class_names: Sequence[str], file: Path) -> None:
    """The confusion matrix [classes, classes] as parts of each row, with names and numbers where they can be read."""
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    classes = len(class_names)
    side = min(12.0, 3 + 0.3 * classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class", title="part of the true class's images")
    if classes <= NAMED:
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=7)
        axes.set_yticks(range(classes), class_names, fontsize=7)
        for row, column in confusion.nonzero().tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, shrink=0.8)
    figure.savefig(file, dpi=120)


def _as_picture(images: Tensor, preprocessing: dict[str, Any]) -> Tensor:
    mean, std = (images.new_tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).float()


def _as_relief(prompt: Tensor | None) -> Tensor | None:
    """A prompt has both signs: zero becomes gray, and each picture is stretched to its own range."""
    if prompt is None:
        return None
    reach = prompt.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    return (0.5 + 0.5 * prompt / reach).float()
