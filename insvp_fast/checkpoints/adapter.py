"""Adapters on disk and on the Hugging Face Hub.

An adapter is a folder of three files: ``adapter_config.json`` says what to build and around which backbone,
``adapter_model.safetensors`` holds every tensor outside the backbone (prompters, common prompts, head), ``README.md``
is the model card. The backbone is not in it: recorded is where it came from, a path as an absolute one. It is built
again from there, or the caller gives it, and a hash of its weights tells whether it is the right one. All files are
checked before any of them is read into a model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from timm.models import get_model_args
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from insvp_fast import __version__
from insvp_fast.checkpoints.backbone import create_backbone, hub_id, source_of
from insvp_fast.checkpoints.files import (
    backbone_sha256,
    check_schema,
    check_shapes,
    expected_shapes,
    find_file,
    read_safetensors,
)
from insvp_fast.checkpoints.released import RELEASED_PREPROCESSING, infer_config, read_released, to_ours, to_released
from insvp_fast.config import InsVPConfig
from insvp_fast.errors import CheckpointError
from insvp_fast.storage import write_file

__all__ = ["AdapterCheckpoint", "CheckpointError", "backbone_sha256"]

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
PEFT_TYPE, FORMAT_VERSION = "INSVP", 1


class AdapterCheckpoint(
    PyTorchModelHubMixin,
    nn.Module,
    library_name="insvp_fast",
    tags=["insvp", "peft", "visual-prompt-tuning", "vision-transformer", "timm"],
    pipeline_tag="image-classification",
    license="apache-2.0",
    paper_url="https://doi.org/10.1145/3664647.3681233",
):
    """Saving and loading for a class with the constructor and the state-dict keys of ``InsVPReference``.

    Of the hub mixin, the upload and the facts of the model card are used. Its ``config.json`` is not: it records
    constructor arguments, and a backbone may be a module.

    Attributes:
        class_names: the names of the classes in order, or None.
        preprocessing: how images are prepared, as arguments of ``timm.data.create_transform`` (mean, std,
            interpolation, crop_pct, input_size, ...), or None if nobody said. Both travel with the adapter.
    """

    backbone: VisionTransformer
    config: InsVPConfig
    num_classes: int
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # the mixin would record the arguments here, and take a dataclass named `config` for a record of its own
        return object.__new__(cls)

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
        """Write the adapter's files into a folder; each is replaced whole or left as it was, a model card is kept.

        Args:
            save_directory: the folder; made if it does not exist.
            class_names, preprocessing: set the attributes of that name first; None leaves them as they are.
            push_to_hub: upload as well, to ``repo_id`` or a repository of the folder's name, and return the commit's
                address; further keywords are those of the method ``push_to_hub``.
            model_card_kwargs: fields for the card's metadata.
            config: a keyword of the hub mixin, to be left None; the configuration is the model's own.

        Raises:
            ValueError: if the names do not fit the classes, or weights of the backbone are trainable: they would be
                lost.
        """
        if config is not None:
            raise ValueError("config was given: expected None, an adapter is saved with the model's own configuration")
        if class_names is not None:
            self.class_names = list(class_names)
        if preprocessing is not None:  # through JSON and back: remembered here as it will be loaded there
            self.preprocessing = json.loads(json.dumps(dict(preprocessing)))
        folder = Path(save_directory)
        self._save_pretrained(folder)
        if not (folder / CARD_FILE).exists():
            write_file(folder / CARD_FILE, str(self.generate_model_card(**(model_card_kwargs or {}))).encode())
        if not push_to_hub:
            return None
        repo_id = repo_id or folder.resolve().name
        return self.push_to_hub(repo_id, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"backbone.{name} is trainable: expected a frozen backbone, it is not saved here")
        _check_class_names(self.class_names, self.num_classes)
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items() if _outside(key)}
        description = json.dumps(_describe(self), indent=2, ensure_ascii=False) + "\n"
        save_directory.mkdir(parents=True, exist_ok=True)
        write_file(save_directory / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        write_file(save_directory / CONFIG_FILE, description.encode(errors="backslashreplace"))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card of this adapter; keywords are further fields of its metadata."""
        fields: dict[str, Any] = self._hub_mixin_info.model_card_data.to_dict()
        if repository := hub_id(self.backbone):
            fields["base_model"] = repository
        name = source_of(self.backbone)
        text = CARD.format(
            backbone=f"`{name}`" if name else "not made by timm, to be given as `backbone=`",
            argument="" if name else ", backbone=backbone",
            num_classes=self.num_classes,
            paper=self._hub_mixin_info.paper_url,
            configuration=json.dumps(self.config.to_dict(), indent=2),
        )
        return ModelCard(f"---\n{ModelCardData(**(fields | kwargs)).to_yaml()}\n---\n\n{text}")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        backbone: str | VisionTransformer | None = None,
        *,
        pretrained: bool = True,
        allow_backbone_mismatch: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **backbone_kwargs: Any,
    ) -> Self:
        """Build the backbone, put the adapter around it and return the model in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            backbone: None for the recorded one, what ``create_backbone`` takes (a name, a folder, NAME@FILE, ...), or a
                module, which is taken over.
            pretrained, backbone_kwargs: for ``create_backbone``, over the recorded arguments; not for a module.
            allow_backbone_mismatch: accept a backbone with other weights than the adapter was trained with.
            force_download, token, cache_dir, local_files_only, revision: for ``huggingface_hub.hf_hub_download`` of the
                adapter. Weights of the backbone are timm's to fetch; HF_HUB_OFFLINE keeps both offline.

        The model comes in the dtypes it was saved in; around a given backbone of another dtype, in that one.

        Raises:
            CheckpointError: if the files are no adapter that this version can read, or the backbone is another one.
        """
        hub: dict[str, Any] = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "revision": revision}
        config_file = find_file(str(pretrained_model_name_or_path), CONFIG_FILE, hub)
        weights_file = find_file(str(pretrained_model_name_or_path), WEIGHTS_FILE, hub)
        description, config = _read_description(config_file)
        tensors = read_safetensors(weights_file)
        recorded, num_classes = description["backbone"], description["num_classes"]

        module = _backbone(backbone, pretrained, backbone_kwargs, recorded, config_file)
        expected = expected_shapes(module, num_classes, config, config_file)
        check_shapes(tensors, {key: shape for key, shape in expected.items() if _outside(key)}, weights_file)
        if not allow_backbone_mismatch:
            _check_backbone(module, recorded, config_file)
        model = cls(module, num_classes, config)
        _assign(model, tensors, saved=_dtype(recorded))
        model.class_names, model.preprocessing = description["class_names"], description["preprocessing"]
        return model.eval()

    @classmethod
    def from_released(
        cls,
        source: str | Path | Mapping[str, Any],
        backbone: str | VisionTransformer = "vit_base_patch16_224",
        simam: bool = False,
        num_classes: int | None = None,
        **backbone_kwargs: Any,
    ) -> Self:
        """Load a checkpoint of the authors' code, backbone included, and return the model in evaluation mode.

        The configuration is ``InsVPConfig.released`` with everything that the shapes tell: prompt length, prompted
        blocks, hidden widths, kernels. Prompts that the file does not hold are switched off.

        Args:
            source: a file (``best_model.pth``, or safetensors), or its state dict.
            backbone: a timm architecture, built with the file's depth, or a module; either gets the file's weights.
            simam: whether the recipe used SimAM, which has no weights to be recognised by.
            num_classes: None takes the number of classes from the file; any other than the file's is refused.
            backbone_kwargs: for ``timm.create_model``; not for a module.

        Raises:
            CheckpointError: if it is not such a checkpoint, or does not fit the backbone.
        """
        where, released = read_released(source)
        tensors = {to_ours(key): value for key, value in released.items()}
        depth, config = infer_config(tensors, simam, where)
        classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
        if num_classes not in (None, classes):
            raise CheckpointError(f"{where}: backbone.head has {classes} classes, expected {num_classes}")
        arguments = {"num_classes": 0, "depth": depth, "weight_init": "skip"}
        recorded = {"arguments": arguments, "dtype": "float32"}
        backbone = _backbone(backbone, False, backbone_kwargs, recorded, where)
        expected = expected_shapes(backbone, classes, config, where)
        check_shapes(released, {to_released(key): shape for key, shape in expected.items()}, where)
        if config.specific_prompt:
            text = "the authors' code leaves TokenPrompt, the specific prompter, at its random initial values"
            warnings.warn(f"{where}: {text}", stacklevel=2)

        model = cls(backbone, classes, config)
        model.load_state_dict(tensors)
        model.preprocessing = copy.deepcopy(RELEASED_PREPROCESSING)
        return model.eval()


