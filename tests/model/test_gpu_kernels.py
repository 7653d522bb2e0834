"""Whole models by the kernels for GPUs, interpreted: what a test of one kernel does not see is how they are called."""

import pytest
import torch

from insvp_fast import InsVPConfig
from insvp_fast.ops import registry
from insvp_fast.testing import make_pair
from tests.model.parity import assert_equal_numbers

TINY = {"img_size": 28, "embed_dim": 48, "num_heads": 3, "depth": 2}
MODELS = {
    "vit_tiny_patch16_224": (TINY | {"img_size": 32}, {"mlp"}),
    "eva02_base_patch14_224": (TINY, {"gated_mlp", "rotate"}),
    "vit_giant_patch14_dinov2": (TINY, {"gated_mlp"}),
    "vit_small_patch16_dinov3": (TINY | {"img_size": 32}, {"mlp", "rotate"}),
}


@pytest.fixture
def called(monkeypatch):
    """The operators that a Triton kernel has computed, which is asked for wherever there is one.

    But for the convolutions, which take the interpreter longer than all else, and are the same in all models.
    """
    chip = pytest.importorskip("insvp_fast.kernels.gpu.chip")
    if not chip.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    names = set()

    def noted(name, run):
        return lambda operands: (names.add(name), run(operands))[1]

    for name, operator in registry._operators.items():
        if (kernel := operator.table.get("triton")) and not name.startswith("conv"):
            monkeypatch.setitem(operator.table, "triton", kernel._replace(run=noted(name, kernel.run)))
            monkeypatch.setitem(registry._operators, name, operator._replace(auto=lambda operands: ["triton"]))
    return names


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_numbers_of_the_reference(name, called):
    sizes, own = MODELS[name]
    reference, fast = make_pair(name, InsVPConfig(prompt_length=3, global_dropout=0), **sizes)
    assert_equal_numbers(reference, fast, torch.randn(2, 3, sizes["img_size"], sizes["img_size"]))
    operations = {"norm_insert", "superpose", *own}  # attention's kernels are for 16 bits
    assert called == {f"{operation}_{way}" for operation in operations for way in ("fwd", "bwd")}
