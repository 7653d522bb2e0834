"""Data without a name: folders, lists, tar files and what timm reads; and the digits."""

import json
import pickle
import struct
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from insvp_fast.data import check, insvp_preprocessing, load_data, load_test_data, timm_formats, transform_for
from insvp_fast.data.lists import abbreviated, read_list, sorted_labels
from insvp_fast.data.sources import read_source
from insvp_fast.data.tfds import TFRecords
from insvp_fast.errors import DataError
from insvp_fast.testing import make_fake_dataset
from insvp_fast.training.loader import Loader
from insvp_fast.training.sampler import BatchSampler

SMALL = insvp_preprocessing(32)


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (number * 20, 0, 0)).save(folder / name)


@pytest.mark.parametrize("name", ["folder", "list", "wds"])
def test_each_format(name, tmp_path):
    source = make_fake_dataset(name, tmp_path / "data", images_per_class=3)
    data = load_data(source, SMALL, 0)
    assert [len(split) for split in (data.train, data.val, data.test)] == [9, 9, 9]
    assert data.class_names == (["class_0", "class_1", "class_2"] if name == "folder" else ["0", "1", "2"])
    assert data.protocol == "paper: the splits as they are"
    assert isinstance(data.train_and_val, ConcatDataset) and len(data.train_and_val) == 18
    colors = np.array([np.random.RandomState(label).randint(0, 200, 3) + 27.5 for label in range(3)])
    for split in (data.train, data.val, data.test):
        assert split.classes == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for i in range(9):
            assert np.abs(np.asarray(split.decode(i)).mean((0, 1)) - colors[split.classes[i]]).max() < 8
    tested = load_test_data(source, SMALL, 0, data.class_names)
    assert torch.equal(tested[4][0], data.test[4][0])
    assert check(source).ok and check(source).differences == []


def test_names_of_sets_are_known_without_torch():
    code = "import sys, insvp_fast.data.sets; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Lists


LISTS = {
    "lines.txt": "a b.png 10\n\n  c.png   9  \n",
    "windows.txt": "\ufeffa b.png 10\r\nc.png 9\r\n",
    "object.json": json.dumps({"a b.png": 10, "c.png": "9"}),
    "pairs.json": json.dumps([["a b.png", 10], ["c.png", 9]]),
    "UPPER.JSON": '{"a b.png":\t10, "c.png": 9}',
    "triples.json": json.dumps([["a b.png", 10, 3], ["c.png", 9, 4]]),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_each_kind(name, tmp_path):
    (tmp_path / name).write_text(LISTS[name])
    assert read_list(tmp_path / name) == [("a b.png", "10"), ("c.png", "9")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "", "found an empty list"),
        ("list.txt", "a.png 1\nb.png\n", "line 2 is 'b.png': expected `path label`"),
        ("list.json", "[", "not a list of images that can be read"),
        ("list.json", "[]", "found an empty list"),
        ("list.json", "3", "found 3: expected an object path -> label, or an array"),
        ("list.json", '[["a.png"]]', "expected an object path -> label, or an array"),
        ("list.json", "[[3, 1]]", r"found \[3, 1\]: expected an object path -> label, or an array"),
        ("list.json", '{"a.png": [1]}', "expected an object path -> label, or an array"),
        ("list.json", '{"a.png": null}', "expected an object path -> label, or an array"),
        ("list.txt", b"\xff\xfe\x00", "not UTF-8 .*: expected a list saved as UTF-8"),
        ("list.parquet", b"PAR1\x15\x04\x15\xa0", r"not UTF-8 .*: expected .*, \.txt, \.json, \.csv, \.tsv"),
        ("train-000.tar", b"", r"found an archive: expected a list, or `wds/.*` for a folder of archives"),
        ("train-000.TAR", b"", r"found an archive: expected a list, or `wds/.*` for a folder of archives"),
        ("list.csv", f"a.png,{'x' * 2**18}", "not a list of images that can be read .*larger than field limit"),
        ("list.tsv", "a.png elk\nb.png owl\n", "found a.png elk: expected the columns path, label and"),
        ("list.txt", "a.png elk\nb.png owl\na.png owl\n", "found a.png twice, as elk and as owl: expected each"),
        ("list.txt", "a.png elk\n./a.png elk\n", "found ./a.png twice, as elk: expected each image once"),
        ("list.json", '{"a.png": 1, "b.png": 2, "a.png": 2}', "found a.png twice, as 1 and as 2"),
        ("list.json", '[["x/a.png", 1], ["x/../x/a.png", 1]]', "found x/../x/a.png twice, as 1"),
    ],
)
def test_wrong_lists_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read_list(tmp_path / name)


