"""Loading batches onto the device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from insvp_fast.errors import DataError
from insvp_fast.training.balance import targets_of
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.sampler import BatchSampler, SeededDataset
from insvp_fast.training.timer import DataTimer

__all__ = ["Loader", "create_loader"]


class Loader:
    """Batches (images [B, C, H, W], targets) on a device; ``timer`` measures how long the device waited for them.

    Targets are class indices [B], or multi-hot, fp32 [B, classes].

    Raises:
        DataError: naming an image that cannot be read.
    """

    def __init__(self, dataset: Dataset, sampler: BatchSampler, workers: int, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        self.timer = DataTimer(device)
        self.loader = DataLoader(
            SeededDataset(dataset, sampler.seed),
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the default one is left to dropout
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            batches = iter(self.loader)
            while True:
                with self.timer, _restored_random_state():
                    batch = next(batches, None)
                if batch is None:
                    return
                images, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
                yield images, targets
        except DataError as error:  # a worker puts its traceback before the message
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[-1]) from error


def create_loader(dataset: Dataset, recipe: Recipe, accelerator: Accelerator, shuffle: bool = False) -> Loader:
    """This process's batches on the accelerator's device, for training (``shuffle``) or evaluation.

    All models of a run see the images in the same order.
    """
    sampler = BatchSampler(
        len(dataset),  # type: ignore[arg-type]  # torch does not declare that data sets have a length
        recipe.batch_size,
        recipe.seed if shuffle else None,
        accelerator.process_index,
        accelerator.num_processes,
        fill_empty=shuffle,
        balance=targets_of(dataset) if shuffle and recipe.sampling == "balanced" else None,
    )
    return Loader(dataset, sampler, recipe.workers, accelerator.device)


@contextmanager
def _restored_random_state() -> Iterator[None]:
    """Without workers, images are augmented in this process; the random numbers of dropout must not depend on it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
