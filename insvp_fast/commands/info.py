"""Describe a run folder, an adapter folder or a backbone: settings, results, sizes, classes, preprocessing.

A backbone is anything that `insvp train --backbone` takes; for a timm model given by name, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.commands.options import add_json
from insvp_fast.errors import CommandError
from insvp_fast.json_files import read_json
from insvp_fast.training.recipe import score_name
from insvp_fast.training.run_folder import CONFIG_FILE, read_config, read_results

SUMMARY = "describe a run, an adapter or a backbone"
# what adapters hold besides parameters, which their files do not tell apart: of E2VPT, DAM-VP and batch norm
BUFFERS = {"token_mask", "segment_mask", "centers", "running_mean", "running_var", "num_batches_tracked"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RUN|ADAPTER|BACKBONE", help="a folder, or the name of a backbone")
    add_json(parser)


def run(what: str) -> dict[str, Any]:
    folder = Path(what)
    content = read_json(folder / CONFIG_FILE, CommandError) if (folder / CONFIG_FILE).is_file() else None
    if content is not None and "architecture" not in content:  # timm's config.json of a backbone has it
        return _describe_run(folder)
    if (folder / ADAPTER_FILE).is_file():
        return {"adapter": _describe_adapter(folder)}
    if folder.is_dir() and content is None:
        raise CommandError(f"{what}: neither a run ({CONFIG_FILE}), an adapter ({ADAPTER_FILE}) nor a backbone")
    return {"backbone": _describe_backbone(what)}


def _describe_run(folder: Path) -> dict[str, Any]:
    (recipe, config), results = read_config(folder), read_results(folder)
    _print("run", f"{folder}, {'finished' if results else 'not finished'}")
    _print("recipe", f"{recipe.recipe or 'none'}, protocol {recipe.protocol}")
    _print("data", f"{recipe.data}: {_join(config.get('images', {}))}")
    for name, result in results.items():
        score = score_name(result.get("metric"))
        words = "" if score == "accuracy" else f"{score} "
        _print(name, f"{words}{result[f'test_{score}']:.2%} on test")
    for name, value in recipe.to_dict().items():
        if name not in ("recipe", "protocol", "data") and value is not None:
            _print(f"  {name}", value)
    facts = {"folder": str(folder), "finished": bool(results), "results": results} | config
    if (folder / "adapter" / ADAPTER_FILE).is_file():
        print()
        facts["adapter"] = _describe_adapter(folder / "adapter")
    return {"run": facts}


def _describe_adapter(folder: Path) -> dict[str, Any]:
    config, sizes = read_json(folder / ADAPTER_FILE, CommandError), _count_parameters(folder / WEIGHTS_FILE)
    kinds = {"class_names": list} | dict.fromkeys(("backbone", "options", "preprocessing", "insvp"), dict)
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind | None):
            raise CommandError(f"{folder / ADAPTER_FILE}: {name} is {config[name]!r}: expected a {kind.__name__}")
    backbone, names = config.get("backbone") or {}, config.get("class_names")
    _print("adapter", f"{folder}, {(folder / WEIGHTS_FILE).stat().st_size / 2**20:.2f} MiB")
    if "method" in config:
        _print("method", f"{config['method']}, {_join(config.get('options') or {}) or 'with its defaults'}")
    else:
        _print("made by", f"insvp_fast {config.get('insvp_fast_version')}")
    sha256 = str(backbone.get("sha256"))[:12]
    _print("backbone", f"{backbone.get('name')}, {backbone.get('dtype')}, sha256 {sha256}...")
    _print("classes", f"{config.get('num_classes')}: {_shorten(names)}" if names else config.get("num_classes"))
    _print("preprocessing", _join(config.get("preprocessing") or {}) or "not recorded")
    _print("parameters", f"{sizes.total():,} trained")
    for module, size in sizes.items():
        _print(f"  {module}", f"{size:,}")
    if "insvp" in config:
        _print("configuration", "")
    for name, value in (config.get("insvp") or {}).items():
        _print(f"  {name}", value)
    return {"folder": str(folder), "trained_parameters": sizes.total(), "parameters": sizes} | config


def _describe_backbone(name: str) -> dict[str, Any]:
    import timm
    import torch

    from insvp_fast import InsVPConfig, InsVPViT, unsupported_reason
    from insvp_fast.checkpoints.backbone import create_backbone, is_name, is_shipped, weights_report
    from insvp_fast.checkpoints.state_dict import backbone_sha256
    from insvp_fast.reference import structure_of
    from insvp_fast.training.backbone import resolve_preprocessing

    sha256 = None
    if is_name(name) and not is_shipped(name):
        with torch.device("meta"):  # only the shapes are needed
            backbone: Any = timm.create_model(name, num_classes=0)
    else:
        backbone = create_backbone(name, num_classes=0)
        sha256 = backbone_sha256(backbone, torch.float32)
        _print("sha256", sha256)
    try:
        structure = structure_of(backbone)
        patch_size, widths = structure.patch_size(backbone), structure.widths(backbone)
        config = InsVPConfig() if widths else InsVPConfig(common_prompt=False, specific_prompt=False)
        with warnings.catch_warnings(action="ignore"):  # of the general path, which is told below
            model = InsVPViT(backbone.to("meta"), 0, config)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{name}: {error}") from error
    _print("backbone", f"{name}, a {type(backbone).__name__}")
    if report := weights_report(backbone):
        _print("weights", report)
    counts = ", ".join(f"{count} of width {width}" for width, count in Counter(widths).items())
    _print("blocks", counts or "none that prompts can be put into: it takes image prompts only")
    size, preprocessing = backbone.pretrained_cfg["input_size"], resolve_preprocessing(backbone)
    _print("images", f"{size[1]}x{size[2]} in patches of {patch_size}x{patch_size}")
    _print("preprocessing", _join(preprocessing) + " (timm's for these weights)")
    parameters = sum(p.numel() for p in backbone.parameters())
    _print("parameters", f"{parameters:,} frozen")
    reason = unsupported_reason(model)
    _print("runs", f"through the general path: {reason}" if reason else "through the fast path")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "the paper's configuration" if widths else "the paper's image prompts"
    _print("InsVP adds", f"{trained:,} trained parameters ({what}) and a head")
    return {
        "name": name,
        "architecture": type(backbone).__name__,
        "sha256": sha256,
        "weights": report,
        "blocks": widths,
        "patch_size": patch_size,
        "preprocessing": preprocessing,
        "parameters": parameters,
        "unsupported_reason": reason,
        "trained_parameters": trained,
    }


def _count_parameters(file: Path) -> Counter[str]:
    """The parameters of each top-level module, from the header of a safetensors file."""
    sizes: Counter[str] = Counter()
    try:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if key.rpartition(".")[2] not in BUFFERS:
                    sizes[key.partition(".")[0]] += math.prod(tensors.get_slice(key).get_shape())
    except (OSError, SafetensorError) as error:
        raise CommandError(f"{file}: not a safetensors file that can be read ({error})") from error
    return sizes


def _print(label: str, value: object) -> None:
    print(f"{label:20} {value}".rstrip())


def _join(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _shorten(names: list[str]) -> str:
    return ", ".join(map(str, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
