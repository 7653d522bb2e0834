"""The settings of a training run: one frozen, validated dataclass, without heavy imports."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from insvp_fast import method_names
from insvp_fast.config import InsVPConfig
from insvp_fast.data.sets import AUGMENTATIONS, DIGITS, PROTOCOLS
from insvp_fast.errors import TrainingError

__all__ = [
    "BUILTIN_BACKBONE",
    "METHODS",
    "PROMPT_SETTINGS",
    "Limits",
    "Recipe",
    "check_names",
    "score_name",
    "setting_names",
]

BUILTIN_BACKBONE = "vit_shapes_32"
METHODS = ("insvp", *method_names.METHODS)
PROMPT_SETTINGS = {field.name: field for field in dataclasses.fields(InsVPConfig)}  # settings of the same names
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
NAMED_VALUES = Limits(
    lambda values: all(name.isidentifier() and value for name, _, value in (v.partition("=") for v in values)),
    "NAME=VALUE, such as rank=8",
)


def _setting(default: Any, help: str, limits: Limits | None = None, metavar: str | None = None) -> Any:
    """A field with metadata for the command line and for checks; ``metavar`` stands for the value in the help."""
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits, "metavar": metavar})


def _prompt_setting(help: str, metavar: str | None = None) -> Any:
    """A field of the name of a field of ``InsVPConfig``, which knows its values; None for the configuration's own."""
    return _setting(None, help, metavar=metavar)


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
    img_size: int | None = _setting(
        None,
        "side of the images that the backbone sees, a multiple of its patches'; position embeddings are resampled"
        " (default: as in its pretraining)",
        _at_least(1),
    )
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
    augmentation: str | None = _setting(
        None,
        "timm: random area, aspect ratio and colors; insvp: random crops of images of 8/7 of the size, as the paper's"
        " authors do; crop: random crops of images as evaluation resizes them; none (default: none for the digits and"
        " VTAB, else insvp)",
        _one_of(*AUGMENTATIONS),
    )
    hflip: float | None = _setting(
        None,
        "probability that a training image is flipped, left to right; 0 where a flip changes the class, as with letters"
        " (default: 0.5, without augmentation 0)",
        PROBABILITY,
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
    metric: str | None = _setting(
        None,
        "what selects the epoch to keep: top-1 accuracy, its mean over the classes, macro F1, or for several labels per"
        " image the mean average precision (default: top1, or map for several labels)",
        _one_of("top1", "mean_per_class", "f1", "map"),
    )
    patience: int = _setting(
        0,
        "stop after this many epochs without a better `metric`; 0 never stops early; the learning rates are those of"
        " all `epochs` either way",
        _at_least(0),
    )
    retrain: bool = _setting(False, "train on the train and val images together, and keep the last epoch")
    epochs: int = _setting(10, "number of epochs", _at_least(1))
    batch_size: int = _setting(32, "images per batch and device; with `auto_batch`, the upper limit", _at_least(1))
    auto_batch: bool = _setting(False, "reduce the batch size until a batch fits into memory")
    accumulate: int = _setting(1, "batches per optimizer step, to accumulate gradients", _at_least(1))
    lr: float = _setting(3e-3, "peak learning rate: linear warm-up, then cosine decay to 0", POSITIVE)
    lr_scale: str = _setting(
        "none",
        "multiply the learning rates by (images per step / 64), by its square root, or by nothing",
        _one_of("none", "linear", "sqrt"),
    )
    head_init: str = _setting(
        "auto",
        "random: the head that timm draws; probe: a linear probe on the features before training, fitted to"
        " convergence, which counts as epoch 0 when the epoch to keep is selected; auto: probe, but random with"
        " `released` and `init_from` and where the head is more than one linear layer",
        _one_of("auto", "random", "probe"),
    )
    weight_decay: float = _setting(1e-2, "weight decay of AdamW", NOT_NEGATIVE)
    warmup: float = _setting(0.1, "fraction of all steps in which the learning rate rises", BELOW_ONE)
    mixup: float = _setting(0.0, "alpha of mixup; 0 switches it off", NOT_NEGATIVE)
    cutmix: float = _setting(0.0, "alpha of CutMix; 0 switches it off", NOT_NEGATIVE)
    mix_prob: float = _setting(0.5, "probability that a batch is mixed by `mixup` or `cutmix`", PROBABILITY)
    label_smoothing: float = _setting(0.0, "fraction of the target that is spread over all classes", BELOW_ONE)
    class_weights: str = _setting(
        "none",
        "weights of the classes in the loss; auto: N / (C n) for each of C classes, with n of the N images, which is 1"
        " in the mean over the images; for several labels per image, N labels are counted, and positive terms weighted",
        _one_of("none", "auto"),
    )
    sampling: str = _setting(
        "shuffle",
        "shuffle: an epoch has every image once; balanced: as many images, equally many of every class",
        _one_of("shuffle", "balanced"),
    )
    ema: float = _setting(
        0.0,
        "decay of a moving average of the trained weights, which is tested and saved instead; 0 switches it off",
        BELOW_ONE,
    )
    amp: str = _setting(
        "auto",
        "bf16 or fp16: mixed precision; off: fp32; auto: bf16 where the hardware supports it, fp16 on other GPUs with"
        " tensor cores, else off",
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
    seed: int = _setting(0, "random seed of weights, order of images, augmentation and dropout", SEED)
    split_seed: int = _setting(
        0, "random seed of the splits where there are no official ones; `seed` leaves them as they are", SEED
    )
    method: str = _setting(
        "insvp", "what is trained: InsVP, or one of the methods to compare it with", _one_of(*METHODS)
    )
    method_options: tuple[str, ...] = _setting(
        (), "settings of another method than InsVP, such as rank=8", NAMED_VALUES, metavar="NAME=VALUE"
    )
    init_from: str | None = _setting(
        None,
        "begin with the weights of an adapter: its folder, that of a run, or its name on the Hub; a head of other"
        " classes is drawn anew",
        metavar="NAME|PATH",
    )
    released: bool = _setting(False, "train the model of the authors' released code instead of the paper's")
    prompt_length: int | None = _prompt_setting(
        f"prompt tokens per block, L (default: 4 with {BUILTIN_BACKBONE}, 9 as in the paper with others, 16 with"
        " `released`)"
    )
    global_prompt: bool | None = _prompt_setting("the global prompt, p_g (default: on)")
    patch_prompt: bool | None = _prompt_setting("the patch prompt, p_l (default: on)")
    common_prompt: bool | None = _prompt_setting("the common prompts, c_j (default: on)")
    specific_prompt: bool | None = _prompt_setting("the specific prompt, p_s (default: on)")
    image_weights: tuple[float, ...] | None = _prompt_setting(
        "weights of global and patch prompt, or one number beta_I for (beta_I, 1 - beta_I) (default: 0.7; 2 1 with"
        " `released`)"
    )
    feature_weights: tuple[float, ...] | None = _prompt_setting(
        "weights of common and specific prompt, or one number beta_F for (beta_F, 1 - beta_F) (default: 0.5; 1 1 with"
        " `released`)"
    )
    prompted_blocks: int | None = _setting(
        None, "number of blocks that get prompts, from the first (default: all)", _at_least(0)
    )
    carry_prompts: bool | None = _prompt_setting(
        "keep the outputs of the last prompts as tokens of the blocks without prompts (default: on with `released`)"
    )
    patch_hidden: int | None = _prompt_setting("hidden width of the patch prompter (default: 16)")
    global_hidden: int | None = _prompt_setting("hidden channels of the global prompter (default: 6)")
    global_kernels: tuple[int, int] | None = _prompt_setting(
        "kernel sizes of the global prompter (default: 3 3; 11 25 with `released`)"
    )
    global_dilations: tuple[int, int] | None = _prompt_setting(
        "dilations of the global prompter (default: 5 12; 1 1 with `released`)"
    )
    specific_kernels: tuple[int, int, int] | None = _prompt_setting(
        "kernel sizes of the specific prompter (default: 7 9 3)"
    )
    specific_input: str | None = _prompt_setting(
        "what the specific prompter reads: image, or prompted, the image with its prompt (default: image; prompted"
        " with `released`)",
        metavar="{image,prompted}",
    )
    global_dropout: float | None = _prompt_setting("dropout on the global prompt (default: 0.1)")
    patch_dropout: float | None = _prompt_setting("dropout on the patch prompt (default: 0; 0.1 with `released`)")
    common_dropout: float | None = _prompt_setting("dropout on the common prompts (default: 0; 0.1 with `released`)")
    specific_dropout: float | None = _prompt_setting("dropout on the specific prompt (default: 0; 0.1 with `released`)")
    simam: bool | None = _prompt_setting("weight the input image by SimAM (default: off)")
    probe: bool = _setting(True, "fit a linear probe as well, for comparison: logistic regression to convergence")
    workers: int = _setting(0, "processes that load images; 0 loads them in the training process", _at_least(0))
    cache: bool = _setting(False, "decode all images once, into a memory-mapped file; no number changes")
    trackers: tuple[str, ...] = _setting(
        (), "experiment trackers to log to, besides the files of the run", _some_of("tensorboard", "wandb")
    )
    save_every: int = _setting(1, "epochs between two saves of the training state", _at_least(1))
    save_steps: int = _setting(0, "steps between two saves within an epoch; 0 for none", _at_least(0))
    output: str = _setting("runs", "folder in which each run makes its own folder", metavar="FOLDER")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_field(field)
        if self.method != "insvp":
            for name in ("released", *PROMPT_SETTINGS):
                default = getattr(type(self), name)
                expected = f"none with the method {self.method}, which has `method_options`"
                self._check(name, getattr(self, name) == default, expected)
        self._check("method_options", self.method != "insvp" or not self.method_options, "none with the method insvp")
        both = self.checkpoint is not None and "@" in self.backbone.partition(":")[0]  # hf-hub:NAME@REVISION is fine
        self._check("backbone", not both, "a name without @FILE where `checkpoint` is given")
        self._check("patience", not (self.patience and self.retrain), "0 with `retrain`, which keeps the last epoch")

    @property
    def selection_split(self) -> str | None:
        """The split whose accuracy selects the epoch to keep; None for the last epoch."""
        if self.retrain:
            return None
        return "test" if self.protocol == "released" else self.select_on

    def metric_for(self, multi_label: bool) -> str:
        """The metric that selects the epoch to keep.

        Raises:
            TrainingError: if ``metric`` is not defined for this number of labels per image.
        """
        metric = self.metric or ("map" if multi_label else "top1")
        defined = ("f1", "map") if multi_label else ("top1", "mean_per_class", "f1")
        labels = "with several labels per image" if multi_label else "with one label per image"
        self._check("metric", metric in defined, f"one of {', '.join(defined)} {labels}")
        return metric

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
        elif isinstance(value, (list, tuple)):
            value = tuple(value)  # JSON and TOML have no tuples
            value = value[0] if "float" in type_name and len(value) == 1 else value
            object.__setattr__(self, name, value)
        elif name not in PROMPT_SETTINGS:
            self._check(name, False, limits.expected)
        if limits is not None:
            self._check(name, limits.accepts(value), limits.expected)
        if name in PROMPT_SETTINGS:
            metadata = PROMPT_SETTINGS[name].metadata
            self._check(name, metadata["is_valid"](value), metadata["expected"])

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


def score_name(metric: str | None) -> str:
    """What a value of ``Recipe.metric`` is called in the records of a run, after the split: ``val_accuracy``."""
    return "accuracy" if metric in ("top1", None) else metric


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
