"""Building backbones with their weights, from a name of timm, a repository of the Hub, a folder or a file.

Where the weights came from is written into ``pretrained_cfg``, timm's description of a model, for adapters to record.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from timm import create_model, get_pretrained_cfg, is_model
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models import adapt_input_conv, get_model_args
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from insvp_fast.checkpoints.files import INDEX, read_metadata, read_torch, require_hub
from insvp_fast.checkpoints.state_dict import head_prefixes
from insvp_fast.checkpoints.weights import read_backbone_weights
from insvp_fast.errors import CheckpointError, warn
from insvp_fast.timm_models import PREFIX, warn_of_drop_rates

__all__ = [
    "create_backbone",
    "create_frozen",
    "difference",
    "hub_id",
    "image_size",
    "is_name",
    "is_shipped",
    "require_architecture_only",
    "save_backbone",
    "settings_of",
    "shipped_backbone",
    "source_of",
    "unlike_timm",
    "weights_report",
]

HUB, FOLDER = ("hf-hub:", "hf_hub:"), "local-dir:"  # timm's prefixes
ASSETS = files("insvp_fast") / "assets"
WEIGHTS = (".safetensors", ".bin", ".pth", ".npz")
RUNTIME_ARGUMENTS = ("checkpoint_path", "cache_dir", "pretrained", "scriptable", "exportable", "no_jit")
DROPPING = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices)
PLAIN = (bool, int, float, str, tuple, type(None))
# attributes that change no feature of an image: of the head, the first weights, the computation, and sizes of images
INCIDENTAL = (
    *("num_classes", "head_hidden_size"),
    *("weight_init_mode", "init_values"),
    *("training", "grad_checkpointing", "fused_attn"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "flatten", "target_shift_size"),
)
TRAIN_OPTIONS = {"img_size": "img_size", "gp": "global_pool"}  # options of timm's train.py, and the arguments they set


def create_backbone(
    source: str, pretrained: bool = True, checkpoint: str | Path | None = None, **arguments: Any
) -> nn.Module:
    """Build a model of timm with its weights.

    No code in a file is run: of a pickle, only tensors and plain values are read.

    Args:
        source: ``vit_shapes_32``, which is shipped; a name of timm; ``hf-hub:OWNER/NAME``; a folder that timm saved,
            with config.json and weights, also as ``local-dir:FOLDER``; ``NAME@FILE``, a name of timm and a file of
            weights; or a file that names its architecture: a checkpoint of timm's train.py, or safetensors with
            ``architecture`` in its metadata.
        pretrained: False for random weights, without looking for any; the shipped backbone always has its own.
        checkpoint: a file whose weights are used instead: .safetensors, the .safetensors.index.json of several, .npz,
            or of ``torch.save``, in timm's names or others' (``weights_report`` says whose, and what was left out).
        arguments: for ``timm.create_model``; ``img_size`` resamples the position embeddings, and ``in_chans`` repeats
            or sums the channels of the first convolution.

    Raises:
        CheckpointError: if there is no such model, or its weights cannot be found, read or loaded.
    """
    name, file, own = _parse(source)
    file, arguments = Path(checkpoint) if checkpoint else file, own | arguments
    if file is not None and not os.path.isfile(file):
        raise CheckpointError(f"{file}: there is no such file")
    backbone = _build(name, pretrained and file is None, arguments)
    if file is not None and pretrained:
        _load(backbone, file)
        record_file(backbone, file)
    if size := arguments.get("img_size"):  # timm leaves that of the pretraining
        channels = _cfg(backbone).get("input_size", (3,))[0]
        _record(backbone, input_size=(channels, *((size, size) if isinstance(size, int) else size)))
    return backbone


def create_frozen(source: str, pretrained: bool = True, **arguments: Any) -> nn.Module:
    """``create_backbone`` of what gets frozen."""
    warn_of_drop_rates(source, arguments)
    return create_backbone(source, pretrained, **arguments)


def shipped_backbone(name: str, **arguments: Any) -> VisionTransformer:
    """A backbone of the package: ``vit_shapes_32``, 32x32 pixels, D = 192, pretrained on drawn shapes and textures."""
    facts, wanted = json.loads((ASSETS / f"{name}.json").read_text()), arguments.pop("img_size", None)
    backbone = VisionTransformer(**facts["architecture"] | arguments)
    state, channels = load((ASSETS / f"{name}.safetensors").read_bytes()), arguments.get("in_chans", 3)
    pixels = "patch_embed.proj.weight"
    backbone.load_state_dict(state | {pixels: adapt_input_conv(channels, state[pixels])})  # fp16 in the file
    if wanted:
        backbone.set_input_size((wanted, wanted) if isinstance(wanted, int) else tuple(wanted))
    backbone._model_args = arguments  # where timm keeps those of its own builders, and get_model_args finds them
    size = facts["architecture"]["img_size"]
    cfg = {"architecture": name, "input_size": (channels, size, size), "crop_pct": 1.0}
    backbone.pretrained_cfg = cfg | {"mean": facts["mean"], "std": facts["std"]}
    return backbone


def is_shipped(name: str) -> bool:
    """Whether the package holds this backbone."""
    return name.isidentifier() and os.path.isfile(str(ASSETS / f"{name}.json"))


def image_size(source: str | None, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) of the images of what ``create_backbone`` builds of this; None where that does not say it."""
    size, name = arguments.get("img_size"), (source or "").partition("@")[0]
    if size is None and is_shipped(name):
        size = json.loads((ASSETS / f"{name}.json").read_text())["architecture"]["img_size"]
    pair = (size, size) if isinstance(size, int) else size
    return (pair[0], pair[1]) if isinstance(pair, list | tuple) and len(pair) == 2 else None