CARD = """# InsVP adapter

An adapter for a frozen Vision Transformer: prompts generated from the image itself, and a classification head.

- Backbone, not part of these files: {backbone}
- Classes: {num_classes}
- Method: [InsVP: Efficient Instance Visual Prompting from Image Itself]({paper})

```python
from insvp_fast import InsVPViT

model = InsVPViT.from_pretrained("<this folder or repository>"{argument})
logits = model(images)
print(model.class_names, model.preprocessing)
```

Configuration:

```json
{configuration}
```
"""


def _outside(key: str) -> bool:
    return not key.startswith("backbone.")


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], saved: torch.dtype) -> None:
    """Take the tensors over in the file's dtypes; around a backbone of another dtype than the saved one, in that."""
    weight = next(model.get_submodule("backbone").parameters())
    dtype = None if weight.dtype == saved else weight.dtype
    # copied: in the file they are not aligned, and some products round otherwise there
    tensors = {key: value.to(weight.device, dtype, copy=True) for key, value in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)


# --------------------------------------------------------------------------------------------------------- the backbone


def _describe_backbone(backbone: VisionTransformer) -> dict[str, Any]:
    name, arguments = source_of(backbone), get_model_args(backbone)
    try:
        json.dumps(arguments)
    except TypeError:  # a layer type, say: only the caller can build it again
        name = None
    dtype = next(backbone.parameters()).dtype
    return {
        "name": name,
        "arguments": arguments if name else None,
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": backbone_sha256(backbone, dtype),
    }


