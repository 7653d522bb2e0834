"""What this machine can do: which products its CPU has instructions for, how wide its vectors are."""

from __future__ import annotations

import torch

from insvp_fast.runtime import torch_private

__all__ = ["has_products", "wide_vectors"]


def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices in ``dtype`` at full speed.

    fp32 and wider always, 16 bits where oneDNN has instructions for it. Elsewhere PyTorch's 16-bit products are scalar
    code, a hundred times slower than widening the operands to fp32.
    """
    return bool(torch_private.HAS_PRODUCTS.get(dtype, True))


def wide_vectors() -> bool:
    """Whether PyTorch runs its AVX-512 code here."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()
