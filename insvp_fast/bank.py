"""AdapterBank: one frozen backbone and many adapters, of which every image of a batch chooses its own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from insvp_fast import coverage
from insvp_fast.coverage.snapshot import HOOKS
from insvp_fast.model import STEPS, InsVPViT
from insvp_fast.prompted import PromptedViT
from insvp_fast.reference import Prompts
from insvp_fast.runtime import cuda_graphs

__all__ = ["AdapterBank"]

_BUILDING = threading.Lock()  # a model takes the head from its backbone, and all adapters share that


class _Group(NamedTuple):
    """The images of a batch that have the same adapter."""

    model: PromptedViT  # the adapter's; the bank itself for the bare backbone
    rows: Tensor  # int64: their places in the batch
    context: Any = None  # of the model's ``block_prompts``

    def of(self, batch: Tensor) -> Tensor:
        """Their part of a batch."""
        return batch if len(self.rows) == len(batch) else batch.index_select(0, self.rows)


class AdapterBank(PromptedViT):
    """Adapters by name around one frozen backbone; a batch may mix them, at the cost of one.

    Each row of the result is what the adapter's own ``InsVPViT`` returns for that image, or the bare backbone.
    Adapters may differ in configuration and in their number of classes. They can be added and removed while other
    threads compute: a batch keeps the adapters that it began with. A bank is for inference: it is frozen and in
    evaluation mode. Adapters are no submodules: ``state_dict`` has the backbone alone.

    Args:
        backbone, pretrained, backbone_kwargs: as of ``InsVPViT``. A backbone's own head stays, for images without an
            adapter.

    Where the fast path does not cover the backbone, or an adapter, images run adapter after adapter, with the same
    results.
    """

    def __init__(self, backbone: str | nn.Module, *, pretrained: bool = False, **backbone_kwargs: Any) -> None:
        super().__init__(backbone, pretrained=pretrained, **backbone_kwargs)
        self._adapters: dict[str, InsVPViT] = {}
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | nn.Module,
        adapters: Mapping[str, str | Path | InsVPViT],
        *,
        pretrained: bool = True,
        **backbone_kwargs: Any,
    ) -> Self:
        """A bank with these adapters; see ``add``.

        Args:
            backbone: what ``create_backbone`` takes, with ``pretrained`` and ``backbone_kwargs``, or a module, which
                becomes part of the bank.

        Raises:
            CheckpointError: as by ``add``.
            TypeError: as by ``add``, and for adapters without names.
        """
        if not isinstance(adapters, Mapping):
            raise TypeError(f"adapters is a {type(adapters).__name__}: expected a dictionary, from names to adapters")
        bank = cls(backbone, pretrained=pretrained and isinstance(backbone, str), **backbone_kwargs)
        for name, source in adapters.items():
            bank.add(name, source)
        return bank

    # the adapters

    @property
    def adapters(self) -> Mapping[str, InsVPViT]:
        """The adapters as they are now, each with its ``class_names``, ``preprocessing`` and ``config``."""
        return MappingProxyType(dict(self._adapters))

    def add(self, name: str, source: str | Path | InsVPViT, **hub_kwargs: Any) -> None:
        """Add an adapter, or replace the one of this name.

        Args:
            source: a folder, or a repository on the Hub; or a model, which is copied as it is, around the bank's
                backbone. What is not a part of it, as a variable that a replaced method reads, stays shared.
            hub_kwargs: of ``InsVPViT.from_pretrained``, such as ``revision`` or ``allow_backbone_mismatch``.

        Raises:
            CheckpointError: if these are not the files of an adapter of InsVP, or its backbone has other weights.
            TypeError: for a name that is no text, a model with another method, or one that ``copy.deepcopy`` does not
                take.
        """
        if not isinstance(name, str):
            raise TypeError(f"name={name!r}: expected text")
        if isinstance(source, nn.Module) and not isinstance(source, InsVPViT):
            method = type(getattr(source, "method", source)).__name__
            raise TypeError(f"{name!r} is a {type(source).__name__} with the method {method}: expected an InsVPViT")
        with _BUILDING:
            if isinstance(source, InsVPViT):
                model = source._around(self.backbone)
            else:
                model = InsVPViT.from_pretrained(source, self.backbone, **hub_kwargs)
        coverage.forget(model)  # the bank itself asks whether the fast path covers the backbone
        model.compile_prompters = False  # each adapter would be compiled by itself
        model.cuda_graphs = False  # and have a graph of its own
        self._adapters[name] = model.requires_grad_(False).eval()

    def remove(self, name: str) -> None:
        """Take an adapter out.

        Raises:
            ValueError: if there is none of this name.
        """
        if self._adapters.pop(name, None) is None:
            raise ValueError(f"name={name!r}: expected {self._known()}")

    def _known(self) -> str:
        names = sorted(dict(self._adapters))  # a copy: others may add and remove
        if not names:
            return "an adapter that was added, and there is none"
        return f"one of {names[:20]}" + (f" or {len(names) - 20} others" if len(names) > 20 else "")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for model in list(self._adapters.values()):
            model._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode.

        Raises:
            ValueError: for ``mode=True``.
        """
        if mode:
            raise ValueError("an AdapterBank is for inference: expected mode=False; train an InsVPViT and add it")
        return super().train(mode)  # type: ignore[return-value]

    # forward

    def forward(  # type: ignore[override]
        self, image: Tensor, adapters: str | Sequence[str | None] | None = None
    ) -> Tensor:
        """[B, C, H, W] -> [B, widest result]: each row is the result of its adapter, then -inf.

        With -inf behind it, a row of logits has the same argmax and softmax as alone. A backbone or adapter without
        a head returns its pooled features, as in timm.

        Args:
            adapters: the name of each image's adapter, None for the bare backbone; or one for all images.

        Raises:
            TypeError: for an image that is no dense tensor of floating-point numbers or 8-bit pixels, and adapters that
                are neither names nor None.
            ValueError: for an unknown name, other than B names, an adapter whose backbone or the bank's was replaced,
                an image that requires a gradient, or one that the backbone cannot take.
        """
        groups = self._groups(image, adapters)
        if not self._mixes(image, groups):
            parts = [self._alone(group, image) for group in groups]
        else:
            tokens = self._mixed(image, groups, self._family.read_tokens(self.backbone))
            parts = [group.model.forward_head(group.of(tokens)) for group in groups]
        return _whole(groups, parts, len(image), float("-inf"))

    def forward_features(  # type: ignore[override]
        self, image: Tensor, adapters: str | Sequence[str | None] | None = None
    ) -> Tensor:
        """The tokens after the backbone's last norm, [B, T, D], without prompts; ``adapters`` as in ``forward``."""
        groups = self._groups(image, adapters)
        if self._mixes(image, groups):
            return self._mixed(image, groups, None)
        return _whole(groups, [self._alone(group, image, features=True) for group in groups], len(image))

    def _groups(self, image: Tensor, adapters: str | Sequence[str | None] | None) -> list[_Group]:
        """The images by adapter."""
        coverage.check_image_type(image)
        if torch.is_grad_enabled() and image.requires_grad:
            raise ValueError("the image requires a gradient: expected none, an AdapterBank is for inference")
        if not (adapters is None or isinstance(adapters, Iterable)):
            raise TypeError(f"adapters={adapters!r}: expected a name, None, or one of these for each image")
        names = [adapters] * len(image) if adapters is None or isinstance(adapters, str) else list(adapters)
        if len(names) != len(image):
            raise ValueError(f"adapters has {len(names)} names: expected one for each of the {len(image)} images")
        for row, name in enumerate(names):
            if name is not None and not isinstance(name, str):
                raise TypeError(f"adapters[{row}]={name!r}: expected a name, or None for the bare backbone")
        rows: dict[str | None, list[int]] = {adapters: []} if adapters is None or isinstance(adapters, str) else {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        groups = []
        for name, places in (rows or {None: []}).items():
            model = self if name is None else self._adapters.get(name)
            if model is None:
                where = f"adapters[{places[0]}]" if places else "adapters"
                raise ValueError(f"{where}={name!r}: expected None or {self._known()}")
            if model.backbone is not self.backbone:
                raise ValueError(f"the adapter {name!r} is around another backbone: expected that of the bank")
            groups.append(_Group(model, _rows(places, len(image), image.device)))
        return groups

    def _mixes(self, image: Tensor, groups: Sequence[_Group]) -> bool:
        """Whether these groups can pass through the backbone together."""
        models = [group.model for group in groups]
        if not (self._takes_fast_path(image) and all(m is self or _has_usual_steps(m) for m in models)):
            return False
        lengths = {_lengths(model) for model in models}
        same = len(lengths) == 1 and None not in lengths
        return same or "lengths" in self._family.SUPPORTS

    def _alone(self, group: _Group, image: Tensor, features: bool = False) -> Tensor:
        """The result of a group by its own model."""
        model, image = group.model, group.of(image)
        if model is self:
            return super().forward_features(image) if features else super().forward(image)
        return model.forward_features(image) if features else model(image)

    def _mixed(self, image: Tensor, groups: Sequence[_Group], num_queries: int | None) -> Tensor:
        """As ``_features``, with the prompts of each image's adapter."""
        self._family.check_image(self.backbone, image)
        made = [group.model._prompted_patches(group.of(image)) for group in groups]
        patches = _whole(groups, [patches for patches, _ in made], len(image))
        context = [group._replace(context=own) for group, (_, own) in zip(groups, made, strict=True)]
        grid, last = self._grid(image), len(self.widths) - 1
        (tokens,) = self._embed_and_run(patches, context, grid, [last], num_queries)
        return self._family.final_norm(self.backbone, tokens, grid)

    def prompt_image(self, image: Tensor) -> tuple[Tensor, None]:
        """The image, which the bare backbone reads as it is."""
        return image, None

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """The prompts of a block, padded where images have fewer; the bare backbone has none."""
        groups, parts = [], []
        for group in context or ():
            prompts = group.model.block_prompts(block, group.context, len(group.rows))
            if prompts is not None:
                groups.append(group)
                parts.append(prompts.tokens)
        if not parts:
            return None
        tokens = _whole(groups, parts, batch)
        if sum(map(len, parts)) == batch and len({part.shape[1] for part in parts}) == 1:
            return Prompts(tokens)
        lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        for group, part in zip(groups, parts, strict=True):
            lengths[group.rows] = part.shape[1]
        return Prompts(tokens, lengths)


def _rows(places: list[int], batch: int, device: torch.device) -> Tensor:
    """The places of some images of a batch, without waiting for a GPU.

    Raises:
        RuntimeError: while a CUDA graph is captured, unless they are all of the batch.
    """
    if len(places) == batch:
        return torch.arange(batch, device=device)
    if cuda_graphs.is_capturing(device):  # which would read the places from memory that is gone
        raise RuntimeError("a CUDA graph of several adapters is captured: expected one adapter for all images")
    rows = torch.tensor(places, dtype=torch.int64, device="cpu")
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def _has_usual_steps(model: PromptedViT) -> bool:
    """Whether a model's result is its head's, of what the backbone makes of its patches and its prompts."""
    if any(vars(model)[hooks] for hooks in HOOKS) or type(model).__call__ is not nn.Module.__call__:
        return False
    if coverage.overridden(model, *model.replaced_methods, "forward", "block_prompts", "feature_prompt"):
        return False
    return not (model._own_reason() or model._carries_prompts)


def _lengths(model: PromptedViT) -> tuple[int, ...] | None:
    """The numbers of prompts that a model has in its blocks; None if what is not known decides."""
    if not isinstance(model, InsVPViT):
        return (0,) * len(model.widths)
    specific: Any = model.specific_prompter
    if coverage.overridden(model, *STEPS) or not (specific is None or coverage.covers(specific)):
        return None
    made = 0 if specific is None else specific.conv1.out_channels
    length = made if model.common_prompts is None else max(made, model.config.prompt_length)
    return tuple(length * (block in model.prompted_blocks) for block in range(len(model.widths)))


def _whole(groups: Sequence[_Group], parts: Sequence[Tensor], batch: int, padding: float = 0.0) -> Tensor:
    """The groups' parts of a batch, put together; shorter and missing ones are filled up in the second dimension."""
    if len(parts) == 1 and len(parts[0]) == batch:
        return parts[0]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    shape = batch, max(part.shape[1] for part in parts), *parts[0].shape[2:]
    whole = torch.full(shape, padding, dtype=dtype, device=parts[0].device)
    for group, part in zip(groups, parts, strict=True):
        whole[:, : part.shape[1]].index_copy_(0, group.rows, part.to(dtype))
    return whole
