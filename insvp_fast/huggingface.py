"""InsVP for Hugging Face transformers: a model for ``Trainer``, and an image processor made from an adapter.

Needs ``transformers``, which the extra ``examples`` brings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from transformers import PretrainedConfig, TimmWrapperImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from insvp_fast.data.decode import to_rgb
from insvp_fast.data.transforms import steps_of, transform_for
from insvp_fast.model import InsVPViT

__all__ = ["InsVPForImageClassification", "image_processor"]


class InsVPForImageClassification(nn.Module):
    """An ``InsVPViT`` with named inputs and the loss beside the logits, as ``transformers.Trainer`` expects.

    The state dict leaves out the frozen backbone, and so do the checkpoints of ``Trainer``.

    Args:
        model: the ``InsVPViT``; the attribute ``model`` afterwards.
    """

    main_input_name = "pixel_values"  # what ``Trainer`` gives to metrics that ask for inputs
    _prefix = ""  # of its keys, where another module loads it

    def __init__(self, model: InsVPViT) -> None:
        super().__init__()
        self.model = model
        self.register_state_dict_post_hook(_drop_backbone)
        self.register_load_state_dict_pre_hook(_remember_prefix)
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
            pixel_values: in 8 bits, or floating point of any dtype, cast to the model's as transformers' models do.
            labels: classes [B]; of a model for several labels per image (``model.multi_label``), 0 or 1 for each,
                [B, num_classes].

        Raises:
            ValueError: for labels of another shape, and of floating-point numbers or for one class, if the model is
                not for several labels.
        """
        B, C = len(pixel_values), self.model.num_classes
        if labels is not None and not self.model.multi_label:
            if labels.is_floating_point() or labels.shape != (B,):
                found = f"labels are {labels.dtype} {list(labels.shape)}"
                raise ValueError(f"{found}: expected integers [{B}], or multi_label = True on the InsVPViT")
            if C == 1:  # its softmax is 1, whatever the image
                raise ValueError("the model has one class: expected two or more, or multi_label = True on the InsVPViT")
        elif labels is not None and labels.shape != (B, C):
            raise ValueError(f"labels are {list(labels.shape)}: expected 0 or 1 for each class, [{B}, {C}]")
        if pixel_values.is_floating_point():  # `bf16_full_eval` casts the model alone
            dtypes = (p.dtype for p in self.model.backbone.parameters() if p.is_floating_point())
            pixel_values = pixel_values.to(next(dtypes, pixel_values.dtype))
        logits, loss = self.model(pixel_values), None
        if labels is not None and self.model.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels.long())
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
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the former before version 6
            arguments |= arguments.pop(name, None) or {}
        if chosen := {name: value for name, value in arguments.items() if value not in (None, False, 1)}:
            raise ValueError(f"{chosen}: expected none, InsVPViT knows one way to compute blocks again")
        self.model.set_grad_checkpointing(True)

    # the name that transformers used before version 6
    gradient_checkpointing_enable = activation_checkpointing_enable


def image_processor(preprocessing: Mapping[str, Any] | None) -> TimmWrapperImageProcessor:
    """Transformers' image processor that prepares images of any mode as an adapter records, but turns none upright.

    Args:
        preprocessing: what an adapter records, ``model.preprocessing``, or ``resolve_model_data_config(model)``.

    Raises:
        ValueError: if an adapter records none.
        DataError: if timm has no such transform.
    """
    if preprocessing is None:
        raise ValueError("preprocessing is None: expected timm.data.resolve_model_data_config(model), say")
    transform = transform_for(dict(preprocessing))
    processor = TimmWrapperImageProcessor(pretrained_cfg=dict(preprocessing))
    # its own has other defaults than create_transform, and passes over what a pretrained_cfg does not have
    processor.val_transforms = transforms.Compose([_as_rgb, *steps_of(transform)])
    return processor


def _as_rgb(image: Image.Image | Tensor) -> Image.Image | Tensor:
    return to_rgb(image, exif_rotation=False) if isinstance(image, Image.Image) else image


BACKBONE = "model.backbone."


def _drop_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for key in [key for key in state if key.startswith(prefix + BACKBONE)]:
        del state[key]


def _remember_prefix(module: InsVPForImageClassification, state: object, prefix: str, *others: object) -> None:
    module._prefix = prefix


def _miss_no_backbone(module: InsVPForImageClassification, keys: Any) -> None:
    own = module._prefix + BACKBONE  # the keys are those of the whole load, also of modules beside this one
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(own)]
