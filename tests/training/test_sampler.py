"""Which images each process sees."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from insvp_fast.data.images import Images
from insvp_fast.errors import InsVPError
from insvp_fast.training import clusters
from insvp_fast.training.balance import balanced_order, class_weights, targets_of
from insvp_fast.training.run import train
from insvp_fast.training.sampler import BatchSampler, SeededDataset
from tests.training.small_runs import quick


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 12, 13, 25])
def test_processes_share_the_batches_of_one(count, processes, balanced):
    balance = torch.arange(count).clamp(max=2) if balanced else None  # one image of classes 0 and 1
    alone = BatchSampler(count, 3 * processes, seed=1, balance=balance)
    shares = [BatchSampler(count, 3, 1, rank, processes, True, balance) for rank in range(processes)]
    for order in (alone, *shares):
        order.epoch = 2
    batches = [list(order) for order in shares]
    assert {len(part) for part in batches} == {len(alone)}
    for number, whole in enumerate(alone):
        sizes = shares[0].sizes(number)
        own = [part[number][:size] for part, size in zip(batches, sizes, strict=True)]
        assert [sample for part in own for sample in part] == whole
        assert all(part[number] for part in batches)  # nobody is left out
    if not balanced:
        assert sorted(index for batch in alone for _, index, _ in batch) == list(range(count))


@pytest.mark.parametrize("balance", [None, torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 1])])
def test_an_order_begins_where_it_is_told(balance):
    order = BatchSampler(10, 3, seed=5, balance=balance)
    whole = list(order)
    order.first_batch = 2
    assert list(order) == whole[2:]
    order.first_batch, order.epoch = 0, 1
    assert [index for batch in order for _, index, _ in batch] != [index for batch in whole for _, index, _ in batch]
    assert {epoch for batch in order for epoch, _, _ in batch} == {1}


def test_a_process_without_images_has_no_batch_where_it_may_be_left_out():
    shares = [BatchSampler(1, 3, rank=rank, num_processes=3) for rank in range(3)]
    assert [list(order) for order in shares] == [[[(0, 0, 0)]], [], []]


@pytest.mark.parametrize(("counts", "least"), [((1, 20, 9), 10), ((5, 0, 6), 5), ((7,), 7), ((1, 1, 1), 1)])
def test_a_balanced_epoch_has_every_class_equally_often(counts, least):
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = balanced_order(targets, torch.Generator().manual_seed(0))
    assert len(order) == len(targets)
    draws = targets[[index for index, _ in order]].bincount(minlength=len(counts))
    assert all(least <= drawn <= least + 1 for drawn, count in zip(draws.tolist(), counts, strict=True) if count)
    drawn: dict[int, list[int]] = {}
    for index, repetition in order:
        drawn.setdefault(index, []).append(repetition)
    assert all(sorted(repetitions) == list(range(len(repetitions))) for repetitions in drawn.values())
    for index in targets.unique():  # as often as each other
        often = [len(drawn.get(image, ())) for image in (targets == index).nonzero()[:, 0].tolist()]
        assert max(often) - min(often) <= 1


def test_a_balanced_epoch_mixes_the_classes_and_draws_any_of_them_once_more():
    targets = torch.arange(3).repeat_interleave(torch.tensor([10, 10, 11]))
    orders = [balanced_order(targets, torch.Generator().manual_seed(seed)) for seed in range(9)]
    drawn = [targets[[index for index, _ in order]] for order in orders]
    assert {one.bincount().argmax().item() for one in drawn} == {0, 1, 2}
    assert all(len(one[:10].unique()) == 3 for one in drawn)


def test_an_image_that_is_drawn_again_is_augmented_anew():
    """In one epoch or another, and otherwise than another image, or with another seed."""

    class Noise:
        def __getitem__(self, index):
            return random.random(), torch.rand(()).item()

    noise = SeededDataset(Noise(), seed=3)
    assert noise[2, 7, 0] == noise[2, 7, 0]
    others = [noise[2, 7, 1], noise[1, 7, 0], noise[2, 6, 0], SeededDataset(Noise(), seed=4)[2, 7, 0]]
    assert len({noise[2, 7, 0], *others}) == 5


@pytest.mark.parametrize("counts", [(1, 4, 5), (3, 0, 3), (2,)])
def test_class_weights_are_the_inverse_frequency_with_a_mean_of_one(counts):
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    weights = class_weights(targets, len(counts))
    assert weights[targets].mean().item() == pytest.approx(1, rel=1e-6)
    masses = [weight * count for weight, count in zip(weights.tolist(), counts, strict=True) if count]
    assert masses == pytest.approx([masses[0]] * len(masses), rel=1e-6)
    torch.testing.assert_close(class_weights(torch.eye(len(counts))[targets], len(counts)), weights)


def test_targets_are_found_in_every_data_set():
    images = Images(["a", "b", "c"], [2, 0, 1])
    assert targets_of(ConcatDataset([Subset(images, [2, 0]), images])).tolist() == [1, 2, 2, 0, 1]
    several = Images(["a", "b"], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert targets_of(Subset(several, [1])).tolist() == [[1, 1]]


def test_every_random_generator_follows_from_the_sample():
    class Noise:
        def __getitem__(self, index):
            return np.random.random()

    noise = SeededDataset(Noise(), seed=3)
    assert noise[2, 7, 0] == noise[2, 7, 0] != noise[2, 7, 1]


def test_clusters_are_of_images_of_any_class(pictures, tmp_path, monkeypatch):
    """Of many images only the first are taken, and in a folder those are of one class."""

    def features_of(self, loader, count):
        raise InsVPError(f"classes {sorted(set(next(iter(loader))[1].tolist()))}")

    monkeypatch.setattr(clusters.DAMVP, "features_of", features_of)
    recipe = quick(pictures, tmp_path, method="dam_vp", method_options=("num_prompts=2",), prompt_length=None)
    with pytest.raises(InsVPError, match=r"classes \[0, 1\]"):
        train(recipe)
