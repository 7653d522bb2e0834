"""Which images a process sees, when, and how they are augmented: known from seed, epoch and place alone.

So a run can be resumed in the middle of an epoch without loading what it has seen, and several processes share each
batch of one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from insvp_fast.errors import TrainingError
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.waiting import Waiting

__all__ = ["Loader", "Order", "Sample", "loader_for"]

Sample = tuple[int, int]  # the epoch and the image's index


class Order(Sampler[list[Sample]]):
    """The batches of one of several processes in epoch ``epoch``, from batch ``first`` on.

    The batch of all processes together has ``batch_size`` images from each; the epoch's last has what is left, shared
    as evenly as can be. A process that is left with nothing gets an image all the same when ``every_process`` must take
    part, and ``sizes`` does not count it.

    Args:
        count: images in the data set.
        seed: of the permutation, one per epoch; None for the data set's own order.
        even: drop one image of an odd number, which mixing by pairs cannot use, but not the only one.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        processes: int = 1,
        even: bool = False,
        every_process: bool = False,
    ) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.processes = count, batch_size, seed, rank, processes
        self.even, self.every_process = even, every_process
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.count // (self.batch_size * self.processes))

    def sizes(self, batch: int) -> list[int]:
        """How many images of a batch each process has."""
        together = self.batch_size * self.processes
        left = min(together, self.count - batch * together)
        sizes = [left // self.processes + (rank < left % self.processes) for rank in range(self.processes)]
        return [size - size % 2 if self.even and size > 1 else size for size in sizes]

    def __iter__(self) -> Iterator[list[Sample]]:
        order = self._permutation()
        for batch in range(self.first, len(self)):
            sizes, start = self.sizes(batch), batch * self.batch_size * self.processes
            mine = order[start + sum(sizes[: self.rank]) :][: sizes[self.rank]]
            if not mine and self.every_process:
                mine = order[:1]
            if mine:
                yield [(self.epoch, index) for index in mine]

    def _permutation(self) -> list[int]:
        if self.seed is None:
            return list(range(self.count))
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        return torch.randperm(self.count, generator=generator).tolist()


class Drawn(Dataset):
    """A data set whose random augmentation depends on seed, epoch and index, not on the process that does it."""

    def __init__(self, dataset: Dataset, seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, sample: Sample) -> Any:
        epoch, index = sample
        if self.seed is not None:
            seed = _mix(self.seed, epoch, index)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU too
        return self.dataset[index]


class Loader:
    """Batches (images, classes) on a device; its ``order`` says which, its ``waiting`` how long they were awaited.

    Raises:
        TrainingError: naming an image that cannot be read.
    """

    def __init__(
        self, dataset: Dataset, order: Order, workers: int, device: torch.device, transform: Callable | None = None
    ) -> None:
        self.order, self.device, self.transform = order, device, transform
        self.waiting = Waiting(device)
        drawn = Drawn(dataset, order.seed if transform is None else None)
        self.loader = DataLoader(
            drawn,
            batch_sampler=order,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # it draws from it, and not from what dropout draws from
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            batches = iter(self.loader)
            while True:
                with self.waiting, _kept_randomness():
                    batch = next(batches, None)
                if batch is None:
                    return
                images, classes = (part.to(self.device, non_blocking=True) for part in batch)
                yield (images if self.transform is None else self.transform(images)), classes
        except TrainingError as error:  # from a worker, with the worker's traceback in its text
            raise TrainingError(str(error).strip().splitlines()[-1].rpartition("TrainingError: ")[-1]) from error


def loader_for(
    dataset: Dataset,
    recipe: Recipe,
    accelerator: Accelerator,
    shuffle: bool = False,
    transform: Callable | None = None,
) -> Loader:
    """Batches on the accelerator's device; shuffled, every model with the same seed sees them in the same order.

    ``transform`` makes on the device, from a batch, what the data set has not made of its items.
    """
    order = Order(
        len(dataset),  # type: ignore[arg-type]  # torch does not say so, but they have one
        recipe.batch_size,
        recipe.seed if shuffle else None,
        accelerator.process_index,
        accelerator.num_processes,
        even=shuffle and (recipe.mixup > 0 or recipe.cutmix > 0),
        every_process=shuffle,
    )
    return Loader(dataset, order, recipe.workers, accelerator.device, transform)


def _mix(*numbers: int) -> int:
    """A seed that depends on all numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _kept_randomness() -> Iterator[None]:
    """Without workers, images are augmented in the process of the model, whose dropout shall not notice."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
