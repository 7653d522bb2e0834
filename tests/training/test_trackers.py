"""What TensorBoard and Weights & Biases get, read from the files that they write."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.run_logger import RunLogger
from tests.training.small_runs import quick, read_records


def expected_scalars(run) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) of every number in metrics.jsonl, by the names that trackers get."""
    scalars = defaultdict(list)
    for record in read_records(run):
        if "epoch" not in record:
            scalars[f"{record['model']}/final_test_accuracy"].append((2, record["test_accuracy"]))
        for key, value in record.items():
            if "epoch" in record and isinstance(value, float):
                scalars[f"{record['model']}/{key}"].append((record["epoch"], value))
    assert {"InsVP/loss", "linear probe/val_accuracy", "linear probe/final_test_accuracy"} <= scalars.keys()
    return dict(scalars)


def test_tensorboard_gets_every_epoch_and_the_result(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(quick(pictures, tmp_path, trackers=("tensorboard",), epochs=2, probe=True))
    events = EventAccumulator(str(run / "insvp_fast"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        tag: [(step, pytest.approx(value, rel=1e-6)) for step, value in values]  # they are kept in fp32
        for tag, values in expected_scalars(run).items()
    }


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file, a log as LevelDB's: blocks of 32 KiB, which long records span in several parts."""
    content, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_wandb_gets_every_epoch_of_every_model_and_the_result(pictures, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(quick(pictures, tmp_path, trackers=("wandb",), epochs=2, probe=True))
    wandb.teardown()  # ends the process that writes the file
    (file,) = run.rglob("*.wandb")
    found, metrics, ids = defaultdict(list), set(), set()
    for record in map(Record.FromString, wandb_records(file)):
        ids |= {record.run.run_id} - {""}
        metrics |= {(record.metric.glob_name, record.metric.step_metric)} - {("", "")}
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            model = key.partition("/")[0]
            if not key.startswith("_") and not key.endswith("/epoch"):
                found[key].append((row[f"{model}/epoch"], value))
    assert dict(found) == expected_scalars(run)
    assert {("InsVP/*", "InsVP/epoch"), ("linear probe/*", "linear probe/epoch")} <= metrics
    assert ids == {json.loads((run / "config.json").read_text())["id"]}


def test_trackers_end_with_their_run(tmp_path):
    accelerator, ended = create_accelerator(), []
    accelerator.trackers = [SimpleNamespace(finish=lambda: ended.append(True))]
    RunLogger(Recipe(), accelerator, tmp_path).finish()
    assert ended == [True]
