"""The methods and properties that timm's and PEFT's users expect of a model."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from insvp_fast.reference import take_head

__all__ = ["TimmInterface"]


class TimmInterface(nn.Module):
    """timm's and PEFT's interface for a class with the attributes of ``InsVPViT``."""

    backbone: VisionTransformer
    head: nn.Module
    num_classes: int
    recompute: str

    @property
    def num_features(self) -> int:
        """D, the width of the features."""
        width: int = self.backbone.num_features
        return width

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the backbone's weights: mean, std, interpolation, input size and source."""
        description: dict[str, Any] = self.backbone.pretrained_cfg
        return description

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new trained head, on the backbone's device and in its dtype; 0 classes for features."""
        self.backbone.reset_classifier(num_classes, global_pool)
        self.num_classes, self.head = num_classes, take_head(self.backbone).requires_grad_(True)
        self.head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the trained tensors that are embeddings and not weights, for timm's optimizer factory."""
        return {"common_prompts"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch ``recompute="block"`` on or off."""
        self.recompute = "block" if enable else "none"

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trained parameters and of all."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trained and of all parameters, and the number in each trained part."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
        parts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                parts[part] = parts.get(part, 0) + parameter.numel()
        for part, count in parts.items():
            print(f"  {part}: {count:,}")
