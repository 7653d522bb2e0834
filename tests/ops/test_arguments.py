"""Wrong arguments are refused before any work, in the same words whatever would carry the operation out."""

import functools
import importlib
import inspect

import pytest
import torch

from insvp_fast import ops
from insvp_fast.ops import Blend, FrozenLinear, PatchWeights
from insvp_fast.testing import relative_error

B, T, D = 2, 5, 24
X = torch.randn(B, T, D)
WEIGHT = torch.randn(48, D)
PATCH = PatchWeights(torch.randn(4, 48), torch.randn(4), torch.randn(48, 4), torch.randn(48))

CASES = {
    "attention: dimensions": (
        lambda: ops.attention(X[0], 2, 3, 0.5),
        r"shape \(5, 24\): expected \[B, S, 3\*D\]",
    ),
    "attention: heads": (lambda: ops.attention(X, 5, 3, 0.5), "with D in 5 equal heads"),
    "query_attention: widths": (lambda: ops.query_attention(X, X, 2, 0.5), r"expected \[B, T, D\] and \[B, S, 2\*D\]"),
    "query_attention: batches": (lambda: ops.query_attention(X[:1], X.repeat(1, 1, 2), 2, 0.5), "q and kv have shapes"),
    "norm_insert: dimensions": (lambda: norm_insert(X[0]), r"residual has shape \(5, 24\): expected \[B, T, D\]"),
    "norm_insert: branch": (lambda: norm_insert(X, branch=X[:1]), r"branch has shape \(1, 5, 24\): expected that of"),
    "norm_insert: prompts": (
        lambda: norm_insert(X, prompts=X[:1]),
        r"shape \(1, 5, 24\): expected \[2, L",
    ),
    "norm_insert: bias": (
        lambda: norm_insert(X, bias=X[0, 0]),
        r"bias has shape \(24,\): expected None, as no weight was given",
    ),
    "norm_insert: weight": (lambda: norm_insert(X, weight=X[0, 0, :5]), r"weight has shape \(5,\): expected \(24,\)"),
    "linear: width": (
        lambda: ops.linear(X[..., :5], FrozenLinear(WEIGHT)),
        r"expected \[D_out, 5\]",
    ),
    "linear: one row": (lambda: ops.linear(X[..., :1], FrozenLinear(X[0, 0])), r"expected \[D_out, 1\]"),
    "linear: bias": (lambda: ops.linear(X, FrozenLinear(WEIGHT, X[0, 0])), r"bias has shape \(24,\): expected \(48,\)"),
    "linear: gain": (
        lambda: ops.linear(X, FrozenLinear(WEIGHT, gain=WEIGHT[:, 0])),
        r"gain has shape \(48,\)",
    ),
    "linear: scale": (lambda: ops.linear(X, FrozenLinear(WEIGHT, scale=X[0, 0])), r"scale has shape \(24,\)"),
    "mlp: scale of the first layer": (
        lambda: ops.mlp(X, FrozenLinear(WEIGHT, scale=WEIGHT[:, 0]), FrozenLinear(WEIGHT.T)),
        "fc1 has a scale: expected none",
    ),
    "mlp: gain of the second layer": (
        lambda: ops.mlp(X, FrozenLinear(WEIGHT), FrozenLinear(WEIGHT.T, gain=WEIGHT[:, 0])),
        "fc2 has a gain or shift: expected none",
    ),
    "mlp: a range of the first layer": (
        lambda: ops.mlp(X, FrozenLinear(WEIGHT, last=24), FrozenLinear(WEIGHT[:24].T)),
        "fc1 has the outputs 0 to 24: expected all",
    ),
    "mlp: a range of the second layer": (
        lambda: ops.mlp(X, FrozenLinear(WEIGHT), FrozenLinear(WEIGHT.T, first=3)),
        "fc2 has the outputs 3 to 24: expected all",
    ),
    "gated_mlp: a range of the second layer": (
        lambda: ops.gated_mlp(X, FrozenLinear(WEIGHT), None, FrozenLinear(WEIGHT.T, last=3)),
        "fc2 has the outputs 0 to 3: expected all",
    ),
    "gated_mlp: scale of the gate": (
        lambda: ops.gated_mlp(X, FrozenLinear(WEIGHT, scale=WEIGHT[:, 0]), None, FrozenLinear(WEIGHT.T)),
        "gate has a scale: expected none",
    ),
    "gated_mlp: scale of the value": (
        lambda: ops.gated_mlp(
            X, FrozenLinear(WEIGHT), FrozenLinear(WEIGHT, scale=WEIGHT[:, 0]), FrozenLinear(WEIGHT.T)
        ),
        "value has a scale: expected none",
    ),
    "gated_mlp: shift of the value": (
        lambda: ops.gated_mlp(
            X, FrozenLinear(WEIGHT, shift=X[0, 0]), FrozenLinear(WEIGHT, shift=X[0, 1]), FrozenLinear(WEIGHT.T)
        ),
        "gate and value have a gain or shift of their own",
    ),
    "linear: range": (lambda: ops.linear(X, FrozenLinear(WEIGHT, first=9, last=5)), "outputs 9 to 5: expected a range"),
    "linear: end of the range": (lambda: ops.linear(X, FrozenLinear(WEIGHT, last=49)), "outputs 0 to 49: expected"),
    "project_q_kv: range": (
        lambda: ops.project_q_kv(X, 1, FrozenLinear(torch.randn(3 * D, D), first=D)),
        "48 outputs: expected",
    ),
    "project_q_kv: the first outputs": (
        lambda: ops.project_q_kv(X, 1, FrozenLinear(torch.randn(4 * D, D), last=3 * D)),
        "layer has the outputs 0 to 72: expected all",
    ),
    "absorbed_attention: the first outputs": (
        lambda: ops.absorbed_attention(X, 1, FrozenLinear(torch.randn(4 * D, D), last=3 * D), 2, 0.5),
        "layer has the outputs 0 to 72: expected all",
    ),
    "project_q_kv: outputs": (
        lambda: ops.project_q_kv(X, 1, FrozenLinear(WEIGHT)),
        r"48 outputs: expected",
    ),
    "project_q_kv: queries": (lambda: ops.project_q_kv(X, 6, FrozenLinear(torch.randn(72, D))), "num_queries=6"),
    "mlp: second layer": (lambda: ops.mlp(X, FrozenLinear(WEIGHT), FrozenLinear(WEIGHT)), r"expected \[D_out, 48\]"),
    **{
        f"conv: dilation {dilation}": (
            functools.partial(ops.conv, torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3), X[0, 0, :1], dilation, 8, 8),
            f"dilation={dilation}: expected an integer from 1 on",
        )
        for dilation in (0, -2, 1.5, 2**62)
    },
    "conv: dimensions": (lambda: ops.conv(X[0], X[0], X[0, 0], 1, 1, 1), r"expected \[B, C, H, W\]"),
    "dropout: all": (lambda: ops.dropout(X, 1.0), "p=1.0: expected a probability above 0 and below 1"),
    "dropout: none": (lambda: ops.dropout(X, 0), "p=0: expected"),
    **{
        f"superpose: patches of {size}": (
            functools.partial(ops.superpose, torch.randn(2, 3, 8, 8), None, PATCH, Blend(size, 0.7, 0.3)),
            f"patch_size={size}: expected at least 1",
        )
        for size in (0, -4)
    },
    "norm_insert: eps": (lambda: ops.norm_insert(X, None, None, None, None, -1e-6), "eps=-1e-06: expected at least 0"),
    "blend_prompts: none": (lambda: ops.blend_prompts([], X, 0.5, 0.5, B), "common is empty"),
    "blend_prompts: batch": (lambda: ops.blend_prompts([X[0]], X, 0.5, 0.5, 3), r"specific has shape \(2, 5, 24\)"),
    "blend_prompts: one image": (lambda: ops.blend_prompts([X[0]], X[:1], 0.5, 0.5, 2), r"expected \(2, 5, 24\)"),
    "blend_prompts: lengths": (lambda: ops.blend_prompts([X[0], X[0, 1:]], X, 0.5, 0.5, 2), "common has shapes"),
    "blend_prompts: negative batch": (lambda: ops.blend_prompts([X[0]], None, 0.5, 0.5, -1), "batch=-1: expected"),
    "superpose: dimensions": (
        lambda: ops.superpose(X, None, PATCH, Blend(4, 0.7, 0.3)),
        "image has shape",
    ),
}


