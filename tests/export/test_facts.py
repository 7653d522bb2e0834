"""A loaded file's images, before it runs."""

import json
import re
import threading
import time

import numpy as np
import pytest
import torch

from insvp_fast.errors import CheckpointError
from insvp_fast.export import ExportedModel, Facts
from tests.export.test_preprocessing import settings


def facts(**more) -> Facts:
    about = {"class_names": None, "preprocessing": settings(), "insvp_fast_version": "0"}
    return Facts(**about | {"inside": "nothing", "input": [None, 3, 32, 32]} | more)


@pytest.mark.parametrize(
    ("more", "images", "message"),
    [
        (
            {},
            torch.zeros(2, 3, 32, 32).double(),
            r"are float64 \[2, 3, 32, 32\] on cpu: expected float32 \[any, 3, 32, 32\]",
        ),
        ({}, torch.zeros(2, 3, 32, 32).byte(), r"are uint8 \[2, 3, 32, 32\] on cpu: expected float32"),
        ({}, torch.zeros(2, 3, 32, 48), r"are float32 \[2, 3, 32, 48\] on cpu: expected float32"),
        ({}, torch.zeros(3, 32, 32), r"are float32 \[3, 32, 32\] on cpu: expected float32"),
        ({}, torch.zeros(2, 3, 32, 32, 1), r"are float32 \[2, 3, 32, 32, 1\] on cpu: expected float32"),
        ({}, torch.zeros(2, 3, 32, 32, device="meta"), "on meta: expected float32 .* on cpu"),
        (
            {"input": [2, 3, 32, 32]},
            torch.zeros(1, 3, 32, 32),
            r"\[1, 3, 32, 32\] on cpu: expected float32 \[2, 3, 32, 32\]",
        ),
        ({"inside": "normalize"}, torch.zeros(2, 3, 32, 32), "are float32 .*: expected uint8"),
    ],
)
def test_other_images_than_the_file_takes_are_refused(more, images, message):
    with pytest.raises(ValueError, match=message):
        ExportedModel(lambda images: images, facts(**more))(images)


def test_what_is_no_tensor_and_no_picture_is_refused():
    with pytest.raises(TypeError, match="images is a ndarray: expected a tensor"):
        ExportedModel(lambda images: images, facts())(np.zeros((2, 3, 32, 32), np.float32))
    for image, kind in (("a.jpg", "str"), (np.zeros((32, 32, 3), np.uint8), "ndarray")):
        with pytest.raises(TypeError, match=f"image is a {kind}: expected an image as Pillow opens it"):
            facts().prepare(image)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"class_names": 5}, "class_names is 5: expected a list of texts, or null"),
        ({"class_names": ["ant", 5]}, 'class_names is ["ant", 5]: expected a list of texts, or null'),
        ({"preprocessing": [1]}, "preprocessing is [1]: expected an object, or null"),
        ({"inside": "all"}, "inside is \"all\": expected one of 'nothing', 'normalize', 'resize, crop, normalize'"),
        ({"inside": ["nothing"]}, 'inside is ["nothing"]: expected one of'),
        ({"input": 3}, "input is 3: expected four sizes, of which those that are open are null"),
        ({"input": [1, 3, 32]}, "input is [1, 3, 32]: expected four sizes"),
        ({"input": [0, 3, 32, 32]}, "input is [0, 3, 32, 32]: expected four sizes"),
        ({"input": [True, 3, 32, 32.0]}, "input is [true, 3, 32, 32.0]: expected four sizes"),
        ({"insvp_fast_version": 1}, "insvp_fast_version is 1: expected text"),
        ({"multi_label": 1}, "multi_label is 1: expected true or false"),
        ({"exif_rotation": None}, "exif_rotation is null: expected true or false"),
    ],
)
def test_metadata_of_other_kinds_are_refused(wrong, found):
    metadata = facts(class_names=["ant"]).to_metadata()
    assert Facts.from_metadata(metadata, "x.onnx").to_metadata() == metadata
    with pytest.raises(CheckpointError, match=re.escape(f"x.onnx: not written by `insvp export`: its {found}")):
        Facts.from_metadata(metadata | {name: json.dumps(value) for name, value in wrong.items()}, "x.onnx")


def test_the_memory_of_the_images_is_in_order():
    images = torch.randn(2, 32, 32, 3).permute(0, 3, 1, 2)
    for given, expected in ((images, images), (torch._neg_view(images), -images)):
        found = ExportedModel(lambda images: images, facts())(given)
        assert torch.equal(found, expected) and found.is_contiguous() and not found.is_neg()


def test_logits_keep_nothing_for_a_gradient():
    scale = torch.ones(1, requires_grad=True)
    assert not ExportedModel(lambda images: images * scale, facts())(torch.zeros(1, 3, 32, 32)).requires_grad


def test_a_file_runs_for_one_thread_at_a_time():
    running, most = [], []

    def run(images):
        running.append(images)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return images

    exported = ExportedModel(run, facts())
    threads = [threading.Thread(target=exported, args=(torch.zeros(1, 3, 32, 32),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
