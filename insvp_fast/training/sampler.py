"""Which images each process sees, in which order, and with which random augmentation.

All of it follows from the seed, the epoch and the image alone. So a run can resume in the middle of an epoch without
loading the images before, and several processes share the batches that one process would have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from insvp_fast.training.balance import balanced_order

__all__ = ["BatchSampler", "Sample", "SeededDataset"]

Sample = tuple[int, int, int]  # the epoch, the index of the image, and how often it was drawn before in this epoch


class BatchSampler(Sampler[list[Sample]]):
    """The batches of one process in epoch ``epoch``, from batch ``first_batch`` on; both are attributes to be set.

    A global batch has ``batch_size`` images for each process. The last one of an epoch has the images that are left,
    shared as evenly as possible.

    Args:
        num_images: in the data set.
        batch_size: images per process.
        seed: of the permutations, a new one in each epoch; None for the order of the data set.
        fill_empty: a process whose share is empty gets an image that ``sizes`` does not count: in distributed training
            every process has to take part in backward.
        balance: the class of each image, [N], to draw every class equally often in an epoch, see ``balanced_order``;
            None draws every image once.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        num_processes: int = 1,
        fill_empty: bool = False,
        balance: Tensor | None = None,
    ) -> None:
        self.num_images, self.batch_size, self.seed, self.balance = num_images, batch_size, seed, balance
        self.rank, self.num_processes, self.fill_empty = rank, num_processes, fill_empty
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.num_images // (self.batch_size * self.num_processes))

    def sizes(self, batch: int) -> list[int]:
        """The number of images of a batch in each process."""
        global_batch = self.batch_size * self.num_processes
        left = min(global_batch, self.num_images - batch * global_batch)
        return [left // self.num_processes + (rank < left % self.num_processes) for rank in range(self.num_processes)]

    def __iter__(self) -> Iterator[list[Sample]]:
        order = self._order()
        for batch in range(self.first_batch, len(self)):
            sizes, start = self.sizes(batch), batch * self.batch_size * self.num_processes
            own = order[start + sum(sizes[: self.rank]) :][: sizes[self.rank]]
            if not own and self.fill_empty:
                own = order[:1]
            if own:
                yield [(self.epoch, index, repetition) for index, repetition in own]

    def _order(self) -> list[tuple[int, int]]:
        """The images of all processes, each with how often it was drawn before."""
        if self.seed is None:
            return [(index, 0) for index in range(self.num_images)]
        generator = torch.Generator().manual_seed(_combine(self.seed, self.epoch))
        if self.balance is not None:
            return balanced_order(self.balance, generator)
        return [(index, 0) for index in torch.randperm(self.num_images, generator=generator).tolist()]


class SeededDataset(Dataset):
    """A data set whose random augmentation depends on the seed and the sample alone, not on the worker that loads it.

    Args:
        seed: None leaves the random generators as they are.
    """

    def __init__(self, dataset: Dataset, seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, sample: Sample) -> Any:
        index = sample[1]
        if self.seed is not None:
            seed = _combine(self.seed, *sample)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU too
        return self.dataset[index]


def _combine(*numbers: int) -> int:
    """A seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
