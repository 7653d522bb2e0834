"""Every operator's traced results are the real ones: shapes, dtypes and strides, of every implementation there is here.

The operands are those that the public functions hand over, forward and backward, recorded on the way.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from insvp_fast import ops
from insvp_fast.ops import Blend, FrozenLinear, PatchWeights, registry
from insvp_fast.ops.gated_mlp import KEEP as GATED_KEEP
from insvp_fast.ops.mlp import KEEP
from insvp_fast.runtime import prepack

EITHER = (False, True)


def some(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def attention(dtype):
    for queries, keys in ((5, None), (3, torch.tensor([4, 5]))):
        yield ops.attention(some(2, 5, 24, dtype=dtype).requires_grad_(), 2, queries, 0.5, num_keys=keys)
    windows = torch.arange(4, dtype=torch.int32).view(2, 2)
    for added in (None, some(2, 2, 2)):
        qkv = some(2, 5, 24, dtype=dtype).requires_grad_()
        yield ops.window_attention(qkv, 2, windows, added, added, 0.5)
    for keys, added in ((None, None), (torch.tensor([4, 5]), None), (None, some(2, 3, 4))):
        layer, x = FrozenLinear(some(24, 6)), some(2, 5, 6, dtype=dtype).requires_grad_()
        yield ops.absorbed_attention(x, 3, layer, 2, 0.5, num_keys=keys, bias=added)


def norm_insert(dtype):
    for branch, prompts, affine, stream in itertools.product(EITHER, EITHER, EITHER, {dtype, torch.float32}):
        residual, added = some(2, 3, 8, dtype=stream).requires_grad_(), some(2, 3, 8, dtype=dtype).requires_grad_()
        inserted, scale = some(2, 2, 8, dtype=stream).requires_grad_(), some(8) if affine else None
        maps = residual, added if branch else None, inserted if prompts else None
        total, normed = ops.norm_insert(*maps, scale, scale, 1e-6, center=prompts, dtype=dtype)
        yield normed if affine else (total, normed)


def products(dtype):
    vector, square = some(8), FrozenLinear(some(8, 8), some(8), some(8), some(8))
    for layer in (square, FrozenLinear(some(8, 8)), square._replace(scale=vector, first=1, last=3)):
        yield ops.linear(some(2, 3, 8, dtype=dtype).requires_grad_(), layer)
    last = FrozenLinear(some(8, 8), vector, scale=vector)
    for keep in KEEP:
        x = some(2, 3, 8, dtype=dtype)
        ops.mlp(x, square, last)
        yield ops.mlp(x.requires_grad_(), square, last, keep=keep)
    for keep, value, eps in itertools.product(GATED_KEEP, (None, square), (None, 1e-6)):
        x = some(2, 3, 8, dtype=dtype)
        ops.gated_mlp(x, square, value, last, eps=eps)
        yield ops.gated_mlp(x.requires_grad_(), square, value, last, eps=eps, keep=keep)


def rotate(dtype):
    for rotation, half in itertools.product((some(3, 8), some(2, 3, 8, dtype=dtype)), EITHER):
        yield ops.rotate(some(2, 5, 24, dtype=dtype).requires_grad_(), 2, rotation, 1, half=half)


def images(dtype):
    weight, bias = some(2, 3, 3, 3).requires_grad_(), some(2).requires_grad_()
    for stored, need_x in itertools.product({dtype, torch.float32}, EITHER):
        x = some(2, 3, 8, 8, dtype=stored).requires_grad_(need_x)
        yield ops.conv(x, weight, bias, 2, 7, 8, relu=need_x, dtype=dtype)
        yield ops.conv_pool(x, weight, bias, 8, 8, 4, dtype=dtype, operands=torch.bfloat16 if need_x else None)
        yield ops.dropout(x if need_x else bias, 0.5)
        prompter = PatchWeights(*(w.requires_grad_() for w in (some(2, 48), some(2), some(48, 2), some(48))))
        prompt = some(2, 3, 8, 8, dtype=dtype).requires_grad_() if need_x else None
        kept = torch.rand(x.shape) < 0.5 if need_x else None
        yield ops.superpose(x, prompt, prompter, Blend(4, 0.7, 0.3), dtype=dtype, kept=kept)
    stored, scale = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), some(3)
    yield ops.superpose(stored, None, prompter, Blend(4, 0.7, 0.3), scale=scale, shift=scale, dtype=dtype)


class Recorded(TorchDispatchMode):
    """Notes the operators of this package and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "insvp_fast":
            self.calls.append((operator, list(args)))
        return operator(*args, **(kwargs or {}))


