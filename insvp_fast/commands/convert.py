"""Turn a checkpoint of the authors' released code (best_model.pth) into an adapter folder.

Only tensors are read: nothing in the file is executed. The adapter fits the backbone that is in the file; whether
timm's weights of that name are the same ones is told when it is loaded, and --keep-backbone keeps those of the file.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from insvp_fast.errors import CheckpointError, CommandError

SUMMARY = "turn the authors' best_model.pth into an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="best_model.pth, or the same tensors as .safetensors")
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        default="vit_base_patch16_224.orig_in21k",
        help="the timm name of the backbone in the file (default: %(default)s, which the authors link)",
    )
    parser.add_argument("--simam", action="store_true", help="it was trained with SimAM, as for CUB, Dogs and SVHN")
    parser.add_argument("--output", metavar="FOLDER", help="a new folder (default: FILE without its ending)")
    parser.add_argument("--keep-backbone", action="store_true", help="write its backbone beside, backbone.safetensors")


def run(file: str, backbone: str, simam: bool, output: str | None, keep_backbone: bool) -> int:
    folder = Path(output) if output else Path(file).with_suffix("")
    if folder.exists():
        raise CommandError(f"{folder} exists: nothing is overwritten; choose another folder by --output")
    from insvp_fast import InsVPViT
    from insvp_fast.checkpoints.backbone import save_backbone

    if not Path(file).is_file():
        raise CommandError(f"{file}: there is no such file")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            model = InsVPViT.from_released(file, backbone, simam)
        except CheckpointError as error:
            raise CommandError(" ".join(str(error).split())) from error
    if keep_backbone:
        folder.mkdir(parents=True)
        save_backbone(model.backbone, folder / "backbone.safetensors")
    model.save_pretrained(folder)
    for warning in said:
        print(f"warning: {warning.message}")
    print(f"written: {folder}, {model.num_classes} classes around {backbone}")
    return 0
