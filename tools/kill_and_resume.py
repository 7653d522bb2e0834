"""Kill a small run by SIGKILL at random moments, resume it each time, and compare it to one that never was killed.

    python -m tools.kill_and_resume --runs 20

Every run is killed once at a random time, once in the middle of a writing, and then finished. All must end with the
same bytes in the adapter and the same metrics.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.training.killed_runs import make_digits, outcome, start

SETTINGS = {"epochs": 4, "batch_size": 16, "probe": False, "save_steps": 1, "mixup": 0.8, "ema": 0.9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another every time)")
    arguments = parser.parse_args()
    moments, different, root = random.Random(arguments.seed), 0, Path(tempfile.mkdtemp())
    settings = SETTINGS | {"data": str(make_digits(root / "few")), "output": str(root)}
    start(settings, log=root / "log").join()  # the first import is slow
    before = time.perf_counter()
    start(settings, log=root / "log").join()
    length, expected = time.perf_counter() - before, outcome(root / "few-2")
    for number in range(3, arguments.runs + 3):
        folder, event = root / f"few-{number}", (moments.choice(["sync", "rename"]), moments.randint(1, 30))
        child = start(settings, log=root / "log")
        while child.is_alive() and not (folder / "config.json").exists():
            child.join(0.01)
        pause = moments.random() * length * 0.7  # the rest goes by in starting and drawing
        child.join(pause)
        child.kill()
        child.join()
        killed = child.exitcode == -signal.SIGKILL
        writing = start(settings, folder, event, root / "log")
        writing.join()
        twice = writing.exitcode == -signal.SIGKILL
        start(settings, folder, log=root / "log").join()
        same = outcome(folder) == expected
        different += not same
        moment, writing_at = (
            f"{name}{'' if hit else ' (too late)'}"
            for name, hit in ((f"after {pause:.2f} s", killed), (f"before {event[0]} {event[1]}", twice))
        )
        print(f"run {number - 2:3}: killed {moment}, {writing_at}: {'same' if same else 'DIFFERENT'}", flush=True)
    print(f"{arguments.runs - different} of {arguments.runs} runs end with the same adapter and metrics; in {root}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
