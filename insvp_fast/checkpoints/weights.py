"""Weights of backbones in the formats that people publish them in, as state dicts of timm's modules.

``read_backbone_weights`` is the one function: it decides the format of a file from its keys, gives the tensors the
names of the timm module, lets timm's own ``checkpoint_filter_fn`` of the module's file do what it can (CLIP, DINOv2,
DINOv3, Swin, resampling), and checks that exactly the module's weights remain. What else the format is known to hold,
such as a decoder, is left out and named in the report; anything unknown is an error.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from insvp_fast.checkpoints import huggingface, jax_weights
from insvp_fast.checkpoints.files import read_weights
from insvp_fast.checkpoints.state_dict import (
    Resized,
    Rules,
    check_shapes,
    head_prefixes,
    other_state_dicts,
    rename,
    unwrap_state_dict,
)
from insvp_fast.errors import CheckpointError

__all__ = ["WeightsReport", "read_backbone_weights"]


@dataclass
class WeightsReport:
    """What became of a file of weights.

    Attributes:
        format: whose names the tensors had.
        left_out: what the file held besides, and in how many tensors.
        adapted: the tensors of another size, with their shapes in the file and in the model: embeddings of positions
            and patches were resampled, the channels of the first convolution repeated or summed.
        missing_head: whether the model has a head, and the file none that fits it.
    """

    format: str
    left_out: Counter[str] = field(default_factory=Counter)
    adapted: Resized = field(default_factory=dict)
    missing_head: bool = False

    def __str__(self) -> str:
        parts = [f"{self.format} weights"]
        if self.left_out:
            counted = (f"{what} ({n} tensor{'s' * (n > 1)})" for what, n in sorted(self.left_out.items()))
            parts.append("left out: " + ", ".join(counted))
        parts += [f"{key} adapted from {old} to {new}" for key, (old, new) in self.adapted.items()]
        if self.missing_head:
            parts.append("no head that fits: the model's keeps its random values")
        return "; ".join(parts)


class Format(NamedTuple):
    """A way to name tensors; the first in ``FORMATS`` whose marker is found is taken.

    Attributes:
        name: whose it is.
        marker: a pattern at the beginning of at least one of its keys.
        rules: from its names to those that timm, or timm's ``checkpoint_filter_fn``, knows.
    """

    name: str
    marker: str
    rules: Rules = ()


# the blocks of a model that was trained in chunks are blocks.CHUNK.BLOCK
DINO = ((r"^(teacher\.)?backbone\.", ""), (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."))
TRUNK = ((r"^visual\.trunk\.", ""), (r"^visual\.head\.proj\.", "head."))

FORMATS = (
    Format("MoCo-v3", r"base_encoder\.", ((r"^base_encoder\.", ""),)),
    Format("DINO", r"(teacher\.)?backbone\.", DINO),
    Format("open_clip", r"visual\.trunk\.", TRUNK),
    Format("CLIP", r"visual\.(class_embedding|conv1\.weight)$"),
    Format("TIPS", r"vision_encoder\.", ((r"^vision_encoder\.", ""),)),
    Format("EVA-CLIP", r"visual\.pos_embed$"),
    Format("Hugging Face CLIP", r"(vision_model\.)?embeddings\.class_embedding$", huggingface.RULES),
    Format("Hugging Face SigLIP", r"(vision_model\.)?embeddings\.patch_embedding\.bias$", huggingface.SIGLIP_RULES),
    Format("Hugging Face DINOv3", r"(\w+\.)?embeddings\.patch_embeddings\.weight$", huggingface.DINOV3_RULES),
    Format("Hugging Face", r"(\w+\.)?embeddings\.patch_embeddings\.projection\.weight$", huggingface.RULES),
    Format("timm", r"timm_model\.", ((r"^timm_model\.", ""),)),
    Format("Perception Encoder", r"ln_pre\.weight$", ((r"^", "visual."),)),
    Format("MAE", r"decoder_embed\."),
    Format("DINOv3", r"storage_tokens$"),
    Format("DINOv2", r"register_tokens$|mask_token$"),
    Format("timm", ""),
)
EXPECTED = "as timm, MoCo-v3, MAE, DINO, CLIP, SigLIP or Hugging Face name them"

# Patterns at the beginning of keys that a backbone has no use for, once they are renamed. A key that the module has is
# never left out.
LEFT_OUT = {
    "momentum encoder": r"momentum_encoder\.|target_encoder\.",
    "student": r"student\.",
    "projection head": r"head\.(\d|mlp|last_layer)|(dino_head|ibot_head|projection_head|projectors|predictor)\.",
    "head": r"(head|head_dist)\.|visual\.(proj$|head\.)",
    "decoder": r"decoder",
    "text tower": r"(text|text_model|text_encoder|transformer|token_embedding|ln_final)\."
    r"|(positional_embedding|attn_mask)$|text_projection(\.weight)?$|logit_(scale|bias)$|(input_resolution|context_length|vocab_size)$"
    r"|beit3\.(text_embed\.|.*\.B\.)",
    "attention pooling": r"attn_pool\.",
    "RADIO's conditioner and adaptors": r"radio_model\.(?!model\.)",
    "pooler": r"pooler\.",
    "mask token": r"(.*\.)?(mask_token|masked_embed)$",
    "representation layer": r"pre_logits\.",
    "norm of local crops": r"local_cls_norm\.",
    "head of masked image modeling": r"lm_head\.",
    "buffers": r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|position_ids|periods|bias_mask)$",
}
LATER = ("head", "mask token")  # timm's conversion renames the one, and knows formats by the other


def read_backbone_weights(file: Path, backbone: nn.Module) -> tuple[dict[str, Tensor], WeightsReport]:
    """Read a file of weights for a module of timm; the module is not changed.

    The head is part of the result if the file has one of the module's size. No code in the file is run.

    Args:
        file: .safetensors, the .safetensors.index.json of several, .npz, or of ``torch.save``.
        backbone: the timm module that the weights are for.

    Returns:
        The state dict, complete apart from the head, and what was done to get it.

    Raises:
        CheckpointError: if the file cannot be read, is of no known format, or is not of this architecture.
    """
    if file.suffix == ".npz":
        state, left_out, adapted = jax_weights.convert(file, backbone)
        report = WeightsReport("JAX", left_out, adapted)
    else:
        content = read_weights(file)
        try:
            state, report = _convert(content, backbone, file)
        except CheckpointError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]  # of shapes that no such model has
            raise CheckpointError(f"{file}: not weights of this model: {reason}") from error
    return _require_complete(state, backbone, report, file), report


def _convert(content: Any, backbone: nn.Module, where: object) -> tuple[dict[str, Tensor], WeightsReport]:
    """The tensors of a checkpoint, under timm's names, without what is known to be of no use."""
    tensors, known = unwrap_state_dict(content, where), backbone.state_dict().keys()
    found = next(entry for entry in FORMATS if any(re.match(entry.marker, key) for key in ["", *tensors]))
    report = WeightsReport(found.name, other_state_dicts(content))
    state = rename(tensors, found.rules, where)
    if found.name.startswith("Hugging Face"):
        state = huggingface.pack(state, where)
    state = _leave_out(state, known, report, later=LATER)
    converted = _timm_conversion(state, backbone, where)
    report.left_out.update("mask token" for key in state.keys() - converted.keys() if _part(key) == "mask token")
    report.adapted = _adapt_channels(converted, backbone) | _resampled(state, converted)
    fit = {
        key: value for key, value in converted.items() if key in known or not key.startswith(head_prefixes(backbone))
    }
    report.left_out.update("head" for _ in range(len(converted) - len(fit)))
    converted = _leave_out(fit, known, report)
    if not converted.keys() & known:
        raise CheckpointError(
            f"{where}: found the names {sorted(tensors)[:5]}: expected a {type(backbone).__name__}'s, {EXPECTED}"
        )
    if "head.weight" in converted and "head.bias" in known:  # CLIP's projection has none
        converted.setdefault("head.bias", torch.zeros(len(converted["head.weight"])))
    return converted, report