def test_a_number_among_names_is_a_class(tmp_path):
    (tmp_path / "list.txt").write_text("a.png 0.5\nb.png elk\n")
    assert read_list(tmp_path / "list.txt") == [("a.png", "0.5"), ("b.png", "elk")]


def test_names_beyond_the_sixth_are_counted():
    assert abbreviated("abcdef") == "a, b, c, d, e, f"
    assert abbreviated("abcdefg") == "a, b, c, d, e, f and 1 more"


def test_labels_are_sorted_as_numbers_if_they_are():
    assert sorted_labels(["10", "9", "9", "2"]) == ["2", "9", "10"]
    assert sorted_labels(["10", "9", "b"]) == ["10", "9", "b"]
    assert sorted_labels(["²", "9", "10"]) == ["10", "9", "²"]  # a digit, but no number
    same = [("0" * zeros) + "1" for zeros in range(20)]  # in a set their order is that of this process's hashes
    assert sorted_labels(same) == same[::-1]


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_list_its_siblings_and_the_root_of_its_images(suffix, tmp_path):
    write_images(tmp_path / "images", [f"{n}.png" for n in range(6)])
    (tmp_path / "lists").mkdir()
    for split, labels in (
        ("train", {0: "owl", 1: "elk", 2: "owl"}),
        ("val", {3: "elk"}),
        ("test", {4: "owl", 5: "elk"}),
    ):
        rows = {f"{n}.png": label for n, label in labels.items()}
        lines = "".join(f"{path} {label}\n" for path, label in rows.items())
        text = json.dumps(rows) if suffix == "json" else lines
        (tmp_path / "lists" / f"animals_{split}.{suffix}").write_text(text)
    source, root = str(tmp_path / "lists" / f"animals_train.{suffix}"), str(tmp_path / "images")
    data = load_data(source, SMALL, 0, root=root)
    assert data.class_names == ["elk", "owl"]
    assert data.train.classes == [1, 0, 1] and data.val.classes == [0] and data.test.classes == [1, 0]
    alone = load_test_data(str(tmp_path / "lists" / f"animals_test.{suffix}"), SMALL, 0, ["elk", "owl"], root=root)
    assert torch.equal(alone[1][0], data.test[1][0]) and alone.classes == [1, 0]
    with pytest.raises(DataError, match=rf"animals_test.{suffix} \(test\): found the class elk: expected .*: owl"):
        load_test_data(source, SMALL, 0, ["owl"], root=root)
    with pytest.raises(DataError, match="3 of the images that .* names .* are missing, the first is .*lists/0.png"):
        load_data(source, SMALL, 0)


def test_a_list_without_val_is_divided_by_seed(tmp_path):
    make_fake_dataset("list", tmp_path, images_per_class=10)
    (tmp_path / "val.txt").unlink()
    first, again, other = (load_data(str(tmp_path / "train.txt"), SMALL, seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.val), len(first.test), len(first.train_and_val)) == (27, 3, 30, 30)
    assert first.val.indices == again.val.indices != other.val.indices
    assert not set(first.train.indices) & set(first.val.indices)
    assert first.protocol == "paper: train/val 90/10 of every class of train, seed 0"


