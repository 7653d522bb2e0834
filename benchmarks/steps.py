"""What is timed here beside the providers of ``insvp_fast.bench``: the release's arithmetic, and its authors' own code.

``INSVP_RELEASE_REPO=<checkout>:<module>:<factory>`` adds the authors' code as the provider "authors": ``factory()``,
imported from their checkout, returns their model. Nothing of it is here, and without a checkout this is untested.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.released import Released
from insvp_fast import InsVPConfig, bench
from insvp_fast.bench import DEVICE, Run, clock, make_images
from insvp_fast.checkpoints.released import to_ours, to_released
from insvp_fast.testing import assert_within_budget, relative_error

__all__ = ["DEVICE", "PROVIDERS", "assert_parity", "authors", "finished", "graphed", "make_model", "without_dropout"]

RELEASE = ("released", "released frozen", *(["authors"] if "INSVP_RELEASE_REPO" in os.environ else []))
PROVIDERS = (*bench.PROVIDERS, *RELEASE)


def make_model(
    provider: str,
    name: str,
    config: InsVPConfig | None = None,
    options: Mapping[str, Any] | None = None,
    **backbone_kwargs: Any,
) -> nn.Module:
    """``bench.make_model`` for all ``PROVIDERS``: the release gets the reference's weights, the authors' code its own.

    Raises:
        ValueError: where the release does not have what is asked for: its geometry is one, its configuration too.
    """
    if provider == "authors":
        return authors().to(DEVICE)
    if not provider.startswith("released"):
        return bench.make_model(provider, name, config, options, **backbone_kwargs)
    config = config or InsVPConfig()
    wanted = InsVPConfig.released(
        prompt_length=config.prompt_length, specific_kernels=config.specific_kernels, simam=config.simam
    )
    if without_dropout(config) != without_dropout(wanted) or not name.startswith("vit_base_patch16_224"):
        raise ValueError(f"{name} in {config}: the release has ViT-B/16 at 224 pixels in its own configuration only")
    backbone = timm.create_model(name, num_classes=bench.NUM_CLASSES, **backbone_kwargs).eval()
    depth, dropout = len(backbone.blocks), config.common_dropout
    sizes = depth, config.prompt_length, config.specific_kernels, dropout, config.simam
    model = Released(backbone, *sizes, frozen=provider.endswith("frozen"))
    state = bench.make_model("reference", name, config, **backbone_kwargs).state_dict()
    model.load_state_dict({to_released(key): value for key, value in state.items()})
    return model.to(DEVICE)


def authors() -> nn.Module:
    """The model of the authors' own code, from the checkout that ``INSVP_RELEASE_REPO`` names."""
    checkout, _, place = os.environ.get("INSVP_RELEASE_REPO", "").partition(":")
    module, _, factory = place.partition(":")
    if not os.path.isdir(checkout) or not module or not factory:
        raise ValueError(
            f"INSVP_RELEASE_REPO={os.environ.get('INSVP_RELEASE_REPO')}: expected <checkout>:<module>:<factory>, where"
            " factory() of the module in that folder returns the model, as with functools.partial in a file of yours"
        )
    sys.path.insert(0, checkout)
    try:
        return getattr(importlib.import_module(module), factory)()
    finally:
        sys.path.remove(checkout)


def without_dropout(config: InsVPConfig) -> InsVPConfig:
    """The configuration with every dropout at 0: what random masks would hide can be compared."""
    return dataclasses.replace(config, **{f"{part}_dropout": 0.0 for part in ("global", "patch", "common", "specific")})


def finished(result: Any) -> Any:
    """The result once the device has computed it."""
    clock()
    return result


def graphed(run: Run) -> Run:
    """A run captured in a CUDA graph: the same kernels on the same memory, without the cost of launching each."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # nothing may be allocated, packed or tuned for the first time while capturing
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


# --------------------------------------------------------------------------------------------------------------- parity


def assert_parity(
    results: Mapping[str, Tensor],
    provider: str,
    amp: torch.dtype | None,
    name: str,
    batch: int,
    config: InsVPConfig,
    **kwargs: Any,
) -> dict[str, float]:
    """What was timed is right: fp32 to 1e-5, 16 bits to twice the error of the reference in the same precision.

    Args:
        results: of a run, without dropout and with weights as ``make_model`` gives them.

    Returns:
        The relative errors against float64 of the logits and of the worst gradient.
    """
    kind = "bare" if provider.startswith("bare") else "reference"
    exact = expected(kind, torch.float64, None, name, batch, config, **kwargs)
    found = {to_ours(key): value for key, value in results.items() if key != "loss"}
    wanted = exact.keys() if "loss" in results else {"logits"}
    assert wanted <= found.keys(), f"{provider} lacks {sorted(wanted - found.keys())}"
    for key in wanted:
        if amp is None:
            error = relative_error(found[key], exact[key])
            assert error < 1e-5, f"{provider}, {key}: relative error {error:.1e}"
        else:
            plain = expected(kind, torch.float32, amp, name, batch, config, **kwargs)[key]
            assert_within_budget(found[key], plain, exact[key], amp, f"{provider}, {key}")
    return errors(found, exact)


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative errors of the logits and of the worst gradient."""
    each = {key: relative_error(found[key], value) for key, value in exact.items() if key in found}
    logits = {"error of logits": each.pop("logits")}
    return logits | ({"error of gradients": max(each.values())} if each else {})


@functools.lru_cache(maxsize=4)
def expected(
    kind: str, dtype: torch.dtype, amp: torch.dtype | None, name: str, batch: int, config: InsVPConfig, **kwargs: Any
) -> dict[str, Tensor]:
    """Logits and gradients of the bare ViT or of the reference, a few images at a time: float64 wants much memory."""
    model = bench.make_model(kind, name, config, **kwargs).to(dtype)
    image, target = make_images(model, batch)
    image = image.to(dtype).requires_grad_(kind == "bare")
    logits = []
    for x, y in zip(image.split(16), target.split(16), strict=True):
        with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            logits.append(model(x))
            loss = F.cross_entropy(logits[-1].to(torch.promote_types(dtype, torch.float32)), y, reduction="sum") / batch
        loss.backward()
    trained = {"image": image} if kind == "bare" else dict(model.named_parameters())
    gradients = {key: p.grad for key, p in trained.items() if p.grad is not None}
    return {"logits": torch.cat([part.detach() for part in logits]), **gradients}
