"""Training in child processes that are killed or that work together, for the tests and tools/kill_and_resume.py."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

# the server that the children are forked from imports once for all of them
children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["insvp_fast.training.run", "insvp_fast.data.load"])

TIMES = ("images_per_s", "data_wait", "peak_memory_mib")


def make_digits(root: Path, train: int = 150, held_out: int = 30) -> Path:
    """An image folder with the first handwritten digits, equally many of each."""
    digits = load_digits()
    splits = ["val"] * (held_out // 10) + ["test"] * (held_out // 10) + ["train"] * (train // 10)
    for i in np.concatenate([np.flatnonzero(digits.target == digit)[: len(splits)] for digit in range(10)]):
        split = splits[np.sum(digits.target[:i] == digits.target[i])]
        file = root / split / str(digits.target[i]) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)).save(file)
    return root


def start(
    settings: dict,
    resume: Path | None = None,
    die: tuple[str, int] | None = None,
    log: Path | None = None,
):
    """Train in a child; ``die`` = (event, n) kills it by SIGKILL just before the n-th such event."""
    child = children.Process(target=_train, args=(settings, resume, die, log))
    child.start()
    return child


def outcome(run: Path) -> tuple[bytes, list[dict]]:
    """What an interruption must not change: the bytes of the adapter, and the metrics but for times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), metrics


def _train(
    settings: dict,
    resume: Path | None,
    die: tuple[str, int] | None,
    log: Path | None,
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a fork server for the workers would outlive this process
    from insvp_fast.training import run
    from insvp_fast.training.recipe import Recipe

    torch.set_num_threads(1)
    if log:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    if die:
        _die_before(*die)
    run.train(None if resume else Recipe(**settings), resume)


def _die_before(event: str, count: int) -> None:
    from insvp_fast.training.trainer import Trainer

    owner, name = {"step": (Trainer, "_step"), "sync": (os, "fsync"), "rename": (os, "rename")}[event]
    function, left = getattr(owner, name), count

    def call(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, call)
