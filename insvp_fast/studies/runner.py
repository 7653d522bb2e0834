"""Training the runs of a study, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

import torch

from insvp_fast.errors import INTERRUPTED, InsVPError, TrainingError
from insvp_fast.studies.entries import Entry, find_run, read_runs, scores_of
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train

__all__ = ["train_entries"]


def train_entries(
    entries: Sequence[Entry],
    folder: Path,
    jobs: int = 1,
    launcher: Sequence[str] = (),
    after: Callable[[], object] = lambda: None,
) -> int:
    """Train what is not yet finished, and resume what was interrupted, in processes of their own.

    Neither memory nor a crash of one reaches the next. With one job at a time the output of the runs is shown,
    otherwise it goes to ``logs/`` in the folder.

    Args:
        folder: of the runs.
        jobs: runs at a time; the cores are divided among them, and the GPUs, unless there is a launcher.
        launcher: a command that starts a run, such as ``torchrun``; empty for a process that is forked from a server
            which has already loaded torch.
        after: called after each run, never twice at once.

    Returns:
        The number of runs that failed.

    Raises:
        KeyboardInterrupt: if a run was interrupted.
    """
    known, interrupted, one_at_a_time, gpus = read_runs(folder), Event(), Lock(), _gpus_of(jobs)

    def train_one(number: int) -> int:
        if interrupted.is_set():
            return INTERRUPTED
        entry, where = entries[number - 1], f"[{number}/{len(entries)}]"
        found = find_run(known, entry.recipe)
        if found and found.finished:
            print(f"{where} finished: {found.folder}", flush=True)
            return 0
        arguments = ["--resume", str(found.folder)] if found else entry.arguments
        print(f"{where} insvp train {shlex.join(arguments)}", flush=True)
        log = folder / "logs" / _log_name(entry) if jobs > 1 else None
        start, resumed = time.perf_counter(), found.folder if found else None
        status = _launch(launcher, arguments, log) if launcher else _fork(entry.recipe, resumed, log, jobs, gpus)
        if log and status == 0:
            scores = scores_of(find_run(read_runs(folder), entry.recipe))
            told = ", ".join(f"{score.model} {score.test:.1%}" for score in scores)
            print(f"{where} {time.perf_counter() - start:.0f} s: {told}", flush=True)
        elif log and status != INTERRUPTED:
            print(f"{where} failed, see {log}", flush=True)
        with one_at_a_time:
            after()
        if status == INTERRUPTED:
            interrupted.set()
        return status

    with ThreadPoolExecutor(jobs) as pool:
        try:
            failed = sum(status != 0 for status in pool.map(train_one, range(1, len(entries) + 1)))
        except KeyboardInterrupt:  # the runs get it as well
            interrupted.set()
    if interrupted.is_set():
        raise KeyboardInterrupt("the same command goes on")
    return failed


def _log_name(entry: Entry) -> str:
    return re.sub(r"[^\w.=-]+", "_", " ".join(f"{name}={value}" for name, value in entry.values.items())) + ".log"


def _launch(launcher: Sequence[str], arguments: Sequence[str], log: Path | None) -> int:
    stream = None if log is None else _open(log)
    with subprocess.Popen([*launcher, "-m", "insvp_fast", "train", *arguments], stdout=stream, stderr=stream) as child:
        return child.wait()  # after Ctrl-C, until it has printed how to resume


def _gpus_of(jobs: int) -> SimpleQueue[str | None]:
    """For each job the GPU that its run sees, in turn; None, for whatever there is, of one job or at most one GPU."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    if names and names[0].startswith("MIG-"):  # of which a process sees one
        count = len(names)
    if any(name in os.environ for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")):  # which come first there
        count = 0
    gpus: SimpleQueue[str | None] = SimpleQueue()
    for job in range(jobs):
        gpus.put(names[job % count] if jobs > 1 and count > 1 else None)
    return gpus


def _fork(recipe: Recipe, resume: Path | None, log: Path | None, jobs: int, gpus: SimpleQueue[str | None]) -> int:
    gpu = gpus.get()
    try:
        return _run(recipe, resume, log, jobs, gpu)
    finally:
        gpus.put(gpu)


def _run(recipe: Recipe, resume: Path | None, log: Path | None, jobs: int, gpu: str | None) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["insvp_fast.training.run"])
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else torch.get_num_threads()
    child = context.Process(target=_train, args=(recipe, resume, log, gpu, threads))
    with _asking:
        child.start()
    wait([child.sentinel])
    with _asking:
        child.join()
    return child.exitcode or 0


_asking = Lock()  # a start asks how all children are; of two that ask at once, one is told the status, the other 255


def _train(recipe: Recipe, resume: Path | None, log: Path | None, gpu: str | None, threads: int) -> None:
    """In the forked process, which would compute in one thread, and has not looked for GPUs yet."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if log is not None:
        stream = _open(log)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
    torch.set_num_threads(threads)
    try:
        if gpu is not None and not torch.cuda.is_available():
            raise TrainingError(f"CUDA_VISIBLE_DEVICES is {gpu}: expected a GPU that PyTorch can use")
        train(None if resume else recipe, resume)
    except InsVPError as error:
        print(f"insvp train: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _open(log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
