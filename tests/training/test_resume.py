"""A run that is killed and resumed ends like one that never was: same adapter, same metrics."""

import errno
import fcntl
import json
import os
import platform
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer

from insvp_fast.checkpoints.backbone import save_backbone, shipped_backbone
from insvp_fast.errors import InsVPError
from insvp_fast.training import linear_probe, run_lock
from insvp_fast.training.load import load_run
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from insvp_fast.training.run_folder import read_asked, read_config, read_metrics, read_results
from insvp_fast.training.run_lock import locked
from insvp_fast.training.trainer import Trainer
from tests.training.killed_runs import make_digits, outcome, start


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("data") / "few")


def finish(child, status=0):
    child.join()
    assert child.exitcode == status


# each is a life of the process, ended just before the event: in the first epoch, within a writing, between two renames
LIVES = [("step", 1), ("sync", 2), ("step", 6), ("sync", 5), ("rename", 2), ("step", 4), ("rename", 3), ("sync", 19)]


def test_a_killed_run_ends_like_one_that_never_was(digits, tmp_path):
    # everything that carries a state: augmentation, mixing, dropout, an average, accumulation, a schedule, an odd batch
    mixing = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "sampling": "balanced"}
    settings = {
        "data": str(digits),
        "probe": False,
        "epochs": 2,
        "batch_size": 16,
        "accumulate": 2,
        "ema": 0.9,
        "save_steps": 2,
        "pictures": False,
    } | mixing
    whole = start(settings | {"output": str(tmp_path / "whole")}, log=tmp_path / "whole.log")
    folder, log = tmp_path / "killed" / "few-1", tmp_path / "killed.log"
    for life, event in enumerate(LIVES):
        resume = folder if life else None
        finish(start(settings | {"output": str(tmp_path / "killed")}, resume, event, log), -signal.SIGKILL)
    finish(start(settings, folder, log=log))
    finish(whole)
    assert outcome(folder) == outcome(tmp_path / "whole" / "few-1")
    assert not [path for path in folder.rglob("*") if path.suffix in (".new", ".old", ".tmp")]
    assert log.read_text().count("goes on after") >= 5


def test_workers_change_nothing_and_resume_too(digits, tmp_path):
    settings = {"data": str(digits), "epochs": 2, "batch_size": 50, "probe": False, "amp": "off", "pictures": False}
    whole = start(settings | {"output": str(tmp_path / "whole")}, log=tmp_path / "log")
    workers = settings | {"output": str(tmp_path), "workers": 1, "save_steps": 1}
    finish(start(workers, die=("step", 3), log=tmp_path / "log"), -signal.SIGKILL)
    finish(start(workers, tmp_path / "few-1", log=tmp_path / "log"))
    finish(whole)
    assert outcome(tmp_path / "few-1") == outcome(tmp_path / "whole" / "few-1")


def test_a_run_killed_at_a_random_moment(digits, tmp_path):
    settings = {"data": str(digits), "epochs": 2, "batch_size": 16, "probe": False, "save_steps": 1, "pictures": False}
    log, folder = tmp_path / "log", tmp_path / "few-1"
    whole = start(settings | {"output": str(tmp_path / "whole")}, log=log)
    child = start(settings | {"output": str(tmp_path)}, log=log)
    while child.is_alive() and not (folder / "last").exists():
        child.join(0.01)
    child.join(random.SystemRandom().random() * 0.5)
    child.kill()
    child.join()
    finish(start(settings, folder, log=log))
    finish(whole)
    assert outcome(folder) == outcome(tmp_path / "whole" / "few-1")


@pytest.fixture
def tiny(digits, tmp_path):
    return {"data": str(digits), "output": str(tmp_path / "runs"), "epochs": 2, "batch_size": 32, "probe": False}


def test_a_finished_run_is_left_as_it_is(tiny, capsys, monkeypatch):
    asked = Recipe(**tiny, auto_batch=True)  # and the precision is `auto`, both of which the run settles
    folder = train(asked)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "curve.png"}
    monkeypatch.setattr(Trainer, "fit", None)  # not called again
    settled = read_config(folder)[0]
    assert (settled.auto_batch, read_asked(folder)) == (False, absolute_paths(asked)) and settled.amp != "auto"
    for recipe in (None, asked, settled):
        assert train(recipe, resume=folder) == folder
    assert before == {path: path.read_bytes() for path in before}
    assert "kept" in capsys.readouterr().out


def test_a_full_disk_keeps_the_last_state(tiny, monkeypatch):
    recipe = Recipe(**tiny, pictures=False)
    whole = train(recipe)
    fsync, left = os.fsync, 20  # full after the first epoch was written, and before the second was

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InsVPError, match=r"No space left on device: .*few-2; .*go on with `resume` .*few-2"):
            train(recipe)
    folder = whole.with_name("few-2")
    assert not list(folder.glob("*.new"))
    assert json.loads((folder / "last" / "state.json").read_text())["epoch"] == 1
    train(resume=folder)
    assert outcome(folder) == outcome(whole)


