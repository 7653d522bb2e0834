"""Grad-CAM: where in an image a model finds a class (Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.errors import InsVPError
from insvp_fast.figures.modes import evaluating
from insvp_fast.reference.prompted import PromptedReference

__all__ = ["grad_cam"]


def grad_cam(model: PromptedReference, images: Tensor, classes: Sequence[int], prompts: bool = True) -> Tensor:
    """ReLU of the sum over features of (mean gradient of the class score) · feature, for each place in the image.

    The features are the patches' behind the first norm of the last block, the last that all tokens are computed from;
    of a convolutional backbone, the last map. The model runs on its general path, in evaluation mode.

    Args:
        images: [B, C, H, W], the model's input.
        classes: the class whose score is explained, for each image.
        prompts: False for the bare frozen backbone, of the same images, with the model's head behind it.

    Returns:
        fp32 [B, H, W], at least 0, interpolated bilinearly between the patches.

    Raises:
        InsVPError: if the backbone has no such features, or the head does not read any patch.
    """
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        images = images.clone()  # those of inference mode have no gradients
        maps = [_grad_cam(model, image[None], index, prompts) for image, index in zip(images, classes, strict=True)]
    return torch.cat(maps) if maps else images.new_zeros(0, *images.shape[-2:])


def _grad_cam(model: PromptedReference, image: Tensor, index: int, prompts: bool) -> Tensor:
    with (_of_block if model.widths else _of_map)(model, image, prompts) as (features, logits):
        (gradient,) = torch.autograd.grad(logits[0, index], features, allow_unused=True)
    patches = None if gradient is None else _as_map(model, gradient, image)
    if patches is None or not patches.any():
        kind = type(model.backbone).__name__
        raise InsVPError(f"no Grad-CAM of a {kind}: its head does not read the patches from its last norm1")
    cam = (patches.mean((2, 3), keepdim=True) * _as_map(model, features.detach(), image)).sum(1, keepdim=True).relu()
    return F.interpolate(cam.float(), image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


@contextmanager
def _of_block(model: PromptedReference, image: Tensor, prompts: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens behind the first norm of the last block, and the logits that a graph computes from them."""
    norms = [module for name, module in model.backbone.named_modules() if name.rpartition(".")[2] == "norm1"]
    if not norms:
        raise InsVPError(f"no Grad-CAM of a {type(model.backbone).__name__}: its blocks have no norm1")
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a method that looks at the bare features first, as DAM-VP does
            return output
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = norms[-1].register_forward_hook(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* takes the general path")  # because of the hook
            logits = model.forward_head(_features(model, image, prompts))
        # where a block takes prompts by themselves, as Swin's do, they come after the tokens
        yield kept[0], logits
    finally:
        handle.remove()  # here, as blocks may be computed again in backward


@contextmanager
def _of_map(model: PromptedReference, image: Tensor, prompts: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The last map of a backbone without blocks, and its logits."""
    with torch.no_grad():
        features = _features(model, image, prompts)
    features.requires_grad_()
    yield features, model.forward_head(features)


def _features(model: PromptedReference, image: Tensor, prompts: bool) -> Tensor:
    features: Tensor = (model if prompts else model.backbone).forward_features(image)
    return features


def _as_map(model: PromptedReference, features: Tensor, image: Tensor) -> Tensor:
    """Features [1, T, D], [1, h, w, D] or [1, D, h, w] as the last of these; tokens that are no patches come first."""
    if features.ndim == 3:
        height, width = (side // model.patch_size for side in image.shape[-2:])
        if height * width > features.shape[1]:
            kind = type(model.backbone).__name__
            raise InsVPError(f"no Grad-CAM of a {kind}: expected {height}x{width} patches, got {features.shape[1]}")
        return features[:, -height * width :].mT.unflatten(2, (height, width))
    channels_last = getattr(model.backbone, "output_fmt", "NCHW") == "NHWC"
    return features.permute(0, 3, 1, 2) if channels_last else features
