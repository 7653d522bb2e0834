"""Other programs that benchmarks/paired.py times beside this package: skipped in words, or right."""

import importlib.util
import re

import pytest
import torch

from benchmarks import paired, peers
from benchmarks.models import make_model
from insvp_fast import InsVPConfig
from insvp_fast.bench.jobs import inference
from insvp_fast.bench.models import make_images
from insvp_fast.testing import DEVICE, relative_error

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="peers are compared on CPUs")

NAME, TINY = "vit_tiny_patch16_224", {"img_size": 32, "depth": 1}


def test_a_peer_is_left_out_in_words(monkeypatch):
    assert peers.missing("insvp_fast", "training step", "bf16") is None
    assert peers.missing("bare openvino", "training step", "fp32") == "bare openvino left out: it has no training step"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = peers.missing("insvp_fast openvino", "inference", "fp32")
    assert reason == "insvp_fast openvino left out: openvino is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    reason = peers.missing("bare onnxruntime", "inference", "bf16")
    assert reason == "bare onnxruntime left out: its products on CPUs are in fp32 only"
    assert peers.missing("bare freezing", "inference", "fp32") is None


@pytest.mark.parametrize("provider", ["bare onnxruntime", "insvp_fast openvino"])  # the others take long
def test_a_peer_computes_the_same(provider):
    if reason := peers.missing(provider, "inference", "fp32"):
        pytest.skip(reason)
    config = InsVPConfig(prompt_length=2)
    run = inference(make_model(provider, NAME, config, **TINY), 2, None)
    own = make_model(provider.split(" ")[0], NAME, config, **TINY).eval()
    with torch.no_grad():
        expected = own(make_images(own, 2)[0])
    assert relative_error(run()["logits"], expected) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("--model swin_tiny_patch4_window7_224", "insvp_fast cannot be made: carry_prompts=True: expected"),
        (f"--model {NAME} --depth 1 --providers bare released", "released cannot be made: .* the release has ViT-B/16"),
    ],
)
def test_a_provider_that_a_model_does_not_have_is_refused_in_a_line(arguments, found, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paired", *arguments.split(), "--config", "released", "--jobs", "inference"])
    with pytest.raises(SystemExit):
        paired.main()
    assert re.search(f"error: --model .* --config released: {found}", capsys.readouterr().err.splitlines()[-1])
