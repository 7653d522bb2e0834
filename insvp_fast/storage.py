"""Files and folders that are replaced whole: who reads them, after a crash too, finds the old content or the new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["recover", "replace_file", "replace_folder", "write_file"]

NEW, OLD = ".new", ".old"


@contextmanager
def replace_file(file: Path, mode: str = "wb", **how: str) -> Iterator[IO]:
    """Give a stream to write to; on leaving, what was written takes the place of ``file``, on an error nothing does.

    Args:
        mode, how: for ``open``.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **how) as stream:  # type: ignore[call-overload]
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
    """Give an empty folder to write into; on leaving, it takes the place of ``folder``.

    Whoever is interrupted leaves the old content or the new one, once ``recover`` has put away the rest.
    """
    new, old = folder.with_name(folder.name + NEW), folder.with_name(folder.name + OLD)
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
        folder.rename(old)  # a folder cannot be renamed over another: from here to the next line there is none
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put away what an interrupted ``replace_folder`` has left."""
    new, old = folder.with_name(folder.name + NEW), folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
