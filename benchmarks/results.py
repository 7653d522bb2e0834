"""The files of results, one per machine and torch version, and the README's table, which is made of them.

python -m benchmarks.results   rewrites the table between the README's markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from insvp_fast import bench

HERE = Path(__file__).resolve().parent

__all__ = ["save", "waterfall_table", "write_readme"]

KEYS = ("job", "precision", "provider", "model", "batch", "config", "technique")  # rows alike in these are the same row


def save(rows: list[bench.Row], section: str = "rows", folder: Path = HERE / "results") -> Path:
    """Merge rows into a section of this machine's file; a row replaces the older one that measured the same."""
    facts = bench.machine()
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    path = folder / f"{name}-torch{facts['torch']}.json"
    path.parent.mkdir(exist_ok=True)
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    merged = {identity(row): row for row in [*saved.get(section, []), *rows]}
    saved = {**saved, "machine": facts, section: list(merged.values())}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    return path


def identity(row: bench.Row) -> tuple[Any, ...]:
    return tuple(row.get(key, "paper" if key == "config" else None) for key in KEYS)


def write_readme(folder: Path = HERE / "results", readme: Path = HERE.parent / "README.md") -> None:
    """Put tables of all saved results between the README's markers."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        saved = json.loads(path.read_text())
        # what was timed together stands together, the bare ViT first
        groups: dict[tuple[Any, ...], list[bench.Row]] = {}
        for row in saved["rows"]:
            key = row["model"], row.get("config", "paper"), row["job"], row["precision"], row["batch"]
            groups.setdefault(key, []).append(row)
        rows = [row for group in groups.values() for row in sorted(group, key=rank)]
        parts.append(f"{saved['machine']['device']}, torch {saved['machine']['torch']}:\n\n{bench.table(rows)}\n")
        if "waterfall" in saved:
            parts.append(f"{waterfall_table(saved['waterfall'])}\n")
    before, rest = readme.read_text().split("<!-- results -->\n", 1)
    _, after = rest.split("<!-- end of results -->", 1)
    readme.write_text(f"{before}<!-- results -->\n" + "\n".join(parts) + f"<!-- end of results -->{after}")


def rank(row: bench.Row) -> int:
    order = ("bare", "released", "authors", "reference", "insvp_fast")
    return order.index(row["provider"].split(" ")[0])


def waterfall_table(rows: list[bench.Row]) -> str:
    """Each row's time over that of the row before and over the bare ViT's, memory and errors."""
    lines = [
        "| technique | job | s | to the row before | to the bare ViT | saved per image | error: logits, gradients |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    before: bench.Row | None = None
    for row in rows:
        same = before is not None and all(before[key] == row[key] for key in ("precision", "model", "batch"))
        step = f"{row['ratio'] / before['ratio']:.2f}" if before is not None and same else ""
        job = f"{row['model']}, {row['job']}, {row['precision']}, batch {row['batch']}"
        peak = f", peak {row['peak MB']:.0f} MB" if "peak MB" in row else ""
        errors = f"{row['error of logits']:.0e}, {row['error of gradients']:.0e}"
        cells = [row["technique"], job, f"{row['seconds']:.4f}", step, bench.ratio(row)]
        lines.append("| " + " | ".join([*cells, f"{row['saved MB per image']:.0f} MB{peak}", errors]) + " |")
        before = row
    return "\n".join(lines)


if __name__ == "__main__":
    write_readme()
