"""Frozen weights in the form that a product wants: cast, transposed and packed once, and again when the weight changes.

A frozen backbone multiplies by the same matrices in every step, forward by W and backward by W transposed. Under
autocast PyTorch casts
them anew at every use, and oneDNN reorders them anew at every call; here each form is made once. A form is found by
the weight's storage and
version counter, so it is never stale: loading a state dict, moving or casting the model and in-place updates all make
it anew. (Writes
through ``weight.data`` escape PyTorch's version counter, here as in autograd.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from insvp_fast import cpu, native

__all__ = ["cpu_product", "linear", "linear_bwd"]

_Key = tuple[object, ...]
_forms: dict[_Key, tuple[StorageWeakRef, int, Tensor]] = {}


def form_of(weight: Tensor, name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
    """The form ``name`` of ``weight`` in ``dtype``, made by ``make`` where it is new or the weight has changed."""
    if weight.is_inference():  # has no version counter
        return make()
    storage = StorageWeakRef(weight.untyped_storage())  # keeps the address from being used again, not the memory
    key = (storage.cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, name, dtype)
    kept = _forms.get(key)
    if kept is None or kept[1] != weight._version:
        for old in [old for old, (owner, _, _) in _forms.items() if owner.expired()]:
            del _forms[old]
        with torch.no_grad():
            kept = _forms[key] = (storage, weight._version, make())
    return kept[2]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [..., D_in] -> [..., D_out]
    """x @ weight.T + bias in the dtype of x, accumulated in fp32."""
    return _product(x, weight, bias, "forward")


def linear_bwd(grad: Tensor, weight: Tensor) -> Tensor:  # [..., D_out] -> [..., D_in]
    """grad @ weight, the gradient of ``linear`` by x."""
    return _product(grad, weight, None, "backward")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, direction: str) -> Tensor:
    how, dtype = cpu_product(x.dtype) if x.device.type == "cpu" else "plain", x.dtype
    if how == "widened":
        how, dtype = cpu_product(torch.float32), torch.float32
    # two dimensions, or PyTorch may take a batched product for one with a transposed weight
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if bias is None else _cast(bias, dtype)

    def packed(pack: Callable[[Tensor], Tensor]) -> Tensor:
        return form_of(weight, f"{how} {direction}", dtype, lambda: pack(_oriented(weight.to(dtype), direction)))

    if how == "native":
        out_features = weight.shape[0 if direction == "forward" else 1]
        y = native.linear(rows, packed(native.pack_linear), bias, out_features)
    elif how == "packed" and len(rows):
        y = torch.ops.mkldnn._linear_pointwise(rows, packed(_pack), bias, "none", [], "")
    else:
        y = F.linear(rows, _oriented(_cast(weight, dtype), direction), bias)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _oriented(weight: Tensor, direction: str) -> Tensor:  # as F.linear wants it
    return weight if direction == "forward" else weight.T


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else form_of(weight, "cast", dtype, lambda: weight.to(dtype))


@cache
def cpu_product(dtype: torch.dtype) -> str:
    """How this CPU multiplies by a frozen weight in ``dtype``: "packed", "native", "widened" or "plain".

    "packed": oneDNN with prepacked weights, where the CPU has the instructions and a self-test passes; for fp32 with
    AVX-512. "native": the native library's product, also with prepacked weights, for fp32 with AVX2 alone, where it is
    the faster one. "widened": 16-bit operands multiplied in fp32, where the CPU has no instructions for 16 bits.
    "plain": ``torch.nn.functional.linear``.
    """
    if not cpu.has_products(dtype):
        return "widened"
    half = dtype in (torch.bfloat16, torch.float16)
    if (half or (dtype == torch.float32 and cpu.wide_vectors())) and _works(_packed_product, dtype):
        return "packed"
    avx2 = native.native_status().isa == "avx2" and not cpu.wide_vectors()
    return "native" if dtype == torch.float32 and avx2 and _works(_native_product, dtype) else "plain"


def _works(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bool:
    x, w = torch.linspace(-1, 1, 7 * 48).view(7, 48).to(dtype), torch.linspace(1, -1, 64 * 48).view(64, 48).to(dtype)
    try:
        y = product(x, w)
    except (AttributeError, RuntimeError):  # private operators: absent from this build, or refused on this CPU
        return False
    exact = x.double() @ w.double().T
    return bool((y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max())


def _packed_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _pack(weight), None, "none", [], "")


def _native_product(x: Tensor, weight: Tensor) -> Tensor:
    return native.linear(x, native.pack_linear(weight), None, len(weight))


def _pack(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())
