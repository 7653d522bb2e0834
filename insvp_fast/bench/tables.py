"""Rows of results as lines of a terminal and as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from insvp_fast.bench.timing import Row

__all__ = ["format_ratio", "line", "provider_title", "table"]


def line(row: Row) -> str:
    """A row as one line of a terminal."""
    text = f"{row['job']:18} {row['precision']:5} {row['config']:8} {row['provider']:24} batch {row['batch']}: "
    text += f"{row['seconds']:8.4f} s, {row['images per second']:9.2f} images/s, ratio {format_ratio(row)}"
    more = {"saved MB per image": "saved {:.1f} MB/image", "peak MB": "peak {:.0f} MB", "error": "error {:.1e}"}
    return ", ".join([text, *(form.format(row[key]) for key, form in more.items() if key in row)])


def format_ratio(row: Row) -> str:
    """Time over the first provider's time, with the 20th and 80th percentile in brackets where the row has them."""
    return f"{row['ratio']:.2f}" + (f" ({row['ratio p20']:.2f}-{row['ratio p80']:.2f})" if "ratio p20" in row else "")


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown."""
    lines = ["| job | precision | batch | | images/s | ratio | saved for backward, per image | error of logits |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        config = "" if row.get("config", "paper") == "paper" else f", {row['config']}"
        job = f"{row['model']}{config}, {row['job']}"
        saved = f"{row['saved MB per image']:.0f} MB" if "saved MB per image" in row else ""
        error = f"{row['error']:.0e}" if "error" in row else ""
        cells = [job, row["precision"], str(row["batch"]), provider_title(row["provider"])]
        cells += [f"{row['images per second']:.2f}", format_ratio(row), saved, error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def provider_title(provider: str) -> str:
    """A provider's name for readers."""
    kind, _, more = provider.partition(" ")
    names = {
        "bare": "bare timm ViT",
        "reference": "InsVPReference",
        "insvp_fast": "InsVPViT",
        "released": "the release",
    }
    return names.get(kind, kind) + (f", {more}" if more else "")
