"""AdapterBank with a ViT-B/16: a batch of 8 images of 8 adapters beside 8 images of one; runs alternate."""

import copy

import pytest
import torch

from insvp_fast import AdapterBank, InsVPConfig, InsVPViT
from insvp_fast.bench.jobs import AUTOCAST_DTYPES
from insvp_fast.bench.models import NUM_CLASSES, make_images
from insvp_fast.bench.timing import alternate, summarize
from insvp_fast.testing import DEVICE, relative_error

BATCH = 8
LENGTHS = {"eight adapters": [9] * BATCH, "eight adapters of five lengths": [9, 1, 16, 0, 20, 9, 16, 1]}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return InsVPViT("vit_base_patch16_224", NUM_CLASSES).backbone


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("names", LENGTHS)
def bench_bank(benchmark, tiny, backbone, names, precision):
    benchmark.group = f"{BATCH} images, {precision}"
    backbone = copy.deepcopy(backbone)
    if tiny:
        backbone.blocks = backbone.blocks[:1]
    bank = AdapterBank(backbone)
    for i, length in enumerate(LENGTHS[names]):
        bank.add(f"{i}", InsVPViT(bank.backbone, NUM_CLASSES, InsVPConfig(prompt_length=length)))
    bank.to(DEVICE)
    image, _ = make_images(bank, BATCH)
    amp = AUTOCAST_DTYPES[precision]

    def run(adapters):
        with torch.inference_mode(), torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            return bank(image, adapters)

    mixed = list(bank.adapters)
    out = benchmark.pedantic(run, [mixed], rounds=3, warmup_rounds=1)
    with torch.inference_mode(), torch.autocast(DEVICE.type, amp, enabled=amp is not None):
        alone = torch.cat([bank.adapters[name](x[None]) for name, x in zip(mixed, image, strict=True)])
    assert relative_error(out, alone) < (1e-5 if amp is None else 2e-2)
    if benchmark.stats is not None:
        seconds = alternate({"one": lambda: run("0"), "mixed": lambda: run(mixed)}, rounds=9)
        ratios = summarize(seconds["mixed"], seconds["one"])
        benchmark.extra_info |= {f"{key} to one adapter": value for key, value in ratios.items() if key != "seconds"}
