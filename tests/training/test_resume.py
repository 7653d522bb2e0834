"""A run that is killed and resumed ends like one that never was: same adapter, same metrics."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from insvp_fast.errors import InsVPError
from insvp_fast.storage import recover, replace_folder
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.sampler import BatchSampler
from insvp_fast.training.state import get_rng_states, load_state, save_state, set_rng_states
from insvp_fast.training.trainer import Trainer
from tests.training.killed_runs import make_digits, outcome, start


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("data") / "few")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # two threads that wait for each other are slow on a busy machine


def finish(child, status=0):
    child.join()
    assert child.exitcode == status


# each is a life of the process, ended just before the event: in the first epoch, within a writing, between two renames
LIVES = [("step", 1), ("sync", 2), ("step", 6), ("sync", 5), ("rename", 2), ("step", 4), ("rename", 3), ("sync", 19)]


def test_a_killed_run_ends_like_one_that_never_was(digits, tmp_path):
    # everything that carries a state: augmentation, mixing, dropout, an average, accumulation, a schedule, an odd batch
    mixing = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    settings = {
        "data": str(digits),
        "epochs": 2,
        "batch_size": 16,
        "accumulate": 2,
        "ema": 0.9,
        "save_steps": 2,
    } | mixing
    whole = start(settings | {"output": str(tmp_path / "whole")}, log=tmp_path / "whole.log")
    folder, log = tmp_path / "killed" / "few-1", tmp_path / "killed.log"
    for life, event in enumerate(LIVES):
        resume = folder if life else None
        finish(start(settings | {"output": str(tmp_path / "killed")}, resume, event, log), -signal.SIGKILL)
    finish(start(settings, folder, log=log))
    finish(whole)
    assert outcome(folder) == outcome(tmp_path / "whole" / "few-1")
    assert not [path for path in folder.rglob("*") if path.suffix in (".new", ".old", ".tmp")]
    assert log.read_text().count("goes on after") >= 5


def test_workers_change_nothing_and_resume_too(digits, tmp_path):
    settings = {"data": str(digits), "epochs": 2, "batch_size": 50, "probe": False, "amp": "off"}
    whole = start(settings | {"output": str(tmp_path / "whole")}, log=tmp_path / "log")
    workers = settings | {"output": str(tmp_path), "workers": 1, "save_steps": 1}
    finish(start(workers, die=("step", 3), log=tmp_path / "log"), -signal.SIGKILL)
    finish(start(workers, tmp_path / "few-1", log=tmp_path / "log"))
    finish(whole)
    assert outcome(tmp_path / "few-1") == outcome(tmp_path / "whole" / "few-1")


def test_a_run_killed_at_a_random_moment(digits, tmp_path):
    settings = {"data": str(digits), "epochs": 2, "batch_size": 16, "probe": False, "save_steps": 1}
    log, folder = tmp_path / "log", tmp_path / "few-1"
    whole = start(settings | {"output": str(tmp_path / "whole")}, log=log)
    child = start(settings | {"output": str(tmp_path)}, log=log)
    while child.is_alive() and not (folder / "last").exists():
        child.join(0.01)
    child.join(random.SystemRandom().random() * 0.5)
    child.kill()
    child.join()
    finish(start(settings, folder, log=log))
    finish(whole)
    assert outcome(folder) == outcome(tmp_path / "whole" / "few-1")


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def tiny(digits, tmp_path):
    return {"data": str(digits), "output": str(tmp_path / "runs"), "epochs": 2, "batch_size": 32, "probe": False}


def test_a_finished_run_is_left_as_it_is(tiny, capsys, monkeypatch):
    folder = train(Recipe(**tiny))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "curve.png"}
    monkeypatch.setattr(Trainer, "fit", None)  # not called again
    assert train(resume=folder) == folder
    assert before == {path: path.read_bytes() for path in before}
    assert "kept" in capsys.readouterr().out


def test_a_full_disk_keeps_the_last_state(tiny, monkeypatch):
    whole = train(Recipe(**tiny))
    fsync, left = os.fsync, 12

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InsVPError, match=r"No space left on device: .*few-2; .*go on with `resume` .*few-2"):
            train(Recipe(**tiny))
    folder = whole.with_name("few-2")
    assert not list(folder.glob("*.new"))
    train(resume=folder)
    assert outcome(folder) == outcome(whole)


def test_ctrl_c_says_how_to_go_on(tiny, monkeypatch):
    step = Trainer._step

    def interrupted(self, number):
        if number == 6:
            raise KeyboardInterrupt
        step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"last good state is kept, go on with `resume` .*few-1"):
            train(Recipe(**tiny))
    folder = train(resume=f"{tiny['output']}/few-1")
    assert len(outcome(folder)[1]) == 3


def test_weights_that_are_no_numbers_are_not_saved(tiny, monkeypatch):
    save = Trainer.save

    def spoiled(self):
        if self.epoch == 2:
            with torch.no_grad():
                next(iter(self.trained.values())).fill_(float("nan"))
        save(self)

    monkeypatch.setattr(Trainer, "save", spoiled)
    with pytest.raises(InsVPError, match="weights of InsVP became infinite or not a number"):
        train(Recipe(**tiny))
    assert json.loads((Path(tiny["output"]) / "few-1" / "last" / "state.json").read_text())["epoch"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, workers):
    data = make_digits(tmp_path / "broken", train=30, held_out=10)
    next((data / "train" / "3").iterdir()).write_bytes(b"\x89PNG and nothing else")
    recipe = Recipe(data=str(data), output=str(tmp_path), epochs=1, batch_size=4, probe=False, workers=workers)
    with pytest.raises(InsVPError, match=r"^\S*train/3/\d+.png: not an image that can be read"):
        train(recipe)


def test_only_its_own_recipe_resumes_a_run(tiny, tmp_path):
    with pytest.raises(InsVPError, match="not a run folder"):
        train(resume=tmp_path)
    folder = train(Recipe(**tiny | {"epochs": 1}))
    with pytest.raises(InsVPError, match="expected no other settings"):
        train(Recipe(**tiny), resume=folder)
    (folder / "last" / "training.pt").write_bytes(b"")
    with pytest.raises(InsVPError, match="not a state that can be resumed"):
        train(resume=folder)


# ------------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("interrupted_at", ["content", "first rename", "second rename", "removal"])
def test_a_folder_is_replaced_whole_or_not(tmp_path, monkeypatch, interrupted_at):
    folder = tmp_path / "last"
    with replace_folder(folder) as new:
        (new / "content").write_text("old")
    owner, name, count = {
        "content": (os, "rename", 9),
        "first rename": (os, "rename", 1),
        "second rename": (os, "rename", 2),
        "removal": (shutil, "rmtree", 3),
    }[interrupted_at]
    function = getattr(owner, name)

    def killed(*args, **kwargs):
        nonlocal count
        count -= 1
        if count <= 0:  # whatever would tidy up afterwards does not run either
            raise SystemExit
        function(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(SystemExit):  # noqa: PT012, SIM117 (what is within is interrupted)
        with replace_folder(folder) as new:
            (new / "content").write_text("new")
            if interrupted_at == "content":
                raise SystemExit
    monkeypatch.undo()
    recover(folder)
    assert (folder / "content").read_text() == ("new" if interrupted_at == "removal" else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_state_comes_back_as_it_was(tmp_path):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    np.random.randn()  # keeps a second normal number for later
    device, weights = torch.device("cpu"), {"a": torch.randn(3), "b": torch.randn(2, 2).T}
    save_state(tmp_path / "last", weights, {"random": get_rng_states(device)}, {"epoch": 3, "accuracy": 0.1 + 0.2})
    expected = random.random(), np.random.randn(2).tolist(), torch.randn(2).tolist()
    found, tensors, facts = load_state(tmp_path / "last")
    set_rng_states(tensors["random"], device)
    assert (random.random(), np.random.randn(2).tolist(), torch.randn(2).tolist()) == expected
    assert all(torch.equal(weights[key], found[key]) for key in weights)
    assert facts == {"epoch": 3, "accuracy": 0.1 + 0.2}
    assert load_state(tmp_path / "nothing") is None


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 12, 13, 25])
def test_processes_share_the_batches_of_one(count, processes, even):
    alone = BatchSampler(count, 3 * processes, seed=1)
    shares = [BatchSampler(count, 3, 1, rank, processes, even, fill_empty=True) for rank in range(processes)]
    for order in (alone, *shares):
        order.epoch = 2
    batches = [list(order) for order in shares]
    assert {len(part) for part in batches} == {len(alone)}
    for number, whole in enumerate(alone):
        sizes = shares[0].sizes(number)
        own = [part[number][:size] for part, size in zip(batches, sizes, strict=True)]
        assert [sample for part in own for sample in part] == whole[: sum(sizes)]
        assert len(whole) - sum(sizes) <= (processes if even else 0)
        assert all(part[number] for part in batches)  # nobody is left out
    if not even:
        assert sorted(index for batch in alone for _, index in batch) == list(range(count))


def test_an_order_begins_where_it_is_told():
    order = BatchSampler(10, 3, seed=5)
    whole = list(order)
    order.first_batch = 2
    assert list(order) == whole[2:]
    order.first_batch, order.epoch = 0, 1
    assert [index for batch in order for _, index in batch] != [index for batch in whole for _, index in batch]
