"""State dicts are found in whatever a checkpoint wraps around them."""

import pytest
import torch

from insvp_fast.checkpoints.state_dict import check_shapes, other_state_dicts, unwrap_state_dict
from insvp_fast.errors import CheckpointError

TENSORS = {"a.weight": torch.ones(2), "b.module.bias": torch.zeros(3)}


def endless() -> dict:
    content: dict = {}
    content["model"] = content
    return content


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"state_dict": {"model": t}},
        lambda t: {"model": {"state_dict": t, "optimizer": None}, "args": [1]},
        lambda t: {"state_dict_ema": None, "model": t},
        lambda t: {"state_dict": {"a.weight": torch.zeros(1)}, "state_dict_ema": t},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(wrap, prefix):
    assert unwrap_state_dict(wrap({prefix + key: value for key, value in TENSORS.items()}), "file") == TENSORS


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1], "list"),
        (torch.ones(1), "Tensor"),
        ({"epoch": 3, "b": 1}, r"\['b', 'epoch'\]"),
        ({"model": {"a": torch.ones(1), "b": None}}, r"\['a', 'b'\]"),
        ({"a": torch.ones(1).to_sparse()}, r"\['a'\]"),
        ({0: torch.ones(1)}, r"\['0'\]"),
        (endless(), r"\['model'\]"),
    ],
)
def test_what_holds_no_state_dict_is_refused(content, found):
    with pytest.raises(CheckpointError, match=f"best.pth: found {found}: expected a state dict of dense tensors"):
        unwrap_state_dict(content, "best.pth")


def test_a_tensor_with_and_without_a_prefix_is_refused():
    with pytest.raises(CheckpointError, match="best.pth: found a.weight twice, once as module.a.weight: expected one"):
        unwrap_state_dict(TENSORS | {"module.a.weight": torch.zeros(2)}, "best.pth")


@pytest.mark.parametrize(("missing", "more"), [(3, ""), (4, "; and 1 more")])
def test_three_problems_are_named_and_the_others_counted(missing, more):
    with pytest.raises(CheckpointError, match=rf"2 is missing: expected shape \(1,\){more}$"):
        check_shapes({}, {str(i): (1,) for i in range(missing)}, "best.pth")


def test_the_state_dicts_beside_the_one_that_is_taken_are_counted():
    content = {"model": {"model": TENSORS, "student": TENSORS}, "student": TENSORS | {"epoch": 3}, "predictor": {}}
    assert other_state_dicts(content) == {"student": 4}
    assert list(other_state_dicts(content)) == ["student"]
