"""Data as people have them: folders of classes, tables, missing splits, several labels; and what is refused."""

import dataclasses
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image

from insvp_fast.commands import cli
from insvp_fast.data import insvp_preprocessing, load_data, load_test_data
from insvp_fast.data.folders import require_class_folders
from insvp_fast.data.lists import find_lists, read_lists
from insvp_fast.data.load import divide_source
from insvp_fast.data.sources import read_source
from insvp_fast.data.splits import stratified_split, three_way_split
from insvp_fast.data.tables import parse_table
from insvp_fast.errors import DataError
from insvp_fast.training import run
from insvp_fast.training.evaluation import _count_trained, evaluate_run
from insvp_fast.training.load import load_run
from insvp_fast.training.run_folder import read_config

SMALL = insvp_preprocessing(32)
DIVIDED = "no val and no test were found, so these are 70/10/20 of every class of train, seed"


def make_images(root: Path, counts: dict[str, int]) -> Path:
    """``counts`` images of noise in each folder."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.new("RGB", (40, 32), (n, len(folder), 99)).save(root / folder / f"{n}.png")
    return root


def parts_of(data) -> list[set[str]]:
    """The paths of train, val and test."""
    return [{str(part.dataset.items[i]) for i in part.indices} for part in (data.train, data.val, data.test)]


# Folders


@pytest.mark.parametrize("layout", ["folders", "list", "table"])
def test_one_class_is_refused(layout, tmp_path):
    """Its softmax is 1, whatever the image: a folder too much, or a wrong column of labels, would be 100 % accuracy."""
    source = make_images(tmp_path, {"train/owl": 3, "val/owl": 1, "test/owl": 1})
    if layout != "folders":
        separator, source = (" ", tmp_path / "all.txt") if layout == "list" else (",", tmp_path / "all.csv")
        rows = [f"train/owl/{n}.png{separator}owl\n" for n in range(3)]
        source.write_text("".join([f"path{separator}label\n"] * (layout == "table") + rows))
    with pytest.raises(DataError, match="`data` is .*: its classes are owl: expected two or more"):
        load_data(str(source), SMALL, 0)
    assert len(divide_source(str(source), 0)["train"]) > 0  # of an earlier run: which images it was trained on


def test_a_folder_of_classes_is_divided_in_three(tmp_path):
    folder = make_images(tmp_path, {"elk": 20, "owl": 10, "yak/white": 6, ".git/a": 1})
    data, again, other = (load_data(str(folder), SMALL, seed) for seed in (0, 0, 1))
    train, val, test = parts_of(data)
    assert (len(train), len(val), len(test)) == (24, 4, 8) and len(train | val | test) == 36
    assert data.class_names == ["elk", "owl", "yak"]
    assert [data.test.classes.count(c) for c in range(3)] == [
        5,
        2,
        1,
    ]  # 8/36 of each class, rounded
    assert data.protocol == f"paper: {DIVIDED} 0"
    assert parts_of(again) == [train, val, test] != parts_of(other)
    assert len(data.train_and_val) == 28 and not {str(i) for i in data.train_and_val.indices} & test
    # a run is tested on the same images later, and on all images of data it was not trained on
    tested = load_test_data(str(folder), SMALL, 0, data.class_names)
    assert tested.classes == data.test.classes and torch.equal(tested[3][0], data.test[3][0])
    assert len(load_test_data(str(folder), SMALL, None, data.class_names)) == 36


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Valid"])
def test_names_of_val(val, tmp_path):
    folder = make_images(tmp_path, {f"{split}/{c}": 1 for split in ("Train", val, "test") for c in ("elk", "owl")})
    data = load_data(str(folder), SMALL, 0)
    assert data.protocol == "paper: the splits as they are"
    assert data.val.items[0] == str(tmp_path / val / "elk" / "0.png")


def test_val_without_test_is_tested_on_and_selects_nothing(tmp_path):
    folder = make_images(tmp_path, {"train/elk": 10, "train/owl": 10, "valid/elk": 3, "valid/owl": 2})
    data = load_data(str(folder), SMALL, 0)
    assert data.test.items == load_test_data(str(folder), SMALL, 0, data.class_names).items
    assert len(data.test) == 5 and all("/valid/" in path for path in data.test.items)
    assert (len(data.train), len(data.val), len(data.train_and_val)) == (18, 2, 20)
    assert all("/train/" in data.val.dataset.items[i] for i in data.val.indices)
    words = "no test was found, so val is only tested on; train/val 90/10 of every class of train, seed 0"
    assert data.protocol == f"paper: {words}"


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "found nothing: expected train, val and test, or one folder of images per class"),
        ({"images": 2}, "found images: expected train, val and test, or one folder"),
        ({"elk": 2, "owl": 0}, "found no image in the class folder owl"),
        ({"": 1, "elk": 2, "owl": 2}, "found 0.png beside the folders elk, owl: expected"),
        ({"elk.jpg": 2, "owl": 0}, "found no image in the class folder owl"),
        ({"a/elk": 2, "a/owl": 2, "b/elk": 2, "b/owl": 2}, "found elk, owl in each of a, b: expected"),
        ({"val/elk": 2, "test/elk": 2}, "found test, val: expected a folder train as well"),
        ({"train/elk": 2, "val/elk": 2, "valid/elk": 2}, "found val and valid: expected one folder for val"),
        ({"elk": 3, "owl": 2}, "train cannot be divided: the class owl has fewer than 3 images"),
        ({"train/elk": 1, "train/owl": 2, "test/elk": 1}, "the class elk has fewer than 2 images"),
        ({"train/elk": 2, "test/elk": 2, "test/yak": 1}, "/test: found the class yak: expected .* of train: elk"),
        ({"train/elk": 2, "valid/yak": 1}, "/valid: found the class yak: expected .* of train: elk"),
    ],
)
def test_layouts_that_are_refused(folders, message, tmp_path):
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        load_data(str(make_images(tmp_path, folders)), SMALL, 0)


@pytest.mark.parametrize("per_class", [3, 4, 7, 30])
def test_few_images_per_class_are_divided(per_class):
    classes = [c for c in range(20) for _ in range(per_class)]
    parts = three_way_split(classes, 5)
    assert sorted(chain(*parts)) == list(range(20 * per_class))
    for rows in parts:
        assert {classes[row] for row in rows} == set(range(20))


def test_the_division_is_the_one_it_was():
    """These are scikit-learn's numbers: splits that were recorded must not move."""
    assert stratified_split(range(40), [0, 1] * 20, 0.1, 0)[1] == [24, 30, 15, 13]
    several = torch.arange(40)[:, None].bitwise_and(2 ** torch.arange(6)).bool()  # no two images have the same labels
    assert stratified_split(range(40), several, 0.1, 0)[1] == [22, 20, 25, 4]


