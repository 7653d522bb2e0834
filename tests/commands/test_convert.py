"""``insvp convert``."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.commands import cli


@pytest.fixture
def released_file(tmp_path) -> Path:
    """What the authors' code would save for a tiny backbone."""
    from insvp_fast.checkpoints.released import to_released

    config = InsVPConfig.released(prompt_length=4)
    model = InsVPViT("test_vit", num_classes=3, config=config)
    file = tmp_path / "best_model.pth"
    torch.save(to_released(model.state_dict()), file)
    return file


def test_convert_makes_an_adapter_and_overwrites_nothing(released_file, capsys):
    command = ["convert", str(released_file), "--backbone", "test_vit", "--keep-backbone"]
    assert cli.main(command) == 0
    assert "TokenPrompt, the specific prompter, at its random initial values" in capsys.readouterr().out
    folder = released_file.with_suffix("")
    weights = load_file(folder / "backbone.safetensors")
    backbone = InsVPViT("test_vit", num_classes=0).backbone
    backbone.load_state_dict(weights)
    model = InsVPViT.from_pretrained(folder, backbone=backbone)
    original = torch.load(released_file, weights_only=True)
    assert torch.equal(model.head.weight, original["backbone.head.weight"])
    assert cli.main(command) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_convert_refuses_what_is_no_checkpoint(tmp_path, capsys):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    for file, message in (("other.pth", "not a checkpoint of the authors' code"), ("none.pth", "no such file")):
        assert cli.main(["convert", str(tmp_path / file)]) == 1
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "other").exists()
