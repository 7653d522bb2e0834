"""Adapters on disk and on the Hugging Face Hub: ``AdapterCheckpoint`` saves and loads them.

An adapter is a folder of three files: ``adapter_config.json`` says what to build and around which backbone,
``adapter_model.safetensors`` holds every tensor outside the backbone (prompters, common prompts, head), ``README.md``
is the model card. The backbone is not part of it. Recorded are where it came from, with absolute paths, and a hash of
its weights: it is built again from there or given by the caller, and the hash tells whether it is the right one. All
files are checked before a model is built from them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from insvp_fast.atomic_files import write_file
from insvp_fast.checkpoints.adapter_config import AdapterConfig, BackboneRecord, Described, to_json
from insvp_fast.checkpoints.backbone import create_frozen, difference, hub_id, settings_of, source_of, unlike_timm
from insvp_fast.checkpoints.files import find_file, save_adapter
from insvp_fast.checkpoints.model_card import make_model_card
from insvp_fast.checkpoints.names import ADAPTER_FILE, CARD_FILE, WEIGHTS_FILE
from insvp_fast.checkpoints.released import infer_config, read_released, to_ours, to_released
from insvp_fast.checkpoints.state_dict import assign, check_shapes, expected_shapes, read_adapter_weights, skeleton
from insvp_fast.config import RELEASED_PREPROCESSING, InsVPConfig
from insvp_fast.errors import CheckpointError, warn
from insvp_fast.reference.heads import refuse_arguments

__all__ = ["AdapterCheckpoint", "adapter_part", "recorded_backbone", "require_described"]


class AdapterCheckpoint(
    Described,
    PyTorchModelHubMixin,
    nn.Module,
    library_name="insvp_fast",
    tags=["insvp", "peft", "visual-prompt-tuning", "vision-transformer", "timm"],
    pipeline_tag="image-classification",
    license="apache-2.0",
    paper_url="https://doi.org/10.1145/3664647.3681233",
):
    """Saving and loading, for a class with the constructor and the state-dict keys of ``InsVPReference``.

    The hub mixin uploads, and provides the metadata of the model card. Its ``config.json`` is not used: it records
    constructor arguments, and a backbone may be a module. The attributes of ``Described`` are saved with the adapter.
    """

    backbone: nn.Module
    config: InsVPConfig
    num_classes: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # the mixin's would record the arguments, and mistake a dataclass named `config` for its own configuration
        return object.__new__(cls)

    def _adapter(self) -> dict[str, Tensor]:
        """What is saved of the state dict."""
        return adapter_part(self.state_dict())

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the adapter's files into a folder; each is replaced whole, and an existing model card is kept.

        Args:
            save_directory: the folder; made if it does not exist.
            class_names, preprocessing: the attributes' new values; None leaves them unchanged.
            push_to_hub: also upload, to ``repo_id`` or a repository of the folder's name, and return the commit's
                address; ``push_to_hub_kwargs`` are those of the method ``push_to_hub``.
            model_card_kwargs: fields for the card's metadata.
            config: only for the hub mixin's signature, must be None: the model's own configuration is saved.

        Raises:
            ValueError: if there is not one class name for each class, or for what would not be saved: trainable weights
                of the backbone, and modules and attributes of the model that its configuration does not make.
        """
        if config is not None:
            raise ValueError("config was given: expected None, an adapter is saved with the model's own configuration")
        folder = Path(save_directory)
        self._save(folder, self.description(class_names, preprocessing))
        if not (folder / CARD_FILE).exists():
            write_file(folder / CARD_FILE, str(self.generate_model_card(**(model_card_kwargs or {}))).encode())
        if not push_to_hub:
            return None
        repo_id = repo_id or folder.resolve().name
        return self.push_to_hub(repo_id, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:  # which the mixin calls to upload
        self._save(save_directory, self.description())

    def _save(self, folder: Path, description: dict[str, Any]) -> None:
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"backbone.{name} is trainable: expected a frozen backbone, it is not saved here")
        config = AdapterConfig(
            base_model_name_or_path=hub_id(self.backbone) or source_of(self.backbone),
            num_classes=self.num_classes,
            insvp=self.config,
            backbone=BackboneRecord.of(self.backbone).unless(unlike_timm(self.backbone)),
            **description,
        )
        require_described(self, skeleton(self.backbone, self.num_classes, self.config, type(self).__name__))
        content = to_json(dataclasses.asdict(config), "what is said of the adapter")
        save_adapter(folder, self._adapter(), content)
        self.describe_as(config)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card of this adapter; ``kwargs`` are fields of its metadata."""
        info = self._hub_mixin_info
        metadata = info.model_card_data.to_dict() | kwargs
        return make_model_card(self.backbone, self.num_classes, self.config, info.paper_url, metadata)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        backbone: str | nn.Module | None = None,
        *,
        pretrained: bool = True,
        allow_backbone_mismatch: bool = False,
        num_classes: int | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **backbone_kwargs: Any,
    ) -> Self:
        """Build the backbone, load the adapter around it, and return the model in evaluation mode.

        The model has the dtypes that it was saved in, or that of a given backbone if it differs.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            backbone: None for the recorded one, what ``create_backbone`` takes (a name, a folder, NAME@FILE, ...), or a
                module, which becomes part of the model.
            pretrained, backbone_kwargs: for ``create_backbone``, where they override the recorded arguments; not for a
                module.
            allow_backbone_mismatch: accept a backbone with other weights than the adapter was trained with.
            num_classes: the number of classes that the adapter must have; None accepts any. ``reset_classifier`` gives
                the loaded model a new head.
            force_download, token, cache_dir, local_files_only, revision: for ``huggingface_hub.hf_hub_download`` of the
                adapter; timm downloads the backbone. HF_HUB_OFFLINE keeps both offline.

        Raises:
            CheckpointError: if this version cannot read the files as an adapter, or the backbone is another one.
            TypeError: if the backbone is not a model of timm that can be prompted, or for an argument of the model.
            ValueError: for ``backbone_kwargs`` beside a module.
        """
        _refuse_arguments_of(cls, backbone_kwargs)
        hub: dict[str, Any] = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "revision": revision}
        config_file = find_file(str(pretrained_model_name_or_path), ADAPTER_FILE, hub)
        weights_file = find_file(str(pretrained_model_name_or_path), WEIGHTS_FILE, hub)
        config, weights = AdapterConfig.read(config_file), read_adapter_weights(weights_file)
        if num_classes not in (None, config.num_classes):
            remedy = f"call reset_classifier({num_classes}) after loading for a new head"
            raise CheckpointError(f"{config_file}: the adapter has {config.num_classes} classes: {remedy}")
        module = recorded_backbone(config.backbone, backbone, pretrained, backbone_kwargs, config_file)
        expected = expected_shapes(module, config.num_classes, config.insvp, config_file)
        check_shapes(weights, adapter_part(expected), weights_file)
        if not allow_backbone_mismatch:
            config.backbone.require_same_weights(module, config_file)
        model = cls(module, config.num_classes, config.insvp)
        assign(model, weights, saved=config.backbone.torch_dtype)
        model.describe_as(config)
        return model.eval()

    @classmethod
    def from_released(
        cls,
        source: str | Path | Mapping[str, Any],
        backbone: str | nn.Module = "vit_base_patch16_224.orig_in21k",
        simam: bool = False,
        num_classes: int | None = None,
        **backbone_kwargs: Any,
    ) -> Self:
        """Load a checkpoint of the authors' code, backbone included, and return the model in evaluation mode.

        The configuration is ``InsVPConfig.released`` with all sizes taken from the weights: prompt length, prompted
        blocks, hidden widths, kernels. Prompts that the file does not hold are switched off.

        Args:
            source: a file (``best_model.pth``, or safetensors), or its state dict.
            backbone: a timm architecture, built with the file's depth, or a module; the file's weights are loaded into
                either. An adapter records the name, with the tag of timm's weights: by default of those that the
                authors link.
            simam: whether the model was trained with SimAM, which no weight of the file shows.
            num_classes: the number of classes that the file must have; None accepts any.
            backbone_kwargs: for ``timm.create_model``; not for a module.

        Raises:
            CheckpointError: if it is not such a checkpoint, or does not fit the backbone.
            TypeError: if the backbone is not a model of timm that can be prompted, or for an argument of the model.
            ValueError: for ``backbone_kwargs`` beside a module.
        """
        _refuse_arguments_of(cls, backbone_kwargs)
        where, released = read_released(source)
        tensors = to_ours(released)
        depth, config = infer_config(tensors, simam, where)
        head = tensors.get("head.weight")
        classes = len(head) if head is not None and head.ndim else 0
        if num_classes not in (None, classes):
            raise CheckpointError(f"{where}: backbone.head has {classes} classes: expected {num_classes}")
        arguments = {"num_classes": 0, "depth": depth, "weight_init": "skip"}
        module = _take_or_create(backbone, False, arguments, backbone_kwargs, torch.float32, where)
        expected = expected_shapes(module, classes, config, where)
        theirs = to_released({key: torch.empty(shape, device="meta") for key, shape in expected.items()})
        check_shapes(released, {key: tuple(value.shape) for key, value in theirs.items()}, where)
        if config.specific_prompt:
            text = "the authors' code leaves TokenPrompt, the specific prompter, at its random initial values"
            warn(f"{where}: {text}")

        model = cls(module, classes, config)
        model.load_state_dict(tensors)
        model.preprocessing = copy.deepcopy(RELEASED_PREPROCESSING)
        return model.eval()

    def _around(self, backbone: nn.Module) -> Self:
        """A copy of this model, as it is now, around another backbone, which must have the same weights."""
        if backbone is not self.backbone:
            BackboneRecord.of(self.backbone).require_same_weights(backbone, type(self).__name__)
            if change := difference(settings_of(backbone), settings_of(self.backbone)):
                raise CheckpointError(f"{type(self).__name__}: the backbone is another one: {change}")
        try:
            model = copy.deepcopy(self, dict(_counterparts(self.backbone, backbone)))
        except (RuntimeError, TypeError) as error:
            raise TypeError(f"the {type(self).__name__} cannot be copied by copy.deepcopy: {error}") from error
        weight, own = next(backbone.parameters()), next(self.backbone.parameters())
        if (weight.device, weight.dtype) != (own.device, own.dtype):
            model.to(weight.device, None if weight.dtype == own.dtype else weight.dtype)
        return model.eval()


def _refuse_arguments_of(model: type, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that is not the backbone's, where a model is loaded."""
    for name in arguments:
        if name == "config" or name in InsVPConfig.__dataclass_fields__:
            raise TypeError(f"{name} was given: expected none, the configuration is that of what is loaded")
        if name in inspect.signature(model).parameters or name in ("multi_label", "class_names", "preprocessing"):
            raise TypeError(f"{name} was given: expected none, it is an attribute to be set after loading")


