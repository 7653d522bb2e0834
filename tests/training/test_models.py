"""The settings of methods from ``--method-options``."""

import pytest
import timm

from insvp_fast.errors import TrainingError
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.models import build_model
from insvp_fast.training.recipe import Recipe


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


def test_options_are_settings_of_the_method_alone(backbone):
    recipe = Recipe(method="vpt_deep", method_options=("length=3", "blocks=[0, 2]", "dropout=0"))
    method = build_model("vpt_deep", recipe, backbone, 2).method
    assert [tuple(tokens.shape) for tokens in method.parameters()] == [(3, 192)] * 2
    assert not list(build_model("linear", recipe, backbone, 2).method.parameters())  # the probe beside it


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("vp", "foo=1", "has foo: expected settings of the method vp: padding"),
        ("e2vpt", "lenght=2", "has lenght: expected settings of the method e2vpt: length (default: 10), num_keys"),
        ("linear", "length=2", "has length: expected settings of the method linear: none"),
        ("vp", "padding=wide", "has padding=wide: expected a value of type int"),
        ("vpt_deep", "length=true", "has length=true: expected a value of type int"),
        ("vpt_deep", "blocks=1", "has blocks=1: expected a value of type Sequence[int]"),
    ],
)
def test_other_options_are_refused_with_those_there_are(method, option, message, backbone):
    with pytest.raises(TrainingError) as error:
        build_model(method, Recipe(method=method, method_options=(option,)), backbone, 2)
    assert str(error.value).startswith(f"`method_options` {message}")


def test_images_that_patches_do_not_fill_are_refused_before_the_first_batch():
    sizes = {"img_size": 30, "patch_size": 8, "depth": 1, "dynamic_img_size": True, "dynamic_img_pad": True}
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    backbone.pretrained_cfg = dict(backbone.pretrained_cfg, input_size=(3, 30, 30))
    message = (
        "its images have 30x30 pixels, which patches of 8x8 do not fill: expected `img_size` to be a multiple of 8"
    )
    with pytest.raises(TrainingError, match=message):
        build_model("insvp", Recipe(backbone="padded"), backbone, 2)
    build_model("vpt_deep", Recipe(method="vpt_deep"), backbone, 2)  # which adds nothing to pixels
