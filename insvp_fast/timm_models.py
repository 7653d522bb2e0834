"""Names for ``timm.create_model``: ``insvp_`` before the name of a backbone, with the backbone's tags and weights.

Importing ``insvp_fast`` registers them, at once or as soon as timm is imported. So this module imports none that
imports timm: timm's import may have begun there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import deque
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_model_traits,
    get_pretrained_cfg,
    list_models,
    load_pretrained,
    register_model,
)
from timm.models._features import FeatureGetterNet  # timm exports its other ways to get features
from torch import nn

import insvp_fast
from insvp_fast.config import InsVPConfig
from insvp_fast.errors import warn

__all__: list[str] = []  # timm enters the names

PREFIX = "insvp_"
FAMILIES = (  # modules of timm
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "eva",
    "beit",
    "deit",
    "naflexvit",
    "vitamin",
    "swin_transformer",
)
SHIPPED = files("insvp_fast") / "assets"
NUM_FEATURES = 3  # of features_only=True, as of timm's Vision Transformers; of a backbone with stages, one for each

default_cfgs: dict[str, DefaultCfg] = {}  # where timm looks for the weights of a name


def prompted_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """timm's description of a backbone's weights as one of the model around it: its name, its first and last layer.

    ``cfg`` are fields of timm's ``PretrainedCfg``.
    """
    name = f"{PREFIX}{cfg['architecture']}" if cfg.get("architecture") else None
    distilled = isinstance(cfg.get("classifier"), (tuple, list))
    head = ("head.class_head", "head.distillation_head") if distilled else "head"
    return {**cfg, "architecture": name, "first_conv": in_backbone(cfg.get("first_conv")), "classifier": head}


def in_backbone(modules: Any) -> Any:
    """The name of a module of the backbone, or a sequence of them, or None, as names in the model."""
    if modules is None or isinstance(modules, str):
        return modules and f"backbone.{modules}"
    return tuple(f"backbone.{name}" for name in modules)


def create(
    backbone: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    cache_dir: str | None = None,
    pretrained_model_args: object = None,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    feature_cls: str = "getter",
    **arguments: Any,
) -> nn.Module:
    """What ``timm.create_model`` calls for a name of this package.

    Args:
        backbone: its name, without tag.
        pretrained, pretrained_cfg, cache_dir: timm's, of the backbone's weights; or of all weights, where timm found
            the name in a folder or a repository of a model that it had saved.
        pretrained_model_args: what timm read there, which is in ``arguments`` too.
        features_only, out_indices, feature_cls: return a model of feature maps, as timm's do.
        arguments: ``config`` and its fields, the arguments of ``InsVPViT``, and for all others, timm's.

    Raises:
        ValueError: for another ``feature_cls``.
        TypeError: for an argument that timm's model does not take.
    """
    if feature_cls != "getter":
        raise ValueError(f"feature_cls={feature_cls!r}: expected 'getter', the features of {backbone} are not modules")
    config, own = _take_config(arguments), _take(arguments, _own_arguments())
    cfg, saved = pretrained_cfg, False
    if isinstance(cfg, dict | PretrainedCfg):
        fields = cfg if isinstance(cfg, dict) else vars(cfg)
        saved = fields.get("source") in ("hf-hub", "local-dir")
        cfg = fields.get("tag") if saved else _backbone_cfg(backbone, fields)
    if (SHIPPED / f"{backbone}.json").is_file():
        if overlay := arguments.pop("pretrained_cfg_overlay", None):
            raise ValueError(f"pretrained_cfg_overlay={overlay!r}: expected none for {backbone}, which is shipped")
        classes = arguments.pop("num_classes", None)
        model = insvp_fast.InsVPViT(backbone, classes, config, pretrained=True, **own, **arguments)
    else:
        warn_of_drop_rates(f"{PREFIX}{backbone}", arguments)
        module = timm.create_model(backbone, pretrained and not saved, cfg, cache_dir=cache_dir, **arguments)
        model = insvp_fast.InsVPViT(module, None, config, **own)
    if saved and pretrained:
        load_pretrained(model, pretrained_cfg, model.num_classes, model.in_chans, cache_dir=cache_dir)
    built: nn.Module = _features(model, out_indices) if features_only else model
    return built


def warn_of_drop_rates(name: str, arguments: Mapping[str, Any]) -> None:
    """Warn if a backbone that gets frozen is to be built with a drop rate."""
    if dropping := [key for key, value in arguments.items() if "drop" in key and key.endswith("_rate") and value]:
        text = "the frozen backbone runs in evaluation mode and drops nothing"
        warn(f"{name}: {', '.join(dropping)} without effect, {text}")


def _take(arguments: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Those of these names, which are removed from ``arguments``."""
    return {name: arguments.pop(name) for name in names & arguments.keys()}


