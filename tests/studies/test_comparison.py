"""Comparisons: the rate is picked on val, differences are paired, a probe is trained once."""

import itertools
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from insvp_fast.checkpoints.backbone import save_backbone
from insvp_fast.commands import cli, paper
from insvp_fast.data.sets import SETS
from insvp_fast.errors import INTERRUPTED, CommandError, TrainingError
from insvp_fast.recipes import read_recipe
from insvp_fast.studies import comparison, runner
from insvp_fast.studies.comparison import Compared, compare, settings_of
from insvp_fast.studies.entries import Entry, Found, Protocol, Row, Score, find_run, scores_of, with_one_probe
from insvp_fast.studies.paper import ABLATION, STUDIES, UNVARIED, VTAB_GROUPS, sensitivity
from insvp_fast.studies.report import paper_number, report
from insvp_fast.studies.tables import markdown, paired_difference
from insvp_fast.training.candidates import insvp_config
from insvp_fast.training.recipe import Recipe

FEW = ("nabirds", "cifar100", "svhn")  # data sets of a table
TOO_SMALL, DIVERGES = 1e-9, 99.0  # rates whose runs fail


def test_a_paired_difference_has_students_interval():
    one, other = np.random.default_rng(0).random((2, 7))
    mean, half = paired_difference(one.tolist(), other.tolist())
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert paired_difference([0.5], [0.25]) == (0.25, None)


@pytest.fixture
def trained(monkeypatch) -> list[Recipe]:
    """Instead of training: the folders of finished runs: test accuracy rises with the rate, val falls from 0.01 on."""
    recipes: list[Recipe] = []

    def train(entries, folder: Path, jobs=1, launcher=()) -> int:
        for entry in entries:
            if entry.recipe.lr in (TOO_SMALL, DIVERGES):
                continue
            run = folder / str(len(recipes))
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps({"recipe": entry.recipe.to_dict()}))
            result = {"model": entry.recipe.method, "trained_parameters": 7, "kept_epoch": 1}
            result["model"] = {"insvp": "InsVP", "linear": "linear probe"}[entry.recipe.method]
            val, test = 1 - max(entry.recipe.lr, 0.01), entry.recipe.lr + 0.01 * entry.recipe.seed
            records = [{"model": result["model"], "epoch": 1, "val_accuracy": val}, result | {"test_accuracy": test}]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
            recipes.append(entry.recipe)
        return 0

    monkeypatch.setattr(comparison, "train_entries", train)
    return recipes


def test_a_rate_is_picked_on_val_and_then_repeated(trained, tmp_path):
    rows = [Row("probe", {"method": "linear"}), Row("ours", {"prompt_length": 2})]
    probe, ours = compare(rows, Protocol({"epochs": 3}, (0.1, 0.01, 0.5, DIVERGES), (4, 5, 6)), tmp_path)
    assert (probe.rate, ours.rate, ours.at_edge) == (None, 0.01, True)
    assert {seed: score.test for seed, score in ours.scores.items()} == pytest.approx({4: 0.05, 5: 0.06, 6: 0.07})
    # the probe once for each seed, the other at three rates with the first, and at one with the others
    assert sorted((recipe.method, recipe.seed) for recipe in trained) == [
        *(("insvp", seed) for seed in (4, 4, 4, 5, 6)),
        *(("linear", seed) for seed in (4, 5, 6)),
    ]
    assert all(recipe.split_seed == recipe.seed and recipe.epochs == 3 and not recipe.probe for recipe in trained)


@pytest.mark.parametrize(
    ("rates", "picked", "at_edge"),
    [
        ((0.1, 0.01, TOO_SMALL, DIVERGES), 0.01, False),
        ((0.01, TOO_SMALL), 0.01, True),
        ((0.01, 0.001, 0.1), 0.001, True),  # 0.01 is as good
    ],
)
def test_of_equally_good_rates_the_smallest_is_picked(rates, picked, at_edge, trained, tmp_path):
    (ours,) = compare([Row("ours", {})], Protocol({}, rates, (4,)), tmp_path)
    assert (ours.rate, ours.at_edge) == (picked, at_edge)


