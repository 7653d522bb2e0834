"""The saved results, one JSON file per machine and torch version, and the tables in Markdown that are made of them.

python -m benchmarks.results   rewrites the tables between the markers of README.md and docs/performance.md
"""

from __future__ import annotations

import itertools
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from insvp_fast.bench.machine import machine_facts
from insvp_fast.bench.tables import format_floor_ratio, format_products, format_ratio, join_cells, table
from insvp_fast.bench.timing import Row

__all__ = ["newest_of_cpus", "read_results", "save", "waterfall_table", "write_tables"]

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"
# what the README shows: the instruction sets of machines that multiply bf16 in hardware, and the model
SHOWN, MODEL = ("AVX512-BF16", "AVX512-AMX"), "vit_base_patch16_224"
KEYS = ("job", "precision", "provider", "model", "batch", "config", "technique")  # rows alike in these are the same row


def save(rows: list[Row], section: str = "rows", folder: Path = FOLDER) -> Path:
    """Merge rows into a section of this machine's file; a row replaces the older one that measured the same."""
    facts = machine_facts() | {"date": date.today().isoformat()}
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    path = folder / f"{name}-torch{facts['torch']}.json"
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    # older rows stay, so that the file's facts become those of the new rows alone: rows without their own get the old
    before = _own(saved.get("machine", {}))
    for old in (key for key, value in saved.items() if isinstance(value, list)):
        saved[old] = [row | before | row for row in saved[old]]  # what a row has stays, and in its order
    merged = {_identity(row): row for row in [*saved.get(section, []), *(row | _own(facts) for row in rows)]}
    saved = {**saved, "machine": facts, section: list(merged.values())}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return path