def test_images_of_train_that_are_tested_as_well_are_counted(tmp_path):
    write_images(tmp_path, [f"{n}.png" for n in range(6)])
    for split, numbers in (("train", [0, 1, 2]), ("val", [3]), ("test", [2, 4, 5])):
        (tmp_path / f"{split}.txt").write_text("".join(f"./{n}.png {n % 2}\n" for n in numbers))
    told = "paper: the splits as they are; 1 of the 3 images of test are in train as well"
    assert load_data(str(tmp_path), SMALL, 0).protocol == told
    (tmp_path / "test.txt").write_text("4.png 0\n5.png 1\n")
    assert load_data(str(tmp_path), SMALL, 0).protocol == "paper: the splits as they are"
    (tmp_path / "val.txt").write_text(f"{tmp_path}/4.png 0\n3.png 1\n")
    told = "paper: the splits as they are; 1 of the 2 images of test are in val as well"
    assert load_data(str(tmp_path), SMALL, 0).protocol == told
    (tmp_path / "all.csv").write_text("path,label,split\n0.png,0,train\n1.png,1,train\n2.png,1,val\n0.png,0,test\n")
    told = "paper: the splits as they are; 1 of the 1 images of test are in train as well"
    assert load_data(str(tmp_path / "all.csv"), SMALL, 0).protocol == told


def test_an_image_listed_by_two_paths_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root, paths in (
        (None, ("a.png", tmp_path / "lists" / "a.png")),
        ("images", ("a.png", tmp_path / "images/a.png")),
    ):
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / "lists" / "all.csv").write_text("path,label\n" + "".join(f"{path},elk\n" for path in paths))
        with pytest.raises(DataError, match=r"a.png twice, as elk: expected each image once"):
            load_data("lists/all.csv", SMALL, 0, root=root)


@pytest.mark.parametrize("load", [load_data, lambda *args: load_test_data(*args, ["elk", "owl"])])
def test_an_empty_name_is_not_the_current_folder(load, tmp_path, monkeypatch):
    make_fake_dataset("folder", tmp_path, images_per_class=10)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="`data` is '': no such folder or list"):
        load("", SMALL, 0)


def test_a_name_that_is_nothing_is_told_what_there_is():
    with pytest.raises(
        DataError, match="`data` is cubs: no such folder or list; the names known are digits, dtd, cub, nabirds"
    ):
        load_data("cubs", SMALL, 0)
    with pytest.raises(
        DataError,
        match="`data` is vtab/pets: no such folder or list; the names known are vtab/caltech101, vtab/cifar, ",
    ):
        load_data("vtab/pets", SMALL, 0)


# Timm's formats


