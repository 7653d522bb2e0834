"""The settings of a run, and the models they stand for."""

import json

import pytest

from insvp_fast.errors import InsVPError
from insvp_fast.training.candidates import insvp_config
from insvp_fast.training.recipe import Recipe


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("accumulate", 0, "at least 1"),
        ("lr_scale", "double", "one of none, linear, sqrt"),
        ("ema", 1.0, r"a number in \[0, 1\)"),
        ("mix_prob", 2.0, r"a number in \[0, 1\]"),
        ("specific_kernels", (7, 8, 3), "three odd positive integers"),
        ("specific_kernels", ["7", "9", "3"], "three odd positive integers"),
        ("specific_kernels", 7, "three odd positive integers"),
        ("trackers", ("mlflow",), "some of tensorboard, wandb"),
        ("trackers", None, "some of tensorboard, wandb"),
        ("epochs", "ten", "a value of type int"),
        ("method_options", [8], "NAME=VALUE"),
        ("epochs", True, "a value of type int"),
        ("lr", True, "a value of type float"),
        ("data", None, "a value of type str"),
        *((name, "", "a name or a path") for name in ("data", "root", "backbone", "checkpoint", "init_from", "output")),
    ],
)
def test_a_setting_that_does_not_fit_is_named(field, value, expected):
    with pytest.raises(InsVPError, match=f"`{field}` is .*: expected {expected}"):
        Recipe(**{field: value})


def test_a_recipe_comes_back_from_json():
    recipe = Recipe(specific_kernels=(7, 9, 3), trackers=("wandb",), root="images", seed=4)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_prompt_length_is_the_presets_unless_given():
    assert insvp_config(Recipe(backbone="vit_base_patch16_224")).prompt_length == 9
    assert insvp_config(Recipe(released=True)).prompt_length == 16
    assert insvp_config(Recipe()).prompt_length == 4
    assert insvp_config(Recipe(prompt_length=3)).prompt_length == 3
