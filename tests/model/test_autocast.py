"""All combinations of dtypes: results have the dtypes of the reference's, and what PyTorch refuses is refused."""

import copy
import itertools

import pytest
import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, unsupported_reason
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


SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
IMAGE = {"img_size": 32, "patch_size": 8, "num_classes": 0}
FAMILIES = {
    "ViT": lambda positions, **rest: VisionTransformer(**IMAGE, pos_embed="learn" if positions else "none", **rest),
    "Eva": lambda positions, **rest: Eva(**IMAGE, use_abs_pos_emb=positions, use_rot_pos_emb=True, **rest),
    "relative positions": lambda positions, **rest: VisionTransformerRelPos(**IMAGE, **rest),
    "NaFlex": lambda positions, **rest: NaFlexVit(
        NaFlexVitCfg(pos_embed="learned" if positions else "none", patch_size=8, reg_tokens=0, **rest),
        img_size=32,
        num_classes=0,
    ),
}


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_without_a_class_token_have_the_dtype_of_timms(family, positions, layer_scale):
    """Autocast casts products alone: what else is added to the tokens decides over their dtype."""
    backbone = FAMILIES[family](positions, init_values=layer_scale, **SIZES)
    fast, reference = InsVPViT(backbone, 0).eval(), InsVPReference(backbone, 0).eval()
    reference.load_state_dict(fast.state_dict())
    assert unsupported_reason(fast) is None
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(image.double())
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = fast.forward_features(image), reference.forward_features(image)
            errors = [relative_error(model(image), exact) for model in (fast, reference)]
    assert found.dtype == expected.dtype
    assert errors[0] < 2 * errors[1]
