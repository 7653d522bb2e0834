"""Draw the picture of the README: prompts of a trained model on the left, measured times on the right.

insvp train --output build/readme
python -m tools.draw_readme build/readme/digits-1
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

from benchmarks.results import newest_of_cpus, read_results
from insvp_fast.figures.prompts import denormalize, to_gray_range
from insvp_fast.training.load import load_run, own_test_data

ROOT = Path(__file__).parents[1]
CLASSES = ("2", "3", "6", "8")
MODEL, PROVIDERS = "vit_base_patch16_224", {"bare": "bare frozen timm ViT, eager", "insvp_fast": "InsVPViT"}
BATCH = 8
COLORS = {"bare": "#b8bec6", "insvp_fast": "#2f6fb0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder of `insvp train`, on the digits")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/assets/readme.png")
    arguments = parser.parse_args()
    # opaque white, so that black text is read on a dark page too
    figure = Figure(figsize=(8, 3.5), dpi=200, facecolor="white", layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.12), wspace=0.03)
    draw_prompts(left, arguments.run)
    draw_times(right, newest_of_cpus(read_results())[0])
    stream = io.BytesIO()
    figure.savefig(stream)
    # a palette: a third of the size
    Image.open(stream).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(arguments.output, optimize=True)


@torch.inference_mode()
def draw_prompts(figure: SubFigure, run: str) -> None:
    """One column per class: a test image, the two parts of its prompt, and the prompted image."""
    _, model, preprocessing, class_names, _ = loaded = load_run(run)
    test = own_test_data(loaded)
    first: dict[str, Tensor] = {}
    for index in range(len(test)):  # type: ignore[arg-type]
        image, label = test[index]
        first.setdefault(class_names[label], image)
    images = torch.stack([first[name] for name in CLASSES])
    prompt = model.image_prompt(images)
    rows = {
        "image": denormalize(images, preprocessing),
        "+ global\nprompt": to_gray_range(prompt.global_),
        "+ patch\nprompt": to_gray_range(prompt.patch),
        "= prompted\nimage": denormalize(prompt.prompted, preprocessing),
    }
    figure.suptitle("InsVP draws a prompt for each image", fontsize=10)
    for (name, pictures), line in zip(rows.items(), figure.subplots(4, len(images)), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")


def draw_times(figure: SubFigure, saved: dict[str, Any]) -> None:
    """Milliseconds per image: for each job, the bare backbone and InsVP around it."""
    figure.suptitle("ViT-B/16: InsVP takes less time than the bare backbone", fontsize=10)
    axes: Axes = figure.subplots()
    jobs = [(precision, job) for precision in ("fp32", "bf16") for job in ("training step", "inference")]
    for place, (precision, job) in enumerate(jobs):
        rows = {row["provider"]: row for row in saved["rows"] if fits(row, precision, job)}
        times = {provider: 1000 / row["images per second"] for provider, row in rows.items()}
        for offset, provider in enumerate(PROVIDERS):
            y = place + 0.38 * (offset - 0.5)
            axes.barh(
                y, times[provider], 0.36, color=COLORS[provider], label=PROVIDERS[provider] if not place else None
            )
            text = f" {times[provider]:.0f} ms"
            text += f"  ({rows[provider]['ratio']:.0%})" if provider != "bare" else ""
            axes.text(times[provider], y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(jobs)), [f"{job}\n{precision}" for precision, job in jobs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    axes.set_xlabel(f"ms per image, batch {BATCH}\n{saved['machine']['device']}", fontsize=8)
    axes.tick_params("x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=7, frameon=False, handlelength=1.2)


def fits(row: dict[str, Any], precision: str, job: str) -> bool:
    measured = row["model"], row.get("config", "paper"), row["batch"], row["precision"], row["job"]
    return measured == (MODEL, "paper", BATCH, precision, job)


if __name__ == "__main__":
    main()
