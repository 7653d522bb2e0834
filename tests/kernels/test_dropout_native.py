"""The native dropout: the masks and the generator's state of PyTorch, for every instruction set and from every word."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from insvp_fast.runtime import native
from tests.kernels.native_checks import BF16, F32, needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("poison")]


def generator_after(words):
    generator = torch.Generator().manual_seed(7)
    if words:
        torch.zeros(words, dtype=torch.int32).random_(generator=generator)
    return generator


def expected_mask(shape, p, generator):
    return torch.zeros(shape).bernoulli_(1 - p, generator=generator) != 0


@pytest.mark.parametrize("words", [0, 1, 311, 622, 623, 624, 625, 1248])
@pytest.mark.parametrize("n", [1, 2, 7, 311, 312, 313, 511, 512, 513, 624, 5001])
def test_masks_from_every_word(isa, n, words):
    ours, theirs, x = generator_after(words), generator_after(words), torch.randn(n)
    for p in (0.1, 0.5, 1 - 2**-53, 2**-54, 1 - 1e-12):
        y, kept = native.dropout_fwd(x, p, ours)
        assert torch.equal(kept, expected_mask(n, p, theirs))
        assert torch.equal(y, torch.where(kept, x * (torch.ones(()) / (1 - p)), x * 0))
        assert torch.equal(native.dropout_mask((n,), p, ours), expected_mask(n, p, theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(torch.rand(9, generator=ours), torch.rand(9, generator=theirs))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_backward(isa, dtype):
    for n in (0, 1, 17, 5001):
        grad, kept = torch.randn(n).to(dtype), torch.rand(n) < 0.5
        expected = grad * (kept.to(dtype) / torch.tensor(0.7, dtype=torch.float64).item())
        assert torch.equal(native.dropout_bwd(grad, kept, 1 - 0.7), expected)


def test_threads_change_no_bit(threads):
    x = torch.randn(100_003).bfloat16()
    for count in (1, 2, 3, 5):
        threads(count)
        ours, theirs = generator_after(1), generator_after(1)
        assert torch.equal(native.dropout_fwd(x, 0.3, ours)[1], expected_mask(len(x), 0.3, theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_numbers_of_a_normal_distribution_that_wait_are_kept():
    """PyTorch draws these in pairs and keeps the second one in the generator's state."""
    ours, theirs = generator_after(0), generator_after(0)
    for generator in (ours, theirs):
        torch.zeros(1).normal_(generator=generator)
    native.dropout_fwd(torch.ones(100), 0.3, ours), expected_mask(100, 0.3, theirs)
    assert torch.equal(torch.zeros(3).normal_(generator=ours), torch.zeros(3).normal_(generator=theirs))


def test_numbers_that_another_thread_draws_meanwhile_are_not_drawn_again():
    class Shared:
        """Another thread draws from it after its state has been asked for the first time."""

        def __init__(self):
            self.generator, self.asked, self.set_state = torch.Generator().manual_seed(7), 0, None

        def get_state(self):
            self.asked += 1
            state = self.generator.get_state()
            self.set_state = self.generator.set_state
            if self.asked == 1:
                torch.rand(3, generator=self.generator)
            return state

    shared, alone = Shared(), torch.Generator().manual_seed(7)
    _, kept = native.dropout_fwd(torch.ones(400), 0.5, shared)
    torch.rand(3, generator=alone)
    assert torch.equal(kept, expected_mask(400, 0.5, alone))
    assert shared.asked == 4 and torch.equal(shared.generator.get_state(), alone.get_state())


def test_threads_that_draw_at_once_draw_different_numbers():
    x = torch.ones(40_000)
    with ThreadPoolExecutor(4) as pool:
        masks = [*pool.map(lambda _: native.dropout_fwd(x, 0.5, torch.default_generator)[1], range(60))]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)


def test_what_is_refused():
    x, generator = torch.zeros(3), torch.Generator()
    with pytest.raises(TypeError, match="x has dtype"):
        native.dropout_fwd(x.double(), 0.5, generator)
    with pytest.raises(TypeError, match="kept has dtype"):
        native.dropout_bwd(x, x, 0.5)
    with pytest.raises(ValueError, match="grad has shape"):
        native.dropout_bwd(x, torch.zeros(4, dtype=torch.bool), 0.5)
    with pytest.raises(ValueError, match="the generator has 16 bytes of state: expected at least 5016"):
        native.dropout_fwd(x, 0.5, OtherGenerator())


class OtherGenerator:
    """With a shorter state, as those of GPUs have."""

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)


def test_nothing_is_drawn_for_no_element():
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    y, kept = native.dropout_fwd(torch.zeros(0, 3), 0.5, generator)
    assert y.shape == kept.shape == (0, 3) and torch.equal(generator.get_state(), before)
    assert F.dropout(torch.zeros(0, 3), 0.5).shape == (0, 3)