def _own(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that rows of one file may differ in."""
    return {key: facts[key] for key in ("date", "OMP_WAIT_POLICY") if key in facts}


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key, "paper" if key == "config" else None) for key in KEYS)


def write_tables(folder: Path = FOLDER, readme: Path = README, performance: Path = PERFORMANCE) -> None:
    """Write short tables into the README and all tables into the page on performance, between their markers.

    Raises:
        ValueError: for a file without the markers, or if no CPU multiplies bf16 in hardware.
    """
    saved = read_results(folder)
    short = "\n\n".join([short_table(newest_of_cpus(saved)), *gpu_tables(saved)])
    pages = {readme: short, performance: full_tables(saved)}
    for file, text in {file: _with_tables(file, tables) for file, tables in pages.items()}.items():
        file.write_text(text)


def _with_tables(file: Path, tables: str) -> str:
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} has no lines `{BEGIN.strip()}` and `{END}`")
    return f"{before}{begin}{tables}\n{end}{after}"


def short_table(newest: list[dict[str, Any]]) -> str:
    """InsVPViT in the paper's configuration against the bare timm ViT, by the results of each CPU.

    A row for each job and precision, at the largest batch that both were timed at, and one for an image by itself.
    """
    names = ["", MODEL, "precision", "batch", "bare timm ViT", "InsVPViT", "time ratio", "floor ratio"]
    lines = [join_cells(names), "|" + "---|" * len(names)]
    for file in newest:
        rows = sorted(
            (row for row in file["rows"] if _group(row)[:2] == ("paper", MODEL)), key=lambda row: row["batch"]
        )
        bare, ours = ({_group(row): row for row in rows if row["provider"] == name} for name in ("bare", "insvp_fast"))
        both = [group for group in bare if group in ours]  # the batches rise
        shown: list[tuple[Any, ...]] = []
        for kind in itertools.product(("training step", "inference"), ("fp32", "bf16")):
            shown += [group for group in both if group[2:4] == kind][-1:]
        shown += [group for group in both if group[2] == "inference" and group[4] == 1 and group not in shown]
        for group in shown:
            cells = [_title(file) if group == shown[0] else "", *map(str, group[2:])]
            cells += [f"{each[group]['images per second']:.2f} images/s" for each in (bare, ours)]
            lines.append(join_cells([*cells, format_ratio(ours[group]), format_floor_ratio(ours[group])]))
    return "\n".join(lines)


def gpu_tables(saved: list[dict[str, Any]]) -> list[str]:
    """InsVPViT in the paper's configuration on every GPU, against the bare timm ViT, eager and compiled."""
    tables = []
    for file in (file for file in saved if file["machine"].get("cuda")):
        groups: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in file["rows"]:
            if _group(row)[:2] == ("paper", MODEL):
                groups.setdefault(_group(row), {})[row["provider"]] = row
        names = [
            "",
            "precision",
            "batch",
            "bare timm ViT",
            "compiled",
            "InsVPViT",
            "ratio to bare",
            "to compiled",
        ]
        lines = [_title(file) + ":", "", join_cells(names), "|" + "---|" * len(names)]
        for (*_, job, precision, batch), rows in groups.items():
            bare, compiled, ours = (rows[name] for name in ("bare", "bare compiled", "insvp_fast"))
            cells = [f"{MODEL}, {job}", precision, str(batch)]
            cells += [f"{row['images per second']:.0f} images/s" for row in (bare, compiled, ours)]
            lines.append(join_cells([*cells, format_ratio(ours), f"{ours['seconds'] / compiled['seconds']:.2f}"]))
        tables.append("\n".join(lines))
    return tables


def _products(rows: list[Row]) -> list[str]:
    """A paragraph of the rates that the floor ratios are made of, if there are any."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for row in rows if "products" in row):
        groups.setdefault((row["precision"], row["batch"]), []).append(row)
    return ["; ".join(map(format_products, groups.values()))] if groups else []


def newest_of_cpus(saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of the results of each CPU that multiplies bf16 in hardware, by the CPU's name.

    Raises ValueError if there is none.
    """
    shown: dict[str, dict[str, Any]] = {}
    for file in sorted(saved, key=lambda file: str(file["machine"].get("date", ""))):
        if file["machine"].get("instructions") in SHOWN:
            shown[file["machine"]["device"]] = file
    if not shown:
        raise ValueError(f"no results of a machine with {' or '.join(SHOWN)}")
    return [shown[device] for device in sorted(shown)]


def read_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All saved results."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _group(row: Row) -> tuple[Any, ...]:
    """What rows that were timed together have in common."""
    return row.get("config", "paper"), row["model"], row["job"], row["precision"], row["batch"]


def _title(file: dict[str, Any]) -> str:
    return f"{file['machine']['device']}, torch {file['machine']['torch']}"


def full_tables(saved: list[dict[str, Any]]) -> str:
    """All rows and waterfalls, by machine; rows that were timed together are neighbors, the bare ViT first."""
    parts = []
    for file in saved:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in file["rows"]:
            groups.setdefault(_group(row), []).append(row)
        rows = [row for group in groups.values() for row in sorted(group, key=_rank)]
        parts += [_title(file) + ":", table(rows), *_products([row for row in rows if row["model"] == MODEL])]
        if "waterfall" in file:
            parts.append(waterfall_table(file["waterfall"]))
    return "\n\n".join(parts)


def _rank(row: Row) -> int:
    order = ("bare", "released", "authors", "reference", "insvp_fast")
    return order.index(row["provider"].split(" ")[0])


def waterfall_table(rows: list[Row]) -> str:
    """Each row's time over that of the row before and over the bare ViT's, memory and errors."""
    lines = [
        "| technique | job | s | to the row before | to the bare ViT | saved per image | error: logits, gradients |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    before: Row | None = None
    for row in rows:
        same = before is not None and all(before[key] == row[key] for key in ("precision", "model", "batch"))
        step = f"{row['ratio'] / before['ratio']:.2f}" if before is not None and same else ""
        job = f"{row['model']}, {row['job']}, {row['precision']}, batch {row['batch']}"
        peak = f", peak {row['peak MB']:.0f} MB" if "peak MB" in row else ""
        errors = f"{row['error of logits']:.0e}, {row['error of gradients']:.0e}"
        cells = [row["technique"], job, f"{row['seconds']:.4f}", step, format_ratio(row)]
        lines.append(join_cells([*cells, f"{row['saved MB per image']:.0f} MB{peak}", errors]))
        before = row
    return "\n".join(lines)


if __name__ == "__main__":
    write_tables()
