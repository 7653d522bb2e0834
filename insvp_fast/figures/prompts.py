"""Pictures of prompts: what InsVP adds to an image, and what that changes in the model's view of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from insvp_fast.errors import InsVPError
from insvp_fast.figures.grad_cam import grad_cam
from insvp_fast.figures.modes import evaluating
from insvp_fast.figures.style import HIGHLIGHT, SEQUENTIAL, drawable, drawing
from insvp_fast.probabilities import finite_probabilities
from insvp_fast.reference import ImagePrompt
from insvp_fast.reference.prompted import PromptedReference

__all__ = ["PromptedImages", "denormalize", "explain", "one_per_class", "pictures_of", "plot_prompts", "to_gray_range"]

LABEL_WIDTH, MAX_LABEL = 20, 100  # characters in a line beside an image, and in its lines
CAPTION = (
    "Prompts: gray is 0; each is scaled to its largest magnitude, max, in units of the normalized image."
    " Heat map: mean magnitude of the image prompt's channels, on one scale for all rows.\n"
    "Grad-CAM: of the predicted class, each scaled to its maximum. Without prompts: the same head on the bare frozen"
    " backbone."
)


class PromptedImages(NamedTuple):
    """A batch of images with the parts of their prompts, each [B, C, H, W]; None where a prompt is switched off.

    Attributes:
        prompted_image: None where there is no image prompt.
        heat_map: the mean magnitude of the image prompt over the channels, [B, H, W].
        grad_cam, grad_cam_without_prompts: of the predicted classes, [B, H, W]; the latter by the bare frozen backbone
            with the same head. None where the backbone has none.
        probabilities: [B, classes].
    """

    image: Tensor
    global_prompt: Tensor | None
    patch_prompt: Tensor | None
    image_prompt: Tensor | None
    heat_map: Tensor | None
    prompted_image: Tensor | None
    grad_cam: Tensor | None
    grad_cam_without_prompts: Tensor | None
    probabilities: Tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what there is."""
        return ((name, part) for name, part in self._asdict().items() if part is not None)


def explain(model: nn.Module, images: Tensor) -> tuple[PromptedImages, str | None]:
    """The prompts of images [B, C, H, W] and the maps that belong to them, on the CPU in fp32.

    Args:
        model: of any method; one without image prompts has only the maps, one that changes the backbone not even those.

    Returns:
        They, and why there is no Grad-CAM, if there is none.

    Raises:
        TrainingError: as ``finite_probabilities``.
    """
    with torch.inference_mode(), evaluating(model):
        prompts_of: Any = getattr(model, "image_prompt", lambda _: ImagePrompt(None, None, None, images))
        prompt = prompts_of(images)
        chances = finite_probabilities(model(images).float(), getattr(model, "multi_label", False))
    heat_map = None if prompt.prompt is None else prompt.prompt.abs().mean(1)
    cams: list[Tensor | None] = [None, None]
    reason, classes = None, chances.argmax(1).tolist()
    try:
        if not isinstance(model, PromptedReference):
            raise InsVPError(f"no Grad-CAM of a {type(model).__name__}: its method changes the backbone")
        cams = [grad_cam(model, images, classes, prompts) for prompts in (True, False)]
    except InsVPError as error:
        reason = str(error)
    prompted = None if prompt.prompt is None else prompt.prompted
    parts: Any = (images, prompt.global_, prompt.patch, prompt.prompt, heat_map, prompted, *cams, chances)
    parts = [None if part is None else part.detach().float().cpu() for part in parts]
    return PromptedImages(*parts), reason


