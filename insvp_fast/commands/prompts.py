"""Draw what a trained model adds to images, and where it then looks: prompts, heat map and Grad-CAM.

A picture has one row per image, and eight rows at most: prompts.png, prompts-2.png, ... The same is written as arrays
of NumPy, in a folder for each image: image.npy, global_prompt.npy, patch_prompt.npy, image_prompt.npy and
prompted_image.npy, in the units of the normalized image; heat_map.npy, grad_cam.npy, grad_cam_without_prompts.npy and
probabilities.npy.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from insvp_fast.atomic_files import replace_file
from insvp_fast.commands.options import add_json, add_model, make_folder, read_class_names
from insvp_fast.errors import CommandError

SUMMARY = "draw the prompts of images, their heat map and Grad-CAM"
ROWS = 8  # of a picture
PICTURE = re.compile(r"prompts(-\d+)?\.png", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image, or a folder to search for images")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder to write to (default: prompts, in RUN or ADAPTER; for a name, in this folder)",
    )
    add_json(parser)


def run(
    run: str, images: list[str], backbone: str | None, class_names: str | None, output: str | None
) -> dict[str, Any]:
    given = read_class_names(class_names)

    import torch

    from insvp_fast.data.image_list import ImageList
    from insvp_fast.figures.prompts import explain, plot_prompts
    from insvp_fast.training.load import load_run
    from insvp_fast.training.prediction import Classifier

    files = list(ImageList(images))
    folder = make_folder(output or Path(run if Path(run).is_dir() else ".", "prompts"))
    names, pictures = _distinct_names(files), [_picture(folder, 1 + i) for i in range(-(-len(files) // ROWS))]
    inputs = {Path(file).resolve() for file in files}
    for place in (*pictures, *(folder / name for name in names)):
        if place.resolve() in inputs:
            problem = f"--output is {folder}: {place} would be written, and is one of the images"
            raise CommandError(f"{problem}: expected another folder")
    trained = load_run(run, backbone, given)
    classifier = Classifier(trained)
    data, reason = classifier.images(files), None
    for start, picture in zip(range(0, len(files), ROWS), pictures, strict=True):
        batch = torch.stack([data[i][0] for i in range(start, min(start + ROWS, len(files)))])
        shown, reason = explain(classifier.model, batch.to(classifier.device))
        rows = names[start : start + ROWS]
        plot_prompts(shown, classifier.class_names, trained.preprocessing, picture, names=rows)
        for i, name in enumerate(rows):
            _write_arrays(folder / name, {part: of_all[i] for part, of_all in shown.items()})
        print(f"written: {picture}, and arrays of {', '.join(rows)}", flush=True)
    _remove_leftovers(folder, len(pictures), inputs)
    if reason is not None:
        print(f"insvp: {reason}", file=sys.stderr)
    return {"folder": str(folder), "images": dict(zip(files, names, strict=True)), "unsupported_reason": reason}


def _picture(folder: Path, number: int) -> Path:
    return folder / f"prompts{f'-{number}' if number > 1 else ''}.png"


def _remove_leftovers(folder: Path, written: int, inputs: Container[Path]) -> None:
    """Remove the pictures of an earlier call that wrote more of them, but none that was an image of this one."""
    for number in itertools.count(written + 1):
        picture = _picture(folder, number)
        if picture.resolve() in inputs:
            continue
        try:
            picture.unlink()
        except FileNotFoundError:
            break


def _distinct_names(files: Sequence[str]) -> list[str]:
    """The files' names without their endings, and -2, -3, ... behind those that come again or are not a folder's here.

    Such are a picture's, and dots alone, which name the folder itself or the one that it is in.
    """
    names: list[str] = []
    taken: set[str] = set()  # in lower case: some file systems do not tell it apart
    for stem in (Path(file).stem for file in files):
        name, number = stem, 1
        while name.lower() in taken or PICTURE.fullmatch(name) or not name.strip("."):
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
        taken.add(name.lower())
    return names


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        with replace_file(folder / f"{name}.npy") as stream:
            np.save(stream, array.numpy())