# Tables


TABLES = {
    "header.csv": "path,label\na b.png,owl\nc.png,elk\nd.png,owl\n",
    "no header.csv": '"a b.png", "owl"\nc.png,elk\nd.png,owl\n',
    "excel.csv": "\ufeffpath;label\r\na b.png;owl\r\nc.png;elk\r\nd.png;owl\r\n",
    "pandas.csv": ",Class Name,width,file_name\n0,owl,9,a b.png\n1,elk,8,c.png\n2,owl,7,d.png\n",
    "empty rows.csv": "path,label\na b.png,owl\n,\nc.png,elk\nd.png,owl\n,\n \n",
    "a semicolon.csv": "a b.png,owl;\nc.png,elk\nd.png,owl\n",
    "unknown names.csv": "photo,species\na b.png,owl\nc.png,elk\nd.png,owl\n",
    "pandas of unknown names.csv": ",photo,species\n0,a b.png,owl\n1,c.png,elk\n2,d.png,owl\n",
    "UPPER.CSV": "path,label\na b.png,owl\nc.png,elk\nd.png,owl\n",
    "spaces.csv": "path , label \na b.png ,owl \n c.png , elk \nd.png,owl\n",
    "row numbers and blank columns.csv": "Unnamed: 0,,photo,Index,species,\n0,,a b.png,9,owl,\n1,,c.png,8,elk,\n"
    "2,,d.png,7,owl,\n",
    "two pictures.csv": "photo,thumbnail,label\na b.png,0.png,owl\nc.png,1.png,elk\nd.png,2.png,owl\n",
    "header.tsv": "path\tlabel\na b.png\towl\nc.png\telk\nd.png\towl\n",
    "no header.txt": "a b.png\towl\nc.png\telk\nd.png\towl\n\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_each_kind(name, tmp_path):
    for image in ("a b.png", "c.png", "d.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / image)
    (tmp_path / name).write_text(TABLES[name], newline="")
    tested = load_test_data(str(tmp_path / name), SMALL, None, ["elk", "owl"])
    assert tested.classes == [1, 0, 1] and [item.name for item in tested.items] == ["a b.png", "c.png", "d.png"]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("val", ["val", "validation", "Valid"])
def test_a_table_with_a_column_of_splits(val, header, tmp_path):
    make_images(tmp_path, {"x": 6})
    rows = [("0", "10", "train"), ("1", "9", "train"), ("2", "9", val), ("3", "10", "test"), ("4", "10", "train")]
    text = "path,label,split\n" * header + "".join(f"x/{n}.png,{label},{split}\n" for n, label, split in rows)
    (tmp_path / "animals.csv").write_text(text)
    data = load_data(str(tmp_path / "animals.csv"), SMALL, 0)
    assert data.class_names == ["9", "10"] and data.protocol == "paper: the splits as they are"
    assert (data.train.classes, data.val.classes, data.test.classes) == ([1, 0, 1], [0], [1])
    assert not data.multi_label
    tested = load_test_data(str(tmp_path / "animals.csv"), SMALL, 0, ["9", "10"])
    assert tested.items == [tmp_path / "x" / "3.png"]


def test_a_table_with_a_column_of_splits_and_no_val(tmp_path):
    make_images(tmp_path, {"x": 22})
    rows = "".join(f"x/{n}.png,{('elk', 'owl')[n % 2]},{'train' if n < 20 else 'test'}\n" for n in range(22))
    (tmp_path / "animals.csv").write_text(f"path,label,split\n{rows}")
    data = load_data(str(tmp_path / "animals.csv"), SMALL, 0)
    assert data.protocol == "paper: train/val 90/10 of every class of train, seed 0"
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 2)


def test_images_of_a_table_without_header_are_known_by_an_ending_in_any_case():
    images, _ = parse_table("A.JPG,elk\nB.PNG,owl\n", ",")
    assert [image.path for image in images] == ["A.JPG", "B.PNG"]


def test_tables_beside_each_other_and_a_table_alone(tmp_path):
    make_images(tmp_path, {"x": 20})
    names = [f"x/{n}.png,{('elk', 'owl')[n % 2]}\n" for n in range(20)]
    (tmp_path / "train.csv").write_text("".join(names[:16]))
    (tmp_path / "valid.csv").write_text("".join(names[16:]))
    for source in (tmp_path, tmp_path / "train.csv"):
        data = load_data(str(source), SMALL, 0)
        assert len(data.test) == 4 and len(data.val) == 2 and "val is only tested on" in data.protocol
    (tmp_path / "valid.csv").rename(tmp_path / "latest.csv")
    for source, count in ((tmp_path, 16), (tmp_path / "train.csv", 16), (tmp_path / "latest.csv", 4)):
        if count > 4:
            parts = parts_of(load_data(str(source), SMALL, 0))
            assert [len(part) for part in parts] == [10, 2, 4] and len(set.union(*parts)) == count
        assert len(load_test_data(str(source), SMALL, None, ["elk", "owl"])) == count
    (tmp_path / "train.txt").write_text("x/0.png elk\n")
    with pytest.raises(DataError, match="found train.csv and train.txt: expected one list for train"):
        load_data(str(tmp_path), SMALL, 0)
    (tmp_path / "train.txt").unlink()
    (tmp_path / "train.csv").write_text("path,label,split\nx/0.png,elk,train\n")
    (tmp_path / "test.csv").write_text("x/1.png,elk\n")
    with pytest.raises(DataError, match="found a column of splits in one of 2 lists: expected one list then"):
        load_data(str(tmp_path), SMALL, 0)
    (tmp_path / "my_test.csv").write_text("".join(names))
    with pytest.raises(DataError, match="my_test.csv: found test alone: expected train as well"):
        load_data(str(tmp_path / "my_test.csv"), SMALL, 0)


def test_a_folder_is_no_list(tmp_path):
    (tmp_path / "train.txt").touch()
    (tmp_path / "test.txt").mkdir()
    assert find_lists(tmp_path / "train.txt") == {"train": tmp_path / "train.txt"}
    with pytest.raises(DataError, match="test.txt: not a list of images that can be read"):
        read_lists({"test": tmp_path / "test.txt"})


def test_an_image_of_any_ending_beside_the_folders_of_classes_is_refused(tmp_path):
    for name in ("elk", "owl"):
        (tmp_path / name).mkdir()
    (tmp_path / "0.PNG").touch()
    with pytest.raises(DataError, match="found 0.PNG beside the folders elk, owl"):
        require_class_folders(tmp_path)


def test_folders_of_classes_may_hold_different_folders(tmp_path):
    make_images(tmp_path, {"elk/brown": 1, "elk/white": 1, "owl/white": 1})
    require_class_folders(tmp_path)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        ("Train.csv Val.csv TEST.CSV", ". Train.csv"),
        ("training.txt validation.txt Testing.txt", ". training.txt"),
        ("TRAIN.json valid.json Test.JSON", ". TRAIN.json"),
        ("split_Training_1.csv split_val_1.csv SPLIT_test_1.csv", "split_Training_1.csv"),
        ("constrained_train.txt constrained_val.txt constrained_testing.txt", "constrained_train.txt"),
        ("TrainList01.txt ValList01.txt testlist01.txt", "TrainList01.txt"),
        ("train2017.tsv val2017.tsv test2017.tsv", "train2017.tsv"),
        ("test_run_train.txt test_run_val.txt test_run_test.txt", "test_run_train.txt"),
        ("myTrainingSet.txt myvalset.txt mytestset.txt", "myTrainingSet.txt"),
        ("a+b_train.txt a+b_val.txt a+b_test.txt", "a+b_train.txt"),
    ],
)
def test_names_of_lists_in_any_case(names, given, tmp_path):
    files = [tmp_path / name for name in names.split()]
    for file in [*files, tmp_path / "test_pretrained.csv", tmp_path / "trains.txt"]:
        file.touch()
    for source in given.split():
        assert find_lists(tmp_path / source) == dict(zip(("train", "val", "test"), files, strict=True))
    (tmp_path / "trainval.json").touch()
    (tmp_path / "animals.csv").touch()
    alone = {
        "animals.csv": "train",
        "constrained_val.txt": "val",
        "Testing.txt": "test",
        "test_pretrained.csv": "test",
        "trainval.json": "train",
    }
    for name, split in alone.items():
        assert find_lists(tmp_path / name) == {split: tmp_path / name}
    (tmp_path / "Labels").mkdir()
    for name in ("train.txt", "test.txt", "Testing.txt"):
        (tmp_path / "Labels" / name).touch()
    for source in ("Labels", "Labels/train.txt"):
        with pytest.raises(DataError, match="found Testing.txt and test.txt: expected one list for test"):
            find_lists(tmp_path / source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty list"),
        ("path,label\n", "found an empty list"),
        ("a.png,elk\nb.png\n", "line 2 has 1 columns, the first has 2"),
        ("a.png,elk\nb.png,elk,owl\n", "line 2 has 3 columns, the first has 2"),
        ("path,label\na.png,elk,7\n", "line 2 has 3 columns, the first has 2"),
        ("a.png,1,0,1\nb.png,0,1,1\n", "found 4 columns: expected the columns path, label and"),
        ("path,elk,owl\na.png,1,0\nb.png,0,x\n", "line 3: found 'x' in the column 'owl': expected 0 or 1"),
        ("a.png\nb.png\n", "found 1 columns: expected the columns path, label and"),
        ("id,name\n1,elk\n", "found id, name: expected the columns path, label and"),
        (
            "path,species,age\na.png,elk,7\n",
            "line 2: found 'elk' in the column 'species': expected 0 or 1, or one column of labels",
        ),
        ("path,label,split\na.png,elk,extra\n", "line 2: found the split 'extra': expected train, val or test"),
        ("path,label\na.png,elk\nb.png,\n", "found no label of b.png: expected one for each image"),
        ("path,label\na.png,elk\na.png,owl\n", "found a.png twice, as elk and as owl: expected each image once"),
        ("path,labels\na.png,elk;owl\na.png,\n", "found a.png twice, as elk, owl and as nothing"),
        ("path,elk,owl\na.png,0,1\n./a.png,1,0\n", "found ./a.png twice, as owl and as elk"),
        ("path,label,split\na.png,elk,test\nb.png,elk,train\na.png,owl,test\n", "found a.png twice, as elk and as owl"),
        ("path,label\na.png,0.5\nb.png,2\n", "found the labels 0.5: expected classes; predicting numbers"),
    ],
)
def test_tables_that_are_refused(text, message, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=f"train.csv: .*({message})"):
        load_data(str(tmp_path / "train.csv"), SMALL, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.txt", "a.png 1E-3\nb 1e-3\n"),
        ("train.txt", "a.png 1\nb.png -0.5\n"),
        ("train.json", '{"a.png": 0.5}'),
    ],
)
def test_regression_is_refused_in_every_list(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"expected classes; predicting numbers \(regression\) is not supported"):
        load_data(str(tmp_path / name), SMALL, 0)


