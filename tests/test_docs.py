"""README.md and docs/: short, no dead links, and the commands that they show for use without a network work."""

import itertools
import operator
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"^<!-- run -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="only a checkout has docs/")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What headings of a page can be linked to by, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_shows_the_two_commands():
    """Those that .ci/run and a newcomer start from."""
    text = (ROOT / "README.md").read_text()
    for extra, command in (("train", "insvp train"), ("test", "pytest -n auto --dist loadfile")):
        assert f'python3 -m venv .venv && .venv/bin/pip install -q -e ".[{extra}]" && .venv/bin/{command}\n' in text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):  # https:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}, which has {anchors(file)}"


def test_every_page_is_in_the_index():
    """In its tables for readers and, with the pages of the API, in the site's."""
    text = (ROOT / "docs/index.md").read_text()
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    listed = {line for tree in trees for line in tree.splitlines()}
    for page in ROOT.glob("docs/**/*.md"):
        path = page.relative_to(ROOT / "docs").with_suffix("")
        if path.name != "index":
            assert str(path) in listed, f"{name(page)} is in no toctree of docs/index.md"
            assert path.parent.name == "api" or f"]({path}.md)" in text, f"{name(page)} is in no table of docs/index.md"


def test_every_extra_is_in_the_table():
    text, project = (ROOT / "docs/index.md").read_text(), tomllib.loads((ROOT / "pyproject.toml").read_text())
    (table,) = re.findall(r"^\| extra \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    named = [extra for row in table.splitlines() for extra in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(project["project"]["optional-dependencies"])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if RUN.search(page.read_text())], ids=name)
def test_commands_work_as_written(page, tmp_path):
    """The blocks of a page below ``<!-- run -->``, one after the other in one folder, with the network out of reach."""
    script = ""
    for language, blocks in itertools.groupby(RUN.findall(page.read_text()), key=operator.itemgetter(0)):
        code = "\n".join(block for _, block in blocks)
        script += code if language == "sh" else f"python - <<'END OF PYTHON'\n{code}END OF PYTHON\n"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
