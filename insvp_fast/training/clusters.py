"""The clusters of images that DAM-VP needs before it is trained, of the images of all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from insvp_fast.data import Data
from insvp_fast.errors import TrainingError
from insvp_fast.methods import DAMVP
from insvp_fast.methods.dam_vp import NUM_IMAGES
from insvp_fast.training.loader import create_loader
from insvp_fast.training.recipe import Recipe

__all__ = ["check_clusters", "fit_clusters"]


def check_clusters(model: Any, data: Data) -> None:
    """Check that there are enough training images; other methods than DAM-VP need none.

    Raises:
        DataError: for fewer images than prompts.
    """
    if isinstance(getattr(model, "method", None), DAMVP):
        model.method.require(len(data.plain_train))  # type: ignore[arg-type]  # data sets of images have a length


def fit_clusters(model: Any, data: Data, recipe: Recipe, accelerator: Accelerator) -> None:
    """Move a model of DAM-VP to the device and cluster training images for it; leave others as they are.

    Every process reads its part of the images.

    Raises:
        TrainingError: in all other processes too, if one cannot read its images.
    """
    method, error, features = getattr(model, "method", None), None, None
    if not isinstance(method, DAMVP):
        return
    model.to(accelerator.device)
    loader = create_loader(data.plain_train, recipe, accelerator, shuffle=True)
    wanted = max(NUM_IMAGES, len(method.frames))
    try:
        features = method.features_of(loader, -(-wanted // accelerator.num_processes)).cpu()
    except Exception as caught:  # else the others would wait for this process
        error = caught
    parts = gather_object([(features, error and str(error))])
    if error is not None:
        raise error
    for reason in (reason for _, reason in parts if reason is not None):
        raise TrainingError(f"another process cannot cluster its images: {reason}")
    method.fit_features(torch.cat([part for part, _ in parts]).to(accelerator.device))
    broadcast(list(method.buffers()))  # the processes' last bits may differ
