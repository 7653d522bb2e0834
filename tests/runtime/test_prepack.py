"""Packed weights are never met by changed contents, however these were written, and live as long as their weights."""

import copy
import ctypes
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from insvp_fast import InsVPConfig
from insvp_fast.runtime import hardware, native, prepack, products
from insvp_fast.runtime.fingerprint import NativeFingerprint, PlainFingerprint, Region, look_at
from insvp_fast.runtime.native import fingerprint as native_fingerprint
from insvp_fast.runtime.products import FrozenLinear
from insvp_fast.testing import make_pair, relative_error, trained_gradients

pytestmark = pytest.mark.filterwarnings("error")

PRODUCTS = {  # the product, and the dtype of its operands
    "native": torch.float32,
    "onednn": torch.float32,
    "plain": torch.bfloat16,
    "widened": torch.bfloat16,
}


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    """The dtype of operands for which the CPU multiplies in one of its ways."""
    monkeypatch.setattr(hardware, "has_tiles", lambda dtype: False)  # of which "plain" products avoid odd sizes
    how = request.param
    if how in ("native", "widened") and not native.available():
        pytest.skip("needs the native library")
    providers = {torch.bfloat16: how, torch.float32: "native" if how == "widened" else how}
    with products.override_provider(providers.__getitem__):
        yield PRODUCTS[how]


def drawn(shape):
    """As large as a layer's weights: larger ones would saturate the softmax, which magnifies rounding errors."""
    return torch.randn(shape) / shape[-1] ** 0.5


def by_data(layer):
    layer.weight.data.add_(0.1)


def by_numpy(layer):
    layer.weight.detach().numpy()[:] *= -2


def by_dlpack(layer):
    torch.from_dlpack(layer.weight.detach()).mul_(-2)


def by_storage_copy(layer):
    storage = layer.weight.untyped_storage()
    storage.copy_(drawn(layer.weight.shape).untyped_storage())


def by_storage_fill(layer):
    layer.weight.untyped_storage().fill_(0)


def by_address(layer):
    source = drawn(layer.weight.shape)
    ctypes.memmove(layer.weight.data_ptr(), source.data_ptr(), source.nbytes)


def by_new_data(layer):
    layer.weight.data = drawn(layer.weight.shape)


def by_set(layer):
    with torch.no_grad():
        layer.weight.set_(drawn(layer.weight.shape))


def by_assignment(layer):
    layer.weight = nn.Parameter(drawn(layer.weight.shape), requires_grad=False)


def by_assigned_state(layer):
    layer.load_state_dict({k: drawn(v.shape) for k, v in layer.state_dict().items()}, assign=True)


def by_state(layer):
    layer.load_state_dict({k: drawn(v.shape) for k, v in layer.state_dict().items()})


def by_swap(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(drawn(layer.weight.shape), requires_grad=False))


def by_averages_swapped_in(layer):
    average = [p.detach().clone() + 0.1 for p in layer.parameters()]
    for p, other in zip(layer.parameters(), average, strict=True):
        p.data, other.data = other.data, p.data


def by_foreach(layer):
    torch._foreach_add_([p.data for p in layer.parameters()], 0.1)


def by_transposed_view(layer):
    layer.weight.data.T.copy_(drawn(layer.weight.T.shape))


def by_the_bias(layer):
    layer.bias.data.add_(3)


def by_optimizer(make):
    def write(layer):
        layer.requires_grad_(True)
        optimizer = make(layer.parameters())
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        layer.requires_grad_(False)

    return write


WRITES = {function.__name__: function for name, function in list(globals().items()) if name.startswith("by_")}
del WRITES["by_optimizer"]
WRITES |= {
    f"by_{kind.__name__}-{options}": by_optimizer(lambda ps, kind=kind, options=options: kind(ps, lr=0.1, **options))
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
    for options in ({"fused": True}, {"foreach": True}, {})
}


