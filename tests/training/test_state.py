"""What a run resumes from: folders that are replaced whole, and the state in them."""

import os
import random
import shutil

import numpy as np
import pytest
import torch

from insvp_fast.atomic_files import OLD, recover, replace_file, replace_folder
from insvp_fast.training.state import get_rng_states, load_state, save_state, set_rng_states


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
    (tmp_path / "last").rename(tmp_path / f"last{OLD}")  # as an interruption leaves it
    assert load_state(tmp_path / "last")[2] == facts


def test_two_that_replace_a_file_at_once_do_not_meet(tmp_path):
    """As threads of one process do, or processes of two containers, which may have the same number."""
    file = tmp_path / "results.csv"
    with replace_file(file) as one:
        with replace_file(file) as other:
            one.write(b"one")
            other.write(b"other")
        assert file.read_bytes() == b"other"
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]
