"""Which images each process sees."""

import pytest

from insvp_fast.training.sampler import BatchSampler


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 12, 13, 25])
def test_processes_share_the_batches_of_one(count, processes, even):
    alone = BatchSampler(count, 3 * processes, seed=1)
    shares = [BatchSampler(count, 3, 1, rank, processes, even, fill_empty=True) for rank in range(processes)]
    for order in (alone, *shares):
        order.epoch = 2
    batches = [list(order) for order in shares]
    assert {len(part) for part in batches} == {len(alone)}
    for number, whole in enumerate(alone):
        sizes = shares[0].sizes(number)
        own = [part[number][:size] for part, size in zip(batches, sizes, strict=True)]
        assert [sample for part in own for sample in part] == whole[: sum(sizes)]
        assert len(whole) - sum(sizes) <= (processes if even else 0)
        assert all(part[number] for part in batches)  # nobody is left out
    if not even:
        assert sorted(index for batch in alone for _, index in batch) == list(range(count))


def test_an_order_begins_where_it_is_told():
    order = BatchSampler(10, 3, seed=5)
    whole = list(order)
    order.first_batch = 2
    assert list(order) == whole[2:]
    order.first_batch, order.epoch = 0, 1
    assert [index for batch in order for _, index in batch] != [index for batch in whole for _, index in batch]
