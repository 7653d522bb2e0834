"""Write a trained model to a file that computes its logits elsewhere, with its class names and preprocessing in it.

onnx and openvino files run without this package, in ONNX Runtime and OpenVINO. torch (torch.export) and aoti
(AOTInductor) files keep its fast operations; `insvp_fast.export.load` loads all four. Before the file is in place its
logits are compared with the model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from insvp_fast.checkpoints.names import ADAPTER_FILE
from insvp_fast.commands.options import RUN_OR_ADAPTER, add_backbone, add_json, output_file, positive
from insvp_fast.errors import CommandError
from insvp_fast.training.run_folder import CONFIG_FILE, is_run

SUMMARY = "write a trained model as a file for ONNX Runtime, OpenVINO or PyTorch"
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "aoti": "model-aoti.pt2", "openvino": "model.xml"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", **RUN_OR_ADAPTER)
    add_backbone(parser)
    parser.add_argument("--format", choices=FILES, required=True, help="what the file is for")
    parser.add_argument(
        "--output", metavar="FILE", help="file to write (default: model.onnx or the like in RUN; for a name, here)"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="images that the file takes at once (default: any)")
    parser.add_argument(
        "--preprocess", action="store_true", help="take 8-bit images: resize, crop and normalize inside"
    )
    parser.add_argument("--channels-last", action="store_true", help="with --preprocess, images are [B, H, W, 3]")
    parser.add_argument("--standard", action="store_true", help="no operations of this package in torch and aoti")
    parser.add_argument("--int8", action="store_true", help="8-bit weights; tells what they cost in accuracy")
    parser.add_argument(
        "--images", metavar="PATH", nargs="+", help="what --int8 is tried on (default: the run's test data)"
    )
    add_json(parser)


def run(
    run: str,
    backbone: str | None,
    format: str,
    output: str | None,
    batch: int | None,
    preprocess: bool,
    channels_last: bool,
    standard: bool,
    int8: bool,
    images: list[str] | None,
) -> dict[str, Any]:
    folder = Path(run)
    of_run = is_run(folder)
    if folder.exists() and not (folder / (CONFIG_FILE if of_run else ADAPTER_FILE)).is_file():
        raise CommandError(f"{run}: expected a run folder ({CONFIG_FILE}) or an adapter folder ({ADAPTER_FILE})")
    if images and not int8:
        raise CommandError("--images: expected with --int8, which is tried on them")
    if int8 and not images and not of_run:
        raise CommandError("--int8 of an adapter: expected --images, to tell what it costs")
    file = output_file(output or Path(run if folder.exists() else ".", FILES[format]))

    from insvp_fast.export import export_model
    from insvp_fast.export.formats import require_packages

    require_packages(format, int8)
    model, test_images = _load(run, of_run, backbone, images, int8)
    done = export_model(
        model,
        file,
        format,
        preprocess=preprocess,
        channels_last=channels_last,
        batch=batch,
        standard=standard,
        int8=int8,
        images=test_images,
    )
    for note in done.notes:
        print(note)
    _print_facts(done, format)
    print(f"written: {', '.join(map(str, done.files))}, {sum(f.stat().st_size for f in done.files) / 2**20:.1f} MiB")
    result = {
        "format": format,
        "files": done.files,
        "operations": done.operations,
        "parity": [parity._asdict() for parity in done.parity],
        "notes": done.notes,
    }
    if done.loss is not None:
        _print_loss(done.loss)
        result["int8"] = done.loss._asdict()
    return result


def _load(run: str, of_run: bool, backbone: str | None, paths: list[str] | None, int8: bool) -> tuple[Any, Any]:
    """The model, and the images on which 8-bit weights are tried, or None without ``int8``."""
    from insvp_fast.data.images import Images
    from insvp_fast.methods.load import load_model
    from insvp_fast.training.backbone import require_rgb
    from insvp_fast.training.load import load_run, own_test_data

    loaded = load_run(run, backbone) if of_run else None
    model = load_model(run, backbone) if loaded is None else loaded.model
    require_rgb(model.backbone, f"the backbone of {run}")
    if not int8:
        return model, None
    if model.preprocessing is None:
        raise CommandError(f"--int8: {run} does not say how images are prepared: expected its preprocessing")
    if paths:
        from insvp_fast.data.image_list import ImageList

        files = list(ImageList(paths))
        return model, Images(files, [-1] * len(files), exif_rotation=model.exif_rotation)
    assert loaded is not None
    return model, own_test_data(loaded)


def _print_facts(done: Any, format: str) -> None:
    from insvp_fast.export import FORMATS

    facts, operations = done.facts, f"{done.operations} calls of this package's operations"
    print(f"format: {FORMATS[format].title}, {operations if done.operations else 'standard operators only'}")
    names = ("batch", "height", "width", "3") if facts.input[-1] == 3 else ("batch", "channels", "height", "width")
    shape = [size or name for size, name in zip(facts.input, names, strict=True)]
    print(f"images: {str(facts.dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]; inside: {facts.inside}")
    for parity in done.parity:
        print(f"parity: {parity}")


def _print_loss(loss: Any) -> None:
    accuracy, answer = ("right labels", "labels") if loss.multi_label else ("top-1", "class")
    if loss.accuracy_before is not None:
        change = 100 * (loss.accuracy_after - loss.accuracy_before)
        print(f"int8: {accuracy} {loss.accuracy_after:.2%}, before {loss.accuracy_before:.2%} ({change:+.2f} points)")
    print(
        f"int8: {loss.images:,} images, the same {answer} for {loss.agreement:.2%}; "
        f"logits differ by at most {loss.largest_difference:.3g}"
    )