def test_runs_that_all_failed_are_counted_and_no_rate_is_told(trained, tmp_path, capsys):
    options = ["--methods", "linear", "insvp", "--rates", str(TOO_SMALL), str(DIVERGES), "--seeds", "3"]
    assert cli.main(["paper", "table1", *options, "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert "3 runs failed and are not in the table" in err
    rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("| InsVP")]
    assert [row[2:-1] for row in rows] == [["–"] * 7 + ["0"]]
    assert {(recipe.method, recipe.lr) for recipe in trained} == {("linear", Recipe.lr)}


def test_val_and_test_are_those_of_the_metric_of_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": Recipe(metric="f1", probe=False).to_dict()}))
    other = {"model": "another", "epoch": 1, "val_f1": 0.5}
    epoch = {"model": "InsVP", "epoch": 1, "val_f1": 0.25, "val_accuracy": 0.1}
    result = {"model": "InsVP", "trained_parameters": 7, "kept_epoch": 1, "metric": "f1"}
    result |= {"test_f1": 0.75, "test_accuracy": 0.2}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [other, epoch, result])))
    (score,) = scores_of(Found(tmp_path, Recipe()))
    assert (score.val, score.test) == (0.25, 0.75)
    study = STUDIES["table5"]
    for found, measured in ((score, "macro F1"), (score._replace(facts=score.facts | {"metric": None}), "accuracy")):
        results = {"cub": [Compared(study.rows[0], 1e-3, False, {0: found})]}
        text = report("table5", study, results, Protocol({}, (1e-3, 1e-2), (0,)), tmp_path)
        assert f"\n{measured[0].upper()}{measured[1:]} in percent, with seed 0 and its own division" in text
        assert f"with the best {measured} on val" in text