LAYER = FrozenLinear(WEIGHT, WEIGHT[:, 0].clone(), X[0, 0].clone(), X[0, 1].clone(), WEIGHT[:, 1].clone())
BACK = FrozenLinear(WEIGHT.T.contiguous(), X[0, 0].clone())
QKV = torch.randn(B, T, 3 * D)
# queries and keys of size 1, so that rounding scores to 16 bits does not decide which token has the largest one
QKV_LAYER = FrozenLinear(torch.randn(3 * D, D) / D**0.5)
IMAGE, KERNEL = torch.randn(B, 3, 8, 8), torch.randn(4, 3, 3, 3)
INDICES, SCORES = torch.arange(4, dtype=torch.int32).view(2, 2), torch.randn(2, 2, 2)
RIGHT = {  # arguments of every operation
    "absorbed_attention": {"x": X, "num_queries": 1, "layer": QKV_LAYER, "num_heads": 2, "scale": 0.5},
    "attention": {"qkv": QKV, "num_heads": 2, "num_queries": 3, "scale": 0.5, "num_keys": torch.tensor([3, 5])},
    "blend_prompts": {"common": [X[0]] * 2, "specific": X, "w_c": 0.5, "w_s": 0.5, "batch": B},
    "conv": {"x": IMAGE, "weight": KERNEL, "bias": KERNEL[:, 0, 0, 0], "dilation": 1, "height": 8, "width": 8},
    "conv_pool": {"x": IMAGE, "weight": KERNEL, "bias": KERNEL[:, 0, 0, 0], "height": 8, "width": 8, "pool": 2},
    "dropout": {"x": X, "p": 0.5},
    "gated_mlp": {"x": X, "gate": FrozenLinear(WEIGHT), "value": FrozenLinear(WEIGHT), "fc2": BACK, "eps": None},
    "linear": {"x": X, "layer": LAYER},
    "mlp": {"x": X, "fc1": LAYER._replace(scale=None), "fc2": BACK},
    "norm_insert": {"residual": X, "branch": X, "prompts": X, "weight": X[0, 0], "bias": X[0, 0], "eps": 1e-6},
    "project_q_kv": {"x": X, "num_queries": 1, "layer": QKV_LAYER},
    "query_attention": {"q": X[:, :1], "kv": QKV[..., D:], "num_heads": 2, "scale": 0.5},
    "rotate": {"packed": QKV, "num_heads": 2, "rotation": torch.randn(4, D), "first": 1},
    "superpose": {"image": IMAGE, "global_prompt": IMAGE, "weights": PATCH, "blend": Blend(4, 0.7, 0.3)},
    "window_attention": {
        "qkv": QKV, "num_heads": 2, "windows": INDICES, "bias": SCORES, "mask": SCORES, "scale": 0.5
    },
}  # fmt: skip


