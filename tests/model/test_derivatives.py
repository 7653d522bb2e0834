"""Gradients are of the first order: any other derivative is an error that names the operation and what to use."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from insvp_fast import InsVPConfig, ops, unsupported_reason
from insvp_fast.runtime import torch_private
from insvp_fast.testing import DEVICE, make_pair, relative_error


def operations():
    image, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 16)
    prompter = torch.randn(5, 48), torch.randn(5), torch.randn(48, 5), torch.randn(48)
    kernel, w1, w2, qkv = torch.randn(2, 3, 3, 3), torch.randn(32, 16), torch.randn(16, 32), torch.randn(48, 16)
    return {
        "superpose": (lambda x: ops.superpose(x, None, ops.PatchWeights(*prompter), ops.Blend(4, 0.7, 0.3)), image),
        "norm_insert": (lambda x: ops.norm_insert(x, None, None, None, None, 1e-6)[1], tokens),
        "attention": (lambda x: ops.attention(x, 1, 3, 0.5), torch.randn(2, 5, 48)),
        "query_attention": (lambda x: ops.query_attention(x[:, :2], x.repeat(1, 1, 2), 2, 0.5), tokens),
        "linear": (lambda x: ops.linear(x, ops.FrozenLinear(w1)), tokens),
        "project_q_kv": (lambda x: ops.project_q_kv(x, 2, ops.FrozenLinear(qkv))[1], tokens),
        "mlp": (lambda x: ops.mlp(x, ops.FrozenLinear(w1), ops.FrozenLinear(w2)), tokens),
        "conv": (lambda x: ops.conv(x, kernel, torch.zeros(2), 1, 8, 8), image),
        "dropout": (lambda x: ops.dropout(x, 0.5), tokens),
        "conv_pool": (lambda x: ops.conv_pool(x, kernel, torch.zeros(2), 8, 8, 2), image),
    }


def forward_mode(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "vmap": lambda f, x: torch.func.vmap(lambda row: f(row[None])[0])(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("operation", operations())
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(operation, transform):
    f, x = operations()[operation]
    message = rf"insvp_fast\.ops\.{operation} cannot run inside a transform of torch\.func .*: use InsVPReference, or "
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[transform](f, x)


def test_forward_mode_is_refused_only_for_tensors_with_a_tangent():
    f, x = operations()["linear"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert torch_private.transforming(None, dual) and not torch_private.transforming(x)
        assert torch.equal(f(x), f(x.clone()))


@pytest.mark.parametrize("loss", [torch.sum, torch.norm], ids=["linear", "not linear"])
@pytest.mark.parametrize("operation", operations())
def test_a_gradient_is_not_differentiated_again(operation, loss):
    """Also where the loss is linear in the result, so that autograd itself would see no dependence on the input."""
    f, x = operations()[operation]
    x.requires_grad_()
    torch.manual_seed(0)  # of dropout
    (grad,) = torch.autograd.grad(loss(f(x)), x, create_graph=True)
    torch.manual_seed(0)
    (plain,) = torch.autograd.grad(loss(f(x)), x)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match=rf"gradient of insvp_fast\.ops\.{operation} cannot be .*use InsVPReference"):
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("operation", operations())
def test_a_gradient_is_not_differentiated_again_by_some_inputs(operation):
    """Nor is a part of such a derivative left out silently, where the loss itself has a gradient too."""
    f, x = operations()[operation]
    loss = f(x.requires_grad_()).norm()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    total, message = loss + grad.square().sum(), rf"gradient of insvp_fast\.ops\.{operation} cannot be .*"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(total, x, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        total.backward(inputs=[x])


BATCHED = {
    "is_grads_batched": lambda y, x, g: torch.autograd.grad(y, x, g, is_grads_batched=True),
    "vmap": lambda y, x, g: torch.vmap(lambda one: torch.autograd.grad(y, x, one))(g),
}


@pytest.mark.parametrize("how", BATCHED)
@pytest.mark.parametrize("operation", operations())
def test_a_gradient_is_of_one_loss(operation, how):
    f, x = operations()[operation]
    y = f(x.requires_grad_())
    message = rf"gradient of insvp_fast\.ops\.{operation} is of one loss, not of a batch of them: use InsVPReference"
    with pytest.raises(RuntimeError, match=message):
        BATCHED[how](y, x, torch.randn(3, *y.shape))


def test_a_models_gradient_is_not_differentiated_again():
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    _, model = make_pair("vit_tiny_patch16_224", InsVPConfig(prompt_length=2), 3, **kwargs)
    loss = model(torch.randn(2, 3, 32, 32, device=DEVICE)).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained, create_graph=True)
    total, message = sum(g.square().sum() for g in grads), r"gradient of insvp_fast\.ops\.\w+ cannot be .*use InsVPRef"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(total + loss, trained, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        total.backward()


@pytest.mark.parametrize("loss", [torch.sum, torch.norm], ids=["linear", "not linear"])
def test_no_part_of_the_derivative_of_a_models_gradient_is_left_out(loss):
    """In each pass, of which the first is recorded and the others are replayed."""
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    _, model = make_pair("vit_tiny_patch16_224", InsVPConfig(prompt_length=2), 3, **kwargs)
    for _ in range(3):
        image = torch.randn(2, 3, 32, 32, device=DEVICE, requires_grad=True)
        first = loss(model(image))
        (grad,) = torch.autograd.grad(first, image, create_graph=True)
        with pytest.raises(RuntimeError, match=r"gradient of insvp_fast\.ops\.\w+ cannot be .*use InsVPReference"):
            torch.autograd.grad(first + grad.square().sum(), image)


def test_an_older_pytorch_raises_its_own_error(monkeypatch):
    monkeypatch.setattr(torch_private, "_in_transform", lambda: False)
    f, x = operations()["linear"]
    with pytest.raises(RuntimeError, match="setup_context"):
        TRANSFORMS["grad"](f, x)


def gradients_of(model, image, exchange=False):
    """With ``exchange`` frozen weights have other memory in the backward pass, as averaged ones may have it, or those
    that come back from another device."""
    model.zero_grad()
    loss = model(image).square().sum()
    names = ("blocks.", "layers.", "patch_embed.proj.")  # the norm behind them is PyTorch's own
    frozen = [p for name, p in model.backbone.named_parameters() if name.startswith(names)]
    frozen += [model.patch_prompter.fc1.weight, model.patch_prompter.fc2.weight]
    before = [p.data for p in frozen]
    for p, own in zip(frozen, before, strict=True):
        p.data = 1.5 * own if exchange else own
    loss.backward()
    for p, own in zip(frozen, before, strict=True):
        p.data = own
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


BACKBONES = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}),
    "one query": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 1},
    ),
    "EVA": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "num_heads": 3, "depth": 2}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)},
    ),
}
HOOKS = {
    "programs": contextlib.nullcontext(),
    "a hook": saved_tensors_hooks(lambda x: x, lambda x: x),  # with which there are no programs
    "copies": saved_tensors_hooks(torch.clone, lambda x: x),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_gradients_are_those_of_the_pass_that_ran(kind, hook):
    name, arguments = BACKBONES[kind]
    _, fast = make_pair(name, InsVPConfig(prompt_length=3, global_dropout=0), **arguments)
    image = torch.randn(2, 3, *fast.backbone.patch_embed.img_size, device=DEVICE)
    expected = gradients_of(fast, image)
    for _ in range(3):
        with HOOKS[hook]:
            found = gradients_of(fast, image, exchange=True)
        assert relative_error(found, expected) < 1e-6
    assert unsupported_reason(fast) is None


def test_a_checkpoint_gives_its_tensors_once():
    """Also for a gradient with a graph; what it computes again is of the weights that there are then."""
    weight, x = nn.Parameter(torch.randn(7, 16), requires_grad=False), torch.randn(2, 5, 16, requires_grad=True)
    results = []
    for linear in (F.linear, lambda x, w: ops.linear(x, ops.FrozenLinear(w))):
        out = checkpoint(lambda x, linear=linear: linear(x.tanh(), weight).tanh(), x, use_reentrant=False)
        results += torch.autograd.grad(out.sum(), x, create_graph=True)
        out = checkpoint(lambda x, linear=linear: linear(x, weight).tanh(), x, use_reentrant=False)
        own = weight.data
        weight.data = 1.5 * own
        results += torch.autograd.grad(out.sum(), x)
        weight.data = own
    for found, expected in zip(results[2:], results[:2], strict=True):
        assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_a_graph_of_gradients_may_be_made_where_activations_are_computed_again(recompute):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    _, model = make_pair("vit_tiny_patch16_224", InsVPConfig(prompt_length=2, global_dropout=0), 3, **kwargs)
    image, trained = torch.randn(2, 3, 32, 32, device=DEVICE), [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(image).square().sum(), trained)
    model.recompute = recompute
    for _ in range(3):
        found = torch.autograd.grad(model(image).square().sum(), trained, create_graph=True)
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) < 1e-5


def test_memory_that_was_given_back_or_written_is_not_read():
    """As sharded training gives it back, and what a hook has saved elsewhere before a write remains."""
    x, own = torch.randn(2, 5, 16, requires_grad=True), torch.randn(7, 16)
    for end in (lambda w: w.data.untyped_storage().resize_(0), lambda w: w.zero_()):
        weight = nn.Parameter(own.clone(), requires_grad=False)
        with saved_tensors_hooks(torch.clone, lambda t: t):
            out = ops.linear(x, ops.FrozenLinear(weight))
        end(weight)
        weight.data = own.clone()
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert relative_error(grad, own.sum(0).expand_as(x)) < 1e-6


def test_a_gradient_with_other_memory_is_that_of_pytorch():
    weight, x = nn.Parameter(torch.randn(7, 16), requires_grad=False), torch.randn(2, 5, 16, requires_grad=True)
    results = []
    for linear in (F.linear, lambda x, w: ops.linear(x, ops.FrozenLinear(w))):
        out, own = linear(x, weight), weight.data
        weight.data = 1.5 * own
        results += torch.autograd.grad(out.square().sum(), x)
        weight.data = own
    assert relative_error(*reversed(results)) < 1e-6