# Several labels


MULTI = {
    "semicolons": "path,tags,split\nx/0.png,elk; owl,train\nx/1.png,yak,train\nx/2.png,,val\nx/3.png,yak;elk,test\n",
    "bars": "x/0.png\telk|owl\ttrain\nx/1.png\tyak\ttrain\nx/2.png\t\tval\nx/3.png\tyak|elk\ttest\n",
    "columns": "path,yak,elk,owl,set\nx/0.png,0,1,1,train\nx/1.png,1.0,0.0,0,train\nx/2.png,0,0,0,val\n"
    "x/3.png,1,1,0,test\n",
}


@pytest.mark.parametrize("kind", MULTI)
@pytest.mark.parametrize("cached", [False, True])
def test_several_labels_per_image(kind, cached, tmp_path):
    make_images(tmp_path, {"x": 4})
    list_file = tmp_path / ("animals.tsv" if kind == "bars" else "animals.csv")
    list_file.write_text(MULTI[kind])
    data = load_data(str(list_file), SMALL, 0, cache=str(tmp_path / "cache") if cached else None)
    names = ["yak", "elk", "owl"] if kind == "columns" else ["elk", "owl", "yak"]
    assert data.multi_label and data.class_names == names
    for part, expected in ((data.train, [{"elk", "owl"}, {"yak"}]), (data.val, [set()]), (data.test, [{"elk", "yak"}])):
        for n, labels in enumerate(expected):
            target = part[n][1]
            assert target.dtype == torch.float32 and target.shape == (3,)
            assert target.tolist() == [name in labels for name in names]
    if kind == "columns":  # in which one label each is no reason for one label each
        list_file.write_text("path,yak,elk,owl,set\nx/0.png,0,1,0,train\nx/1.png,1,0,0,val\nx/2.png,0,0,0,test\n")
        assert load_data(str(list_file), SMALL, 0).test[0][1].tolist() == [0, 0, 0]
        list_file.write_text(MULTI[kind])
    # a model's order of classes, and lists of which only the others hold several labels
    tested = load_test_data(str(list_file), SMALL, 0, ["owl", "yak", "elk"])
    assert tested.classes.tolist() == [[0.0, 1.0, 1.0]]
    with pytest.raises(DataError, match=r"\(test\): found the class elk: expected some of the 1 classes of train: yak"):
        load_test_data(str(list_file), SMALL, 0, ["yak"])