def _counterparts(module: nn.Module, other: nn.Module) -> Iterator[tuple[int, Any]]:
    """For ``copy.deepcopy``: what stands for each part of one backbone in another of the same architecture."""
    for parts in (nn.Module.named_modules, nn.Module.named_parameters, nn.Module.named_buffers):
        others: dict[str, Any] = dict(parts(other))
        yield from ((id(part), others[name]) for name, part in parts(module) if name in others)


def adapter_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping by state-dict keys holds outside the backbone."""
    return {key: value for key, value in values.items() if not key.startswith("backbone.")}


def require_described(model: nn.Module, described: nn.Module, owner: object = None) -> None:
    """Raise ValueError for a module, method, attribute or shape beside the backbone that the other model has not.

    Args:
        owner: what has the methods of the model, if not the model itself.
    """
    parts, expected = (_beside_backbone(each) for each in (model, described))
    for name in [*expected, *(name for name in parts if name not in expected)]:
        own, other = parts.get(name), expected.get(name)
        classes = [None if part is None else type(part).__name__ for part in (own, other)]
        if name and classes[0] != classes[1]:  # the model itself may be of any class with this constructor
            raise ValueError(f"{name} is {classes[0]}: {_expected(classes[1])}")
        for key in vars(own):  # libraries of training replace the forward of the model itself
            if callable(getattr(type(own), key, None)) and (name or key != "forward"):
                raise ValueError(f"{name and f'{name}.'}{key} is replaced: {_expected('that of the class')}")
        for key, value in vars(other).items():
            found = vars(own).get(key)
            if not key.startswith("_") and key != "training" and found != value:
                made_so = (name, key) == ("head", "out_features") and hasattr(owner or model, "reset_classifier")
                remedy = f"; reset_classifier({found}) gives it a head of so many classes" * made_so
                raise ValueError(f"{name and f'{name}.'}{key} is {found}: {_expected(value)}{remedy}")
    shapes, wanted = ({k: tuple(t.shape) for k, t in adapter_part(m.state_dict()).items()} for m in (model, described))
    for key in [*wanted, *shapes]:
        if shapes.get(key) != wanted.get(key):
            raise ValueError(f"{key} has the shape {shapes.get(key)}: {_expected(wanted.get(key))}")


def _beside_backbone(model: nn.Module) -> dict[str, nn.Module]:
    return {n: part for n, part in model.named_modules() if n.partition(".")[0] != "backbone"}


def _expected(value: object) -> str:
    return f"expected {value}, as the model's config makes it: with the weights, that is all that is saved"


def recorded_backbone(
    record: BackboneRecord,
    backbone: str | nn.Module | None,
    pretrained: bool,
    arguments: dict[str, Any],
    where: object,
) -> nn.Module:
    """The given backbone, or the recorded one; if it has to be built, with the recorded arguments, in that dtype.

    Warns of another one that, with the recorded weights, computes otherwise.
    """
    given = record.name if backbone is None else backbone
    if given is None:
        raise CheckpointError(f"{where}: backbone.name is null: expected the backbone itself, as `backbone`")
    elsewhere = "; the adapter was trained with this backbone: if it is elsewhere, give backbone="
    remedy, defaults = elsewhere if backbone is None else "", record.arguments or {}
    module = _take_or_create(given, pretrained, defaults, arguments, record.torch_dtype, where, remedy)
    other = record.name and (given != record.name or arguments)
    if other and (change := unlike_timm(module, record.arguments, record.name)):
        warn(f"{where}: the adapter was trained around a backbone that computes otherwise: {change}")
    return module


def _take_or_create(
    backbone: str | nn.Module,
    pretrained: bool,
    defaults: dict[str, Any],
    arguments: dict[str, Any],
    dtype: torch.dtype,
    where: object,
    remedy: str = "",
) -> nn.Module:
    """A given module as it is, or what ``create_backbone`` makes of a name, with ``arguments`` over ``defaults``."""
    if not isinstance(backbone, str):
        refuse_arguments(arguments)
        return backbone
    try:
        return create_frozen(backbone, pretrained, **defaults | arguments).to(dtype)
    except CheckpointError as error:
        remedy = "" if isinstance(error.__cause__, TypeError) else remedy  # for an argument that it does not take
        raise CheckpointError(f"{where}: {error}{remedy}") from error