def test_tar_files_named_by_an_index(tmp_path):
    make_fake_dataset("wds", tmp_path, images_per_class=2)
    (tmp_path / "train-0000.tar").rename(tmp_path / "first.tar")
    (tmp_path / "val-0000.tar").rename(tmp_path / "validation-0000.tar")
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": ["first.tar"]}}}))
    data = load_data("wds/here", SMALL, 0, root=str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (6, 6, 6)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(DataError, match="_info.json: expected splits, each with its filenames"):
        load_data("wds/here", SMALL, 0, root=str(tmp_path))


def test_the_bytes_in_a_tar_are_the_images(tmp_path):
    """Two samples, as the package webdataset lays them out; read in any order, and named where they are broken."""
    write_images(tmp_path, ["a/0.png", "a/1.png"])
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for n in (0, 1):
                (tmp_path / f"{n}.cls").write_text(f"{n}\n")
                tar.add(tmp_path / f"{n}.cls", f"./{n}.cls")
                tar.add(tmp_path / f"a/{n}.png", f"./{n}.png")
    test = load_test_data(f"wds/{tmp_path}", SMALL, 0, ["0", "1"])
    for n in (1, 0):
        with Image.open(tmp_path / f"a/{n}.png") as image:
            assert torch.equal(test[n][0], transform_for(SMALL)(image))
    content = (tmp_path / "test.tar").read_bytes()
    (tmp_path / "test.tar").write_bytes(content.replace(b"IHDR", b"IHD_"))
    with pytest.raises(DataError, match=r"test.tar:./1.png: not an image that can be read"):
        load_test_data(f"wds/{tmp_path}", SMALL, 0, ["0", "1"])[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_is_gone_is_named_in_one_line(workers, tmp_path):
    test = load_data(make_fake_dataset("wds", tmp_path), SMALL, 0).test
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    loader = Loader(test, BatchSampler(len(test), 2), workers, torch.device("cpu"))
    with pytest.raises(DataError, match=r"^\S+\.tar:\S+: cannot be read \(.*No such file.*\)$"):
        next(iter(loader))


def test_wrong_tar_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected train\*.tar"):
        load_data(f"wds/{tmp_path}", SMALL, 0)
    make_fake_dataset("wds", tmp_path)
    content = (tmp_path / "train-0000.tar").read_bytes()
    for wrong in (b"no tar", content[:700], content[:1200]):
        (tmp_path / "train-0000.tar").write_bytes(wrong)
        with pytest.raises(DataError, match="train-0000.tar: "):
            load_data(f"wds/{tmp_path}", SMALL, 0)


def test_tar_files_have_class_names(tmp_path):
    """In the .cls files, or in a file of names; a class that is only in test is named."""
    write_images(tmp_path, ["0.png"])
    for split, labels in (("train", ["owl", "elk"]), ("valid", ["elk"]), ("test", ["owl", "yak"])):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for n, label in enumerate(labels):
                (tmp_path / "0.cls").write_text(label)
                tar.add(tmp_path / "0.cls", f"{n}.cls")
                tar.add(tmp_path / "0.png", f"{n}.png")
    with pytest.raises(DataError, match="test: found the class yak: expected some of the 2 classes of train: elk, owl"):
        load_data(f"wds/{tmp_path}", SMALL, 0)
    (tmp_path / "classnames.txt").write_text("elk\nyak\nowl\n")
    data = load_data(f"wds/{tmp_path}", SMALL, 0)
    assert data.class_names == ["elk", "yak", "owl"] and data.train.classes == [2, 0] and data.test.classes == [2, 1]
    make_fake_dataset("wds", tmp_path / "indices")
    (tmp_path / "indices" / "classes.txt").write_text("red\ngreen\nblue\n")
    assert load_data(f"wds/{tmp_path / 'indices'}", SMALL, 0).class_names == ["red", "green", "blue"]
    (tmp_path / "indices" / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(DataError, match="train: found the class 2: expected some of the 2 classes of train: red"):
        load_data(f"wds/{tmp_path / 'indices'}", SMALL, 0)
    (tmp_path / "indices" / "classes.txt").write_text("red\ngreen\nred\n")
    with pytest.raises(DataError, match="train: the known classes have red more than once: expected a name for each"):
        load_data(f"wds/{tmp_path / 'indices'}", SMALL, 0)


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("path,elk,elk\n0.png,1,0\n1.png,0,1\n2.png,1,1\n3.png,1,1\n")
    write_images(tmp_path, [f"{i}.png" for i in range(4)])
    with pytest.raises(DataError, match="the known classes have elk more than once"):
        load_data(str(tmp_path), SMALL, 0)


def test_webdataset_reads_what_is_made(tmp_path):
    """The fake tar files are what timm's own reader expects."""
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    source = make_fake_dataset("wds", tmp_path)
    expected = list(create_dataset("wds/", str(tmp_path), "train-0000.tar"))
    found = load_data(source, SMALL, 0).train
    assert [label for _, label in expected] == found.classes
    assert all(np.array_equal(image, found.decode(i)) for i, (image, _) in enumerate(expected))


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_hugging_face_data_sets_from_a_local_folder(reader, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    make_fake_dataset("folder", tmp_path / "images", images_per_class=2)
    data = load_data(f"{reader}/{tmp_path / 'images'}", SMALL, 0, root=str(tmp_path / "hf"))
    folder = load_data(str(tmp_path / "images"), SMALL, 0)
    assert data.class_names == folder.class_names and data.test.classes == folder.test.classes
    assert all(torch.equal(data.test[i][0], folder.test[i][0]) for i in range(6))


class Reader:
    """A stand-in for timm's reader of Hugging Face datasets: integer labels, with or without names."""

    def __init__(self, labels, class_to_idx):
        pyarrow = pytest.importorskip("pyarrow")
        self.labels, self.class_to_idx = labels, class_to_idx
        images = pyarrow.array([{"bytes": b"an image", "path": ""}] * len(labels))
        self.dataset = SimpleNamespace(data=pyarrow.table({"image": images, "label": [0] * len(labels)}))

    def __len__(self):
        return len(self.labels)

    def iter_targets(self):
        return iter(self.labels)


@pytest.mark.parametrize(
    ("names", "test", "unknown"), [({"elk": 0, "owl": 1}, [1, -1], "-1"), ({}, [1, 7], "7"), ({}, ["1", "yak"], "yak")]
)
def test_a_class_that_only_test_has_is_named(names, test, unknown, monkeypatch):
    labels = {"train": [0, 1, 0, 1], "validation": [1], "test": test}

    def create_dataset(name, root, split):
        if split not in labels:
            raise ValueError(f"unknown split {split}")
        return SimpleNamespace(reader=Reader(labels[split], names))

    monkeypatch.setattr(timm_formats, "create_dataset", create_dataset)
    with pytest.raises(
        DataError, match=f"hfds/animals, test: found the class {unknown}: expected .* 2 classes of train"
    ):
        load_data("hfds/animals", SMALL, 0)


@pytest.mark.parametrize(
    ("columns", "images", "labels", "found"),
    [
        (("img", "label"), 6, [0, 1], "train has the columns img, label: expected image and label"),
        (("image", "fine_label"), 6, [0, 1], "train has the columns image, fine_label: expected image and label"),
        (("image", "label"), 0, [0, 1], "train has the columns label: expected image and label"),
        (("image", "label"), 5, [0, 1], "train has no image in 1 of 6 rows: expected one in each"),
        (("image", "label"), 6, [None, None], "train: found the label None: expected a number of a class or its name"),
        (("image", "label"), 6, [0, 1], None),
    ],
)
def test_images_and_labels_of_a_hugging_face_data_set_are_in_its_columns(
    columns, images, labels, found, tmp_path, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = {columns[0]: [Image.new("RGB", (8, 8))] * images + [None] * (6 - images), columns[1]: labels * 3}
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.Value("int64")})
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows" / "train.parquet")
    refused = nullcontext() if found is None else pytest.raises(DataError, match=found)
    with refused:
        assert read_source(f"hfds/{tmp_path / 'rows'}", root=str(tmp_path / "hf")).class_names == ["0", "1"]


NOTHING = {"bytes": None, "path": None}


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ([NOTHING, {"bytes": b"", "path": ""}, None], 3),
        ([None] * 4, 4),
        ([NOTHING, {"bytes": b"x", "path": None}, {"bytes": None, "path": "x"}, {"bytes": b"", "path": "x"}], 1),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_without_an_image_are_counted_in_every_split(images, found, split, tmp_path, monkeypatch):
    """An image is bytes or a path; a row that is not null may have neither."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    whole = {"bytes": b"x", "path": None}
    splits = {"train": [whole] * 2, "test": [whole] * 2} | {split: [*images, *[whole] * (split == "train")]}
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    (tmp_path / "rows").mkdir()
    for name, rows in splits.items():
        table = pyarrow.table({"image": pyarrow.array(rows, kind), "label": list(range(len(rows)))})
        pyarrow.parquet.write_table(table, tmp_path / "rows" / f"{name}.parquet")
    message = f"{split} has no image in {found} of {len(splits[split])} rows: expected one in each"
    with pytest.raises(DataError, match=message):
        read_source(f"hfds/{tmp_path / 'rows'}", root=str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("label", "shown"), [(0.5, "0.5"), ([1, 2], r"\[1, 2\]"), (np.zeros(2), r"\[0. 0.\]"), (None, "None")]
)
def test_labels_that_are_no_classes_are_refused(label, shown, monkeypatch):
    monkeypatch.setattr(timm_formats, "create_dataset", lambda *_: SimpleNamespace(reader=Reader([0, label], {})))
    with pytest.raises(DataError, match=f"`data` is hfds/x: train: found the label {shown}: expected a number of a"):
        load_data("hfds/x", SMALL, 0)


@pytest.mark.parametrize(
    ("labels", "names"),
    [([True, False], ["False", "True"]), ([np.int64(3), np.int64(1)], ["1", "3"]), (["b", "a"], ["a", "b"])],
)
def test_labels_without_names_are_classes(labels, names, monkeypatch):
    monkeypatch.setattr(timm_formats, "create_dataset", lambda *_: SimpleNamespace(reader=Reader(labels, {})))
    splits, found = read_source("hfds/x")
    assert found == names and [found[index] for index in splits["train"].classes] == [str(label) for label in labels]


FEATURES = {
    "image": {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}, "encodingFormat": "png"},
    },
    "label": {
        "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "2"},
    },
}


def write_tfrecords(file: Path, records: list[bytes]) -> None:
    """The format without its checksums, which nobody reads here."""
    file.write_bytes(b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records))


def test_tensorflow_data_sets_prepared_on_disk(tmp_path):
    """As the library lays them out, in two files per split; read in any order, in worker processes too."""
    pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.proto import tf_example_pb2

    folder, splits = tmp_path / "animals" / "1.0.0", {"train": 6, "validation": 4}
    write_images(tmp_path, [f"{n}.png" for n in range(6)])
    folder.mkdir(parents=True)
    for split, count in splits.items():
        records = []
        for n in range(count):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append((tmp_path / f"{n}.png").read_bytes())
            example.features.feature["label"].int64_list.value.append(n % 2)
            records.append(example.SerializeToString())
        for shard, part in enumerate((records[:1], records[1:])):
            write_tfrecords(folder / f"animals-{split}.tfrecord-0000{shard}-of-00002", part)
    info = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": ["1", str(count - 1)],
        }
        for split, count in splits.items()
    ]
    about = {"name": "animals", "version": "1.0.0", "fileFormat": "tfrecord", "splits": info}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    (folder / "features.json").write_text(json.dumps({"pythonClassName": name, "featuresDict": {"features": FEATURES}}))
    (folder / "label.labels.txt").write_text("elk\nowl\n")
    data = load_data("tfds/animals", SMALL, 0, root=str(tmp_path))
    assert data.class_names == ["elk", "owl"] and data.test.classes == [0, 1, 0, 1]
    for n, (image, label) in reversed(list(enumerate(DataLoader(data.test, None, num_workers=1)))):
        with Image.open(tmp_path / f"{n}.png") as expected:
            assert torch.equal(image, transform_for(SMALL)(expected)) and label == n % 2
    with pytest.raises(DataError, match="`data` is tfds/yaks: cannot be opened in .*not found"):
        load_data("tfds/yaks", SMALL, 0, root=str(tmp_path))


def test_tfrecords_are_read_in_any_order_and_held_by_none(tmp_path):
    """Memory stays bounded: what is kept of 1000 records of 10 kB is 24 bytes each."""
    for name, records in (("a", [b"one", b""]), ("b", [b"x" * 10_000] * 1000)):
        write_tfrecords(tmp_path / name, records)
    records = TFRecords([tmp_path / "a", tmp_path / "b"])
    assert len(records) == 1002 and records[1001] == b"x" * 10_000 and records[1] == b"" and records[0] == b"one"
    assert len(pickle.dumps(records)) < 26_000
    content = (tmp_path / "b").read_bytes()
    for kept in (5, 12, len(content) - 1):
        (tmp_path / "b").write_bytes(content[:kept])
        with pytest.raises(DataError, match="/b: ends within a record"):
            TFRecords([tmp_path / "b"])


def test_a_reader_that_is_not_installed_or_finds_nothing(monkeypatch):
    def fail(error):
        def create_dataset(name, root, split):
            raise error

        monkeypatch.setattr(timm_formats, "create_dataset", create_dataset)

    fail(ImportError("no"))
    with pytest.raises(DataError, match="`data` is hfds/a/b, which needs a package: pip install datasets"):
        load_data("hfds/a/b", SMALL, 0)
    fail(RuntimeError("not within reach"))
    with pytest.raises(DataError, match=r"`data` is hfds/a/b: train cannot be opened \(not within reach\)"):
        load_data("hfds/a/b", SMALL, 0)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="`data` is tfds/a, which needs a package: pip install tensorflow-datasets"):
        load_data("tfds/a", SMALL, 0)


# Folders, digits


def test_images_of_a_folder_are_named_when_they_are_broken(tmp_path):
    make_fake_dataset("folder", tmp_path)
    (tmp_path / "val" / "class_1" / "0.jpg").write_bytes(b"")
    data = load_data(str(tmp_path), SMALL, 0)
    with pytest.raises(DataError, match=r"class_1/0.jpg: not an image that can be read"):
        data.val[2]
    assert not check(str(tmp_path)).ok


def test_a_list_of_something_else_does_not_hide_a_folder(tmp_path):
    make_fake_dataset("folder", tmp_path)
    (tmp_path / "val.txt").write_text("nothing to do with it\n")
    assert load_data(str(tmp_path), SMALL, 0).class_names == ["class_0", "class_1", "class_2"]


def test_digits_are_divided_by_seed():
    first, again, other = (load_data("digits", SMALL, seed) for seed in (0, 0, 1))
    assert [len(split) for split in (first.train, first.val, first.test)] == [1257, 180, 360]
    assert first.train.classes == again.train.classes != other.train.classes
    assert first.class_names == [str(digit) for digit in range(10)]
    assert torch.equal(first.train[0][0], first.train[0][0])  # a digit is not cropped or flipped
    assert torch.equal(load_test_data("digits", SMALL, 0, first.class_names)[7][0], first.test[7][0])
    with pytest.raises(DataError, match="`data` is digits: found the class 0, 1, .* expected some of .*: owl"):
        load_test_data("digits", SMALL, 0, ["owl"])


# Transforms


def test_the_preset_is_resize_256_crop_224():
    preset = insvp_preprocessing()
    plain, training = (transform_for(preset, training).transforms for training in (False, True))
    assert [type(step).__name__ for step in plain] == ["Resize", "CenterCrop", "MaybeToTensor", "Normalize"]
    names = ["Resize", "RandomCrop", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    assert [type(step).__name__ for step in training] == names
    assert plain[0].size == training[0].size == 256 and tuple(training[1].size) == (224, 224)
    assert plain[0].interpolation.value == training[0].interpolation.value == "bilinear"
    assert plain[-1].mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert insvp_preprocessing(384)["input_size"] == [3, 384, 384]


def test_timm_crops_flips_and_colors_in_training():
    preprocessing = SMALL | {"augmentation": "timm"}
    steps = [type(step).__name__ for step in transform_for(preprocessing, training=True).transforms]
    assert steps[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "ColorJitter"]


def test_the_16_levels_of_digits_are_spread_over_8_bits():
    levels = np.unique(np.concatenate([images.items for images in read_source("digits").splits.values()]))
    assert levels.tolist() == [round(255 * level / 16) for level in range(17)]