def save_backbone(backbone: nn.Module, file: Path) -> None:
    """Write the weights to a safetensors file that names their architecture, and record the file as their source."""
    cfg, arguments = _cfg(backbone), get_model_args(backbone)
    metadata = {"format": "pt", "architecture": cfg["architecture"], "model_args": json.dumps(arguments)}
    save_file(backbone.state_dict(), file, metadata)
    record_file(backbone, file)


def source_of(backbone: nn.Module) -> str | None:
    """The ``source`` from which ``create_backbone`` builds this backbone again; None if timm did not build it."""
    cfg = _cfg(backbone)
    file = Path(cfg["file"]).absolute() if cfg.get("file") else None
    if cfg.get("source") == "local-dir":
        return f"{FOLDER}{file}"
    if cfg.get("source") == "hf-hub":
        return f"{HUB[0]}{cfg['hf_hub_id']}"
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg.get("architecture")
    return f"{name}@{file}" if name and file else name


def unlike_timm(
    backbone: nn.Module, arguments: Mapping[str, Any] | None = None, source: str | None = None
) -> str | None:
    """What was changed in a backbone, besides weights, since it was built from its name.

    Hooks, buffers, functions and lists are not looked at.

    Args:
        arguments: with which it was to be built; None for its own.
        source: from which it was to be built, if another than ``source_of`` it, by the name of an architecture.

    Returns:
        The first module or setting that differs, as ``difference`` says it, or why it cannot be built again; None if
        there is nothing, or for a backbone that neither timm nor this package has built.
    """
    name = _cfg(backbone).get("architecture")
    recorded = (source or "").partition("@")[0]
    name = recorded if is_name(recorded) else name
    if not name or not (is_shipped(name) or is_model(name)):
        return None
    own = get_model_args(backbone)
    size = {key: own[key] for key in own.keys() & {"img_size"}}  # of images, for any of which a backbone may be
    arguments, reason = own if arguments is None else {**arguments, **size}, None
    for device in ("meta", "cpu"):  # some constructors compute with values, which meta has none of
        try:
            with torch.device(device), torch.random.fork_rng([]), warnings.catch_warnings(action="ignore"):
                built = _build(name, False, arguments)
        except CheckpointError as error:
            reason = str(error)
        else:
            return difference(settings_of(backbone), settings_of(built))
    return reason


def settings_of(backbone: nn.Module) -> dict[str, dict[str, Any]]:
    """What says how a backbone computes, besides weights: the class of each module, and its plain attributes.

    Without its head, and without what drops values in training, which a frozen backbone does not.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, module in backbone.named_modules():
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        if "forward" in vars(module):
            name += " with a forward of its own"
        elif type(module) in DROPPING:
            continue
        if not f"{path}.".startswith(head_prefixes(backbone)):
            found[path] = {"class": name} | {
                key: value
                for key, value in vars(module).items()
                if type(value) in PLAIN and not key.startswith("_") and "drop" not in key
            }
    return found


def difference(settings: Mapping[str, dict[str, Any]], expected: Mapping[str, dict[str, Any]]) -> str | None:
    """The first module or attribute in which ``settings_of`` two backbones differ; None if they do not.

    An attribute that one of them lacks is not looked at: its class does without.
    """
    absent = {"class": "absent"}
    for path in {**expected, **settings}:
        own, wanted = settings.get(path, absent), expected.get(path, absent)
        for key in [key for key in own if key in wanted and key not in INCIDENTAL]:
            if own[key] != wanted[key]:
                name = f"{path}.{key}".removeprefix(".") if key != "class" else path or "the model"
                return f"{name} is {own[key]!r}: expected {wanted[key]!r}"
    return None


def hub_id(backbone: nn.Module) -> str | None:
    """The repository on the Hub that this backbone's weights came from; None if they came from elsewhere."""
    cfg = _cfg(backbone)
    return None if cfg.get("file") else cfg.get("hf_hub_id")


def weights_report(backbone: nn.Module) -> str | None:
    """In which format ``create_backbone`` found the weights in a file, and what it left out or adapted.

    None if timm loaded them itself.
    """
    return _cfg(backbone).get("weights_report")


def record_file(backbone: nn.Module, file: str | Path) -> None:
    """Record that the weights came from a file, instead of where timm has the architecture's weights."""
    foreign = {"source": "", "tag": None} if _cfg(backbone).get("source") else {}  # timm may not know this tag
    _record(backbone, **foreign, file=str(Path(file).absolute()))


