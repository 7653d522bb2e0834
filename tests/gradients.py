"""What the tests of operations share: results with their gradients, and operands in another precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The results of a function, then the gradients by the inputs that require one, of a fixed random loss."""
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(seed)
    grads = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in out]
    return [*out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grads)]


def copies(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The inputs in another dtype, as leaves."""
    return [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]
