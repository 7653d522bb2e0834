"""A run folder belongs to one process at a time: two that train in it would replace each other's state."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from insvp_fast.errors import TrainingError, warn

__all__ = ["locked"]

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder until the block or the process ends, whatever ends it; warn where the file system has no locks.

    Raises:
        TrainingError: naming the process that holds it.
    """
    with open(folder / LOCK_FILE, "a+") as file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "this system has no POSIX locks")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by a data loader's workers
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves it to the system which
            file.seek(0)
            raise TrainingError(f"{folder} is being trained by {file.read().strip() or 'another process'}") from error
        except OSError as error:  # of clusters, some have none
            warn(f"{folder} cannot be locked ({error.strerror}): train in it by one process alone")
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        yield