def check(layer, dtype):
    x, grad = torch.randn(5, layer.in_features).to(dtype), torch.randn(5, layer.out_features).to(dtype)
    w = FrozenLinear(layer.weight, layer.bias)
    how = products.provider(dtype, x.device)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    assert relative_error(products.linear(x, w, how), exact) < 8 * torch.finfo(dtype).eps
    exact = grad.double() @ layer.weight.double()
    assert relative_error(products.linear_bwd(grad, w, how), exact) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [(48, 33), (300, 512)], ids=["small", "large"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_seen_at_once(product, size, write):
    layer = nn.Linear(*size).requires_grad_(False)
    check(layer, product)
    before = layer.weight.clone(), layer.bias.clone()
    write(layer)
    assert not all(map(torch.equal, before, (layer.weight, layer.bias)))
    check(layer, product)


@pytest.mark.parametrize("size", [(48, 33), (300, 512)], ids=["small", "large"])
def test_a_write_through_memory_that_is_shared_is_seen_at_once(product, size):
    first, second = nn.Linear(*size).requires_grad_(False), nn.Linear(*size).requires_grad_(False)
    flat = torch.randn(sum(p.numel() for p in first.parameters()))
    vector_to_parameters(flat, first.parameters())
    second.weight.data = first.weight.data.view_as(first.weight)
    for _ in range(3):
        for layer in (first, second):
            check(layer, product)
        flat.mul_(-2)
    with torch.no_grad():
        second.weight.add_(1)  # counted for the second, and not for the first
    for layer in (first, second):
        check(layer, product)
    assert torch.equal(parameters_to_vector(first.parameters()), flat)


def test_copies_moves_and_casts_are_new_weights(product):
    layer = nn.Linear(48, 33).requires_grad_(False)
    check(layer, product)
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    for changed in (layer, twin, layer.double(), layer.float(), layer.bfloat16(), twin.share_memory()):
        check(changed, product)


@pytest.fixture(params=[NativeFingerprint, PlainFingerprint])
def fingerprint_of(request):
    if request.param is NativeFingerprint and not native.available():
        pytest.skip("needs the native library")

    def make(*tensors):
        return request.param([Region.of(x, weakref.ref(x.untyped_storage())) for x in tensors])

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("elements", [0, 1, 7, 1001, 33_333, 50_001])
def test_any_changed_element_breaks_a_fingerprint(fingerprint_of, dtype, elements):
    x = (50 * torch.randn(3 + elements)).to(dtype)[3:]  # starts on an odd address
    other = torch.randn(5)
    held = fingerprint_of(other, x)
    assert not any(held.broken() for _ in range(200)) and not held.broken_anywhere()
    for place in {0, elements // 3, elements - 1} if elements else ():
        before = x[place].clone()
        x[place] = before + 1
        assert held.broken_anywhere()
        if isinstance(held, NativeFingerprint) or x.nbytes <= 65536:
            looks = [held.broken() for _ in range(128)]
            assert any(looks) and (all(looks) or x.nbytes > 65536)
        x[place] = before
        assert not held.broken_anywhere()


WHOLE = {
    "negated": torch.Tensor.neg_,
    "zeroed": torch.Tensor.zero_,
    "shifted": lambda x: x.add_(1),
    "reversed": lambda x: x.copy_(x.flip(0)),
    "with neighbors exchanged": lambda x: x.copy_(x.view(-1, 2).flip(1).flatten()),
}


@pytest.mark.parametrize("write", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.skipif(not native.available(), reason="needs the native library")
def test_a_fingerprint_sees_8_kilobytes_in_a_row_at_once(write, dtype):
    x = torch.randn(100_000).to(dtype)
    held, size = NativeFingerprint([Region.of(x, weakref.ref(x.untyped_storage()))]), (8192 + 64) // x.itemsize
    for start in torch.randint(0, x.numel() - size, (50,)).tolist():
        part = x[start : start + size]
        before = part.clone()
        write(part)
        assert held.broken()
        part.copy_(before)
    assert not held.broken()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_signs_of_equal_numbers_do_not_cancel(fingerprint_of, dtype, value):
    for size in (8, 64, 20_000, 100_000):
        x = torch.full((size,), value, dtype=dtype)
        held = fingerprint_of(x)
        assert not held.broken()
        for step in (1, 2, 3, 4):
            x[::step].neg_()
            assert held.broken_anywhere()
            x[::step].neg_()
        assert not held.broken()


def test_tensors_of_any_strides_have_fingerprints(fingerprint_of):
    for x in (
        torch.randn(40, 30).T,
        torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last),
        torch.randn(60)[::3],
    ):
        held = fingerprint_of(x)
        assert not held.broken()
        x[(-1,) * x.ndim] += 1
        assert held.broken()


def test_verify_reads_everything(product):
    prepack.clear()
    layers = [nn.Linear(300, 512).requires_grad_(False) for _ in range(2)]
    for layer in layers:
        check(layer, product)
    assert prepack.verify() == 0
    layers[1].weight.data[100, 7] += 1  # one element, which a look may pass by
    assert prepack.verify() == 1
    for layer in layers:
        check(layer, product)


def test_packed_weights_die_with_their_weights(product):
    prepack.clear()
    layer = nn.Linear(48, 33).requires_grad_(False)
    check(layer, product)
    assert len(prepack._records) == 1
    layer.weight = nn.Parameter(torch.randn(33, 48), requires_grad=False)
    assert not prepack._records
    check(layer, product)
    del layer
    gc.collect()
    assert not prepack._records


def test_what_a_graph_has_captured_lives_as_long_as_the_weights(monkeypatch):
    """Neither a change nor ``clear`` takes it away; the end of the weights does."""
    made = []

    def make():
        made.append(torch.randn(3))
        return made[-1]

    def use():
        return prepack.packed(weights, "form", make)

    weights = [torch.randn(33, 48)]
    prepack.clear()
    first = use()
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.Tensor, "is_cuda", True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert use() is first
    alive = weakref.ref(first)
    weights[0].add_(1)
    assert use() is not first
    del first
    made.clear()
    prepack.clear()
    gc.collect()
    assert alive() is not None
    weights.clear()
    gc.collect()
    assert alive() is None and not prepack._captured


def test_a_stream_waits_once_for_what_another_has_made(monkeypatch):
    log, current = [], ["first"]

    class Stream:
        def wait_event(self, event):
            log.append((current[0], "waits"))

    class Event:
        def record(self, stream):
            log.append((current[0], "made"))

    class Packed:
        def record_stream(self, stream):
            log.append((current[0], "reads"))

    monkeypatch.setattr(prepack.torch_private, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    form = prepack._Form((Packed(), None), torch.device("cuda", 0))
    for current[0] in ("first", "second", "second", "first", "third"):
        form.in_order()
    waited = [(stream, step) for stream in ("second", "third") for step in ("waits", "reads")]
    assert log == [("first", "made"), *waited]


def test_packed_weights_follow_a_parameter_made_again_on_the_same_memory(product):
    """Its version counter starts anew, so that of the old one says nothing."""
    layer, weight = nn.Linear(48, 33).requires_grad_(False), torch.randn(33, 48)
    for _ in range(3):
        layer.weight = nn.Parameter(weight.data, requires_grad=False)
        check(layer, product)
        weight.mul_(-3)


def test_packed_weights_are_not_those_of_new_memory_at_an_old_address(product):
    for _ in range(50):
        layer = nn.Linear(48, 33).requires_grad_(False)
        check(layer, product)


def test_a_weight_that_shrank_is_not_read_beyond_its_end(product):
    layer = nn.Linear(300, 512).requires_grad_(False)
    check(layer, product)
    layer.weight.data.resize_(1)
    layer.weight.untyped_storage().resize_(4)
    assert prepack.verify() >= 1


def test_inference_tensors_are_never_kept(product):
    with torch.inference_mode():
        layer = nn.Linear(48, 33)
        for _ in range(2):
            check(layer, product)
            layer.weight.mul_(-2)


def test_threads_share_packed_weights(product):
    layer, failures = nn.Linear(48, 33).requires_grad_(False), []

    def work():
        try:
            for _ in range(50):
                check(layer, product)
                check(nn.Linear(48, 33).requires_grad_(False), product)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        prepack.verify()  # beside weights that are freed
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_that_look_at_once_all_see_a_write():
    layer, seen = nn.Linear(300, 512).requires_grad_(False), []
    if not native.available():
        pytest.skip("needs the native library")
    held = NativeFingerprint([Region.of(layer.weight, weakref.ref(layer.weight.untyped_storage()))])
    layer.weight.data.neg_()
    threads = [threading.Thread(target=lambda: seen.extend(held.broken() for _ in range(300))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200 and all(seen)


@pytest.mark.skipif(not native.available(), reason="needs the native library")
def test_a_look_of_another_thread_does_not_change_which_line_is_compared(monkeypatch):
    x = torch.randn(100_000)
    held = NativeFingerprint([Region.of(x, weakref.ref(x.untyped_storage()))])
    x[3] += 1  # in line 0 alone
    library_call, others = native_fingerprint.call, []

    def call(*arguments):
        if not others:
            others.append(True)
            held._look.hold([5])
        library_call(*arguments)

    monkeypatch.setattr(native_fingerprint, "call", call)
    assert not held._look.hold([0]) and others


def test_a_storage_that_moves_takes_its_packed_weights_along(product):
    """As shards do that are gathered for each step."""
    prepack.clear()
    layer, holes = nn.Linear(48, 33).requires_grad_(False), []
    for _ in range(5):
        check(layer, product)
        content, storage = layer.weight.detach().clone(), layer.weight.untyped_storage()
        storage.resize_(0)
        holes.append(torch.empty(33, 48))
        storage.resize_(content.nbytes)
        layer.weight.data.copy_(2 * content)
    layer.share_memory()
    check(layer, product)
    assert len(prepack._records) == 1


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
UNSUITED = {"by_transposed_view": "backbone.blocks.0.norm1"}


def pair_on_cpu():
    """The weights that are packed are those on CPUs, and some of these writes reach no others."""
    return [model.cpu() for model in make_pair("vit_tiny_patch16_224", InsVPConfig(global_dropout=0.0), **TINY)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", [f"backbone.blocks.{path}" for path in ("0.mlp.fc1", "1.attn.qkv", "0.norm1")])
@pytest.mark.parametrize("write", WRITES)
def test_a_model_in_use_sees_a_write(write, path, autocast):
    if UNSUITED.get(write) == path:
        pytest.skip("the weight of a norm has one dimension")
    models = reference, fast = pair_on_cpu()
    image = torch.randn(2, 3, 32, 32)
    trained_gradients(fast, image, autocast=autocast)
    for model in models:
        torch.manual_seed(1)
        WRITES[write](model.get_submodule(path))
    values, anew = (trained_gradients(model, image, autocast=autocast) for model in (fast, copy.deepcopy(fast)))
    assert all(torch.equal(value, anew[name]) for name, value in values.items())
    if autocast is None:
        exact = trained_gradients(reference.double(), image.double())
        assert max(relative_error(value, exact[name]) for name, value in values.items()) < 1e-5


def test_nothing_is_packed_of_a_backbone_that_is_trained():
    reference, fast = pair_on_cpu()
    prepack.clear()
    optimizers = []
    for model in (reference, fast):
        model.backbone.requires_grad_(True)
        optimizers.append(torch.optim.SGD(model.backbone.parameters(), lr=0.01, fused=True))
    image = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the general path
            expected, values = trained_gradients(reference, image), trained_gradients(fast, image)
        assert max(relative_error(value, expected[name]) for name, value in values.items()) < 1e-5
        assert not prepack._records
        for optimizer in optimizers:
            optimizer.step()
    for model in (reference, fast):
        model.backbone.requires_grad_(False)
    assert relative_error(fast(image), reference(image)) < 1e-5
    assert prepack._records


def test_a_storage_that_shrank_is_gone_and_stays_small(fingerprint_of):
    x = torch.randn(300)
    held = fingerprint_of(x)
    x.resize_(1)
    x.untyped_storage().resize_(4)
    assert held.broken_anywhere()
    assert x.untyped_storage().nbytes() == 4


def test_each_line_of_a_block_breaks_a_fingerprint(fingerprint_of):
    x = torch.randn(50_000)
    held = fingerprint_of(x)
    for place in range(0, 8192 // 4, 64 // 4):  # cache lines of 64 bytes in a block of 8 KB
        before = x[place].clone()
        x[place] += 1
        assert held.broken_anywhere(), place
        x[place] = before
    assert not held.broken_anywhere()


@pytest.mark.skipif(not native.available(), reason="needs the native library")
def test_one_look_at_fingerprints_of_two_kinds_sees_a_write_to_either():
    x, y = torch.randn(2, 300)
    kinds = (NativeFingerprint, x.clone()), (PlainFingerprint, y.clone())
    look = look_at([kind([Region.of(w, weakref.ref(w.untyped_storage()))]) for kind, w in kinds])
    assert not look()
    for _, w in kinds:
        before = w.clone()
        w += 1
        assert look()
        w.copy_(before)
        assert not look()
