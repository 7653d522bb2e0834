"""Inputs with NaN or infinity: the same numbers are finite as in the same formulas computed by PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from insvp_fast import InsVPConfig, ops
from insvp_fast.ops import Blend, FrozenLinear, PatchWeights
from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.ops.conv import conv_reference
from insvp_fast.ops.heads import merge_heads, split_packed
from insvp_fast.ops.norm_insert import norm_insert_reference
from insvp_fast.ops.superpose import superpose_reference
from insvp_fast.runtime import native
from insvp_fast.testing import DEVICE, make_pair

F32, BF16 = torch.float32, torch.bfloat16
BAD = torch.tensor([torch.nan, torch.inf, -torch.inf])

pytestmark = pytest.mark.usefixtures("poison")


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def spoil(x: torch.Tensor) -> torch.Tensor:
    """Make up to three numbers NaN or infinite, in place."""
    for _ in range(number(1, 3)):
        x.view(-1)[number(0, x.numel() - 1)] = BAD[number(0, 2)]
    return x


# Each returns a formula, its operation, their inputs, how many of the inputs may be spoiled, and further arguments.


def draw_superpose():
    P, C, R, grid = number(2, 7), number(1, 3), number(1, 6), (number(1, 3), number(1, 3))
    K, shape = C * P * P, (2, C, grid[0] * P, grid[1] * P)
    shapes = shape, shape, (R, K), (R,), (K, R), (K,)

    def taking(function):
        return lambda image, prompt, *weights: function(image, prompt, PatchWeights(*weights), Blend(P, 0.7, 0.3))

    return taking(superpose_reference), taking(ops.superpose), [torch.randn(s) for s in shapes], 2, ()


def draw_norm_insert():
    D, T, L = number(1, 40), number(1, 6), number(1, 3)
    inputs = [torch.randn(2, n, D) for n in (T, T, L)]
    # the affine map is finite and nowhere 0: only such a map may be folded into the next product
    return norm_insert_reference, ops.norm_insert, inputs, 3, (torch.rand(D) + 1, torch.randn(D), 1e-6)


def draw_attention():
    heads, d, S = number(1, 3), number(1, 20), number(1, 60)
    shape = heads, number(1, S), 0.4
    return attention_reference, ops.attention, [torch.randn(2, S, 3 * heads * d)], 1, shape


def draw_query_attention():
    heads, d, S = number(1, 3), number(1, 20), number(1, 30)

    def formula(q, kv, heads, scale):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
        return merge_heads((scale * q @ k.mT).softmax(-1) @ v)

    inputs = [torch.randn(2, number(1, S), heads * d), torch.randn(2, S, 2 * heads * d)]
    return formula, ops.query_attention, inputs, 2, (heads, 0.4)


def draw_absorbed_attention():
    heads, d, S, E = number(1, 3), number(1, 20), number(1, 30), number(1, 30)
    T = number(1, S)

    def formula(x, weight, bias):
        q, k, v = split_packed(F.linear(x, weight, bias), heads)
        return merge_heads((0.4 * q[:, :, :T] @ k.mT).softmax(-1) @ v)

    def operation(x, weight, bias):
        return ops.absorbed_attention(x, T, FrozenLinear(weight, bias), heads, 0.4)

    return formula, operation, [torch.randn(2, S, E)], 1, (torch.randn(3 * heads * d, E), torch.randn(3 * heads * d))


def draw_linear():
    weight, bias = torch.randn(number(1, 50), number(1, 50)), torch.randn(1)
    bias = bias.expand(len(weight)).contiguous()
    return (
        F.linear,
        lambda x, *w: ops.linear(x, FrozenLinear(*w)),
        [torch.randn(2, number(1, 40), weight.shape[1])],
        1,
        (weight, bias),
    )


def draw_mlp():
    D, M = number(1, 40), number(1, 50)
    weights = torch.randn(M, D), torch.randn(M), torch.randn(D, M), torch.randn(D)
    keep = ops.mlp.__globals__["KEEP"][number(0, 2)]

    def formula(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    return (
        formula,
        lambda x, *w: ops.mlp(x, FrozenLinear(*w[:2]), FrozenLinear(*w[2:]), keep=keep),
        [torch.randn(2, number(1, 40), D)],
        1,
        weights,
    )


def draw_conv():
    C, out, k, H, W = number(1, 4), number(1, 4), 2 * number(0, 3) + 1, number(3, 40), number(3, 40)
    inputs = [torch.randn(2, C, H, W), torch.randn(out, C, k, k), torch.randn(out)]
    return conv_reference, ops.conv, inputs, 1, (number(1, 4), number(1, H), number(1, W), bool(number(0, 1)))


def draw_conv_pool():
    C, out, k, pool = number(1, 4), number(1, 4), 2 * number(0, 3) + 1, number(1, 4)
    height, width = pool * number(1, 9), pool * number(1, 9)

    def formula(x, weight, bias, height, width, pool):
        y = conv_reference(x, weight, bias, 1, height, width, False)
        return F.leaky_relu(F.max_pool2d(y, pool))

    inputs = [
        torch.randn(2, C, height + number(0, 3), width + number(0, 3)),
        torch.randn(out, C, k, k),
        torch.randn(out),
    ]
    return formula, ops.conv_pool, inputs, 1, (height, width, pool)


def values(function, inputs, constants, grads, dtype=None):
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*(inputs if dtype is None else [t.to(dtype) for t in inputs]), *constants)
    out = out if isinstance(out, tuple) else (out,)
    return [*out, *torch.autograd.grad(out, inputs, [g.to(o) for g, o in zip(grads, out, strict=True)])]


DRAWS = [draw_superpose, draw_norm_insert, draw_attention, draw_query_attention, draw_absorbed_attention]
DRAWS += [draw_linear, draw_mlp, draw_conv, draw_conv_pool]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("draw", DRAWS)
def test_operations(isa, draw, dtype):
    for seed in range(12):
        torch.manual_seed(seed)
        formula, operation, inputs, spoiled, constants = draw()
        with torch.no_grad():
            out = formula(*inputs, *constants)
        grads = [torch.randn(o.shape) for o in (out if isinstance(out, tuple) else (out,))]
        where = number(0, 2)
        maps = [spoil(t).to(dtype) if where != 0 else t.to(dtype) for t in inputs[:spoiled]]
        grads = [spoil(g).to(dtype) if where != 1 else g.to(dtype) for g in grads]
        inputs = [*maps, *inputs[spoiled:]]
        expected = values(formula, inputs, constants, grads, F32)
        for value, exact in zip(values(operation, inputs, constants, grads), expected, strict=True):
            assert torch.equal(value.isfinite(), exact.isfinite()), f"seed {seed}, {constants}"


@pytest.mark.parametrize("draw", [draw_conv, draw_conv_pool])
def test_convolutions_by_weights_that_are_not_finite(isa, draw):
    for seed in range(24):
        torch.manual_seed(seed)
        formula, operation, (x, weight, bias), _, constants = draw()
        inputs = [x, spoil(weight), bias]
        grads = [torch.randn_like(formula(*inputs, *constants))]
        expected = values(formula, inputs, constants, grads)
        for value, exact in zip(values(operation, inputs, constants, grads), expected, strict=True):
            assert torch.equal(value.isfinite(), exact.isfinite()), f"seed {seed}, {constants}"


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_the_maximum_of_a_window_with_nan_is_nan(pool, size):
    """The gradient goes to the last NaN of the window, as in PyTorch."""
    x = torch.randn(2, 1, pool * size, pool * size)
    x[torch.rand(x.shape) < 0.3] = torch.nan
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    grads = []
    for function in (ops.conv_pool, lambda x, w, b, h, v, p: F.leaky_relu(F.max_pool2d(x, p))):
        x = x.detach().requires_grad_()
        y = function(x, weight, bias, pool * size, pool * size, pool)
        grads += torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(*grads)


VARIANTS = [
    {},
    {"specific_input": "prompted"},
    {"patch_prompt": False},
    {"global_prompt": False, "patch_prompt": False},
    {"specific_prompt": False, "simam": True},
]
SETTINGS = [{}, {"recompute": "mlp"}, {"recompute": "block"}, {"gelu_in_8_bits": True}, {"fold_norm": False}]


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_models(variant, pool, autocast):
    """One bad pixel in one of two images, also at the border; the loss is that of both images or of one."""
    kwargs = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": pool}
    models = make_pair("vit_tiny_patch16_224", InsVPConfig(prompt_length=2, **variant), 3, **kwargs)
    for i, settings in enumerate(SETTINGS):
        for name, value in settings.items():
            setattr(models[1], name, value)
        image = torch.randn(2, 3, 64, 64, device=DEVICE)
        row, column = (0, 63)[i % 2] if i < 2 else number(0, 63), number(0, 63)
        image[1, number(0, 2), row, column] = BAD[i % 3]
        rows = (slice(None), slice(1), slice(1, 2))[i % 3]
        expected, fast = (finite(model, image, rows, autocast) for model in models)
        assert expected["logits"].tolist() == [[True] * 3, [False] * 3]
        for what, mask in expected.items():
            assert torch.equal(fast[what], mask), f"{what}, {settings}"


def finite(model, image, rows, autocast):
    image = image.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast(DEVICE.type, BF16, enabled=autocast is not None):
        logits = model(image)
    logits[rows].float().square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: t.isfinite() for name, t in {"logits": logits, "image": image.grad, **trained}.items()}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gelu_of_numbers_of_every_size(isa, dtype):
    """Also where powers of the argument underflow or overflow."""
    x = torch.logspace(-44, 38, 400, dtype=torch.float64).to(dtype)
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 3.3e38, -3.3e38, *BAD]).to(dtype)])
    one, packed = torch.ones(len(x), 1, dtype=dtype), native.pack_linear(torch.eye(1), dtype)
    pre, hidden = native.linear_activation(x[:, None], packed, None, 1)
    slope = native.linear_activation_bwd(one, packed, pre)
    x = pre.double()
    normal, density = torch.special.erfc(-x * 0.5**0.5) / 2, (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    # rounding of the result and of the exponent x²/2; for the derivative also of its two terms, which cancel
    for value, expected, terms in ((hidden, x * normal, 0), (slope, normal + x * density, 1)):
        finite = expected.isfinite()
        assert torch.equal(value.isfinite(), finite)
        allowed = torch.finfo(dtype).eps * ((4 + x.square()) * expected.abs() + terms)
        # tails: below this the distribution function is 0, or in 16 bits has the error of 1 + erf(x) in fp32
        allowed += 2.0**-120 if dtype == F32 else torch.finfo(F32).eps
        assert ((value - expected).abs() <= allowed)[finite].all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [1e-20, 1e4, 1e9, 1e15, 1e18, 1e25])
def test_attention_with_scores_of_every_size(isa, dtype, size):
    """A row is NaN where a score overflows, as in PyTorch; with large finite scores one key gets all the weight."""
    qkv = (size * torch.randn(2, 9, 3 * 16)).to(dtype)
    with torch.no_grad():
        value, expected = (run(qkv, 2, 9, 0.4) for run in (native.attention_fwd, attention_reference))
    assert torch.equal(value.isfinite(), expected.isfinite())
    grad = torch.randn(2, 9, 16).to(dtype)
    d_qkv, expected = native.attention_bwd(grad, qkv, 2, 9, 0.4), attention_bwd_reference(grad, qkv, 2, 9, 0.4)
    assert torch.equal(d_qkv.isfinite(), expected.isfinite())
