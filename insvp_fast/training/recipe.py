"""What one training run does: a typed, validated configuration, without any heavy import."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from insvp_fast.errors import TrainingError

__all__ = ["BUILTIN", "CHOICES", "DIGITS", "TRACKERS", "Recipe"]

BUILTIN = "vit_shapes_32"  # the backbone that comes with the package
DIGITS = "digits"  # the data set that comes with scikit-learn
PRECISIONS = ("auto", "bf16", "fp16", "off")
TRACKERS = ("tensorboard", "wandb")
CHOICES = {
    "amp": PRECISIONS,
    "preprocessing": ("timm", "insvp"),
    "protocol": ("paper", "released"),
    "select_on": ("val", "test"),
    "lr_scale": ("none", "linear", "sqrt"),
    "compile": ("off", "prompters", "model"),
    "recompute": ("none", "mlp", "block"),
}
KINDS: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run; the defaults suit the small backbone and the digits.

    Args:
        recipe: the name of the shipped recipe that these settings come from; only recorded.
        backbone: ``vit_shapes_32``, the shipped one, or a Vision Transformer of timm: ``NAME``, ``NAME@FILE``,
            ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER`` or the folder that timm saved, or a file that says its
            architecture.
        checkpoint: a checkpoint file for the backbone: .safetensors, .pth or .npz.
        data: ``digits``, a data set's name, an image folder, a list file, or a reader of timm.
        root: the folder of a named data set.
        preprocessing: ``timm`` as the backbone was trained, or ``insvp`` as the paper's authors prepare images.
        exif_rotation: turn photographs upright, as their EXIF says; TIFF files are always turned as they say.
        protocol: ``paper``, or ``released`` for the splits of the authors' code and its selection on the test images.
        select_on: the split, ``val`` or ``test``, whose accuracy chooses the epoch that is kept.
        retrain: train on the train and val images together, and keep the last epoch.
        epochs: the length of training.
        batch_size: the images of a batch on each device; with ``auto_batch`` fewer, if so many do not fit into memory.
        accumulate: batches of a step.
        lr, probe_lr, weight_decay: AdamW's; the rates of InsVP and of the probe rise, then fall as a cosine.
        lr_scale: multiply the rates by (images of a step / 64), ``linear``, by its root, ``sqrt``, or leave them,
            ``none``.
        warmup: the part of all steps in which the rate rises.
        mixup, cutmix: the alphas of timm's mixing of images, with probability ``mix_prob`` in each batch; 0 is off.
        label_smoothing: the part of the target that all classes share.
        ema: the decay of a moving average of the trained weights, used instead of them; 0 is off.
        amp: ``bf16`` or ``fp16`` for mixed precision, ``off`` for fp32, ``auto`` for bf16 where the hardware has it.
        compile: run ``torch.compile`` on the convolutional ``prompters``, on the whole ``model``, or not, ``off``.
        recompute: what backward computes again to save memory: ``none``, ``mlp`` or ``block``.
        seed: of the split, the weights, the order of the images and all that is random in training.
        prompt_length: L, prompt tokens per block; None for 4 with the shipped backbone, the paper's 9 with others,
            and 16 with ``released``.
        released: adapt as the authors' code does instead of as the paper says.
        specific_kernels: kernel sides of the specific prompter; None for the preset's.
        simam: weigh the input image with SimAM first.
        probe: train a linear probe as well, for comparison.
        workers: processes that load images.
        cache: decode all images once into a memory-mapped file, and augment on the device.
        trackers: ``tensorboard`` and ``wandb``, besides the run's own files.
        save_every, save_steps: epochs, and steps if not 0, between two writings of the state to resume from.
        output: the folder in which a run gets its own folder.

    Raises:
        TrainingError: naming the field, its value and what was expected.
    """

    recipe: str | None = None
    backbone: str = BUILTIN
    checkpoint: str | None = None
    data: str = DIGITS
    root: str | None = None
    preprocessing: str = "timm"
    exif_rotation: bool = True
    protocol: str = "paper"
    select_on: str = "val"
    retrain: bool = False
    epochs: int = 10
    batch_size: int = 32
    auto_batch: bool = False
    accumulate: int = 1
    lr: float = 3e-3
    probe_lr: float = 1e-1
    lr_scale: str = "none"
    weight_decay: float = 1e-2
    warmup: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 0.5
    label_smoothing: float = 0.0
    ema: float = 0.0
    amp: str = "auto"
    compile: str = "off"
    recompute: str = "none"
    seed: int = 0
    prompt_length: int | None = None
    released: bool = False
    specific_kernels: tuple[int, int, int] | None = None
    simam: bool = False
    probe: bool = True
    workers: int = 0
    cache: bool = False
    trackers: tuple[str, ...] = ()
    save_every: int = 1
    save_steps: int = 0
    output: str = "runs"

    def __post_init__(self) -> None:
        for name in ("specific_kernels", "trackers"):
            if isinstance(value := getattr(self, name), list):  # JSON and TOML have no tuples
                object.__setattr__(self, name, tuple(value))
        for field in dataclasses.fields(self):
            kind = str(field.type).removesuffix(" | None")
            if kind in KINDS and not (getattr(self, field.name) is None and kind != field.type):
                self._check(field.name, isinstance(getattr(self, field.name), KINDS[kind]), f"a value of type {kind}")
        for name in ("epochs", "batch_size", "accumulate", "save_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("workers", "save_steps"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "probe_lr"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("weight_decay", "mixup", "cutmix"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name in ("warmup", "label_smoothing", "ema"):
            self._check(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._check("mix_prob", 0 <= self.mix_prob <= 1, "a number in [0, 1]")
        for name, choices in CHOICES.items():
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._check("seed", 0 <= self.seed < 2**32, "an integer from 0 to 2^32-1")
        self._check("prompt_length", self.prompt_length is None or self.prompt_length >= 0, "at least 0")
        kernels = self.specific_kernels
        fits = kernels is None or (len(kernels) == 3 and all(k > 0 and k % 2 for k in kernels))
        self._check("specific_kernels", fits, "three odd positive integers")
        self._check("trackers", set(self.trackers) <= set(TRACKERS), f"some of {', '.join(TRACKERS)}")
        both = self.checkpoint is not None and "@" in self.backbone.partition(":")[0]  # hf-hub:NAME@REVISION
        self._check("backbone", not both, "a name without @FILE where --checkpoint is given")

    @property
    def selects_on(self) -> str | None:
        """The split that chooses the epoch to keep; None for the last epoch."""
        if self.retrain:
            return None
        return "test" if self.protocol == "released" else self.select_on

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise TrainingError(f"--{name.replace('_', '-')} is {getattr(self, name)}: expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; ``Recipe(**values)`` is the inverse."""
        return dataclasses.asdict(self)
