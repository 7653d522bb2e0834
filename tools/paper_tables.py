"""Put the tables of studies into docs/paper.md: each between its own markers, whose text is replaced.

    python -m tools.paper_tables paper      # the folder in which docs/paper.md runs its studies

`<!-- digits/table5 -->` ... `<!-- end of digits/table5 -->` gets the table of `paper/digits/table5.md`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/paper.md"
MARKED = re.compile(r"(<!-- (?P<name>\w[\w/-]*) -->\n).*?(<!-- end of (?P=name) -->\n)", re.DOTALL)


def fill(page: str, studies: Path) -> str:
    """The page with every marked table read anew.

    Raises:
        FileNotFoundError: naming the table that is missing.
        ValueError: if it has no rows, or if a marker has no end.
    """

    def table(marked: re.Match[str]) -> str:
        text = (studies / f"{marked['name']}.md").read_text(encoding="utf-8")
        rows = [line for line in text.splitlines(keepends=True) if line.startswith("|")]
        if not rows:
            raise ValueError(f"{studies / marked['name']}.md has no table")
        return "".join([marked[1], *rows, marked[3]])

    filled, count = MARKED.subn(table, page)
    if count * 2 != page.count("<!-- "):
        raise ValueError(f"{count} marked tables, {page.count('<!-- ')} markers: expected two for each")
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(page, parser.parse_args().studies), encoding="utf-8")


if __name__ == "__main__":
    main()
