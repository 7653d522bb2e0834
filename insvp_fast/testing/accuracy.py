"""How far a result may be from the exact one: relative errors, and the rounding errors that are allowed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_within_budget", "relative_error"]


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value - exact‖ / ‖exact‖ in double precision; 0 for two empty or two zero tensors."""
    value, exact = value.double(), exact.double()
    return ((value - exact).norm() / exact.norm().clamp_min(1e-300)).item() if exact.numel() else 0.0


def assert_within_budget(value: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "value") -> None:
    """Assert that the relative error of ``value`` is at most twice that of ``plain`` plus one rounding in ``dtype``.

    Args:
        value: the result to check.
        plain: the reference's result in the same precision.
        exact: the reference's result in double precision.
        what: what the message calls the value.
    """
    error, allowed = relative_error(value, exact), 2 * relative_error(plain, exact) + torch.finfo(dtype).eps
    assert error <= allowed, f"{what}: relative error {error:.2e}, more than {allowed:.2e}"
