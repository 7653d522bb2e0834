"""Testing the model of a finished run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from insvp_fast.data import load_test_data
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.load import load_run
from insvp_fast.training.loader import create_loader
from insvp_fast.training.metrics import Metrics, MultiLabelMetrics, compute_metrics
from insvp_fast.training.run_folder import read_config

__all__ = ["Evaluation", "evaluate_run"]


class Evaluation(NamedTuple):
    """The metrics of a run's model.

    Attributes:
        facts: what was tested on what, ready for JSON.
        is_main_process: whether this is the process that reports them.
    """

    facts: dict[str, Any]
    metrics: Metrics | MultiLabelMetrics
    is_main_process: bool


def evaluate_run(
    run: str | Path,
    data: str | None = None,
    root: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Evaluation:
    """Test the model of a run, in fp32, on its own test data or on other data with the same classes.

    Args:
        run: the run folder.
        data, root: other data, as in ``Recipe``; None for the run's own.
        batch_size, workers: None for those of the run.

    Raises:
        DataError: if the data do not exist or have other classes.
        TrainingError: if it is not a finished run.
    """
    accelerator = create_accelerator()
    recipe, model, preprocessing, names = load_run(run)
    source, root = data or recipe.data, root or (recipe.root if data in (None, recipe.data) else None)
    seed = recipe.split_seed if Path(source).resolve() == Path(recipe.data).resolve() else None
    images = load_test_data(source, preprocessing, seed, names, root=root, exif_rotation=recipe.exif_rotation)
    workers = recipe.workers if workers is None else workers
    loading = dataclasses.replace(recipe, batch_size=batch_size or recipe.batch_size, workers=workers)
    multi_label = read_config(run)[1].get("multi_label", False)
    loader = create_loader(images, loading, accelerator)
    metrics = compute_metrics(model, loader, len(names), accelerator, multi_label)
    facts = {"run": str(run), "data": source, "root": root, "protocol": recipe.protocol, "class_names": names}
    return Evaluation(facts, metrics, accelerator.is_main_process)