def _take_config(arguments: dict[str, Any]) -> InsVPConfig:
    fields = _take(arguments, {field.name for field in dataclasses.fields(InsVPConfig)})
    config: InsVPConfig = arguments.pop("config", InsVPConfig())
    return dataclasses.replace(config, **fields)


def _own_arguments() -> set[str]:
    """The names of the arguments of ``InsVPViT`` that say how it computes."""
    parameters = inspect.signature(insvp_fast.InsVPViT.__init__).parameters.values()
    return {one.name for one in parameters if one.kind == one.KEYWORD_ONLY} - {"pretrained"}


def _backbone_cfg(backbone: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``prompted_cfg``; also of a description that is the backbone's own already."""
    own = get_pretrained_cfg(backbone) or PretrainedCfg()
    return {**cfg, "architecture": backbone, "first_conv": own.first_conv, "classifier": own.classifier}


def _features(model: Any, out_indices: int | tuple[int, ...] | None) -> Any:
    """The model's feature maps, with what timm's code reads of a model of feature maps."""
    if out_indices is None:
        out_indices = len(model.feature_info) if hasattr(model.backbone, "layers") else NUM_FEATURES
    features = FeatureGetterNet(model, out_indices)
    features._traits, features.in_chans = get_model_traits(model), model.in_chans
    of_head = ("num_classes", "classifier", "global_pool")
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in of_head}
    features.pretrained_cfg = features.default_cfg = cfg
    return features


def _register(backbone: str, cfgs: dict[str, PretrainedCfg]) -> None:
    """Enter a name into timm's registry; ``cfgs`` are the descriptions of its weights by tag, the default one first."""

    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return create(backbone, pretrained, **arguments)

    name = f"{PREFIX}{backbone}"
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"``{backbone}`` with prompts, for ``timm.create_model``; see ``create``."
    prompted = {tag: PretrainedCfg(**prompted_cfg(vars(cfg))) for tag, cfg in cfgs.items()}
    default_cfgs[name] = DefaultCfg(deque(prompted), prompted, any(cfg.has_weights for cfg in cfgs.values()))
    globals()[name] = register_model(entry)


def _shipped_cfg(name: str) -> PretrainedCfg:
    facts = json.loads((SHIPPED / f"{name}.json").read_text())
    size, file = facts["architecture"]["img_size"], str(SHIPPED / f"{name}.safetensors")
    look = {"mean": tuple(facts["mean"]), "std": tuple(facts["std"]), "crop_pct": 1.0, "input_size": (3, size, size)}
    layers = {"first_conv": "patch_embed.proj", "classifier": "head", "num_classes": 0, "fixed_input_size": True}
    return PretrainedCfg(file=file, architecture=name, **look, **layers)


for _name in list_models(module=FAMILIES):
    _cfgs = get_arch_pretrained_cfgs(_name)
    _register(_name, {name.partition(".")[2]: cfg for name, cfg in _cfgs.items()})
_register("vit_shapes_32", {"": _shipped_cfg("vit_shapes_32")})
