"""Frozen weights in the form that a product wants: cast, transposed and packed once, and again when they change.

A frozen backbone multiplies by the same matrices in every step, forward by W and backward by W transposed. Under
autocast PyTorch casts them anew at every use, and oneDNN reorders them anew at every call; here each form is made once
and kept beside the weight, for as long as that lives. It is made anew when PyTorch's version counter or the weight's
memory, dtype or shape says that the weight has changed: after loading a state dict, moving or casting the model,
updates in place.

What the version counter does not see has to be followed by ``forget()``: writes through ``weight.data``, through a
NumPy array that shares the memory, or by ``torch.distributed`` collectives on the weights themselves (DDP's own are
seen).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from insvp_fast import cpu, native

__all__ = ["cpu_product", "forget", "linear", "linear_bwd"]


class _Form(NamedTuple):
    owner: weakref.ref[Tensor]
    storage: StorageWeakRef  # keeps the address from being used again, not the memory
    state: tuple[object, ...]
    tensor: Tensor


_forms: dict[tuple[int, str, torch.dtype], _Form] = {}
_lock = threading.Lock()


def forget() -> None:
    """Drop all kept forms; each is made anew when it is next used."""
    with _lock:
        _forms.clear()


def form_of(weight: Tensor, name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
    """The form ``name`` of ``weight`` in ``dtype``, made by ``make`` where it is new or the weight has changed."""
    # inference tensors have no version counter; memory taken while a CUDA graph is captured belongs to the graph
    if weight.is_inference() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make()
    key = id(weight), name, dtype
    storage = StorageWeakRef(weight.untyped_storage())
    state = weight._version, storage.cdata, weight.storage_offset(), weight.dtype, weight.shape, weight.stride()
    form = _forms.get(key)
    if form is None or form.owner() is not weight or form.state != state:
        with torch.no_grad():
            form = _Form(weakref.ref(weight, lambda owner: _drop(key, owner)), storage, state, make())
        with _lock:
            _forms[key] = form
    return form.tensor


def _drop(key: tuple[int, str, torch.dtype], owner: weakref.ref[Tensor]) -> None:
    form = _forms.get(key)
    if form is not None and form.owner is owner:  # and not that of a new weight with the same id
        _forms.pop(key, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, first: int, last: int) -> Tensor:  # [..., D_in] -> [..., n]
    """x @ W.T + b in the dtype of x, accumulated in fp32, with the rows ``first`` to ``last`` of weight and bias."""
    bias = None if bias is None else _cast(bias, _product_dtype(x))[first:last]
    return _product(x, weight, bias, "forward", first, last)


def linear_bwd(grad: Tensor, weight: Tensor, first: int, last: int) -> Tensor:  # [..., n] -> [..., D_in]
    """grad @ W, the gradient of ``linear`` by x."""
    return _product(grad, weight, None, "backward", first, last)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, direction: str, first: int, last: int) -> Tensor:
    dtype = _product_dtype(x)
    how = cpu_product(dtype) if x.device.type == "cpu" else "plain"
    # two dimensions, or PyTorch may take a batched product for one with a transposed weight
    rows = x.reshape(-1, x.shape[-1]).to(dtype)

    def oriented(matrix: Tensor) -> Tensor:  # [n, D_in] or its transpose, as F.linear wants it
        matrix = matrix.flatten(1)[first:last]
        return matrix if direction == "forward" else matrix.T

    def packed(pack: Callable[[Tensor], Tensor]) -> Tensor:
        return form_of(weight, f"{how} {direction} {first}:{last}", dtype, lambda: pack(oriented(weight.to(dtype))))

    if how == "native":
        out_features = last - first if direction == "forward" else weight[0].numel()
        y = native.linear(rows, packed(native.pack_linear), bias, out_features)
    elif how == "packed" and len(rows):
        y = torch.ops.mkldnn._linear_pointwise(rows, packed(_pack), bias, "none", [], "")
    else:
        y = F.linear(rows, oriented(_cast(weight, dtype)), bias)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and cpu_product(x.dtype) == "widened" else x.dtype


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
