"""What is shown on a terminal: bars of progress and tables. Elsewhere, tables are plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column, Table

__all__ = ["Bar", "is_terminal", "print_markdown", "print_table"]

SECONDS_PER_UPDATE = 0.1


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that can move its cursor. (rich also counts what ``FORCE_COLOR`` says.)"""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Bar:
    """A bar on standard error while something runs; nothing where that is no terminal.

    It is drawn by those who advance it: a thread could hold a lock when a data loader forks.

    Args:
        name: what is running.
        done, total: steps.
        active: whether it is shown at all.

    Attributes:
        shown: whether there is a bar.
    """

    def __init__(self, name: str, total: int, done: int, active: bool) -> None:
        self.shown, self.drawn = active and is_terminal(sys.stderr), 0.0
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan", table_column=Column(min_width=4)),
            TaskProgressColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
            console=Console(stderr=True, highlight=False),
            auto_refresh=False,
            transient=True,
            redirect_stdout=is_terminal(sys.stdout),  # what is printed meanwhile goes above the bar
            disable=not self.shown,
            expand=True,
        )
        self.task = self.progress.add_task(name, total=total, completed=done, facts="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, steps: int = 1) -> None:
        """Count steps that are done."""
        now = time.perf_counter()
        due = now - self.drawn > SECONDS_PER_UPDATE
        self.drawn = now if due else self.drawn
        self.progress.update(self.task, advance=steps, refresh=due)

    def show(self, facts: str) -> None:
        """Write something behind the bar; ``[bold]...[/]`` and the other markup of rich apply."""
        self.progress.update(self.task, facts=facts)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Print a table whose first column is text; on a terminal with lines, elsewhere with columns of these widths."""
    if is_terminal(sys.stdout):
        table = Table(*(Column(name, justify="right") for name in header), box=box.ROUNDED, header_style="bold cyan")
        table.columns[0].justify = "left"
        for row in rows:
            table.add_row(*row)
        Console(highlight=False).print(table)
        return
    for first, *cells in (header, *rows):
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print(f"{first:{widths[0]}}{''.join(numbers)}", flush=True)


def print_markdown(text: str) -> None:
    """Print Markdown, set on a terminal, as it is elsewhere."""
    if is_terminal(sys.stdout):
        Console().print(Markdown(text))
    else:
        print(text, flush=True)
