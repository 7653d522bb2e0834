"""The command line: quick help, one-line errors, exit statuses."""

import subprocess
import sys
import time

import pytest

from insvp_fast import cli
from insvp_fast.training import run as run_module
from insvp_fast.training.recipe import CommandError, Recipe


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"]])
def test_help_is_quick_and_does_without_torch(arguments):
    program = (
        "import sys\nfrom insvp_fast.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # a fraction of a second on a quiet machine
    assert done.stdout.startswith("usage: insvp")


def test_every_setting_has_an_option(monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "train", seen.append)
    line = "--backbone a@b --data c --epochs 2 --batch-size 3 --lr 0.1 --probe-lr 0.2 --weight-decay 0.3 --warmup 0.4"
    line += " --amp bf16 --seed 5 --prompt-length 6 --workers 7 --output d --released --no-probe"
    assert cli.main(["train", *line.split()]) == 0
    assert cli.main(["train", "--checkpoint", "e"]) == 0
    numbers = {"epochs": 2, "batch_size": 3, "lr": 0.1, "probe_lr": 0.2, "weight_decay": 0.3, "warmup": 0.4, "seed": 5}
    texts = {"backbone": "a@b", "data": "c", "amp": "bf16", "output": "d"}
    switches = {"prompt_length": 6, "workers": 7, "released": True, "probe": False}
    assert seen == [Recipe(**numbers, **texts, **switches), Recipe(checkpoint="e")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0: expected at least 1"),
        (["--batch-size", "-4"], "--batch-size is -4: expected at least 1"),
        (["--lr", "nan"], "--lr is nan: expected a positive number"),
        (["--probe-lr", "0"], "--probe-lr is 0.0: expected a positive number"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0"),
        (["--warmup", "1"], "--warmup is 1.0"),
        (["--amp", "int8"], "--amp is int8: expected one of off, bf16, fp16"),
        (["--seed", "-1"], "--seed is -1"),
        (["--prompt-length", "-1"], "--prompt-length is -1: expected at least 0"),
        (["--backbone", "a@b", "--checkpoint", "c"], "--backbone is a@b: expected a name without @FILE"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_invalid_values_are_refused_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "train", lambda recipe: pytest.fail("work has begun"))
    try:
        status = cli.main(["train", *arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (CommandError("the loss became nan"), 1, "insvp: error: the loss became nan"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn"), 1, "pip install 'insvp-fast[train]'"),
    ],
)
def test_failures_end_with_a_message_and_a_status(error, status, message, capsys, monkeypatch):
    def fail(recipe):
        raise error

    monkeypatch.setattr(run_module, "train", fail)
    assert cli.main(["train"]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_eval_prints_the_accuracy(capsys, monkeypatch):
    monkeypatch.setattr(run_module, "evaluate_run", lambda run, data: {("r", "d"): 0.75}[run, data])
    assert cli.main(["eval", "r", "--data", "d"]) == 0
    assert capsys.readouterr().out == "accuracy 0.7500\n"


def test_predict_prints_csv(capsys, monkeypatch):
    rows = [("a, b.png", "cat", 0.98765)]
    monkeypatch.setattr(run_module, "predict_files", lambda run, files: rows if files == ["a, b.png"] else [])
    assert cli.main(["predict", "r", "a, b.png"]) == 0
    assert capsys.readouterr().out == 'file,class,probability\n"a, b.png",cat,0.9877\n'


def test_a_missing_run_folder_is_one_line(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "not a run folder" in printed
    assert printed.count("\n") == 1
