"""What a report shows of a run's model: its metrics on the test images, and the images on which it is most wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.figures.prompts import PromptedImages, explain
from insvp_fast.probabilities import decide
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.counter import Counter
from insvp_fast.training.load import load_run, own_test_data
from insvp_fast.training.loader import Loader
from insvp_fast.training.metrics import Metrics, MultiLabelMetrics, metrics_of_labels, metrics_of_pairs
from insvp_fast.training.sampler import BatchSampler

__all__ = ["Mistakes", "Results", "find_results"]


class Mistakes(NamedTuple):
    """Images that are classified wrongly, those of the largest loss first.

    Attributes:
        names, targets, losses: of each image; its file, true class or multi-hot labels, and loss.
        shown: they with their prompts, None if there are no mistakes.
        reason: why there is no Grad-CAM, if there is none.
    """

    names: list[str]
    targets: Tensor
    losses: list[float]
    shown: PromptedImages | None
    reason: str | None


class Results(NamedTuple):
    """The metrics of a run's model on its test images in fp32, its worst mistakes, and their number."""

    metrics: Metrics | MultiLabelMetrics
    mistakes: Mistakes
    wrong: int
    class_names: list[str]
    preprocessing: dict[str, Any]


def find_results(
    folder: str | Path,
    most: int,
    batch_size: int | None = None,
    workers: int | None = None,
    backbone: str | None = None,
) -> Results:
    """Test the model of a run on its test images, in this process.

    Args:
        most: the number of mistakes to show.
        batch_size, workers: None for those of the run.
        backbone: as in ``load_run``.

    Raises:
        TrainingError: if it is no finished run, or the logits of its model are not a number.
        DataError: if its data are not there, have other classes, or an image cannot be read.
    """
    _, model, preprocessing, names, _ = run = load_run(folder, backbone)
    images = own_test_data(run)
    assert names is not None  # those of a run
    batch_size, workers = run.loading(batch_size, workers)
    device = create_accelerator().device
    loader = Loader(images, BatchSampler(len(images), batch_size), workers, device)
    model = model.to(device).float()
    with Counter("report", len(images)) as counter, torch.inference_mode():  # type: ignore[arg-type]
        parts = []
        for batch, targets in loader:
            targets = targets.cpu()
            parts.append((targets, *_judge(model(batch).float().cpu(), targets)))
            counter.add(len(targets))
    targets, found, losses = (torch.cat(part) for part in zip(*parts, strict=True))
    metrics: Metrics | MultiLabelMetrics
    if model.multi_label:
        wrong = (decide(found) != (targets > 0.5)).any(1)
        metrics = metrics_of_labels(targets, found, losses.mean().item())
    else:
        hits, wrong = found == targets[:, None], found[:, 0] != targets
        pairs = torch.stack([targets, found[:, 0]])
        metrics = metrics_of_pairs(pairs, len(names), int(hits.any(1).sum()), losses.mean().item())
    ranked = losses.masked_fill(~wrong, -1).argsort(descending=True, stable=True)
    worst = ranked[: min(most, int(wrong.sum()))].tolist()
    shown, reason = None, None
    if worst:
        shown, reason = _explain(model, images, worst, batch_size)
    mistakes = Mistakes([images.name(i) for i in worst], targets[worst], losses[worst].tolist(), shown, reason)
    return Results(metrics, mistakes, int(wrong.sum()), names, preprocessing)


def _explain(model: Any, images: Any, chosen: Sequence[int], batch: int) -> tuple[PromptedImages, str | None]:
    """``explain`` of the chosen images, so many at a time."""
    device, parts = next(model.parameters()).device, []
    for start in range(0, len(chosen), batch):
        stacked = torch.stack([images[index][0] for index in chosen[start : start + batch]])
        parts.append(explain(model, stacked.to(device)))
    columns = zip(*(shown for shown, _ in parts), strict=True)
    joined: Any = [None if any(part is None for part in column) else torch.cat(column) for column in columns]
    return PromptedImages(*joined), next((reason for _, reason in parts if reason), None)


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The five likeliest classes of each image, or with several labels its logits; and its loss."""
    if targets.ndim == 1:
        return logits.topk(min(5, logits.shape[1])).indices, F.cross_entropy(logits, targets, reduction="none")
    return logits, F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
