"""The named data sets: each read from a tiny copy in its true format, divided, and refused if something is missing."""

import json
import pickle
import re
import shutil
import sys
from collections import Counter, UserDict
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from torchvision.transforms.functional import resize

from insvp_fast.data import check, insvp_preprocessing, load_data, load_test_data, transform_for
from insvp_fast.data.load import divide_source
from insvp_fast.data.pickles import read_pickle
from insvp_fast.data.readers import read_set
from insvp_fast.data.sets import HTA, SETS, VTAB
from insvp_fast.data.splits import describe, divide
from insvp_fast.errors import DataError
from insvp_fast.testing import fake_data, make_fake_dataset

SMALL = insvp_preprocessing(32)

# train/val of both protocols and test, as published or as the arithmetic gives
SPLITS = {
    "dtd": ((1880, 1880), (1880, 1880), 1880),
    "cub": ((5394, 600), (5394, 600), 5794),
    "nabirds": ((21536, 2393), (21536, 2393), 24633),
    "dogs": ((10800, 1200), (10800, 1200), 8580),
    "flowers": ((1020, 1020), (1020, 1020), 6149),
    "food101": ((68175, 7575), (60600, 15150), 25250),
    "cifar100": ((45000, 5000), (40000, 10000), 10000),
    "cifar10": ((45000, 5000), (40000, 10000), 10000),
    "gtsrb": ((23976, 2664), (21312, 5328), 12630),
    "svhn": ((65931, 7326), (58605, 14652), 26032),
}
CLASSES = dict(zip(HTA, (47, 200, 555, 120, 102, 101, 100, 10, 43, 10), strict=True))


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    """The root of a fake of each set, with all its classes, made when first asked for."""
    roots: dict[str, Path] = {}

    def root_of(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name.replace("/", "_"))
            assert make_fake_dataset(name, roots[name], images_per_class=2) == name
        return roots[name]

    return root_of


def items_of(dataset) -> list:
    """What identifies each image of a split: its path, or its index among the pixels."""
    if isinstance(dataset, Subset):
        everything = items_of(dataset.dataset)
        return [everything[i] for i in dataset.indices]
    return [(n if isinstance(item, np.ndarray) else item) for n, item in enumerate(dataset.items)]


# Reading them all


@pytest.mark.parametrize("name", SETS)
def test_every_set_through_its_reader(name, fakes):
    data = load_data(name, SMALL, 0, root=str(fakes(name)))
    assert len(data.class_names) == len(set(data.class_names)) == SETS[name].classes
    for split in (data.train, data.val, data.test):
        image, label = split[len(split) - 1]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert type(label) is int and 0 <= label < SETS[name].classes
    official = read_set(name, fakes(name)).splits
    assert set(official) == set(SETS[name].counts)
    for split, images in official.items():
        count = 4 if split == "train_and_val" else 2
        assert Counter(images.classes) == dict.fromkeys(range(SETS[name].classes), count), split


@pytest.mark.parametrize("name", HTA)
def test_labels_belong_to_the_images(name, fakes):
    """In a fake the color tells the class: the mean color must be that of the class, in train and in test."""
    for images in read_set(name, fakes(name)).splits.values():
        for i in range(0, len(images), 1 + len(images) // 7):
            label = images.classes[i]
            color = np.random.RandomState(label).randint(0, 200, 3) + 27.5
            assert np.abs(np.asarray(images.decode(i)).mean((0, 1)) - color).max() < 8


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_pixels_in_arrays_are_not_turned(name, fakes):
    for images in read_set(name, fakes(name)).splits.values():
        assert np.array_equal(images.decode(0), fake_data._pixels(images.classes[0]))


@pytest.mark.parametrize("name", SETS)
def test_the_table_is_the_published_one(name):
    known = SETS[name]
    if name in VTAB:
        assert known.counts["train"] + known.counts["val"] == known.counts["train_and_val"] == 1000
        return
    paper, released, test = SPLITS[name]
    assert known.classes == CLASSES[name] and known.counts["test"] == test
    for rule, expected in ((known.paper, paper), (known.released, released)):
        if rule == "official":
            assert (known.counts["train"], known.counts["val"]) == expected
        else:
            assert tuple(map(len, divide(rule, known.counts["train"], 0))) == expected


def test_the_tasks_of_vtab():
    assert len(VTAB) == 19
    assert sum(known.classes for known in VTAB.values()) == 940
    assert {name: known.classes for name, known in VTAB.items() if known.classes in (4, 9, 18, 397)} == {
        "vtab/sun397": 397,
        "vtab/kitti": 4,
        "vtab/smallnorb_azi": 18,
        "vtab/smallnorb_ele": 9,
    }


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("dtd", "dtd/dtd/labels/test1.txt"), ("dogs", "test_list.mat"), ("food101", "food-101/meta/test.json")),
        *(("cifar10", "cifar-10-batches-py/test_batch"), ("cifar100", "cifar-100-python/test")),
        *(("gtsrb", "gtsrb/GT-final_test.csv"), ("svhn", "test_32x32.mat"), ("vtab/dmlab", "dmlab/test.txt")),
    ],
)
def test_the_test_images_are_those_of_its_file(name, file, tmp_path):
    for folder, count in (("set", 2), ("smaller", 1)):
        make_fake_dataset(name, tmp_path / folder, images_per_class=count, classes=5)
    shutil.copy(tmp_path / "smaller" / file, tmp_path / "set" / file)
    splits = read_set(name, tmp_path / "set").splits
    assert (len(splits["train"]), len(splits["test"])) == (10, 5)


