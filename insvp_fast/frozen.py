"""Frozen weights in the form that a product wants: cast, transposed and packed once, and again when they change.

A frozen backbone multiplies by the same matrices in every step, forward by W and backward by W transposed. Under
autocast PyTorch casts them anew at every use, and oneDNN reorders them anew at every call; here each form is made once
and kept beside the weight, for as long as that lives. It is made anew when PyTorch's version counter or the weight's
memory, dtype or shape says that the weight has changed: after loading a state dict, moving or casting the model,
updates in place.

The frozen affine map of the norm before a product is folded into it: (g*x + s) @ W.T + b is x @ (W*g).T + (W @ s + b),
exact but for the rounding of W*g.

A CUDA graph reads the forms that it was captured with: capture it after a warm-up, and again when weights have changed.
What the version counter does not see has to be followed by ``forget()``: writes through ``weight.data``, through a
NumPy array that shares the memory, or by ``torch.distributed`` collectives on the weights themselves (DDP's own are
seen).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from insvp_fast import cpu, native

__all__ = ["cpu_product", "forget", "form_of", "linear", "linear_bwd", "linear_gelu", "linear_gelu_bwd"]


class _Form(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]
    storages: tuple[StorageWeakRef, ...]  # keep the addresses from being used again, not the memory
    state: tuple[object, ...]
    tensor: Tensor


_forms: dict[tuple[object, ...], _Form] = {}
_captured: dict[int, Tensor] = {}
_lock = threading.Lock()


def forget() -> None:
    """Drop all kept forms, but those that CUDA graphs read; each is made anew when it is next used."""
    with _lock:
        _forms.clear()


def form_of(weights: Sequence[Tensor], name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
    """The form ``name`` of ``weights`` in ``dtype``, made by ``make`` where it is new or one of them has changed."""
    if any(weight.is_inference() for weight in weights):  # they have no version counter
        return make()
    key = *map(id, weights), name, dtype
    storages = tuple(StorageWeakRef(weight.untyped_storage()) for weight in weights)
    state = tuple(
        (w._version, storage.cdata, w.storage_offset(), w.dtype, w.shape, w.stride())
        for w, storage in zip(weights, storages, strict=True)
    )
    form = _forms.get(key)
    fresh = (
        form is not None and form.state == state and all(o() is w for o, w in zip(form.owners, weights, strict=True))
    )
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        if form is None or not fresh:  # memory taken while a CUDA graph is captured belongs to the graph
            return make()
        _captured[form.tensor.data_ptr()] = form.tensor  # the graph will read it whatever becomes of the weight
    if form is None or not fresh:
        with torch.no_grad():
            owners = tuple(weakref.ref(weight, lambda owner: _drop(key, owner)) for weight in weights)
            form = _Form(owners, storages, state, make())
        with _lock:
            _forms[key] = form
    return form.tensor


def _drop(key: tuple[object, ...], owner: weakref.ref[Tensor]) -> None:
    form = _forms.get(key)
    if form is not None and any(o is owner for o in form.owners):  # and not that of a new weight with the same id
        _forms.pop(key, None)


class Frozen(NamedTuple):
    """A frozen linear layer: (gain*x + shift) @ weight.T + bias, its outputs from ``first`` to before ``last``."""

    weight: Tensor  # [D_out, D_in]; a convolution's, of more dimensions, counts as flattened to two
    bias: Tensor | None = None
    gain: Tensor | None = None  # [D_in], the affine map of the norm before
    shift: Tensor | None = None
    first: int = 0
    last: int | None = None

    @property
    def out_features(self) -> int:
        return len(self.weight[self.first : self.last])

    @property
    def in_features(self) -> int:
        return self.weight[0].numel()

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W*g in ``dtype``, all rows, kept unless it is the weight itself."""
        if self.gain is None and self.weight.dtype == dtype:
            return self.weight.flatten(1)
        return form_of(self._sources(self.gain), "matrix", dtype, lambda: self._folded().to(dtype))

    def constant(self, dtype: torch.dtype) -> Tensor | None:
        """W @ s + b in ``dtype``, the rows asked for."""
        bias, shift = self.bias, self.shift
        if shift is None:
            if bias is None or bias.dtype == dtype:
                return None if bias is None else bias[self.first : self.last]
            return form_of([bias], "constant", dtype, lambda: bias.to(dtype))[self.first : self.last]

        def make() -> Tensor:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            constant = self.weight.flatten(1).to(wide) @ shift.to(wide)
            return (constant if bias is None else constant + bias).to(dtype)

        return form_of(self._sources(bias, shift), "constant", dtype, make)[self.first : self.last]

    def packed(self, how: str, direction: str, dtype: torch.dtype) -> Tensor:
        """The matrix, or for "backward" its transpose, as the product ``how`` wants it."""

        def make() -> Tensor:
            matrix = self._folded()[self.first : self.last]
            matrix = matrix if direction == "forward" else matrix.T
            return native.pack_linear(matrix, dtype) if how == "native" else _pack(matrix.to(dtype))

        return form_of(self._sources(self.gain), f"{how} {direction} {self.first}:{self.last}", dtype, make)

    def _folded(self) -> Tensor:
        weight = self.weight.flatten(1)
        if self.gain is None:
            return weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.to(torch.float32)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) * self.gain.to(wide)

    def _sources(self, *others: Tensor | None) -> list[Tensor]:
        return [self.weight, *(t for t in others if t is not None)]


