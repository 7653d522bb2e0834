"""Every Triton kernel compiled ahead of time for other machines: it fits, has no spills, and uses wide accesses."""

import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
from insvp_fast.kernels.gpu import activation, attention, chip, conv, conv_pool, gate, norm_insert, rotate, superpose

from tools import aot as compiler
from tools.aot import SHARED_LIMIT, cases, shortcomings
from tools.aot_cases import CHECKED, POINTERS

ROOT = Path(__file__).parents[2]
TARGETS = os.environ.get("AOT_TARGETS", "").split() or list(compiler.TARGETS)
hopper = pytest.mark.skipif("90" not in TARGETS, reason="90 is not compiled for")


@pytest.fixture(scope="module")
def aot(tmp_path_factory) -> list[dict]:
    """What the compiler reports for every kernel, in a child process: an interpreting process cannot compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # an old cache may be of another compiler
    command = [sys.executable, "-m", "tools.aot", *TARGETS]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def failing(facts, wrong):
    return [(fact["kernel"], fact["target"], fact) for fact in facts if wrong(fact)]


def test_every_kernel_compiles_for_every_target(aot):
    assert {(fact["target"], fact["kernel"]) for fact in aot} == {(t, case.name) for t in TARGETS for case in cases(t)}


def test_shared_memory_is_within_the_chips_limit(aot):
    assert not failing(aot, lambda fact: fact["shared"] > SHARED_LIMIT[fact["target"]])


def test_smaller_chips_of_ampere_and_ada_hold_all_but_attention(aot):
    """Which asks for the memory, since its backward pass takes more; they run what is compiled for 80."""
    others = [fact for fact in aot if fact["target"] == "80" and not fact["kernel"].startswith("attention")]
    assert not failing(others, lambda fact: fact["shared"] > 101376)


@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_says_whether_products_and_sums_are_fused(target):
    """Triton's default changes in 3.10, and 3.9 warns where it is relied on."""
    assert [case.name for case in cases(target) if "enable_fp_fusion" not in case.constants] == []


def test_matrix_units_are_used(aot):
    multiplying = "superpose", "attention", "conv_pool", "windows"
    found = [fact for fact in aot if fact["kernel"].startswith(multiplying) and "spread" not in fact["kernel"]]
    assert len(found) > 20 and not failing(found, lambda fact: not fact["matrix"])


def test_attention_was_not_compiled_to_a_stub(aot):
    found = [fact for fact in aot if fact["kernel"].startswith("attention")]
    assert found and all(fact["matrix"] >= 8 for fact in found)


@hopper
def test_attention_on_hopper_uses_wgmma(aot):
    """64 x 208 scores are 26 instructions of warp groups, where those of single warps would be hundreds."""
    found = [fact for fact in aot if fact["kernel"].startswith("attention") and fact["target"] == "90"]
    assert found and all(fact["wgmma"] == fact["matrix"] for fact in found), found


@hopper
def test_a_hopper_multiprocessor_has_two_programs_of_attention(aot):
    """One computes while the other loads: 4 warps, 64 K registers, 228 KB of shared memory with 1 KB per program."""
    fact = next(f for f in aot if f["target"] == "90" and f["kernel"] == "attention_fwd-H12-T197-S206-bf16")
    assert 2 * 4 * 32 * fact["registers"] <= 65536 and 2 * (fact["shared"] + 1024) <= 228 * 1024


def test_no_kernel_needs_much_local_memory(aot):
    """For any compiler: a thread may have at most 256 bytes of its own outside of registers."""
    assert not failing(aot, lambda fact: fact.get("stack", 4 * fact["spills"]) > 256)


def judge(facts, version):
    """Shortcomings are an error with a checked version of triton, which had none, and a warning with any other."""
    worse = [fact for fact in facts if fact["shortcomings"]]
    found = [f"{fact['kernel']} on {fact['target']}: {'; '.join(fact['shortcomings'])}" for fact in worse]
    if version in CHECKED:
        assert not found
    elif found:
        warnings.warn("\n".join([f"triton {version} was not checked", *found]), stacklevel=2)


