"""Decoded images: the items of the uncached path to the bit, augmented or not; never a stale or half-written file."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor

from insvp_fast.data import cache as cache_module
from insvp_fast.data import insvp_preprocessing, load_data, transform_for
from insvp_fast.data.cache import cache_images
from insvp_fast.data.images import Images
from insvp_fast.data.readers import read_set
from insvp_fast.data.sets import AUGMENTATIONS
from insvp_fast.data.transforms import repeatable_steps
from insvp_fast.errors import DataError
from insvp_fast.testing import make_fake_dataset
from insvp_fast.training.sampler import SeededDataset

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


RESIZED = repeatable_steps(transform_for(SMALL))  # and cropped


def content_of(dataset) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in (dataset[i] for i in range(len(dataset)))]


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def mixed_pictures(folder: Path) -> Path:
    """Two classes of pictures of many shapes and modes, one of them to be turned by its EXIF orientation."""
    noise = np.random.default_rng(0)
    shapes = {"RGB": (61, 40), "L": (33, 90), "P": (50, 50), "RGBA": (24, 24), "1": (70, 45), "CMYK": (41, 37)}
    for split in ("train", "test"):
        for name in ("elk", "owl"):
            (folder / split / name).mkdir(parents=True)
            for number, (mode, (height, width)) in enumerate(shapes.items()):
                small = noise.integers(0, 256, (6, 5, 3), np.uint8)
                picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
                exif = Image.Exif()
                exif[0x0112] = 6 if mode in ("RGB", "L") else 1
                form = "png" if mode in ("P", "RGBA", "1") else "jpg"
                picture.save(folder / split / name / f"{number}.{form}", exif=exif)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return mixed_pictures(tmp_path_factory.mktemp("pictures"))


def assert_same_items(plain, fast):
    """To the bit, in training of three epochs with the same seeds, and in evaluation."""
    assert fast.class_names == plain.class_names and fast.augmentation == plain.augmentation
    for split, epochs in (("train", 3), ("train_and_val", 1), ("val", 1), ("test", 1)):
        one, two = (SeededDataset(getattr(data, split), seed=7) for data in (plain, fast))
        for sample in itertools.product(range(epochs), range(len(one.dataset))):
            (expected, label), (found, same) = one[sample], two[sample]
            assert found.dtype == torch.float32 and torch.equal(found, expected) and label == same


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [{"crop_pct": 1.0}, {"crop_pct": 0.875}, {"crop_pct": 0.9, "crop_mode": "squash"}])
@pytest.mark.parametrize("val", [False, True])
def test_no_item_changes(val, shape, augmentation, pictures, tmp_path):
    preprocessing = TIMM | shape
    if augmentation == "crop" and shape["crop_pct"] == 1:
        with pytest.raises(DataError, match="`augmentation` is crop: .*nothing to crop: expected insvp, timm or none"):
            load_data(str(pictures), preprocessing, 0, augmentation=augmentation)
        return
    if val:
        for split, there in (("train", "train"), ("test", "test"), ("val", "test")):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / split).symlink_to(pictures / there)
        pictures = tmp_path / "data"
    plain, fast = (
        load_data(str(pictures), preprocessing, 0, augmentation=augmentation, cache=cache)
        for cache in (None, str(tmp_path / "cache"))
    )
    assert_same_items(plain, fast)
    seen = {SeededDataset(fast.train, 7)[epoch, 0][0].numpy().tobytes() for epoch in range(8)}
    assert (len(seen) == 1) == (augmentation == "none")


@pytest.mark.parametrize("preprocessing", [SMALL, TIMM, insvp_preprocessing((20, 32)), TIMM | {"crop_mode": "border"}])
@pytest.mark.parametrize("source", ["food101", "flowers", "cifar10", "vtab/kitti", "wds"])
def test_no_item_of_a_named_set_changes(source, preprocessing, root, tmp_path):
    source, where = (f"wds/{root / 'wds'}", None) if source == "wds" else (source, str(root))
    plain, fast = (load_data(source, preprocessing, 0, root=where, cache=cache) for cache in (None, str(tmp_path)))
    assert_same_items(plain, fast)


def test_what_comes_before_the_first_random_step_is_done_once(pictures, tmp_path):
    """Evaluated images are stored as the model sees them, images for random crops resized, those for timm whole."""
    for augmentation, expected in (("none", {(24, 24)}), ("insvp", None), ("timm", None)):
        data = load_data(
            str(pictures), TIMM | {"crop_pct": 0.875}, 0, augmentation=augmentation, cache=str(tmp_path / augmentation)
        )
        stored = {tuple(size) for size in data.train.dataset.sizes.tolist()}
        whole = {(40, 61), (90, 33), (50, 50), (24, 24), (70, 45), (41, 37)}
        expected = expected or (whole if augmentation == "timm" else {(27, 41), (73, 27), (27, 27), (42, 27), (29, 27)})
        assert stored == expected
        assert {tuple(size) for size in data.test.sizes.tolist()} == {(24, 24)}


def test_an_augmentation_that_is_asked_for_is_the_one_that_is_used(root):
    for source in ("vtab/kitti", "digits"):
        data = load_data(source, TIMM, 0, root=str(root))
        assert (data.augmentation["augmentation"], data.augmentation["hflip"]) == ("none", 0.0)
        data = load_data(source, TIMM, 0, root=str(root), augmentation="timm", hflip=0.25)
        assert (data.augmentation["augmentation"], data.augmentation["hflip"]) == ("timm", 0.25)
        assert "RandomHorizontalFlip(p=0.25)" in data.augmentation["steps"]
        assert data.preprocessing.keys() <= {*TIMM, "crop_mode"}
    with pytest.raises(DataError, match="`augmentation` is rand: expected one of none, crop, timm, insvp"):
        load_data("digits", TIMM, 0, augmentation="rand")
    with pytest.raises(DataError, match="`augmentation` is rand: expected"):
        transform_for(TIMM | {"augmentation": "rand"})


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flips_are_a_choice_of_their_own(hflip, augmentation):
    """The left half is dark and the right one bright: 0 never turns that around, and 1 always does."""
    pixels = np.zeros((30, 30, 3), np.uint8)
    pixels[:, 15:] = 200
    transform = transform_for(SMALL | {"augmentation": augmentation, "hflip": hflip}, training=True)
    brighter = [
        bool(image[:, :, :9].mean() > image[:, :, -9:].mean())
        for image in (transform(Image.fromarray(pixels)) for _ in range(40))
        if abs(image[:, :, :9].mean() - image[:, :, -9:].mean()) > 0.1
    ]
    assert len(brighter) > 10 and set(brighter) == {bool(hflip)}


# The file


def test_a_second_time_nothing_is_decoded(food, tmp_path, monkeypatch):
    folder = tmp_path / "that is not" / "there yet"
    first = content_of(cache_images(food(), RESIZED, folder, "food"))
    before = {name: (folder / name).stat().st_mtime_ns for name in files_in(folder)}
    assert len(before) == 2
    monkeypatch.setattr(cache_module, "_write", None)
    again = content_of(cache_images(food(), RESIZED, folder, "food"))
    assert first == again
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}


def test_a_change_of_anything_makes_another_file(food, tmp_path):
    folder, images = tmp_path / "cache", food()
    files = {cache_images(images, RESIZED, folder, "food").file}
    for steps in (RESIZED[:1], [], repeatable_steps(transform_for(SMALL | {"interpolation": "bicubic"}))):
        files.add(cache_images(images, steps, folder, "food").file)
    fewer = food()
    fewer.items, fewer.classes = fewer.items[:-1], fewer.classes[:-1]
    files.add(cache_images(fewer, RESIZED, folder, "food").file)
    changed = food()
    changed.items[0].write_bytes(changed.items[-1].read_bytes())
    files.add(cache_images(changed, RESIZED, folder, "food").file)
    assert len(files) == 6
    expected = content_of(changed.with_transform(Compose(RESIZED)))
    assert content_of(cache_images(changed, RESIZED, folder, "food")) == expected
    # classes do not matter, because the file holds pixels alone
    changed.classes = [*changed.classes[1:], changed.classes[0]]
    again = cache_images(changed, RESIZED, folder, "food")
    assert again.file in files and [label for _, label in content_of(again)] == changed.classes


def test_pixels_in_memory_are_compared_by_value(root, tmp_path):
    images = read_set("cifar10", root).splits["train"]
    first = cache_images(images, RESIZED, tmp_path, "cifar10").file
    images.items = images.items.copy()
    assert cache_images(images, RESIZED, tmp_path, "cifar10").file == first
    images.items[3, 5, 7, 1] ^= 1
    assert cache_images(images, RESIZED, tmp_path, "cifar10").file != first


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
            cache_images(images, RESIZED, folder, "food")
    assert files_in(folder) == []
    expected = content_of(images.with_transform(Compose(RESIZED)))
    assert content_of(cache_images(images, RESIZED, folder, "food")) == expected


def test_pixels_without_their_description_are_written_again(food, tmp_path):
    """A process killed between the two files, and one killed while it wrote: what it left is not taken for finished."""
    whole = cache_images(food(), RESIZED, tmp_path / "cache", "food")
    expected = content_of(whole)
    whole.file.with_suffix(".json").unlink()
    whole.file.write_bytes(whole.file.read_bytes()[:1000])
    whole.file.with_name(whole.file.name + ".1.tmp").write_bytes(b"half")
    assert content_of(cache_images(food(), RESIZED, tmp_path / "cache", "food")) == expected


def test_what_a_killed_process_left_is_removed(food, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age in (("old.pixels.1.tmp", 2 * cache_module.ABANDONED), ("new.pixels.1.tmp", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    file = cache_images(food(), RESIZED, folder, "food").file
    assert files_in(folder) == sorted([file.name, file.with_suffix(".json").name, "new.pixels.1.tmp"])


def test_a_broken_image_and_a_full_disk_are_told(food, tmp_path, monkeypatch):
    images = food()
    content = images.items[7].read_bytes()
    images.items[7].write_bytes(content[:100])
    with pytest.raises(DataError, match=f"{images.items[7]}: not an image that can be read"):
        cache_images(images, RESIZED, tmp_path / "cache", "food")
    images.items[7].write_bytes(content)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        expected = r"pixels: the cache of decoded images cannot be written \(.*No space left on device"
        with pytest.raises(DataError, match=expected):
            cache_images(images, RESIZED, tmp_path / "cache", "food")
    assert files_in(tmp_path / "cache") == []
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="food-.*pixels: the cache of decoded images cannot be written"):
        cache_images(images, RESIZED, tmp_path / "file", "food")


def _build(arguments: tuple[str, str]) -> tuple[str, bytes]:
    torch.set_num_threads(1)  # in a forked process the parent's OpenMP threads are gone
    root, folder = arguments
    found = cache_images(read_set("food101", root).splits["train"], RESIZED, folder, "food")
    return str(found.file), found.pixels.tobytes()


def test_processes_that_write_and_read_at_once(food, tmp_path):
    food()
    arguments = [(str(tmp_path / "data"), str(tmp_path / "cache"))] * 4
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = set(pool.map(_build, arguments))
    assert len(results) == 1
    assert results == {_build(arguments[0])}
    assert len(files_in(tmp_path / "cache")) == 2


def test_no_images_are_cached_too(tmp_path):
    assert len(cache_images(Images([], []), RESIZED, tmp_path, "none")) == 0


def test_workers_map_the_file_themselves(food, tmp_path):
    whole = cache_images(food(), RESIZED, tmp_path / "cache", "food").with_transform(PILToTensor())
    content = pickle.dumps(whole)  # as it is sent to a worker that is not forked
    assert len(content) < 5000 < whole.file.stat().st_size
    assert isinstance(pickle.loads(content).pixels, np.memmap)
    images = torch.cat([batch for batch, _ in DataLoader(pickle.loads(content), 5, num_workers=2)])
    assert torch.equal(images, torch.stack([image for image, _ in (whole[i] for i in range(len(whole)))]))


def test_writing_to_an_item_does_not_reach_the_file(food, tmp_path):
    whole = cache_images(food(), [], tmp_path / "cache", "food")
    before = whole.file.read_bytes()
    whole[0][0].paste((1, 2, 3), (0, 0, 9, 9))
    assert whole.file.read_bytes() == before
    facts = json.loads(whole.file.with_suffix(".json").read_text())
    assert len(facts["sizes"]) == len(whole) == 12 and facts["sizes"][0] == [whole[0][0].height, whole[0][0].width]
    assert whole.name(0) == str(whole.items[0])  # messages still name the file


def test_the_images_of_a_probe_are_not_augmented_and_those_of_retraining_are(root):
    data = load_data("flowers", SMALL, 0, root=str(root))  # whose val is official

    def is_augmented(images, rows):
        return not all(torch.equal(images[i][0], images[i][0]) for i in rows)

    count = len(data.train)
    assert not is_augmented(data.plain_train, range(count))
    assert is_augmented(data.train_and_val, range(count, count + len(data.val)))


def test_a_file_written_again_with_the_same_size_is_decoded_again(food, tmp_path):
    images = food()
    first, file = cache_images(images, RESIZED, tmp_path / "cache", "food").file, images.items[0]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))  # as file systems tell times apart
    assert cache_images(images, RESIZED, tmp_path / "cache", "food").file != first


def test_one_file_by_any_spelling_of_a_path(food, root, tmp_path, monkeypatch):
    """A run that is resumed has absolute paths, whatever was given."""
    folders, tars = food(), [load_data(f"wds/{root / 'wds'}", SMALL, 0).test.items]
    paths = [[Path(os.path.relpath(item, tmp_path)) for item in folders.items], folders.items]
    tars.append([member._replace(file=os.path.relpath(member.file, tmp_path)) for member in tars[0]])
    monkeypatch.chdir(tmp_path)
    for spelled in (paths, tars):
        assert spelled[0] != spelled[1]
        files = {cache_images(Images(items, [0] * len(items)), RESIZED, "cache", "it").file for items in spelled}
        assert len(files) == 1
    moved = [member._replace(offset=member.offset + 512) for member in tars[0]]
    assert cache_module._hash(Images(moved, []), []) != cache_module._hash(Images(tars[0], []), [])


class Records:
    """Encoded images that raise what a reader of records does where a list would raise IndexError."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> io.BytesIO:
        if index >= len(self.files):
            raise ValueError(f"record {index} is not there")
        return io.BytesIO(self.files[index].read_bytes())


def test_images_of_a_reader_that_cannot_be_iterated_over(food, tmp_path):
    plain = food()
    images = Images(Records(plain.items), plain.classes)
    assert content_of(cache_images(images, RESIZED, tmp_path / "cache", "it")) == content_of(
        plain.with_transform(Compose(RESIZED))
    )


def test_files_of_one_time_are_told_apart(food, tmp_path):
    """As an archive may unpack them: by their sizes, and those of one size by their paths."""
    images, files = food(), set()
    content = images.items[0].read_bytes()
    for second in (content, content + b"0", content):
        images.items[1].write_bytes(second)
        for file in images.items:
            os.utime(file, ns=(0, 0))
        files.add(cache_images(images, RESIZED, tmp_path / "cache", "food").file)
    images.items = [images.items[1], images.items[0], *images.items[2:]]
    files.add(cache_images(images, RESIZED, tmp_path / "cache", "food").file)
    assert len(files) == 3


def test_a_cache_of_another_format_is_not_read(food, tmp_path, monkeypatch):
    first = cache_images(food(), RESIZED, tmp_path / "cache", "food").file
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert cache_images(food(), RESIZED, tmp_path / "cache", "food").file != first
