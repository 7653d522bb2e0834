"""Comparing models under one protocol: a learning rate picked on val for each, then runs over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insvp_fast.errors import TrainingError
from insvp_fast.recipes import read_recipe
from insvp_fast.studies.entries import Entry, Found, Protocol, Row, Score, find_run, read_runs, scores_of
from insvp_fast.studies.grid import make_entry
from insvp_fast.studies.runner import train_entries
from insvp_fast.studies.tables import mean_and_std, paired_difference
from insvp_fast.training.candidates import LINEAR, candidates_of
from insvp_fast.training.recipe import PROMPT_SETTINGS, Recipe

__all__ = ["Compared", "compare", "settings_of"]

OWN = ("released", *PROMPT_SETTINGS)  # settings of InsVP, which other methods refuse


class Compared(NamedTuple):
    """What became of a row.

    Attributes:
        rate: the learning rate that was picked; None where there is none.
        at_edge: whether it is the smallest or largest of several, so that a better one may lie outside.
        scores: one for each seed whose run is finished.
    """

    row: Row
    rate: float | None
    at_edge: bool
    scores: dict[int, Score]

    def test(self) -> tuple[float | None, float | None]:
        """The mean and standard deviation of the test accuracy; None where there are none."""
        return mean_and_std([score.test for score in self.scores.values()]) if self.scores else (None, None)

    def against(self, other: Compared) -> tuple[float | None, float | None]:
        """The mean difference of the test accuracies, paired by seed, and half the width of its 95 % interval."""
        seeds = [seed for seed in self.scores if seed in other.scores]
        if not seeds or other is self:
            return None, None
        mine, others = ([compared.scores[seed].test for seed in seeds] for compared in (self, other))
        return paired_difference(mine, others)


def compare(
    rows: Sequence[Row], protocol: Protocol, folder: Path, jobs: int = 1, launcher: Sequence[str] = ()
) -> list[Compared]:
    """Train all rows; runs that are finished already are not repeated.

    A rate whose run failed, because the loss diverged, say, is not picked.

    Raises:
        TrainingError: if there are several rates, and no run of a row recorded a score on val.
    """
    first, rest = protocol.seeds[0], protocol.seeds[1:]
    searched = [_entry(row, protocol, folder, rate, first) for row in rows for rate in _rates(row, protocol)]
    train_entries(searched, folder, jobs, launcher)
    picked = {row.label: _pick(row, protocol, folder) for row in rows}
    repeated = [_entry(row, protocol, folder, picked[row.label], seed) for row in rows for seed in rest]
    train_entries(repeated, folder, jobs, launcher)
    runs = read_runs(folder)
    compared = []
    for row in rows:
        rate = picked[row.label]
        entries = {seed: _entry(row, protocol, folder, rate, seed) for seed in protocol.seeds}
        scores = {seed: _score(runs, entry) for seed, entry in entries.items()}
        at_edge = len(protocol.rates) > 1 and rate in (min(protocol.rates), max(protocol.rates))
        compared.append(Compared(row, rate, at_edge, {seed: found for seed, found in scores.items() if found}))
    return compared


def settings_of(row: Row, protocol: Protocol) -> dict[str, Any]:
    """The settings of a row over those that all share, of which other methods than InsVP do not take InsVP's own."""
    settings = protocol.settings | row.settings
    recipe = settings.get("recipe")
    resolved = (read_recipe(recipe, settings.get("released", False)) if recipe else {}) | settings
    own = [name for name in OWN if resolved.get(name, getattr(Recipe, name)) != getattr(Recipe, name)]
    if not own or resolved.get("method", "insvp") == "insvp":
        return settings
    if "released" in own and resolved.get("head_init", "auto") == "auto":
        resolved["head_init"] = "random"  # as the head of InsVP then begins
    return {name: value for name, value in resolved.items() if name not in ("recipe", *OWN)}


def _rates(row: Row, protocol: Protocol) -> Sequence[float | None]:
    """A linear probe is fitted, not trained at a rate."""
    return (None,) if row.settings.get("method") == LINEAR else protocol.rates


def _entry(row: Row, protocol: Protocol, folder: Path, rate: float | None, seed: int) -> Entry:
    settings: dict[str, Any] = settings_of(row, protocol) | {"seed": seed, "split_seed": seed, "probe": False}
    settings |= {} if rate is None else {"lr": rate}
    return make_entry({"row": row.label, "lr": rate, "seed": seed}, settings, folder, row.label)


def _score(runs: Sequence[Found], entry: Entry) -> Score | None:
    """That of the row's own model, beside which a run of another study may have fitted a linear probe."""
    own = candidates_of(entry.recipe)[-1].name
    return next((score for score in scores_of(find_run(runs, entry.recipe)) if score.model == own), None)


def _pick(row: Row, protocol: Protocol, folder: Path) -> float | None:
    """The rate with the best score on val; of equally good ones, the smallest."""
    rates, runs = _rates(row, protocol), read_runs(folder)
    if len(rates) == 1:
        return rates[0]
    vals: dict[float, float | None] = {}
    for rate in sorted(rate for rate in rates if rate is not None):
        if score := _score(runs, _entry(row, protocol, folder, rate, protocol.seeds[0])):
            vals[rate] = score.val
    known = {rate: val for rate, val in vals.items() if val is not None}
    if vals and not known:
        raise TrainingError(f"{row.label}: no run recorded a score on val: expected one, by which the rate is picked")
    return max(known, key=lambda rate: known[rate]) if known else rates[0]
