"""TunedViT: a backbone of timm with a ``Tuning``, module by module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from insvp_fast.checkpoints.adapter_config import BackboneRecord
from insvp_fast.checkpoints.backbone import create_backbone, difference, settings_of, unlike_timm
from insvp_fast.methods.checkpoint import MethodCheckpoint, options_of, require_method
from insvp_fast.methods.tuning import Branch, Tuning
from insvp_fast.reference import structure_of, take_head
from insvp_fast.reference.heads import DistilledHead, leaves_backbone, refuse_arguments, reset_classifier
from insvp_fast.reference.structure import pixel_layer
from insvp_fast.timm_interface import TimmInterface

__all__ = ["TunedViT"]


class TunedViT(MethodCheckpoint):
    """A backbone of timm with a trained head and a method that changes the backbone.

    There is no fast path: its operations assume frozen blocks, and skip products that such methods need. Where the
    first parts of the backbone are frozen and have nothing beside them, autograd keeps nothing of them.

    Args:
        backbone: a name for ``create_backbone``, or a module of timm, which becomes part of the model.
        num_classes: classes of a new head; None keeps the backbone's own head, 0 returns pooled features.
        method: makes the method for a backbone: a subclass of ``Tuning``, or ``functools.partial`` of one.
        pretrained, backbone_kwargs: for ``create_backbone``, where the backbone is a name.

    Raises:
        TypeError: if the backbone is not a model of timm, or ``method`` makes no ``Tuning``.
        ValueError: if the method cannot be used with such a backbone, or the backbone has two heads, or belongs to
            another ``TunedViT``, whose trained modules would run here as well.
    """

    KIND = Tuning

    @leaves_backbone
    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        method: Callable[[nn.Module], Tuning],
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        require_method(method, Tuning)
        super().__init__()
        module: Any = backbone
        if isinstance(backbone, str):
            module = create_backbone(backbone, pretrained, **backbone_kwargs)
        else:
            refuse_arguments(backbone_kwargs, pretrained)
        structure_of(module)
        if any(isinstance(hook, Branch) for part in module.modules() for hook in part._forward_hooks.values()):
            raise ValueError("the backbone has the branches of another model: expected a copy of its own")
        self._record, self._change, weight = BackboneRecord.of(module), unlike_timm(module), pixel_layer(module).weight
        if num_classes is not None:
            reset_classifier(module, num_classes)
        self.num_classes: int = module.num_classes
        head = take_head(module)
        if isinstance(head, DistilledHead):
            raise ValueError("the backbone has two heads, as a distilled DeiT: expected one")
        self.backbone = module.requires_grad_(False).eval()
        with torch.device(weight.device):
            made = method(module)
            if not isinstance(made, Tuning):
                raise TypeError(f"method= makes a {type(made).__name__}: expected a Tuning")
            self.method = made.to(weight.dtype)
            self.head = self.method.make_head(head).to(weight.dtype).requires_grad_(True)
        self._options = options_of(method)
        for trained in self.method.trained_modules(module):
            trained.requires_grad_(True)
        self._saved, self._settings = self._trained_keys(), settings_of(module)

    def _trained_keys(self) -> frozenset[str]:
        """The keys of what is trained, and of the buffers that belong to it."""
        whole = {id(module) for module in self.method.trained_modules(self.backbone)}
        names = tuple(f"{name}." for name, module in self.named_modules() if id(module) in whole)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return frozenset(
            key
            for key in self.state_dict()
            if key in trained or key.startswith(names) or not key.startswith("backbone.")
        )

    def _adapter(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.state_dict().items() if key in self._saved}

    def _backbone_record(self) -> BackboneRecord:
        return self._record.unless(self._change or difference(settings_of(self.backbone), self._settings))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        for module in self.method.trained_modules(self.backbone):
            module.train(mode)
        return self

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]."""
        return self.head(self.pooled_features(image))

    def pooled_features(self, image: Tensor) -> Tensor:
        """What the head reads of images [B, C, H, W]: [B, D]."""
        features = self.backbone.forward_head(self.backbone.forward_features(image), pre_logits=True)
        return self.method.combine(image, features)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks of the backbone again in backward, instead of keeping what is in them."""
        self.backbone.set_grad_checkpointing(enable)

    # what timm's code reads from a model, which else takes defaults that are not the backbone's
    pretrained_cfg, default_cfg = TimmInterface.pretrained_cfg, TimmInterface.default_cfg
    group_matcher, _place = TimmInterface.group_matcher, TimmInterface._place
    no_weight_decay = TimmInterface.no_weight_decay
    get_nb_trainable_parameters = TimmInterface.get_nb_trainable_parameters
    print_trainable_parameters = TimmInterface.print_trainable_parameters
