"""The settings of a run, and the models they stand for."""

import json
import math

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
        ("method_options", ["rank="], "NAME=VALUE"),
        ("seed", 2**32, r"an integer from 0 to 2\^32-1"),
        *(("lr", value, "a positive number") for value in (0.0, math.inf)),
        *(("weight_decay", value, "a number of at least 0") for value in (-0.1, math.inf)),
        ("warmup", -0.1, r"a number in \[0, 1\)"),
        ("mix_prob", -0.1, r"a number in \[0, 1\]"),
        ("epochs", True, "a value of type int"),
        ("lr", True, "a value of type float"),
        ("data", None, "a value of type str"),
        *((name, "", "a name or a path") for name in ("data", "root", "backbone", "checkpoint", "init_from", "output")),
    ],
)
def test_a_setting_that_does_not_fit_is_named(field, value, expected):
    with pytest.raises(InsVPError, match=f"`{field}` is .*: expected {expected}"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 3, "retrain": True}, "`patience` is 3: expected 0 with `retrain`"),
        ({"method": "vp", "compile": "prompters"}, "`compile` is prompters: expected off or model with the method vp"),
        ({"method": "vp", "init_from": "x"}, "`init_from` is x: expected none with the method vp"),
        ({"method": "vp", "released": True}, "`released` is True: expected none with the method vp"),
        ({"mixup": 0.5, "batch_size": 1}, "`batch_size` is 1: expected at least 2 with `mixup`"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(InsVPError, match=message):
        Recipe(**settings)


def test_a_recipe_comes_back_from_json():
    recipe = Recipe(specific_kernels=(7, 9, 3), trackers=("wandb",), root="images", seed=4)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_prompt_length_is_the_presets_unless_given():
    assert insvp_config(Recipe(backbone="vit_base_patch16_224")).prompt_length == 9
    assert insvp_config(Recipe(released=True)).prompt_length == 16
    assert insvp_config(Recipe()).prompt_length == 4
    assert insvp_config(Recipe(prompt_length=3)).prompt_length == 3
