"""The table of a comparison: ours beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from insvp_fast.figures.runs import TITLES
from insvp_fast.studies.comparison import Compared
from insvp_fast.studies.entries import Protocol
from insvp_fast.studies.grid import make_entry
from insvp_fast.studies.paper import VTAB_GROUPS, PaperStudy
from insvp_fast.studies.tables import format_percent, markdown, write_table
from insvp_fast.training.recipe import Recipe, score_name

__all__ = ["measured_by", "paper_number", "report"]

HEADER = ("model", "trained parameters", "rate", "val", "test", "difference", "images/s", "memory MiB", "runs")


def report(
    name: str, study: PaperStudy, results: Mapping[str, Sequence[Compared]], protocol: Protocol, folder: Path
) -> str:
    """Write ``name.csv`` and ``name.md`` into the folder; returns the text.

    Args:
        results: of each data set, its rows.
    """
    measured = measured_by(compared for rows in results.values() for compared in rows)
    if measured != TITLES["accuracy"]:
        study = study._replace(numbers={})  # the paper's are accuracies
    parts, cells = [f"# {study.title[0].upper()}{study.title[1:]}\n"], []
    for data, rows in results.items():
        lines = [_line(compared, rows, study) for compared in rows]
        numbers = [paper_number(study, data, compared.row.label) for compared in rows]
        header = [*HEADER]
        if any(number is not None for number in numbers):
            header.append("paper")
            lines = [[*line, "–" if n is None else f"{n:.1f}"] for line, n in zip(lines, numbers, strict=True)]
        parts += [f"\n{data}:\n\n{markdown(header, lines)}"]
        cells += [[data, *line[: len(HEADER)]] for line in lines]
    groups = _groups(study, results)
    parts += [f"\n{groups}"] if groups else []
    recipe = make_entry({}, protocol.settings, folder, name).recipe
    parts += [f"\n{_notes(study, protocol, recipe, measured)}\n"]
    text = "".join(parts)
    write_table(folder, name, ["data", *HEADER], cells, text)
    return text


def measured_by(rows: Iterable[Compared]) -> str:
    """What the runs of these rows measured, in words: "accuracy"."""
    names = {score_name(score.facts.get("metric")) for compared in rows for score in compared.scores.values()}
    return " or ".join(title for name, title in TITLES.items() if name in (names or ("accuracy",)))


def paper_number(study: PaperStudy, data: str, label: str) -> float | None:
    """What the paper reports for a model on a data set, in percent."""
    numbers = study.numbers.get(label, ())
    return numbers[study.sets.index(data)] if data in study.sets and len(numbers) == len(study.sets) else None


def _line(compared: Compared, rows: Sequence[Compared], study: PaperStudy) -> list[str]:
    reference = next((other for other in rows if other.row.label == study.reference), compared)
    facts = [score.facts for score in compared.scores.values()]
    vals = [score.val for score in compared.scores.values() if score.val is not None]
    rate = "–" if compared.rate is None or not facts else f"{compared.rate:g}{'*' if compared.at_edge else ''}"
    return [
        compared.row.label,
        f"{facts[0]['trained_parameters']:,}" if facts else "–",
        rate,
        format_percent(sum(vals) / len(vals) if vals else None),
        format_percent(*compared.test()),
        format_percent(*compared.against(reference), sign=True),
        _mean(facts, "images_per_s"),
        _mean(facts, "peak_memory_mib"),
        str(len(facts)),
    ]


def _mean(facts: Sequence[Mapping[str, float]], name: str) -> str:
    values = [fact[name] for fact in facts if fact.get(name) is not None]
    return f"{sum(values) / len(values):.0f}" if values else "–"


def _groups(study: PaperStudy, results: Mapping[str, Sequence[Compared]]) -> str:
    """Of the study of VTAB, the means over the tasks of each group that were run; nothing for others."""
    if not all(data.startswith("vtab/") and data in study.sets for data in results):
        return ""
    lines = []
    for label in (compared.row.label for compared in next(iter(results.values()))):
        line, paper = [label], study.numbers.get(label)
        for number, tasks in enumerate(VTAB_GROUPS.values()):
            done = [results[f"vtab/{task}"] for task in tasks if f"vtab/{task}" in results]
            means = [compared.test()[0] for rows in done for compared in rows if compared.row.label == label]
            known = [mean for mean in means if mean is not None]
            mean = sum(known) / len(known) if known else None
            line.append(f"{format_percent(mean)} ({len(known)} of {len(tasks)})")
            if study.numbers:
                line.append(f"{paper[number]:.1f}" if paper else "–")
        lines.append(line)
    columns = (name for group in VTAB_GROUPS for name in ((group, "paper") if study.numbers else (group,)))
    return markdown(["model", *columns], lines)


def _notes(study: PaperStudy, protocol: Protocol, recipe: Recipe, measured: str) -> str:
    seeds = ", ".join(map(str, protocol.seeds))
    rates = ", ".join(f"{rate:g}" for rate in protocol.rates)
    weights = f" with the weights of {recipe.checkpoint}" if recipe.checkpoint else ""
    shown, difference = f"with seed {seeds} and its own division", ""
    if len(protocol.seeds) > 1:
        shown = f"mean ± standard deviation over seeds {seeds}, each with its own division"
        difference = ", paired by seed, ± half the 95 % confidence interval"
    picked = f"The learning rate is {rates}."
    if len(protocol.rates) > 1:
        picked = (
            f"The learning rate of a model is the one of {rates} with the best {measured} on val with the first seed; *"
            " marks the smallest and the largest."
        )
    if recipe.selection_split == "test":
        picked += " The epoch is the best one on the test images, so these numbers are optimistic."
    return (
        f"{measured[0].upper()}{measured[1:]} in percent, {shown} of what the data leave undivided. Backbone:"
        f" {recipe.backbone}{weights}; epochs: {recipe.epochs}. {picked} Difference: to {study.reference}{difference}."
        " Images/s in training, and the largest memory of the process (on a GPU: of the device)."
    )
