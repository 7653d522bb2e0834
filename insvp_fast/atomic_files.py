"""Replacing files and folders whole: a reader finds the old content or the new, even after a crash."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["recover", "replace_file", "replace_folder", "write_file"]

NEW, OLD = ".new", ".old"


@contextmanager
def replace_file(file: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``file`` when the block ends; after an error ``file`` is unchanged.

    Of several that replace it at once, each has a file of its own, and the last one wins.
    """
    # not the process id: other threads have the same, and processes of other containers and machines may have it
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(file: Path, content: bytes) -> None:
    """Replace a file by one with this content."""
    with replace_file(file) as stream:
        stream.write(content)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder that replaces ``folder`` when the block ends; after an error ``folder`` is unchanged.

    A crash can leave temporary folders beside it; ``recover`` removes them and puts the old content back if needed.
    """
    new, old = _temporaries(folder)
    recover(folder)
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.iterdir():
            _sync(file)
        _sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)  # a folder cannot be renamed over another: until the next line `folder` does not exist
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Remove what an interrupted ``replace_folder`` left, or put the old folder back if no new one is in its place."""
    new, old = _temporaries(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _temporaries(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + NEW), folder.with_name(folder.name + OLD)


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs no folder, and no file opened for reading alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
