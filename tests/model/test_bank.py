"""AdapterBank: every image of a mixed batch has the result of its adapter's own model."""

import copy
import threading
import tracemalloc

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from insvp_fast import AdapterBank, InsVPConfig, InsVPReference, InsVPViT
from insvp_fast.errors import CheckpointError
from insvp_fast.methods import create_model
from insvp_fast.runtime import cuda_graphs
from insvp_fast.testing import DEVICE, assert_within_budget, relative_error

NO_IMAGE_PROMPT = {"global_prompt": False, "patch_prompt": False}
CONFIGS = {
    "three": InsVPConfig(prompt_length=3),
    "three more": InsVPConfig(prompt_length=3, image_weights=0.2),
    "released": InsVPConfig.released(prompt_length=5),  # its specific prompter reads the prompted image
    "first blocks": InsVPConfig(prompt_length=2, prompted_blocks=2, simam=True),
    "one block": InsVPConfig(prompt_length=7, prompted_blocks=(1,), specific_prompt=False),
    "VPT-Deep": InsVPConfig(prompt_length=4, specific_prompt=False, **NO_IMAGE_PROMPT),
    "image prompt": InsVPConfig(prompt_length=0),
    "linear probe": InsVPConfig(prompt_length=0, **NO_IMAGE_PROMPT),
    "carried": InsVPConfig(prompt_length=2, prompted_blocks=1, carry_prompts=True),
}
MIXED = [*(name for name in CONFIGS if name != "carried"), None, "three", None]
EQUAL = ["three", "three more", "three", "three", "three more"]  # as many prompts for each image


SIZES = {
    VisionTransformer: {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    SwinTransformer: {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)},
}


def make_backbone(cls=VisionTransformer, **kwargs):
    """A backbone of which no parameter is zero or one."""
    backbone = cls(**{"img_size": 32, "num_classes": 5} | SIZES[cls] | kwargs).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def make_bank(names=tuple(CONFIGS), **kwargs):
    """A bank, and the references that it has to agree with, by name; under None the timm model."""
    backbone = make_backbone(**kwargs)
    references, models = {None: copy.deepcopy(backbone).to(DEVICE)}, {}
    for classes, name in enumerate(names, 2):
        references[name] = InsVPReference(copy.deepcopy(backbone), classes, CONFIGS[name]).eval().to(DEVICE)
        models[name] = InsVPViT(copy.deepcopy(backbone), classes, CONFIGS[name])
        models[name].load_state_dict(references[name].state_dict())
    return AdapterBank.from_pretrained(backbone, models).to(DEVICE), references


def images(count):
    return torch.randn(count, 3, 32, 32, device=DEVICE)


def rows(references, names, image, features=False):
    """The result for each image by its reference alone."""
    each = zip(image, names, strict=True)
    run = [(references[name].forward_features if features else references[name], x[None]) for x, name in each]
    return [model(x)[0] for model, x in run]


@pytest.mark.parametrize("names", [MIXED, EQUAL, ["one block", None], [None] * 2, ["released"] * 3, []], ids=str)
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "qk_norm": True}, {"reg_tokens": 2}], ids=str)
@torch.no_grad()
def test_each_row_is_that_of_its_reference(names, options):
    bank, references = make_bank([*dict.fromkeys(filter(None, names))], **options)
    image = images(len(names))
    out, tokens = bank(image, names), bank.forward_features(image, names)
    exact = rows({name: copy.deepcopy(model).double() for name, model in references.items()}, names, image.double())
    exact_tokens = rows(references, names, image, features=True)
    assert out.shape == (len(names), max(map(len, exact), default=5))
    for row, expected in zip(out, exact, strict=True):
        assert relative_error(row[: len(expected)], expected) < 1e-5
        assert row[len(expected) :].eq(float("-inf")).all()
    for row, expected in zip(tokens, exact_tokens, strict=True):
        assert relative_error(row, expected) < 1e-5


