"""Warnings about known problems of a run or an adapter, found in its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.training.recipe import BUILTIN_BACKBONE
from insvp_fast.training.run_folder import SLOW_LOADER, read_config, read_metrics, read_results

__all__ = ["adapter_warnings", "run_warnings"]


def run_warnings(run: Path) -> Iterator[str]:
    """The problems of a run, and of its adapter if it has one.

    Raises:
        TrainingError: if it is not a run folder.
    """
    recipe, _ = read_config(run)
    waits = [record["data_wait"] for record in read_metrics(run) if "data_wait" in record]
    if waits and (mean := sum(waits) / len(waits)) > SLOW_LOADER:
        yield f"{mean:.0%} of the training time was spent waiting for images: use more --workers, or --cache"
    if not read_results(run):
        yield f"the run is not finished: `insvp train --resume {run}` goes on where it stopped"
    if recipe.backbone == "vit_base_patch16_224":
        yield f"backbone {recipe.backbone} does not say which weights; timm has changed which ones it takes then"
    if recipe.selection_split == "test":
        yield "the epoch to keep was selected on the test images: the test accuracy is optimistic"
    if (run / "adapter" / ADAPTER_FILE).is_file():
        yield from adapter_warnings(run / "adapter", recipe.backbone)


def adapter_warnings(adapter: Path, backbone: str = "") -> Iterator[str]:
    """The problems of an adapter.

    Args:
        backbone: the name of its backbone, if the adapter does not record one.

    Raises:
        CheckpointError: if it is not an adapter folder.
    """
    from insvp_fast.methods.checkpoint import read_adapter_config

    adapter_config = read_adapter_config(adapter / ADAPTER_FILE)
    name = adapter_config.backbone.name or backbone.partition("@")[0]
    config = getattr(adapter_config, "insvp", None)
    yield from _statistics_warnings(name, adapter_config.preprocessing)
    if config is None:
        return
    if name.endswith("vit_base_patch16_224.augreg_in21k") and config.image_weights == (2.0, 1.0):
        yield (
            f"a released configuration around {name}: the authors' code uses that name, but the weights that it links"
            " are those of orig_in21k; with the others, accuracies differ"
        )
    if config.specific_prompt and _looks_untrained(adapter / WEIGHTS_FILE):
        yield (
            "the specific prompter looks untrained: its weights are still distributed as at initialization; the"
            " authors' released code does not pass it to the optimizer"
        )


def _statistics_warnings(name: str, preprocessing: Mapping[str, Any] | None) -> Iterator[str]:
    own = _pretraining_statistics(name)
    if preprocessing is None or own is None:
        return
    used = tuple(tuple(preprocessing[key]) for key in ("mean", "std"))
    if used != own:
        (mean, std), (own_mean, own_std) = used, own
        yield (
            f"images are normalized by mean {_format(mean)}, std {_format(std)}, but the weights of {name} were trained"
            f" with mean {_format(own_mean)}, std {_format(own_std)}; the preset insvp does so on purpose, like the"
            " authors"
        )


def _pretraining_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and standard deviation of images with which a backbone was trained, if they are known."""
    if not name or name.startswith("local-dir:"):
        return None
    if name == BUILTIN_BACKBONE:
        facts = json.loads((files("insvp_fast") / "assets" / f"{name}.json").read_text())
        return tuple(facts["mean"]), tuple(facts["std"])
    from timm import get_pretrained_cfg

    try:
        cfg = get_pretrained_cfg(name.partition("@")[0].rpartition("/")[2])  # without hf-hub:owner/, @FILE or @REVISION
    except (KeyError, RuntimeError, ValueError):
        return None
    return (tuple(cfg.mean), tuple(cfg.std)) if cfg else None


def _looks_untrained(weights: Path) -> bool:
    """Whether all convolutions of the specific prompter are uniform in ±1/sqrt(inputs), PyTorch's initialization."""
    from insvp_fast.checkpoints.files import read_safetensors

    tensors = {key: value.double() for key, value in read_safetensors(weights).items() if "specific_prompter." in key}
    kernels = [value for value in tensors.values() if value.ndim == 4]
    for kernel in kernels:
        bound = 1 / math.sqrt(kernel[0].numel())
        relative_std = kernel.std().item() * math.sqrt(3) / bound  # 1 for that distribution
        if kernel.abs().max() > 1.001 * bound or abs(relative_std - 1) > 0.1:
            return False
    return bool(kernels)


def _format(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "/".join(f"{value:g}" for value in values)