def _backbone(
    backbone: str | VisionTransformer | None,
    pretrained: bool,
    kwargs: dict[str, Any],
    recorded: Mapping[str, Any],
    where: object,
) -> VisionTransformer:
    """The given module, or the given or recorded one of ``create_backbone``."""
    if backbone is not None and not isinstance(backbone, str):
        if kwargs:
            raise ValueError(f"{sorted(kwargs)} belong to a backbone given by name, and a module was given")
        return backbone
    name = backbone or recorded["name"]
    if name is None:
        raise CheckpointError(f"{where}: backbone.name is null: expected the backbone itself, as backbone=")
    arguments = (recorded["arguments"] or {}) | kwargs
    try:
        return create_backbone(name, pretrained, **arguments).to(_dtype(recorded))
    except CheckpointError as error:
        remedy = "" if backbone else "; the adapter was trained with this backbone: if it is elsewhere, give backbone="
        raise CheckpointError(f"{where}: {error}{remedy}") from error


def _check_backbone(backbone: nn.Module, recorded: Mapping[str, Any], where: object) -> None:
    found = backbone_sha256(backbone, _dtype(recorded))
    if found != recorded["sha256"]:
        expected = f"{recorded['sha256']} ({recorded['name'] or 'not made by timm'}, {recorded['dtype']})"
        remedy = (
            "as backbone= the one that the adapter was trained with, or allow_backbone_mismatch=True to use this one"
        )
        raise CheckpointError(f"{where}: the backbone has sha256 {found}, expected {expected}. Give {remedy}")


def _dtype(recorded: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, recorded["dtype"])


# ------------------------------------------------------------------------------------------------------ the description

SCHEMA: dict[str, Any] = {
    "peft_type": str,
    "format_version": int,
    "insvp_fast_version": str,
    "base_model_name_or_path": str | None,
    "num_classes": int,
    "insvp": dict,
    "backbone": dict,
    "class_names": list | None,
    "preprocessing": dict | None,
}
BACKBONE_SCHEMA: dict[str, Any] = {"name": str | None, "arguments": dict | None, "dtype": str, "sha256": str}


def _describe(model: AdapterCheckpoint) -> dict[str, Any]:
    return {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "insvp_fast_version": __version__,
        "base_model_name_or_path": hub_id(model.backbone) or source_of(model.backbone),
        "num_classes": model.num_classes,
        "insvp": model.config.to_dict(),
        "backbone": _describe_backbone(model.backbone),
        "class_names": model.class_names,
        "preprocessing": model.preprocessing,
    }


def _read_description(file: Path) -> tuple[dict[str, Any], InsVPConfig]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: found no JSON: {error}") from error
    found = values.get("peft_type") if isinstance(values, dict) else None
    if found != PEFT_TYPE:
        raise CheckpointError(f"{file}: not an InsVP adapter: peft_type is {found!r}, expected {PEFT_TYPE!r}")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        text = f"format_version is {version}, expected at most {FORMAT_VERSION}"
        raise CheckpointError(f"{file}: {text}: it needs insvp_fast {values.get('insvp_fast_version')} or later")
    check_schema(values, SCHEMA, f"{file}: ")
    check_schema(values["backbone"], BACKBONE_SCHEMA, f"{file}: backbone.")
    if not isinstance(getattr(torch, values["backbone"]["dtype"], None), torch.dtype):
        raise CheckpointError(f"{file}: backbone.dtype is {values['backbone']['dtype']!r}, expected a dtype of torch")
    try:
        _check_class_names(values["class_names"], values["num_classes"])
        return values, InsVPConfig.from_dict(values["insvp"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_class_names(names: list[str] | None, num_classes: int) -> None:
    if names is not None and len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} names, expected one for each of the {num_classes} classes")
