"""The configuration: the paper by default, validated, and the same after a trip through JSON."""

import json

import pytest

from insvp_fast import InsVPConfig


def test_defaults_are_the_papers():
    config = InsVPConfig()
    assert config.blend_image == pytest.approx((0.7, 0.3)) and config.blend_feature == (0.5, 0.5)
    assert config.prompt_length == 9 and config.specific_input == "image"


def test_released_preset():
    config = InsVPConfig.released(prompt_length=20)
    assert config.blend_image == (2, 1) and config.blend_feature == (1, 1)
    assert (config.global_kernels, config.global_dilations) == ((11, 25), (1, 1))
    assert [config.global_dropout, config.patch_dropout, config.common_dropout, config.specific_dropout] == [0.1] * 4
    assert (
        config.prompt_length == 20 and config.specific_input == "prompted" and config.carry_prompts and not config.simam
    )


@pytest.mark.parametrize(
    ("first", "second", "blend"), [(True, False, (1, 0)), (False, True, (0, 1)), (False, False, (0, 0))]
)
def test_a_lone_prompt_has_weight_one(first, second, blend):
    config = InsVPConfig.released(global_prompt=first, patch_prompt=second, common_prompt=first, specific_prompt=second)
    assert config.blend_image == blend and config.blend_feature == blend


@pytest.mark.parametrize(
    ("choice", "blocks"), [(None, (0, 1, 2, 3)), (0, ()), (2, (0, 1)), ((1, 3), (1, 3)), ([0, 3], (0, 3)), ((), ())]
)
def test_block_indices(choice, blocks):
    config = InsVPConfig(prompted_blocks=choice)
    assert config.block_indices(4) == blocks and config.has_feature_prompt == bool(blocks)


def test_block_indices_beyond_the_backbone():
    with pytest.raises(ValueError, match=r"prompted_blocks=5 asks for block 4, but the backbone has blocks 0 to 3"):
        InsVPConfig(prompted_blocks=5).block_indices(4)


def test_json_round_trip():
    config = InsVPConfig.released(prompted_blocks=(0, 2), simam=True)
    assert InsVPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key():
    with pytest.raises(ValueError, match="unknown configuration keys \\['prompt_lenght'\\]"):
        InsVPConfig.from_dict({"prompt_lenght": 9})


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_length": -1},
        {"prompt_length": 2.5},
        {"patch_hidden": 0},
        {"image_weights": (1, 2, 3)},
        {"feature_weights": float("nan")},
        {"global_kernels": (3, 4)},
        {"global_dilations": (0, 1)},
        {"specific_kernels": (7, 9)},
        {"specific_input": "both"},
        {"common_dropout": 1.0},
        {"global_prompt": 1},
        {"prompted_blocks": (2, 1)},
        {"prompted_blocks": (1, 1)},
        {"prompted_blocks": -1},
    ],
)
def test_wrong_values_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        InsVPConfig(**wrong)
    assert repr(value) in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize("name", ["prompt_length", "patch_hidden", "prompted_blocks"])
def test_numbers_beyond_those_of_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}=9223372036854775808: expected"):
        InsVPConfig(**{name: 2**63})