def one_per_class(classes: Sequence[int], most: int) -> list[int]:
    """The index of the first image of each class; of more classes than ``most``, of some evenly among them."""
    first: dict[int, int] = {}
    for index, label in enumerate(classes):
        first.setdefault(int(label), index)
    present = sorted(first)
    step = max(1, -(-len(present) // most))
    return [first[label] for label in present[::step]]


def plot_prompts(
    shown: PromptedImages,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    file: str | Path,
    *,
    names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> None:
    """One row per image: the image, its prompts, their heat map, the prompted image, and Grad-CAM.

    Args:
        preprocessing: the mean and std that the images were normalized with.
        names: of the images, to be written beside them.
        classes: their true classes, to be compared with the predicted ones.
    """
    columns, count = pictures_of(shown, preprocessing), len(shown.image)
    with drawing(file, 1.22 * len(columns) + 1.5, 1.32 * count + 0.9) as figure:
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.03, h_pad=0.02)
        panels = figure.subplots(count, len(columns), squeeze=False)
        for (title, (pictures, notes)), column in zip(columns.items(), panels.T, strict=True):
            for i, axes in enumerate(column):
                _show(axes, pictures[i], "" if notes is None else notes[i])
            column[0].set_title(title, fontsize=9)
        for i, axes in enumerate(panels[:, 0]):
            best = int(shown.probabilities[i].argmax())
            lines = [] if names is None else [names[i]]
            lines += [] if classes is None else [f"true: {class_names[classes[i]]}"]
            predicted = f"predicted: {class_names[best]} ({shown.probabilities[i, best]:.0%})"
            _label_row(axes, lines, predicted, wrong=classes is not None and classes[i] != best)
        figure.supxlabel(CAPTION, fontsize=7, color="0.35")


def pictures_of(
    shown: PromptedImages, preprocessing: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Sequence[str] | None]]:
    """Pictures [B, 3, H, W] in [0, 1] of what there is, and what to write below each, by their title."""
    image = denormalize(shown.image, preprocessing)
    columns: dict[str, tuple[Tensor, Sequence[str] | None]] = {"image": (image, None)}
    for name in ("global_prompt", "patch_prompt", "image_prompt"):
        prompt = getattr(shown, name)
        if prompt is not None:
            largest = [f"max {value:.2g}" for value in prompt.abs().amax((1, 2, 3))]
            columns[name.replace("_", "\n")] = to_gray_range(prompt), largest
    if shown.heat_map is not None and shown.prompted_image is not None:
        colors = _colored(shown.heat_map / shown.heat_map.max().clamp(min=1e-12))
        columns["its\nheat map"] = colors, [f"mean {value:.2g}" for value in shown.heat_map.mean((1, 2))]
        columns["prompted\nimage"] = denormalize(shown.prompted_image, preprocessing), None
    for word, cam in {"with": shown.grad_cam, "without": shown.grad_cam_without_prompts}.items():
        if cam is not None:
            columns[f"Grad-CAM\n{word} prompts"] = overlay(image, cam), None
    return columns


def _show(axes: Axes, picture: Tensor, note: str) -> None:
    axes.imshow(picture.permute(1, 2, 0).numpy())
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(note, fontsize=7, labelpad=2, color="0.35")


def _label_row(axes: Axes, lines: Sequence[str], predicted: str, wrong: bool) -> None:
    """Lines of text to the left of an image, the last in another color if it is wrong."""
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "fontsize": 8}
    text = "\n".join(textwrap.fill(drawable(line, MAX_LABEL), LABEL_WIDTH) for line in lines)
    axes.text(-0.08, 0.52, text, va="bottom", **place)
    color = HIGHLIGHT if wrong else "black"
    axes.text(-0.08, 0.48, textwrap.fill(drawable(predicted, MAX_LABEL), LABEL_WIDTH), va="top", color=color, **place)


def _colored(values: Tensor) -> Tensor:
    """Values in [0, 1], [B, H, W], as colors, [B, 3, H, W]."""
    colors = matplotlib.colormaps[SEQUENTIAL](values.numpy())[..., :3]
    return torch.from_numpy(colors).permute(0, 3, 1, 2)


def overlay(image: Tensor, cam: Tensor) -> Tensor:
    """Grad-CAM in colors over the image in gray."""
    gray = image.mean(1, keepdim=True)
    return 0.4 * gray + 0.6 * _colored(cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12))


def denormalize(images: Tensor, preprocessing: Mapping[str, Any]) -> Tensor:
    """Pixels in [0, 1], from a model's input."""
    mean, std = (images.new_tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).float()


def to_gray_range(prompt: Tensor) -> Tensor:
    """Pixels in [0, 1]: 0 becomes gray, and the largest magnitude of each prompt becomes black or white."""
    largest = prompt.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    return (0.5 + 0.5 * prompt / largest).float()
