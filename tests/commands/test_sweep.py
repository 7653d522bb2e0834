"""``insvp sweep``."""

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from insvp_fast.commands import cli
from insvp_fast.recipes import read_recipe
from insvp_fast.studies import runner
from insvp_fast.studies.entries import find_run, read_runs
from insvp_fast.studies.grid import read_grid
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe
from tests.commands.finished_run import finish

GRID = """
[recipe]
root = "data/{data}"
epochs = 2
probe = false
[grid]
data = ["cub", "dtd"]
lr = [1e-3, 0.01]
seed = [0, 1, 2]
"""


@pytest.fixture
def grid(tmp_path) -> Path:
    file = tmp_path / "grid.toml"
    file.write_text(GRID)
    return file


class Trainer:
    """Stands in for the processes of ``insvp train``: writes the files of a run, whose accuracy tells its settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands, self.stops_at = folder, [], {}

    def __call__(self, launcher, arguments, log) -> int:
        assert (launcher, log) == (["launch"], None)
        self.commands.append(arguments)
        options = vars(cli._parser().parse_args(["train", *arguments]))
        options.pop("command"), options.pop("recipe")
        if resumed := options.pop("resume"):
            run, recipe = Path(resumed), Recipe(**json.loads((Path(resumed) / "config.json").read_text())["recipe"])
        else:
            asked = Recipe(**options)
            # what `auto` stands for, and what fits into memory
            size = min(asked.batch_size, 8) if asked.auto_batch else asked.batch_size
            recipe = replace(asked, amp="bf16" if asked.amp == "auto" else asked.amp, batch_size=size, auto_batch=False)
            run = self.folder / f"{recipe.data}-{len(list(self.folder.glob('*/'))) + 1}"
            run.mkdir(parents=True)
            changed = dict(asked.to_dict().items() - recipe.to_dict().items())
            config = {"recipe": absolute_paths(recipe).to_dict(), "asked": changed}
            (run / "config.json").write_text(json.dumps(config))
        status = self.stops_at.get(len(self.commands), 0)
        if status == 0:
            accuracy = recipe.lr + 0.1 * recipe.seed + 0.5 * (recipe.data == "dtd")
            finish(run, accuracy, val_accuracy=1 - accuracy)
            if recipe.probe:
                probe = {"model": "linear probe", "test_accuracy": 0.3, "trained_parameters": 3, "kept_epoch": None}
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(probe))
        return status


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Trainer:
    trainer = Trainer(tmp_path / "out")
    monkeypatch.setattr(runner, "_launch", trainer)
    return trainer


def test_a_sweep_trains_every_combination(grid, trainer, tmp_path, capsys):
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder), "--launcher", "launch"]) == 0
    first = ["--root", "data/cub", "--epochs", "2", "--no-probe", "--data", "cub", "--lr", "0.001", "--seed", "0"]
    assert trainer.commands[0] == [*first, "--output", str(trainer.folder)]
    assert len(trainer.commands) == 12
    header, *rows = csv.reader((trainer.folder / "results.csv").open())
    assert header[:7] == ["data", "lr", "protocol", "metric", "model", "runs", "planned"]
    assert header[7:] == ["val_mean", "val_std", "test_mean", "test_std"]
    assert rows[3][:7] == ["dtd", "0.01", "paper", "top1", "InsVP", "3", "3"]
    assert [float(cell) for cell in rows[3][7:]] == pytest.approx([0.39, 0.1, 0.61, 0.1])
    table = (trainer.folder / "results.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    # val falls as the test accuracy rises: the mark goes by val alone
    assert cells[4:] == [
        ["dtd", "0.001", "paper", "top1", "InsVP", "3 of 3", "39.90 ± 10.00 (best)", "60.10 ± 10.00"],
        ["dtd", "0.01", "paper", "top1", "InsVP", "3 of 3", "39.00 ± 10.00", "61.00 ± 10.00"],
    ]
    assert table in capsys.readouterr().out


def test_a_sweep_that_was_stopped_goes_on(grid, trainer, capsys):
    command = ["sweep", str(grid), "--output", str(trainer.folder), "--launcher", "launch"]
    trainer.stops_at = {2: 1, 4: 130}  # one run fails, and then somebody presses Ctrl-C
    assert cli.main(command) == 130
    assert len(trainer.commands) == 4
    assert "1 of 3" not in (trainer.folder / "results.md").read_text()
    assert "| 2 of 3 |" in (trainer.folder / "results.md").read_text()
    trainer.stops_at = {}
    assert cli.main(command) == 0
    assert [arguments[0] for arguments in trainer.commands[4:]] == ["--resume", "--resume", *["--root"] * 8]
    commands, folders = len(trainer.commands), sorted(trainer.folder.glob("*/"))
    assert cli.main(command) == 0
    assert (len(trainer.commands), sorted(trainer.folder.glob("*/"))) == (commands, folders)
    assert len(folders) == 12


def test_what_a_run_chose_itself_is_not_taken_for_what_was_asked(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    file.write_text(
        "[recipe]\nprobe = false\n[grid]\namp = ['bf16', 'auto', 'off']\n"
        "auto_batch = [false, true]\nbatch_size = [8, 64]"
    )
    command = ["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]
    for _ in range(2):  # the second time all are finished
        assert cli.main(command) == 0
        assert len(trainer.commands) == len(list(trainer.folder.glob("*/"))) == 12
    runs = read_runs(trainer.folder)
    found = [find_run(runs, entry.recipe) for entry in read_grid(file, trainer.folder)]
    assert len({run.folder for run in found if run}) == 12


def test_a_shared_probe_is_planned_once(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    file.write_text("[grid]\nlr = [0.1, 0.2]\nsplit_seed = [0, 1]")
    assert cli.main(["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]) == 0
    rows = list(csv.DictReader((trainer.folder / "results.csv").open()))
    counted = [(row["model"], row["lr"], row["split_seed"], row["runs"], row["planned"]) for row in rows]
    probes = [row for row in counted if row[0] == "linear probe"]
    assert probes == [("linear probe", "–", "0", "1", "1"), ("linear probe", "–", "1", "1", "1")]
    assert len(counted) == 6 and all(row[3:] == ("1", "1") for row in counted)


def test_a_sweep_that_grows_at_its_front_repeats_nothing(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    command = ["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]
    commands = []
    for rates in ("[0.2, 0.3]", "[0.1, 0.2, 0.3]", "[0.3, 0.2, 0.1]", "[0.4, 0.3]"):
        file.write_text(f"[grid]\nlr = {rates}")
        assert cli.main(command) == 0
        commands.append(len(trainer.commands))
    # the last one has no more the run that has the probe: the new one fits it
    assert commands == [2, 3, 3, 4] and ["--no-probe" in arguments for arguments in trainer.commands] == [
        *(False, True, True, False)
    ]
    rows = list(csv.DictReader((trainer.folder / "results.csv").open()))
    assert sorted((row["model"], row["lr"], row["runs"], row["planned"]) for row in rows) == [
        *(("InsVP", "0.3", "1", "1"), ("InsVP", "0.4", "1", "1"), ("linear probe", "–", "1", "1"))
    ]


def test_an_interrupted_run_keeps_its_probe_to_itself(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    command = ["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]
    trainer.stops_at = {1: 130}
    file.write_text("[grid]\nlr = [0.2]")
    assert cli.main(command) == 130
    file.write_text("[grid]\nlr = [0.1, 0.2]")
    assert cli.main(command) == 0
    assert ["--no-probe" in arguments for arguments in trainer.commands] == [False, True, False]
    assert trainer.commands[2][0] == "--resume"


def test_a_probe_is_counted_once_where_two_runs_have_it(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    command = ["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]
    for rates in ("[0.1]", "[0.2]", "[0.1, 0.2]"):
        file.write_text(f"[grid]\nlr = {rates}")
        assert cli.main(command) == 0
    assert len(trainer.commands) == 2
    (row,) = [row for row in csv.DictReader((trainer.folder / "results.csv").open()) if row["model"] == "linear probe"]
    assert (row["runs"], row["planned"]) == ("1", "1")


def test_probes_of_different_recipes_are_no_repetitions_of_one(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    for seed in (0, 1):
        (tmp_path / f"{seed}.toml").write_text(f"split_seed = {seed}")
    file.write_text(f"[grid]\nrecipe = ['{tmp_path}/0.toml', '{tmp_path}/1.toml']")
    assert cli.main(["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]) == 0
    rows = [row for row in csv.DictReader((trainer.folder / "results.csv").open()) if row["model"] == "linear probe"]
    assert [(Path(row["recipe"]).name, row["planned"]) for row in rows] == [("0.toml", "1"), ("1.toml", "1")]


def test_the_table_is_there_after_each_run(grid, trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "_launch", lambda *a: (seen.append(table.exists()), trainer(*a))[1])
    table = trainer.folder / "results.md"
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder), "--launcher", "launch"]) == 0
    assert seen == [False, *[True] * 11]


def test_an_accuracy_of_0_counts(tmp_path, trainer):
    file = tmp_path / "grid.toml"
    file.write_text("[recipe]\nprobe = false\n[grid]\nlr = [1.0]")
    assert cli.main(["sweep", str(file), "--output", str(trainer.folder), "--launcher", "launch"]) == 0
    (row,) = csv.DictReader((trainer.folder / "results.csv").open())
    assert (row["val_mean"], row["test_mean"]) == ("0.0", "1.0")
    assert "| 0.00 (best) |" in (trainer.folder / "results.md").read_text()


@pytest.mark.parametrize("status", [0, 1, 130])
def test_a_run_is_a_process_of_its_own(status):
    program = f"import sys; assert sys.argv[1:] == ['-m', 'insvp_fast', 'train', '--lr', '1']; sys.exit({status})"
    assert runner._launch([sys.executable, "-c", program], ["--lr", "1"], None) == status


def test_the_log_of_a_launched_run_holds_its_errors(tmp_path):
    program = "import os; os.write(1, b'epoch 1\\n'); os.write(2, b'a warning\\n')"
    for _ in range(2):
        assert runner._launch([sys.executable, "-c", program], [], tmp_path / "logs" / "a.log") == 0
    assert (tmp_path / "logs" / "a.log").read_text() == 2 * "epoch 1\na warning\n"


@pytest.mark.parametrize("command", [["sweep", "grid.toml"], ["paper", "table5", "--data", "digits"]])
def test_where_no_folder_can_be_made_nothing_is_trained(command, grid, trainer, capsys, monkeypatch):
    monkeypatch.chdir(grid.parent)
    Path("file").touch()
    assert cli.main([*command, "--output", "file/out", "--launcher", "launch"]) == 1
    error = "insvp: error: --output is file/out: no folder can be made there (Not a directory)"
    assert capsys.readouterr().err.splitlines()[-1] == error and not trainer.commands


def test_failed_runs_are_counted(grid, trainer, capsys):
    trainer.stops_at = {1: 1, 2: -9, 3: 1, 4: 1}
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder), "--launcher", "launch"]) == 1
    assert "4 of 12 runs failed" in capsys.readouterr().err
    assert len(trainer.commands) == 12
    rows = list(csv.DictReader((trainer.folder / "results.csv").open()))
    assert [(row["data"], row["lr"], row["runs"], row["planned"]) for row in rows] == [
        ("cub", "0.01", "2", "3"),
        ("dtd", "0.001", "3", "3"),
        ("dtd", "0.01", "3", "3"),
        ("cub", "0.001", "0", "3"),
    ]
    assert re.search(r"\| cub +\| 0.001 .*\| 0 of 3 \| – +\| – +\|\n", (trainer.folder / "results.md").read_text())


def test_a_sweep_may_grow_and_start_from_recipes(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text('[recipe]\nroot = "r"\n[grid]\nrecipe = ["cub", "svhn"]\nreleased = [false, true]')
    entries = list(read_grid(file, tmp_path))
    assert [entry.recipe.prompt_length for entry in entries] == [None, 9, None, 16]
    assert entries[3].recipe == replace(Recipe(**read_recipe("svhn", released=True)), root="r", output=str(tmp_path))
    assert entries[3].arguments == ["--recipe", "svhn", "--root", "r", "--released", "--output", str(tmp_path)]
    file.write_text('[recipe]\nroot = "r"\n[grid]\nrecipe = ["cub", "svhn"]')
    assert [entry.recipe.prompt_length for entry in read_grid(file, tmp_path)] == [None, None]


def test_the_arguments_of_a_run_give_its_settings(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text("[grid]\nimage_weights = [[0.75, 0.5], 0.25]\npictures = [false, true]\nbatch_size = [3]")
    for entry in read_grid(file, tmp_path):
        options = vars(cli._parser().parse_args(["train", *entry.arguments]))
        assert Recipe(**{name: options[name] for name in options.keys() & entry.recipe.to_dict()}) == entry.recipe


def test_a_dry_run_trains_nothing(grid, trainer, capsys):
    assert cli.main(["sweep", str(grid), "--output", str(trainer.folder), "--launcher", "launch", "--dry-run"]) == 0
    assert not trainer.commands and not trainer.folder.exists()
    assert capsys.readouterr().out.count("insvp train ") == 12
    assert cli.main(["sweep", str(grid), "--dry-run"]) == 0
    assert capsys.readouterr().out.count(f"--output {Path('sweeps', 'grid')}\n") == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[grid]\nlr = 1", "lr is 1: expected a list of values"),
        ("[grid]\nrate = [1]", "rate is no setting"),
        ("[grid]\nlr = []", "lr is []: expected a list of values"),
        ("recipe = 1", "expected the tables [recipe] and [grid]\n"),
        ("grid = 1", "expected the tables [recipe] and [grid]\n"),
        ("[seeds]\na = 1", "expected the tables [recipe] and [grid], found seeds"),
        ("[grid]\nlr = [0.001, 0.1, 1e-3]", "[grid] has the run {'lr': 0.001} twice"),
        ("[grid]\nimage_weights = [[0.7], 0.2, 0.7]\nseed = [4]", "{'image_weights': 0.7, 'seed': 4} twice"),
        ("[grid]\nepochs = [1, 0]", "--epochs is 0"),
        ("grid", "cannot read"),
        ("[grid]\nroot = [1]", "--root is 1: expected a value of type str"),
        ("[recipe]\nroot = '{data}'\n[grid]\ndata = [1]", "--data is 1: expected a value of type str"),
        ("[recipe]\nroot = ['{data}']\n[grid]\nlr = [1]", "--root is ['{data}']: expected a value of type str"),
        ("[grid]\nrecipe = [1]", "recipe 1: expected a name or a file"),
        ("[grid]\ndata = ['photos', './photos']", "{'data': './photos'} twice"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(content, message, tmp_path, trainer, capsys):
    (tmp_path / "grid.toml").write_text(content)
    assert (
        cli.main(["sweep", str(tmp_path / "grid.toml"), "--output", str(trainer.folder), "--launcher", "launch"]) == 1
    )
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not trainer.commands
