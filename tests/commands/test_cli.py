"""The command line: quick help, options and recipes, one-line errors, exit statuses."""

import dataclasses
import re
import subprocess
import sys
import time
import tomllib
import warnings

import pytest

from insvp_fast import recipes
from insvp_fast.commands import cli
from insvp_fast.commands import train as train_command
from insvp_fast.commands.cli import COMMANDS
from insvp_fast.commands.options import output_file
from insvp_fast.commands.settings import show_options
from insvp_fast.errors import CheckpointError, CommandError, DataError, InsVPError, warn
from insvp_fast.studies.arguments import to_arguments, to_option
from insvp_fast.training import run as run_module
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.setting import GROUPS

HTA = ("cifar10", "cifar100", "cub", "dogs", "dtd", "flowers", "food101", "gtsrb", "nabirds", "svhn")


@pytest.fixture
def trained(monkeypatch):
    """What ``insvp train`` hands on: recipes and runs to resume, instead of training."""
    calls = []
    monkeypatch.setattr(train_command, "read_results", lambda folder: {})
    monkeypatch.setattr(run_module, "train", lambda recipe, resume=None: calls.append((recipe, resume)))
    return calls


def status_of(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in COMMANDS), ["data", "list"], ["data", "check"]], ids=" ".join
)
def test_help_is_quick_and_does_without_torch(arguments):
    program = (
        "import sys\nfrom insvp_fast.commands.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'timm', 'numpy', 'PIL', 'accelerate', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 5  # a fraction of a second on a quiet machine
    assert done.stdout.startswith(" ".join(["usage: insvp", *arguments]))


@pytest.mark.parametrize(("backbone", "status"), [("vit_tiny_patch16_224", 0), ("no_such_backbone", 1)])
def test_a_process_ends_with_its_status_after_all_that_was_registered_for_its_end(backbone, status):
    program = (
        "import sys\nfrom insvp_fast.commands.cli import run\nimport atexit, threading, time, torch\n"
        "atexit.register(print, 'registered')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), threading.main_thread().join(), print('thread'))).start()\n"
        "sys.argv = ['insvp', 'info', sys.argv[1]]\nrun()"
    )
    done = subprocess.run([sys.executable, "-c", program, backbone], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.endswith("thread\nregistered\n")
    assert len(done.stderr.splitlines()) == status and done.stderr.startswith("insvp: error: " * status), done.stderr


def test_warnings_of_ours_are_told_once_without_a_place_in_the_code(monkeypatch, capsys):
    """Those of other packages say where they come from."""

    def main():
        for _ in range(2):
            warn("`img_size` is\n  3")
        warnings.warn("theirs", stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(cli, "_statuses", [])
    monkeypatch.setattr(cli, "_warned", set())
    monkeypatch.setattr(cli.gc, "set_threshold", lambda *thresholds: None)
    with pytest.warns(UserWarning, match="theirs") as others, pytest.raises(SystemExit):
        cli.run()
    assert [warning.filename for warning in others] == [__file__]
    assert capsys.readouterr().err == "insvp: warning: --img-size is 3\n"


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [("> /dev/full", 1, ["insvp: error: [Errno 28] No space left on device"]), (">&-", 0, []), ("| true", 1, [])],
    ids=["full", "closed", "broken pipe"],
)
@pytest.mark.parametrize("option", ["", "--json"])
def test_an_output_that_takes_nothing(output, status, said, option):
    command = f"{sys.executable} -m insvp_fast methods {option}"
    wait = f"set -o pipefail; (sleep 0.5; {command}) {output}"
    done = subprocess.run(["bash", "-c", wait], capture_output=True, text=True)
    faults = ("insvp:", "Traceback", "Exception")  # with --json, lines of text are there as well
    assert (done.returncode, [line for line in done.stderr.splitlines() if line.startswith(faults)]) == (status, said)


def test_an_output_in_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # which root may always write to
    with pytest.raises(CommandError, match=r"--output is .*x\.html: the folder .* is read-only"):
        output_file(tmp_path / "x.html")


def test_every_setting_says_what_it_is():
    assert [field.name for field in dataclasses.fields(Recipe) if not field.metadata["help"]] == []
    assert all(f"\n    {field.name}: " in Recipe.__doc__ for field in dataclasses.fields(Recipe))
    assert Recipe.__doc__.index("Args:") < Recipe.__doc__.index("Raises:")


def test_the_help_is_one_screen_of_common_settings_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    sections = []
    for option in ("--help", "--help-all"):
        assert status_of(["train", option]) == 0
        sections.append(re.split(r"\n\n(?=\w+:\n)", capsys.readouterr().out))
    short, long = ({part.partition(":")[0]: part for part in parts[1:]} for parts in sections)
    assert 24 <= len("\n\n".join(sections[0]).splitlines()) <= 40
    assert list(long) == ["options", *GROUPS] and list(short) == [name for name in long if name != "prompts"]
    for field in (field for field in dataclasses.fields(Recipe) if field.name != "recipe"):
        group, option = field.metadata["group"], f"  {to_option(field.name)}"
        assert re.search(rf"^{option}\b(?!-)", long[group], re.MULTILINE), field.name
        shown = re.search(rf"^{option}\b(?!-)", short.get(group, ""), re.MULTILINE)
        assert bool(shown) == (field.metadata["brief"] is not None), field.name
    assert "number of epochs (default: 10)" in short["training"] and "(default: digits)" in short["data"]


EVERYTHING = Recipe(
    backbone="a@b",
    data="c",
    root="r",
    img_size=224,
    preprocessing="insvp",
    augmentation="timm",
    hflip=0.25,
    exif_rotation=False,
    protocol="released",
    select_on="test",
    metric="f1",
    patience=3,
    epochs=2,
    batch_size=3,
    auto_batch=True,
    accumulate=2,
    lr=0.1,
    lr_scale="sqrt",
    weight_decay=0.3,
    clip_grad=1.5,
    warmup=0.4,
    mixup=0.5,
    cutmix=0.6,
    mix_prob=0.7,
    label_smoothing=0.1,
    class_weights="auto",
    sampling="balanced",
    ema=0.9,
    amp="bf16",
    compile="prompters",
    recompute="mlp",
    seed=5,
    split_seed=6,
    prompt_length=6,
    init_from="f",
    released=True,
    global_prompt=False,
    patch_prompt=False,
    common_prompt=False,
    specific_prompt=False,
    image_weights=0.3,
    feature_weights=(2.0, 3.0),
    prompted_blocks=2,
    carry_prompts=True,
    patch_hidden=3,
    global_hidden=5,
    global_kernels=(5, 7),
    global_dilations=(2, 3),
    specific_kernels=(9, 5, 3),
    specific_input="prompted",
    global_dropout=0.2,
    patch_dropout=0.3,
    common_dropout=0.4,
    specific_dropout=0.5,
    simam=True,
    probe=False,
    head_init="probe",
    workers=7,
    cache=True,
    trackers=("tensorboard", "wandb"),
    save_every=2,
    save_steps=3,
    pictures=False,
    output="d",
)


def test_every_setting_has_an_option(trained):
    values = EVERYTHING.to_dict()
    untouched = {field.name for field in dataclasses.fields(Recipe) if values[field.name] == field.default}
    exclude_others = {"checkpoint", "retrain", "method", "method_options"}
    assert untouched <= {"recipe"} | exclude_others
    given = {name: value for name, value in values.items() if name not in untouched}
    assert cli.main(["train", *to_arguments(given)]) == 0
    assert cli.main(["train", "--checkpoint", "e", "--retrain"]) == 0
    assert cli.main(["train", "--method", "vp", "--method-options", "size=3"]) == 0
    assert cli.main(["train"]) == 0
    others = [Recipe(checkpoint="e", retrain=True), Recipe(method="vp", method_options=("size=3",)), Recipe()]
    assert trained == [(recipe, None) for recipe in (EVERYTHING, *others)]


def test_the_shipped_recipes_are_those_of_the_ten_sets():
    assert recipes.list_shipped() == sorted((*HTA, "paper"))
    for name in HTA:
        paper, released = Recipe(**recipes.read_recipe(name)), Recipe(**recipes.read_recipe(name, released=True))
        assert paper.data == released.data == paper.recipe == name
        assert (paper.epochs, paper.prompt_length, paper.released, paper.protocol) == (100, None, False, "paper")
        assert (released.released, released.protocol, released.select_on) == (True, "released", "test")
        same = ("lr", "weight_decay", "batch_size", "warmup", "mixup", "cutmix", "mix_prob", "label_smoothing", "seed")
        assert all(getattr(paper, field) == getattr(released, field) for field in same)
        assert not paper.simam and paper.specific_kernels is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dtd", (1e-3, 0.5, 16, (7, 9, 3), False)),
        ("cub", (7e-4, 2e-3, 9, (9, 5, 3), True)),
        ("nabirds", (5e-3, 2e-3, 16, (7, 9, 3), False)),
        ("dogs", (5e-4, 5e-3, 16, (7, 9, 3), True)),
        ("flowers", (1e-3, 1.0, 16, (7, 9, 3), False)),
        ("food101", (5e-4, 1e-3, 16, (7, 9, 3), False)),
        ("cifar100", (3e-3, 5e-4, 20, (7, 9, 3), False)),
        ("cifar10", (2e-3, 1e-3, 16, (7, 9, 3), False)),
        ("gtsrb", (2e-3, 0.07, 16, (7, 9, 3), False)),
        ("svhn", (4e-3, 1e-3, 16, (7, 9, 3), True)),
    ],
)
def test_released_recipes_are_those_of_the_authors_scripts(name, expected):
    recipe = Recipe(**recipes.read_recipe(name, released=True))
    found = recipe.lr, recipe.weight_decay, recipe.prompt_length, recipe.specific_kernels, bool(recipe.simam)
    assert found == expected


