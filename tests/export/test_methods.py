"""Models of all methods in standard operators: the same function, captured with an open batch, and written."""

import copy

import pytest
import timm
import torch
from torch.nn.utils.parametrize import register_parametrization

from insvp_fast.errors import ExportError
from insvp_fast.export import export_model, graph, load
from insvp_fast.export.graph import capture, standard_model
from insvp_fast.method_names import METHODS
from insvp_fast.methods import CLASSES, Tuning, create_model
from insvp_fast.testing import relative_error

WIDTH = 24
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "num_heads": 2, "depth": 2, "num_classes": 0}
COMPUTE_AS_FULL = ("partial_1", "bias")


def model_of(name, **sizes):
    """A model of which no trained parameter is zero."""
    options = {"padding": 3} if name in ("vp", "dam_vp") else {}
    if name in ("vpt_deep", "vpt_shallow", "e2vpt", "vfpt", "vapt"):
        options = {"length": 4}
    options |= {"vapt": {"kernel": 1}, "e2vpt": {"segments": 8}}.get(name, {})
    model = create_model(name, timm.create_model("vit_tiny_patch16_224", **SIZES | sizes), 3, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if name == "dam_vp":
        model.method.fit_features(torch.randn(20, WIDTH))
    return model


@pytest.mark.parametrize("name", METHODS)
def test_standard_models_have_the_numbers_of_every_method(name):
    model, images = model_of(name), torch.randn(3, 3, 16, 16)
    exact = copy.deepcopy(model).double()
    if name == "dam_vp":  # its copy looks at a copy of the backbone
        exact.method.attach(standard_model(exact).method._bare[0])
    standard = standard_model(model)
    with torch.no_grad():
        assert relative_error(standard(images), exact(images.double())) < 1e-5
    assert not any(type(module).__module__ == "insvp_fast.prompted" for module in standard.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in COMPUTE_AS_FULL])
def test_every_method_is_captured(name):
    model = model_of(name, **{"depth": 1} if issubclass(CLASSES[name], Tuning) else {})
    images = torch.randn(30, 3, 16, 16)  # more than an example has, and more than torch.cdist takes in one way
    captured = capture(model, standard=True)
    assert captured.operations == 0 and captured.facts.input == [None, 3, 16, 16]
    with torch.no_grad():
        assert relative_error(captured.program.module()(images), model(images)) < 1e-5


# a transform that exporters lack, a hook, and a second pass of the backbone
@pytest.mark.parametrize("name", ["vfpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "dam_vp"))])
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs pip install -e '.[export]'")
    model = model_of(name)
    model.exif_rotation, before = False, copy.deepcopy(model.state_dict())
    done = export_model(model, tmp_path / "model.onnx", "onnx")
    assert [p.batch for p in done.parity] == [1, 7] and done.operations == 0
    images, exported = torch.randn(5, 3, 16, 16), load(tmp_path / "model.onnx")
    assert exported.facts.exif_rotation is False
    with torch.no_grad():
        assert relative_error(exported(images), model(images)) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_captured_is_refused_in_one_sentence(monkeypatch):
    class Dynamic(torch.nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    monkeypatch.setattr(graph, "standard_model", lambda model: Dynamic())
    with pytest.raises(ExportError, match="torch.export cannot trace the model: ") as caught:
        capture(model_of("linear"), standard=True)
    assert "\n" not in str(caught.value)


def test_a_file_says_whether_an_image_may_have_several_labels():
    model = model_of("vpt_deep")
    for model.multi_label in (True, False):
        assert capture(model, standard=True).facts.multi_label is model.multi_label


class Triple(torch.nn.Module):
    def forward(self, weight):
        return 3 * weight


def test_what_the_reference_does_not_hold_is_refused_in_one_sentence():
    longer, other = model_of("vpt_deep"), model_of("vpt_deep")
    longer.head = torch.nn.Sequential(longer.head)
    register_parametrization(other.head, "weight", Triple())
    with torch.inference_mode():
        inference = model_of("vpt_deep")
    for model, reason in ((longer, "Missing key"), (other, "Missing key"), (inference, ".*[Ii]nference")):
        with pytest.raises(ExportError, match=f"the model cannot be rebuilt in standard operators: {reason}") as caught:
            capture(model, standard=True)
        assert "\n" not in str(caught.value)


def test_images_of_one_channel(tmp_path):
    model = model_of("linear", in_chans=1)
    model.preprocessing = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.5]}
    assert export_model(model, tmp_path / "model.pt2", "torch").facts.input == [None, 1, 16, 16]
    with pytest.raises(ExportError, match="the channels of the images are 1: expected 3 where"):
        export_model(model, tmp_path / "model.pt2", "torch", preprocess=True)


def test_position_embeddings_of_a_dynamic_image_size_are_not_resampled():
    """Which timm does in every export, to the size that they have, and which OpenVINO cannot convert."""
    model, images = model_of("linear", dynamic_img_size=True, depth=1), torch.randn(2, 3, 16, 16)
    program = capture(model, standard=True, batch=2).program
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]
    with torch.no_grad():
        assert relative_error(program.module()(images), copy.deepcopy(model).double()(images.double())) < 1e-5


def test_a_refusal_of_openvino_names_the_operation():
    text = "Check 'false' failed at a.cpp:1:\nFrontEnd API failed with OpConversionFailure:\n"
    text += "Model wasn't fully converted.\nSummary:\n-- No conversion rule found for operations: aten.x\n"
    reason = r"^it cannot: No conversion rule found for operations: aten\.x$"
    with pytest.raises(ExportError, match=reason), graph.refusal("it cannot"):
        raise RuntimeError(text)
