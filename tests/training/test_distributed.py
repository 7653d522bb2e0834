"""Two processes train as one does with the same images per step."""

import socket

import pytest
import torch
from safetensors.torch import load

from insvp_fast.training import accelerator
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.sampler import BatchSampler
from tests.training.killed_runs import make_digits, outcome, start

SETTINGS = {"epochs": 2, "amp": "off", "lr": 1e-3, "probe": False, "head_init": "random"}
SETTINGS |= {"sampling": "balanced", "class_weights": "auto"}


def environments(count: int) -> list[dict[str, str]]:
    """The environment variables that a launcher would set for each process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    shared["OMP_NUM_THREADS"] = "1"  # more threads than cores would wait for each other
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


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
    root = tmp_path_factory.mktemp("runs")
    sizes = {"one": {"batch_size": 16}, "two": {"batch_size": 8}, "accumulated": {"batch_size": 8, "accumulate": 2}}
    found = {}
    for kind, size in sizes.items():
        settings = SETTINGS | size | {"data": str(digits), "output": str(root / kind)}
        given = environments(2) if kind == "two" else [{"RANK": "0", "WORLD_SIZE": "1"}]
        processes = [start(settings, log=root / f"{kind}.log", environment=environment) for environment in given]
        for child in processes:
            child.join(300)
        assert [child.exitcode for child in processes] == [0] * len(given), (root / f"{kind}.log").read_text()
        found[kind] = outcome(root / kind / "few-1")
    return found


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


def test_a_process_without_images_is_not_counted():
    shares = [BatchSampler(9, 4, None, rank, 2, fill_empty=True) for rank in range(2)]
    assert [share.sizes(1) for share in shares] == [[1, 0]] * 2
    assert [len(list(share)[1]) for share in shares] == [1, 1]
