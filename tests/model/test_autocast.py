"""All combinations of dtypes: results have the dtypes of the reference's, and what PyTorch refuses is refused."""

import copy
import itertools

import pytest
import torch

from insvp_fast import InsVPConfig
from insvp_fast.testing import DEVICE, make_pair, relative_error, trained_gradients
from tests.model.parity import DRAWS, assert_errors_within_budget

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
    pairs = [make_pair("vit_tiny_patch16_224", CONFIGS[config], **TINY) for _ in range(DRAWS)]
    pixels = [torch.randn(2, 3, 32, 32, device=DEVICE) for _ in pairs]
    exact = [numbers(copy.deepcopy(pair[0]).double(), x.double(), None) for pair, x in zip(pairs, pixels, strict=True)]
    for modules, image in itertools.product(DTYPES, DTYPES):
        if image == DTYPES[0]:
            converted = [[copy.deepcopy(model).to(modules) for model in pair] for pair in pairs]
        what, draws = f"modules in {modules}, image in {image}: ", []
        for pair, x, truth in zip(converted, pixels, exact, strict=True):
            expected, values = (numbers(model, x.to(image), amp) for model in pair)
            if isinstance(expected, Exception):
                assert isinstance(values, Exception), f"{what}the reference says {expected}"
                break
            assert not isinstance(values, Exception), f"{what}{values}"
            draws.append((values, expected, truth))
        lowest = min((modules, image, amp or modules), key=lambda dtype: -torch.finfo(dtype).eps)
        if lowest != torch.float64:
            assert_errors_within_budget(draws, lowest, what)
            continue
        for values, expected, truth in draws:
            for name, value in values.items():  # nothing is more precise: allowed is what 1e-5 is in fp32
                allowed = 1e-5 * torch.finfo(lowest).eps / torch.finfo(torch.float32).eps
                assert value.dtype == expected[name].dtype, f"{what}{name}"
                assert relative_error(value, truth[name]) < allowed, f"{what}{name}"


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_common_prompts_of_another_dtype(dtype, amp):
    """Also the other one of 16 bits, which autocast does not stack; a second pass may go another way than the first."""
    draws = []
    for _ in range(DRAWS):
        reference, fast = make_pair("vit_tiny_patch16_224", CONFIGS["VPT-Deep"], **TINY)
        for model in (reference, fast):
            model.common_prompts.to(dtype)
        image = torch.randn(2, 3, 32, 32, device=DEVICE)
        exact = numbers(copy.deepcopy(reference).double(), image.double(), None)
        with torch.no_grad(), torch.autocast(DEVICE.type, amp):
            first, again = fast(image), fast(image)
        assert torch.equal(first, again)
        draws.append((numbers(fast, image, amp), numbers(reference, image, amp), exact))
    assert_errors_within_budget(draws, amp)
