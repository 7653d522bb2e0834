"""``--json``: one object on standard output, everything else on standard error; and nothing of it without."""

import argparse
import json
import os

from insvp_fast import data
from insvp_fast.commands import cli
from insvp_fast.data.verify import Report
from insvp_fast.method_names import METHODS
from insvp_fast.studies import runner
from insvp_fast.training.recipe import Recipe
from tests.training.small_runs import make_folder


def result_of(capfd, *arguments, status=0):
    """What a command prints with ``--json``, and what it prints beside it."""
    assert cli.main([*map(str, arguments), "--json"]) == status
    printed = capfd.readouterr()
    assert printed.out.count("\n") == 1
    return json.loads(printed.out), printed.err


def test_every_command_with_a_result_has_it():
    def leaves(name, parser):
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        commands = [leaf for action in inner for item in action.choices.items() for leaf in leaves(*item)]
        return commands or [(name, parser)]

    without = {name for name, parser in leaves("insvp", cli._parser()) if "--json" not in parser._option_string_actions}
    assert without == {"serve", "demo", "predict"}  # two never end, the last has formats of its own


def test_of_what_is_listed(capfd):
    recipes, printed = result_of(capfd, "recipes")
    assert recipes["cub"] == "CUB-200-2011, 200 species of birds" and recipes["cub"] in printed
    assert Recipe(**result_of(capfd, "recipes", "svhn")[0]).lr == 4e-3
    assert list(result_of(capfd, "methods")[0]) == ["insvp", *METHODS]
    assert result_of(capfd, "data", "list")[0]["vtab/kitti"]["classes"] == 4


def test_of_what_a_run_an_adapter_and_a_backbone_are(run, capfd):
    found = result_of(capfd, "info", run)[0]["run"]
    assert (found["finished"], found["results"]["InsVP"]["test_accuracy"], found["recipe"]["seed"]) == (True, 0.5, 0)
    adapter = result_of(capfd, "info", run / "adapter")[0]["adapter"]
    assert adapter == found["adapter"] | {"folder": str(run / "adapter")}
    assert adapter["parameters"]["head"] == 1158 and adapter["trained_parameters"] == sum(
        adapter["parameters"].values()
    )
    assert result_of(capfd, "info", "vit_shapes_32")[0]["backbone"]["blocks"] == [192] * 4


def test_of_the_environment(capfd):
    facts, printed = result_of(capfd, "doctor")
    assert facts["versions"]["timm"] in printed and facts["errors"] == [] and "GPU" in str(facts["machine"])


def test_of_a_test(run, tmp_path, capfd):
    found, printed = result_of(capfd, "eval", run, "--output", tmp_path)
    written = [str(tmp_path / "eval.json"), str(tmp_path / "eval.png")]
    assert found == json.loads((tmp_path / "eval.json").read_text()) | {"written": written}
    assert f"top-1 {found['top1']:.2%}" in printed


def test_of_an_error(run, tmp_path, capfd, monkeypatch):
    """A result with errors is printed; without a result, nothing is."""
    report = Report("cub", {"train": 3}, 200, ["a.png: not an image"], [])
    monkeypatch.setattr(data, "check", lambda name, root: report)
    found, printed = result_of(capfd, "data", "check", "cub", status=1)
    assert found["unreadable"] == report.unreadable
    assert printed.endswith("insvp: error: cub: some images cannot be read\n")
    assert cli.main(["info", str(tmp_path), "--json"]) == 1
    assert capfd.readouterr().out == ""


def test_of_a_training_and_a_sweep(tmp_path, capfd, monkeypatch):
    """Also where a process that a sweep starts prints to the file descriptor."""
    folder = make_folder(tmp_path / "pictures", {"train": 4, "val": 2, "test": 2})
    settings = ["--data", folder, "--output", tmp_path / "runs", "--epochs", 1, "--amp", "off", "--no-probe"]
    found, printed = result_of(capfd, "train", *settings)
    assert found["run"] == str(tmp_path / "runs" / "pictures-1") and found["run"] in printed
    record = json.loads((tmp_path / "runs" / "pictures-1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["results"] == {"InsVP": record} and "epoch   1/1  loss" in printed

    grid = tmp_path / "grid.toml"
    grid.write_text(f'[recipe]\ndata = "{folder}"\nepochs = 1\namp = "off"\nprobe = false\n[grid]\nseed = [0]\n')
    monkeypatch.setattr(runner, "train_entries", lambda *_, **__: 0 * os.write(1, b"from a process\n"))
    found, printed = result_of(capfd, "sweep", grid, "--output", tmp_path / "runs")
    assert printed.startswith("from a process\n") and f"written: {tmp_path / 'runs' / 'results.md'}" in printed
    ((row),) = found["results"]
    assert (row["model"], row["runs"], row["test_mean"]) == ("InsVP", 1, record["test_accuracy"])
    assert result_of(capfd, "sweep", grid, "--dry-run")[0]["commands"][0].startswith("insvp train --data ")


def test_of_a_benchmark(capfd, monkeypatch):
    from insvp_fast.bench import report

    rows = [{"job": "inference", "precision": "fp32", "images per second": 2.5}]
    monkeypatch.setattr(report, "run_benchmark", lambda *_: rows)
    assert result_of(capfd, "bench")[0] == {"rows": rows}
