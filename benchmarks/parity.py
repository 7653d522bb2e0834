"""Whether a timed model computed the right values: its results against the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast import InsVPConfig
from insvp_fast.bench.models import make_images, make_model
from insvp_fast.checkpoints.released import to_ours
from insvp_fast.testing import DEVICE, assert_within_budget, relative_error

__all__ = ["assert_parity", "errors", "expected"]


def assert_parity(
    results: Mapping[str, Tensor],
    provider: str,
    amp: torch.dtype | None,
    name: str,
    batch: int,
    config: InsVPConfig,
    **kwargs: Any,
) -> dict[str, float]:
    """Assert relative errors below 1e-5 in fp32, and in 16 bits at most twice those of the reference in 16 bits.

    On GPUs, where other kernels round otherwise and a window of pooling may so have another maximum, errors in fp32 are
    also right up to twice those of the reference in fp32.

    Args:
        results: of a run of ``insvp_fast.bench.jobs``, without dropout and with the weights of ``make_model``.

    Returns:
        What ``errors`` returns.
    """
    kind = "bare" if provider.startswith("bare") else "reference"
    exact = expected(kind, torch.float64, None, name, batch, config, **kwargs)
    found = to_ours({key: value for key, value in results.items() if key != "loss"})
    wanted = exact.keys() if "loss" in results else {"logits"}
    assert wanted <= found.keys(), f"{provider} lacks {sorted(wanted - found.keys())}"
    for key in wanted:
        if amp is None:
            error, allowed = relative_error(found[key], exact[key]), 1e-5
            if error >= allowed and DEVICE.type == "cuda":
                plain = expected(kind, torch.float32, None, name, batch, config, **kwargs)[key]
                allowed = max(allowed, 2 * relative_error(plain, exact[key]))
            assert error < allowed, f"{provider}, {key}: relative error {error:.1e}, more than {allowed:.1e}"
        else:
            plain = expected(kind, torch.float32, amp, name, batch, config, **kwargs)[key]
            assert_within_budget(found[key], plain, exact[key], amp, f"{provider}, {key}")
    return errors(results, exact)


def errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative errors of the logits and of the gradient that is off the most.

    Args:
        results: of a run, under the parameter names of this package or of the release.
        exact: what they are compared with.
    """
    found = to_ours(results)
    each = {key: relative_error(found[key], value) for key, value in exact.items() if key in found}
    logits = {"error of logits": each.pop("logits")}
    return logits | ({"error of gradients": max(each.values())} if each else {})


@functools.lru_cache(maxsize=4)
def expected(
    kind: str, dtype: torch.dtype, amp: torch.dtype | None, name: str, batch: int, config: InsVPConfig, **kwargs: Any
) -> dict[str, Tensor]:
    """Logits and gradients of the bare ViT or the reference, computed 16 images at a time to save memory in float64."""
    model = make_model(kind, name, config, **kwargs).to(dtype)
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