def test_a_task_has_the_classes_that_800_images_leave_out(tmp_path):
    make_fake_dataset("vtab/dmlab", tmp_path, classes=4)
    assert read_set("vtab/dmlab", tmp_path).class_names == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(("name", "folder"), [("cub", "CUB_200_2011"), ("nabirds", "nabirds")])
def test_birds_are_divided_by_their_list(name, folder, tmp_path):
    make_fake_dataset(name, tmp_path, images_per_class=2, classes=5)
    file = tmp_path / folder / "train_test_split.txt"
    file.write_text(file.read_text().replace(" 0\n", " 1\n", 3))
    file.with_name("test.json").write_text("{}")  # without the other lists it divides nothing
    splits = read_set(name, tmp_path).splits
    assert (len(splits["train"]), len(splits["test"])) == (13, 7)
    file.write_text(file.read_text().replace("\n", "\n\n", 1) + "another 1\n")
    with pytest.raises(DataError, match=r"images.txt, image_class_labels.txt and train_test_split.txt list different"):
        read_set(name, tmp_path)


def test_birds_are_mapped_from_the_training_file(tmp_path):
    """A species without a training image must not shift the others' labels."""
    make_fake_dataset("nabirds", tmp_path, images_per_class=2, classes=5)
    found = read_set("nabirds", tmp_path)
    assert found.class_names == [f"Bird (Adult {i})" for i in (9, 12, 15, 18, 21)]
    lists = tmp_path / "nabirds"
    images = sorted(path.relative_to(lists / "images").as_posix() for path in lists.rglob("*.jpg"))
    by_species = [images[4 * i : 4 * i + 4] for i in range(5)]
    ids = (9, 12, 15, 18, 21)
    for split, chosen, kept in (
        ("train", slice(0, 2), ids),
        ("val", slice(2, 3), ids[1:3]),
        ("test", slice(3, 4), ids),
    ):
        rows = {path: i for i, paths in zip(ids, by_species, strict=True) if i in kept for path in paths[chosen]}
        (lists / f"{split}.json").write_text(json.dumps(rows))
    data = load_data("nabirds", SMALL, 0, root=str(tmp_path))
    assert data.protocol == "paper: the lists train.json, val.json and test.json"
    assert data.val.classes == [1, 2] and data.class_names == found.class_names
    (lists / "val.json").write_text(json.dumps({images[0]: 10}))
    with pytest.raises(DataError, match="val: found the class 10: expected some of the 5 classes of train: 9, 12"):
        load_data("nabirds", SMALL, 0, root=str(tmp_path))


@pytest.mark.parametrize(("name", "folder"), [("nabirds", "nabirds"), ("cub", "CUB_200_2011")])
def test_lists_may_number_the_species_anew(name, folder, tmp_path):
    make_fake_dataset(name, tmp_path, images_per_class=2, classes=4)
    official, home = read_set(name, tmp_path).class_names, tmp_path / folder
    images = sorted(path.relative_to(home / "images").as_posix() for path in home.rglob("*.jpg"))
    for label in ("{}", "species {}"):
        for split, first in (("train", 0), ("val", 1), ("test", 2)):
            rows = {image: label.format(i) for i, image in enumerate(images[first::4])}
            (home / f"{split}.json").write_text(json.dumps(rows))
        assert read_set(name, tmp_path).class_names == official


def test_species_of_one_name_stay_two_classes(tmp_path):
    make_fake_dataset("nabirds", tmp_path, images_per_class=2, classes=3)
    (tmp_path / "nabirds/classes.txt").write_text("9 Gull\n12 Tern\n15 Gull\n")
    data = load_data("nabirds", SMALL, 0, root=str(tmp_path))
    assert data.class_names == ["Gull (9)", "Tern", "Gull (15)"]
    assert load_test_data("nabirds", SMALL, 0, data.class_names, root=str(tmp_path)).classes == data.test.classes


