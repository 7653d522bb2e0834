"""Native calls that wait for one another."""

from __future__ import annotations

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from timm.models.vitamin import GeGluMlp
from torch.utils._python_dispatch import TorchDispatchMode

from insvp_fast import InsVPConfig, InsVPViT, ops, prompted, unsupported_reason
from insvp_fast.methods import MethodViT
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import PromptMethod, Prompts
from insvp_fast.runtime import native
from insvp_fast.testing import make_pair

pytestmark = pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))


def product(x, layer=None):
    w = torch.arange(15.0).view(5, 3) if layer is None else layer
    return native.linear(x, native.pack_linear(w), None, 5)


def test_calls_wait_for_the_end_and_run_in_order(unwritten):
    x = torch.ones(2, 3)

    def prepare():
        y = product(x)
        z = native.linear(y, native.pack_linear(torch.eye(5)), None, 5)
        assert y.isnan().all() and z.isnan().all()
        return y, z

    y, z = native.together(prepare)
    assert torch.equal(y, x @ torch.arange(15.0).view(5, 3).T) and torch.equal(z, y)


def test_finish_runs_what_waits(unwritten):
    def prepare():
        y = product(torch.ones(2, 3))
        native.finish()
        assert y.isfinite().all()
        assert product(torch.ones(2, 3)).isnan().all()

    native.together(prepare)


def test_what_waits_is_dropped_after_an_error(unwritten):
    made = []

    def prepare():
        made.append(product(torch.ones(2, 3)))
        raise KeyError

    with contextlib.suppress(KeyError):
        native.together(prepare)
    assert made[0].isnan().all() and not native.are_together()
    assert product(torch.ones(2, 3)).isfinite().all()


def test_memory_is_kept_until_it_is_read():
    x, weight = torch.ones(2, 3), native.pack_linear(torch.eye(3))
    alive = weakref.ref(x.untyped_storage())

    def prepare():
        nonlocal x
        y = native.linear(x, weight, None, 3)
        del x
        gc.collect()
        assert alive() is not None
        return y

    y = native.together(prepare)
    assert alive() is None and y.tolist() == [[1.0] * 3] * 2


def test_memory_of_a_call_is_kept_though_its_operand_is_copied():
    """The copy runs what waits, and lets go of the memory of that, but not of this call's."""
    tokens, windows = torch.randn(1, 9, 4), torch.arange(4, dtype=torch.int32).view(1, 4)
    bias, qkv = torch.randn(1, 4, 4), torch.randn(1, 12, 4).mT
    expected = native.window_attention_fwd(qkv, 1, native.Windows(windows, bias, None), 0.5)

    def prepare():
        native.linear(tokens, native.pack_linear(torch.eye(4)), None, 4)
        found = native.window_attention_fwd(qkv, 1, native.Windows(windows, copy := bias.clone(), None), 0.5)
        alive = weakref.ref(copy.untyped_storage())
        del copy
        assert alive() is not None
        return found

    assert torch.equal(native.together(prepare), expected)


def test_a_copy_is_made_of_what_has_been_written():
    x, rows = torch.ones(2, 3), native.pack_linear(torch.eye(2))
    y = native.together(lambda: native.linear(product(x).T, rows, None, 2))  # of rows that stand in columns, so copied
    assert torch.equal(y, product(x).T)


def test_threads_do_not_wait_for_one_another(unwritten):
    def prepare():
        mine = product(torch.ones(2, 3))
        with ThreadPoolExecutor(1) as other:
            assert other.submit(product, torch.ones(2, 3)).result().isfinite().all()
        assert mine.isnan().all()

    native.together(prepare)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("keep", ["pre", "code"])
def test_operations_that_cannot_wait_see_what_has_been_computed(unwritten, impl, keep):
    """The product before waits where it is native; the formula, and a derivative in 8 bits, have to read it."""
    torch.manual_seed(0)
    x, square = torch.randn(1, 4, 8), FrozenLinear(torch.randn(8, 8))
    up, down = FrozenLinear(torch.randn(16, 8)), FrozenLinear(torch.randn(8, 16))

    def run():
        return ops.mlp(ops.linear(x.requires_grad_(), square), up, down, keep=keep, impl=impl)

    expected, found = run(), native.together(run)
    assert torch.equal(found, expected) and expected.isfinite().all()


SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 6), "num_heads": (3, 6), "patch_size": 2}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 6}
ALL_TOKENS = VIT | {"global_pool": "avg", "class_token": False}
MODELS = {  # the numbers of blocks that are prepared together
    "ViT": ("vit_tiny_patch16_224", VIT, {}, [2, 2]),  # the last has one query and is none of them
    "all tokens": ("vit_tiny_patch16_224", ALL_TOKENS, {}, [2, 2, 2]),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, {}, [2, 2, 2]),  # a merging stands alone
    "one prompt for all": ("vit_tiny_patch16_224", ALL_TOKENS, {"common_prompt": False}, [2, 2, 2]),
    "layer scale": ("vit_tiny_patch16_224", VIT | {"init_values": 0.5}, {}, []),
    "norms of heads": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}, {}, []),
    "prompts carried": ("vit_tiny_patch16_224", VIT, {"carry_prompts": True}, []),
}


@pytest.mark.parametrize(("name", "sizes", "config", "expected"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_blocks_are_prepared_together_with_the_same_bits(
    unwritten, monkeypatch, name, sizes, config, expected, autocast
):
    _, model = make_pair(name, InsVPConfig(**config), **sizes)
    check_groups(model.eval(), monkeypatch, expected, autocast)


def test_an_mlp_with_a_norm_of_its_own_does_not_wait(unwritten, monkeypatch):
    backbone = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    for stage in backbone.layers:
        for block in stage.blocks:
            block.mlp = GeGluMlp(block.dim, 2 * block.dim)
    model = InsVPViT(backbone, 10).eval()
    assert unsupported_reason(model) is None
    check_groups(model, monkeypatch, [])


class BufferedPrompts(PromptMethod):
    """Writes the prompts of every block into one tensor, by operations of this package."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.p, self.buffer = torch.nn.Parameter(torch.randn(6, 3, 24)), torch.zeros(1, 3, 24)

    def block_prompts(self, block, context, batch, tokens=None):
        made = ops.linear(self.p[block][None], FrozenLinear(torch.eye(24))).tanh()
        made = made if torch.is_grad_enabled() else self.buffer.copy_(made)
        return Prompts(made.expand(batch, -1, -1))


class BufferedInsVP(InsVPViT):
    def feature_prompt(self, block, p_s, batch):
        made = super().feature_prompt(block, p_s, batch)
        if torch.is_grad_enabled():
            return made
        self.buffer = getattr(self, "buffer", torch.empty_like(made))
        return self.buffer.copy_(made)


@pytest.mark.parametrize("kind", [partial(MethodViT, method=BufferedPrompts), BufferedInsVP], ids=["method", "model"])
def test_prompts_of_others_do_not_wait(unwritten, monkeypatch, kind):
    torch.manual_seed(0)
    model = kind(timm.create_model("vit_tiny_patch16_224", **VIT), 10).eval()
    image = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        found = model(image)
    assert torch.equal(found, model(image))
    check_groups(model, monkeypatch, [])


def check_groups(model, monkeypatch, expected, autocast=False):
    """The sizes of the groups, and the bits of blocks that do not wait: of logits, and of gradients."""
    groups, groups_of = [], type(model)._blocks_together

    def noted(self, *arguments):
        groups.extend(made := groups_of(self, *arguments))
        return made

    monkeypatch.setattr(type(model), "_blocks_together", noted)
    check_bits(model, monkeypatch, autocast)
    assert [len(group) for group in groups if len(group) > 1] == expected


def check_bits(model, monkeypatch, autocast=False):
    found = logits_and_gradients(model, autocast)
    monkeypatch.setattr(prompted, "BYTES_TOGETHER", 0)
    for x, y in zip(found, logits_and_gradients(model, autocast), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


def logits_and_gradients(model, autocast=False):
    image = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(image)
    return logits, *torch.autograd.grad(logits.float().square().sum(), parameters)


def test_what_is_saved_for_backward_is_there_when_hooks_see_it(unwritten):
    """Hooks may keep it elsewhere, or compress it."""
    _, model = make_pair("vit_tiny_patch16_224", **VIT)
    seen = []

    def pack(x):
        seen.append(bool(x.isfinite().all()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randn(2, 3, 32, 32))
    assert all(seen) and len(seen) > 30


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_what_is_kept_for_backward_changes_no_bit(unwritten, monkeypatch, recompute):
    _, model = make_pair("vit_tiny_patch16_224", **VIT)
    model.recompute, model.gelu_in_8_bits = recompute, recompute != "mlp"
    check_bits(model.eval(), monkeypatch)


@pytest.fixture
def trained(unwritten):
    """Loss and parameters of a model whose last four blocks wait in backward, and their gradients when nothing does."""
    _, model = make_pair("vit_tiny_patch16_224", **ALL_TOKENS)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss():
        return model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).square().sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompted, "BYTES_TOGETHER", 0)
        return loss, parameters, torch.autograd.grad(loss(), parameters)


def assert_equal(found, expected):
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(found, expected, strict=True))


def test_backward_waits_for_the_end_of_a_group(trained, monkeypatch):
    loss, parameters, expected = trained
    waiting, finish = [], native.Group.finish

    def counted(self):
        waiting.append(len(self._queue.calls))
        finish(self)

    monkeypatch.setattr(native.Group, "finish", counted)
    assert_equal(torch.autograd.grad(loss(), parameters), expected)
    assert waiting == [2 * 7] * 2  # norm, product, attention, product, norm and the two of the MLP


def test_a_graph_can_be_gone_through_again_and_by_many_threads(trained):
    loss, parameters, expected = trained
    made = loss()
    assert_equal(torch.autograd.grad(made, parameters, retain_graph=True), expected)
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(torch.autograd.grad, made, parameters, retain_graph=True) for _ in range(8)]
        for job in jobs:
            assert_equal(job.result(), expected)


def test_part_of_the_gradients_is_enough(trained):
    loss, parameters, expected = trained
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_equal(torch.autograd.grad(loss(), [parameter]), [gradient])


def test_anomaly_mode_sees_gradients_that_are_there(trained):
    loss, parameters, expected = trained
    made = loss()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_equal(torch.autograd.grad(made, parameters), expected)


class Finite(TorchDispatchMode):
    """Asserts that what is given to operators and returned by them is finite."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "insvp_fast":
            for x in [*args, *(result if isinstance(result, tuple) else [result])]:
                assert not isinstance(x, torch.Tensor) or x.isfinite().all()
        return result


def test_a_mode_around_backward_sees_gradients_that_are_there(trained):
    loss, parameters, expected = trained
    made = loss()
    with Finite():
        assert_equal(torch.autograd.grad(made, parameters), expected)


def test_second_derivatives_are_refused_as_without_waiting(trained):
    loss, parameters, expected = trained
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    assert_equal(gradients, expected)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(g.sum() for g in gradients).backward()


def tensors():
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def test_a_backward_that_failed_leaves_nothing(trained, monkeypatch):
    """No call waits in the thread, and no memory is kept by a graph that is gone."""
    loss, parameters, expected = trained
    made, before = loss(), tensors()

    def fail(*arguments):
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(native, "attention_bwd", fail)
        with pytest.raises(KeyError):
            torch.autograd.grad(made, parameters, retain_graph=True)
    assert not native.are_together() and product(torch.ones(2, 3)).isfinite().all()
    assert_equal(torch.autograd.grad(made, parameters, retain_graph=True), expected)
    for _ in range(3):
        made = loss()
        with monkeypatch.context() as patch:
            patch.setattr(native, "attention_bwd", fail)
            with pytest.raises(KeyError):
                torch.autograd.grad(made, parameters)
    assert tensors() <= before


def test_large_batches_wait_for_nothing():
    _, model = make_pair("vit_tiny_patch16_224", **VIT)
    tokens = torch.zeros(1, 17, 24)
    assert model._may_wait(tokens)
    assert not model._may_wait(torch.zeros(1, prompted.BYTES_TOGETHER // 4 + 1))
    assert not model._may_wait(tokens.to("meta"))
    with torch.autograd.graph.save_on_cpu():
        assert not model._may_wait(tokens)
