"""The models that are timed: those of ``insvp_fast.bench.models`` and ``peers``, the release's arithmetic, and its
authors' own code.

``INSVP_RELEASE_MODEL=<module>:<factory>``, with a checkout of the authors' code on ``PYTHONPATH``, adds it as the
provider "authors": ``factory()`` returns their model. This repository has nothing of it, and the tests use a stand-in.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import Any

import timm
from torch import nn

from benchmarks.peers import PEERS, make_peer
from benchmarks.released import Released
from insvp_fast import InsVPConfig
from insvp_fast.bench import models
from insvp_fast.checkpoints.released import to_released
from insvp_fast.testing import DEVICE

__all__ = ["PROVIDERS", "RELEASE", "make_model", "without_dropout"]

RELEASE = ("released", "released frozen", *(["authors"] if "INSVP_RELEASE_MODEL" in os.environ else []))
PROVIDERS = (*models.PROVIDERS, *PEERS, *RELEASE)


def make_model(provider: str, name: str, config: InsVPConfig | None = None, **kwargs: Any) -> nn.Module:
    """``insvp_fast.bench.models.make_model`` for all ``PROVIDERS``.

    The release gets the reference's weights; the authors' code has its own.

    Raises:
        ValueError: for what the release does not have: it is a ViT-B/16 in one configuration.
    """
    if provider in PEERS:
        return make_peer(provider, name, config, **kwargs)
    if provider == "authors":
        return _authors().to(DEVICE)
    if not provider.startswith("released"):
        return models.make_model(provider, name, config, **kwargs)
    config = config or InsVPConfig()
    wanted = InsVPConfig.released(
        prompt_length=config.prompt_length, specific_kernels=config.specific_kernels, simam=config.simam
    )
    if without_dropout(config) != without_dropout(wanted) or not name.startswith("vit_base_patch16_224"):
        raise ValueError(f"{name} in {config}: the release has ViT-B/16 at 224 pixels in its own configuration only")
    kwargs = {key: value for key, value in kwargs.items() if key != "options"}  # those are of InsVPViT
    backbone = timm.create_model(name, num_classes=models.NUM_CLASSES, **kwargs).eval()
    depth, dropout = len(backbone.blocks), config.common_dropout
    sizes = depth, config.prompt_length, config.specific_kernels, dropout, config.simam
    model = Released(backbone, *sizes, frozen=provider.endswith("frozen"))
    state = models.make_model("reference", name, config, **kwargs).state_dict()
    model.load_state_dict(to_released(state))
    return model.to(DEVICE)


def _authors() -> nn.Module:
    """The model of the authors' own code."""
    place = os.environ.get("INSVP_RELEASE_MODEL", "")
    module, _, factory = place.partition(":")
    if not module or not factory:
        raise ValueError(
            f"INSVP_RELEASE_MODEL={place}: expected <module>:<factory>, where factory() of a module on PYTHONPATH"
            " returns the model, as with functools.partial in a file of yours"
        )
    return getattr(importlib.import_module(module), factory)()


def without_dropout(config: InsVPConfig) -> InsVPConfig:
    """The configuration with every dropout at 0, so that results can be compared."""
    return dataclasses.replace(config, **{f"{part}_dropout": 0.0 for part in ("global", "patch", "common", "specific")})
