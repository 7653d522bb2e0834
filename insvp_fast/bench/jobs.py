"""What a model is timed at: inference, forward + backward, or a training step.

The bare backbone's backward gives the gradient of its input and of no weight: the least that prompting an image costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.bench.models import make_images
from insvp_fast.testing import DEVICE

__all__ = ["AUTOCAST_DTYPES", "JOBS", "Run", "forward_backward", "inference", "training_step"]

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # fp16 has no GradScaler here

Run = Callable[[], dict[str, Tensor]]  # does the job once and returns its results by name


def inference(model: nn.Module, batch: int, amp: torch.dtype | None) -> Run:
    """Logits without gradients, in evaluation mode."""
    image, _ = make_images(model.eval(), batch)

    def run() -> dict[str, Tensor]:
        with torch.inference_mode(), torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            return {"logits": model(image)}

    return run


def forward_backward(model: nn.Module, batch: int, amp: torch.dtype | None) -> Run:
    """Logits, cross-entropy and the gradients of all that require one, by name; of the image if nothing else does."""
    image, target = make_images(model, batch)
    trained: dict[str, Tensor] = {
        name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad
    }
    if not trained:
        trained = {"image": image.requires_grad_()}
    model.train("image" not in trained)

    def run() -> dict[str, Tensor]:
        for tensor in trained.values():
            tensor.grad = None
        with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            logits = model(image)
            loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        return {"logits": logits.detach(), "loss": loss.detach(), **gradients}

    return run


def training_step(model: nn.Module, batch: int, amp: torch.dtype | None, **optimizer: Any) -> Run:
    """``forward_backward``, then a step of AdamW.

    The optimizer gets ``model.trained_parameters()`` where the model has it, else what requires a gradient.
    """
    run = forward_backward(model, batch, amp)
    choose = getattr(model, "trained_parameters", lambda: [p for p in model.parameters() if p.requires_grad])
    trained = choose()
    adamw = torch.optim.AdamW(trained, **optimizer) if trained else None

    def step() -> dict[str, Tensor]:
        results = run()
        if adamw is not None:
            adamw.step()
        return results

    return step


JOBS: dict[str, Callable[..., Run]] = {
    "inference": inference,
    "forward + backward": forward_backward,
    "training step": training_step,
}
