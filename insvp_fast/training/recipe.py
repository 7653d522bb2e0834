"""The settings of a training run: one frozen, validated dataclass, without heavy imports."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from insvp_fast import method_names
from insvp_fast.config import InsVPConfig
from insvp_fast.data.sets import AUGMENTATIONS, DIGITS, PROTOCOLS
from insvp_fast.errors import TrainingError
from insvp_fast.training.setting import (
    BELOW_ONE,
    GROUPS,
    NAMED_VALUES,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SEED,
    at_least,
    one_of,
    setting,
    some_of,
)

__all__ = [
    "BUILTIN_BACKBONE",
    "METHODS",
    "PROMPT_SETTINGS",
    "Recipe",
    "check_names",
    "score_name",
    "setting_names",
]

BUILTIN_BACKBONE = "vit_shapes_32"
METHODS = ("insvp", *method_names.METHODS)
PROMPT_SETTINGS = {field.name: field for field in dataclasses.fields(InsVPConfig)}  # settings of the same names
TYPES: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}

_data, _model, _prompts, _training, _speed, _output = (partial(setting, group) for group in GROUPS)


def _prompt_setting(help: str, metavar: str | None = None) -> Any:
    """A field of the name of a field of ``InsVPConfig``, which knows its values; None for the configuration's own."""
    return _prompts(None, help, metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run; the defaults suit the small built-in backbone and the digits.

    Raises:
        TrainingError: naming the setting, its value and what was expected.
    """

    recipe: str | None = _model(None, "the recipe that these settings come from; only recorded")
    backbone: str = _model(
        BUILTIN_BACKBONE,
        f"{BUILTIN_BACKBONE}, which is part of this package, or a Vision Transformer of timm: NAME, NAME@FILE,"
        " hf-hub:OWNER/NAME, local-dir:FOLDER, a folder saved by timm, or a file of weights that names its"
        " architecture",
        metavar="NAME|PATH",
        brief="name in timm, file or folder",
    )
    checkpoint: str | None = _model(None, "weights for the backbone: .safetensors, .pth or .npz", metavar="FILE")
    img_size: int | None = _model(
        None,
        "side of the images that the backbone sees, a multiple of its patches'; position embeddings are resampled"
        " (default: as in its pretraining)",
        at_least(1),
    )
    data: str = _data(
        DIGITS,
        "digits, the name of a data set, an image folder, a list file, or a timm reader such as hfds/NAME",
        metavar="NAME|PATH",
        brief="data set, image folder, list file or timm reader",
    )
    root: str | None = _data(
        None,
        "folder of a named data set, or of the images that a list file names",
        metavar="FOLDER",
        brief="folder of a named data set, or of the images in a list file",
    )
    preprocessing: str = _data(
        "timm",
        "timm: resize, crop and normalize as in the backbone's pretraining; insvp: as the paper's authors do, with the"
        " mean and standard deviation of ImageNet",
        one_of("timm", "insvp"),
    )
    augmentation: str | None = _data(
        None,
        "timm: random area, aspect ratio and colors; insvp: random crops of images of 8/7 of the size, as the paper's"
        " authors do; crop: random crops of images as evaluation resizes them; none (default: none for the digits and"
        " VTAB, else insvp)",
        one_of(*AUGMENTATIONS),
        brief="random changes of images (default: insvp; digits, VTAB: none)",
    )
    hflip: float | None = _data(
        None,
        "probability that a training image is flipped, left to right; 0 where a flip changes the class, as with letters"
        " (default: 0.5, without augmentation 0)",
        PROBABILITY,
    )
    exif_rotation: bool = _data(True, "turn photographs upright as their EXIF data says; TIFF files are always turned")
    protocol: str = _data(
        "paper",
        "splits of the paper, or those of the authors' released code, which also selects the epoch on the test images",
        one_of(*PROTOCOLS),
    )
    select_on: str = _training("val", "split whose metric selects the epoch to keep", one_of("val", "test"))
    metric: str | None = _training(
        None,
        "what selects the epoch to keep: top-1 accuracy, its mean over the classes, macro F1, or for several labels per"
        " image the mean average precision (default: top1, or map for several labels)",
        one_of("top1", "mean_per_class", "f1", "map"),
    )
    patience: int = _training(
        0,
        "stop after this many epochs without a better `metric`; 0 never stops early; the learning rates are those of"
        " all `epochs` either way",
        at_least(0),
    )
    retrain: bool = _training(False, "train on the train and val images together, and keep the last epoch")
    epochs: int = _training(10, "number of epochs", at_least(1), brief="number of epochs")
    batch_size: int = _training(
        32,
        "images per batch and device; with `auto_batch`, the upper limit",
        at_least(1),
        brief="images per batch and device",
    )
    auto_batch: bool = _training(False, "reduce the batch size until a batch fits into memory")
    accumulate: int = _training(1, "batches per optimizer step, to accumulate gradients", at_least(1))
    lr: float = _training(
        3e-3, "peak learning rate: linear warm-up, then cosine decay to 0", POSITIVE, brief="peak learning rate"
    )
    lr_scale: str = _training(
        "none",
        "multiply the learning rates by (images per step / 64), by its square root, or by nothing",
        one_of("none", "linear", "sqrt"),
    )
    head_init: str = _training(
        "auto",
        "random: the head that timm draws; probe: a linear probe on the features before training, fitted to"
        " convergence, which counts as epoch 0 when the epoch to keep is selected; auto: probe, but random with"
        " `released` and `init_from` and where the head is more than one linear layer",
        one_of("auto", "random", "probe"),
    )
    weight_decay: float = _training(1e-2, "weight decay of AdamW", NOT_NEGATIVE, brief="weight decay of AdamW")
    clip_grad: float | None = _training(None, "limit of the norm of a step's gradients (default: none)", POSITIVE)
    warmup: float = _training(0.1, "fraction of all steps in which the learning rate rises", BELOW_ONE)
    mixup: float = _training(0.0, "alpha of mixup; 0 switches it off", NOT_NEGATIVE)
    cutmix: float = _training(0.0, "alpha of CutMix; 0 switches it off", NOT_NEGATIVE)
    mix_prob: float = _training(0.5, "probability that a batch is mixed by `mixup` or `cutmix`", PROBABILITY)
    label_smoothing: float = _training(0.0, "fraction of the target that is spread over all classes", BELOW_ONE)
    class_weights: str = _training(
        "none",
        "weights of the classes in the loss; auto: N / (C n) for each of C classes, with n of the N images, which is 1"
        " averaged over the images; for several labels per image, N labels are counted, and positive terms weighted",
        one_of("none", "auto"),
    )
    sampling: str = _training(
        "shuffle",
        "shuffle: an epoch has every image once; balanced: as many images, equally many of every class",
        one_of("shuffle", "balanced"),
    )
    ema: float = _training(
        0.0,
        "decay of a moving average of the trained weights, which is tested and saved instead; 0 switches it off",
        BELOW_ONE,
    )
    amp: str = _speed(
        "auto",
        "bf16 or fp16: mixed precision; off: fp32; auto: bf16 where the hardware supports it, fp16 on other GPUs with"
        " tensor cores, else off",
        one_of("auto", "bf16", "fp16", "off"),
        brief="mixed precision; auto: what the hardware has",
    )
    compile: str = _speed(
        "off",
        "apply torch.compile to the convolutional prompters, to the whole model, or to nothing",
        one_of("off", "prompters", "model"),
    )
    recompute: str = _speed(
        "none",
        "recompute in backward, to save memory: the hidden layers of the MLPs, whole blocks, or nothing",
        one_of("none", "mlp", "block"),
    )
    seed: int = _training(
        0, "random seed of weights, order of images, augmentation and dropout", SEED, brief="random seed"
    )
    split_seed: int = _data(
        0, "random seed of the splits where there are no official ones; `seed` leaves them as they are", SEED
    )
    method: str = _model(
        "insvp",
        "what is trained: insvp, or one of the methods to compare it with, see `insvp methods`",
        one_of(*METHODS),
        metavar="NAME",
        brief="what is trained, see `insvp methods`",
    )
    method_options: tuple[str, ...] = _model(
        (), "settings of another method than InsVP, such as rank=8", NAMED_VALUES, metavar="NAME=VALUE"
    )
    init_from: str | None = _model(
        None,
        "begin with the weights of an adapter: its folder, that of a run, or its name on the Hub; a head of other"
        " classes is drawn anew",
        metavar="NAME|PATH",
    )
    released: bool = _model(False, "train the model of the authors' released code instead of the paper's")
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
    prompted_blocks: int | None = _prompts(
        None, "number of blocks that get prompts, from the first (default: all)", at_least(0)
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
    specific_dropout: float | None = _prompt_setting("dropout in the specific prompter (default: 0; 0.1 if `released`)")
    simam: bool | None = _prompt_setting("weight the input image by SimAM (default: off)")
    probe: bool = _training(
        True,
        "fit a linear probe as well, for comparison: logistic regression to convergence",
        brief="fit a linear probe as well, for comparison",
    )
    workers: int = _speed(
        0,
        "processes that load images; 0 loads them in the training process",
        at_least(0),
        brief="processes that load images",
    )
    cache: bool = _speed(
        False, "decode all images once, into a memory-mapped file; no number changes", brief="decode all images once"
    )
    trackers: tuple[str, ...] = _output(
        (), "experiment trackers to log to, besides the files of the run", some_of("tensorboard", "wandb")
    )
    save_every: int = _output(1, "epochs between two saves of the training state", at_least(1))
    save_steps: int = _output(0, "steps between two saves within an epoch; 0 for none", at_least(0))
    pictures: bool = _output(True, "draw curve.png and prompts.png")
    output: str = _output(
        "runs",
        "folder in which each run makes its own folder",
        metavar="FOLDER",
        brief="folder in which each run makes its own",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_field(field)
        if self.method != "insvp":
            for name in ("released", *PROMPT_SETTINGS):
                default = getattr(type(self), name)
                expected = f"none with the method {self.method}, which has `method_options`"
                self._check(name, getattr(self, name) == default, expected)
            self._check("compile", self.compile != "prompters", f"off or model with the method {self.method}")
            self._check("init_from", self.init_from is None, f"none with the method {self.method}")
        self._check("method_options", self.method != "insvp" or not self.method_options, "none with the method insvp")
        alone = self.batch_size == 1 and (self.mixup or self.cutmix)
        self._check("batch_size", not alone, "at least 2 with `mixup` or `cutmix`, which mix two images")
        both = self.checkpoint is not None and "@" in self.backbone.partition(":")[0]  # hf-hub:NAME@REVISION is fine
        self._check("backbone", not both, "a name without @FILE where `checkpoint` is given")
        self._check("patience", not (self.patience and self.retrain), "0 with `retrain`, which keeps the last epoch")

    @property
    def selection_split(self) -> str | None:
        """The split whose metric selects the epoch to keep; None for the last epoch."""
        if self.retrain:
            return None
        return "test" if self.protocol == "released" else self.select_on

    def check_labels(self, multi_label: bool) -> None:
        """Check that the settings are defined for images with one label, or with several.

        Raises:
            TrainingError: naming the setting that is not.
        """
        self.metric_for(multi_label)
        balances = self.sampling == "balanced"
        self._check("sampling", not (multi_label and balances), "shuffle with several labels per image")

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
            fits = isinstance(value, TYPES[type_name]) and (type_name == "bool" or not isinstance(value, bool))
            self._check(name, fits, f"a value of type {type_name}")
            self._check(name, value != "", "a name or a path")  # of an empty one pathlib makes the current folder
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
            value = getattr(self, name)
            raise TrainingError(f"`{name}` is {repr(value) if value == '' else value}: expected {expected}")


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