def test_the_compiler_has_no_shortcomings(aot):
    judge(aot, triton.__version__)


GOOD = {"target": "90", "registers": 100, "spills": 0, "stack": 0, "shared": 0, "narrow": 0}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel": "attention_bwd", "spills": 93, "stack": 16}, ["93 spills, at most 0", "16 stack, at most 0"]),
        ({"kernel": "attention_bwd", "narrow": 9, "shared": 9, "registers": 255}, []),
        ({"kernel": "attention_bwd", "shared": 232449}, ["232449 shared, at most 232448"]),
        ({"kernel": "activation_fwd_code", "narrow": 1}, ["1 narrow, at most 0"]),
        ({"kernel": "activation_fwd_code", "target": "gfx942", "narrow": 1}, []),
        ({"kernel": "norm_insert_fwd", "narrow": 3}, ["3 narrow, at most 2"]),
        ({"kernel": "norm_insert_fwd", "narrow": 2, "shared": 1024}, ["1024 shared, at most 0"]),
        ({"kernel": "norm_insert_fwd", "target": "gfx942", "shared": 1024, "registers": 255}, []),
        ({"kernel": "norm_insert_bwd", "registers": 169}, ["169 registers, at most 168"]),
        ({"kernel": "superpose_fwd-P16-bf16-bf16", "registers": 129}, ["129 registers, at most 128"]),
    ],
)
def test_shortcomings_are_named_and_only_a_warning_with_an_unknown_triton(change, text):
    fact = GOOD | change
    assert shortcomings(fact) == text
    fact["shortcomings"] = text
    if not text:
        return judge([fact], CHECKED[0])
    with pytest.raises(AssertionError, match=text[0]):
        judge([fact], CHECKED[0])
    with pytest.warns(UserWarning, match=f"{fact['kernel']} on {fact['target']}: {text[0]}"):
        judge([fact], "99.0.0")
    return None


def test_attention_covers_what_is_compiled(monkeypatch):
    """And no more: as many keys and as wide heads as the largest case, in its dtypes, on every architecture."""
    monkeypatch.setattr(chip, "shared_memory", lambda device: float("inf"))
    for target in TARGETS:
        monkeypatch.setattr(chip, "arch", lambda device, arch=target: arch)
        seen = [case for case in cases(target, every_shape=True) if case.name.startswith("attention")]
        most, widest = (max(case.constants[name] for case in seen) for name in ("S", "d"))
        kinds = {case.signature["qkv_ptr"] for case in seen}
        for S, d, covered in [(1, 1, True), (most, widest, True), (most + 1, widest, False), (most, widest + 1, False)]:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                assert attention.covers("cuda", S, d, dtype) == (covered and POINTERS[dtype] in kinds)


