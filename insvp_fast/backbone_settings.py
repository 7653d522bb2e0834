"""How a frozen backbone is computed on the fast path: settings of a model that may change at any time."""

from __future__ import annotations

from typing import Any

from torch import nn

from insvp_fast.backbones import attention_choices, has_gated_mlp

__all__ = ["BackboneSettings"]


class BackboneSettings(nn.Module):
    """``InsVPViT`` explains these.

    Attributes:
        recompute, fold_norm, attention, gelu_in_8_bits, cuda_graphs: how the backbone is computed.
    """

    backbone: Any
    fold_norm: bool = True
    cuda_graphs: bool = True
    _attention = "auto"
    _recompute = "none"
    _gelu_in_8_bits = False

    @property
    def attention(self) -> str:
        """The implementation of attention, one of ``ops.ATTENTION``.

        Setting another, or one that this backbone's attention does not have, raises ValueError.
        """
        return self._attention

    @attention.setter
    def attention(self, impl: str) -> None:
        if impl not in (choices := attention_choices(self.backbone)):
            kind = type(self.backbone).__name__
            raise ValueError(f"attention={impl!r}: expected one of {sorted(choices)} for a {kind}")
        self._attention = impl

    @property
    def recompute(self) -> str:
        """What backward computes again: "none", "mlp" or "block"; setting anything else raises ValueError."""
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in ("none", "mlp", "block"):
            raise ValueError(f"recompute={what!r}: expected 'none', 'mlp' or 'block'")
        self._check_kept(what, self.gelu_in_8_bits)
        self._recompute = what

    @property
    def gelu_in_8_bits(self) -> bool:
        """Whether MLPs keep 8 bits for backward; raises ValueError if set where they cannot."""
        return self._gelu_in_8_bits

    @gelu_in_8_bits.setter
    def gelu_in_8_bits(self, wanted: bool) -> None:
        self._check_kept(self.recompute, wanted)
        self._gelu_in_8_bits = wanted

    def _check_kept(self, recompute: str, in_8_bits: bool) -> None:
        if in_8_bits and recompute == "mlp":
            raise ValueError("recompute='mlp' keeps nothing of GELU: expected gelu_in_8_bits=False with it")
        if in_8_bits and has_gated_mlp(self.backbone):
            kind = type(self.backbone).__name__
            raise ValueError(f"the gated MLPs of this {kind} do not go with it: expected gelu_in_8_bits=False")
