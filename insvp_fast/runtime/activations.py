"""The activations of an MLP, by name, and their derivatives, in PyTorch's own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.runtime.dtypes import widened

__all__ = ["ACTIVATIONS", "activate", "activate_bwd"]

# GELU in its exact (erf) form; its approximation by tanh; x * sigmoid(1.702 x); x * sigmoid(x). Their order is that of
# the codes in kernels/cpu/common/abi.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
QUICK = 1.702


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of x in its dtype, computed in at least fp32."""
    if activation == "silu":
        return F.silu(x)
    if activation == "quick_gelu":
        wide = x.to(widened(x.dtype))
        return (wide * torch.sigmoid(QUICK * wide)).to(x.dtype)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_bwd(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """``grad`` times the derivative at x, in the dtype of x."""
    result: Tensor
    if activation == "silu":
        result = torch.ops.aten.silu_backward(grad, x)
    elif activation == "quick_gelu":
        wide = x.to(widened(x.dtype))
        gate = torch.sigmoid(QUICK * wide)
        result = (grad * (gate + wide * (QUICK * gate * torch.sigmoid(-QUICK * wide)))).to(x.dtype)
    else:
        result = torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result
