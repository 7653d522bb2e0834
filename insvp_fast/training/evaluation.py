"""Testing a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from insvp_fast.data import load_test_data
from insvp_fast.data.images import Images, Part, files_of, names_sha256
from insvp_fast.data.load import divide_source
from insvp_fast.data.sets import DIGITS, PREFIXES
from insvp_fast.data.sources import read_source
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.counter import Counter
from insvp_fast.training.load import Run, load_run, own_test_data
from insvp_fast.training.loader import Loader
from insvp_fast.training.metrics import Metrics, MultiLabelMetrics, compute_metrics
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.sampler import BatchSampler
from insvp_fast.training.tta import with_tta

__all__ = ["Evaluation", "evaluate_run"]


class Evaluation(NamedTuple):
    """The metrics of a trained model.

    Attributes:
        facts: what was tested on what, ready for JSON; ``note`` says if images of training may be among those tested.
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
    amp: str = "off",
) -> Evaluation:
    """Test the model of a run on its own test data or on other data with the same classes.

    Args:
        run, backbone, class_names: as in ``load_run``; an adapter without class names has those of the data.
        data, root: other data, as in ``Recipe``; None for the run's own.
        batch_size, workers: None for those of the run, or the defaults of ``Recipe``.
        tta: as in ``with_tta``.
        amp: the precision, as ``resolve_amp`` returns it; fp32 unless it is given.

    Raises:
        DataError: if the data do not exist or have other classes.
        CheckpointError, TrainingError: as ``load_run``, or if there are no data for an adapter.
    """
    accelerator = create_accelerator(amp)
    recipe, model, _, names, _ = loaded = load_run(run, backbone, class_names)
    if recipe is None and data is None:
        raise TrainingError(f"{run} is an adapter, which does not say what it is tested on: expected `data`")
    trained = recipe or Recipe()
    source = trained.data if data is None else data
    root = root or (trained.root if source == trained.data else None)
    names = names or _names_of_data(source, root, model.num_classes)
    images: Images | Part
    if data is None and root == trained.root:
        images, note = own_test_data(loaded), None
    else:
        images, note = _given_test_data(loaded, source, root, names)
    if isinstance(images.classes, Tensor) != model.multi_label:  # type: ignore[attr-defined]
        labels = ["one label", "several labels"]
        found, expected = labels[not model.multi_label], labels[model.multi_label]
        raise DataError(f"`data` is {source}: found {found} per image, expected {expected}, as the model was trained")
    batch_size, workers = loaded.loading(batch_size, workers)
    share = accelerator.process_index, accelerator.num_processes
    loader = Loader(images, BatchSampler(len(images), batch_size, None, *share), workers, accelerator.device)
    with Counter("eval", len(images), silent=not accelerator.is_main_process) as counter:  # type: ignore[arg-type]
        batches = _counted(loader, counter, accelerator.num_processes)
        with accelerator.autocast():
            metrics = compute_metrics(with_tta(model, tta), batches, len(names), accelerator, model.multi_label)
    facts = {"run": str(run), "data": source, "root": root, "tta": tta, "amp": amp, "class_names": names}
    facts |= {} if recipe is None else {"protocol": recipe.protocol}
    facts |= {"note": note} if note else {}
    return Evaluation(facts, metrics, accelerator.is_main_process)


def _given_test_data(run: Run, source: str, root: str | None, names: Sequence[str]) -> tuple[Images | Part, str | None]:
    """What is tested of data that were named, and a note if that may have images of training among it.

    Data that training divided are recognized, wherever they are now, and divided again in the same way.
    """
    origin, recipe = run.model.trained_on or {}, run.recipe
    digest, seed = origin.get("undivided_sha256"), None
    if digest is not None or origin.get("data") == source == DIGITS:
        seed = origin["split_seed"]
    elif not origin and recipe is not None and Path(source).resolve() == Path(recipe.data).resolve():
        seed = recipe.split_seed
    images = load_test_data(
        source,
        run.preprocessing,
        seed,
        names,
        root=root,
        exif_rotation=run.model.exif_rotation,
        undivided_sha256=digest,
    )
    if isinstance(images, Images) and (known := _count_trained(run, images)):
        return images, f"`data` is {source}: {known} of its {len(images)} images are among those of training"
    whole = isinstance(images, Images) and images.split == "train"
    if whole and digest is not None:
        reason = "they are not the images that training divided"
    elif not origin and (whole or (source == DIGITS and seed is None)):
        reason = "the adapter does not say which images it was trained on"
    else:
        return images, None
    note = f"all {len(images)} images" if whole else f"{len(images)} images"
    advice = "to be sure, give as `data` a folder with a test split"
    return (
        images,
        f"`data` is {source}: {note} are tested, and images of training may be among them: {reason}; {advice}",
    )


def _count_trained(run: Run, images: Images) -> int:
    """How many images are files that a run was trained on, as far as these are still there.

    Where other images are there by now, which would be divided otherwise, those that the run held out count as well.
    """
    recipe, files = run.recipe, files_of(images)
    if recipe is None or recipe.data.startswith(PREFIXES) or not files:  # others may be elsewhere, and far away
        return 0
    try:
        parts = divide_source(recipe.data, recipe.split_seed, root=recipe.root, protocol=recipe.protocol)
    except DataError:
        return 0
    train = parts["train"]
    if isinstance(train, Part) and any(names_sha256(parts[split]) != old for split, old in run.images_sha256.items()):
        train = train.dataset  # type: ignore[assignment]
    trained = [train, *([parts["val"]] if recipe.retrain else [])]
    return len(files & set().union(*map(files_of, trained)))


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