class Recorder:
    """Takes the place of a kernel and records the grid and the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.arg_names, self.launches = kernel.arg_names, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


@pytest.fixture
def launches(monkeypatch):
    """The launches of all kernels, in their order; nothing is run."""
    monkeypatch.setattr(chip, "INTERPRETED", True)
    seen = []
    for module in (superpose, norm_insert, activation, gate, rotate, attention, conv, conv_pool):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    return seen


def assert_same_as_launched(prefix, label, launches):
    expected = [c for c in cases("90") if c.name.startswith(prefix) and c.name.endswith(label)]
    for case, (_, args, kwargs) in zip(expected, launches, strict=True):
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
    assert_same_as_launched("superpose", "P16-bf16-bf16", launches)


def test_the_cases_are_what_norm_insert_launches(launches):
    stream, product = torch.zeros(2, 5, 768), torch.zeros(2, 5, 768, dtype=torch.bfloat16)
    weight, prompts = torch.zeros(768), product[:, :2]
    _, normed, xhat, rstd = norm_insert.norm_insert_fwd(stream, product, prompts, weight, weight, 1e-6, product.dtype)
    norm_insert.norm_insert_bwd(stream, normed, xhat, rstd, weight, 5, stream.dtype, product.dtype)
    assert_same_as_launched("norm_insert", "fp32-bf16-affine", launches)


def test_the_cases_are_what_activation_launches(launches):
    pre = torch.zeros(4, 6, dtype=torch.bfloat16)
    activation.activation_bwd(activation.activation_fwd(pre, "gelu"), pre, "gelu")
    activation.activation_bwd_code(*activation.activation_fwd_code(pre, "gelu"))
    assert_same_as_launched("activation", "-gelu-bf16", launches)


def test_the_cases_are_what_gate_launches(launches):
    pre = torch.zeros(3, 2048, dtype=torch.bfloat16)
    gate.gate_bwd(gate.gate_fwd(pre, pre, "silu", 1e-6), pre, pre, "silu", 1e-6)
    assert_same_as_launched("gate", "silu-D2048-bf16", launches)


@pytest.mark.parametrize(("half", "label"), [(True, "half-fwd-d64-bf16"), (False, "pairs-bwd-d64-bf16")])
def test_the_cases_are_what_rotate_launches(half, label, launches):
    packed = torch.zeros(2, 5, 3 * 768, dtype=torch.bfloat16)
    rotate.rotate(packed, 12, torch.zeros(4, 128), 1, half=half, forward=half)
    assert_same_as_launched("rotate", label, launches)


def test_the_cases_are_what_attention_launches(launches):
    grad, qkv = (torch.zeros(16, rows, width, dtype=torch.bfloat16) for rows, width in ((197, 768), (206, 2304)))
    attention.attention_fwd(qkv, 12, 197, 0.125)
    attention.attention_bwd(grad, qkv, 12, 197, 0.125)
    assert_same_as_launched("attention", "H12-T197-S206-bf16", launches)
    # 192 heads for 2 x 132 places: two programs a head; backward needs one
    assert [grid for grid, _, _ in launches] == [(192, 2), (192,)]


def test_the_cases_are_what_conv_launches(launches):
    image, weight = torch.zeros(1, 3, 224, 224), torch.zeros(6, 3, 3, 3)
    hidden = conv.conv_fwd(image, weight, weight[:, 0, 0, 0], 5, (5, 5), 224, 224, True, torch.bfloat16)
    conv.conv_bwd(hidden, image, hidden, weight, 5, (5, 5), False)
    assert_same_as_launched("conv_", "C3-fp32-bf16", launches)


def test_the_cases_are_what_a_dense_conv_launches(launches):
    x, weight = torch.zeros(1, 6, 224, 224, dtype=torch.bfloat16), torch.zeros(3, 6, 25, 25)
    y = conv.conv_fwd(x, weight, weight[:, 0, 0, 0], 1, (12, 12), 224, 224, False, torch.bfloat16)
    conv.conv_bwd(y, x, None, weight, 1, (12, 12), True)
    assert_same_as_launched("windows", "C6-bf16-bf16", launches)


def test_the_cases_are_what_conv_pool_launches(launches):
    x, weight = torch.zeros(1, 9, 52, 52, dtype=torch.bfloat16), torch.zeros(27, 9, 9, 9)
    y, index = conv_pool.conv_pool_fwd(x, weight, weight[:, 0, 0, 0], (2, 2), 48, 48, 3, 0.01, torch.float32)
    conv_pool.conv_pool_bwd_weight(y, x, y, index, weight, (2, 2), 3, 0.01)
    conv_pool.conv_pool_bwd_map(y, x, y, index, weight, (2, 2), 3, 0.01)
    assert_same_as_launched("conv_pool", "C9-bf16", launches)


def test_an_interpreting_process_refuses(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(compiler.__file__, run_name="__main__")
    assert ended.value.code == 2 and "TRITON_INTERPRET" in capsys.readouterr().err
