"""Train a model on a data set, and measure its accuracy. Device, precision and distribution are Accelerate's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from insvp_fast.training.data import Data
from insvp_fast.training.recipe import CommandError, Recipe

__all__ = ["evaluate", "fit", "loader_for", "rate"]

CHECK_EVERY = 10  # steps between two looks at the loss: reading it waits for the device

Log = Callable[[dict[str, Any]], None]
Batches = Iterable[list[Tensor]]


def fit(
    model: nn.Module, data: Data, recipe: Recipe, lr: float, accelerator: Accelerator, log: Log
) -> tuple[nn.Module, float]:
    """Train all parameters of ``model`` that require gradients.

    Each epoch is logged. Returns the prepared model and its accuracy in [0, 1] on the test data.

    Raises:
        CommandError: if the loss becomes infinite or not a number.
    """
    optimiser = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=recipe.weight_decay)
    train = loader_for(data.train, recipe, accelerator, shuffle=True)
    val, test = (loader_for(part, recipe, accelerator) for part in (data.val, data.test))
    model, optimiser = accelerator.prepare(model, optimiser)
    steps = recipe.epochs * len(train)  # type: ignore[arg-type]  # a DataLoader, whatever wraps it
    schedule = LambdaLR(optimiser, lambda step: rate(step, steps, recipe.warmup))
    for epoch in range(1, recipe.epochs + 1):
        name = f"epoch {epoch}/{recipe.epochs}"
        loss, speed = _train_epoch(model, train, name, optimiser, schedule, accelerator)
        log({"epoch": epoch, "loss": loss, "val_accuracy": evaluate(model, val, accelerator), "images_per_s": speed})
    return model, evaluate(model, test, accelerator)


def rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a part of its highest: a line up, then a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


def loader_for(dataset: Dataset, recipe: Recipe, accelerator: Accelerator, shuffle: bool = False) -> Batches:
    """Batches on the accelerator's device; shuffled, every model with the same seed sees them in the same order."""
    order = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(dataset, recipe.batch_size, shuffle=shuffle, num_workers=recipe.workers, generator=order)
    return accelerator.prepare(loader)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Batches, accelerator: Accelerator) -> float:
    """The part of all images, in [0, 1], whose class the model finds."""
    model.eval()
    hits = [accelerator.gather_for_metrics(model(images).argmax(1) == classes) for images, classes in loader]
    return torch.cat(hits).double().mean().item()


def _train_epoch(
    model: nn.Module, loader: Batches, name: str, optimiser: Any, schedule: LambdaLR, accelerator: Accelerator
) -> tuple[float, float]:
    """One pass over the data. Returns the mean loss, and images per second on all devices together."""
    model.train()
    losses, seen, start = [], 0, time.perf_counter()
    bar = _progress_bar(loader, name, accelerator)
    for step, (images, classes) in enumerate(bar):
        loss = F.cross_entropy(model(images), classes)
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach())
        seen += len(images) * accelerator.num_processes
        if step % CHECK_EVERY == 0:
            speed = seen / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {_finite(loss, name, schedule):.3f}, {speed:.0f} images/s")
    mean = _finite(torch.stack(losses).mean(), name, schedule)
    return mean, seen / (time.perf_counter() - start)


def _finite(loss: Tensor, where: str, schedule: LambdaLR) -> float:
    value = loss.item()
    if not math.isfinite(value):
        rate_now = f"{schedule.get_last_lr()[0]:.3g}"
        raise CommandError(f"the loss became {value} in {where}, at learning rate {rate_now}: try a lower --lr")
    return value


def _progress_bar(loader: Batches, name: str, accelerator: Accelerator) -> tqdm:
    """A bar in a terminal; nothing in a log file, which has the line of each epoch instead."""
    disable = None if accelerator.is_main_process else True  # None: unless the output is a terminal
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
    return tqdm(loader, desc=name, leave=False, disable=disable, bar_format=layout)
