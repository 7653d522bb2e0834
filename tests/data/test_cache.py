"""Decoded images: the pixels of the uncached path, never a stale or half-written file, augmentation on the device."""

import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from insvp_fast.data import cache as cache_module
from insvp_fast.data import insvp_preprocessing, load_data
from insvp_fast.data.cache import cache_images
from insvp_fast.data.readers import read_set
from insvp_fast.data.transforms import TrainBatchTransform
from insvp_fast.errors import DataError
from insvp_fast.testing import DEVICE, make_fake_dataset

SMALL = insvp_preprocessing(28)
TIMM = {"input_size": [3, 24, 24], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("food101", "flowers", "cifar10", "vtab/kitti"):
        make_fake_dataset(name, folder, images_per_class=3, classes=4)
    make_fake_dataset("wds", folder / "wds")
    return folder


@pytest.fixture
def food(tmp_path):
    make_fake_dataset("food101", tmp_path / "data", images_per_class=3, classes=4)
    return lambda: read_set("food101", tmp_path / "data").splits["train"]


def batch_of(dataset) -> tuple[torch.Tensor, list[int]]:
    pairs = [dataset[i] for i in range(len(dataset))]
    return torch.stack([image for image, _ in pairs]), [label for _, label in pairs]


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("preprocessing", [SMALL, TIMM, insvp_preprocessing((20, 32)), insvp_preprocessing(384)])
@pytest.mark.parametrize("source", ["food101", "flowers", "cifar10", "vtab/kitti", "digits", "wds"])
def test_evaluation_sees_the_same_pixels(source, preprocessing, root, tmp_path):
    """Bit for bit, whatever the shape, and for a val that was taken from train too."""
    source, where = (f"wds/{root / 'wds'}" if source == "wds" else source), str(root)
    if source.startswith("wds"):
        where = None
    if source == "digits" and preprocessing["input_size"][1] == 384:
        pytest.skip("many images")
    plain = load_data(source, preprocessing, 0, root=where)
    fast = load_data(source, preprocessing, 0, root=where, cache=str(tmp_path))
    assert plain.on_device is None and fast.class_names == plain.class_names
    for split in ("val", "test"):
        (images, labels), (pixels, same) = batch_of(getattr(plain, split)), batch_of(getattr(fast, split))
        assert pixels.dtype == torch.uint8 and labels == same
        assert torch.equal(fast.on_device[1](pixels), images)
    assert fast.on_device[1](pixels[:0]).shape[0] == 0


@pytest.mark.parametrize("source", ["vtab/kitti", "digits"])
def test_training_sees_the_same_pixels_where_it_does_not_augment(source, root, tmp_path):
    plain, fast = (load_data(source, SMALL, 0, root=str(root), cache=c) for c in (None, str(tmp_path)))
    assert fast.augmentation == plain.augmentation == "none"
    assert torch.equal(fast.on_device[0](batch_of(fast.train)[0]), batch_of(plain.train)[0])


def test_the_augmentation_is_named(root, tmp_path):
    assert load_data("food101", TIMM, 0, root=str(root)).augmentation == "timm"
    fast = load_data("food101", TIMM, 0, root=str(root), cache=str(tmp_path))
    assert fast.augmentation == "crop" and fast.preprocessing == TIMM


# On the device


def test_crops_and_flips_come_from_the_image():
    """Every result is one of the 5·9·2 crops of its image, each about as often."""
    preprocessing = insvp_preprocessing((6, 4)) | {"mean": [0.0] * 3, "std": [1 / 255] * 3}
    images = torch.arange(2 * 3 * 10 * 12, dtype=torch.int64).remainder(251).to(torch.uint8).view(2, 3, 10, 12)
    possible = {}
    for b in range(2):
        for top in range(5):
            for left in range(9):
                crop = images[b, :, top : top + 6, left : left + 4]
                possible[b, crop.numpy().tobytes()] = (top, left, 0)
                possible[b, crop.flip(-1).contiguous().numpy().tobytes()] = (top, left, 1)
    transform, seen = TrainBatchTransform(preprocessing), []
    for _ in range(600):
        result = transform(images.to(DEVICE)).round().to(torch.uint8).cpu()
        seen += [possible[b, result[b].numpy().tobytes()] for b in range(2)]
    assert len(set(seen)) == 90
    assert 0.4 < np.mean([flip for *_, flip in seen]) < 0.6
    assert len({a == b for a, b in zip(seen[::2], seen[1::2], strict=True)}) == 2  # each image has its own crop


def test_a_seed_gives_the_same_crops():
    images, transform = torch.randint(0, 256, (5, 3, 40, 36), dtype=torch.uint8), TrainBatchTransform(SMALL)
    first, again = (torch.manual_seed(seed) and transform(images.to(DEVICE)) for seed in (1, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, transform(images.to(DEVICE)))
    torch.manual_seed(1)
    assert torch.allclose(first.cpu(), transform(images), atol=1e-6)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_batch_of_any_size(batch):
    images = torch.randint(0, 256, (batch, 3, 28, 28), dtype=torch.uint8)  # no margin: only flips are left
    assert TrainBatchTransform(SMALL)(images).shape == (batch, 3, 28, 28)


# The file


def test_a_second_time_nothing_is_decoded(food, tmp_path, monkeypatch):
    first = batch_of(cache_images(food(), SMALL, tmp_path / "cache", "food"))
    before = {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in files_in(tmp_path / "cache")}
    assert len(before) == 2
    monkeypatch.setattr(cache_module, "_write", None)
    again = batch_of(cache_images(food(), SMALL, tmp_path / "cache", "food"))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert before == {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in before}


def test_a_change_of_anything_makes_another_file(food, tmp_path):
    folder, images = tmp_path / "cache", food()
    files = {cache_images(images, SMALL, folder, "food").file}
    files.add(cache_images(images, insvp_preprocessing(32), folder, "food").file)
    files.add(cache_images(images, SMALL | {"interpolation": "bicubic"}, folder, "food").file)
    images.classes = [*images.classes[1:], images.classes[0]]
    files.add(cache_images(images, SMALL, folder, "food").file)
    fewer = food()
    fewer.items, fewer.classes = fewer.items[:-1], fewer.classes[:-1]
    files.add(cache_images(fewer, SMALL, folder, "food").file)
    changed = food()
    changed.items[0].write_bytes(changed.items[-1].read_bytes())
    files.add(cache_images(changed, SMALL, folder, "food").file)
    assert len(files) == 6
    expected = batch_of(changed.with_transform(cache_module.cache_transform(SMALL)))
    assert torch.equal(batch_of(cache_images(changed, SMALL, folder, "food"))[0], expected[0])
    # mean and std do not matter, because pixels are stored before they are normalized
    assert cache_images(changed, SMALL | {"mean": [0.0] * 3}, folder, "food").file in files


def test_pixels_in_memory_are_compared_by_value(root, tmp_path):
    images = read_set("cifar10", root).splits["train"]
    first = cache_images(images, SMALL, tmp_path, "cifar10").file
    images.items = images.items.copy()
    assert cache_images(images, SMALL, tmp_path, "cifar10").file == first
    images.items[3, 5, 7, 1] ^= 1
    assert cache_images(images, SMALL, tmp_path, "cifar10").file != first


@pytest.mark.parametrize("images_before_the_end", [0, 5])
def test_a_half_written_cache_is_not_used(images_before_the_end, food, tmp_path, monkeypatch):
    """Ended at any moment: nothing with the name of a finished file is there, and the next run writes it whole."""
    monkeypatch.setattr(cache_module, "CHUNK", 2)
    folder, images = tmp_path / "cache", food()
    decode, calls = type(images).decode, []

    def end(self, index):
        calls.append(index)
        if len(calls) > images_before_the_end + 1:
            raise KeyboardInterrupt
        return decode(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(type(images), "decode", end)
        with pytest.raises(KeyboardInterrupt):
            cache_images(images, SMALL, folder, "food")
    assert files_in(folder) == []
    expected = batch_of(images.with_transform(cache_module.cache_transform(SMALL)))
    assert torch.equal(batch_of(cache_images(images, SMALL, folder, "food"))[0], expected[0])


def test_pixels_without_their_description_are_written_again(food, tmp_path):
    """A process killed between the two files, and one killed while it wrote: what it left is not taken for finished."""
    whole = cache_images(food(), SMALL, tmp_path / "cache", "food")
    expected = batch_of(whole)
    whole.file.with_suffix(".json").unlink()
    whole.file.write_bytes(whole.file.read_bytes()[:1000])
    whole.file.with_name(whole.file.name + ".1.tmp").write_bytes(b"half")
    assert torch.equal(batch_of(cache_images(food(), SMALL, tmp_path / "cache", "food"))[0], expected[0])


def test_a_broken_image_and_a_full_disk_are_told(food, tmp_path, monkeypatch):
    images = food()
    content = images.items[7].read_bytes()
    images.items[7].write_bytes(content[:100])
    with pytest.raises(DataError, match=f"{images.items[7]}: not an image that can be read"):
        cache_images(images, SMALL, tmp_path / "cache", "food")
    images.items[7].write_bytes(content)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        expected = r"npy: the cache of decoded images cannot be written \(.*No space left on device"
        with pytest.raises(DataError, match=expected):
            cache_images(images, SMALL, tmp_path / "cache", "food")
    assert files_in(tmp_path / "cache") == []
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="food-.*npy: the cache of decoded images cannot be written"):
        cache_images(images, SMALL, tmp_path / "file", "food")


def _build(arguments: tuple[str, str]) -> tuple[str, bytes]:
    torch.set_num_threads(1)  # in a forked process the parent's OpenMP threads are gone
    root, folder = arguments
    found = cache_images(read_set("food101", root).splits["train"], SMALL, folder, "food")
    return str(found.file), found.pixels.tobytes()


def test_processes_that_write_and_read_at_once(food, tmp_path):
    food()
    arguments = [(str(tmp_path / "data"), str(tmp_path / "cache"))] * 4
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = set(pool.map(_build, arguments))
    assert len(results) == 1
    assert results == {_build(arguments[0])}
    assert len(files_in(tmp_path / "cache")) == 2


def test_workers_map_the_file_themselves(food, tmp_path):
    whole = cache_images(food(), SMALL, tmp_path / "cache", "food")
    content = pickle.dumps(whole)  # as it is sent to a worker that is not forked
    assert len(content) < 1000
    assert isinstance(pickle.loads(content).pixels, np.memmap)
    images = torch.cat([batch for batch, _ in DataLoader(pickle.loads(content), 5, num_workers=2)])
    assert torch.equal(images, batch_of(whole)[0])


def test_writing_to_an_item_does_not_reach_the_file(food, tmp_path):
    whole = cache_images(food(), SMALL, tmp_path / "cache", "food")
    before = whole.file.read_bytes()
    whole[0][0].zero_()
    assert whole.file.read_bytes() == before
    facts = json.loads(whole.file.with_suffix(".json").read_text())
    assert facts["images"] == len(whole) == 12 and facts["shape"] == [12, 3, 32, 32]
