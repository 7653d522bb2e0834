"""Loading trained models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from insvp_fast.checkpoints.adapter_config import check_description
from insvp_fast.checkpoints.files import find_file
from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.data import load_test_data
from insvp_fast.data.images import Images, Part, names_sha256
from insvp_fast.errors import CheckpointError, DataError, TrainingError
from insvp_fast.methods.load import AnyModel, load_model
from insvp_fast.methods.tuned import TunedViT
from insvp_fast.reference import structure_of
from insvp_fast.reference.prompted import PromptedReference
from insvp_fast.reference.structure import pixel_layer
from insvp_fast.training.backbone import load_backbone, require_rgb
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run_folder import CONFIG_FILE, is_run, read_config

__all__ = ["Run", "adapter_sha256", "load_run", "own_test_data"]

KINDS = {"preprocessing": dict, "class_names": list, "images_sha256": dict | None}  # in a run's config.json


class Run(NamedTuple):
    """A trained model in evaluation mode, and what is needed to use it.

    Attributes:
        recipe: None for an adapter, which does not record how it was trained.
        preprocessing: how images are prepared, as arguments of ``timm.data.create_transform``.
        class_names: None if an adapter has none.
        images_sha256: ``names_sha256`` of the train, val and test images of training, as far as it is recorded.
    """

    recipe: Recipe | None
    model: AnyModel
    preprocessing: dict[str, Any]
    class_names: list[str] | None
    images_sha256: Mapping[str, str] = MappingProxyType({})

    def loading(self, batch_size: int | None, workers: int | None) -> tuple[int, int]:
        """Batch size and workers: those given, else those of training, or the defaults of ``Recipe`` for an adapter."""
        recipe = self.recipe or Recipe()
        return batch_size or recipe.batch_size, recipe.workers if workers is None else workers


def load_run(source: str | Path, backbone: str | None = None, class_names: Sequence[str] | None = None) -> Run:
    """Load the trained model of a run or an adapter, on the CPU.

    Args:
        source: a folder, as ``is_run`` tells them apart; what is no folder is an adapter's name on the Hub.
        backbone: what ``create_backbone`` takes; None for the recorded one.
        class_names: of an adapter that records none.

    Raises:
        CheckpointError: if the backbone or an adapter cannot be loaded, or does not read RGB.
        TrainingError: if it is neither a finished run nor an adapter that says how images are prepared, the model does
            not take images of that size, or there are other class names than given.
        ValueError: if the class names are one text.
    """
    if is_run(source):
        run = _load_folder(Path(source), backbone)
    else:
        model = load_model(source, backbone)
        require_rgb(model.backbone, f"the backbone of {source}")
        if model.preprocessing is None:
            raise TrainingError(
                f"{source} does not say how images are prepared: its preprocessing is null in {ADAPTER_FILE};"
                " give it to save_pretrained as preprocessing=timm.data.resolve_model_data_config(model)"
            )
        run = Run(None, model, model.preprocessing, model.class_names)
    _check_input_size(run, f"{source}: in {CONFIG_FILE if run.recipe else ADAPTER_FILE}")
    if class_names is None:
        return run
    if isinstance(class_names, str):
        raise ValueError(f"class_names is {class_names!r}: expected a list of names")
    if list(class_names) != (run.class_names or list(class_names)):
        raise TrainingError(f"{source} has class names: expected the same, or none given")
    if len(class_names) != run.model.num_classes:
        raise TrainingError(
            f"{len(class_names)} class names are given: expected {run.model.num_classes}, as {source} has classes"
        )
    return run._replace(class_names=list(class_names))


def own_test_data(run: Run) -> Images | Part:
    """The test images of a run, which training has not seen.

    Raises:
        DataError: if its data are not there, or have other classes or other images than in training.
        TrainingError: if it is an adapter without a run.
    """
    recipe, model = run.recipe, run.model
    if recipe is None or run.class_names is None:
        raise TrainingError("an adapter does not say where its test images are: expected a run folder")
    images = load_test_data(
        recipe.data,
        run.preprocessing,
        recipe.split_seed,
        run.class_names,
        root=recipe.root,
        exif_rotation=model.exif_rotation,
        undivided_sha256=(model.trained_on or {}).get("undivided_sha256"),
    )
    if isinstance(images, Images) and images.split == "train":
        divided = "training divided it, and its images have changed: the model may have seen some of them"
        raise DataError(f"`data` is {recipe.data}: {divided}: expected `data` with a test split")
    if run.images_sha256.get("test") not in (None, names_sha256(images)):
        raise DataError(
            f"`data` is {recipe.data}: found {len(images)} other test images than in training; to test on what is there"
            " now, give it to `insvp eval` as `data`"
        )
    return images


def adapter_sha256(source: str | Path) -> str:
    """A digest of an adapter, or of that of a run: of its weights, settings, class names, preprocessing and backbone.

    Raises:
        CheckpointError: if it has none.
    """
    digest, place = hashlib.sha256(), Path(source, "adapter") if is_run(source) else source
    for name in (ADAPTER_FILE, WEIGHTS_FILE):
        digest.update(find_file(str(place), name, {}).read_bytes())
    return digest.hexdigest()


def _check_input_size(run: Run, where: str) -> None:
    """Take an image of the size that images are prepared in through all that has a size: not the backbone alone.

    Some backbones take any size, but not the prompts; those of VAPT have one from the second block on.
    """
    model, size = run.model, run.preprocessing["input_size"]
    try:
        image = torch.zeros(1, *size, dtype=pixel_layer(model.backbone).weight.dtype)
        with torch.no_grad():
            if isinstance(model, TunedViT):
                structure_of(model.backbone).embed(model.backbone, image)
            else:  # on the general path, which keeps nothing for the next image
                PromptedReference.block_outputs(model, image, [min(1, len(model.widths) - 1)])
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{where} preprocessing.input_size is {size}"
        raise TrainingError(f"{problem}: expected a size of images that the model takes ({error})") from error


def _load_folder(folder: Path, name: str | None) -> Run:
    recipe, config = read_config(folder)
    for key, kind in KINDS.items():
        if not isinstance(config.get(key), kind):
            problem = f"in {CONFIG_FILE} {key} is {config.get(key)!r:.200}: expected {getattr(kind, '__name__', kind)}"
            raise TrainingError(f"{folder} is not a run folder of `insvp train`: {problem}")
    backbone = load_backbone(name or recipe.backbone, recipe.checkpoint if name is None else None, recipe.img_size)
    try:
        if not (folder / "adapter").is_dir():
            raise CheckpointError("there is no such folder, training was not finished")
        model = load_model(folder / "adapter", backbone)
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"{folder} has no adapter that can be loaded: {error}") from error
    model.preprocessing, model.class_names = config["preprocessing"], config["class_names"]
    model.exif_rotation = recipe.exif_rotation  # which adapters of earlier versions do not say
    try:
        check_description(model)
    except ValueError as error:
        raise TrainingError(f"{folder}: in {CONFIG_FILE} {error}") from error
    digests = config.get("images_sha256") or {}
    return Run(recipe, model, config["preprocessing"], config["class_names"], digests)
