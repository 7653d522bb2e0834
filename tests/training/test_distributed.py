"""Two processes train as one does with the same images per step."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from insvp_fast.errors import DataError, InsVPError
from insvp_fast.studies.arguments import to_arguments
from insvp_fast.training import accelerator, clusters
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.sampler import BatchSampler
from tests.training.killed_runs import make_digits, outcome, start
from tests.training.small_runs import quick

SETTINGS = {"epochs": 2, "amp": "off", "lr": 1e-3, "probe": False, "head_init": "random", "sampling": "balanced"}
SETTINGS |= {"class_weights": "auto", "prompt_length": 2, "global_dropout": 0.0}  # other processes draw other masks


def launch(settings: dict) -> subprocess.CompletedProcess:
    """Run the command of the documentation for two GPUs, on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "insvp_fast", "train", *to_arguments(settings)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """145 training images: 9 batches of 16, and one image for two processes."""
    root = make_digits(tmp_path_factory.mktemp("data") / "few")
    for file in sorted((root / "train").rglob("*.png"))[::30]:
        file.unlink()
    for split in ("val", "test"):
        next((root / split / "7").iterdir()).unlink()  # 29 images, which do not divide either
    return root


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """The outcomes of one process, of two, and of one that accumulates two batches per step."""
    root, shared = tmp_path_factory.mktemp("runs"), SETTINGS | {"data": str(digits)}
    (root / "two" / "best.old").mkdir(parents=True)
    (root / "two" / "config.json").write_text("{}")
    two = launch(shared | {"batch_size": 8, "output": str(root / "two")})
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("run folder: ") == 1  # the other process prints nothing, and makes none
    alone = {"one": {"batch_size": 16}, "accumulated": {"batch_size": 8, "accumulate": 2}}
    for kind, sizes in alone.items():
        child = start(shared | sizes | {"output": str(root / kind), "pictures": False}, log=root / f"{kind}.log")
        child.join(300)
        assert child.exitcode == 0, (root / f"{kind}.log").read_text()
    assert [run.name for kind in alone for run in (root / kind).iterdir()] == ["few-1"] * 2
    # the second process has left alone what is in the folder of the runs, and was not confused by it
    assert sorted(path.name for path in (root / "two").iterdir()) == ["best.old", "config.json", "few-1"]
    return {kind: outcome(root / kind / "few-1") for kind in ("two", *alone)}


@pytest.mark.parametrize("kind", ["two", "accumulated"])
def test_losses_and_metrics_are_those_of_one_process(runs, kind):
    for one, other in zip(map(dict, runs["one"][1]), map(dict, runs[kind][1]), strict=True):
        for key in ("loss", "val_loss", "test_loss"):
            assert one.pop(key, 0.0) == pytest.approx(other.pop(key, 0.0), rel=1e-5)
        assert one == other


@pytest.mark.parametrize("kind", ["two", "accumulated"])
def test_weights_are_those_of_one_process(runs, kind):
    one, other = load(runs["one"][0]), load(runs[kind][0])
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)


def test_all_processes_take_the_smallest_batch_that_one_of_them_can(monkeypatch):
    monkeypatch.setattr(accelerator, "gather_object", lambda found: [*found, 5])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    recipe = accelerator.find_batch_size(
        Recipe(batch_size=7, auto_batch=True), model, (3, 2, 2), accelerator.create_accelerator()
    )
    assert (recipe.batch_size, recipe.auto_batch) == (5, False)


def test_processes_wait_for_hours_for_the_one_that_fills_the_cache():
    assert accelerator.create_accelerator().init_handler.to_kwargs() == {"timeout": accelerator.PATIENCE}
    assert accelerator.PATIENCE.total_seconds() >= 3600


@pytest.mark.parametrize("is_main_process", [True, False])
def test_an_error_of_the_main_process_is_raised_in_every_process(is_main_process, monkeypatch):
    def compute():
        raise DataError("no such file")

    sent = []
    monkeypatch.setattr(accelerator, "broadcast_object_list", lambda own: sent.extend(own) or [(None, DataError("it"))])
    with pytest.raises(DataError, match="^it$"):
        accelerator.from_main(SimpleNamespace(is_main_process=is_main_process), compute)
    ((value, error),) = sent
    assert value is None and (str(error) == "no such file" if is_main_process else error is None)


@pytest.mark.parametrize("own", [False, True])
def test_an_error_of_clustering_is_raised_in_every_process(own, pictures, tmp_path, monkeypatch):
    def features_of(*_):
        raise DataError("mine: not an image")

    gathered = []
    monkeypatch.setattr(clusters, "gather_object", lambda part: gathered.extend(part) or [*part, (None, "other's")])
    if own:
        monkeypatch.setattr(clusters.DAMVP, "features_of", features_of)
    recipe = quick(pictures, tmp_path, method="dam_vp", method_options=("num_prompts=2",), prompt_length=None)
    with pytest.raises(
        InsVPError, match="^mine: not" if own else "^another process cannot cluster its images: other's"
    ):
        train(recipe)
    ((features, reason),) = gathered
    assert reason == "mine: not an image" if own else features.shape == (18, 192)


def test_a_process_without_images_is_not_counted():
    shares = [BatchSampler(9, 4, None, rank, 2, fill_empty=True) for rank in range(2)]
    assert [share.sizes(1) for share in shares] == [[1, 0]] * 2
    assert [len(list(share)[1]) for share in shares] == [1, 1]
