"""InsVP for Hugging Face transformers: a model for ``Trainer``, and an image processor made from an adapter.

Needs ``transformers``, which the extra ``examples`` brings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, TimmWrapperImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from insvp_fast.model import InsVPViT

__all__ = ["InsVPForImageClassification", "image_processor"]


class InsVPForImageClassification(nn.Module):
    """An ``InsVPViT`` with named inputs and the loss beside the logits, as ``transformers.Trainer`` expects.

    The state dict leaves out the frozen backbone, and so do the checkpoints of ``Trainer``.

    Args:
        model: the ``InsVPViT``; the attribute ``model`` afterwards.
    """

    def __init__(self, model: InsVPViT) -> None:
        super().__init__()
        self.model = model
        self.register_state_dict_post_hook(_drop_backbone)
        self.register_load_state_dict_post_hook(_miss_no_backbone)

    @property
    def config(self) -> PretrainedConfig:
        """What ``Trainer`` and its loggers ask a model of transformers: its classes, and one label or several."""
        names, indices = self.model.class_names, range(self.model.num_classes)
        classes = indices if names is None or len(names) != len(indices) else names  # the head may be a new one
        return PretrainedConfig(
            id2label=dict(enumerate(map(str, classes))),
            problem_type="multi_label_classification" if self.model.multi_label else "single_label_classification",
        )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Images [B, C, H, W] to logits [B, num_classes], and with labels also to their mean cross-entropy.

        Args:
            labels: classes [B]; of a model for several labels per image (``model.multi_label``), 0 or 1 for each,
                [B, num_classes].

        Raises:
            ValueError: for labels of floating-point numbers, or for one class, if the model is not for several labels.
        """
        if labels is not None and not self.model.multi_label:
            if labels.is_floating_point():
                raise ValueError(f"labels are {labels.dtype}: expected integers, or multi_label = True on the InsVPViT")
            if self.model.num_classes == 1:  # its softmax is 1, whatever the image
                raise ValueError("the model has one class: expected two or more, or multi_label = True on the InsVPViT")
        logits, loss = self.model(pixel_values), None
        if labels is not None and self.model.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, save_directory: str | Path, **arguments: Any) -> str | None:
        """Save the adapter; see ``InsVPViT.save_pretrained``."""
        return self.model.save_pretrained(save_directory, **arguments)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load an adapter; see ``InsVPViT.from_pretrained``."""
        return cls(InsVPViT.from_pretrained(pretrained_model_name_or_path, **arguments)).eval()

    def activation_checkpointing_enable(self, **arguments: Any) -> None:
        """Compute blocks again in backward, as ``Trainer`` asks; its arguments are for other ways to do so.

        Raises:
            ValueError: for an argument that would have an effect.
        """
        arguments |= arguments.pop("gradient_checkpointing_kwargs", None) or {}
        if chosen := {name: value for name, value in arguments.items() if value not in (None, False, 1)}:
            raise ValueError(f"{chosen}: expected none, InsVPViT knows one way to compute blocks again")
        self.model.set_grad_checkpointing(True)

    # the name that transformers used before version 6
    gradient_checkpointing_enable = activation_checkpointing_enable


def image_processor(preprocessing: Mapping[str, Any] | None) -> TimmWrapperImageProcessor:
    """Transformers' image processor that prepares images as ``timm.data.create_transform`` does for evaluation.

    Args:
        preprocessing: what an adapter records, ``model.preprocessing``, or ``resolve_model_data_config(model)``.

    Raises:
        ValueError: if an adapter records none.
    """
    if preprocessing is None:
        raise ValueError("preprocessing is None: expected timm.data.resolve_model_data_config(model), say")
    return TimmWrapperImageProcessor(pretrained_cfg=dict(preprocessing))


BACKBONE = "model.backbone."


def _drop_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for key in [key for key in state if key.startswith(prefix + BACKBONE)]:
        del state[key]


def _miss_no_backbone(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if BACKBONE not in key]