@pytest.mark.parametrize(("name", "images"), [("cub", "CUB_200_2011/images"), ("dogs", "Images")])
def test_lists_serve_without_the_official_files(name, images, tmp_path):
    """Class ids as text with leading zeros, as one published list has them."""
    make_fake_dataset(name, tmp_path, images_per_class=2, classes=3)
    folder = tmp_path / images
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    for file in (path for path in folder.parent.iterdir() if path.is_file()):
        file.unlink()
    for split, chosen in (("train", slice(0, 2)), ("val", slice(2, 3)), ("test", slice(3, 4))):
        rows = {path: f"{c + 1:03d}" for c in range(3) for path in paths[4 * c : 4 * c + 4][chosen]}
        (folder.parent / f"{split}.json").write_text(json.dumps(rows))
    found = read_set(name, tmp_path)
    assert found.splits["train"].classes == [0, 0, 1, 1, 2, 2] and found.splits["test"].classes == [0, 1, 2]
    assert found.class_names == (["1", "2", "3"] if name == "cub" else ["Breed_0", "Breed_1", "Breed_2"])


def test_a_set_is_found_in_a_folder_of_its_name(tmp_path):
    make_fake_dataset("svhn", tmp_path / "svhn", classes=2)
    assert len(load_data("svhn", SMALL, 0, root=str(tmp_path)).test) == 4


def test_vtab_sees_the_whole_image(fakes):
    """Straight to the size: no crop, no flip, in training too."""
    root = str(fakes("vtab/eurosat"))
    data = load_data("vtab/eurosat", insvp_preprocessing((16, 24)), 0, root=root)
    image = data.train.decode(3)
    assert image.size == (40, 32)
    pixels = torch.from_numpy(np.array(resize(image, [16, 24]))).permute(2, 0, 1)
    mean, std = (torch.tensor(data.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    for split in (data.train, data.train_and_val):
        assert torch.equal(split[3][0], (pixels.float() / 255 - mean) / std)
    assert items_of(data.train_and_val)[0].parts[-2] == "train800val200"
    assert data.augmentation["augmentation"] == "none"
    tested = load_test_data("vtab/eurosat", data.preprocessing, 0, data.class_names, root=root)
    assert torch.equal(tested[5][0], data.test[5][0])


# Splits


@pytest.mark.parametrize("rule", ["90/10", "80/20", "first 80 %"])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 50000])
def test_a_division_is_complete_and_repeatable(rule, count):
    train, val = divide(rule, count, 3)
    assert sorted(train + val) == list(range(count))
    assert (train, val) == divide(rule, count, 3)
    if count == 50000:
        assert (divide(rule, count, 4) == (train, val)) == rule.startswith("first")
    assert train == sorted(train) and val == sorted(val)


def test_the_first_four_fifths_are_the_first():
    train, val = divide("first 80 %", 50000, 0)
    assert train == list(range(40000)) and val == list(range(40000, 50000))


def test_the_permutation_stays_what_it_is():
    """Splits must be the same with every version of everything: these numbers are numpy's frozen generator's."""
    assert divide("90/10", 20, 0)[1] == [12, 15]
    assert divide("80/20", 20, 7)[1] == [3, 4, 7, 15]


@pytest.mark.parametrize("protocol", ["paper", "released"])
@pytest.mark.parametrize("name", HTA)
def test_splits_do_not_overlap(name, protocol, fakes):
    data, again, other = (load_data(name, SMALL, s, root=str(fakes(name)), protocol=protocol) for s in (0, 0, 1))
    train, val = items_of(data.train), items_of(data.val)
    assert not set(train) & set(val)
    if not isinstance(items_of(data.test)[0], int):
        assert not (set(train) | set(val)) & set(items_of(data.test))
    assert (train, val) == (items_of(again.train), items_of(again.val))
    rule = getattr(SETS[name], protocol)
    assert ((train, val) != (items_of(other.train), items_of(other.val))) == (rule in ("90/10", "80/20"))
    assert len(data.train_and_val) == len(train) + len(val)
    assert data.protocol.startswith(f"{protocol}: ")


def test_what_differs_from_the_authors_is_said():
    assert "one permutation, seed 5, where the authors' code draws two that overlap" in describe("released", "80/20", 5)
    assert "overlap" not in describe("released", "90/10", 5)
    assert "the first 80 %" in describe("released", "first 80 %", 0)
    assert describe("paper", "official", 0) == "paper: the official train, val and test"


