"""``insvp prompts``."""

import shutil

import numpy as np
import torch
from PIL import Image

from insvp_fast import InsVPViT
from insvp_fast.commands import cli
from insvp_fast.data import transform_for
from insvp_fast.training import load
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing
from tests.commands.finished_run import CLASSES


def test_prompts_are_drawn_and_written(run, images, probabilities, tmp_path, capsys):
    output, folder = tmp_path / "out", images / "test" / "ant"
    again = images / "test" / "bee" / "0.png"
    options = [str(run), str(folder), str(again), *[str(folder / f"{i}.png") for i in range(3)]]
    assert cli.main(["prompts", *options, "--output", str(output)]) == 0
    assert "prompts-2.png" in capsys.readouterr().out  # nine images are more than a picture has rows
    names = [*"01234", "0-2", "0-3", "1-2", "2-2"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "prompts.png", "prompts-2.png"])
    heights = [Image.open(output / name).size[1] for name in ("prompts.png", "prompts-2.png")]
    assert heights[0] > 5 * heights[1]

    model = InsVPViT.from_pretrained(run / "adapter", backbone=load_backbone())
    image = transform_for(resolve_preprocessing(load_backbone()))(Image.open(again))[None]
    arrays = {file.stem: np.load(file) for file in (output / "0-2").iterdir()}
    with torch.inference_mode():
        prompt = model.image_prompt(image)
    for name, expected in (("global_prompt", prompt.global_), ("patch_prompt", prompt.patch), ("image", image)):
        np.testing.assert_allclose(arrays[name], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["image"] + arrays["image_prompt"], arrays["prompted_image"], atol=1e-6)
    np.testing.assert_allclose(arrays["probabilities"], probabilities[str(again)], rtol=1e-3)
    assert arrays["grad_cam"].shape == arrays["grad_cam_without_prompts"].shape == arrays["heat_map"].shape == (32, 32)
    assert len(arrays["probabilities"]) == len(CLASSES)


def test_names_and_pictures_of_a_second_call(run, images, tmp_path):
    output, source = tmp_path / "out", images / "test" / "ant" / "0.png"
    own = [shutil.copyfile(source, tmp_path / name) for name in ("prompts.png.png", "A.png", "a.png")]
    foreign = output / "prompts-of-mine.png"
    many = [str(source)] * 17
    for given in (many, [str(file) for file in own]):
        assert cli.main(["prompts", str(run), *given, "--output", str(output)]) == 0
        foreign.touch()
    pictures = {path.name for path in output.glob("*.png") if path.is_file()}
    assert pictures == {"prompts.png", foreign.name}  # those of 17 images are gone
    assert {"prompts.png-2", "A", "a-2"} <= {path.name for path in output.iterdir() if path.is_dir()}


def test_images_beside_the_pictures_stay_as_they_are(run, images, tmp_path, capsys):
    source, output = images / "test" / "ant" / "0.png", str(tmp_path)
    for name in ("prompts-2.png", "prompts-3.png", "a.png"):
        shutil.copyfile(source, tmp_path / name)
    given = [str(run), str(tmp_path / "prompts-2.png"), str(tmp_path / "a.png"), "--output", output]
    assert cli.main(["prompts", *given]) == 0
    assert (tmp_path / "prompts-2.png").read_bytes() == source.read_bytes()
    assert not (tmp_path / "prompts-3.png").exists()  # as if an earlier call had left it
    shutil.copyfile(source, tmp_path / "prompts.png")
    shutil.copyfile(source, tmp_path / "b")
    for file in ("prompts.png", "b"):
        assert cli.main(["prompts", str(run), str(tmp_path / file), "--output", output]) == 1
        assert f"{tmp_path / file} would be written, and is one of the images" in capsys.readouterr().err
        assert (tmp_path / file).read_bytes() == source.read_bytes()


def test_a_name_of_dots_leads_nowhere_else(run, images, tmp_path):
    (folder := tmp_path / "pictures").mkdir()
    for name in ("..png", "...png"):
        shutil.copyfile(images / "test" / "ant" / "0.png", folder / name)
    given = [str(folder / name) for name in ("..png", "...png")]
    assert cli.main(["prompts", str(run), *given, "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
    found = [path for path in (tmp_path / "out").iterdir() if (path / "image.npy").exists()]
    assert len(found) == 2


def test_a_file_in_the_place_of_the_folder_is_an_error(run, images, tmp_path, capsys):
    (tmp_path / "file").touch()
    file = str(images / "test" / "ant" / "0.png")
    assert cli.main(["prompts", str(run), file, "--output", str(tmp_path / "file")]) == 1
    assert "file: no folder can be made there" in capsys.readouterr().err


def test_prompts_of_a_model_of_the_hub_are_written_here(run, images, tmp_path, monkeypatch):
    """A folder of its name would be taken for the model by the next command."""
    trained, seen = load.load_run(run), []
    monkeypatch.setattr(load, "load_run", lambda source, *_: seen.append(source) or trained)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prompts", "someone/birds", str(images / "test" / "ant" / "0.png")]) == 0
    assert seen == ["someone/birds"]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"] and (tmp_path / "prompts" / "prompts.png").exists()
