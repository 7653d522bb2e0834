"""timm's own scripts and tests, run on the names that this package registers.

    python -m tools.timm_scripts CHECKOUT                 # of timm's repository, at the version that is installed
    python -m tools.timm_scripts CHECKOUT --names "insvp_deit*"

train.py trains two epochs, one more from its checkpoint, and validate.py reads that checkpoint; the data are a made-up
image folder. Then come the functions of tests/test_models.py, over all names, each made tiny. timm's files are run as
they are: only ``create_model`` of the tests is replaced, by one that makes models tiny, and for the backward test hides
the frozen parameters, which have no gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import nn

import insvp_fast
from insvp_fast.testing import make_fake_dataset

MODEL, SIZE, CLASSES = "insvp_vit_tiny_patch16_224", 64, 4
TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
TINY_SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
TESTS = {
    "forward": "test_model_forward",
    "backward": "test_model_backward",
    "default configuration": "test_model_default_cfgs",
    "features": "test_model_forward_intermediates_features",
    "intermediates": "test_model_forward_intermediates",
    "pruning": "test_prune_intermediate_layers_contract",
}


def run(*command: object) -> dict[str, Any] | list[Any]:
    """The result that a script of timm prints last."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]}: failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.rpartition("--result")[2])


def run_scripts(checkout: Path, folder: Path) -> None:
    data = make_fake_dataset("folder", folder / "data", images_per_class=24, classes=CLASSES)
    (Path(data) / "val").rename(Path(data) / "validation")  # timm's name
    common = ["--model", MODEL, "--amp", "--data-dir", data, "--num-classes", CLASSES, "--input-size", 3, SIZE, SIZE]
    common += ["--model-kwargs", f"img_size={SIZE}", "depth=3", "prompt_length=5", "--batch-size", 16, "--workers", 0]
    common += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    train = [checkout / "train.py", "--device-modules", "insvp_fast", *common, "--opt", "adamw", "--lr", 1e-3]
    train += ["--warmup-epochs", 0, "--model-ema", "--output", folder, "--experiment"]
    for epoch in run(*train, "first", "--epochs", 2):
        print(f"train.py, epoch {epoch['epoch']}: loss {epoch['train']['loss']:.3f}, EMA {epoch['validation']}")
    checkpoint = folder / "first" / "last.pth.tar"
    for epoch in run(*train, "resumed", "--epochs", 3, "--resume", checkpoint):
        print(f"train.py --resume, epoch {epoch['epoch']}: loss {epoch['train']['loss']:.3f}")
    validate = ["-m", "insvp_fast.timm_script", checkout / "validate.py", *common, "--split", "validation"]
    print(f"validate.py: {run(*validate, '--checkpoint', checkpoint)}")


def load_tests(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("timm_tests", checkout / "tests" / "test_models.py")
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    return tests


def make_tiny(name: str, hide_frozen: bool = False, **arguments: Any) -> nn.Module:
    """``timm.create_model`` of a small model; its parameters are those that are trained, if the frozen are hidden."""
    tiny = TINY_SWIN if "swin" in name else TINY | {"num_kv_heads": 3} if "sapiens2" in name else TINY
    model = timm.create_model(name, **tiny | arguments)
    if hide_frozen:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        model.named_parameters = lambda: iter(trained)
        model.parameters = lambda: (parameter for _, parameter in trained)
    return model


def own_test(function: str, name: str) -> str:
    """timm has another test of the configuration for models whose features are not maps."""
    return f"{function}_non_std" if function == "test_model_default_cfgs" and "swin" not in name else function


def outcome(test: Callable[..., None], name: str, **arguments: Any) -> str:
    """What came of a test for a name: passed, skipped, refused, or its error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            test(name, **arguments)
    except pytest.skip.Exception:
        return "skipped"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "passed"


def run_tests(tests: ModuleType, names: list[str]) -> int:
    """The number of tests that did not pass; ``names`` of one class are counted together."""
    failed = 0
    for title, function in TESTS.items():
        tests.create_model = lambda name, **arguments: make_tiny(name, title == "backward", **arguments)  # noqa: B023
        more = {} if title == "pruning" else {"batch_size": 2 if title == "backward" else 1}
        more |= {"cfg_device": "meta"} if title == "default configuration" else {}
        found = {name: outcome(getattr(tests, own_test(function, name)), name, **more) for name in names}
        counts = Counter(found.values())
        failed += len(names) - counts["passed"] - counts["skipped"]
        print(f"\n{title}: {counts['passed']} passed, {counts['skipped']} skipped, of {len(names)}", flush=True)
        for text, count in counts.most_common():
            if text not in ("passed", "skipped"):
                first = next(name for name in found if found[name] == text)
                print(f"  {count} x {text} ({first})")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a folder with timm's train.py, validate.py and tests/")
    parser.add_argument("--names", default="insvp_*", help="the names whose tests are run")
    arguments = parser.parse_args()
    for file in ("train.py", "validate.py", "tests/test_models.py"):
        if not (arguments.checkout / file).is_file():
            parser.error(f"{arguments.checkout}: there is no {file}: expected a checkout of timm's repository")
    print(f"timm {timm.__version__}, torch {torch.__version__}, insvp_fast {insvp_fast.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        run_scripts(arguments.checkout, Path(folder))
    warnings.simplefilter("ignore")  # of models that take the general path
    raise SystemExit(run_tests(load_tests(arguments.checkout), timm.list_models(arguments.names)) > 0)


if __name__ == "__main__":
    main()