def recorded_calls(dtype):
    """The operators with their arguments, and once more for each implementation of theirs."""
    with Recorded() as recorded:
        for results in itertools.chain(*(make(dtype) for make in (attention, norm_insert, products, rotate, images))):
            differentiable = [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]
            torch.autograd.backward(differentiable, [torch.randn_like(x) for x in differentiable])
    assert {operator._opname for operator, _ in recorded.calls} == set(registry._operators)
    for operator, arguments in recorded.calls:
        at = [argument.name for argument in operator._schema.arguments].index("impl")
        for impl in ("auto", *registry._operators[operator._opname].table):
            if impl == "triton" and dtype != torch.bfloat16:  # the interpreter is slow
                continue
            yield operator, impl, [*arguments[:at], impl, *arguments[at + 1 :]]


def run(operator, arguments):
    """The results, or None if this implementation does not cover the arguments."""
    try:
        results = operator(*arguments)
    except RuntimeError as error:
        if 'impl="' not in str(error):
            raise
        return None
    return results if isinstance(results, tuple) else (results,)


def described(results):
    return [(x.dtype, x.device, tuple(x.shape), x.stride() if x.numel() else None) for x in results]


@pytest.mark.parametrize("dtype", [*registry.FLOATS, torch.float64], ids=str)
def test_traced_results_are_the_real_ones(dtype):
    tracing, wrong = FakeTensorMode(), set()
    for operator, impl, arguments in recorded_calls(dtype):
        if (real := run(operator, arguments)) is None:
            continue
        with tracing:
            fake = [tracing.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            traced = run(operator, fake)
        if described(traced) != described(real):
            wrong.add(f"{operator._opname}, {impl}: traced {described(traced)}, computed {described(real)}")
    assert not wrong


def test_autocast_changes_no_operator():
    """They compute in the dtypes of their operands, and keep no weight that was packed in another."""
    different = set()
    for operator, impl, arguments in recorded_calls(torch.float32):

        def computed(operator=operator, arguments=arguments):
            torch.manual_seed(0)
            return run(operator, arguments)

        prepack.clear()
        if (expected := computed()) is None:
            continue
        prepack.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = computed()
        if not all(map(same_bits, found, expected)) or not all(map(same_bits, computed(), expected)):
            different.add(f"{operator._opname}, {impl}")
    assert not different


def same_bits(x, y):
    return x.dtype == y.dtype and torch.equal(x, y)


def few_queries(dtype):
    q, kv = some(2, 3, 8, dtype=dtype).requires_grad_(), some(2, 5, 16, dtype=dtype).requires_grad_()
    yield ops.query_attention(q, kv, 2, 0.5)
    common, specific = some(3, 8).requires_grad_(), some(2, 3, 8, dtype=dtype).requires_grad_()
    yield ops.blend_prompts([common, common], specific, 0.5, 0.5, 2)


@pytest.mark.parametrize("make", [attention, norm_insert, products, rotate, images, few_queries])
def test_autocast_changes_no_function(make):
    """Forward and backward; none gives another number or dtype, or fails."""

    def computed():
        torch.manual_seed(0)
        for results in make(torch.float32):
            results = results if isinstance(results, tuple) else (results,)
            differentiable = [x for x in results if x.requires_grad]
            torch.autograd.backward(differentiable, [torch.ones_like(x) for x in differentiable])
            yield from results

    prepack.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = [*computed()]
    expected = [*computed()]
    assert len(found) == len(expected) and all(map(same_bits, found, expected))


def test_what_packs_weights_is_left_out_of_graphs_of_compiled_code(monkeypatch):
    """Which would not look at the weights again, and would hold what is packed in memory of their own."""
    packing, packers = [], set()

    def packed(*arguments, **options):
        packing.append(True)
        return prepack.packed(*arguments, **options)

    monkeypatch.setattr("insvp_fast.runtime.products.packed", packed)
    for operator, _, arguments in recorded_calls(torch.float32):
        packing.clear()
        run(operator, arguments)
        packers |= {operator} if packing else set()
    operators = {getattr(torch.ops.insvp_fast, name).default for name in registry._operators}
    assert packers == {operator for operator in operators if registry.PACKS in operator.tags} != set()
