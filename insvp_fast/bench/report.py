"""``insvp bench``: time the eager models and write a report in Markdown, with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from insvp_fast.bench.jobs import AUTOCAST_DTYPES
from insvp_fast.bench.machine import machine_facts
from insvp_fast.bench.models import PROVIDERS
from insvp_fast.bench.tables import format_products, line, provider_title, table
from insvp_fast.bench.timing import Row, compare
from insvp_fast.runtime import hardware
from insvp_fast.testing import DEVICE

__all__ = ["run_benchmark"]


def run_benchmark(file: str | None, name: str, batch: int | None, rounds: int) -> list[Row]:
    """Time inference and training steps of the eager ``PROVIDERS`` in fp32 and bf16, and print each row.

    Args:
        file: where the report goes, if anywhere; the plot goes beside it, as .png.
        name: of the model in timm, a ViT or a Swin.
        batch: images of a step; by default 2, and 64 on a GPU.
    """
    if file is not None:
        import insvp_fast.figures.style  # noqa: F401  # if matplotlib is missing, fail before the measurements
    batch = batch or (2 if DEVICE.type == "cpu" else 64)
    rows: list[Row] = []
    for precision in ("fp32", "bf16"):
        if DEVICE.type == "cpu" and not hardware.has_products(AUTOCAST_DTYPES[precision] or torch.float32):
            print(f"{precision} left out: without instructions for it, PyTorch's own products take minutes")
            continue
        for job in ("training step", "inference"):
            rows += compare(job, precision, PROVIDERS[:3], name, batch, rounds)
            print("\n".join(map(line, rows[-3:])), format_products(rows[-1:]), sep="\n", flush=True)
    if file is not None:
        _write(Path(file), name, rows)
    return rows


def _write(path: Path, name: str, rows: Sequence[Row]) -> None:
    picture = path.with_suffix(".png")
    _plot(rows, picture)
    facts = "\n".join(f"- {key}: {value}" for key, value in machine_facts().items())
    path.write_text(
        f"# InsVP against the bare frozen timm model\n\n{name}, random weights and images, "
        "the paper's configuration.\n\n"
        f"{facts}\n\n{table(rows)}\n\n![images per second]({picture.name})\n"
    )
    print(f"written: {path}, {picture}")


def _plot(rows: Sequence[Row], file: Path) -> None:
    """Images per second, one panel per job and precision."""
    from insvp_fast.figures.style import drawing

    panels = list(dict.fromkeys((row["job"], row["precision"]) for row in rows))
    with drawing(file, 3.4 * len(panels), 2.6) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = [row for row in rows if (row["job"], row["precision"]) == panel][::-1]
            speeds = [row["images per second"] for row in shown]
            bars = axes.barh([provider_title(row["provider"]) for row in shown], speeds)
            axes.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=2)
            axes.set(xlabel="images/s", title=f"{', '.join(panel)}, batch {shown[0]['batch']}")
            axes.grid(False, axis="y")
            axes.margins(x=0.2)
        figure.suptitle(f"{rows[0]['model']} on {machine_facts()['device']}, torch {torch.__version__}")
