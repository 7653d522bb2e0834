"""What is timed: bare frozen timm ViT, reference and fast model, each as one training step and one inference.

All get the same random weights, images and targets. The bare backbone's training step has a gradient to its input and
none to its weights: what any image prompt at least costs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, cpu, frozen, native_status

PROVIDERS = ("bare", "reference", "insvp_fast")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(provider: str, name: str, num_classes: int = 200, config: InsVPConfig | None = None) -> nn.Module:
    """One of ``PROVIDERS`` around a timm ViT with random weights; seeded, so that all have the same."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=num_classes)
    if provider == "bare":
        model = backbone.eval().requires_grad_(False)
    else:
        torch.manual_seed(1)
        model = {"reference": InsVPReference, "insvp_fast": InsVPViT}[provider](backbone, None, config)
    return model.to(DEVICE)


def make_images(model: nn.Module, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and targets for a model."""
    torch.manual_seed(2)
    size = getattr(model, "backbone", model).patch_embed.img_size
    return torch.randn(batch, 3, *size, device=DEVICE), torch.randint(0, 200, (batch,), device=DEVICE)


def training_step(
    model: nn.Module, batch: int, amp: torch.dtype | None, **optimizer: Any
) -> Callable[[], torch.Tensor]:
    """Forward, cross-entropy, backward and, for what is trained, AdamW; returns the loss, with the device done."""
    image, target = make_images(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, **optimizer) if trained else None
    image.requires_grad_(adamw is None)

    def step() -> torch.Tensor:
        if adamw is None:
            image.grad = None
        else:
            adamw.zero_grad()
        with torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            loss = F.cross_entropy(model(image).float(), target)
        loss.backward()
        if adamw is not None:
            adamw.step()
        return finished(loss.detach())

    return step


def inference(model: nn.Module, batch: int, amp: torch.dtype | None) -> Callable[[], torch.Tensor]:
    """Logits without gradients, in evaluation mode, with the device done."""
    image, _ = make_images(model, batch)

    def run() -> torch.Tensor:
        model.eval()
        with torch.inference_mode(), torch.autocast(DEVICE.type, amp, enabled=amp is not None):
            return finished(model(image))

    return run


def finished(result: torch.Tensor) -> torch.Tensor:
    """The result once the device has computed it: a GPU answers before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result


def machine() -> dict[str, Any]:
    """What a figure must not be quoted without."""
    facts: dict[str, Any] = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    if DEVICE.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    how = {str(dtype).removeprefix("torch."): frozen.cpu_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return facts | {
        "device": f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 products": cpu.has_products(torch.bfloat16),
        "frozen products": how,
        "native library": str(native_status()),
    }