def _part(key: str) -> str | None:
    """What a tensor belongs to that is no part of a backbone."""
    return next((name for name, pattern in LEFT_OUT.items() if re.match(pattern, key)), None)


def _leave_out(
    tensors: Mapping[str, Tensor], known: Set[str], report: WeightsReport, later: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors without those that are no part of a backbone, which the report counts."""
    rest = {}
    for key, value in tensors.items():
        part = None if key in known else _part(key)
        if part is None or part in later:
            rest[key] = value
        else:
            report.left_out[part] += 1
    return rest


def _resampled(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Resized:
    """The tensors that timm's conversion changed in size, with their shapes before and after."""
    pairs = {key: (tuple(value.shape), tuple(after[key].shape)) for key, value in before.items() if key in after}
    if "register_tokens" in before and "pos_embed" in pairs:  # DINOv2's class token takes its own position out of it
        old, new = pairs["pos_embed"]
        pairs["pos_embed"] = (old[0], old[1] - 1, *old[2:]), new
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _adapt_channels(tensors: dict[str, Tensor], backbone: nn.Module) -> Resized:
    """Make the first convolution of RGB images one of the module's channels, as timm does, and say what changed."""
    first = (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv") or ()
    own, changed = backbone.state_dict(), {}
    for key in [f"{name}.weight" for name in ([first] if isinstance(first, str) else first)]:
        shapes = [tuple(each[key].shape) for each in (tensors, own) if key in each]
        if len(shapes) == 2 and all(len(shape) == 4 for shape in shapes) and shapes[0][1] == 3 != shapes[1][1]:
            tensors[key] = adapt_input_conv(shapes[1][1], tensors[key])
            changed[key] = shapes[0], tuple(tensors[key].shape)
    return changed


def _timm_conversion(tensors: dict[str, Tensor], backbone: nn.Module, where: object) -> dict[str, Tensor]:
    """What timm's ``checkpoint_filter_fn`` of the module's own file makes of a state dict."""
    files = [sys.modules[cls.__module__] for cls in type(backbone).__mro__]
    convert = next((file.checkpoint_filter_fn for file in files if hasattr(file, "checkpoint_filter_fn")), None)
    if convert is None:
        return tensors
    known = signature(convert).parameters
    if "adapt_layer_scale" in known:  # DeiT-3's names
        convert = partial(convert, adapt_layer_scale=True)
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    if "interpolation" in known and "flexi" in str(cfg.get("architecture")):  # as timm itself does for these
        convert = partial(convert, interpolation="bilinear", antialias=False)
    _require_no_lost_bias(tensors, backbone, where)
    with contextlib.redirect_stdout(io.StringIO()):  # that of eva.py prints
        return convert(dict(tensors), backbone)


def _require_no_lost_bias(tensors: Mapping[str, Tensor], backbone: nn.Module, where: object) -> None:
    """Raise if timm would leave out DINOv3's biases of queries and values although they are not zero."""
    if "storage_tokens" not in tensors or any(key.endswith("q_bias") for key in backbone.state_dict()):
        return
    for key, bias in tensors.items():
        query, _, value = bias.chunk(3) if key.endswith("attn.qkv.bias") else (bias.new_zeros(1),) * 3
        if query.any() or value.any():
            raise CheckpointError(f"{where}: {key} is not zero: expected a model with this bias, such as *_qkvb")


def _require_complete(
    state: dict[str, Tensor], backbone: nn.Module, report: WeightsReport, where: object
) -> dict[str, Tensor]:
    """The state dict, if it is the module's; a head of another size is left out."""
    own = backbone.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    head = {key for key in expected if key.startswith(head_prefixes(backbone))}
    if any(key not in state or tuple(state[key].shape) != expected[key] for key in head):
        report.missing_head = True
        report.left_out.update("head" for key in head & state.keys())
        state = {key: value for key, value in state.items() if key not in head}
        expected = {key: shape for key, shape in expected.items() if key not in head}
    integers = {key for key, value in own.items() if not value.is_floating_point()}
    check_shapes(state, expected, f"{where}: not weights of this model", integers)
    return state
