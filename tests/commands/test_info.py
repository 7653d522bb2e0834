"""``insvp info``."""

import json
import subprocess
import sys

import pytest
import timm

from insvp_fast import InsVPViT
from insvp_fast.commands import cli
from insvp_fast.methods import CLASSES, create_model
from insvp_fast.training.backbone import load_backbone


def test_info_on_a_run_counts_the_trained_parameters(run, capsys):
    assert cli.main(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    model = InsVPViT.from_pretrained(run / "adapter", backbone=load_backbone())
    assert f"{model.get_nb_trainable_parameters()[0]:,} trained" in printed
    words = " ".join(printed.split())
    assert all(text in words for text in ("finished", "head 1,158", "classes 6: ant, bee", "prompt_length 4"))


@pytest.mark.parametrize("name", [*CLASSES, "full of a ResNet"])
def test_only_parameters_are_trained(name, tmp_path, capsys):
    backbone = timm.create_model("resnet10t") if "ResNet" in name else load_backbone()
    model = create_model(name.partition(" ")[0], backbone, 6)
    model.save_pretrained(tmp_path / "adapter")
    assert cli.main(["info", str(tmp_path / "adapter"), "--json"]) == 0
    adapter = json.loads(capsys.readouterr().out)["adapter"]
    trained = model.get_nb_trainable_parameters()[0]
    assert adapter["trained_parameters"] == sum(adapter["parameters"].values()) == trained


def test_info_on_an_adapter_needs_no_torch(run):
    program = (
        "import sys\nfrom insvp_fast.commands import cli\n"
        "assert cli.main(sys.argv[1:]) == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, "info", str(run / "adapter")], check=True, capture_output=True)


def test_info_on_a_backbone_downloads_nothing(capsys):
    assert cli.main(["info", "vit_base_patch16_224"]) == 0
    printed = capsys.readouterr().out
    assert "85,798,656 frozen" in printed and "through the fast path" in printed
    model = InsVPViT("vit_base_patch16_224", num_classes=0)
    assert f"{model.get_nb_trainable_parameters()[0]:,} trained" in printed
    assert cli.main(["info", "resnet18"]) == 0
    assert "image prompts only" in capsys.readouterr().out
    assert cli.main(["info", "vit_huger"]) == 1
    assert cli.main(["info", "levit_128s"]) == 1
    assert "levit_128s: the LevitDistilled has 2 heads: expected one" in capsys.readouterr().err