def test_images_with_several_labels_are_divided(tmp_path):
    make_images(tmp_path, {"x": 20})
    (tmp_path / "all.csv").write_text("".join(f"x/{n}.png,elk{';owl' * (n % 2)}\n" for n in range(20)))
    data = load_data(str(tmp_path / "all.csv"), SMALL, 0)
    assert [len(part) for part in parts_of(data)] == [14, 2, 4] and len(set.union(*parts_of(data))) == 20
    assert "these are 70/10/20 of train at random, seed 0" in data.protocol
    assert parts_of(load_data(str(tmp_path / "all.csv"), SMALL, 1)) != parts_of(data)
    assert data.train.classes.shape == (14, 2) and torch.equal(data.train.classes[3], data.train[3][1])
    (tmp_path / "two.csv").write_text("path,elk,owl\nx/0.png,1,1\nx/1.png,0,1\n")
    with pytest.raises(DataError, match="train cannot be divided: it has 2 images: expected at least 3"):
        load_data(str(tmp_path / "two.csv"), SMALL, 0)


# Through the command line


def test_another_seed_keeps_the_split_and_the_run_says_what_it_is(tmp_path, monkeypatch, capsys):
    folder, runs = make_images(tmp_path / "pets", {"cat": 7, "dog": 7}), tmp_path / "runs"
    options = ["--epochs", "1", "--batch-size", "8", "--no-probe", "--amp", "off", "--output", str(runs)]
    loaded = []

    def load(*args, **kwargs):
        loaded.append(load_data(*args, **kwargs))
        return loaded[-1]

    for name in ("plot_prompts", "plot_curves"):
        monkeypatch.setattr(run, name, lambda *_, **__: None)
    monkeypatch.setattr(run, "load_data", load)
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_candidate", lambda *args: None)
        for seed in ("1", "2"):
            assert cli.main(["train", "--data", str(folder), *options, "--seed", seed]) == 0
    assert cli.main(["train", "--data", str(folder), *options, "--split-seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"splits: paper: {DIVIDED} 0\n") == 2 and f"{DIVIDED} 1\n" in printed
    first, second, third = map(parts_of, loaded)
    assert first == second != third
    recipe, config = read_config(runs / "pets-3")
    assert (recipe.seed, recipe.split_seed, config["protocol"]) == (0, 1, f"paper: {DIVIDED} 1")
    assert config["images"] == {"train": len(third[0]), "val": len(third[1]), "test": len(third[2])}
    # the run's own test images; all images of other data
    assert evaluate_run(runs / "pets-3").metrics.images == len(third[2])
    other = make_images(tmp_path / "others", {"cat": 3, "dog": 2})
    facts, metrics, _ = evaluate_run(runs / "pets-3", str(other))
    assert metrics.images == 5 and "among them: they are not the images that training divided" in facts["note"]
    # of a list, files that the run was trained on, not those that it held out
    own = [*sorted(third[0])[:2], *third[1], *third[2]]
    names = [f"{file},{Path(file).parent.name}\n" for file in own] + ["others/cat/0.png,cat\n"]
    (tmp_path / "some.csv").write_text("".join(names))
    facts, metrics, _ = evaluate_run(runs / "pets-3", str(tmp_path / "some.csv"))
    assert metrics.images == len(names) > 4
    assert facts["note"].endswith(f"some.csv: 2 of its {len(names)} images are among those of training")
    retrained = load_run(runs / "pets-3")._replace(recipe=dataclasses.replace(recipe, retrain=True))
    assert _count_trained(retrained, read_source(str(tmp_path / "some.csv")).splits["train"]) == 2 + len(third[1])
    folder.rename(tmp_path / "elsewhere")
    assert "2 of" not in evaluate_run(runs / "pets-3", str(other)).facts["note"]
