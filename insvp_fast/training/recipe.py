"""What one training run does: a typed, validated configuration, without any heavy import."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["BUILTIN", "DIGITS", "CommandError", "Recipe"]

BUILTIN = "vit_shapes_32"  # the backbone that comes with the package
DIGITS = "digits"  # the data set that comes with scikit-learn
PRECISIONS = ("off", "bf16", "fp16")


class CommandError(ValueError):
    """Something that the user can put right; the command line prints it in one line."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run; the defaults suit the small backbone and the digits.

    Args:
        backbone: ``vit_shapes_32``, the shipped one, or a timm Vision Transformer, as ``NAME`` or ``NAME@FILE``.
        checkpoint: a checkpoint file for the backbone: .safetensors, .pth or .npz.
        data: ``digits``, or an image folder with train and val and/or test.
        epochs, batch_size: the length of training, and the images of a step on each device.
        lr, probe_lr, weight_decay: AdamW's; the rates of InsVP and of the probe rise, then fall as a cosine.
        warmup: the part of all steps in which the rate rises.
        amp: ``bf16`` or ``fp16`` for mixed precision, ``off`` for fp32.
        seed: of the split, the weights and the order of the images.
        prompt_length: L, prompt tokens per block; None for 4 with the shipped backbone, the paper's 9 with others,
            and 16 with ``released``.
        released: adapt as the authors' code does instead of as the paper says.
        probe: train a linear probe as well, for comparison.
        workers: processes that load images.
        output: the folder in which a run gets its own folder.

    Raises:
        CommandError: naming the field, its value and what was expected.
    """

    backbone: str = BUILTIN
    checkpoint: str | None = None
    data: str = DIGITS
    epochs: int = 10
    batch_size: int = 32
    lr: float = 3e-3
    probe_lr: float = 1e-1
    weight_decay: float = 1e-2
    warmup: float = 0.1
    amp: str = "off"
    seed: int = 0
    prompt_length: int | None = None
    released: bool = False
    probe: bool = True
    workers: int = 0
    output: str = "runs"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "probe_lr"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        self._check("warmup", 0 <= self.warmup < 1, "a number in [0, 1)")
        self._check("amp", self.amp in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._check("seed", 0 <= self.seed < 2**32, "an integer from 0 to 2^32-1")
        self._check("prompt_length", self.prompt_length is None or self.prompt_length >= 0, "at least 0")
        self._check("workers", self.workers >= 0, "at least 0")
        both = self.checkpoint is not None and "@" in self.backbone
        self._check("backbone", not both, "a name without @FILE where --checkpoint is given")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise CommandError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; ``Recipe(**values)`` is the inverse."""
        return dataclasses.asdict(self)
