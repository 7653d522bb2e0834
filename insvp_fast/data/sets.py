"""The named data sets: classes, images per split, files on disk, where to get them. A plain table."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "AUGMENTATIONS",
    "DIGITS",
    "HTA",
    "PREFIXES",
    "PROTOCOLS",
    "SETS",
    "SPLITS",
    "SPLIT_NAMES",
    "VTAB",
    "NamedSet",
    "split_of",
]

DIGITS = "digits"  # comes with scikit-learn
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {  # what folders, lists and formats call each split
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
PROTOCOLS = ("paper", "released")
PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/")  # of sources in formats that timm reads
AUGMENTATIONS = ("none", "crop", "timm", "insvp")  # what each is: transform_for in transforms.py

# rules by which an official training split is divided into train and val, see splits.py
NINETY, EIGHTY, FIRST_EIGHTY = "90/10", "80/20", "first 80 %"
OFFICIAL_VAL = {"paper": "official", "released": "official"}


def split_of(name: str) -> str | None:
    """The split that a folder or a value of a table names, in any case; None if it names none."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


class NamedSet(NamedTuple):
    """A row of the table.

    Args:
        classes: the number of classes.
        counts: the number of images in each official split.
        files: the files and folders that are read, relative to the root.
        origin: where to get it.
        paper, released: the rule by which each protocol divides the official training split; ``official`` where val
            is official too.
    """

    classes: int
    counts: dict[str, int]
    files: tuple[str, ...]
    origin: str
    paper: str = NINETY
    released: str = NINETY


def _birds(folder: str) -> tuple[str, ...]:
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images")
    return tuple(f"{folder}/{name}" for name in names)


def _cifar(classes: int, folder: str, names: tuple[str, ...]) -> NamedSet:
    origin = f"https://www.cs.toronto.edu/~kriz/cifar.html (cifar-{classes}-python.tar.gz)"
    files = tuple(f"{folder}/{name}" for name in names)
    return NamedSet(classes, {"train": 50000, "test": 10000}, files, origin, released=FIRST_EIGHTY)


HTA = {  # the paper's ten data sets
    "dtd": NamedSet(
        47,
        {"train": 1880, "val": 1880, "test": 1880},
        ("dtd/dtd/labels/train1.txt", "dtd/dtd/labels/val1.txt", "dtd/dtd/labels/test1.txt", "dtd/dtd/images"),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/ (dtd-r1.0.1.tar.gz, unpacked in dtd/)",
        **OFFICIAL_VAL,
    ),
    "cub": NamedSet(
        200,
        {"train": 5994, "test": 5794},
        _birds("CUB_200_2011"),
        "https://www.vision.caltech.edu/datasets/cub_200_2011/ (CUB_200_2011.tgz)",
    ),
    "nabirds": NamedSet(
        555,
        {"train": 23929, "test": 24633},
        _birds("nabirds"),
        "https://dl.allaboutbirds.org/nabirds (nabirds.tar.gz, after accepting its terms)",
    ),
    "dogs": NamedSet(
        120,
        {"train": 12000, "test": 8580},
        ("train_list.mat", "test_list.mat", "Images"),
        "http://vision.stanford.edu/aditya86/ImageNetDogs/ (images.tar and lists.tar, unpacked in one folder)",
    ),
    "flowers": NamedSet(
        102,
        {"train": 1020, "val": 1020, "test": 6149},
        ("flowers-102/imagelabels.mat", "flowers-102/setid.mat", "flowers-102/jpg"),
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz unpacked in flowers-102/, beside "
        "imagelabels.mat and setid.mat)",
        **OFFICIAL_VAL,
    ),
    "food101": NamedSet(
        101,
        {"train": 75750, "test": 25250},
        ("food-101/meta/train.json", "food-101/meta/test.json", "food-101/images"),
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/ (food-101.tar.gz)",
        released=EIGHTY,
    ),
    "cifar100": _cifar(100, "cifar-100-python", ("train", "test", "meta")),
    "cifar10": _cifar(
        10, "cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    ),
    "gtsrb": NamedSet(
        43,
        {"train": 26640, "test": 12630},
        ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
        "https://benchmark.ini.rub.de/ (GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and "
        "GTSRB_Final_Test_GT.zip, unpacked in gtsrb/)",
        released=EIGHTY,
    ),
    "svhn": NamedSet(
        10,
        {"train": 73257, "test": 26032},
        ("train_32x32.mat", "test_32x32.mat"),
        "http://ufldl.stanford.edu/housenumbers/ (train_32x32.mat and test_32x32.mat)",
        released=FIRST_EIGHTY,
    ),
}

_TASKS = {  # name: (classes, test images)
    "caltech101": (102, 6084),
    "cifar": (100, 10000),
    "dtd": (47, 1880),
    "oxford_flowers102": (102, 6149),
    "oxford_iiit_pet": (37, 3669),
    "svhn": (10, 26032),
    "sun397": (397, 21750),
    "patch_camelyon": (2, 32768),
    "eurosat": (10, 5400),
    "resisc45": (45, 6300),
    "diabetic_retinopathy": (5, 42670),
    "clevr_count": (8, 15000),
    "clevr_dist": (6, 15000),
    "dmlab": (6, 22735),
    "kitti": (4, 711),
    "dsprites_loc": (16, 73728),
    "dsprites_ori": (16, 73728),
    "smallnorb_azi": (18, 12150),
    "smallnorb_ele": (9, 12150),
}

VTAB = {
    f"vtab/{task}": NamedSet(
        classes,
        {"train": 800, "val": 200, "train_and_val": 1000, "test": test_images},
        tuple(f"{task}/{name}" for name in ("train800.txt", "val200.txt", "train800val200.txt", "test.txt", "images")),
        "https://huggingface.co/datasets/XiN0919/VTAB-1k (each task unpacked in a folder of its name)",
        **OFFICIAL_VAL,
    )
    for task, (classes, test_images) in _TASKS.items()
}

SETS = HTA | VTAB  # a set of neither goes into a dictionary of its own, with its reader in readers.py
