"""Known traps in a run or an adapter, told from its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from insvp_fast.training.folders import ADAPTER_FILE, WEIGHTS_FILE, read_config, read_json, read_metrics
from insvp_fast.training.recipe import BUILTIN

__all__ = ["adapter_traps", "run_traps"]

WAITING = 0.3  # share of the time waiting for images above which a run is bound by its data


def run_traps(run: Path) -> Iterator[str]:
    """What is suspicious about a run, and about its adapter if it has one.

    Raises:
        CommandError: if it is not a run folder.
    """
    recipe, _ = read_config(run)
    shares = [record["data_wait"] for record in read_metrics(run) if "data_wait" in record]
    if shares and (mean := sum(shares) / len(shares)) > WAITING:
        yield f"{mean:.0%} of the training time was spent waiting for images: more --workers, or --cache"
    if recipe.backbone == "vit_base_patch16_224":
        yield f"backbone {recipe.backbone} names no weights, and which ones timm takes then has changed before"
    if recipe.selects_on == "test":
        yield "the epoch that was kept was chosen on the test images: the test accuracy is optimistic"
    if (run / "adapter" / ADAPTER_FILE).is_file():
        yield from adapter_traps(run / "adapter", recipe.backbone)


def adapter_traps(adapter: Path, backbone: str = "") -> Iterator[str]:
    """What is suspicious about an adapter; ``backbone`` names its backbone where it was not made by timm.

    Raises:
        CommandError: if it is no adapter folder.
    """
    about = read_json(adapter / ADAPTER_FILE)
    name, config = (about.get("backbone") or {}).get("name") or backbone.partition("@")[0], about.get("insvp") or {}
    yield from _wrong_statistics(name, about.get("preprocessing"))
    if name.endswith("vit_base_patch16_224.augreg_in21k") and config.get("image_weights") == [2.0, 1.0]:
        yield (
            f"a released configuration around {name}: the authors' code uses that name, but the weights that it links"
            " are those of orig_in21k; with the others, accuracies differ"
        )
    if config.get("specific_prompt") and _looks_untrained(adapter / WEIGHTS_FILE):
        yield (
            "the specific prompter looks untrained: its weights are still spread as at a random start; the authors'"
            " released code leaves it out of the optimiser"
        )


def _wrong_statistics(name: str, preprocessing: Mapping[str, Any] | None) -> Iterator[str]:
    own = _statistics(name)
    if preprocessing is None or own is None:
        return
    used = tuple(tuple(preprocessing[key]) for key in ("mean", "std"))
    if used != own:
        (mean, std), (own_mean, own_std) = used, own
        yield (
            f"images are normalised by mean {_brief(mean)}, std {_brief(std)}, but the weights of {name} were trained"
            f" with mean {_brief(own_mean)}, std {_brief(own_std)}; the preset insvp does so on purpose, as the authors"
            " do"
        )


def _statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and standard deviation that a backbone's weights were trained with, if timm knows it."""
    if not name or name.startswith("local-dir:"):
        return None
    if name == BUILTIN:
        facts = json.loads((files("insvp_fast") / "assets" / f"{BUILTIN}.json").read_text())
        return tuple(facts["mean"]), tuple(facts["std"])
    from timm import get_pretrained_cfg

    try:
        cfg = get_pretrained_cfg(name.partition("@")[0].rpartition("/")[2])  # without hf-hub:owner/, @FILE or @REVISION
    except (KeyError, RuntimeError, ValueError):
        return None
    return (tuple(cfg.mean), tuple(cfg.std)) if cfg else None


def _looks_untrained(weights: Path) -> bool:
    """Whether all convolutions of the specific prompter are uniform within 1/sqrt(inputs), PyTorch's random start."""
    from insvp_fast.checkpoints.files import read_safetensors

    tensors = {key: value.double() for key, value in read_safetensors(weights).items() if "specific_prompter." in key}
    kernels = [value for value in tensors.values() if value.ndim == 4]
    for kernel in kernels:
        bound = 1 / math.sqrt(kernel[0].numel())
        spread = kernel.std().item() * math.sqrt(3) / bound
        if kernel.abs().max() > 1.001 * bound or abs(spread - 1) > 0.1:
            return False
    return bool(kernels)


def _brief(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "/".join(f"{value:g}" for value in values)