def _record(backbone: nn.Module, **facts: Any) -> None:
    backbone.pretrained_cfg = _cfg(backbone) | facts  # type: ignore[assignment]


def _cfg(backbone: nn.Module) -> dict[str, Any]:
    return getattr(backbone, "pretrained_cfg", None) or {}


def _parse(source: str) -> tuple[str, Path | None, dict[str, Any]]:
    """The name that timm takes, the file of weights if there is one, and the model arguments that it holds."""
    if is_name(source) or source.startswith((*HUB, FOLDER)):
        return source, None, {}
    path = Path(source)
    if os.path.isdir(path):  # unlike its method, also where a name is too long for one
        return f"{FOLDER}{path}", None, {}
    if os.path.isfile(path):
        name, arguments = _architecture_of(path)
        return name, path, arguments
    name, at, file = source.partition("@")
    if at and is_name(name):
        return name, Path(file), {}
    if name.startswith(PREFIX) and is_model(name):
        raise CheckpointError(f"{name} is a model with prompts: expected its backbone, {name.removeprefix(PREFIX)}")
    raise CheckpointError(f"timm has no model {name}, and there is no such folder or file")


def is_name(source: str) -> bool:
    """Whether the package or timm has a backbone of this name; one with prompts is none."""
    if is_shipped(source) or source.startswith(PREFIX):
        return is_shipped(source)
    try:  # is_model ignores what follows a dot, which may be a tag or the suffix of a file
        return is_model(source) and ("." not in source or get_pretrained_cfg(source) is not None)
    except RuntimeError:  # no such tag
        return False


def _architecture_of(file: Path) -> tuple[str, dict[str, Any]]:
    """The architecture that a file of weights names, and its arguments."""
    if file.suffix == ".npz" or file.name.endswith(INDEX):
        content: Any = {}
    else:
        content = _header(file) if file.suffix == ".safetensors" else read_torch(file)
    facts = content if isinstance(content, dict) else {}
    options = facts.get("args")  # of train.py, a Namespace
    name = facts.get("arch", facts.get("architecture"))
    if not isinstance(name, str) or not is_model(name):
        found = "no architecture in it" if name is None else f"the architecture {name!r:.200}, which timm does not know"
        raise CheckpointError(f"{file}: found {found}: expected NAME@{file}, or the folder that timm saved")
    given = {to: value for key, to in TRAIN_OPTIONS.items() if (value := getattr(options, key, None)) is not None}
    arguments = facts.get("model_args", getattr(options, "model_kwargs", None))
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise CheckpointError(f"{file}: found the arguments {arguments!r:.200}: expected their names and values")
    require_architecture_only(arguments, file)
    return name, arguments | given


def require_architecture_only(arguments: Mapping[str, Any], where: object) -> None:
    """Check that arguments from a file of others say nothing but the architecture.

    Raises:
        CheckpointError: for an argument with which timm would read other files, or download.
    """
    for name in arguments:
        if name in RUNTIME_ARGUMENTS or name.startswith("pretrained_"):
            raise CheckpointError(f"{where}: found the argument {name}: expected those of an architecture alone")


def _header(file: Path) -> dict[str, Any]:
    facts = read_metadata(file)
    try:
        return facts | {"model_args": json.loads(facts.get("model_args", "{}"))}
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{file}: found model_args that are not JSON: {error}") from error


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    if name.startswith(FOLDER):
        _require_folder(Path(name.removeprefix(FOLDER)))
    elif not is_shipped(name) and (pretrained or name.startswith(HUB)):
        _require_weights(name, arguments)
    try:
        if is_shipped(name):
            return shipped_backbone(name, **arguments)
        return create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, RuntimeError, KeyError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"timm does not build {name} with {arguments}: {reason}") from error
    except Exception as error:  # a download fails with errors of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name}: no weights ({reason}); or give a file, NAME@FILE") from error


def _require_folder(folder: Path) -> None:
    found = sorted(entry.name for entry in folder.iterdir()) if os.path.isdir(folder) else None
    if found is None:
        raise CheckpointError(f"{folder}: there is no such folder")
    if "config.json" not in found or not any(name.endswith(WEIGHTS) for name in found):
        raise CheckpointError(f"{folder}: found {found[:8]}: expected config.json and weights, as timm saves them")


def _require_weights(name: str, arguments: dict[str, Any]) -> None:
    """Raise at once if the weights are not cached and the Hub does not answer; timm would try for a minute."""
    if any(key.startswith("pretrained_cfg") for key in arguments):  # the weights may be elsewhere
        return
    place = name.partition(":")[2] if name.startswith(HUB) else getattr(get_pretrained_cfg(name), "hf_hub_id", None)
    if place:
        repository, _, revision = place.partition("@")
        require_hub(repository, WEIGHTS, revision=revision or None)


def _load(backbone: nn.Module, file: Path) -> None:
    """Load weights from a file, strictly, apart from the classification head, and record what was done to get them."""
    state, report = read_backbone_weights(file, backbone)
    backbone.load_state_dict(state, strict=False)
    _record(backbone, weights_report=str(report))
    if report.missing_head:
        warn(f"{file}: {report}")
