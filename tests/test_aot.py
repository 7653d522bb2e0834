"""Every Triton kernel compiled for chips that are not here: it fits, spills nothing and accesses memory widely."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import chip, gelu, norm_insert, superpose

from insvp_fast.aot import SHARED_LIMIT, TARGETS, cases
from insvp_fast.aot_cases import POINTERS


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


def test_streaming_kernels_access_16_bytes_a_lane(aot):
    """All but the statistics, one number a row: BLOCK_M = 2 rows and one lane's or a few lanes' worth."""
    streaming = [fact for fact in aot if fact["kernel"].startswith(("norm_insert", "gelu"))]
    assert len(streaming) > 30
    # compilers for AMD write the 8 codes of a lane as 8 bytes
    assert not failing(
        streaming,
        lambda fact: (
            fact["narrow"] > (2 if "norm" in fact["kernel"] else "_code" in fact["kernel"] and "gfx" in fact["target"])
        ),
    )


def test_sums_over_a_row_need_no_shared_memory(aot):
    rows = [fact for fact in aot if fact["kernel"].startswith("norm_insert") and fact["target"] != "gfx942"]
    assert rows and not failing(rows, lambda fact: fact["shared"])


def test_norm_insert_leaves_room_for_12_warps(aot):
    """65 536 registers hold 12 and more warps of two rows, whose loads are 70 KB in flight."""
    rows = [fact for fact in aot if fact["kernel"].startswith("norm_insert") and fact["target"] != "gfx942"]
    assert not failing(rows, lambda fact: fact["registers"] > 168)


def test_the_forward_leaves_room_for_16_warps(aot):
    """Fewer on a multiprocessor would not keep enough loads in flight for a memory-bound kernel."""
    main = [fact for fact in aot if fact["kernel"] == "superpose_fwd-P16-bf16-bf16" and fact["target"] != "gfx942"]
    assert not failing(main, lambda fact: fact["registers"] > 128)


class Recorder:
    """Stands in for a kernel and notes the arguments of its launch."""

    def __init__(self, kernel, launches):
        self.arg_names, self.launches = kernel.arg_names, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


@pytest.fixture
def launches(monkeypatch):
    """Records the launches of the kernels of a module, in their order, instead of running them."""
    monkeypatch.setattr(chip, "INTERPRETED", True)
    seen = []
    for module in (superpose, norm_insert, gelu):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    return seen


def same_as_launched(prefix, label, launches):
    expected = [c for c in cases("90") if c.name.startswith(prefix) and c.name.endswith(label)]
    for case, (args, kwargs) in zip(expected, launches, strict=True):
        absent = {name for name, value in zip(case.kernel.arg_names, args, strict=False) if value is None}
        assert absent == {name for name, value in case.constants.items() if value is None}
        assert len(args) == len(case.signature) + len(absent)
        types = {
            name: POINTERS[x.dtype] for name, x in zip(case.kernel.arg_names, args, strict=False) if torch.is_tensor(x)
        }
        assert types == {name: kind for name, kind in case.signature.items() if kind.startswith("*")}
        constants = {name: value for name, value in case.constants.items() if name not in absent}
        assert {**kwargs, "COMPUTE": None} == {**constants, "COMPUTE": None}  # the interpreter computes in fp32


def test_the_cases_are_what_superpose_launches(launches):
    image = torch.zeros(2, 3, 224, 224, dtype=torch.bfloat16)
    w1, w2 = torch.zeros(16, 768), torch.zeros(768, 16)
    tokens, hidden = superpose.superpose_fwd(image, image, w1, w1[:, 0], w2, w2[:, 0], 16, 0.7, 0.3, torch.bfloat16)
    superpose.superpose_bwd(tokens, image, hidden, w1, w2, 16, 0.7, 0.3, True, True)
    same_as_launched("superpose", "P16-bf16-bf16", launches)


def test_the_cases_are_what_norm_insert_launches(launches):
    stream, product = torch.zeros(2, 5, 768), torch.zeros(2, 5, 768, dtype=torch.bfloat16)
    weight, prompts = torch.zeros(768), product[:, :2]
    _, normed, xhat, rstd = norm_insert.norm_insert_fwd(stream, product, prompts, weight, weight, 1e-6, product.dtype)
    norm_insert.norm_insert_bwd(stream, normed, xhat, rstd, weight, 5, stream.dtype, product.dtype)
    same_as_launched("norm_insert", "fp32-bf16-affine", launches)


def test_the_cases_are_what_gelu_launches(launches):
    pre = torch.zeros(4, 6, dtype=torch.bfloat16)
    gelu.gelu_bwd(gelu.gelu_fwd(pre), pre)
    gelu.gelu_bwd_code(*gelu.gelu_fwd_code(pre))
    same_as_launched("gelu", "bf16", launches)


def test_an_interpreting_process_refuses():
    child = subprocess.run(
        [sys.executable, "-m", "insvp_fast.aot"], env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 2 and "TRITON_INTERPRET" in child.stderr
