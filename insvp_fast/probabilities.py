"""From logits to probabilities and labels, for one label per image or several."""

from __future__ import annotations

from torch import Tensor

from insvp_fast.errors import TrainingError

__all__ = ["LEAST_PROBABILITY", "decide", "finite_probabilities", "probabilities"]

LEAST_PROBABILITY = 0.5  # of a label that an image is taken to have, where it may have several


def probabilities(logits: Tensor, multi_label: bool = False) -> Tensor:
    """The probability of each class, [B, classes]: with several labels per image, each on its own."""
    return logits.sigmoid() if multi_label else logits.softmax(1)


def finite_probabilities(logits: Tensor, multi_label: bool = False) -> Tensor:
    """``probabilities``, to be shown.

    Raises:
        TrainingError: if one is not a number, as of logits that are infinite or not numbers themselves.
    """
    found = probabilities(logits, multi_label)
    if found.isnan().any():
        raise TrainingError("the logits of the model are infinite or not a number: expected finite ones")
    return found


def decide(logits: Tensor) -> Tensor:
    """Which of several labels each image is taken to have, bool [B, classes]."""
    return probabilities(logits, multi_label=True) >= LEAST_PROBABILITY
