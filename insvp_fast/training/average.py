"""A moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

__all__ = ["WeightAverage", "copy_weights"]


class WeightAverage:
    """An exponential moving average (EMA) of parameters; with a decay of 0 there is none, and the methods do nothing.

    timm averages whole models; here the frozen backbone is left out.

    Args:
        parameters: the trained parameters by name.
        decay: reached after a warm-up, without which a short run would mostly average the initial weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.ema = ModelEmaV3(self._as_module(), decay, use_warmup=True) if decay else None

    def update(self, step: int) -> None:
        """Include the weights after ``step`` optimizer steps."""
        if self.ema:
            self.ema.update(self._as_module(), step=step)

    def weights(self) -> dict[str, Tensor]:
        """The average by the parameters' names; empty without one."""
        if self.ema is None:
            return {}
        return {key: p.detach() for key, p in zip(self.parameters, self.ema.module, strict=True)}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the average to what ``weights`` returned."""
        if self.ema:
            copy_weights(self.ema.module, [weights[key] for key in self.parameters])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the parameters have the averaged weights."""
        before = [p.detach().clone() for p in self.parameters.values()] if self.ema else []
        self.apply()
        try:
            yield
        finally:
            if self.ema:
                copy_weights(self.parameters.values(), before)

    def apply(self) -> None:
        """Set the parameters to the average."""
        if self.ema:
            copy_weights(self.parameters.values(), self.weights().values())

    def _as_module(self) -> nn.Module:
        return nn.ParameterList(self.parameters.values())


@torch.no_grad()
def copy_weights(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values into parameters or buffers, one by one."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
