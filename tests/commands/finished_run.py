"""The classes and the metrics of a run folder that is written without any training."""

import json
from pathlib import Path

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox, red"]


def finish(folder: Path, accuracy: float, **more: object) -> None:
    """Write metrics.jsonl as of a finished run; ``more`` are further values of its epoch."""
    records = [{"model": "InsVP", "epoch": 1, "loss": 1.0, "test_accuracy": 0.0} | more]  # an epoch is no result
    records += [{"model": "InsVP", "test_accuracy": accuracy, "trained_parameters": 7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
