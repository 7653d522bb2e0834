"""Models to compare: the reference and the fast model with the same weights, and what a pass through one gives."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig
from insvp_fast.model import InsVPViT
from insvp_fast.reference import InsVPReference

__all__ = ["DEVICE", "make_pair", "saved_bytes", "trained_gradients"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_pair(
    name: str, config: InsVPConfig | None = None, num_classes: int = 10, **kwargs: Any
) -> tuple[InsVPReference, InsVPViT]:
    """The reference and the fast model with the same random weights on ``DEVICE``; ``kwargs`` are timm's.

    Weights that timm initializes to zero or one (biases, norms, layer scale) are random too, so that they cannot hide
    an error.
    """
    backbone = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference = InsVPReference(copy.deepcopy(backbone), num_classes, config)
    fast = InsVPViT(backbone, num_classes, config)
    fast.load_state_dict(reference.state_dict())
    return reference.to(DEVICE), fast.to(DEVICE)


def trained_gradients(
    model: nn.Module, image: Tensor, seed: int = 0, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The logits, and the gradient of every trained parameter for a random loss; ``seed`` sets it and the dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast(image.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(image)
    torch.manual_seed(seed)
    target = torch.randn(logits.shape, dtype=torch.float64).to(logits)
    ((logits.to(torch.promote_types(logits.dtype, torch.float32)) - target).square().mean()).backward()
    gradients = {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    return {"logits": logits.detach(), **gradients}


def saved_bytes(model: nn.Module, image: Tensor, autocast: torch.dtype | None = None) -> int:
    """Bytes that one forward pass saves for backward: each storage once, without the model's weights and the image."""
    own = {t.untyped_storage().data_ptr() for t in (image, *model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    kept = []  # keeps the tensors alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    enabled = autocast is not None
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(image.device.type, autocast, enabled=enabled),
    ):
        model(image)
    return sum(sizes.values())
