"""What one process alone may write: run folders, where two would replace each other's state, and files."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from insvp_fast.errors import TrainingError, warn

__all__ = ["acquire", "locked"]

LOCK_FILE = ".lock"


def acquire(file: IO[str], name: object, advice: str) -> bool:
    """Lock an open file until it is closed or the process ends; warn with advice where the file system has no locks.

    Returns:
        False if another process holds it.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has no POSIX locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by a data loader's workers
    except (BlockingIOError, PermissionError):  # POSIX leaves it to the system which
        return False
    except OSError as error:  # of clusters, some have none
        warn(f"{name} cannot be locked ({error.strerror}): {advice}")
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder until the block or the process ends, whatever ends it; warn as ``acquire``.

    Raises:
        TrainingError: naming the process that holds it.
    """
    with open(folder / LOCK_FILE, "a+") as file:
        if not acquire(file, folder, "train in it by one process alone"):
            file.seek(0)
            raise TrainingError(f"{folder} is being trained by {file.read().strip() or 'another process'}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
