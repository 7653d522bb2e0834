"""MethodViT: a frozen backbone with the prompts of any method, on the fast path, saved as an adapter of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from insvp_fast import coverage
from insvp_fast.atomic_files import write_file
from insvp_fast.checkpoints.adapter_config import BackboneRecord, check_fields
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.checkpoints.files import read_safetensors
from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.checkpoints.state_dict import check_shapes
from insvp_fast.errors import CheckpointError
from insvp_fast.methods.table import METHODS
from insvp_fast.prompted import PromptedViT
from insvp_fast.reference import Geometry, ImagePrompt, PromptMethod
from insvp_fast.timm_interface import TimmInterface

__all__ = ["MethodViT", "create_model"]


class MethodViT(TimmInterface, PromptedViT):
    """A frozen backbone of timm with a trained head and the prompts of a method.

    Computes what ``PromptedReference`` with the same arguments says, on the fast path where that covers the backbone,
    else module by module; a warning then says why. Trained: ``method`` and ``head``.

    Args:
        method: makes the method for a backbone: a subclass of ``PromptMethod``, or ``functools.partial`` of one.

    Other arguments: see ``InsVPViT``.

    Attributes:
        class_names, preprocessing: as those of an ``InsVPViT``; saved with the adapter.

    Raises:
        TypeError: if the backbone cannot be prompted, or has more than one head.
        ValueError: if the method asks for what cannot be done with such a backbone.
    """

    method: PromptMethod
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None
    # what ``TimmInterface`` would sort into layers, if it were InsVP's: a method learns at the rate of the head
    prompt_widths = ()
    common_prompts = global_prompter = patch_prompter = specific_prompter = None

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        method: Callable[[Geometry], PromptMethod],
        pretrained: bool = False,
        recompute: str = "none",
        fold_norm: bool = True,
        attention: str = "auto",
        gelu_in_8_bits: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        if isinstance(backbone, str) and pretrained:
            backbone, pretrained, backbone_kwargs = create_backbone(backbone, **backbone_kwargs), False, {}
        super().__init__(backbone, num_classes, method=method, pretrained=pretrained, **backbone_kwargs)
        self.recompute, self.fold_norm, self.attention = recompute, fold_norm, attention
        self.gelu_in_8_bits = gelu_in_8_bits
        self._options = _options_of(method)
        coverage.covers(self)  # warns now rather than in the first forward pass

    def no_weight_decay(self) -> set[str]:
        """No names: these methods' authors let all prompts decay."""
        return set()

    def init_weights(self, mode: str = "") -> NoReturn:
        """Not for these methods: make the model again.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a {type(self).__name__} does not draw its weights anew: make the model again")

    def prune_intermediate_layers(self, *arguments: Any, **options: Any) -> NoReturn:
        """Not for these methods, whose parameters are for all blocks of the backbone: prune that before.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a {type(self).__name__} does not drop blocks: drop them from the backbone before")

    def image_prompt(self, image: Tensor) -> ImagePrompt:
        """The prompted image and what was added to it, [B, C, H, W]."""
        image = self._normalize(image) if image.dtype == torch.uint8 else image
        prompted, _ = self.prompt_image(image)
        return ImagePrompt(None, None, prompted - image, prompted)

    def _adapter(self) -> dict[str, Tensor]:
        """What the state dict holds outside the backbone."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}

    def save_pretrained(
        self,
        folder: str | Path,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        """Write method, head and what to build them around: adapter_config.json and adapter_model.safetensors.

        Args:
            class_names, preprocessing: the attributes' new values; None leaves them unchanged.

        Raises:
            ValueError: if the method is not one of ``METHODS``, or its settings are not JSON, or not known because it
                was made by another function.
        """
        self.class_names = self.class_names if class_names is None else list(class_names)
        self.preprocessing = self.preprocessing if preprocessing is None else dict(preprocessing)
        names = [name for name, cls in METHODS.items() if cls is type(self.method)]
        if not names:
            kind = type(self.method).__name__
            raise ValueError(f"the method is a {kind}: expected one of {sorted(METHODS)}; save the state dict instead")
        if self._options is None:
            kind = type(self.method).__name__
            raise ValueError(f"the settings of the {kind} are not known: expected method={kind}, or a partial of it")
        record = BackboneRecord.of(self.backbone)
        config = _Config(
            method=names[0],
            options=self._options,
            num_classes=self.num_classes,
            backbone=record,
            class_names=self.class_names,
            preprocessing=self.preprocessing,
        )
        try:
            text = json.dumps(dataclasses.asdict(config), indent=2)
        except TypeError as error:
            raise ValueError(
                f"the settings of {names[0]}, or how images are prepared, are not JSON: {error}"
            ) from error
        weights = {key: value.detach().cpu().contiguous() for key, value in self._adapter().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_file(Path(folder, WEIGHTS_FILE), safetensors.torch.save(weights, metadata={"format": "pt"}))
        write_file(Path(folder, ADAPTER_FILE), f"{text}\n".encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: str | nn.Module | None = None) -> Self:
        """Build the recorded backbone, or take the given one, and load an adapter that ``save_pretrained`` wrote.

        The model is in evaluation mode.

        Raises:
            CheckpointError: if the files are not of such an adapter, or the backbone is another one.
        """
        file = Path(folder, ADAPTER_FILE)
        config, weights = _Config.read(file), read_safetensors(Path(folder, WEIGHTS_FILE))
        module = backbone if isinstance(backbone, nn.Module) else _build(config.backbone, backbone, file)
        config.backbone.require_same_weights(module, file)
        try:
            model = cls(module, config.num_classes, method=partial(METHODS[config.method], **config.options))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from error
        check_shapes(weights, {key: tuple(value.shape) for key, value in model._adapter().items()}, folder)
        model.load_state_dict(weights, strict=False)
        model.class_names, model.preprocessing = config.class_names, config.preprocessing
        return model.eval()


def create_model(
    method: str,
    backbone: str | nn.Module,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> MethodViT:
    """A model with a method of ``METHODS``: ``create_model("vpt_deep", "vit_base_patch16_224", 100, length=50)``.

    Args:
        method: a name in ``METHODS``.
        options: the settings of the method, by their names.
        backbone_kwargs: for ``timm.create_model``, where the backbone is a name.

    Other arguments and errors: see ``MethodViT``.

    Raises:
        ValueError: for a name that is not in the table.
        TypeError: for an option that the method does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {sorted(METHODS)}")
    make = partial(METHODS[method], **options)
    return MethodViT(backbone, num_classes, method=make, pretrained=pretrained, **backbone_kwargs or {})


def _options_of(method: Callable[[Geometry], PromptMethod]) -> dict[str, Any] | None:
    """The settings of a method; None for a function of its own, which may have chosen any."""
    if isinstance(method, partial) and isinstance(method.func, type):
        return method.keywords
    return {} if isinstance(method, type) else None


def _build(record: BackboneRecord, name: str | None, where: object) -> nn.Module:
    """The backbone of that name, else the recorded one."""
    name = name or record.name
    if name is None:
        raise CheckpointError(f"{where}: backbone.name is null: expected the backbone itself, as backbone=")
    return create_backbone(name, **record.arguments or {}).to(record.torch_dtype)


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The content of adapter_config.json."""

    method: str
    options: dict
    num_classes: int
    backbone: BackboneRecord
    class_names: list | None
    preprocessing: dict | None

    @classmethod
    def read(cls, file: Path) -> Self:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: found no JSON: {error}") from error
        if not isinstance(values, dict) or values.get("method") not in METHODS:
            found = values.get("method") if isinstance(values, dict) else values
            raise CheckpointError(f"{file}: method is {found!r}: expected one of {sorted(METHODS)}")
        check_fields(cls, values, f"{file}: ")
        return cls(**values | {"backbone": BackboneRecord.read(values["backbone"], file)})