def test_wrong_protocols_are_refused(tmp_path):
    with pytest.raises(DataError, match="`protocol` is honest: expected one of paper, released"):
        load_data("digits", SMALL, 0, protocol="honest")
    with pytest.raises(DataError, match="`protocol` is released: the authors' code has no splits for digits"):
        load_data("digits", SMALL, 0, protocol="released")


def test_validation_images_are_not_augmented(fakes):
    data = load_data("cub", SMALL, 0, root=str(fakes("cub")))
    assert all(torch.equal(data.val[i][0], data.val[i][0]) for i in range(5))
    assert not all(torch.equal(data.train[i][0], data.train[i][0]) for i in range(5))


# What can be wrong


@pytest.mark.parametrize(("name", "file"), [(name, file) for name in HTA for file in HTA[name].files])
def test_a_missing_file_is_one_error(name, file, fakes, tmp_path):
    target = fakes(name) / file
    moved = target.rename(tmp_path / "moved")
    try:
        with pytest.raises(DataError) as caught:
            load_data(name, SMALL, 0, root=str(fakes(name)))
    finally:
        moved.rename(target)
    message = str(caught.value)
    assert f"{name} in {fakes(name)}: {file} is missing. Get it from http" in message
    assert all(needed in message for needed in SETS[name].files)
    assert "\n" not in message


@pytest.mark.parametrize("file", ["train800.txt", "val200.txt", "train800val200.txt", "test.txt", "images"])
def test_a_missing_file_of_a_task(file, fakes, tmp_path):
    target = fakes("vtab/kitti") / "kitti" / file
    moved = target.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=f"kitti/{file} is missing. Get it from https://huggingface.co/"):
        read_set("vtab/kitti", fakes("vtab/kitti"))
    moved.rename(target)


@pytest.mark.parametrize("name", ["dtd", "cub", "nabirds", "dogs", "flowers", "food101", "gtsrb", "vtab/dmlab"])
def test_missing_images_are_counted(name, tmp_path):
    make_fake_dataset(name, tmp_path, images_per_class=4, classes=2)
    images = sorted(
        file for file in tmp_path.rglob("*") if file.suffix in (".jpg", ".ppm") and "raining" not in str(file)
    )
    for file in images[:2]:
        file.unlink()
    with pytest.raises(
        DataError, match=rf"[12] of the images of \w+ \(\d+\) are missing, the first is {tmp_path}.*Get"
    ):
        load_data(name, SMALL, 0, root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("svhn", "test_32x32.mat"),
        ("flowers", "flowers-102/setid.mat"),
        ("dogs", "train_list.mat"),
        ("food101", "food-101/meta/test.json"),
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar100", "cifar-100-python/meta"),
        ("cub", "CUB_200_2011/images.txt"),
        ("nabirds", "nabirds/image_class_labels.txt"),
        ("gtsrb", "gtsrb/GT-final_test.csv"),
    ],
)
@pytest.mark.parametrize("kept", [0.5, 0])
def test_a_half_downloaded_file_is_one_error(name, file, kept, tmp_path):
    make_fake_dataset(name, tmp_path, classes=4)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(kept * len(whole))])
    if (name, kept) == ("gtsrb", 0.5):
        whole = whole[: int(kept * len(whole))].rpartition(b";")[0]
        (tmp_path / file).write_bytes(whole)
    with pytest.raises(DataError, match=f"{name} in {tmp_path}: incomplete or broken: .*Get it from http"):
        load_data(name, SMALL, 0, root=str(tmp_path))


def test_no_root_and_no_folder(tmp_path):
    expected = "`data` is cub, which needs `root`, a folder that holds CUB_200_2011/images.txt"
    with pytest.raises(DataError, match=expected):
        load_data("cub", SMALL, 0)
    with pytest.raises(DataError, match="no such folder. Get it from"):
        load_data("cub", SMALL, 0, root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("source", [None, Path("data"), 3])
@pytest.mark.parametrize(
    "read",
    [
        lambda source: load_data(source, SMALL, 0),
        lambda source: load_test_data(source, SMALL, 0, ["a", "b"]),
        lambda source: divide_source(source, 0),
        check,
    ],
    ids=["load_data", "load_test_data", "divide_source", "check"],
)
def test_a_source_is_text(read, source):
    with pytest.raises(DataError, match=re.escape(f"`data` is {source!r}: expected text")):
        read(source)


PREPARE = {
    "transform_for": transform_for,
    "load_data": lambda preprocessing: load_data("digits", preprocessing, 0).plain_train.transform,
    "load_test_data": lambda preprocessing: load_test_data("digits", preprocessing, 0, list("0123456789")).transform,
}


@pytest.mark.parametrize("wrong", [None, "timm", [224]])
@pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)
def test_what_is_no_preprocessing_is_refused(prepare, wrong):
    message = re.escape(f"`preprocessing` is {wrong!r}: expected arguments of timm.data.create_transform")
    with pytest.raises(DataError, match=message):
        prepare(wrong)


