"""Testing a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from insvp_fast.data import load_test_data
from insvp_fast.data.sources import read_source
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.counter import Counter
from insvp_fast.training.load import load_run
from insvp_fast.training.loader import Loader, create_loader
from insvp_fast.training.metrics import Metrics, MultiLabelMetrics, compute_metrics
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.tta import with_tta

__all__ = ["Evaluation", "evaluate_run"]


class Evaluation(NamedTuple):
    """The metrics of a trained model.

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
    *,
    backbone: str | None = None,
    class_names: Sequence[str] | None = None,
    tta: str = "none",
) -> Evaluation:
    """Test the model of a run, in fp32, on its own test data or on other data with the same classes.

    Args:
        run, backbone, class_names: as in ``load_run``; an adapter without class names has those of the data.
        data, root: other data, as in ``Recipe``; None for the run's own.
        batch_size, workers: None for those of the run, or the defaults of ``Recipe``.
        tta: as in ``with_tta``.

    Raises:
        DataError: if the data do not exist or have other classes.
        CheckpointError, TrainingError: as ``load_run``, or if there are no data for an adapter.
    """
    accelerator = create_accelerator()
    recipe, model, preprocessing, names = load_run(run, backbone, class_names)
    if recipe is None and data is None:
        raise TrainingError(f"{run} is an adapter, which does not say what it is tested on: expected `data`")
    trained = recipe or Recipe()
    source, root = data or trained.data, root or (trained.root if data in (None, trained.data) else None)
    own = recipe is not None and Path(source).resolve() == Path(recipe.data).resolve()
    seed = trained.split_seed if own else None
    names = names or _names_of_data(source, root, model.num_classes)
    images = load_test_data(source, preprocessing, seed, names, root=root, exif_rotation=trained.exif_rotation)
    if isinstance(images.classes, Tensor) != model.multi_label:  # type: ignore[attr-defined]
        labels = ["one label", "several labels"]
        found, expected = labels[not model.multi_label], labels[model.multi_label]
        raise DataError(f"`data` is {source}: found {found} per image, expected {expected}, as the model was trained")
    workers = trained.workers if workers is None else workers
    loading = dataclasses.replace(trained, batch_size=batch_size or trained.batch_size, workers=workers)
    loader = create_loader(images, loading, accelerator)
    with Counter("eval", len(images), silent=not accelerator.is_main_process) as counter:  # type: ignore[arg-type]
        batches = _counted(loader, counter, accelerator.num_processes)
        metrics = compute_metrics(with_tta(model, tta), batches, len(names), accelerator, model.multi_label)
    facts = {"run": str(run), "data": source, "root": root, "tta": tta, "class_names": names}
    facts |= {} if recipe is None else {"protocol": recipe.protocol}
    return Evaluation(facts, metrics, accelerator.is_main_process)


def _names_of_data(source: str, root: str | None, classes: int) -> list[str]:
    """The class names of the data, if it has as many as the model."""
    names = read_source(source, root=root).class_names
    if len(names) != classes:
        found = f"the adapter has {classes} classes without names, and {source} has {len(names)}"
        raise DataError(f"{found}: expected `class_names`, one for each class of the adapter")
    return names


def _counted(loader: Loader, counter: Counter, processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    for images, classes in loader:
        yield images, classes
        counter.add(len(classes) * processes)
