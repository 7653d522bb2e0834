"""The image prompt, unfolded: reference eager and compiled against the operation, forward and forward + backward."""

import functools

import pytest
import torch

from benchmarks.steps import DEVICE, finished
from insvp_fast import ops, reference
from insvp_fast.testing import relative_error

BATCH = 8 if DEVICE.type == "cpu" else 256
P, R, K = 16, 16, 768


def providers():
    compiled = torch.compile(reference.superpose, dynamic=False)
    return {"reference": reference.superpose, "reference compiled": compiled, "insvp_fast": ops.superpose}


@functools.cache
def inputs(dtype):
    images = [torch.randn(BATCH, 3, 224, 224, device=DEVICE).to(dtype) for _ in range(2)]
    weights = [torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5 for shape in ((R, K), (R,), (K, R), (K,))]
    return images, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("provider", ["reference", "reference compiled", "insvp_fast"])
def bench_superpose(benchmark, provider, direction, dtype):
    benchmark.group = f"superpose {direction} {dtype}"
    (image, prompt), weights = inputs(dtype)
    weights = [w.to(dtype) for w in weights] if provider != "insvp_fast" else weights  # as autocast would
    function = providers()[provider]
    operands = [prompt, *weights]
    if direction != "forward":
        operands = [t.detach().clone().requires_grad_() for t in operands]

    def run():
        out = function(image, *operands, P, 0.7, 0.3)
        results = (out,) if direction == "forward" else torch.autograd.grad(out, operands, grad)
        finished(out.detach())
        return results

    grad = torch.randn(BATCH, 196, K, device=DEVICE).to(dtype)
    results = benchmark.pedantic(run, rounds=10, warmup_rounds=3)
    wide = [t.detach().double().requires_grad_() for t in (prompt, *inputs(dtype)[1])]
    exact = (reference.superpose(image.double(), *wide, P, 0.7, 0.3),)
    if direction != "forward":
        exact = torch.autograd.grad(exact, wide, grad.double())
    for result, expected in zip(results, exact, strict=True):
        assert relative_error(result, expected) < 20 * torch.finfo(dtype).eps
    # image and prompt in, tokens out; backward: gradient and image in, the prompt's gradient out
    bytes_moved = image.nbytes * (3 if direction == "forward" else 6)
    benchmark.extra_info["bytes"] = bytes_moved
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = bytes_moved / benchmark.stats.stats.median / 1e9