@pytest.mark.parametrize("names", [MIXED, EQUAL], ids=["mixed", "equal"])
@torch.no_grad()
def test_each_row_in_bf16(names):
    bank, references = make_bank()
    image = images(len(names))
    exact = rows({name: copy.deepcopy(model).double() for name, model in references.items()}, names, image.double())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out, rough = bank(image, names), rows(references, names, image)
    values = torch.cat([row[: len(right)] for row, right in zip(out, exact, strict=True)])
    assert_within_budget(values, torch.cat(rough), torch.cat(exact), torch.bfloat16)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="cuDNN chooses its convolutions by the size of the batch")
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_the_same_bits_where_all_images_have_as_many_prompts(autocast):
    """Products of as many rows are computed alike; the prompters do not depend on the size of their batch."""
    bank, _ = make_bank(("three", "three more"))
    image = images(len(EQUAL))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        mixed = bank.forward_features(image, EQUAL)
        for name in ("three", "three more"):
            assert torch.equal(bank(image, name), bank.adapters[name](image))
            own = bank.adapters[name].forward_features(image)
            assert all(torch.equal(mixed[b], own[b]) for b, found in enumerate(EQUAL) if found == name)


@torch.no_grad()
def test_images_run_adapter_after_adapter_where_the_fast_path_does_not_cover_them():
    bank, references = make_bank(("three", "carried", "released"))
    names = ["three", "carried", None, "three"]
    image = images(4)
    out = bank(image, names)  # carried prompts are tokens of their own, which others in the batch do not have
    for row, expected in zip(out, rows(references, names, image), strict=True):
        assert relative_error(row[: len(expected)], expected) < 1e-5
    bank.backbone.blocks[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    for name in ("three", "released", None):
        model = references[name]
        getattr(model, "backbone", model).blocks[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    names = [None, "released", "three", "three"]
    with pytest.warns(UserWarning, match=r"AdapterBank takes the general path.*blocks\.1 has a hook"):
        out, tokens = bank(image, names), bank.forward_features(image, names)
    for row, expected in zip(out, rows(references, names, image), strict=True):
        assert relative_error(row[: len(expected)], expected) < 1e-5
    for row, expected in zip(tokens, rows(references, names, image, features=True), strict=True):
        assert relative_error(row, expected) < 1e-5


@torch.no_grad()
def test_only_equal_lengths_are_mixed_where_a_family_takes_no_padding():
    bank, references = make_bank(("three", "three more", "first blocks"), cls=SwinTransformer)
    for names, mixed in ((EQUAL, True), ([*EQUAL, "first blocks"], False), (["three", None], False)):
        image = images(len(names))
        assert bank._mixes(image, bank._groups(image, names)) == mixed
        for row, expected in zip(bank(image, names), rows(references, names, image), strict=True):
            assert relative_error(row[: len(expected)], expected) < 1e-5
    replaced, hooked = (bank.adapters[name] for name in ("three", "three more"))  # which may make any number of prompts
    replaced.specific_prompt = lambda image: InsVPViT.specific_prompt(replaced, image)
    hooked.specific_prompter.register_forward_hook(lambda module, args, out: out)
    fewer = bank.adapters["first blocks"].common_prompts
    fewer[0] = torch.nn.Parameter(fewer[0][:1], requires_grad=False)
    for name in ("three", "three more", "first blocks"):
        assert not bank._mixes(image, bank._groups(image, name))


class Doubled(InsVPViT):
    def __call__(self, image):
        return 2 * super().__call__(image)


@pytest.mark.parametrize(
    "double",
    [
        lambda model: setattr(model, "__class__", Doubled),
        lambda model: model.register_forward_hook(lambda module, args, out: 2 * out),
    ],
    ids=["class", "hook"],
)
@torch.no_grad()
def test_an_adapter_with_a_call_of_its_own_is_called(double):
    bank, _ = make_bank(("three", "three more"))
    image = images(len(EQUAL))
    before = bank(image, EQUAL)
    double(bank.adapters["three"])
    factors = torch.tensor([2.0 if name == "three" else 1.0 for name in EQUAL], device=DEVICE)
    torch.testing.assert_close(bank(image, EQUAL), before * factors[:, None])


@torch.no_grad()
def test_8_bit_images_are_normalized_as_each_adapter_says():
    bank, _ = make_bank(("three", "released"))
    bank.backbone.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    bank.adapters["three"].preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    out = bank(pixels, ["three", None, "released"])
    for b, facts in enumerate(({"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}, bank.backbone.pretrained_cfg)):
        mean, std = (torch.tensor(facts[key], device=DEVICE)[:, None, None] for key in ("mean", "std"))
        image = (pixels[b : b + 1] / 255 - mean) / std
        expected = bank(image, ["three", None][b])[0]
        assert relative_error(out[b, : len(expected)], expected) < 1e-5


@torch.no_grad()
def test_a_backbone_without_a_head_returns_its_features():
    bank, references = make_bank(("three",), num_classes=0)
    image = images(2)
    out = bank(image, ["three", None])
    assert out.shape == (2, 48) and relative_error(out[1:], references[None](image[1:])) < 1e-5
    torch.testing.assert_close(out.softmax(1)[0, :2], references["three"](image[:1])[0].softmax(0))


@torch.no_grad()
def test_a_cuda_graph_has_one_adapter(monkeypatch):
    bank, image = make_bank(["three"])[0], images(2)
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda device: True)
    assert [len(group.rows) for group in bank._groups(image, "three")] == [2]
    with pytest.raises(RuntimeError, match="expected one adapter for all images"):
        bank._groups(image, ["three", None])


def test_adapters_from_folders_added_and_removed(tmp_path):
    backbone = make_backbone()
    for classes, name in enumerate(("three", "released"), 2):
        model = InsVPViT(copy.deepcopy(backbone), classes, CONFIGS[name])
        model.save_pretrained(tmp_path / name, class_names=[f"{name} {i}" for i in range(classes)])
    bank = AdapterBank.from_pretrained(backbone, {"three": tmp_path / "three"}).to(DEVICE)
    bank.add("released", str(tmp_path / "released"))
    image = images(2)
    for name in ("three", "released"):
        own = InsVPViT.from_pretrained(tmp_path / name, copy.deepcopy(backbone)).to(DEVICE)
        assert bank.adapters[name].class_names == own.class_names
        assert torch.equal(bank(image, name), own(image))
        assert bank.adapters[name].backbone is bank.backbone
    before = bank.adapters
    bank.remove("three")
    assert set(before) == {"three", "released"} and set(bank.adapters) == {"released"}
    with pytest.raises(ValueError, match=r"adapters\[1\]='three': expected None or one of \['released'\]"):
        bank(image, [None, "three"])
    with pytest.raises(ValueError, match=r"name='three': expected one of \['released'\]"):
        bank.remove("three")
    other = InsVPViT(make_backbone(), 2, CONFIGS["three"])
    other.save_pretrained(tmp_path / "other")
    for source in (other, tmp_path / "other"):
        with pytest.raises(CheckpointError, match="the backbone has sha256"):
            bank.add("other", source)
    assert set(bank.adapters) == {"released"}


def test_a_model_around_a_backbone_that_computes_otherwise_is_refused():
    """Its weights are the bank's."""
    backbone = make_backbone()
    bank, other = AdapterBank(copy.deepcopy(backbone)), InsVPViT(backbone, 2, CONFIGS["three"])
    other.backbone.blocks[0].norm1.eps = 0.1
    with pytest.raises(CheckpointError, match="the backbone is another one: blocks.0.norm1.eps is 1e-06: expected 0.1"):
        bank.add("other", other)
    other.backbone.blocks[0].norm1.eps = 1e-6
    bank.add("other", other)


def test_a_model_is_taken_in_the_precision_of_the_bank():
    """The weights of its backbone are the same, in more bits."""
    backbone = make_backbone().bfloat16()
    bank, model = AdapterBank(backbone), InsVPViT(copy.deepcopy(backbone).float(), 2, CONFIGS["three"])
    bank.add("three", model)
    assert {p.dtype for p in bank.adapters["three"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_adapters_of_other_methods_are_refused_by_name(tmp_path):
    backbone = make_backbone()
    model = create_model("vpt_deep", copy.deepcopy(backbone), 5, length=2)
    model.save_pretrained(tmp_path)
    bank = AdapterBank(backbone)
    with pytest.raises(CheckpointError, match="not an InsVP adapter: its method is vpt_deep: expected insvp"):
        bank.add("deep", tmp_path)
    with pytest.raises(TypeError, match="name=None: expected text"):
        bank.add(None, tmp_path)
    with pytest.raises(TypeError, match="'deep' is a MethodViT with the method VPTDeep: expected an InsVPViT"):
        bank.add("deep", model)
    assert not bank.adapters


def test_the_pooling_of_an_adapter_is_that_of_the_backbone(tmp_path):
    """It belongs to the backbone, timm's name or none, and no weight tells of it."""
    backbone = make_backbone(depth=1)
    model = InsVPViT(copy.deepcopy(backbone), 5, InsVPConfig(prompt_length=2))
    model.reset_classifier(5, "avg")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the backbone has global_pool='token': expected 'avg'"):
        InsVPViT.from_pretrained(tmp_path, copy.deepcopy(backbone))
    with pytest.raises(CheckpointError, match="the backbone has global_pool='token': expected 'avg'"):
        AdapterBank(backbone).add("mean", model)
    backbone.reset_classifier(5, "avg")
    image = torch.randn(2, 3, 32, 32)
    expected = model.eval()(image)
    torch.testing.assert_close(InsVPViT.from_pretrained(tmp_path, copy.deepcopy(backbone))(image), expected)
    bank = AdapterBank.from_pretrained(backbone, {"mean": model})
    torch.testing.assert_close(bank(image, "mean"), expected)


def test_adapters_come_and_go_while_it_runs():
    bank, _ = make_bank(("three", "released", "VPT-Deep"))
    image, names = images(3), ["three", "released", None]
    source, spare = bank.adapters["three"], bank.adapters["VPT-Deep"]
    with torch.no_grad():
        expected = bank(image, names)
    found, errors, stop = [], [], threading.Event()

    def serve():
        try:
            with torch.no_grad():
                while not stop.is_set() or len(found) < 5:
                    found.append(torch.equal(bank(image, names), expected))
        except Exception as error:
            errors.append(error)

    server = threading.Thread(target=serve)
    server.start()
    for i in range(10):
        bank.add("three", source)  # replaced by its equal
        bank.add(f"spare {i}", spare)
        bank.remove(f"spare {i}")
    stop.set()
    server.join()
    assert not errors and all(found)
    assert set(bank.adapters) == {"three", "released", "VPT-Deep"}


@torch.no_grad()
def test_adapters_go_where_the_bank_goes():
    bank, references = make_bank(("three", "released"))
    names, image = ["three", None, "released"], images(3)
    wide = copy.deepcopy(bank).double()
    exact = rows({name: copy.deepcopy(model).double() for name, model in references.items()}, names, image.double())
    for row, expected in zip(wide(image.double(), names), exact, strict=True):
        assert row.dtype == torch.float64 and relative_error(row[: len(expected)], expected) < 1e-12
    assert bank(image, names).dtype == torch.float32  # the original stayed


def test_it_is_for_inference():
    bank, _ = make_bank(("three",))
    assert not bank.training and not any(p.requires_grad for p in bank.adapters["three"].parameters())
    assert not bank(images(1), "three").requires_grad
    with pytest.raises(ValueError, match="the image requires a gradient: expected none"):
        bank(images(1).requires_grad_(), "three")
    with torch.no_grad():
        assert bank(images(1).requires_grad_(), "three").isfinite().all()
    with pytest.raises(ValueError, match="an AdapterBank is for inference"):
        bank.train()
    with pytest.raises(ValueError, match="adapters has 1 names: expected one for each of the 2 images"):
        bank(images(2), ["three"])
    with pytest.raises(ValueError, match="32x24 pixels"):
        bank(images(1)[..., :24], "three")
    with pytest.raises(TypeError, match="image is a ndarray: expected a tensor"):
        bank(images(1).numpy(), "three")
    for adapters in ("three", ["three"]):
        with pytest.raises(TypeError, match=f"adapters is a {type(adapters).__name__}: expected a dictionary"):
            AdapterBank.from_pretrained(bank.backbone, adapters)


@pytest.mark.parametrize(
    ("adapters", "found"),
    [
        ([None, ["three"]], r"adapters\[1\]=\['three'\]"),
        (["three", 0], r"adapters\[1\]=0"),
        (b"ab", r"adapters\[0\]=97"),
        (7, "adapters=7"),
    ],
)
def test_what_is_no_name_of_an_adapter_is_refused(adapters, found):
    bank, _ = make_bank(("three",))
    with pytest.raises(TypeError, match=f"{found}: expected a name, "):
        bank(images(2), adapters)


def test_no_image_has_the_width_of_its_adapter():
    bank, _ = make_bank(("three", "released"))
    assert bank(images(0), "three").shape == (0, 2) and bank(images(0), "released").shape == (0, 3)
    assert bank(images(0), []).shape == bank(images(0)).shape == (0, bank.num_classes)
    with pytest.raises(ValueError, match="adapters='nobody': expected None or one of"):
        bank(images(0), "nobody")


def test_a_named_attention_that_takes_all_keys_is_refused_for_prompts_of_several_lengths():
    bank, _ = make_bank(("three", "released"))
    bank.attention = "flash"
    with pytest.raises(RuntimeError, match='impl="flash" cannot'):
        bank(images(2), ["three", "released"])


def test_a_thousand_adapters_of_a_vit_b_fit_in_two_gigabytes():
    """Counted: the tensors of one without allocating them, and what Python needs around them."""
    with torch.device("meta"):
        model = InsVPReference(timm.create_model("vit_base_patch16_224", num_classes=0), 200)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    backbone = sum(size for name, size in sizes.items() if name.startswith("backbone."))
    bank, _ = make_bank(("three",), depth=12)
    source = bank.adapters["three"]
    assert all(p is q for p, q in zip(source.backbone.parameters(), bank.backbone.parameters(), strict=True))
    bank.add("warm", source)
    tracemalloc.start()
    for i in range(5):
        bank.add(f"{i}", source)
    around = tracemalloc.get_traced_memory()[0] / 5
    tracemalloc.stop()
    assert backbone + 1000 * (sum(sizes.values()) - backbone + around) < 2e9


@pytest.mark.parametrize("names", [["three", None], [None, "three"]], ids=str)
@torch.no_grad()
def test_features_beside_logits_in_16_bits_are_not_rounded(names):
    bank, _ = make_bank(("three",), num_classes=0)
    image = images(2)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert bank(image, "three").dtype == torch.bfloat16 and bank(image).dtype == torch.float32
        assert bank(image, names).dtype == torch.float32


def test_an_adapter_is_neither_compiled_nor_captured_by_itself():
    bank, _ = make_bank(("three",))
    source = bank.adapters["three"]
    source.compile_prompters = source.cuda_graphs = True
    bank.add("copy", source)
    assert not bank.adapters["copy"].compile_prompters and not bank.adapters["copy"].cuda_graphs


@torch.no_grad()
def test_an_adapter_remembers_nothing_of_the_backbone():
    bank, _ = make_bank(("three", "three more"))
    source = InsVPViT(copy.deepcopy(bank.backbone), 2, CONFIGS["three"]).to(DEVICE).eval()
    source(images(1))
    bank.add("three", source)
    bank(images(2), ["three", "three more"])
    assert not any("_memo" in vars(model) for model in bank.adapters.values())


def test_a_default_device_does_not_matter():
    bank, _ = make_bank(("three", "one block"))
    image, names = images(3), ["three", None, "one block"]
    expected = bank(image, names)
    with torch.device("meta"):
        assert torch.equal(bank(image, names), expected)


@pytest.mark.parametrize("whose", ["bank", "adapter"])
@pytest.mark.parametrize("names", [["three"], ["three", None], ["three", "carried"]], ids=str)
def test_a_replaced_backbone_is_refused(whose, names):
    """Otherwise the other images of a batch would decide which of the two an image passes through."""
    bank, _ = make_bank(("three", "carried"))
    changed = bank if whose == "bank" else bank.adapters["three"]
    changed.backbone = copy.deepcopy(bank.backbone)
    for run in (bank, bank.forward_features):
        with pytest.raises(ValueError, match="adapter 'three' is around another backbone: expected that of the bank"):
            run(images(len(names)), names)


@pytest.mark.parametrize("names", [["three", None, "one block"], ["three"] * 3, "one block", None], ids=str)
@torch.no_grad()
def test_it_is_traced_whole(names):
    bank, references = make_bank(("three", "one block"))
    image, each = images(3), names if isinstance(names, list) else [names] * 3
    exact = rows({name: copy.deepcopy(model).double() for name, model in references.items()}, each, image.double())
    program = torch.export.export(bank, (image, names), strict=True).run_decompositions({})
    assert any("insvp_fast" in str(node.target) for node in program.graph.nodes)
    for traced in (program.module(), torch.compile(bank, fullgraph=True, backend="eager")):
        for row, expected in zip(traced(image, names), exact, strict=True):
            assert relative_error(row[: len(expected)], expected) < 1e-5