def test_ctrl_c_says_how_to_go_on(tiny, monkeypatch):
    step = Trainer._step

    def interrupted(self, number):
        if number == 6:
            raise KeyboardInterrupt
        step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"last good state is kept, go on with `resume` .*few-1"):
            train(Recipe(**tiny))
    folder = train(resume=f"{tiny['output']}/few-1")
    assert [record.get("epoch") for record in outcome(folder)[1]] == [0, 1, 2, None]  # None: of the test


def test_a_finished_run_stays_finished_when_resuming_it_is_interrupted(tiny, monkeypatch):
    folder = train(Recipe(**tiny | {"epochs": 1, "probe": True, "head_init": "random", "pictures": False}))
    before = (folder / "metrics.jsonl").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    for owner, name in ((linear_probe, "fit_linear"), (Trainer, "__init__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(resume=folder)
        assert read_results(folder).keys() == {"linear probe", "InsVP"}
    train(resume=folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_weights_that_are_no_numbers_are_not_saved(tiny, monkeypatch):
    save = Trainer.save

    def spoiled(self):
        if self.epoch == 2:
            with torch.no_grad():
                next(iter(self.trained.values())).fill_(float("nan"))
        save(self)

    monkeypatch.setattr(Trainer, "save", spoiled)
    with pytest.raises(InsVPError, match="weights of InsVP became infinite or not a number"):
        train(Recipe(**tiny))
    assert json.loads((Path(tiny["output"]) / "few-1" / "last" / "state.json").read_text())["epoch"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, workers):
    data = make_digits(tmp_path / "broken", train=30, held_out=10)
    next((data / "train" / "3").iterdir()).write_bytes(b"\x89PNG and nothing else")
    recipe = Recipe(data=str(data), output=str(tmp_path), epochs=1, batch_size=4, probe=False, workers=workers)
    with pytest.raises(InsVPError, match=r"^\S*train/3/\d+.png: not an image that can be read"):
        train(recipe)


def rename_a_class(data: Path) -> None:
    for split in data.iterdir():
        (split / "3").rename(split / "z")


def rename_an_image(data: Path) -> None:
    image = next((data / "train" / "3").iterdir())
    image.rename(image.with_name("renamed.png"))


def exchange_classes(data: Path) -> None:
    one, other = (next((data / "val" / name).iterdir()) for name in "35")
    one.rename(data / "val" / "5" / one.name)
    other.rename(data / "val" / "3" / other.name)


CHANGES = {
    "an image is gone": (lambda data: next((data / "train" / "3").iterdir()).unlink(), "images was .* is .* now"),
    "a test image more": (
        lambda data: shutil.copy(next((data / "test" / "3").iterdir()), data / "test/3/more.png"),
        "images was .* is .* now",
    ),
    "a class has another name": (rename_a_class, "class names was .* is .* now"),
    "an image has another name": (rename_an_image, "the images of train had other names"),
    "two images have other classes": (exchange_classes, "the images of val had other names or classes"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    data = make_digits(root / "few", train=30, held_out=10)
    recipe = Recipe(data=str(data), output=str(root), epochs=1, batch_size=10, probe=False, pictures=False)
    return data, train(recipe)


def move_data(folder: Path, data: Path) -> None:
    """Let a run have its data elsewhere."""
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["data"] = str(data)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_run_goes_on_with_its_own_data_alone(change, words, finished, tmp_path):
    data, folder = (Path(shutil.copytree(path, tmp_path / path.name)) for path in finished)
    move_data(folder, data)
    train(resume=folder)
    change(data)
    with pytest.raises(InsVPError, match=f"`data` is not that of the run: {words}"):
        train(resume=folder)


@pytest.mark.parametrize("key", ["images_sha256", "backbone_sha256"])
def test_runs_of_earlier_versions_go_on(key, finished, tmp_path):
    folder = Path(shutil.copytree(finished[1], tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert train(resume=folder) == folder


def test_what_a_killed_process_was_writing_is_removed(finished, tmp_path):
    folder = Path(shutil.copytree(finished[1], tmp_path / "run"))
    (folder / "metrics.jsonl.0123456789abcdef.tmp").write_text("{")
    train(resume=folder)
    assert not list(folder.glob("*.tmp"))


def test_a_run_is_finished_when_it_has_the_results_of_all_its_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": Recipe(probe=True).to_dict()}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for names in ([], ["linear probe", "InsVP"]):
            name = "InsVP" if names else "linear probe"
            print(json.dumps({"model": name, "test_accuracy": 0.5, "trained_parameters": 7}), file=file, flush=True)
            assert list(read_results(tmp_path)) == names


@pytest.mark.parametrize("damage", [b'{"model": "Ins', b"\xff\xfe", b"\x00\x00", b"[1]", b"3", b'{"epoch": 2}'])
def test_records_end_where_a_line_is_damaged(damage, tmp_path):
    record = {"model": "InsVP", "epoch": 1}
    line = json.dumps(record).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([line, damage, line]))
    assert read_metrics(tmp_path) == [record]


def test_a_run_goes_on_around_its_own_backbone_alone(digits, tmp_path):
    save_backbone(backbone := shipped_backbone("vit_shapes_32", num_classes=0), file := tmp_path / "own.safetensors")
    settings = {"data": str(digits), "output": str(tmp_path), "epochs": 1, "probe": False, "pictures": False}
    folder = train(Recipe(backbone="vit_shapes_32", checkpoint=str(file), **settings))
    train(resume=folder)
    with torch.no_grad():
        backbone.blocks[3].mlp.fc1.bias[5] += 1e-3
    save_backbone(backbone, file)
    with pytest.raises(InsVPError, match="`backbone` is not that of the run: backbone sha256 was .* is .* now"):
        train(resume=folder)


def test_position_embeddings_that_another_cpu_resampled_are_the_same_backbone(digits, tmp_path, monkeypatch):
    settings = {"data": str(digits), "output": str(tmp_path), "epochs": 1, "probe": False, "pictures": False}
    folder = train(Recipe(img_size=64, batch_size=50, **settings))
    resample = resample_abs_pos_embed
    monkeypatch.setattr(vision_transformer, "resample_abs_pos_embed", lambda *a, **k: resample(*a, **k) * (1 + 2**-22))
    assert train(resume=folder) == folder
    with pytest.warns(UserWarning, match="the position embeddings, resampled for `img_size`, are not to the bit those"):
        model = load_run(folder).model
    with torch.no_grad():
        model.backbone.blocks[0].norm1.bias[0] += 1e-3
    model.save_pretrained(folder / "adapter")
    with pytest.raises(InsVPError, match="the backbone has sha256"):
        load_run(folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_goes_on_when_a_broken_image_is_replaced(split, tmp_path):
    data = make_digits(tmp_path / "few", train=30, held_out=10)
    settings = {"epochs": 2, "batch_size": 10, "probe": False, "pictures": False, "head_init": "random"}
    whole = train(recipe := Recipe(data=str(data), output=str(tmp_path), **settings))
    image = next((data / split / "3").iterdir())
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(InsVPError, match=rf"{image.name}: not an image .*; put another .* `resume` \S*few-2$"):
        train(recipe)
    image.write_bytes(content)
    folder = train(resume=whole.with_name("few-2"))
    assert outcome(folder) == outcome(whole)


def test_one_process_at_a_time_trains_in_a_folder(digits, tmp_path):
    settings = {"data": str(digits), "output": str(tmp_path), "epochs": 100, "batch_size": 16, "probe": False}
    child = start(settings, log=tmp_path / "log")
    folder = tmp_path / "few-1"
    while child.is_alive() and not (folder / "last").exists():
        child.join(0.05)
    with pytest.raises(InsVPError, match=f"few-1 is being trained by process {child.pid} on "):
        train(resume=folder)
    child.kill()
    child.join()
    with locked(folder):
        pass


def test_a_lock_names_none_of_those_who_held_it_before(tmp_path):
    (tmp_path / run_lock.LOCK_FILE).write_text("process 1234567 on another-machine-of-a-cluster\n")
    with locked(tmp_path):
        assert (tmp_path / run_lock.LOCK_FILE).read_text() == f"process {os.getpid()} on {platform.node()}\n"


def test_a_file_system_or_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    for reason in ("No locks available", "this system has no POSIX locks"):
        expected = rf"cannot be locked \({reason}\): train in it by one"
        with pytest.warns(UserWarning, match=expected), locked(tmp_path):
            monkeypatch.setattr(run_lock, "fcntl", None)  # as on Windows


def test_only_its_own_recipe_resumes_a_run(tiny, tmp_path):
    with pytest.raises(InsVPError, match="not a run folder"):
        train(resume=tmp_path)
    folder = train(Recipe(**tiny | {"epochs": 1, "pictures": False}))
    with pytest.raises(InsVPError, match="expected no other settings"):
        train(Recipe(**tiny), resume=folder)
    state = (folder / "last" / "state.json").read_text()
    for damaged in (b"\xff", b"[]", b"{", state.replace('"epoch": 1', '"era": 1', 1).encode()):
        (folder / "last" / "state.json").write_bytes(damaged)
        with pytest.raises(InsVPError, match=r"few-1/last: not a state that can be resumed \("):
            train(resume=folder)
    (folder / "last" / "state.json").write_text(state)
    weights = load_file(file := folder / "last" / "trained.safetensors")
    blocks = [weights.pop(f"common_prompts.{i}") for i in range(sum("common_prompts." in key for key in weights))]
    save_file(weights | {"common_prompts": torch.stack(blocks)}, file)
    with pytest.raises(
        InsVPError, match=r"/last has no common_prompts.0, because an earlier version wrote it: .*init_from"
    ):
        train(resume=folder)
    tensors = torch.load(file := folder / "last" / "training.pt")
    torch.save(tensors | {"processes": tensors["processes"] * 2}, file)
    with pytest.raises(InsVPError, match="few-1 was trained by 2 processes, found 1: resume it with as many"):
        train(resume=folder)
    file.write_bytes(b"")
    with pytest.raises(InsVPError, match="not a state that can be resumed"):
        train(resume=folder)
