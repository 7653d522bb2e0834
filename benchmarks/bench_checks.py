"""The checks before each forward pass of a ViT-B/16, beside the forward pass of one image.

They ask whether the fast path covers the model and whether its packed weights are up to date. Each is timed after a
forward pass, which has taken the caches for itself, as it is in a loop.
"""

import pytest
import torch

from insvp_fast import InsVPViT, coverage
from insvp_fast.runtime import fingerprint, prepack


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def warm(request):
    """A model whose weights are packed, and its forward pass."""
    prepack.clear()
    model = InsVPViT("vit_base_patch16_224", num_classes=100).eval()
    image = torch.randn(1, 3, 224, 224)

    def forward():
        with torch.no_grad(), torch.autocast("cpu", enabled=request.param == "bf16"):
            return model(image)

    forward()
    return model, forward


def covered_modules(model):
    return model, model.global_prompter, model.patch_prompter, model.specific_prompter


def after(forward, benchmark, check):
    def setup():
        forward()

    return benchmark.pedantic(check, setup=setup, rounds=31)


@pytest.mark.benchmark(group="checks of a forward pass")
def bench_coverage(benchmark, warm):
    model, forward = warm
    assert after(forward, benchmark, lambda: all(map(coverage.covers, covered_modules(model))))


@pytest.mark.benchmark(group="checks of a forward pass")
def bench_packed_weights(benchmark, warm):
    _, forward = warm
    held = [record.fingerprint for record in prepack._records.values()]
    assert len(held) == 12 * 4 + 2  # four products a block, the patch embedding, positions with the class token
    assert not after(forward, benchmark, fingerprint.look_at(held))


@pytest.mark.benchmark(group="checks of a forward pass")
def bench_forward(benchmark, warm):
    _, forward = warm
    assert benchmark.pedantic(forward, rounds=7).isfinite().all()
