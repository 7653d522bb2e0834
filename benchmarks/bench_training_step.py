"""A training step and an inference: the bare frozen timm ViT, the reference and the fast model."""

import pytest
import torch

from benchmarks import steps
from insvp_fast import cpu
from insvp_fast.testing import relative_error, saved_bytes

ON_CPU = steps.DEVICE.type == "cpu"
NAME, BATCH = ("vit_small_patch16_224", 2) if ON_CPU else ("vit_base_patch16_224", 256)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("job", [steps.training_step, steps.inference], ids=lambda job: job.__name__)
@pytest.mark.parametrize("provider", steps.PROVIDERS)
def bench_step(benchmark, provider, job, precision):
    amp = PRECISIONS[precision]
    if ON_CPU and amp is not None and not cpu.has_products(amp) and provider != "insvp_fast":
        pytest.skip(
            "without bf16 instructions PyTorch's own bf16 products take minutes; benchmarks/paired.py times them"
        )
    benchmark.group = f"{NAME} {job.__name__} {precision} batch {BATCH}"
    model = steps.make_model(provider, NAME)
    run = job(model, BATCH, amp)
    if provider == "insvp_fast":
        exact = steps.make_model("reference", NAME).double().eval()
        exact.load_state_dict(model.state_dict())
        image, _ = steps.make_images(model, BATCH)
        error = relative_error(steps.inference(model, BATCH, amp)(), exact(image.double()))
        assert error < (1e-5 if amp is None else 3e-2)
        model.train()
    benchmark.pedantic(run, rounds=3 if ON_CPU else 20, warmup_rounds=1)
    if job is steps.training_step:
        image, _ = steps.make_images(model, 1)
        image.requires_grad_(provider == "bare")
        benchmark.extra_info["saved MB per image"] = saved_bytes(model, image, amp) / 1e6
    if benchmark.stats is not None:
        benchmark.extra_info["images/s"] = BATCH / benchmark.stats.stats.median
