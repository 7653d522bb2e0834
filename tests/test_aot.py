"""Every Triton kernel compiled for chips that are not here: it fits, it spills nothing, it uses the matrix units."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip, superpose

from insvp_fast.aot import SHARED_LIMIT, TARGETS, cases


def failing(facts, wrong):
    return [(fact["kernel"], fact["target"], fact) for fact in facts if wrong(fact)]


def test_every_kernel_compiles_for_every_target(aot):
    assert {(fact["target"], fact["kernel"]) for fact in aot} == {(t, case.name) for t in TARGETS for case in cases(t)}


def test_shared_memory_is_within_the_chips_limit(aot):
    assert not failing(aot, lambda fact: fact["shared"] > SHARED_LIMIT[fact["target"]])


def test_nothing_spills(aot):
    assert not failing(aot, lambda fact: fact["spills"] or fact.get("stack"))


def test_matrix_units_are_used(aot):
    assert not failing(aot, lambda fact: fact["kernel"].startswith("superpose") and not fact["matrix"])


def test_the_forward_leaves_room_for_16_warps(aot):
    """Fewer on a multiprocessor would not keep enough loads in flight for a memory-bound kernel."""
    main = [fact for fact in aot if fact["kernel"] == "superpose_fwd-P16-bf16-bf16" and fact["target"] != "gfx942"]
    assert not failing(main, lambda fact: fact["registers"] > 128)


class Recorder:
    """Stands in for a kernel and notes the arguments of its launch."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def test_the_cases_are_what_the_launchers_launch(monkeypatch):
    import torch

    monkeypatch.setattr(chip, "INTERPRETED", True)
    launches = []
    order = ("_superpose_fwd_kernel", "_superpose_bwd_kernel", "_superpose_bwd_weight_kernel")
    expected = [c for c in cases("90") if c.name.endswith("P16-bf16-bf16") and c.name.startswith("superpose")]
    for name in order:
        monkeypatch.setattr(superpose, name, Recorder(launches))
    image = torch.zeros(2, 3, 224, 224, dtype=torch.bfloat16)
    w1, w2 = torch.zeros(16, 768), torch.zeros(768, 16)
    tokens, hidden = superpose.superpose_fwd(image, image, w1, w1[:, 0], w2, w2[:, 0], 16, 0.7, 0.3, torch.bfloat16)
    superpose.superpose_bwd(tokens, image, hidden, w1, w2, 16, 0.7, 0.3, True, True)
    for case, (args, kwargs) in zip(expected, launches, strict=True):
        assert len(args) == len(case.signature)
        assert {**kwargs, "COMPUTE": None} == {**case.constants, "COMPUTE": None}  # the interpreter computes in fp32


def test_an_interpreting_process_refuses():
    child = subprocess.run(
        [sys.executable, "-m", "insvp_fast.aot"], env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 2 and "TRITON_INTERPRET" in child.stderr
