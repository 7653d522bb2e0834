"""A learning-rate range test (Smith, Cyclical learning rates, WACV 2017, section 3.3)."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from matplotlib.ticker import StrMethodFormatter

from insvp_fast.atomic_files import write_file
from insvp_fast.errors import TrainingError
from insvp_fast.figures.style import drawing
from insvp_fast.training.schedule import scale_lr
from insvp_fast.training.trainer import Trainer

__all__ = ["RangeTest", "range_test"]

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
SMOOTHING = 0.9  # decay of the moving average of the loss
DIVERGED = 4.0  # times the least smoothed loss: the test ends


class RangeTest(NamedTuple):
    """The mean loss of each step, whose learning rate rose exponentially; ``smoothed`` is its moving average."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls most steeply over the logarithm of the rate.

        The first tenth of the steps does not count: an average of few losses follows their noise.

        Raises:
            TrainingError: if the loss never falls.
        """
        first, least = len(self.rates) // 10, int(np.argmin(self.smoothed))
        slopes = np.diff(self.smoothed)[first:least]  # the rates are equally far apart in their logarithms
        if not len(slopes):
            raise TrainingError(
                f"the loss fell at no learning rate from {self.rates[first]:.3g} to {self.rates[-1]:.3g}"
            )
        return self.rates[first + int(slopes.argmin()) + 1]

    def write(self, folder: Path) -> None:
        """Write lr.csv and lr.png into a folder."""
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([self._fields, *zip(*self, strict=True)])
        write_file(folder / "lr.csv", content.getvalue().encode())
        with drawing(folder / "lr.png", 5, 3.6) as figure:
            axes = figure.subplots()
            axes.plot(self.rates, self.losses, color="0.75", label="loss of a step")
            axes.plot(self.rates, self.smoothed, label="smoothed")
            axes.axvline(self.suggestion(), linestyle="--", color="black", label=f"steepest, {self.suggestion():.2g}")
            limits = 0.9 * min(self.losses), 1.2 * max(self.smoothed[: int(np.argmin(self.smoothed)) + 1])
            axes.set(xscale="log", ylim=limits)  # it diverges; how far is of no interest
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.set(xlabel="learning rate", ylabel="training loss", title="learning-rate range test")
            axes.legend()


def range_test(trainer: Trainer, highest: float = HIGHEST, steps: int = STEPS) -> RangeTest:
    """Train for some steps while the learning rate rises exponentially, till the loss diverges.

    Everything but the rate is as in training. Afterwards the trainer is what it was, to the bit.

    Args:
        highest: the last rate, as in the recipe, before it is scaled with the images per step.

    Raises:
        TrainingError: if the loss is infinite or not a number from the first step on.
    """
    before, lr_of = copy.deepcopy(trainer.state()), trainer.lr_of
    scale = scale_lr(1.0, trainer.recipe, trainer.accelerator.num_processes)
    first = trainer.epoch * trainer.steps_per_epoch + trainer.batch // trainer.recipe.accumulate
    rates = np.geomspace(LOWEST, highest, steps).tolist()
    trainer.lr_of = lambda step: scale * rates[step - first]  # type: ignore[method-assign]
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    try:
        for loss in itertools.islice(_losses_of_steps(trainer), steps):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            now = average / (1 - SMOOTHING ** (len(losses) + 1))
            if not math.isfinite(now) or (smoothed and now > DIVERGED * min(smoothed)):
                break
            losses.append(loss)
            smoothed.append(now)
    finally:
        trainer.lr_of = lr_of  # type: ignore[method-assign]
        trainer.restore(before)
    if not losses:
        raise TrainingError(f"the loss is {loss} at the lowest learning rate, {rates[0]:.3g}: expected a finite one")
    return RangeTest(rates[: len(losses)], losses, smoothed)


def _losses_of_steps(trainer: Trainer) -> Iterator[float]:
    """Train, one epoch after the other; the mean loss of each step in all processes."""
    loader, accumulate = trainer.train_loader, trainer.recipe.accumulate
    trainer.model.train()
    trainer.losses = []
    while True:
        loader.sampler.epoch, loader.sampler.first_batch = trainer.epoch, trainer.batch
        for images, targets in loader:
            trainer.train_batch(images, targets)
            trainer.batch += 1
            if trainer.batch % accumulate == 0 or trainer.batch == len(loader):
                batches = range(trainer.batch - len(trainer.losses), trainer.batch)
                total = sum(gather_object([torch.stack(trainer.losses).double().sum().item()]))
                trainer.losses = []
                yield total / sum(sum(loader.sampler.sizes(batch)) for batch in batches)
        trainer.epoch, trainer.batch = trainer.epoch + 1, 0
