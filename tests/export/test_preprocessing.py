"""Preprocessing as a module, against Pillow and torchvision: the same bits."""

import numpy as np
import pytest
import torch
from PIL import Image

from insvp_fast.data import transform_for
from insvp_fast.errors import ExportError
from insvp_fast.export import Facts, preprocessing
from insvp_fast.export.preprocessing import ExportedPreprocessing, resize_reason

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def settings(size=32, **more) -> dict:
    return IMAGENET | {"input_size": [3, size, size], "interpolation": "bicubic", "crop_pct": 0.9} | more


@pytest.mark.parametrize("more", [{}, {"interpolation": "bilinear"}, {"crop_mode": "squash"}, {"crop_pct": 1.0}])
@pytest.mark.parametrize(
    ("size", "height", "width"),
    [(32, 40, 44), (57, 33, 97), (57, 57, 57), (32, 701, 33), (57, 31, 200), (32, 20, 23)],
)
def test_pixels_are_those_of_training(more, size, height, width):
    described = settings(size, **more)
    assert resize_reason(described) is None
    random = np.random.default_rng(height)
    pixels = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    pixels[1] = random.integers(0, 2, (height, width, 3)) * 255  # edges, where a cubic goes beyond 0 and 255
    expected = torch.stack([transform_for(described)(Image.fromarray(image)) for image in pixels])
    assert torch.equal(ExportedPreprocessing(described, True, True)(torch.from_numpy(pixels)), expected)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(ExportedPreprocessing(described, True, False)(planes), expected)


def test_the_order_of_the_axes_shows(monkeypatch):
    """Tall images are what tells Pillow 13 from those before it."""
    pixels = torch.randint(256, (1, 3, 300, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for new in (True, False):
        monkeypatch.setattr(preprocessing, "BEGINS_WITH_THE_LARGER_REDUCTION", new)
        results.append(ExportedPreprocessing(settings(crop_mode="squash"), True, False)(pixels))
    assert not torch.equal(*results)
    assert (results[0] - results[1]).abs().max() < 3 / 255 / 0.224  # of a few levels


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"crop_mode": "border"}, "ResizeKeepRatio and CenterCropOrPad: expected Resize and CenterCrop"),
        ({"crop_border_pixels": 4}, "TrimBorder and Resize and CenterCrop: expected"),
        ({"interpolation": "lanczos"}, "its interpolation is lanczos: expected bilinear or bicubic"),
        ({"crop_pct": 1.25}, "it crops"),
    ],
)
def test_what_is_not_resized_inside(more, reason):
    assert reason in resize_reason(settings(**more))


@pytest.mark.parametrize("more", [{}, {"crop_mode": "border"}, {"crop_border_pixels": 4}])
def test_what_is_not_inside_is_prepared(more):
    described = settings(**more)
    facts = Facts(
        class_names=None, preprocessing=described, inside="normalize", input=[None, 3, 32, 32], insvp_fast_version="0"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    normalized = ExportedPreprocessing(described, False, False)(facts.prepare(image)[None])
    assert torch.equal(normalized[0], transform_for(described)(image))


def test_one_mean_for_all_channels():
    described = settings(mean=[0.5], std=[0.25])
    pixels = torch.randint(256, (40, 44, 3), dtype=torch.uint8)
    expected = transform_for(described)(Image.fromarray(pixels.numpy()))
    assert torch.equal(ExportedPreprocessing(described, True, True)(pixels[None])[0], expected)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"naflex": True}, "ResizeToSequence, MaybeToTensor, Normalize"),
        ({"naflex": True, "normalize": False}, "ResizeToSequence, MaybePILToTensor"),
        ({"normalize": False}, "Resize, CenterCrop, MaybePILToTensor"),
        ({"patchify": True}, "Resize, CenterCrop, MaybeToTensor, Normalize, Patchify"),
    ],
)
def test_other_steps_are_refused(more, found):
    message = f"the steps of the preprocessing are {found}: expected to resize, crop, ToTensor, Normalize"
    with pytest.raises(ExportError, match=message):
        resize_reason(settings(**more))
    with pytest.raises(ExportError, match=message):
        ExportedPreprocessing(settings(**more), False, False)
