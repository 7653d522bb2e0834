"""State dicts: taken out of what wraps them in a file, checked against a model, and hashed."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.checkpoints.files import read_safetensors
from insvp_fast.config import InsVPConfig
from insvp_fast.errors import CheckpointError
from insvp_fast.reference import InsVPReference, split_common_prompts, structure_of, take_head
from insvp_fast.reference.heads import reset_classifier

__all__ = [
    "Resized",
    "Rules",
    "assign",
    "backbone_sha256",
    "check_shapes",
    "expected_shapes",
    "head_of",
    "head_prefixes",
    "other_state_dicts",
    "read_adapter_weights",
    "rename",
    "skeleton",
    "unwrap_state_dict",
]

Resized = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # shapes of tensors, in a file and in a model
Rules = tuple[tuple[str, str], ...]  # patterns and their replacements, as re.sub takes them

# Keys of a checkpoint, in the order of preference: timm's, then DINO's, DeepSpeed's and I-JEPA's.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "module", "encoder")
BESIDE = (*WRAPPERS, "target_encoder", "predictor")  # what may hold another state dict


def unwrap_state_dict(content: Any, where: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without outer dictionaries and the key prefixes of DDP and ``torch.compile``.

    Args:
        content: what a file holds, or a state dict.
        where: what messages call it.

    Raises:
        CheckpointError: if there is no state dict in it, or without the prefixes two tensors have one name.
    """
    for outer, name in _wrappers(content):
        content = outer[name]
    items = content.items() if isinstance(content, Mapping) else [(None, None)]
    if not all(isinstance(key, str) and _is_plain(value) for key, value in items):
        found = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{where}: found {found}: expected a state dict of dense tensors")
    return rename(content, ((r"^(module\.|_orig_mod\.)+", ""),), where)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def other_state_dicts(content: Any) -> Counter[str]:
    """The state dicts beside the one that ``unwrap_state_dict`` takes, a student's say; their numbers of tensors."""
    others: Counter[str] = Counter()
    for outer, taken in _wrappers(content):
        for name in BESIDE:
            if name != taken and isinstance(outer.get(name), Mapping):
                others[name] += sum(isinstance(value, Tensor) for value in outer[name].values())
    return +others


def _wrappers(content: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The dictionaries around a state dict, from the outermost, and under which key each has the next one."""
    for _ in WRAPPERS:  # some are nested: {"state_dict": {"model": ...}}
        outer = content if isinstance(content, Mapping) else {}
        name = next((key for key in WRAPPERS if isinstance(outer.get(key), Mapping)), None)
        if name is None:
            return
        yield outer, name
        content = outer[name]


def rename(tensors: Mapping[str, Tensor], rules: Rules, where: object) -> dict[str, Tensor]:
    """The tensors under the names that the rules make of their keys, one rule after the other.

    Raises:
        CheckpointError: if two get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for old, value in tensors.items():
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise CheckpointError(f"{where}: found {new} twice, once as {old}: expected one tensor of each name")
        renamed[new] = value
    return renamed


def read_adapter_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, also of one that an earlier version wrote.

    Raises:
        CheckpointError: if it is not such a file.
    """
    return split_common_prompts(read_safetensors(file))


def expected_shapes(
    backbone: nn.Module, num_classes: int, config: InsVPConfig, where: object
) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a model's state dict, without changing the backbone or copying its weights.

    Raises:
        CheckpointError, TypeError: as ``skeleton``.
    """
    model = skeleton(backbone, num_classes, config, where)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def skeleton(backbone: nn.Module, num_classes: int, config: InsVPConfig, where: object) -> InsVPReference:
    """The model that is described, on the meta device, around a copy of the backbone.

    Raises:
        CheckpointError: if the configuration does not fit the backbone.
        TypeError: if the backbone is of a class that cannot be prompted, or has more than one head.
    """
    structure_of(backbone)
    try:
        return InsVPReference(_on_meta(backbone), num_classes, config)
    except (RuntimeError, ValueError) as error:  # torch's, of sizes that no tensor has
        raise CheckpointError(f"{where}: {error}") from error


def head_of(backbone: nn.Module, num_classes: int) -> nn.Module:
    """The head that a backbone would get for so many classes, on the meta device."""
    module = _on_meta(backbone)
    reset_classifier(module, num_classes)
    return take_head(module)


def _on_meta(backbone: nn.Module) -> nn.Module:
    """A copy without values and hooks."""
    weights: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in backbone.parameters()
    }
    weights |= {id(b): b.to("meta") for b in backbone.buffers()}
    for module in backbone.modules():  # no hooks, which may hold what cannot be copied
        weights |= {id(value): type(value)() for name, value in vars(module).items() if name.endswith("_hooks")}
    return copy.deepcopy(backbone, weights)


def check_shapes(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
    integers: Collection[str] = (),
) -> None:
    """Check that exactly the expected tensors are there, in their shapes, of floating-point numbers.

    Args:
        integers: the keys of those that are of integers.

    Raises:
        CheckpointError: naming up to three tensors that are missing, unexpected, of another shape or of other numbers.
    """
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = [f"{key} is missing: expected shape {shape}" for key, shape in expected.items() if key not in found]
    for key, shape in found.items():
        if key not in expected:
            problems.append(f"found the unexpected {key} of shape {shape}")
        elif shape != expected[key]:
            problems.append(f"{key} has shape {shape}: expected {expected[key]}")
        elif tensors[key].is_floating_point() == (key in integers):
            kind = "integers" if key in integers else "floating-point numbers"
            problems.append(f"{key} has dtype {tensors[key].dtype}: expected {kind}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:3])}{more}")


def assign(model: nn.Module, tensors: Mapping[str, Tensor], saved: torch.dtype) -> None:
    """Make the tensors the model's, in the dtypes of the file, or that of a backbone that is not in ``saved``."""
    weight = next(model.get_submodule("backbone").parameters())
    given = None if weight.dtype == saved else weight.dtype
    # copied: in the file's memory they are not aligned, and some matrix products then round differently
    tensors = {
        key: value.to(weight.device, given if value.is_floating_point() else None, copy=True)
        for key, value in tensors.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)


def backbone_sha256(backbone: nn.Module, dtype: torch.dtype, positions: bool = True) -> str:
    """The SHA-256 of a backbone: names, shapes and fp32 bytes of its state dict, sorted by name, without the head.

    Weights are first rounded to ``dtype``, in which the backbone was when the adapter was saved. So an adapter that was
    trained around a bf16 copy recognizes both the copy and the fp32 original, and one that was trained around the
    original rejects the copy, whose weights differ.

    Args:
        positions: False leaves embeddings of positions out: resampled for other image sizes, their last bits depend on
            the CPU.
    """
    digest, heads = hashlib.sha256(), head_prefixes(backbone)
    for name, tensor in sorted(backbone.state_dict().items()):
        if not name.startswith(heads) and (positions or "pos" not in name):
            tensor = tensor.detach().cpu().resolve_neg()
            tensor = (tensor.to(dtype) if tensor.is_floating_point() else tensor).float()
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def head_prefixes(backbone: nn.Module) -> tuple[str, ...]:
    """How the names of the head's tensors begin; timm's description of a model names its head."""
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