def test_options_override_a_recipe(trained):
    assert cli.main(["train", "--recipe", "cub", "--lr", "0.5", "--probe"]) == 0
    assert cli.main(["train", "--recipe", "cub", "--released", "--prompt-length", "3"]) == 0
    (first, _), (second, _) = trained
    assert first == dataclasses.replace(Recipe(**recipes.read_recipe("cub")), lr=0.5, probe=True)
    assert second == dataclasses.replace(Recipe(**recipes.read_recipe("cub", released=True)), prompt_length=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "photos"], True),
        (["--data", "photos", "--recipe", "mine.toml"], True),
        (["--data", "photos", "--backbone", "vit_shapes_32"], False),
        (["--data", "photos", "--recipe", "paper"], False),
        (["--data", "digits"], False),
        ([], False),
    ],
)
def test_a_backbone_that_nobody_chose_is_named(options, said, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("epochs = 1")
    assert cli.main(["train", *options]) == 0
    assert ("the backbone is vit_shapes_32, a small one" in capsys.readouterr().out) == said and trained


@pytest.mark.parametrize("released", [False, True])
def test_a_printed_recipe_is_a_recipe(released, tmp_path, capsys, trained):
    assert cli.main(["recipes", "svhn", *["--released"] * released]) == 0
    file = tmp_path / "mine.toml"
    file.write_text(printed := capsys.readouterr().out)
    assert tomllib.loads(printed)["lr"] == 4e-3
    assert cli.main(["train", "--recipe", str(file)]) == 0
    assert trained[0][0] == dataclasses.replace(Recipe(**recipes.read_recipe("svhn", released)), recipe=str(file))


def test_recipes_are_listed(capsys):
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert "cub        CUB-200-2011, 200 species of birds\n" in printed
    assert "paper      the paper's protocol for any data set: set --data, and search --lr and" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a TOML file or one of cifar10, cifar100, cub"),
        ("epochs = ", "wrong.toml: Invalid value"),
        ("epoch = 3", "epoch is no setting; expected some of backbone"),
        ("base = 'nothing'", "recipe nothing: expected a TOML file"),
        ("epochs = 0", "--epochs is 0: expected at least 1"),
        ("epochs = 'ten'", "--epochs is ten: expected"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(content, message, tmp_path, capsys, trained):
    file = tmp_path / "wrong.toml"
    if content is not None:
        file.write_text(content)
    assert status_of(["train", "--recipe", str(file)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not trained


def test_a_recipe_is_not_its_own_base(tmp_path):
    file = tmp_path / "circle.toml"
    file.write_text(f"base = {str(file)!r}")
    with pytest.raises(InsVPError, match="its own base"):
        recipes.read_recipe(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0: expected at least 1"),
        (["--batch-size", "-4"], "--batch-size is -4: expected at least 1"),
        (["--lr", "nan"], "--lr is nan: expected a positive number"),
        (["--image-weights", "1", "2", "3"], "--image-weights is (1.0, 2.0, 3.0): expected a number or two numbers"),
        (["--global-dropout", "1"], "--global-dropout is 1.0: expected a probability in [0, 1)"),
        (["--method", "vp", "--prompt-length", "3"], "--prompt-length is 3: expected none with the method vp"),
        (["--method-options", "size=3"], "--method-options is ('size=3',): expected none with the method insvp"),
        (["--method", "vp", "--method-options", "3"], "--method-options is ('3',): expected NAME=VALUE"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0"),
        (["--warmup", "1"], "--warmup is 1.0"),
        (["--amp", "int8"], "--amp is int8: expected one of "),
        (["--seed", "-1"], "--seed is -1"),
        (["--prompt-length", "-1"], "--prompt-length is -1: expected an integer of at least 0"),
        (["--backbone", "a@b", "--checkpoint", "c"], "--backbone is a@b: expected a name without @FILE"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--color", "red"], "unrecognized arguments: --color red"),
        (["--see", "3"], "unrecognized arguments: --see 3"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--resume", "nowhere", "--lr", "1"], "--resume goes on with the settings of nowhere: expected no --lr"),
    ],
)
def test_invalid_values_are_refused_in_one_line(arguments, message, capsys, trained):
    assert status_of(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not trained, "work has begun"


def test_settings_in_backticks_are_shown_as_options():
    message = "`batch_size` is 0: try `lr`, `recompute` block or `resume` runs/a; not `x`, `batch size` or lr"
    assert show_options(message) == (
        "--batch-size is 0: try --lr, --recompute block or --resume runs/a; not `x`, `batch size` or lr"
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "insvp: interrupted\n"),
        (KeyboardInterrupt("a state is kept"), 130, "insvp: interrupted; a state is kept"),
        (KeyboardInterrupt("go on with `resume` runs/a"), 130, "insvp: interrupted; go on with --resume runs/a"),
        (InsVPError("the loss became nan"), 1, "insvp: error: the loss became nan"),
        (InsVPError("a file\n  of two lines"), 1, "insvp: error: a file of two lines"),
        (DataError("`data` is x: see `insvp data list`"), 1, "insvp: error: --data is x: see `insvp data list`"),
        (CheckpointError("not weights of this model"), 1, "insvp: error: not weights of this model"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn"), 1, "pip install 'insvp-fast[train]'"),
    ],
)
def test_failures_end_with_a_message_and_a_status(error, status, message, capsys, monkeypatch):
    def fail(recipe, resume):
        raise error

    monkeypatch.setattr(run_module, "train", fail)
    assert cli.main(["train"]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("command", ["eval", "info", "predict"])
def test_a_missing_run_folder_is_one_line(command, tmp_path, capsys):
    (tmp_path / "image.png").touch()
    extra = [str(tmp_path / "image.png")] if command == "predict" else []
    assert cli.main([command, str(tmp_path), *extra]) == 1
    printed = capsys.readouterr().err
    assert "not a run folder" in printed or "neither a run" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["recipes", "--released"], "--released is given without the NAME of a recipe"),
        (
            ["bench", "--model", "nonsense"],
            "--model is nonsense: timm has no such model: expected a VisionTransformer, SwinTransformer, Beit or Eva",
        ),
        (
            ["bench", "--model", "vit_shapes_32"],
            "--model is vit_shapes_32: timm has no such model: expected a VisionTransform",
        ),
        (["bench", "--model", "resnet18"], "SwinTransformer, Beit or Eva of timm, found ResNet"),
        (
            ["bench", "--model", "vit_base_patch16_224.none"],
            "--model is vit_base_patch16_224.none: Invalid pretrained tag",
        ),
        (["bench", "--report", "."], "--report is .: found a folder, expected the name of a file"),
        (["bench", "--report", "x.png"], "--report is x.png: expected another ending, the plot beside it is a .png"),
        (["bench", "--report", "/dev/null/r.md"], "--report is /dev/null/r.md: no folder can be made there"),
        *(
            (
                ["bench", "--model", name],
                f"expected blocks, patch embedding and pooling whose operations are known, found {kind}",
            )
            for name, kind in {
                "vit_small_patch16_18x2_224": "ParallelThingsBlock",
                "vit_tiny_r_s16_p8_224": "HybridEmbed",
                "vit_pe_core_tiny_patch16_384": "AttentionPoolLatent",
            }.items()
        ),
    ],
)
def test_what_a_command_cannot_do_is_said_before_any_work(command, message, capsys):
    assert cli.main(command) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_completion_names_the_extra_that_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 1
    assert capsys.readouterr().err == "insvp: error: shtab is not installed: pip install 'insvp-fast[train]'\n"
