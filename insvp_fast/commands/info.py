"""Say what is in a run folder, an adapter folder or a backbone: settings, sizes, classes, preprocessing, results.

A backbone is what --backbone of `insvp train` takes; of the name of a timm Vision Transformer nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from insvp_fast.errors import CommandError
from insvp_fast.training.folders import ADAPTER_FILE, RUN_FILE, WEIGHTS_FILE, read_config, read_json, read_results

SUMMARY = "say what is in a run, an adapter or a backbone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RUN|ADAPTER|BACKBONE", help="a folder, or a timm name")


def run(what: str) -> int:
    folder = Path(what)
    about = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else None
    if about is not None and "architecture" not in about:  # which timm writes into a file of the same name
        _run(folder)
    elif (folder / ADAPTER_FILE).is_file():
        _adapter(folder)
    elif folder.is_dir() and about is None:
        raise CommandError(f"{what}: neither a run ({RUN_FILE}), an adapter ({ADAPTER_FILE}) nor a backbone")
    else:
        _backbone(what)
    return 0


def _run(folder: Path) -> None:
    (recipe, config), results = read_config(folder), read_results(folder)
    _say("run", f"{folder}, {'finished' if results else 'not finished'}")
    _say("recipe", f"{recipe.recipe or 'none'}, protocol {recipe.protocol}")
    _say("data", f"{recipe.data}: {_pairs(config.get('images', {}))}")
    for name, result in results.items():
        _say(name, f"{result['test_accuracy']:.2%} on {config.get('tested_on', 'test')}")
    for name, value in recipe.to_dict().items():
        if name not in ("recipe", "protocol", "data") and value is not None:
            _say(f"  {name}", value)
    if (folder / "adapter" / ADAPTER_FILE).is_file():
        print()
        _adapter(folder / "adapter")


def _adapter(folder: Path) -> None:
    about, shapes = read_json(folder / ADAPTER_FILE), _shapes(folder / WEIGHTS_FILE)
    backbone, names = about.get("backbone") or {}, about.get("class_names")
    sizes: Counter[str] = Counter()
    for key, shape in shapes.items():
        sizes[key.partition(".")[0]] += math.prod(shape)
    _say("adapter", f"{folder}, {(folder / WEIGHTS_FILE).stat().st_size / 2**20:.2f} MiB")
    _say("made by", f"insvp_fast {about.get('insvp_fast_version')}")
    _say("backbone", f"{backbone.get('name')}, {backbone.get('dtype')}, sha256 {str(backbone.get('sha256'))[:12]}...")
    _say("classes", f"{about.get('num_classes')}: {_some(names)}" if names else about.get("num_classes"))
    _say("preprocessing", _pairs(about.get("preprocessing") or {}) or "not recorded")
    _say("parameters", f"{sum(sizes.values()):,} trained")
    for part, size in sizes.items():
        _say(f"  {part}", f"{size:,}")
    _say("configuration", "")
    for name, value in (about.get("insvp") or {}).items():
        _say(f"  {name}", value)


def _backbone(name: str) -> None:
    import timm
    import torch

    from insvp_fast import InsVPConfig, InsVPReference, unsupported_reason
    from insvp_fast.checkpoints.backbone import is_name, is_shipped
    from insvp_fast.checkpoints.state_dict import backbone_sha256
    from insvp_fast.training.backbone import load_backbone, preprocessing_of

    if is_name(name) and not is_shipped(name):
        with torch.device("meta"):  # no weights are needed to say how many there are
            backbone: Any = timm.create_model(name, num_classes=0)
    else:
        backbone = load_backbone(name)
        _say("sha256", backbone_sha256(backbone, torch.float32))
    if not isinstance(backbone, timm.models.VisionTransformer):
        raise CommandError(f"{name} is a {type(backbone).__name__}: expected a Vision Transformer of timm")
    embedding = backbone.patch_embed
    _say("backbone", name)
    _say("blocks", f"{len(backbone.blocks)} of width {backbone.embed_dim}, {backbone.blocks[0].attn.num_heads} heads")
    _say("images", f"{embedding.img_size} in patches of {embedding.patch_size}, {embedding.num_patches} of them")
    _say("preprocessing", _pairs(preprocessing_of(backbone)) + " (timm's for these weights)")
    _say("parameters", f"{sum(p.numel() for p in backbone.parameters()):,} frozen")
    model = InsVPReference(backbone.to("meta"), 0, InsVPConfig())
    reason = unsupported_reason(model)
    _say("runs", f"through the general path: {reason}" if reason else "through the fast path")
    sizes = Counter({key: p.numel() for key, p in model.named_parameters() if p.requires_grad})
    _say("InsVP adds", f"{sizes.total():,} trained parameters (the paper's configuration) and a head")


def _shapes(file: Path) -> dict[str, list[int]]:
    """The names and shapes of a safetensors file: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return {key: value["shape"] for key, value in header.items() if key != "__metadata__"}
    except (OSError, ValueError, KeyError, MemoryError) as error:
        raise CommandError(f"{file}: not a safetensors file that can be read ({error})") from error


def _say(label: str, value: object) -> None:
    print(f"{label:20} {value}".rstrip())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