def test_of_runs_with_the_same_settings_a_finished_one_is_found_else_the_last(tmp_path):
    recipe = Recipe(probe=False, output="here")
    result = {"model": "InsVP", "trained_parameters": 7, "test_accuracy": 0.5, "kept_epoch": 1}
    runs = [Found(tmp_path / name, recipe) for name in "abc"]
    for run in runs:
        run.folder.mkdir()
        (run.folder / "config.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
        (run.folder / "metrics.jsonl").write_text(json.dumps(result) if run.folder.name == "b" else "")
    moved = replace(recipe, output="elsewhere", pictures=False, save_every=7)  # which changes no number
    assert find_run(runs, moved) == runs[1] and find_run([runs[0], runs[2]], moved) == runs[2]
    assert find_run(runs, replace(recipe, seed=1)) is None


def test_val_is_that_of_the_kept_epoch_also_of_epoch_0(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": Recipe(probe=False).to_dict()}))
    epochs = [{"model": "InsVP", "epoch": epoch, "val_accuracy": epoch / 10} for epoch in (1, 2, 3)]
    on_val, on_test = {"kept_score": 0.9, "selected_on": "val"}, {"kept_score": 0.9, "selected_on": "test"}
    cases = [(2, {}, 0.2), (None, {}, 0.1), (0, on_val, 0.9), (2, on_val, 0.9), (0, on_test, None), (2, on_test, 0.2)]
    for kept, facts, val in cases:
        result = {"model": "InsVP", "trained_parameters": 7, "test_accuracy": 0.5, "kept_epoch": kept} | facts
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*epochs, result])))
        (score,) = scores_of(Found(tmp_path, Recipe()))
        assert (score.val, score.test) == (val, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table5", "--seed", "7"], "--seed is given: expected none, as a study has --seeds"),
        (["table1", "--retrain"], "--retrain is given: expected none"),
        (["table5", "--no-global-prompt"], "--global-prompt is given: expected none, as a study has rows with and"),
        (["table5", "--methods", "vp"], "--methods is vp: expected none, table5 compares InsVP with itself"),
        (["figure7", "--methods", "vp"], "--methods is vp: expected none, figure7 compares InsVP with itself"),
        (["table1", "--methods", "vp", "full", "vp"], "--methods is vp full vp: expected each value once"),
        (["table1", "--rates", "0.1", "1e-1"], "--rates is 0.1 0.1: expected each value once"),
        (["table1", "--rates", "0.1", "nan"], "--rates is 0.1 nan: expected a positive number each"),
        (["table1", "--rates", "0"], "--rates is 0.0: expected a positive number each"),
        (["table1", "--rates", "0.1", "--lr", "0.2"], "--rates is 0.1: expected none, --lr is given"),
        (["figure7", "--rates", "0.1"], "--rates is 0.1: expected none, figure7 has the learning rate of the recipe"),
    ],
)
def test_what_a_study_chooses_itself_is_refused(options, message, trained, capsys):
    assert cli.main(["paper", *options]) == 1
    assert message in capsys.readouterr().err and not trained


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("retrain = true", "mine.toml: retrain is True: expected False, as a study has val, by which the rates are"),
        ('method = "lora"', "mine.toml: method is lora: expected insvp, as a study has --methods"),
    ],
)
def test_a_recipe_is_refused_what_a_study_chooses_itself(line, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(line)
    for what in ("table1", "figure7"):
        assert cli.main(["paper", what, "--recipe", "mine.toml"]) == 1
        assert message in capsys.readouterr().err and not trained


def test_the_runs_of_a_study_save_their_state_like_others(trained, tmp_path):
    assert cli.main(["paper", "table5", "--lr", "0.01", "--seeds", "1", "--output", str(tmp_path / "out")]) == 0
    assert {recipe.save_every for recipe in trained} == {Recipe.save_every}


def test_the_seeds_and_the_probe_of_a_recipe_give_way_to_the_studys(trained, tmp_path):
    (tmp_path / "mine.toml").write_text("data = 'digits'\nseed = 7\nsplit_seed = 8\nprobe = true\nretrain = false")
    command = ["paper", "table1", "--methods", "insvp", "--recipe", str(tmp_path / "mine.toml"), "--seeds", "2"]
    assert cli.main([*command, "--lr", "0.01", "--output", str(tmp_path / "out")]) == 0
    assert [(recipe.seed, recipe.split_seed, recipe.probe) for recipe in trained] == [(0, 0, False), (1, 1, False)]


def test_without_a_score_on_val_no_rate_is_picked(trained, tmp_path, monkeypatch):
    rows, protocol = [Row("ours", {})], Protocol({}, (0.1, 0.01), (4,))
    compare(rows, protocol, tmp_path)
    monkeypatch.setattr(comparison, "scores_of", lambda run: [score._replace(val=None) for score in scores_of(run)])
    with pytest.raises(TrainingError, match="ours: no run recorded a score on val: expected one, by which"):
        compare(rows, protocol, tmp_path)
    assert compare(rows, protocol._replace(rates=(0.1,)), tmp_path)[0].rate == 0.1  # there is nothing to pick


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt-length", "4"], {"prompt_length": 4}),
        (["--released"], {"released": True}),
        (["--released", "--head-init", "probe"], {"released": True, "head_init": "probe"}),
        (["--recipe", "mine.toml"], {"prompt_length": 5, "epochs": 4, "released": True, "select_on": "test"}),
    ],
)
def test_other_methods_do_not_take_the_settings_of_insvp(options, expected, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('data = "digits"\nepochs = 4\nreleased = true\nprompt_length = 5\nselect_on = "test"')
    command = ["paper", "table1", "--methods", "linear", "insvp", *options, "--seeds", "1", "--lr", "0.01"]
    assert cli.main(command) == 0
    probe, ours = trained
    assert (probe.method, ours.method) == ("linear", "insvp")
    assert {name: getattr(ours, name) for name in expected} == expected
    own = {"prompt_length", "released"}
    assert {name: getattr(probe, name) for name in own} == {"prompt_length": None, "released": False}
    assert {name: getattr(probe, name) for name in expected if name not in own} == {
        name: value for name, value in expected.items() if name not in own
    }
    assert probe.head_init == expected.get("head_init", "random" if ours.released else "auto")  # as InsVP's


def test_a_recipe_without_settings_of_insvp_is_handed_on_by_its_name():
    settings = {"recipe": "cub", "lr": 0.01}
    assert settings_of(Row("LoRA", {"method": "lora"}), Protocol(settings, (), ())) == settings | {"method": "lora"}


def test_the_data_sets_of_a_study_are_those_whose_files_are_there(tmp_path, capsys):
    study, root = STUDIES["table5"], str(tmp_path / "{data}")
    for name, files in (("cub", SETS["cub"].files), ("nabirds", SETS["nabirds"].files[:1])):
        for file in files:
            (tmp_path / name / file).mkdir(parents=True)
    assert paper._data_sets(study, "paper", {"root": root}) == ["cub"]
    told = "".join(
        f"left out: {name}, whose files are not in {tmp_path}/{name} (see `insvp data list`)\n" for name in FEW
    )
    assert capsys.readouterr().out == told
    with pytest.raises(CommandError, match="none: expected the files of some of cub, nabirds, cifar100, svhn"):
        paper._data_sets(study, "paper", {"root": "none"})
    with pytest.raises(CommandError, match="`data` is cub, whose files are not in none"):
        paper._data_sets(study, "paper", {"root": "none", "data": "cub"})
    (tmp_path / "mine.toml").write_text(f"root = '{root}'")
    assert paper._data_sets(study, str(tmp_path / "mine.toml"), {}) == ["cub"]
    assert paper._data_sets(study, None, {}) == ["digits"]
    assert paper._data_sets(study, "cub", {"data": "photos"}) == ["photos"]


def test_a_folder_of_the_name_of_a_set_is_none_of_the_papers(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("save_every = 3\nepochs = 4")
    command = ["paper", "figure5", "--methods", "insvp", "--recipe", "mine.toml", "--data", str(tmp_path / "x" / "cub")]
    assert cli.main([*command, "--seeds", "2", "--lr", "0.01", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (row,) = facts["results"]["cub"]
    assert (facts["folder"], row["row"], row["rate"]) == ("paper/table1", "InsVP", 0.01)
    assert [(run["seed"], run["val"]) for run in row["runs"]] == [(0, 0.99), (1, 0.99)]
    assert {(Path(recipe.output), recipe.data) for recipe in trained} == {
        (Path("paper/table1/cub"), str(tmp_path / "x" / "cub"))
    }
    assert {(recipe.save_every, recipe.epochs, recipe.pictures) for recipe in trained} == {(3, 4, False)}
    assert "| paper" not in Path("paper/table1/table1.md").read_text()
    assert Path("paper/table1/figure5-cub.png").is_file()


def test_each_data_set_has_the_recipe_of_its_name(trained, tmp_path):
    command = ["paper", "table1", "--methods", "insvp", "--recipe", "paper", "--data", "svhn", "--seeds", "1"]
    command += ["--lr", "0.01", "--backbone", "vit_shapes_32", "--output", str(tmp_path), "--root", str(tmp_path)]
    for file in SETS["svhn"].files:
        (tmp_path / file).mkdir(parents=True)
    assert cli.main(command) == 0
    own, common = read_recipe("svhn"), read_recipe("paper")
    differ = [name for name in own if own[name] != common.get(name) and name not in ("recipe", "backbone", "lr")]
    assert differ and {name: getattr(trained[0], name) for name in differ} == {name: own[name] for name in differ}


@pytest.mark.parametrize("figure", ["figure5", "figure7"])
def test_no_point_is_drawn_of_runs_that_failed(figure, trained, tmp_path, capsys):
    methods = ["--methods", "insvp"] if figure == "figure5" else []
    command = ["paper", figure, *methods, "--lr", str(DIVERGES), "--seeds", "1", "--output", str(tmp_path)]
    assert cli.main(command) == 1
    assert re.search(r"\d+ runs failed and are not in the table", capsys.readouterr().err) and not trained


@pytest.mark.parametrize("figure", ["figure5", "figure7"])
def test_figures_are_drawn_from_the_runs(figure, trained, tmp_path, capsys):
    methods = ["--methods", "linear", "insvp"] if figure == "figure5" else []
    options = [*methods, "--rates", "0.01"] if figure == "figure5" else []
    command = ["paper", figure, *options, "--seeds", "2", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    pictures = list((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 1 and pictures[0].stat().st_size > 10_000
    # figure 7 varies three settings at five values and the blocks from 1 to 4, at the rate of the recipe; four of
    # these values are the recipe's own, which are trained once
    assert len(trained) == (4 if figure == "figure5" else 32)
    assert {recipe.lr for recipe in trained if recipe.method == "insvp"} == {0.01 if figure == "figure5" else Recipe.lr}
    assert "| InsVP" in capsys.readouterr().out or figure == "figure7"


def test_a_method_that_the_backbone_cannot_have_is_left_out(trained, tmp_path, capsys):
    swin = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)}
    save_backbone(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **swin), tmp_path / "it.safetensors")
    command = ["paper", "table3", "--data", "digits", "--methods", "e2vpt", "insvp", "--seeds", "1", "--lr", "0.01"]
    assert cli.main([*command, "--backbone", str(tmp_path / "it.safetensors"), "--output", str(tmp_path / "out")]) == 0
    assert [recipe.method for recipe in trained] == ["insvp"]
    out, err = capsys.readouterr()
    assert "left out: E2VPT: `method` is e2vpt: the blocks have widths [32, 64]" in err and "| InsVP" in out
    command.remove("insvp")
    assert cli.main([*command, "--backbone", str(tmp_path / "it.safetensors"), "--output", str(tmp_path / "out")]) == 1
    assert "none of the rows can be trained around it" in capsys.readouterr().err and len(trained) == 1


@pytest.mark.parametrize(("depth", "blocks"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 3, 5, 6)), (12, (1, 3, 6, 9, 12))])
def test_figure_7_prompts_quarters_of_the_blocks(depth, blocks):
    rows = sensitivity(Recipe(), depth)["prompted blocks"]
    *fewer, every = rows.items()
    assert tuple(rows) == blocks and every == (depth, UNVARIED)
    assert fewer == [(n, Row(f"prompted_blocks={n}", {"prompted_blocks": n})) for n in blocks[:-1]]


def test_figure_7_varies_only_prompts_that_are_on():
    off = {"patch_prompt": False, "global_prompt": False, "common_prompt": False}
    names = {
        next(iter(row.settings))
        for panel in sensitivity(Recipe(**off), 4).values()
        for row in panel.values()
        if row is not UNVARIED
    }
    assert names == {"prompt_length", "prompted_blocks"}
    for prompt, panel in (("patch", "global prompt, beta_I"), ("specific", "common prompt, beta_F")):
        assert f"weight of the {panel}" not in sensitivity(Recipe(**{f"{prompt}_prompt": False}), 4)
    assert not sensitivity(Recipe(**off, specific_prompt=False), 4)


def test_a_report_pairs_by_seed_and_stands_beside_the_paper(tmp_path):
    def compared(row: Row, accuracies: dict[int, float]) -> Compared:
        facts = {"trained_parameters": 1234, "images_per_s": 5.0, "peak_memory_mib": 321.4}
        scores = {seed: Score("InsVP", 0.5, accuracy, facts) for seed, accuracy in accuracies.items()}
        return Compared(row, 1e-3, True, scores)

    study = STUDIES["table5"]
    results = [compared(study.rows[0], {0: 0.5, 1: 0.7}), compared(study.rows[1], {1: 0.75, 2: 0.1})]
    text = report("table5", study, {"cub": results}, Protocol({}, (1e-3, 1e-2), (0, 1, 2)), tmp_path)
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert lines[2][1:-1] == ["no prompts", "1,234", "0.001*", "50.00", "60.00 ± 14.14", "–", "5", "321", "2", "85.3"]
    assert lines[3][1:-1] == ["p_l", "1,234", "0.001*", "50.00", "42.50 ± 45.96", "+5.00", "5", "321", "2", "87.1"]
    content = [line.split(",") for line in (tmp_path / "table5.csv").read_text().replace("1,234", "1234").splitlines()]
    assert [len(cells) for cells in content] == [10] * 3 and content[2][:2] == ["cub", "p_l"]
    assert (tmp_path / "table5.md").read_text() == text
    assert b"\r" not in (tmp_path / "table5.csv").read_bytes()


def test_the_columns_of_a_table_are_aligned():
    lines = ["| lr  | model |", "| --- | ----- |", "| 0.1 | SSF   |"]
    assert markdown(["lr", "model"], [[0.1, "SSF"]]).splitlines() == lines


def test_a_report_of_some_rows_invents_no_numbers(tmp_path):
    study = STUDIES["table5"]
    facts = [{"trained_parameters": 7, "images_per_s": speed} for speed in (4.0, 8.0)]
    scores = {0: Score("InsVP", None, 0.5, facts[0]), 1: Score("InsVP", 0.6, 0.7, facts[1])}
    results = [Compared(row, 1e-3, False, scores) for row in study.rows if row.label in ("p_l", "p_g")]
    text = report("table5", study, {"cub": results}, Protocol({}, (1e-3,), (0, 1)), tmp_path)
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| p_")]
    mean = ["7", "0.001", "60.00", "60.00 ± 14.14", "–", "6", "–", "2"]  # the row to compare with is not there
    assert [line[1:-1] for line in lines] == [["p_l", *mean, "87.1"], ["p_g", *mean, "–"]]
    assert "The learning rate is 0.001." in text and "natural" not in text


def test_the_papers_numbers_are_complete():
    averages = {"Full": 85.8, "Linear": 75.7, "Partial-1": 84.6, "MLP-3": 79.9, "Bias": 87.1, "Sidetune": 81.0}
    averages |= {"Adapter": 80.8, "AdaptFormer": 85.8, "VP": 83.4, "VPT": 85.5, "DAM-VP": 88.5, "E2VPT": 86.1}
    averages |= {"InsVP": 91.3}
    table = STUDIES["table1"]
    for label, average in averages.items():  # the last column of the paper's table
        assert np.mean(table.numbers[label]) == pytest.approx(average, abs=0.0501)
    for name, study in STUDIES.items():
        labels = [row.label for row in study.rows]
        assert study.reference in labels and set(study.numbers) <= set(labels)
        if name != "table2":
            assert {len(numbers) for numbers in study.numbers.values()} == {len(study.sets)}
            assert paper_number(study, study.sets[-1], study.reference) == study.numbers[study.reference][-1]


def test_the_rows_of_the_ablation_have_the_prompts_of_their_names():
    names = {"p_l": "patch_prompt", "p_g": "global_prompt", "p_c": "common_prompt", "p_s": "specific_prompt"}
    for row in ABLATION[1:]:
        config = insvp_config(Recipe(**row.settings))
        assert {letter for letter, name in names.items() if getattr(config, name)} == set(row.label.split())
    # in one folder, what both tables have is trained once
    shared = {Recipe(**row.settings) for row in ABLATION} & {Recipe(**row.settings) for row in STUDIES["table1"].rows}
    assert {recipe.method for recipe in shared} == {"linear", "insvp"}


def test_a_sweep_trains_a_probe_once():
    recipes = [Recipe(lr=1e-3), Recipe(lr=1e-2), Recipe(lr=1e-2, data="x"), Recipe(method="linear", data="x")]
    changed = with_one_probe([Entry({}, recipe, []) for recipe in recipes])
    assert [entry.recipe.probe for entry in changed] == [True, False, True]  # the last would only fit it again
    assert changed[1] == Entry({}, replace(recipes[1], probe=False), ["--no-probe"])
    alone = [Entry({}, Recipe(method="linear", seed=seed), []) for seed in (0, 1)]
    assert with_one_probe(alone) == alone[:1]


def test_runs_are_forked_at_several_at_a_time(tmp_path, pictures, capsys):
    settings = {"data": str(pictures), "epochs": 1, "batch_size": 8, "amp": "off", "output": str(tmp_path / "runs")}
    settings |= {"pictures": False}
    entries = [Entry({"method": method}, Recipe(method=method, **settings), []) for method in ("linear", "lora")]
    assert runner.train_entries(entries, tmp_path / "runs", jobs=2) == 0
    runs = runner.read_runs(tmp_path / "runs")
    assert sorted(run.recipe.method for run in runs if run.finished) == ["linear", "lora"]
    assert not list((tmp_path / "runs").rglob("*.png"))
    assert "logistic regression" in (tmp_path / "runs" / "logs" / "method=linear.log").read_text()
    runner.train_entries(entries, tmp_path / "runs")
    assert capsys.readouterr().out.count("finished: ") == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_tells_what_became_of_its_runs(jobs, tmp_path, monkeypatch, capsys):
    entries = [Entry({"seed": n}, Recipe(seed=n, probe=False), ["--seed", str(n)]) for n in range(5)]
    result = {"model": "InsVP", "trained_parameters": 7, "test_accuracy": 0.5, "kept_epoch": 1}
    asked = {}

    def write(recipe: Recipe, metrics: str) -> None:
        run = tmp_path / f"run-{recipe.seed}"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
        (run / "metrics.jsonl").write_text(metrics)

    def fork(recipe, resumed, log, *_) -> int:
        asked[recipe.seed] = resumed, log
        status = {3: 1, 4: INTERRUPTED}.get(recipe.seed, 0)
        if status == 0:
            write(recipe, json.dumps(result))
        return status

    write(entries[0].recipe, json.dumps(result))
    write(entries[1].recipe, "")
    monkeypatch.setattr(runner, "_fork", fork)
    assert runner.train_entries(entries[:4], tmp_path, jobs) == 1
    logs = [tmp_path / "logs" / f"seed={n}.log" if jobs > 1 else None for n in range(5)]
    assert asked == {1: (tmp_path / "run-1", logs[1]), 2: (None, logs[2]), 3: (None, logs[3])}
    told = [f"[1/4] finished: {tmp_path}/run-0", f"[2/4] insvp train --resume {tmp_path}/run-1"]
    told += [f"[{n + 1}/4] insvp train --seed {n}" for n in (2, 3)]
    if jobs > 1:  # whose output is not shown
        told += [f"[{n + 1}/4] 0 s: InsVP 50.0%" for n in (1, 2)] + [f"[4/4] failed, see {logs[3]}"]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(told)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        runner.train_entries(entries[4:], tmp_path, jobs)
    assert capsys.readouterr().out == "[1/1] insvp train --seed 4\n"


def test_the_status_of_a_run_is_told_while_others_start(tmp_path, monkeypatch):
    read, asked, numbers, gpus = forkserver.read_signed, Event(), itertools.count(), runner._gpus_of(2)

    def read_slowly(descriptor: int) -> int:
        if next(numbers) == 1:  # after the number of the first process, its status
            asked.set()
            time.sleep(0.3)
        return read(descriptor)

    def status(name: str) -> int:
        return runner._fork(
            Recipe(), tmp_path / "absent", tmp_path / name, 2, gpus
        )  # nothing to resume: it ends with 1

    monkeypatch.setattr(forkserver, "read_signed", read_slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(status, "first.log")
        assert asked.wait(60)
        assert (status("second.log"), first.result()) == (1, 1)


def test_of_runs_that_end_together_one_is_told_at_a_time(tmp_path, monkeypatch):
    telling = []

    def after() -> None:
        telling.append(None)
        time.sleep(0.05)
        most.append(len(telling))
        telling.pop()

    most: list[int] = []
    monkeypatch.setattr(runner, "_launch", lambda *_: 1)
    entries = [Entry({"lr": lr}, Recipe(lr=lr), []) for lr in (0.1, 0.2, 0.3, 0.4)]
    assert runner.train_entries(entries, tmp_path, 4, ["launch"], after) == 4
    assert most == [1] * 4


@pytest.mark.parametrize(
    "settings",
    [
        *({"select_on": "test"}, {"retrain": True}, {"amp": "bf16"}, {"split_seed": 5}, {"metric": "f1"}),
        *({"backbone": "test_vit"}, {"checkpoint": "w.pth"}, {"img_size": 64}, {"preprocessing": "insvp"}),
        *({"data": "photos"}, {"root": "photos"}, {"exif_rotation": False}, {"protocol": "released"}),
    ],
)
def test_a_probe_that_would_be_another_is_fitted_too(settings):
    changed = with_one_probe([Entry({}, Recipe(), []), Entry({}, Recipe(**settings), [])])
    assert [entry.recipe.probe for entry in changed] == [True, True]


def test_a_run_without_a_probe_fits_none_for_others():
    changed = with_one_probe([Entry({}, Recipe(probe=False), []), Entry({}, Recipe(), [])])
    assert [(entry.recipe.probe, entry.arguments) for entry in changed] == [(False, []), (True, [])]


@pytest.mark.parametrize(
    ("first", "second"),  # whether a run fits the probe, and is finished
    [((True, False), (True, True)), ((False, True), (False, False)), ((False, False), None)],
)
def test_the_probe_is_fitted_where_the_least_is_trained_again(first, second):
    recipes, runs = [Recipe(lr=0.1), Recipe(lr=0.2)], []
    for recipe, state in zip(recipes, (first, second), strict=True):
        if state:
            runs.append(SimpleNamespace(recipe=replace(recipe, probe=state[0]), finished=state[1]))
    changed = with_one_probe([Entry({}, recipe, []) for recipe in recipes], runs)
    assert [entry.recipe.probe for entry in changed] == [False, True]


def test_val_is_the_mean_over_the_seeds_too(tmp_path):
    study = STUDIES["table5"]
    scores = {seed: Score("InsVP", val, 0.5, {"trained_parameters": 7}) for seed, val in enumerate((0.2, 0.6))}
    results = {"cub": [Compared(study.rows[0], 1e-3, False, scores)]}
    text = report("table5", study, results, Protocol({}, (1e-3,), (0, 1)), tmp_path)
    assert text.splitlines()[6].split("|")[4].strip() == "40.00"


def test_the_tasks_of_vtab_count_for_their_groups(tmp_path):
    study = STUDIES["table2"]
    row, failed = (next(row for row in study.rows if row.label == label) for label in ("InsVP", "Linear"))
    accuracies = {task: number / 10 for number, tasks in enumerate(VTAB_GROUPS.values(), 1) for task in tasks[:2]}
    results = {
        f"vtab/{task}": [
            Compared(failed, None, False, {}),
            Compared(row, None, False, {0: Score("InsVP", None, test, {"trained_parameters": 7})}),
        ]
        for task, test in accuracies.items()
    }
    text = report("table2", study, results, Protocol({}, (1e-3,), (0,)), tmp_path)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    header, _, without, line = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table[-4:])
    assert header == ["model", *(name for group in VTAB_GROUPS for name in (group, "paper"))]
    sizes, papers = [*map(len, VTAB_GROUPS.values())], [f"{number:.1f}" for number in study.numbers["InsVP"]]
    assert line[1::2] == [f"{10 * number}.00 (2 of {size})" for number, size in enumerate(sizes, 1)]
    assert line[2::2] == papers and without[1::2] == [f"– (0 of {size})" for size in sizes]


@pytest.mark.parametrize(("name", "data"), [("table1", "vtab/cifar"), ("table5", "vtab/cifar"), ("table2", "cub")])
def test_groups_of_vtab_are_those_of_its_own_study(name, data, tmp_path):
    study, scores = STUDIES[name], {0: Score("InsVP", None, 0.5, {"trained_parameters": 7})}
    results = {data: [Compared(row, None, False, scores) for row in study.rows]}
    text = report(name, study, results, Protocol({}, (1e-3,), (0,)), tmp_path)
    assert "natural" not in text and "| paper" not in text


def test_the_papers_accuracies_stand_beside_no_other_metric(tmp_path):
    for name, data in (("table5", "cub"), ("table2", "vtab/cifar")):
        study = STUDIES[name]
        for metric, beside in ((None, True), ("top1", True), ("f1", False)):
            scores = {0: Score("InsVP", None, 0.5, {"trained_parameters": 7, "metric": metric})}
            results = {data: [Compared(row, None, False, scores) for row in study.rows]}
            text = report(name, study, results, Protocol({}, (1e-3,), (0,)), tmp_path)
            assert ("paper" in text) == beside and ("natural" in text) == (name == "table2")


def test_a_report_says_how_it_was_made(tmp_path):
    study = STUDIES["table5"]
    results = {"cub": [Compared(study.rows[0], None, False, {})]}

    def notes(seeds=(0,), **settings) -> str:
        return report("table5", study, results, Protocol(settings, (1e-3,), seeds), tmp_path).splitlines()[-1]

    one, two = notes(backbone="vit_tiny_patch16_224", epochs=7, checkpoint="a.npz"), notes((0, 1))
    assert "Backbone: vit_tiny_patch16_224 with the weights of a.npz; epochs: 7." in one
    assert "Difference: to no prompts. " in one and "deviation" not in one and "interval" not in one
    assert "Backbone: vit_shapes_32; epochs: 10." in two
    assert "mean ± standard deviation over seeds 0, 1" in two and "paired by seed, ± half the 95 %" in two
    for settings, optimistic in (({}, False), ({"select_on": "test"}, True), ({"protocol": "released"}, True)):
        assert ("best one on the test images, so these numbers are optimistic" in notes(**settings)) == optimistic


def test_a_rate_that_is_the_only_one_is_at_no_edge(trained, tmp_path):
    (ours,) = compare([Row("ours", {"prompt_length": 2})], Protocol({"epochs": 3}, (0.1,), (4,)), tmp_path)
    assert (ours.rate, ours.at_edge) == (0.1, False)


def test_the_settings_of_a_row_come_before_those_of_all(trained, tmp_path):
    protocol = Protocol({"prompt_length": 3, "epochs": 4}, (0.1,), (4,))
    compare([Row("ours", {"prompt_length": 2})], protocol, tmp_path)
    assert [(recipe.prompt_length, recipe.epochs) for recipe in trained] == [(2, 4)]


def test_the_cores_are_divided_among_the_jobs(tmp_path, monkeypatch):
    given = []

    class Context:
        def set_forkserver_preload(self, names):
            pass

        def Process(self, target, args):
            given.append(args[-1])
            raise RuntimeError("enough")

    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda kind: Context())
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(runner.torch, "get_num_threads", lambda: 6)  # of one job, as they were
    for jobs in (1, 2, 3, 16):
        with pytest.raises(RuntimeError, match="enough"):
            runner._fork(Recipe(), None, None, jobs, runner._gpus_of(jobs))
    assert given == [6, 4, 2, 1]


@pytest.mark.parametrize(
    ("count", "visible", "jobs", "expected"),
    [
        (3, None, 2, ["0", "1"]),
        (2, None, 5, ["0", "1", "0", "1", "0"]),
        (2, "5,GPU-7", 3, ["5", "GPU-7", "5"]),
        (3, None, 1, [None]),
        (1, None, 2, [None] * 2),
        (1, "0,9", 2, [None] * 2),  # there is no GPU 9
        (0, "", 2, [None] * 2),
        (1, "MIG-4,MIG-5", 2, ["MIG-4", "MIG-5"]),  # PyTorch sees one of them
        (2, "HIP_VISIBLE_DEVICES", 2, [None] * 2),
        (2, "ROCR_VISIBLE_DEVICES", 2, [None] * 2),
    ],
)
def test_the_gpus_are_given_to_the_jobs_in_turn(count, visible, jobs, expected, tmp_path, monkeypatch):
    given, all_run = [], Barrier(jobs)

    def run(recipe, resume, log, jobs, gpu) -> int:
        given.append(gpu)
        all_run.wait(60)
        return 0

    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None and visible.endswith("_DEVICES"):
        monkeypatch.setenv(visible, "0,1")
    elif visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    entries = [Entry({"seed": seed}, Recipe(seed=seed), []) for seed in range(2 * jobs)]
    assert runner.train_entries(entries, tmp_path, jobs) == 0
    assert Counter(given[:jobs]) == Counter(given[jobs:]) == Counter(expected)


def test_a_run_sees_its_gpu_alone(monkeypatch, capsys):
    seen, usable = [], iter([True, False])
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: next(usable))
    monkeypatch.setattr(runner, "train", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    for gpu in (None, "2"):
        runner._train(Recipe(), None, None, gpu, torch.get_num_threads())
    assert seen == ["1,2", "2"]
    with pytest.raises(SystemExit):
        runner._train(Recipe(), None, None, "2", torch.get_num_threads())
    assert len(seen) == 2 and "CUDA_VISIBLE_DEVICES is 2: expected a GPU that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt("resume it"), INTERRUPTED, "interrupted; resume it\n"),
        (TrainingError("no data"), 1, "insvp train: error: no data\n"),
        (ValueError("a fault"), 1, "ValueError: a fault\n"),
    ],
)
def test_a_run_that_ends_early_says_why_and_has_its_status(error, status, told, threads, tmp_path, monkeypatch, capsys):
    asked = []

    def train(*arguments):
        asked.append((*arguments, torch.get_num_threads()))
        raise error

    threads(2)
    monkeypatch.setattr(runner, "train", train)
    for resume in (None, tmp_path):
        with pytest.raises(SystemExit) as stop:
            runner._train(recipe := Recipe(), resume, None, None, 1)
        assert stop.value.code == status and capsys.readouterr().err.endswith(told)
    assert asked == [(recipe, None, 1), (None, tmp_path, 1)]  # a resumed run has its own recipe


def test_all_that_a_run_prints_is_added_to_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda *_: [os.write(1, b"epoch 1\n"), os.write(2, b"a warning\n")])
    log, before = tmp_path / "logs" / "lr=0.1.log", [os.dup(1), os.dup(2)]
    try:
        for _ in range(2):
            runner._train(Recipe(), None, log, None, torch.get_num_threads())
    finally:
        for stream, descriptor in enumerate(before, 1):
            os.dup2(descriptor, stream)
            os.close(descriptor)
    assert log.read_text() == 2 * "epoch 1\na warning\n"


def test_a_probe_that_another_study_has_fitted_beside_it_is_not_the_model(monkeypatch):
    scores = [Score("InsVP", 0.5, 0.5, {}), Score("linear probe", 0.9, 0.9, {})]
    monkeypatch.setattr(comparison, "scores_of", lambda run: scores)
    for _ in range(2):
        assert comparison._score([], Entry({}, Recipe(probe=False), [])).model == "InsVP"
        scores.reverse()
