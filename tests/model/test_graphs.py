"""Models that run as CUDA graphs, against the same models kernel by kernel; without a GPU, graphs are acted."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from insvp_fast import InsVPConfig, InsVPViT, coverage
from insvp_fast.ops import captured_graph, graphs
from insvp_fast.ops.graphs import Graphs
from insvp_fast.runtime import cuda_graphs, prepack, recording, torch_private
from insvp_fast.testing import DEVICE, make_pair, trained_gradients

ON_GPU = DEVICE.type == "cuda"
SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "num_heads": 2, "depth": 3}
CONFIGS = {
    "paper": InsVPConfig(),
    "released": InsVPConfig.released(),
    "prompted image": InsVPConfig(specific_input="prompted"),
    "no image prompt": InsVPConfig(global_prompt=False, patch_prompt=False),
    "no specific prompt": InsVPConfig(specific_prompt=False),
}


class ActedSpace(cuda_graphs.Space):
    """Calls the function again at each replay, and copies its results into the memory of the first ones."""

    def __init__(self, device):
        self._kept = None

    def capture(self, function):
        results = function()
        memory = [None if x is None else x.detach() for x in results]

        def replay():
            with torch.enable_grad() if any(x.requires_grad for x in results if x is not None) else torch.no_grad():
                again = function()
            for to, x in zip(memory, again, strict=True):
                if to is not None:
                    to.copy_(x.detach())
            if isinstance(results, list):
                results[:] = again  # what backward differentiates

        return results, replay


@pytest.fixture(autouse=True)
def acted(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(cuda_graphs, "has_graphs", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "Space", ActedSpace)
        monkeypatch.setattr(torch_private, "current_stream", lambda device: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be launched one by one
        yield


def model_of(config="paper", **sizes):
    _, model = make_pair("vit_tiny_patch16_224", CONFIGS[config], **(SIZES | sizes))
    return model.eval()


def image_of(batch=2, seed=0):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def graphs_of(model):
    kept = coverage.kept(model).get("graphs")
    return [] if kept is None else [graph for graph in kept._graphs.values() if isinstance(graph, captured_graph.Graph)]


@contextlib.contextmanager
def one_by_one(model):
    model.cuda_graphs = False
    yield model
    model.cuda_graphs = True


def direct(model, function, *args, **kwargs):
    with one_by_one(model):
        return function(*args, **kwargs)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    assert all(x.isfinite().all() for x in found.values())


AUTOCAST = [None, torch.bfloat16]


@pytest.mark.parametrize("autocast", AUTOCAST, ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_inference_has_the_bits_of_kernels_launched_one_by_one(config, autocast):
    model = model_of(config)
    with torch.no_grad(), torch.autocast(DEVICE.type, autocast or torch.bfloat16, enabled=autocast is not None):
        for batch in (2, 1):
            images = [image_of(batch, seed) for seed in range(4)]
            found = [model(image) for image in images]
            for image, result in zip(images, found, strict=True):
                assert torch.equal(result, direct(model, model, image))
    assert len(graphs_of(model)) == 2


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("autocast", AUTOCAST, ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_training_has_the_bits_of_kernels_launched_one_by_one(config, autocast, recompute):
    model = model_of(config).train()
    model.recompute = recompute
    other, optimizers = deepcopy(model), []
    other.cuda_graphs = False
    for trained in (model, other):
        optimizers.append(torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.01))
    for step in range(4):
        image = image_of(seed=step)
        found, expected = (trained_gradients(m, image, step, autocast) for m in (model, other))
        assert_same(found, expected)
        for optimizer in optimizers:
            optimizer.step()
    assert len(graphs_of(model)) == 1 and not graphs_of(other)


def prepared(model, image, times=3, **kwargs):
    for seed in range(times):
        trained_gradients(model, image, seed, **kwargs)
    assert len(graphs_of(model)) == 1
    return model


def test_a_second_forward_pass_does_not_touch_what_the_first_has_kept():
    model = prepared(model_of(), image_of())
    parameters = [p for p in model.parameters() if p.requires_grad]
    images = [image_of(seed=1), image_of(seed=2)]
    expected = [direct(model, lambda x=x: torch.autograd.grad(model(x).sum(), parameters)) for x in images]
    outputs = [model(image) for image in images]
    assert not graphs_of(model)[0].space.is_free()
    with torch.no_grad():
        model(images[1])
    found = [torch.autograd.grad(y.sum(), parameters) for y in outputs]
    for own, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, own, other))


def test_two_backward_passes_of_one_forward_pass():
    model, image = prepared(model_of(), image_of()), image_of(seed=3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(image)
    assert not graphs_of(model)[0].space.is_free()
    first = torch.autograd.grad(y.sum(), parameters, retain_graph=True)
    assert torch.equal(model(image_of(seed=4)), direct(model, model, image_of(seed=4)))
    second = torch.autograd.grad(y.sum(), parameters)
    expected = direct(model, lambda: torch.autograd.grad(model(image).sum(), parameters))
    assert all(map(torch.equal, first, expected)) and all(map(torch.equal, second, expected))
    with pytest.raises(RuntimeError, match="second time|already been freed"):
        torch.autograd.grad(y.sum(), parameters)


def test_a_forward_pass_whose_result_is_dropped_keeps_nothing():
    model = prepared(model_of(), image_of())
    (graph,) = graphs_of(model)
    y = model(image_of())
    assert not graph.space.is_free()
    del y
    gc.collect()
    assert graph.space.is_free()


def test_results_and_gradients_are_not_written_again():
    model, image = prepared(model_of(), image_of()), image_of(seed=5)
    first = trained_gradients(model, image)
    model.zero_grad(set_to_none=True)
    model(image).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    copies = {name: g.clone() for name, g in gradients.items()}
    with torch.no_grad():
        result = [model(image_of(seed=s)) for s in range(3)][1]
        copy = result.clone()
    for seed in range(2):
        model.zero_grad(set_to_none=True)
        model(image_of(seed=seed)).sum().backward()
        with torch.no_grad():
            model(image_of(seed=seed))
    assert torch.equal(result, copy) and all(torch.equal(g, copies[name]) for name, g in gradients.items())
    assert first["logits"].isfinite().all()


def layer(model):
    return model.backbone.blocks[1].mlp.fc1


def in_place(model):
    with torch.no_grad():
        layer(model).weight.mul_(1.5)


def data(model):
    layer(model).weight.data = layer(model).weight.data * 1.5


def parameter(model):
    layer(model).weight = nn.Parameter(layer(model).weight * 1.5, requires_grad=False)


def positions(model):
    model.backbone.pos_embed.data = model.backbone.pos_embed.data + 1


def norm(model):
    model.backbone.blocks[1].norm1.weight.data = model.backbone.blocks[1].norm1.weight.data * 1.5


def prompter(model):
    model.specific_prompter.conv2.weight.data = model.specific_prompter.conv2.weight.data * 2


def prompter_in_place(model):
    with torch.no_grad():
        model.specific_prompter.conv2.weight.mul_(2)


def prompter_replaced(model):
    model.patch_prompter.fc2.weight = nn.Parameter(model.patch_prompter.fc2.weight.detach() * 2)


def common(model):
    model.common_prompts[1] = nn.Parameter(model.common_prompts[1].detach() + 1)


def loaded(model):
    model.load_state_dict({name: w * 1.1 for name, w in model.state_dict().items()})


def setting(model):
    model.fold_norm = not model.fold_norm


def kept_in_8_bits(model):
    model.gelu_in_8_bits = True


CHANGES = [in_place, data, parameter, positions, norm, prompter, prompter_in_place, prompter_replaced, common, loaded]
CHANGES += [setting, kept_in_8_bits]


@pytest.mark.parametrize("training", [True, False], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(change, training):
    model = model_of().train(training)
    model.fold_norm = training
    prepared(model, image_of())
    with torch.no_grad():
        before = model.eval()(image_of())
    (old,) = [graph for graph in graphs_of(model) if graph._grads]
    change(model.train(training))
    for seed in range(3):
        own, other = (partial(trained_gradients, model, image_of(seed=seed), seed) for _ in range(2))
        assert_same(own(), direct(model, other))
    # values of parameters are read where they are, on a GPU also those of weights that are not packed, and a graph of
    # other settings may serve again
    read_in_place = (prompter_in_place, setting, kept_in_8_bits, *[in_place] * (ON_GPU and not model.fold_norm))
    assert (old in graphs_of(model)) == (change in read_in_place)
    with torch.no_grad():
        after = model.eval()(image_of())
        assert torch.equal(after, direct(model, model, image_of()))
    assert change in (setting, kept_in_8_bits) or not torch.equal(after, before)


def expected(model, image, gradients=True, calls=5):
    """Call the model until its graph is launched ahead."""
    with torch.set_grad_enabled(gradients):
        for _ in range(calls):
            model(image)
    return model


@pytest.fixture
def order(monkeypatch):
    """What happens in a forward pass, in its order."""
    seen = []

    def note(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: seen.append(name) or function(*args, **kwargs))

    for owner, name in [
        (captured_graph.Graph, "forward"),
        (captured_graph.Graph, "holds"),
        (captured_graph.Launch, "adopt"),
    ]:
        note(owner, name)
    note(coverage, "covers")
    return seen


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_graph_is_launched_before_modules_and_weights_are_looked_at(gradients, pool, order):
    model = expected(model_of(global_pool=pool).train(), image_of(), gradients)
    order.clear()
    with torch.set_grad_enabled(gradients):
        model(image_of(seed=1))
    checks = order.count("covers")
    assert checks > 0 and order == ["forward", *["covers"] * checks, "holds", "adopt"]


@pytest.mark.parametrize("change", [data, norm, positions, prompter, common])
def test_a_graph_is_not_launched_if_memory_that_it_reads_may_be_gone(change):
    model, image = expected(model_of(), image_of()), image_of(seed=1)
    own = coverage.kept(model)["graphs"]
    launched = own.ahead(model.training, image)
    assert launched.launch is not None and own.ahead(model.training, image_of(1)).launch is None
    own._guesses[launched.call] = launched.guess
    launched.drop()
    change(model)
    # the graph knows the tensors themselves: of one that has been replaced, they keep the memory
    assert (own.ahead(model.training, image).launch is None) == (change is not common)


def test_an_image_that_is_read_where_it_is_is_not_read_later():
    model = expected(model_of(), nn.Parameter(image_of()))
    own = coverage.kept(model)["graphs"]
    for image in (image_of(seed=1).requires_grad_(), nn.Parameter(image_of(seed=1))):
        assert own.ahead(model.training, image).launch is None
        assert torch.equal(model(image), direct(model, model, image))
    plain = image_of(seed=2).requires_grad_()
    own = coverage.kept(expected(model, plain))["graphs"]
    assert own.ahead(model.training, nn.Parameter(plain.detach())).launch is None
    assert own.ahead(model.training, plain).launch is not None


def hooked(model):
    model.backbone.blocks[1].register_forward_hook(lambda module, inputs, output: None)


def hooked_everywhere(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("change", [hooked, hooked_everywhere, setting])
def test_a_graph_that_is_not_the_right_one_leaves_nothing_behind(change, gradients, order):
    model = expected(model_of("released").train(), image_of(), gradients)
    (graph,) = graphs_of(model)
    other = deepcopy(model)
    other.cuda_graphs = False
    handles = [change(m) for m in (model, other)]
    warnings.simplefilter("ignore")  # of the general path
    order.clear()
    try:
        results = []
        for m in (model, other):
            torch.manual_seed(7)
            with torch.set_grad_enabled(gradients):
                results.append([m(image_of(seed=1)), torch.rand(3, device=DEVICE)])
            if m is model:
                assert order[0] == "forward" and "adopt" not in order and graph.space.is_free()
                order.clear()
                m(image_of(seed=1))
                assert "forward" not in order or change is setting  # a wrong guess is not made again
    finally:
        for handle in filter(None, handles):
            handle.remove()
    assert all(map(torch.equal, *results))


def test_another_graph_runs_in_the_call_that_was_guessed_wrong(order):
    model = model_of("released").train()
    for _ in range(2):
        setting(model)
        expected(model, image_of())
    setting(model)
    order.clear()
    model(image_of())
    assert order.count("forward") == 2 and order.count("adopt") == 1


def test_settings_in_turn_are_not_guessed(order):
    model = model_of()
    with torch.no_grad():
        for _ in range(10):
            order.clear()
            setting(model)
            model(image_of())
            model.block_outputs(image_of(), [0])
    assert order.count("forward") == order.count("adopt") == 2


def test_an_error_on_the_general_path_leaves_the_memory_free():
    model = expected(model_of().train(), image_of())
    (graph,) = graphs_of(model)

    def fails(module, inputs, output):
        raise ArithmeticError("of a hook")

    model.backbone.blocks[1].register_forward_hook(fails)
    with pytest.warns(UserWarning, match="general path"), pytest.raises(ArithmeticError) as kept:
        model(image_of())
    assert kept.traceback and graph.space.is_free()


@pytest.mark.parametrize("gradients", [True, False])
def test_random_numbers_go_on_behind_those_of_graphs(gradients):
    model = expected(model_of("released").train(), image_of(), gradients)
    results = []
    for graphs_on in (True, False):
        model.cuda_graphs = graphs_on
        torch.manual_seed(7)
        with torch.set_grad_enabled(gradients):
            results.append([*(model(image_of(seed=1)) for _ in range(3)), torch.rand(3, device=DEVICE)])
    assert all(map(torch.equal, *results)) and not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("training", [True, False])
def test_random_numbers_that_another_thread_draws_meanwhile_are_not_drawn_again(training, monkeypatch):
    model, image = expected(model_of("released").train(training), image_of(), False), image_of(seed=1)
    draws, holds = [], captured_graph.Graph.holds

    def draw():
        draws.append(torch.rand(3, device=DEVICE))

    torch.manual_seed(7)
    with torch.no_grad():
        monkeypatch.setattr(captured_graph.Graph, "holds", lambda graph: draw() or holds(graph))
        found = [model(image), *draws, torch.rand(3, device=DEVICE)]
        torch.manual_seed(7)
        draw()
        other = [direct(model, model, image), draws[-1], torch.rand(3, device=DEVICE)]
    assert all(map(torch.equal, found, other))


def test_training_and_evaluation_in_turn_are_captured_once(monkeypatch):
    captured = []
    monkeypatch.setattr(Graphs, "_capture", lambda *args, do=Graphs._capture: captured.append(args) or do(*args))
    model = model_of("released")
    for epoch in range(4):
        for seed in range(3):
            trained_gradients(model.train(), image_of(seed=seed), seed)
        with torch.no_grad():
            for batch in (2, 1):
                image = image_of(batch, seed=epoch)
                assert torch.equal(model.eval()(image), direct(model, model, image))
    assert len(captured) == 3 and len(graphs_of(model)) == 3


def test_a_parameter_written_before_backward_is_an_error():
    model = prepared(model_of(), image_of())
    loss = model(image_of()).sum()
    with torch.no_grad():
        model.patch_prompter.fc1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", [prompter, norm, data])
def test_memory_that_backward_reads_is_there(change):
    model = model_of()
    model.fold_norm = False
    prepared(model, image_of()).zero_grad()
    loss, before = model(image_of()).square().sum(), deepcopy(model)
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    change(model)
    assert all(storage() is not None for storage in storages)
    loss.backward()
    with one_by_one(before):
        before(image_of()).square().sum().backward()
    for own, other in zip(model.parameters(), before.parameters(), strict=True):
        # where graphs are acted, backward reads what frozen weights are now
        same = own.grad is None or torch.equal(own.grad, other.grad)
        assert same or (change is not prompter and not ON_GPU)


def test_a_moved_model_keeps_no_graph():
    model = prepared(model_of(), image_of())
    graph = weakref.ref(graphs_of(model)[0])
    model.to(torch.float64)
    gc.collect()
    assert graph() is None


def test_devices_and_streams_have_memory_of_their_own():
    own = Graphs()
    devices = torch.cuda.device_count() if ON_GPU else 2
    spaces = [own._space(stream, torch.device("cuda", i)) for stream in (0, 1) for i in range(devices)]
    assert len({*map(id, spaces)}) == len(spaces) and own._space(0, torch.device("cuda", 0)) is spaces[0]


def test_the_gradient_of_an_image():
    model = model_of()
    for seed in range(3):
        found, expected = image_of(seed=seed).requires_grad_(), image_of(seed=seed).requires_grad_()
        model(2 * found).square().sum().backward()
        with one_by_one(model):
            model(2 * expected).square().sum().backward()
        assert torch.equal(found.grad, expected.grad)
    assert len(graphs_of(model)) == 1


def test_8_bit_images_of_other_preprocessing():
    model, image = model_of(), (50 * image_of().abs()).to(torch.uint8)
    model.preprocessing = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with torch.no_grad():
        for mean in (0.5, 0.5, 0.5, 0.25, 0.25, 0.25):
            model.preprocessing = {"mean": (mean,) * 3, "std": (0.5, 0.5, 0.5)}
            assert torch.equal(model(image), direct(model, model, image))


def test_hooks_of_parameters_run_once_for_a_step():
    model, seen = model_of(), []
    model.patch_prompter.fc1.weight.register_hook(seen.append)
    for seed in range(4):
        trained_gradients(model, image_of(seed=seed), seed)
    assert len(graphs_of(model)) == 1 and len(seen) == 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "slice"])
def test_images_of_any_layout(layout, training):
    """Graphs read copies, which have the same gaps; of what is in one place several times there is none."""
    model = model_of("released").train(training)
    for seed in range(4):
        image = image_of(seed=seed)
        image = {
            "channels_last": image.contiguous(memory_format=torch.channels_last),
            "expanded": image[:1].expand(3, -1, -1, -1),
            "slice": torch.cat([image, image], dim=3)[..., 32:96],
        }[layout]
        found = trained_gradients(model, image, seed)
        assert_same(found, direct(model, trained_gradients, model, image, seed))
    assert len(graphs_of(model)) == (layout != "expanded")


def test_wanted_blocks_of_which_some_have_no_gradient():
    model = model_of()
    parameters = list(model.common_prompts.parameters())
    for seed in range(3):
        image = image_of(seed=seed)
        found, expected = model.block_outputs(image, [0, 2]), direct(model, model.block_outputs, image, [0, 2])
        assert all(map(torch.equal, found, expected))
        grads = [torch.autograd.grad(y[0].square().sum(), parameters, allow_unused=True) for y in (found, expected)]
        for p, own, other in zip(parameters, *grads, strict=True):  # a graph gives zeros where there is none
            assert torch.equal(*(torch.zeros_like(p) if g is None else g for g in (own, other)))
    assert len(graphs_of(model)) == 1


@pytest.mark.parametrize("refuse", ["cuda_graphs", "recompute", "hooks", "anomaly", "replica"])
def test_where_nothing_is_captured(refuse):
    model, around = model_of(), contextlib.nullcontext()
    if refuse == "replica":
        replica = model._replicate_for_data_parallel()
        assert not replica._may_replay() and model._may_replay()
        return
    if refuse == "cuda_graphs":
        model.cuda_graphs = False
    elif refuse == "recompute":
        model.recompute = "block"
    elif refuse == "hooks":
        around = torch.autograd.graph.save_on_cpu()
    else:
        warnings.simplefilter("default")
        around = torch.autograd.detect_anomaly()
    with around:
        for seed in range(3):
            trained_gradients(model, image_of(seed=seed), seed)
    assert not graphs_of(model)


def test_a_block_before_all_prompts_has_no_gradient():
    _, model = make_pair(
        "vit_tiny_patch16_224", InsVPConfig(global_prompt=False, patch_prompt=False, prompted_blocks=(2,)), **SIZES
    )
    for seed in range(3):
        found, expected = (
            f(image_of(seed=seed), [0]) for f in (model.block_outputs, partial(direct, model, model.block_outputs))
        )
        assert torch.equal(found[0], expected[0]) and not found[0].requires_grad


def test_a_setting_of_pytorch_is_seen():
    model, before = prepared(model_of(), image_of()), torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = not before
        for seed in range(3):
            assert_same(
                trained_gradients(model, image_of(), seed), direct(model, trained_gradients, model, image_of(), seed)
            )
    finally:
        torch.backends.cudnn.deterministic = before
    assert len(graphs_of(model)) == 2


def doubled(inputs):
    return [2 * inputs[0]]


def test_a_function_that_gives_other_bits_is_not_replayed():
    calls, own = [], Graphs()

    def counts(inputs):
        calls.append(1)
        return [inputs[0] + len(calls)]

    x = torch.ones(3, device=DEVICE)
    own.run("key", [x], [], counts)
    with pytest.warns(UserWarning, match="gave other bits"):
        own.run("key", [x], [], counts)
    number = len(calls)
    assert own.run("key", [x], [], counts)[0][0] == 2 + number


@pytest.mark.parametrize("renewed", [False, True])
def test_a_graph_knows_the_packed_weights_that_it_reads(renewed):
    """Those of the capture, not those that are packed by the end of it."""

    class Space(cuda_graphs.Space):
        def capture(self, function):
            captured = super().capture(function)
            if renewed:
                prepack.clear()  # as a look at the weights that has just come back
            return captured

    x, weight = torch.ones(3, device=DEVICE), torch.ones(40, 512, device=DEVICE)

    def compute(inputs):
        return [inputs[0] * prepack.packed([weight], "doubled", lambda: 2 * weight)[0, 0]]

    compute([x])
    graph = captured_graph.Graph(Space(DEVICE), [x], [False], compute)
    assert graph.forward([x])[0].sum() == 6 and graph.holds() is not renewed


def test_images_that_are_parameters_have_graphs_of_their_own():
    own = Graphs()
    images = [nn.Parameter(torch.ones(3, device=DEVICE)), torch.ones(3, device=DEVICE)]
    with torch.no_grad():
        for _ in range(4):
            for image in (images[0], images[1], images[1], images[0]):
                assert own.run("key", [image], [], doubled)[0].sum() == 6
    captured = [graph for graph in own._graphs.values() if isinstance(graph, captured_graph.Graph)]
    assert len(captured) == len(own._graphs) == 2


def test_a_function_that_cannot_be_captured_runs_as_it_is():
    own, x = Graphs(), torch.ones(3, device=DEVICE)

    def waits(inputs):
        if recording.current() is not None and not ON_GPU:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [inputs[0] * inputs[0].sum().item()]

    stream = torch_private.current_stream(DEVICE)
    own.run("key", [x], [], waits)
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert own.run("key", [x], [], waits)[0].sum() == 9
    assert torch_private.current_stream(DEVICE) == stream and torch.rand(9, device=DEVICE).sum() > 0
    assert own.run("key", [x], [], waits)[0].sum() == 9
    assert own.run("other", [x], [], doubled)[0].sum() == 6  # the GPU still works
    assert own.run("other", [x], [], doubled)[0].sum() == 6


def test_too_little_memory_for_a_graph_does_not_end_the_step():
    own, x, calls = Graphs(), torch.ones(3, device=DEVICE), []

    def fills(inputs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * inputs[0]]

    own.run("key", [x], [], fills)
    with pytest.warns(UserWarning, match="out of memory"):
        assert own.run("key", [x], [], fills)[0].sum() == 6
    assert own.run("key", [x], [], fills)[0].sum() == 6 and len(calls) == 4


def test_graphs_give_their_memory_to_a_pass_that_has_too_little():
    own, x, calls = Graphs(), torch.ones(3, device=DEVICE), []

    def needs_all(inputs):
        calls.append(inputs)
        drawn = torch.rand(3, device=DEVICE)
        if any(graph() is not None for graph in held):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [inputs[0] + drawn]

    for _ in range(3):
        own.run("key", [x], [], doubled)
    held = [weakref.ref(graph) for graph in own._graphs.values() if isinstance(graph, captured_graph.Graph)]
    assert len(held) == 1
    torch.manual_seed(7)
    (found,) = own.run("other", [x], [], needs_all)
    torch.manual_seed(7)
    assert torch.equal(found, x + torch.rand(3, device=DEVICE)) and not own._graphs and len(calls) == 2
    held.append(lambda: 1)
    with pytest.raises(torch.OutOfMemoryError):
        own.run("other", [x], [], needs_all)
    assert len(calls) == 3  # without graphs a second time is no better


@pytest.mark.parametrize("change", ["weights", "settings"])
@pytest.mark.parametrize("guessed", [False, True])
def test_a_graph_that_is_not_the_right_one_gives_its_memory(change, guessed, monkeypatch):
    own, x = Graphs(), torch.ones(3, device=DEVICE)

    def run(key, compute):
        ahead = own.ahead("mode", x) if guessed else None
        launched.append(ahead is not None and ahead.launch is not None)
        return own.run(key, [x], [], compute, ahead)

    def needs_all(inputs):
        gc.collect()
        if held() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return doubled(inputs)

    launched = []
    for _ in range(5):
        run("key", doubled)
    (held,) = [weakref.ref(graph) for graph in own._graphs.values() if isinstance(graph, captured_graph.Graph)]
    if change == "weights":
        monkeypatch.setattr(captured_graph.Graph, "holds", lambda graph: False)
    assert run("key" if change == "weights" else "other", needs_all)[0].sum() == 6
    assert launched[-1] == guessed


def test_a_graph_is_not_held_by_results_whose_backward_pass_is_over():
    model = prepared(model_of(), image_of())
    loss, graph = model(image_of()).sum(), weakref.ref(graphs_of(model)[0])
    coverage.kept(model)["graphs"]._drop_all()
    gc.collect()
    assert graph() is not None
    loss.backward()
    gc.collect()
    assert graph() is None and loss.grad_fn is not None


def test_only_some_graphs_are_kept():
    own = Graphs()
    for batch in range(1, 40):
        for _ in range(3):
            assert own.run("key", [torch.ones(batch, device=DEVICE)], [], doubled)[0].sum() == 2 * batch
    assert len(own._graphs) == graphs.MOST


def test_a_copy_of_a_model_has_graphs_of_its_own():
    model = prepared(model_of(), image_of())
    copy = deepcopy(model)
    assert isinstance(copy, InsVPViT) and not graphs_of(copy)
    found = [trained_gradients(copy, image_of(seed=s), s) for s in range(3)]
    assert_same(found[2], direct(model, trained_gradients, model, image_of(seed=2), 2))
    assert graphs_of(copy)[0] is not graphs_of(model)[0]


def test_guesses_for_parameters_that_are_elsewhere_hold_nothing():
    model = model_of()
    for batch in (1, 2):
        expected(model, image_of(batch), gradients=False)
    own = coverage.kept(model)["graphs"]
    assert len(own._guesses) == 2
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    expected(model, image_of(), gradients=False, calls=1)
    assert coverage.kept(model)["graphs"] is own and not own._guesses