@pytest.mark.parametrize("kind", [MappingProxyType, UserDict])
@pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)
def test_preprocessing_is_any_mapping(prepare, kind):
    assert repr(prepare(kind(SMALL))) == repr(prepare(SMALL))


def test_a_broken_image_is_named_when_it_is_read(fakes, tmp_path):
    make_fake_dataset("flowers", tmp_path, classes=2)
    broken = tmp_path / "flowers-102/jpg/image_00001.jpg"
    content = broken.read_bytes()
    for wrong in (content[: len(content) // 2], b"not an image", b""):
        broken.write_bytes(wrong)
        with pytest.raises(DataError, match="image_00001.jpg: not an image that can be read"):
            load_data("flowers", SMALL, 0, root=str(tmp_path)).train[0]


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    make_fake_dataset("cifar10", tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    for protocol in range(6):
        file.write_bytes(pickle.dumps({"data": Trap(), "labels": [0]}, protocol))
        with pytest.raises(
            DataError, match="incomplete or broken: UnpicklingError: asks for .*; only arrays and plain"
        ):
            load_data("cifar10", SMALL, 0, root=str(tmp_path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.scalar"])
def test_only_arrays_are_unpickled(name, tmp_path):
    module, _, function = name.rpartition(".")
    (tmp_path / "file").write_bytes(f"c{module}\n{function}\n(S'1'\ntR.".encode())
    with pytest.raises(pickle.UnpicklingError, match=f"asks for {name}"):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_arrays_and_plain_values_are_unpickled(protocol, tmp_path):
    content = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2], "bytes": b"\xff", "none": None}
    (tmp_path / "file").write_bytes(pickle.dumps(content, protocol))
    found = read_pickle(tmp_path / "file")
    assert np.array_equal(found.pop("data"), content.pop("data")) and found == content


def test_a_set_in_mat_files_needs_scipy(fakes, monkeypatch):
    roots = {name: fakes(name) for name in ("svhn", "flowers", "dogs")}  # which need scipy themselves
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, root in roots.items():
        with pytest.raises(DataError, match=rf"{name} comes with .mat files.*pip install 'insvp-fast\[data\]'"):
            read_set(name, root)


# Check


def test_check_counts_and_names_what_differs(fakes):
    report = check("gtsrb", str(fakes("gtsrb")))
    assert report.ok and report.counts == {"train": 86, "test": 86} and report.classes == 43
    assert report.differences == ["train: 86, expected 26640", "test: 86, expected 12630"]
    assert "differs from the official set: train: 86, expected 26640" in str(report)
    assert str(report).endswith("every image can be opened")


def test_check_opens_every_image(tmp_path):
    make_fake_dataset("dtd", tmp_path, classes=3)
    files = sorted(tmp_path.rglob("*.jpg"))
    for file in (files[4], files[9]):
        file.write_bytes(file.read_bytes()[:300])
    report = check("dtd", str(tmp_path))
    assert not report.ok and len(report.unreadable) == 2
    assert all(str(file) in str(report) for file in (files[4], files[9]))


def test_check_of_lists_that_divide_the_training_split(tmp_path, monkeypatch):
    make_fake_dataset("dogs", tmp_path, classes=2)
    paths = sorted(path.relative_to(tmp_path / "Images").as_posix() for path in tmp_path.rglob("*.jpg"))
    for split, chosen in (("train", (0, 4)), ("val", (1, 5)), ("test", (2, 6))):
        (tmp_path / f"{split}.json").write_text(json.dumps({paths[i]: i // 4 for i in chosen}))
    report = check("dogs", str(tmp_path))
    assert report.counts == {"train": 2, "val": 2, "test": 2}
    assert "train: 4, expected 12000" in report.differences


def test_a_fake_is_what_was_asked_for(tmp_path):
    make_fake_dataset("food101", tmp_path, images_per_class=3, classes=2)
    assert {split: len(images) for split, images in read_set("food101", tmp_path).splits.items()} == {
        "train": 6,
        "test": 6,
    }
    with pytest.raises(ValueError, match="name is imagenet"):
        make_fake_dataset("imagenet", tmp_path)
