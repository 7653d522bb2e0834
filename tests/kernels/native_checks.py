"""What the tests of the native kernels share: when they run, and the errors that they allow."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from insvp_fast.runtime.native import native_status

F32, BF16 = torch.float32, torch.bfloat16

needs_library = pytest.mark.skipif(not native_status(), reason=str(native_status()))


def assert_close(name: str, value: Tensor, exact: Tensor) -> None:
    """fp32: 1e-5 of the largest value, for sums whose terms cancel; bf16: one rounding (2**-8) more."""
    assert value.shape == exact.shape, name
    rounding = 2**-8 * exact.abs() if value.dtype == BF16 else 0.0
    scale = exact.abs().max() if exact.numel() else 0.0
    excess = (value.double() - exact).abs() - rounding - 1e-5 * scale
    assert (excess <= 0).all(), f"{name}: {excess.max().item():.1e} over the bound, largest value {scale:.1e}"


def assert_same_bits(runs: Sequence[Sequence[Tensor]]) -> None:
    """All runs gave the same tensors."""
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