def with_one_changed(value, change):
    """The values in which one tensor is changed, which may be a part of this one."""
    if isinstance(value, torch.Tensor):
        yield change(value)
    elif isinstance(value, (list, FrozenLinear, PatchWeights)):
        for at, part in enumerate(value):
            for other in with_one_changed(part, change):
                parts = [*value[:at], other, *value[at + 1 :]]
                yield parts if isinstance(value, list) else type(value)(*parts)


def calls_with_one_changed(name, change):
    for argument, value in RIGHT[name].items():
        for other in with_one_changed(value, change):
            yield functools.partial(getattr(ops, name), **RIGHT[name] | {argument: other}), argument


@pytest.mark.parametrize("name", RIGHT)
def test_every_operation_traces_whole(name):
    operation, found = getattr(ops, name), []
    for run in (operation, torch.compile(operation, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        found.append(run(**RIGHT[name]))
    torch.testing.assert_close(*found)


def test_there_are_right_arguments_for_every_operation():
    assert {*RIGHT} == {name for name in ops.__all__ if name.islower()}


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_tensors_of_other_dtypes_are_refused(name, dtype):
    calls = [*calls_with_one_changed(name, lambda x: x.to(dtype))]
    assert calls
    for call, argument in calls:
        with pytest.raises(ValueError, match=rf" is {dtype}.*: expected"):
            print(name, argument, call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_one_tensor_of_another_floating_dtype_is_computed_or_refused(name, dtype):
    for call, _ in calls_with_one_changed(name, lambda x: x.to(dtype) if x.is_floating_point() else x):
        if name == "query_attention":
            with pytest.raises(ValueError, match=r"kv is torch.*: expected torch.*, as q is"):
                call()
            continue
        torch.manual_seed(0)
        found = call()
        torch.manual_seed(0)
        for result, expected in zip(found, getattr(ops, name)(**RIGHT[name]), strict=True):
            assert relative_error(result, expected) < 5 * 2**-8  # five roundings to bfloat16, one behind the other


@pytest.mark.parametrize("name", [name for name in RIGHT if name != "dropout"])
def test_tensors_on_several_devices_are_refused(name):
    for call, argument in calls_with_one_changed(name, lambda x: x.to("meta")):
        with pytest.raises(ValueError, match=r" is .*on (cpu|meta).*: expected"):
            print(name, argument, call())


@pytest.mark.parametrize("dimensions", [0, 7])
@pytest.mark.parametrize("name", [name for name in RIGHT if name != "dropout"])
def test_tensors_of_other_dimensions_are_refused(name, dimensions):
    for call, argument in calls_with_one_changed(name, lambda x: x.flatten()[0].expand([1] * dimensions)):
        if (name, argument, dimensions) not in (("linear", "x", 7), ("mlp", "x", 7), ("gated_mlp", "x", 7)):
            with pytest.raises(ValueError, match=r"expected"):
                print(name, argument, call())


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float32"], ids=str)
@pytest.mark.parametrize("name", ["conv", "conv_pool", "norm_insert", "superpose"])
def test_other_dtypes_of_results_are_refused(name, dtype):
    with pytest.raises(ValueError, match=f"dtype is {dtype}: expected torch.float32, "):
        getattr(ops, name)(**RIGHT[name], dtype=dtype)


@pytest.mark.parametrize("number", [0, -1, -2])
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, "num_heads") for name in RIGHT if "num_heads" in RIGHT[name]]
    + [(name, size) for name in ("conv", "conv_pool") for size in ("height", "width")]
    + [("conv_pool", "pool")],
)
def test_sizes_below_one_are_refused(name, argument, number):
    with pytest.raises(ValueError, match=str(number)):
        getattr(ops, name)(**RIGHT[name] | {argument: number})


