"""The settings of a training run: one frozen, validated dataclass, without heavy imports."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from insvp_fast.data.sets import DIGITS, PROTOCOLS
from insvp_fast.errors import TrainingError

__all__ = ["BUILTIN_BACKBONE", "Limits", "Recipe", "check_names", "setting_names"]

BUILTIN_BACKBONE = "vit_shapes_32"
TYPES: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


class Limits(NamedTuple):
    """The values that a setting may have: ``expected`` says in a message which ``accepts`` accepts."""

    accepts: Callable[[Any], bool]
    expected: str
    choices: tuple[str, ...] = ()


def _one_of(*choices: str) -> Limits:
    return Limits(lambda value: value in choices, f"one of {', '.join(choices)}", choices)


def _some_of(*choices: str) -> Limits:
    return Limits(lambda values: all(value in choices for value in values), f"some of {', '.join(choices)}", choices)


def _at_least(least: int) -> Limits:
    return Limits(lambda value: value >= least, f"at least {least}")


POSITIVE = Limits(lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE = Limits(lambda value: 0 <= value < math.inf, "a number of at least 0")
BELOW_ONE = Limits(lambda value: 0 <= value < 1, "a number in [0, 1)")
PROBABILITY = Limits(lambda value: 0 <= value <= 1, "a number in [0, 1]")
SEED = Limits(lambda value: 0 <= value < 2**32, "an integer from 0 to 2^32-1")
THREE_ODD = Limits(
    lambda sides: len(sides) == 3 and all(isinstance(side, int) and side > 0 and side % 2 for side in sides),
    "three odd positive integers",
)


def _setting(default: Any, help: str, limits: Limits | None = None, metavar: str | None = None) -> Any:
    """A field with metadata for the command line and for checks; ``metavar`` stands for the value in the help."""
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run; the defaults suit the small built-in backbone and the digits.

    Raises:
        TrainingError: naming the setting, its value and what was expected.
    """

    recipe: str | None = _setting(None, "the recipe that these settings come from; only recorded")
    backbone: str = _setting(
        BUILTIN_BACKBONE,
        f"{BUILTIN_BACKBONE}, which is part of this package, or a Vision Transformer of timm: NAME, NAME@FILE,"
        " hf-hub:OWNER/NAME, local-dir:FOLDER, a folder saved by timm, or a file of weights that names its"
        " architecture",
        metavar="NAME|PATH",
    )
    checkpoint: str | None = _setting(None, "weights for the backbone: .safetensors, .pth or .npz", metavar="FILE")
    data: str = _setting(
        DIGITS,
        "digits, the name of a data set, an image folder, a list file, or a timm reader such as hfds/NAME",
        metavar="NAME|PATH",
    )
    root: str | None = _setting(
        None, "folder of a named data set, or of the images that a list file names", metavar="FOLDER"
    )
    preprocessing: str = _setting(
        "timm",
        "timm: resize, crop and normalize as in the backbone's pretraining; insvp: as the paper's authors do, with the"
        " mean and standard deviation of ImageNet",
        _one_of("timm", "insvp"),
    )
    exif_rotation: bool = _setting(
        True, "turn photographs upright as their EXIF data says; TIFF files are always turned"
    )
    protocol: str = _setting(
        "paper",
        "splits of the paper, or those of the authors' released code, which also selects the epoch on the test images",
        _one_of(*PROTOCOLS),
    )
    select_on: str = _setting("val", "split whose accuracy selects the epoch to keep", _one_of("val", "test"))
    retrain: bool = _setting(False, "train on the train and val images together, and keep the last epoch")
    epochs: int = _setting(10, "number of epochs", _at_least(1))
    batch_size: int = _setting(32, "images per batch and device; with `auto_batch`, the upper limit", _at_least(1))
    auto_batch: bool = _setting(False, "reduce the batch size until a batch fits into memory")
    accumulate: int = _setting(1, "batches per optimizer step, to accumulate gradients", _at_least(1))
    lr: float = _setting(3e-3, "peak learning rate of InsVP: linear warm-up, then cosine decay to 0", POSITIVE)
    probe_lr: float = _setting(1e-1, "peak learning rate of the linear probe", POSITIVE)
    lr_scale: str = _setting(
        "none",
        "multiply the learning rates by (images per step / 64), by its square root, or by nothing",
        _one_of("none", "linear", "sqrt"),
    )
    head_init: str = _setting(
        "random",
        "random: the head that timm draws; probe: a linear probe on the features before training, fitted to"
        " convergence, which counts as epoch 0 when the epoch to keep is selected",
        _one_of("random", "probe"),
    )
    weight_decay: float = _setting(1e-2, "weight decay of AdamW", NOT_NEGATIVE)
    warmup: float = _setting(0.1, "fraction of all steps in which the learning rate rises", BELOW_ONE)
    mixup: float = _setting(0.0, "alpha of mixup; 0 switches it off", NOT_NEGATIVE)
    cutmix: float = _setting(0.0, "alpha of CutMix; 0 switches it off", NOT_NEGATIVE)
    mix_prob: float = _setting(0.5, "probability that a batch is mixed by `mixup` or `cutmix`", PROBABILITY)
    label_smoothing: float = _setting(0.0, "fraction of the target that is spread over all classes", BELOW_ONE)
    ema: float = _setting(
        0.0,
        "decay of a moving average of the trained weights, which is tested and saved instead; 0 switches it off",
        BELOW_ONE,
    )
    amp: str = _setting(
        "auto",
        "bf16 or fp16: mixed precision; off: fp32; auto: bf16 where the hardware supports it",
        _one_of("auto", "bf16", "fp16", "off"),
    )
    compile: str = _setting(
        "off",
        "apply torch.compile to the convolutional prompters, to the whole model, or to nothing",
        _one_of("off", "prompters", "model"),
    )
    recompute: str = _setting(
        "none",
        "recompute in backward, to save memory: the hidden layers of the MLPs, whole blocks, or nothing",
        _one_of("none", "mlp", "block"),
    )
    seed: int = _setting(0, "random seed of splits, weights, order of images, augmentation and dropout", SEED)
    prompt_length: int | None = _setting(
        None,
        f"prompt tokens per block, L (default: 4 with {BUILTIN_BACKBONE}, 9 as in the paper with others, 16 with"
        " `released`)",
        _at_least(0),
    )
    released: bool = _setting(False, "train the model of the authors' released code instead of the paper's")
    specific_kernels: tuple[int, int, int] | None = _setting(
        None, "kernel sizes of the specific prompter (default: those of the paper or of the released code)", THREE_ODD
    )
    simam: bool = _setting(False, "weight the input image by SimAM")
    probe: bool = _setting(True, "train a linear probe as well, for comparison")
    workers: int = _setting(0, "processes that load images; 0 loads them in the training process", _at_least(0))
    cache: bool = _setting(False, "decode all images once into a memory-mapped file, and augment on the device")
    trackers: tuple[str, ...] = _setting(
        (), "experiment trackers to log to, besides the files of the run", _some_of("tensorboard", "wandb")
    )
    save_every: int = _setting(1, "epochs between two saves of the training state", _at_least(1))
    save_steps: int = _setting(0, "steps between two saves within an epoch; 0 for none", _at_least(0))
    output: str = _setting("runs", "folder in which each run makes its own folder", metavar="FOLDER")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_field(field)
        both = self.checkpoint is not None and "@" in self.backbone.partition(":")[0]  # hf-hub:NAME@REVISION is fine
        self._check("backbone", not both, "a name without @FILE where `checkpoint` is given")

    @property
    def selection_split(self) -> str | None:
        """The split whose accuracy selects the epoch to keep; None for the last epoch."""
        if self.retrain:
            return None
        return "test" if self.protocol == "released" else self.select_on

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON; ``Recipe(**values)`` is the inverse."""
        return dataclasses.asdict(self)

    def _check_field(self, field: dataclasses.Field) -> None:
        name, value = field.name, getattr(self, field.name)
        type_name, limits = str(field.type).removesuffix(" | None"), field.metadata["limits"]
        if value is None and type_name != field.type:
            return
        if type_name in TYPES:
            self._check(name, isinstance(value, TYPES[type_name]), f"a value of type {type_name}")
        else:
            self._check(name, isinstance(value, (list, tuple)), limits.expected)
            object.__setattr__(self, name, value := tuple(value))  # JSON and TOML have no tuples
        if limits is not None:
            self._check(name, limits.accepts(value), limits.expected)

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise TrainingError(f"`{name}` is {getattr(self, name)}: expected {expected}")


def _add_arguments(docstring: str | None) -> str:
    """The docstring of ``Recipe`` with the help of each field, for ``help`` and API docs."""
    # cleaned, as Python itself does from 3.13 on
    summary, raises, rest = inspect.cleandoc(docstring or "").partition("Raises:")
    indent = " " * 4
    arguments = [f"{field.name}: {field.metadata['help'].replace('`', '``')}." for field in dataclasses.fields(Recipe)]
    wrapped = [
        textwrap.fill(text, 120, initial_indent=indent, subsequent_indent=2 * indent, break_on_hyphens=False)
        for text in arguments
    ]
    return "\n".join([f"{summary}Args:", *wrapped, "", f"{raises}{rest}"])


Recipe.__doc__ = _add_arguments(Recipe.__doc__)


def setting_names() -> list[str]:
    """The names of all settings: of all fields but ``recipe``, which says where they come from."""
    return [field.name for field in dataclasses.fields(Recipe) if field.name != "recipe"]


def check_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a file, if all their names are settings; ``where`` begins the message of an error.

    Raises:
        TrainingError: for a name that is no setting.
    """
    names = setting_names()
    for name in values:
        if name not in names:
            raise TrainingError(f"{where}: {name} is no setting; expected some of {', '.join(names)}")
    return dict(values)
