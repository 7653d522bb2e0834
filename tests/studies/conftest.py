"""Fixtures of the tests of studies."""

import pytest

from tests.training.small_runs import make_folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of two classes with 9 images each in train, and 4 in val and test."""
    return make_folder(tmp_path_factory.mktemp("data") / "pictures", {"train": 9, "val": 4, "test": 4})