WITH_IMPL = [name for name in RIGHT if "impl" in inspect.signature(getattr(ops, name)).parameters]


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("name", WITH_IMPL)
def test_what_an_implementation_takes_forward_it_takes_backward(name, impl):
    """Or a step would end in its middle; the other operands are in fp32."""
    for call, _ in calls_with_one_changed(name, lambda x: x.double().requires_grad_()):
        try:
            results = call(impl=impl)
        except (RuntimeError, ValueError):
            continue
        results = results if isinstance(results, tuple) else (results,)
        sum(result.double().sum() for result in results if result.requires_grad).backward()


def norm_insert(residual, branch=None, prompts=None, weight=None, bias=None):
    return ops.norm_insert(residual, branch, prompts, weight, bias, 1e-6)


@pytest.mark.parametrize(("call", "message"), CASES.values(), ids=CASES)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in RIGHT for argument, value in RIGHT[name].items() if isinstance(value, FrozenLinear)],
)
def test_layers_of_another_class_are_refused(name, argument):
    with pytest.raises(TypeError, match="a layer is Linear: expected ops.FrozenLinear"):
        getattr(ops, name)(**RIGHT[name] | {argument: torch.nn.Linear(D, D)})


@pytest.mark.parametrize("impl", [impl for impl in ops.ATTENTION if impl not in ("triton", "xformers")])
def test_every_implementation_of_attention_refuses_too_many_queries(impl):
    with pytest.raises(ValueError, match="num_queries=9: expected 0 to 5"):
        ops.attention(X, 2, 9, 0.5, impl=impl)


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name.islower()])
def test_the_advice_of_an_operation_exists(name):
    """What has second derivatives, in the words of the error where a gradient is differentiated."""
    module = importlib.import_module(inspect.getmodule(getattr(ops, name)).__name__)
    advice = [value.refusal for value in vars(module).values() if hasattr(value, "refusal")]
    assert advice
    for text in advice:
        formula, _, place = text.rpartition("or ")[2].partition(" of the module ")
        owner = importlib.import_module(place) if place else torch.nn.functional
        assert all(hasattr(owner, part.rpartition(".")[2]) for part in formula.split(" and "))
