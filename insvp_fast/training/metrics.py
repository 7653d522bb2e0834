"""How well a trained model classifies, over all processes: with one label per image, or with several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from insvp_fast.errors import TrainingError
from insvp_fast.probabilities import decide
from insvp_fast.training.loss import plain_loss

__all__ = ["Metrics", "MultiLabelMetrics", "compute_metrics", "metrics_of_labels", "metrics_of_pairs"]

NOT_FINITE = "the logits became infinite or not a number: try a lower `lr`"


class Metrics(NamedTuple):
    """Of a model for one label per image; all but the loss are in [0, 1].

    F1 is the mean over the classes that an image has or was taken for, as scikit-learn's ``f1_score`` with
    ``average="macro"`` computes it.
    """

    loss: float  # cross-entropy per image, without smoothing and weights
    top1: float
    top5: float  # with fewer than five classes, over all of them
    mean_per_class: float  # the mean of the classes' accuracies, over the classes that have images
    f1: float
    per_class: list[float | None]  # accuracies; None for a class without images
    pairs: Tensor  # int64 [2, N]: the true and the predicted class of each image, in no order

    @property
    def images(self) -> int:
        """The number of images."""
        return self.pairs.shape[1]

    @property
    def confusion(self) -> Tensor:
        """Numbers of images, int64 [true class, predicted class]."""
        classes = len(self.per_class)
        return (self.pairs[0] * classes + self.pairs[1]).bincount(minlength=classes**2).view(classes, classes)

    def scores(self) -> dict[str, float]:
        """What a training records of each epoch."""
        scores = {"accuracy": self.top1, "mean_per_class": self.mean_per_class, "f1": self.f1}
        return scores | {"loss": self.loss}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        values = self._asdict() | {"images": self.images, "confusion": self.confusion.tolist()}
        del values["pairs"]
        return values

    def __str__(self) -> str:
        shares = {"top-1": self.top1, "top-5": self.top5, "mean per class": self.mean_per_class, "F1": self.f1}
        return "   ".join(f"{name} {share:.2%}" for name, share in shares.items())


class MultiLabelMetrics(NamedTuple):
    """Of a model for several labels per image; all but the loss are in [0, 1].

    An image is taken to have the labels with a probability of at least 0.5. F1 is the mean over the classes that an
    image has or was taken to have; micro F1 that of all labels together.
    """

    loss: float  # binary cross-entropy per image and class, without smoothing and weights
    map: float  # the mean of the average precisions, over the classes that have images
    f1: float
    f1_micro: float
    per_class: list[float | None]  # average precisions, as scikit-learn's; None for a class without images
    images: int

    def scores(self) -> dict[str, float]:
        """What a training records of each epoch."""
        return {"map": self.map, "f1": self.f1, "f1_micro": self.f1_micro, "loss": self.loss}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return self._asdict()

    def __str__(self) -> str:
        shares = {"mAP": self.map, "macro F1": self.f1, "micro F1": self.f1_micro}
        return "   ".join(f"{name} {share:.2%}" for name, share in shares.items())


def compute_metrics(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    accelerator: Accelerator,
    multi_label: bool = False,
) -> Metrics | MultiLabelMetrics:
    """Evaluate a model on all batches (images, targets); each is evaluated in one of the processes.

    Raises:
        TrainingError: if logits are not a number or, for several labels, infinite.
    """
    # DDP's forward would wait for the processes that have fewer batches
    model = accelerator.unwrap_model(model).to(accelerator.device).eval()
    gathered = gather_object([_evaluate_own(model, batches, num_classes, multi_label)])
    found = torch.from_numpy(np.concatenate([part for part, *_ in gathered], 1))
    loss = sum(loss for _, loss, _ in gathered) / max(1, found.shape[1])
    if multi_label:
        return metrics_of_labels(found[0], found[1], loss)
    return metrics_of_pairs(found, num_classes, sum(hits for *_, hits in gathered), loss)


@torch.inference_mode()
def _evaluate_own(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, multi_label: bool
) -> tuple[np.ndarray, float, int]:
    """Of this process's images: targets and what was found, [2, N] or [2, N, classes]; summed loss; hits in the top 5.

    What is found is the likeliest class, or with several labels the logits.
    """
    found: list[Tensor] = []
    loss, top5_hits = torch.zeros((), dtype=torch.float64), 0
    for images, targets in batches:
        logits = model(images).float()
        loss = loss + plain_loss(logits, targets).double()
        if multi_label:
            found.append(torch.stack([targets, logits]).cpu())  # too much for a device's memory
        else:
            ranking = logits.topk(min(5, num_classes)).indices
            found.append(torch.stack([targets, ranking[:, 0]]))
            top5_hits += (ranking == targets[:, None]).any(1).sum()
    if not found:
        found = [torch.zeros(2, 0, num_classes) if multi_label else torch.zeros(2, 0, dtype=torch.int64)]
    return torch.cat(found, 1).cpu().numpy(), float(loss), int(top5_hits)


def metrics_of_pairs(pairs: Tensor, num_classes: int, top5_hits: int, loss: float = 0.0) -> Metrics:
    """All metrics of ``pairs``, int64 [2, N]: true and predicted classes.

    Args:
        top5_hits: the number of images with their class among the five likeliest.
        loss: per image.

    Raises:
        TrainingError: if the loss is not a number, as that of such logits is.
    """
    if math.isnan(loss):
        raise TrainingError(NOT_FINITE)
    images, predicted = (row.bincount(minlength=num_classes) for row in pairs)
    hits = pairs[0][pairs[0] == pairs[1]].bincount(minlength=num_classes)
    total, present = max(1, pairs.shape[1]), images > 0
    accuracies = hits / images.double()
    mean = accuracies[present].mean().item() if present.any() else 0.0
    per_class = [value if there else None for value, there in zip(accuracies.tolist(), present.tolist(), strict=True)]
    top1 = hits.sum().item() / total
    return Metrics(loss, top1, top5_hits / total, mean, _mean_f1(hits, images, predicted), per_class, pairs)


def metrics_of_labels(targets: Tensor, logits: Tensor, loss: float = 0.0) -> MultiLabelMetrics:
    """All metrics of multi-hot targets and logits, both [N, classes].

    Args:
        loss: per image and class.

    Raises:
        TrainingError: if logits are infinite or not a number.
    """
    if not logits.isfinite().all():
        raise TrainingError(NOT_FINITE)
    from sklearn.metrics import average_precision_score  # over a second

    labels, taken = targets > 0.5, decide(logits)
    hits, images, predicted = (hot.sum(0) for hot in (labels & taken, labels, taken))
    present = images > 0
    precisions: list[float | None] = [None] * logits.shape[1]
    for index in present.nonzero()[:, 0].tolist():
        precisions[index] = float(average_precision_score(labels[:, index].numpy(), logits[:, index].numpy()))
    known = [precision for precision in precisions if precision is not None]
    micro = _mean_f1(*(counts.sum()[None] for counts in (hits, images, predicted)))
    f1 = _mean_f1(hits, images, predicted)
    return MultiLabelMetrics(loss, float(np.mean(known)) if known else 0.0, f1, micro, precisions, len(logits))


def _mean_f1(hits: Tensor, images: Tensor, predicted: Tensor) -> float:
    """The mean of F1 = 2 TP / (2 TP + FP + FN) over the classes in which there is anything to count."""
    counted = images + predicted
    f1 = (2 * hits / counted.double())[counted > 0]
    return f1.mean().item() if len(f1) else 0.0
