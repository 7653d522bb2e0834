"""Learning rates."""

import math

import pytest

from insvp_fast.training.recipe import Recipe
from insvp_fast.training.schedule import lr_factor, scale_lr


@pytest.mark.parametrize(("warmup", "rising"), [(0.0, 1), (0.1, 1), (0.18, 2), (0.99, 10)])
def test_the_steps_of_the_warm_up_are_rounded_and_at_least_one(warmup, rising):
    factors = [lr_factor(step, 10, warmup) for step in range(10)]
    assert factors[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    falling = [(1 + math.cos(math.pi * i / (10 - rising))) / 2 for i in range(10 - rising)]
    assert factors[rising:] == pytest.approx(falling)


def test_learning_rates_scale_with_the_images_per_step():
    for scale, factor in {"none": 1, "linear": 4, "sqrt": 2}.items():
        recipe = Recipe(batch_size=32, accumulate=4, lr_scale=scale)
        assert scale_lr(1e-3, recipe, num_processes=2) == pytest.approx(factor * 1e-3)
