"""docs/launches.md says what is launched on a GPU."""

import re

import pytest

pytest.importorskip("triton")
tools = pytest.importorskip("tools.launches")


def rows(text):
    """Launches of a block by section and name."""
    found, section = {}, None
    for line in text.splitlines():
        section = line if line.startswith("## ") else section
        if row := re.fullmatch(r"\| `(\S+)` \| (\d*) \| (\d+) \|", line):
            found[section, row[1]] = row[2], row[3]
    return found


def test_the_page_lists_what_is_launched():
    made, written = tools.page(), tools.PAGE.read_text()
    if f"torch {tools.version()}," in written:
        assert made == written, "run `python -m tools.launches --write` and read what has changed"
        return
    ours = [{key: row for key, row in rows(text).items() if "kernel" in key[1]} for text in (made, written)]
    assert ours[0] == ours[1] and ours[0]  # another torch may have other operators


def test_launches_are_seen():
    training = tools.launches(2, training=True)
    assert training.forward["_norm_insert_fwd_kernel"] == 2 * 2
    assert training.backward["_norm_insert_bwd_kernel"] == 2 * 2
    assert not any("view" in name or "empty" in name for name in training.forward | training.backward)
    assert not tools.launches(2, training=False).backward
