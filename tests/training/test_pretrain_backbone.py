"""tools/pretrain_backbone.py, which makes the built-in backbone."""

import json

import torch

from tools import pretrain_backbone, scenes


def test_scenes_are_the_same_for_the_same_seed():
    (first, labels), (again, same), (other, _) = (scenes.draw_scenes(16, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert all(torch.equal(labels[name], same[name]) for name in labels)
    assert not torch.equal(first, other)
    assert first.shape == (16, 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1


def test_pretraining_repeats_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_backbone, "HELD_OUT", 8)
    for name in ("first", "again"):
        backbone, held_out = pretrain_backbone.pretrain(steps=2, batch=4, lr=1e-3, seed=0)
        pretrain_backbone.write(backbone, tmp_path / name, {"accuracy_on_unseen_scenes": held_out})
    first, again = (json.loads((tmp_path / name / "vit_shapes_32.json").read_text()) for name in ("first", "again"))
    assert first == again
