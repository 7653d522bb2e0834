"""Fixtures of the tests of training."""

import pytest

from tests.training.small_runs import make_folder, use_few_digits


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # two threads that wait for each other are slow on a busy machine


@pytest.fixture
def few_digits(monkeypatch):
    use_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of two classes with 9 images each in train, and 4 in val and test."""
    return make_folder(tmp_path_factory.mktemp("data") / "pictures", {"train": 9, "val": 4, "test": 4})
