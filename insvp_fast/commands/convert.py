"""Convert a checkpoint of the authors' released code (best_model.pth) into an adapter folder.

Only tensors are read from the file, no code in it is run. The adapter fits the backbone in the file. Loading it checks
whether timm's weights of that name are the same; if they are not, use --keep-backbone, which writes the file's own.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import add_json
from insvp_fast.errors import CommandError

SUMMARY = "convert a checkpoint of the authors' code into an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="best_model.pth, or the same tensors as .safetensors")
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        default="vit_base_patch16_224.orig_in21k",
        help="timm name of the backbone in the file (default: %(default)s, which the authors link)",
    )
    parser.add_argument("--simam", action="store_true", help="it was trained with SimAM, as for CUB, Dogs and SVHN")
    parser.add_argument("--output", metavar="FOLDER", help="folder to make (default: FILE without its suffix)")
    parser.add_argument(
        "--keep-backbone", action="store_true", help="write the file's backbone as well, to backbone.safetensors"
    )
    add_json(parser)


def run(file: str, backbone: str, simam: bool, output: str | None, keep_backbone: bool) -> dict[str, Any]:
    folder = Path(output) if output else Path(file).with_suffix("")
    if folder.exists():
        raise CommandError(f"{folder} exists: nothing is overwritten; choose another folder by --output")
    if not Path(file).is_file():
        raise CommandError(f"{file}: there is no such file")
    from insvp_fast import InsVPViT
    from insvp_fast.checkpoints.backbone import save_backbone

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = InsVPViT.from_released(file, backbone, simam)
    if keep_backbone:
        folder.mkdir(parents=True)
        save_backbone(model.backbone, folder / "backbone.safetensors")
    model.save_pretrained(folder)
    for warning in caught:
        print(f"warning: {warning.message}")
    print(f"written: {folder}, {model.num_classes} classes around {backbone}")
    return {
        "adapter": str(folder),
        "backbone": backbone,
        "num_classes": model.num_classes,
        "warnings": [str(warning.message) for warning in caught],
    }
