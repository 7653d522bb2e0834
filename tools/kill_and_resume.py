"""Kill small training runs by SIGKILL at random times, resume them, and compare them with an uninterrupted run.

    python -m tools.kill_and_resume --runs 20

Each run is killed once at a random time, resumed and killed once while it writes files, and resumed to its end. All
must end with the same bytes in the adapter and the same metrics.
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
    parser.add_argument("--runs", type=int, default=20, help="number of runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the random times (default: a new one each time)")
    arguments = parser.parse_args()
    generator, different, root = random.Random(arguments.seed), 0, Path(tempfile.mkdtemp())
    settings = SETTINGS | {"data": str(make_digits(root / "few")), "output": str(root)}
    start(settings, log=root / "log").join()  # not timed, because it imports
    before = time.perf_counter()
    start(settings, log=root / "log").join()
    duration, expected = time.perf_counter() - before, outcome(root / "few-2")
    for number in range(3, arguments.runs + 3):
        folder, event = root / f"few-{number}", (generator.choice(["sync", "rename"]), generator.randint(1, 30))
        child = start(settings, log=root / "log")
        while child.is_alive() and not (folder / "config.json").exists():
            child.join(0.01)
        pause = generator.random() * duration * 0.7  # the rest of the time is start-up and plots
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
        first, second = (
            f"{name}{'' if hit else ' (too late)'}"
            for name, hit in ((f"after {pause:.2f} s", killed), (f"before {event[0]} {event[1]}", twice))
        )
        print(f"run {number - 2:3}: killed {first}, {second}: {'same' if same else 'DIFFERENT'}", flush=True)
    print(f"{arguments.runs - different} of {arguments.runs} runs end with the same adapter and metrics; in {root}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
