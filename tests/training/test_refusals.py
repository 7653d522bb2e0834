"""Settings and data that do not go together are refused before there is a run folder and anything is trained."""

import csv

import pytest

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.commands import cli
from insvp_fast.training import run as run_module
from insvp_fast.training.backbone import load_backbone
from tests.training.small_runs import make_folder

ONE, SEVERAL = "one", "several"  # labels per image
ADAPTER = "ADAPTER"  # stands for an adapter of InsVP with two prompt tokens
BESIDES = ([], ["--retrain"], ["--find-lr"], ["--class-weights", "auto", "--mixup", "0.5"], ["--auto-batch"])
CASES = [  # options; the data with which they are refused; words of the reason
    (["--metric", "map"], [ONE], "--metric is map: expected one of top1, mean_per_class, f1 with one label"),
    (["--metric", "top1"], [SEVERAL], "--metric is top1: expected one of f1, map with several labels"),
    (["--metric", "mean_per_class"], [SEVERAL], "--metric is mean_per_class: expected one of f1, map"),
    (["--metric", "f1"], [], ""),
    (["--sampling", "balanced"], [SEVERAL], "--sampling is balanced: expected shuffle with several labels"),
    (["--method", "dam_vp"], [ONE, SEVERAL], "DAM-VP has 10 prompts: expected as many images, found 4"),
    (["--method", "dam_vp", "--method-options", "num_prompts=4"], [], ""),
    (["--method", "mlp_3", "--head-init", "probe"], [ONE, SEVERAL], "expected a head that is one linear layer"),
    (["--init-from", "nowhere/"], [ONE, SEVERAL], "--init-from is nowhere/: "),
    (["--init-from", ADAPTER, "--prompt-length", "3"], [ONE, SEVERAL], "has shape"),
    (
        ["--init-from", ADAPTER, "--prompt-length", "2", "--global-kernels", "5", "5"],
        [ONE, SEVERAL],
        "has shape",
    ),
    (["--init-from", ADAPTER, "--prompt-length", "2"], [], ""),
    (["--augmentation", "crop"], [ONE, SEVERAL], "--augmentation is crop: "),
    (["--protocol", "released"], [ONE, SEVERAL], "--protocol is released: "),
    (["--cutmix", "1", "--batch-size", "1"], [ONE, SEVERAL], "--batch-size is 1: expected at least 2 with"),
]


class BegunError(Exception):
    """Raised where the first model would be trained."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two classes with two training images each, the same images with several labels, and an adapter."""
    root = tmp_path_factory.mktemp("data")
    folder, lists, adapter = make_folder(root / ONE, {"train": 2, "val": 1, "test": 1}), root / SEVERAL, root / ADAPTER
    lists.mkdir()
    for split in ("train", "val", "test"):
        with (lists / f"{split}.csv").open("w", newline="") as stream:
            rows = [(file, f"{file.parent.name}|{file.stem}") for file in sorted((folder / split).rglob("*.png"))]
            csv.writer(stream).writerows([("file", "labels"), *rows])
    InsVPViT(load_backbone(), 5, InsVPConfig(prompt_length=2)).save_pretrained(adapter)
    return {ONE: str(folder), SEVERAL: str(lists), ADAPTER: str(adapter)}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(CASES[number][0]))
def test_what_does_not_go_together_is_refused_before_the_work(number, places, tmp_path, monkeypatch, capsys):
    options, refused, reason = CASES[number]
    options, besides = [places.get(word, word) for word in options], BESIDES[number % len(BESIDES)]

    def begin(*_):
        raise BegunError

    monkeypatch.setattr(run_module, "train_candidate", begin)
    for data in (ONE, SEVERAL):
        output = tmp_path / data
        command = ["train", "--data", places[data], "--output", str(output), "--amp", "off"]
        if data not in refused:
            with pytest.raises(BegunError):
                cli.main([*command, *options])
            continue
        for more in ([], besides) if besides else ([],):
            try:
                status = cli.main([*command, *more, *options])
            except SystemExit as stop:  # of settings that never go together
                status = stop.code
            error = capsys.readouterr().err
            assert status in (1, 2) and reason in error and len(error.splitlines()) == 1
            assert not output.exists()
