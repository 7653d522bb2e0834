"""Native calls that are recorded once and run again on other memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from insvp_fast import ops
from insvp_fast.ops import FrozenLinear
from insvp_fast.ops.programs import Programs
from insvp_fast.runtime import buffers, native, products, recording
from insvp_fast.runtime.programs import Recorder

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(
        products.cpu_provider(torch.float32) != "native", reason="nothing is recorded where PyTorch multiplies"
    ),
]


def layer_of(seed, *size):
    return FrozenLinear(torch.randn(*size, generator=torch.Generator().manual_seed(seed)))


FIRST, SECOND, THIRD = layer_of(1, 5, 3), layer_of(2, 4, 5), layer_of(3, 4, 5)


def two_products(x):
    return [ops.linear(ops.linear(x, FIRST), SECOND)]


def run(kept, x, compute=two_products, key="key"):
    (y,) = kept.run(key, [x], lambda inputs: compute(*inputs))
    assert torch.equal(y, compute(x)[0])
    return [*kept._programs.values()]


@torch.no_grad()
def test_inputs_of_another_layout_are_another_program():
    wide, kept = torch.randn(2, 4, 6), Programs()
    views = [wide[..., :3], wide[..., 3:], wide[:1, :, :3], wide[..., :3].contiguous()]
    for count, x in enumerate(views, 1):
        for same in (x, x.clone() if x.is_contiguous() else x):
            assert len(run(kept, same)) == count
    assert all(kept._programs.values())


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("write", [torch.Tensor.copy_, lambda to, x: to.add_(x), lambda to, x: to[:1].copy_(x[:1])])
def test_what_pytorch_writes_into_memory_of_native_calls_is_in_no_program(write, last, gradients):
    def compute(x):
        product = ops.linear(x, FIRST)
        write(product, product.detach().flip(0))
        return [product] if last else [ops.linear(product, SECOND)]

    kept = Programs()
    for seed in range(4):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_(gradients)
        (found,), (expected,) = kept.run("key", [x], lambda inputs: compute(*inputs)), compute(x)
        assert torch.equal(found, expected)
        if gradients:
            assert_equal(torch.autograd.grad(found.sum(), [x]), torch.autograd.grad(expected.sum(), [x]))
        assert [*kept._programs.values()] == [None]


@torch.no_grad()
def test_a_program_takes_the_calls_of_those_inside():
    inner, outer, layer = Programs(), Programs(), FrozenLinear(torch.eye(4))

    def nested(x):
        return inner.run("inside", two_products(x), lambda inputs: [ops.linear(inputs[0], layer)])

    for seed in range(3):
        (program,) = run(outer, torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)), nested)
        assert len(program.steps) == 3


@torch.no_grad()
def test_inputs_that_share_memory_are_read_where_they_are():
    kept, layer = Programs(), FrozenLinear(torch.eye(3))
    for seed in range(3):
        both = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed))
        apart = [x.clone() for x in both]
        for inputs in ([both[0], both[1]], [both[1], both[0]], apart, [both[0], both[0]]):

            def compute(inputs):
                a, b = (ops.linear(x, layer) for x in inputs)
                return ops.norm_insert(a[None], b[None], None, None, None, 0.0)

            found = kept.run("key", inputs, compute)
            assert torch.equal(found[0][0], inputs[0] + inputs[1])
    assert len(kept._programs) == 4 and all(kept._programs.values())


def reads_a_result(x):
    y = ops.linear(x, FIRST)
    native.interrupt()
    return [ops.linear(y, SECOND if y[0, 0] > 0 else THIRD)]


OTHERS = torch.ones(2, 5)


def multiplies_by_onednn(x):
    y = products.linear(x, FIRST, "onednn") if products.onednn_works(torch.float32) else x[:, :1] * OTHERS
    return [ops.linear(y, SECOND)]


NOT_RECORDED = {
    "a product of oneDNN": multiplies_by_onednn,
    "a result of PyTorch": lambda x: [ops.linear(ops.linear(x, FIRST) * 2, SECOND)],
    "a tensor of somewhere else": lambda x: [ops.linear(OTHERS, SECOND)],
    "a weight packed by hand": lambda x: [native.linear(x, native.pack_linear(FIRST.weight), None, 5)],
    "an operation by PyTorch": lambda x: [ops.linear(ops.linear(x, FIRST), SECOND, impl="reference")],
    "a copy": lambda x: [ops.linear(ops.linear(x, FIRST).T, layer_of(3, 2, 2))],
    "a look at results": reads_a_result,
    "an output of PyTorch": lambda x: [ops.linear(x, FIRST) + 1],
    "an output that is given": lambda x: [x],
    "a part of an output": lambda x: [ops.linear(x, FIRST)[:1]],
}


@pytest.mark.parametrize("compute", NOT_RECORDED.values(), ids=NOT_RECORDED)
@torch.no_grad()
def test_what_else_than_native_calls_computes_is_no_program(compute):
    kept = Programs()
    for seed in range(3):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert run(kept, x, compute) == [None]


def test_memory_at_the_address_of_what_is_gone_is_not_taken_for_it():
    """A tensor of PyTorch where a result was whose memory is free: its address says nothing."""
    recorder = Recorder([])
    y = buffers.empty((2, 3), torch.float32)
    recorder.new(y)
    recorder.hold(y)
    assert recorder._pointers[y.data_ptr()] == (0, 0)
    foreign = torch.frombuffer(memoryview(y.numpy()), dtype=torch.float32)  # another storage, the same address
    recorder.hold(foreign)
    assert foreign.data_ptr() == y.data_ptr() and recorder._pointers[y.data_ptr()] is None


def test_new_memory_is_a_piece_as_long_as_it_lives():
    recorder = Recorder([])
    first, second = (torch.empty(5) for _ in range(2))
    recorder.new(first)
    recorder.new(second)
    del first
    recorder.new(third := torch.empty(5))
    recorder.new(other := torch.empty(6))
    pieces = [recorder.find(x.untyped_storage()) for x in (second, third, other)]
    assert pieces == [1, 0, 2] and recorder.sizes == [20, 20, 24]


@torch.no_grad()
def test_what_the_dispatcher_has_more_to_do_for_is_no_program():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    kept, x = Programs(), torch.randn(2, 3)
    with Mode():
        assert not run(kept, x)
    assert all(run(kept, x))


@torch.no_grad()
def test_an_error_leaves_no_program():
    kept, x = Programs(), torch.randn(2, 3)

    def fail(inputs):
        ops.linear(*inputs, FIRST)
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            kept.run("key", [x], fail)
    assert not kept._programs and recording.current() is None
    assert all(run(kept, x))


def assert_equal(found, expected):
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(found, expected, strict=True))


def test_gradients_may_have_any_layout_and_share_memory():
    kept, square = Programs(), layer_of(4, 3, 3)

    def compute(inputs):
        residual, branch = inputs
        residual, y = ops.norm_insert(residual, ops.linear(branch, square), None, None, None, 1e-6)
        return [residual, ops.linear(y, square)]

    losses = [
        lambda x, y: (x + y).sum(),
        lambda x, y: (x * y).sum(),
        lambda x, y: (x.mT + y.mT).square().sum(),
        lambda x, y: y[:, 1:].sum(),
    ]
    for loss in 2 * losses:
        inputs = [torch.randn(2, 4, 3, requires_grad=True) for _ in range(2)]
        found = torch.autograd.grad(loss(*kept.run("key", inputs, compute)), inputs)
        expected = torch.autograd.grad(loss(*compute(inputs)), inputs)
        torch.testing.assert_close(found, expected)
    assert [type(program).__name__ for program in kept._programs.values()] == ["_Pair"]


@pytest.mark.parametrize("lazy", [lambda x: torch._efficientzerotensor(x.shape), lambda x: torch._neg_view(x)])
def test_gradients_that_are_not_plain_memory(lazy):
    kept, x = Programs(), torch.randn(2, 3, requires_grad=True)
    for _ in range(3):
        (y,) = kept.run("key", [x], lambda inputs: two_products(*inputs))
        grad = lazy(torch.randn(2, 4))
        (expected,) = torch.autograd.grad(two_products(x)[0], [x], grad.clone().resolve_neg())
        assert_equal(torch.autograd.grad(y, [x], grad), [expected])
    assert all(kept._programs.values())


def test_which_inputs_have_gradients_decides_over_the_program():
    kept = Programs()
    for needs in (False, True, True, False, True):
        x = torch.randn(2, 3, requires_grad=needs)
        (y,) = kept.run("key", [x], lambda inputs: two_products(*inputs))
        (expected,) = two_products(x)
        assert torch.equal(y, expected) and y.requires_grad == needs
        if needs:
            assert_equal(torch.autograd.grad(y.sum(), [x]), torch.autograd.grad(expected.sum(), [x]))
    assert len(kept._programs) == 2 and all(kept._programs.values())


class Twice(torch.autograd.Function):
    """Writes what a native call has computed, and does not say so."""

    @staticmethod
    def forward(ctx, x):
        return ops.linear(x, THIRD)

    @staticmethod
    def backward(ctx, grad):
        return products.linear_bwd(grad, THIRD, "native").mul_(2)


def test_a_program_that_does_not_agree_with_what_was_recorded_is_dropped():
    kept = Programs()
    for _ in range(3):
        x = torch.randn(2, 5, requires_grad=True)
        (y,) = kept.run("key", [x], lambda inputs: [Twice.apply(*inputs)])
        assert_equal(torch.autograd.grad(y.sum(), [x]), [torch.ones(2, 4) @ (2 * THIRD.weight)])
    assert [*kept._programs.values()] == [None]


def test_gradients_that_pytorch_adds_make_no_program():
    """Here those of what is used twice, perhaps in memory that native calls write."""
    kept, square = Programs(), layer_of(4, 3, 3)

    def twice(x):
        y = ops.linear(x, square)
        return [ops.linear(y, square), ops.linear(y, square)]

    for _ in range(3):
        x = torch.randn(2, 3, requires_grad=True)
        first, second = kept.run("key", [x], lambda inputs: twice(*inputs))
        (found,) = torch.autograd.grad((first + 2 * second).sum(), [x])
        (expected,) = torch.autograd.grad((twice(x)[0] + 2 * twice(x)[1]).sum(), [x])
        torch.testing.assert_close(found, expected)
    assert not any(kept._programs.values())


@torch.no_grad()
def test_what_a_mode_inside_has_seen_is_no_program():
    seen = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    def compute(x):
        with Notes():
            return two_products(x)

    kept = Programs()
    for seed in range(3):
        x, before = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)), len(seen)
        kept.run("key", [x], lambda inputs: compute(*inputs))
        assert len(seen) > before
        assert [*kept._programs.values()] == [None]
