"""Rows of results as lines of a terminal and as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from insvp_fast.bench.timing import Row

__all__ = ["format_floor_ratio", "format_products", "format_ratio", "join_cells", "line", "provider_title", "table"]


def line(row: Row) -> str:
    """A row as one line of a terminal."""
    text = f"{row['job']:18} {row['precision']:5} {row['config']:8} {row['provider']:24} batch {row['batch']}: "
    text += f"{row['seconds']:8.4f} s, {row['images per second']:9.2f} images/s, ratio {format_ratio(row)}"
    more = {
        "floor ratio": "floor ratio {:.2f}",
        "saved MB per image": "saved {:.1f} MB/image",
        "peak MB": "peak {:.0f} MB",
        "error": "error {:.1e}",
    }
    return ", ".join([text, *(form.format(row[key]) for key, form in more.items() if key in row)])


def format_products(rows: Sequence[Row]) -> str:
    """The rates of a block's products by what multiplies: the lowest and the highest of rows of one precision."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        for by, rate in row["products"].items():
            rates.setdefault(by, []).append(rate / 1e9)
    ranges = {by: sorted({f"{rate:.0f}" for rate in (min(found), max(found))}, key=int) for by, found in rates.items()}
    text = ", ".join(f"{by} {'-'.join(found)}" for by, found in ranges.items())
    return f"products in {rows[0]['precision']}, batch {rows[0]['batch']}, GFLOP/s: {text}"


def format_ratio(row: Row) -> str:
    """Time over the first provider's time, with the 20th and 80th percentile in brackets where the row has them."""
    return f"{row['ratio']:.2f}" + (f" ({row['ratio p20']:.2f}-{row['ratio p80']:.2f})" if "ratio p20" in row else "")


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown; the column of the floor ratio only where a row has one."""
    with_floor = any("floor ratio" in row for row in rows)
    names = ["job", "precision", "batch", "", "images/s", "ratio", *["floor ratio"] * with_floor]
    names += ["saved for backward, per image", "error of logits"]
    lines = [join_cells(names), "|" + "---|" * len(names)]
    for row in rows:
        config = "" if row.get("config", "paper") == "paper" else f", {row['config']}"
        cells = [f"{row['model']}{config}, {row['job']}", row["precision"], str(row["batch"])]
        cells += [provider_title(row["provider"]), f"{row['images per second']:.2f}", format_ratio(row)]
        cells += [format_floor_ratio(row)] * with_floor
        cells.append(f"{row['saved MB per image']:.0f} MB" if "saved MB per image" in row else "")
        lines.append(join_cells([*cells, f"{row['error']:.0e}" if "error" in row else ""]))
    return "\n".join(lines)


def join_cells(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def format_floor_ratio(row: Row) -> str:
    """The floor ratio, or nothing in a row that was measured without."""
    return f"{row['floor ratio']:.2f}" if "floor ratio" in row else ""


def provider_title(provider: str) -> str:
    """A provider's name for readers."""
    kind, _, more = provider.partition(" ")
    names = {
        "bare": "bare timm model",
        "reference": "InsVPReference",
        "insvp_fast": "InsVPViT",
        "released": "the release",
    }
    more = {"freezing": "compiled, freezing", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}.get(more, more)
    return names.get(kind, kind) + (f", {more}" if more else "")
