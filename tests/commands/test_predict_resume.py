"""``insvp predict`` over many files: killed and continued, in shards, and in bounded memory."""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from insvp_fast.commands import cli
from insvp_fast.data import image_list
from insvp_fast.data.folders import image_files
from insvp_fast.data.image_list import ImageList
from insvp_fast.errors import INTERRUPTED, DataError, TrainingError
from insvp_fast.training import counter, prediction_file
from insvp_fast.training.prediction import Classifier, Prediction, load_classifier, predict
from insvp_fast.training.prediction_file import PredictionFile

FILES = 120


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A folder of noise in subfolders with two files that are no images."""
    folder, noise = tmp_path_factory.mktemp("many"), np.random.default_rng(1)
    for index in range(FILES):
        file = folder / ("a", "a-b", "a/c", "é")[index % 4] / f"{index * 7919 % FILES}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(file)
    for name in ("a/0.png", "a/c/torn.png"):
        (folder / name).write_text("no image")
    return folder


def killed(command: list[str], batches: int) -> bool:
    """Run the command in a child that is killed after so many batches."""
    child = multiprocessing.get_context("fork").Process(target=_run, args=(command, batches))
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


def _run(command: list[str], batches: int) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not in this process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with stopping(batches, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        cli.main(command)


@contextlib.contextmanager
def stopping(batches: int, stop: Callable[[], object]) -> Iterator[None]:
    """Everything is recorded at once, and ``stop`` is called after so many batches."""
    computed, numbers = Classifier.logits, itertools.count()

    def logits(self, images):
        if next(numbers) == batches:
            stop()
        return computed(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_file, "COMMIT_SECONDS", 0.0)
        patch.setattr(Classifier, "logits", logits)
        yield


def interrupted(command: list[str], batches: int) -> bool:
    """Run the command until Ctrl-C is pressed after so many batches."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    try:
        with stopping(batches, lambda: signal.raise_signal(signal.SIGINT)):
            return cli.main(command) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("form", "stop"),
    [("csv", killed), ("jsonl", interrupted), ("parquet", interrupted)],
    ids=["csv", "jsonl", "parquet"],
)
def test_stopped_twice_it_writes_the_same_bytes(form, stop, run, many, tmp_path, capsys):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    options = ["--top-k", "3", "--batch-size", "7", "--skip-unreadable"]
    whole, file, part = (tmp_path / name for name in (f"whole.{form}", f"file.{form}", f"file.{form}.part"))
    command = ["predict", str(run), str(many), *options, "--output"]
    assert cli.main([*command, str(whole)]) == 0
    for batches, images in ((3, 21), (6, 63)):
        assert stop([*command, str(file)], batches) and not file.exists()
        assert json.loads(Path(f"{part}.json").read_text())["images"] == images
        with open(part, "ab") as stream:
            stream.write(b"torn lin")
    capsys.readouterr()
    assert cli.main([*command, str(file)]) == 0
    printed = capsys.readouterr().err
    assert f"goes on after 63 of {FILES + 1} images" in printed
    assert printed.endswith(f"skipped 2 of {FILES + 1} files\n")
    assert file.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, whole.name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "2"], "top_k 1, not 2"),
        (["--tta", "flip"], "tta none, not flip"),
        (["--amp", "bf16"], "amp off, not bf16"),
        (["--batch-size", "3"], "batch"),
    ],
)
def test_other_settings_do_not_go_on(options, message, run, images, tmp_path, capsys):
    command = ["predict", str(run), str(images / "test"), "--output", str(tmp_path / "out.csv")]
    assert interrupted(command, 2)
    before = (tmp_path / "out.csv.part").read_bytes()
    assert cli.main([*command, *options]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.csv.part").read_bytes() == before


def test_a_file_of_an_earlier_version_goes_on(run, images, tmp_path):
    command = ["predict", str(run), str(images / "test"), "--output"]
    assert cli.main([*command, str(tmp_path / "whole.csv")]) == 0
    assert interrupted([*command, str(tmp_path / "out.csv")], 2)
    record = tmp_path / "out.csv.part.json"
    facts = json.loads(record.read_text())
    del facts["settings"]["amp"]
    record.write_text(json.dumps(facts))
    assert cli.main([*command, str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("name", ["00.png", "0.png"], ids=["added", "replaced"])
def test_other_images_do_not_go_on(name, run, images, tmp_path, capsys):
    shutil.copytree(images / "test", tmp_path / "data")
    command = ["predict", str(run), str(tmp_path / "data"), "--output", str(tmp_path / "out.csv")]
    assert interrupted(command, 2)
    shutil.copy(tmp_path / "data" / "bee" / "0.png", tmp_path / "data" / "ant" / name)
    assert cli.main(command) == 1
    assert "begun with other images, or they have changed" in capsys.readouterr().err


ROW = Prediction("0.png", [("ant", 1.0)], None)


def test_what_is_recorded_are_whole_batches_every_few_seconds(tmp_path, monkeypatch):
    seconds, recorded = 0.0, []
    monkeypatch.setattr("time.monotonic", lambda: seconds)
    with PredictionFile(tmp_path / "out.csv", [], "csv", top_k=1, batch_size=2, settings={}) as rows:
        for seconds in (1.0, 2.0, 5.0, 5.5, 6.0, 10.0, 10.5, 11.0):  # noqa: B007 (the clock reads it)
            rows.add(ROW)
            recorded.append(json.loads(rows.record.read_text())["images"] if rows.record.exists() else 0)
    assert recorded == [0, 0, 0, 4, 4, 4, 4, 8]


def test_rows_are_on_the_disk_before_anything_says_so(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        status = os.fstat(descriptor)
        events.extend([("rows", status.st_size)] if status.st_ino == rows.part.stat().st_ino else [])
        fsync(descriptor)

    def replaced(source, target):
        events.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(prediction_file, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with PredictionFile(tmp_path / "out.csv", [], "csv", top_k=1, batch_size=2, settings={}) as rows:
        for _ in range(3):
            rows.add(ROW)
        rows.finish()
    header, row = len("file,class,probability\n"), len("0.png,ant,1.0000\n")
    assert events == [("rows", header + 2 * row), "out.csv.part.json", ("rows", header + 3 * row), "out.csv"]


def test_without_a_whole_batch_nothing_is_left_to_go_on_from(tmp_path):
    (tmp_path / "out.csv.part.json").write_text("{}")  # of a file that was put in its place just before a crash

    def stopped():
        with PredictionFile(tmp_path / "out.csv", [], "csv", top_k=1, batch_size=2, settings={}) as rows:
            rows.add(ROW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_writes_a_file(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def begin() -> PredictionFile:
        return PredictionFile(tmp_path / "out.csv", [], "csv", top_k=1, batch_size=2, settings={})

    def hold():
        with begin() as rows:
            rows.add(ROW)
            rows.stream.flush()
            begun.set()
            signal.pause()

    child = context.Process(target=hold, daemon=True)
    child.start()
    assert begun.wait(60)
    part = tmp_path / "out.csv.part"
    before = part.read_bytes()
    with pytest.raises(TrainingError, match="out.csv.part is being written by another process: expected one, or"):
        begin()
    assert part.read_bytes() == before and child.is_alive()
    child.kill()
    child.join()
    with begin() as rows:
        rows.finish()
    assert (tmp_path / "out.csv").read_text() == "file,class,probability\n"


def test_skipped_files_are_not_forgotten(run, images, tmp_path, capsys):
    shutil.copytree(images / "test", tmp_path / "data")
    (tmp_path / "data" / "ant" / "0.png").write_text("no image")
    whole, file = str(tmp_path / "whole.csv"), str(tmp_path / "out.csv")
    command = ["predict", str(run), str(tmp_path / "data"), "--output"]
    assert cli.main([*command, whole, "--skip-unreadable"]) == 0
    assert interrupted([*command, file, "--skip-unreadable"], 2)
    assert cli.main([*command, file]) == 1
    assert "was begun with --skip-unreadable, and 1 were skipped: expected the same" in capsys.readouterr().err
    assert cli.main([*command, file, "--skip-unreadable"]) == 0
    assert Path(file).read_bytes() == Path(whole).read_bytes()


def test_what_stops_at_a_file_goes_on_without_it(run, images, tmp_path):
    shutil.copytree(images / "test", tmp_path / "data")
    (tmp_path / "data" / "eel" / "0.png").write_text("no image")
    command = ["predict", str(run), str(tmp_path / "data"), "--output"]
    with stopping(99, lambda: None):  # everything is recorded at once
        assert cli.main([*command, str(tmp_path / "out.csv")]) == 1
    assert (tmp_path / "out.csv.part").is_file()
    for name in ("out.csv", "whole.csv"):
        assert cli.main([*command, str(tmp_path / name), "--skip-unreadable"]) == 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        *({"settings": None}, {"bytes": None}, {"images": "x"}, {"settings": 3}, "{", "\xff", "[]"),
        *({"images": -1}, {"skipped": -1}, {"bytes": -1}),
    ],
    ids=str,
)
def test_a_damaged_record_is_told(change, run, images, tmp_path, capsys):
    command = ["predict", str(run), str(images / "test"), "--output", str(tmp_path / "out.csv")]
    assert interrupted(command, 2)
    record = tmp_path / "out.csv.part.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(record.read_text()) | change)
    record.write_text(text, encoding="latin-1")
    capsys.readouterr()
    assert cli.main(command) == 1
    printed = capsys.readouterr().err
    assert f"{record} does not say what is in out.csv.part: " in printed and "to begin anew" in printed


@pytest.mark.parametrize("parts", [1, 3, 200])
def test_shards_are_the_whole(parts, many):
    shards = [list(ImageList([many], (part, parts))) for part in range(1, parts + 1)]
    assert list(itertools.chain(*shards)) == image_files(many)
    assert max(map(len, shards)) == -(-(FILES + 1) // parts)


def test_a_shard_has_its_part_alone(run, images, capsys):
    command = ["predict", str(run), str(images / "test"), "--batch-size", "1"]
    printed = []
    for options in ([], ["--shard", "1/2"], ["--shard", "2/2"]):
        assert cli.main([*command, *options]) == 0
        printed.append(capsys.readouterr().out.splitlines())
    whole, first, second = printed
    assert first + second[1:] == whole and len(first) == len(second) == 9


def test_several_processes_need_shards(run, images, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["predict", str(run), str(images)]) == 1
    assert "--shard K/N" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/2", "a/b"])
def test_shards_are_numbered_from_one(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "run", "x.png", f"--shard={text}"])
    assert f"{text}: expected K/N" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bounded_number_of_images_is_in_flight(workers, run, images):
    file, taken = str(images / "test" / "ant" / "0.png"), itertools.count(1)
    files = (file for _ in range(60) if next(taken))
    most = 0
    for done, prediction in enumerate(predict(load_classifier(run), files, batch_size=5, workers=workers), 1):
        assert prediction.error is None
        most = max(most, int(repr(taken)[6:-1]) - 1 - done)
    assert done == 60 and 0 < most <= 5 * (2 * workers + 1)


def test_a_list_of_images_holds_no_names(monkeypatch, tmp_path):
    """Their names alone would take over 1.6 MB."""
    names = [("folder", f"{index * 7919 % 20_000:060}.png") for index in range(20_000)]
    monkeypatch.setattr(image_list, "walk_images", lambda _: iter(names))
    tracemalloc.start()
    try:
        images = ImageList([tmp_path])
        assert sum(image == f"folder/{index:060}.png" for index, image in enumerate(images)) == len(images) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 5e5
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_told(monkeypatch, tmp_path):
    (tmp_path / "0.png").touch()
    monkeypatch.setattr(
        ImageList, "_add", lambda *_: (_ for _ in ()).throw(image_list.sqlite3.OperationalError("full"))
    )
    with pytest.raises(DataError, match="cannot be listed in a temporary file: full"):
        ImageList([tmp_path])


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    command, terminal, run, images, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(counter, "SECONDS_PER_LINE", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    paths = [str(images / "test")] if command == "predict" else []
    assert cli.main([command, str(run), *paths, "--output", str(tmp_path / "out"), "--batch-size", "16"]) == 0
    printed = capsys.readouterr().err
    assert ("━" in printed) is terminal
    assert (f"insvp: {command}: 16 of 16 images, " in printed) is not terminal