def linear(x: Tensor, w: Frozen) -> Tensor:  # [..., D_in] -> [..., n]
    """The product in the dtype of x, accumulated in at least fp32."""
    how, dtype = _product(x), x.dtype
    if how == "widened":
        return linear(x.float(), w).to(dtype)
    if how == "native":
        y = native.linear(_flat(x), w.packed(how, "forward", dtype), w.constant(torch.float32), w.out_features)
        return y.view(*x.shape[:-1], w.out_features)
    bias = w.constant(dtype)
    if how == "packed":
        return _by_rows(lambda rows: _onednn(rows, w.packed(how, "forward", dtype), bias), x)
    return _by_rows(lambda rows: F.linear(rows, w.matrix(dtype)[w.first : w.last], bias), x)


def linear_bwd(grad: Tensor, w: Frozen) -> Tensor:  # [..., n] -> [..., D_in]
    """The gradient of ``linear`` by x."""
    how, dtype = _product(grad), grad.dtype
    if how == "widened":
        return linear_bwd(grad.float(), w).to(dtype)
    if how == "native":
        y = native.linear(_flat(grad), w.packed(how, "backward", dtype), None, w.in_features)
        return y.view(*grad.shape[:-1], w.in_features)
    if how == "packed":
        return _by_rows(lambda rows: _onednn(rows, w.packed(how, "backward", dtype), None), grad)
    return _by_rows(lambda rows: F.linear(rows, w.matrix(dtype)[w.first : w.last].T), grad)


def linear_gelu(x: Tensor, w: Frozen, keep: bool) -> tuple[Tensor, Tensor]:  # [..., D_in] -> [..., n] twice
    """``linear``, of size 0 unless ``keep``, and its GELU."""
    if _product(x) == "native":
        packed, bias = w.packed("native", "forward", x.dtype), w.constant(torch.float32)
        pre, hidden = native.linear_gelu(_flat(x), packed, bias, w.out_features, keep=keep)
        shape = *x.shape[:-1], w.out_features
        return x.new_empty(0) if pre is None else pre.view(shape), hidden.view(shape)
    pre = linear(x, w)
    return pre if keep else x.new_empty(0), F.gelu(pre)


def linear_gelu_bwd(grad: Tensor, w: Frozen, pre: Tensor) -> Tensor:
    """The gradient of ``linear(gelu(pre), w)`` by ``pre``."""
    if _product(grad) == "native":
        packed = w.packed("native", "backward", grad.dtype)
        return native.linear_gelu_bwd(_flat(grad), packed, _flat(pre)).view(pre.shape)
    return torch.ops.aten.gelu_backward(linear_bwd(grad, w), pre)


def _product(x: Tensor) -> str:
    if x.device.type != "cpu":
        return "plain"
    how = cpu_product(x.dtype)
    return "plain" if how == "packed" and not x.numel() else how


def _by_rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # two dimensions, or PyTorch may take a batched product for one with a transposed weight
    with torch.autocast(x.device.type, enabled=False):  # the dtype of x is that of the product
        y = product(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], y.shape[-1])


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim in (2, 3) else x.reshape(-1, x.shape[-1])  # what the native product takes


@cache
def cpu_product(dtype: torch.dtype) -> str:
    """How this CPU multiplies by a frozen weight in ``dtype``: "packed", "native", "widened" or "plain".

    "native": the native library's product with prepacked weights, for fp32 and bf16 with at least AVX2, unless the CPU
    has matrix tiles (AMX) for bf16. "packed": oneDNN with prepacked weights, for 16 bits where the CPU has instructions
    for them, for fp32 with AVX-512. "widened": 16-bit operands multiplied in fp32, where there are none. "plain":
    ``torch.nn.functional.linear``. The first two only if a self-test passes.
    """
    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    vectors = native.available(dtype) and native.native_status().isa != "generic"
    if vectors and not tiles and _works(_native_product, dtype):
        return "native"
    if not cpu.has_products(dtype):
        return "widened"
    half = dtype in (torch.bfloat16, torch.float16)
    packs = half or (dtype == torch.float32 and cpu.wide_vectors())
    return "packed" if packs and _works(_packed_product, dtype) else "plain"


def _works(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bool:
    x, w = torch.linspace(-1, 1, 7 * 48).view(7, 48).to(dtype), torch.linspace(1, -1, 64 * 48).view(64, 48).to(dtype)
    try:
        y = product(x, w)
    except (AttributeError, RuntimeError):  # private operators: absent from this build, or refused on this CPU
        return False
    exact = x.double() @ w.double().T
    return bool((y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max())


def _packed_product(x: Tensor, weight: Tensor) -> Tensor:
    return _onednn(x, _pack(weight), None)


def _native_product(x: Tensor, weight: Tensor) -> Tensor:
    return native.linear(x, native.pack_linear(weight, weight.dtype), None, len(weight))


def _pack(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())


def _onednn(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
