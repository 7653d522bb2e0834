"""Settings as a run records them: they hold for every working folder."""

import pytest

from insvp_fast.checkpoints.backbone import is_name
from insvp_fast.training.evaluation import evaluate_run
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from tests.training.small_runs import make_folder, quick


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "digits"}, {"data": "digits"}),  # although a folder of that name is there
        ({"data": "vtab/dmlab", "root": "sets"}, {"data": "vtab/dmlab", "root": "{here}/sets"}),
        ({"data": "new/pets"}, {"data": "{here}/new/pets"}),
        ({"data": "./sets/"}, {"data": "{here}/sets"}),
        ({"data": "digits/../sets"}, {"data": "{here}/sets"}),
        ({"data": "digits/../gone"}, {"data": "{here}/gone"}),
        ({"data": "link/../sets"}, {"data": "{here}/link/../sets"}),  # where the link leads to
        ({"data": "/there/pets"}, {"data": "/there/pets"}),
        ({"data": "wds/sets"}, {"data": "wds/{here}/sets"}),
        ({"data": "wds/pets", "root": "sets"}, {"data": "wds/pets", "root": "{here}/sets"}),
        ({"data": "hfds/sets"}, {"data": "hfds/{here}/sets"}),
        ({"data": "hfds/owner/pets"}, {"data": "hfds/owner/pets"}),
        ({"data": "tfds/sets", "root": "sets"}, {"data": "tfds/sets", "root": "{here}/sets"}),
        ({"backbone": "vit_shapes_32"}, {"backbone": "vit_shapes_32"}),
        ({"backbone": "vit_tiny_patch16_224"}, {"backbone": "vit_tiny_patch16_224"}),  # a folder, and timm's name
        ({"backbone": "sets"}, {"backbone": "{here}/sets"}),
        ({"backbone": "local-dir:sets"}, {"backbone": "local-dir:{here}/sets"}),
        ({"backbone": "hf-hub:owner/name@main"}, {"backbone": "hf-hub:owner/name@main"}),
        ({"backbone": "vit_tiny_patch16_224@a b.pth"}, {"backbone": "vit_tiny_patch16_224@{here}/a b.pth"}),
        ({"checkpoint": "a.npz", "output": "out"}, {"checkpoint": "{here}/a.npz", "output": "{here}/out"}),
    ],
)
def test_paths_are_absolute_and_names_stay(settings, expected, tmp_path, monkeypatch):
    for name in ("sets", "digits", "vit_tiny_patch16_224"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "sets").mkdir(parents=True)
    (tmp_path / "elsewhere" / "inside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "inside")
    monkeypatch.chdir(tmp_path)
    recipe = absolute_paths(Recipe(**settings), is_name)
    assert {name: getattr(recipe, name) for name in expected} == {
        name: value.format(here=tmp_path) for name, value in expected.items()
    }
    assert absolute_paths(recipe, is_name) == recipe


def test_a_run_is_resumed_and_tested_from_another_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "pictures", {"train": 4, "val": 2, "test": 2})
    monkeypatch.chdir(tmp_path)
    recipe = quick("pictures", "runs")
    run = train(recipe).absolute()
    assert train(recipe, resume=run) == run  # the same settings, although they are spelled otherwise
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(resume=run) == run
    assert evaluate_run(run).metrics.images == 4
