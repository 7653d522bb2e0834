"""``insvp tsne``."""

import json

import pytest

from insvp_fast.commands import cli
from insvp_fast.methods import create_model
from insvp_fast.training.backbone import load_backbone
from tests.commands.finished_run import CLASSES, with_random_head, write_run


@pytest.fixture(scope="module")
def other_runs(images, tmp_path_factory) -> list[str]:
    """Untrained runs of a method of prompting and of one that changes the backbone, in folders of one name."""
    runs = []
    for method, options in (("vpt_deep", {"length": 2}), ("lora", {"rank": 2})):
        folder = tmp_path_factory.mktemp(method) / "animals-1"
        model = with_random_head(create_model(method, load_backbone(), len(CLASSES), **options))
        runs.append(str(write_run(folder, images, model, CLASSES, method=method, probe=False)))
    return runs


def test_tsne_draws_the_test_images(run, tmp_path, capsys):
    file = tmp_path / "new" / "tsne.pdf"
    assert cli.main(["tsne", str(run), "--output", str(file), "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "16 images of 6 classes, silhouette score" and lines[-1] == f"written: {file}"
    titles, scores = zip(*(line.strip().split(": ") for line in lines[1:-1]), strict=True)
    assert titles == ("specific prompts", "features without prompts", "features with prompts")
    assert all(-1 <= float(score) <= 1 for score in scores)
    assert file.read_bytes().startswith(b"%PDF")


def test_tsne_draws_runs_of_several_methods_side_by_side(run, other_runs, tmp_path, capsys):
    def scores(*runs: str) -> dict[str, float]:
        assert cli.main(["tsne", *runs, "--output", str(tmp_path / "tsne.png"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["silhouette_scores"]

    side_by_side = scores(str(run), *other_runs)
    assert [*side_by_side] == [
        f"{name}, {folder}" for name, folder in zip(("InsVP", "vpt_deep", "lora"), (run, *other_runs), strict=True)
    ]
    alone = [scores(one) for one in other_runs]
    assert [[*own] for own in alone] == [["features without prompts", "features with prompts"], ["features"]]
    assert [[*own.values()][-1] for own in alone] == pytest.approx([*side_by_side.values()][1:])


def test_tsne_refuses_other_formats_too_few_images_and_other_data(run, other_runs, tmp_path, capsys):
    def refusal(*arguments: str) -> str:
        assert cli.main(["tsne", *arguments]) == 1
        return capsys.readouterr().err

    assert "expected a name that ends in .png" in refusal(str(run), "--output", "tsne.xyz")
    assert "t-SNE of 2 images" in refusal(str(run), "--images", "2", "--output", str(tmp_path / "a.png"))
    for seed in ("-1", "4294967296", "1.5"):
        with pytest.raises(SystemExit):
            cli.main(["tsne", str(run), "--seed", seed])
        assert f"--seed: {seed}: expected an integer from 0 to 2^32-1" in capsys.readouterr().err
    assert "is given twice" in refusal(str(run), str(run))
    folder = tmp_path / "digits-1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"recipe": {"data": "digits"}}))
    assert "its --data is digits, that of" in refusal(other_runs[0], str(folder))
