"""Products with frozen weights.

A frozen backbone multiplies by the same matrices in every step, forward by W and backward by W transposed. Under
autocast PyTorch casts them at every use, and oneDNN reorders them at every call; here they are cast, transposed and
packed once (``prepack.py``).

The frozen affine map of the norm before a product is folded into it: (g*x + s) @ W.T + b is x @ (W*g).T + (W @ s + b),
exact but for the rounding of W*g. So is a frozen factor of its outputs, the layer scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.runtime import hardware, native, torch_private
from insvp_fast.runtime.activations import ACTIVATIONS, activate, activate_bwd
from insvp_fast.runtime.dtypes import widened
from insvp_fast.runtime.prepack import packed

HALF = (torch.bfloat16, torch.float16)

__all__ = [
    "FrozenLinear",
    "cpu_provider",
    "linear",
    "linear_activation",
    "linear_activation_bwd",
    "linear_bwd",
    "onednn_works",
    "override_provider",
    "provider",
]


class FrozenLinear(NamedTuple):
    """A frozen linear layer: scale * ((gain*x + shift) @ weight.T + bias), its outputs ``first`` to before ``last``."""

    weight: Tensor  # [D_out, D_in]; a convolution's, of more dimensions, counts as flattened to two
    bias: Tensor | None = None
    gain: Tensor | None = None  # [D_in], the affine map of the norm before
    shift: Tensor | None = None
    scale: Tensor | None = None  # [D_out]
    first: int = 0
    last: int | None = None

    @classmethod
    def of(
        cls, layer: Any, gain: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> FrozenLinear:
        """All outputs of an ``nn.Linear``, or of a convolution without overlap."""
        return cls(layer.weight, layer.bias, gain, shift, scale)

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """All that the operands of a product are made of."""
        return self.weight, self.bias, self.gain, self.shift, self.scale

    @property
    def out_features(self) -> int:
        return (self.weight.shape[0] if self.last is None else self.last) - self.first

    @property
    def in_features(self) -> int:
        return prod(self.weight.shape[1:])

    def plain(self, dtype: torch.dtype, direction: str) -> tuple[Tensor, Tensor | None]:
        """The folded weight and bias in ``dtype``, kept for both directions and all outputs; W and b themselves where
        they serve."""
        own_matrix = self.gain is None and self.scale is None and self.weight.dtype == dtype
        own_constant = self.shift is None and (self.bias is None or (self.scale is None and self.bias.dtype == dtype))

        def make() -> tuple[Tensor | None, Tensor | None]:  # not W or b, which would keep themselves alive
            constant = None if own_constant else self._constant()
            return None if own_matrix else self._matrix().to(dtype), None if constant is None else constant.to(dtype)

        matrix, constant = self.weight.flatten(1), self.bias
        if not (own_matrix and own_constant):
            made = packed(self.sources, ("plain", dtype), make, look=direction == "forward")
            matrix = matrix if made[0] is None else made[0]
            constant = constant if own_constant else made[1]
        if self.first == 0 and self.last in (None, matrix.shape[0]):
            return matrix, constant
        rows = slice(self.first, self.last)
        return matrix[rows], None if constant is None else constant[rows]

    def operands(self, how: str, dtype: torch.dtype, direction: str) -> tuple[Tensor, Tensor | None]:
        """The folded weight packed for the provider ``how``, for "backward" transposed, and for "forward" the bias."""
        forward, rows = direction == "forward", slice(self.first, self.last)

        def make() -> tuple[Tensor, Tensor | None]:
            matrix = self._matrix()[rows] if forward else self._matrix()[rows].T
            constant = self._constant() if forward else None
            if constant is not None:  # a copy: nothing that is kept may keep the weights alive
                constant = constant[rows].to(torch.float32 if how == "native" else dtype, copy=True)
            if how != "native" or matrix.dtype == torch.float64:  # which native packing does not read
                matrix = matrix.to(dtype)
            return native.pack_linear(matrix, dtype) if how == "native" else _pack(matrix), constant

        return packed(self.sources, (how, direction, self.first, self.last, dtype), make, look=forward)

    def _matrix(self) -> Tensor:
        weight = self.weight.flatten(1)
        if self.gain is None and self.scale is None and weight.dtype in (torch.float32, torch.bfloat16):
            return weight
        weight = weight.to(widened(weight.dtype))
        weight = weight if self.gain is None else weight * self.gain.to(weight.dtype)
        return weight if self.scale is None else weight * self.scale.to(weight.dtype).unsqueeze(1)

    def _constant(self) -> Tensor | None:
        constant = self.bias
        if self.shift is not None:
            # a matrix product would have the precision that PyTorch is set to, and this is kept for other settings
            wide = widened(self.weight.dtype)
            constant = (self.weight.flatten(1).to(wide) * self.shift.to(wide)).sum(1)
            constant = constant if self.bias is None else constant + self.bias
        if constant is None or self.scale is None:
            return constant
        wide = widened(constant.dtype)
        return constant.to(wide) * self.scale.to(wide)


def linear(x: Tensor, w: FrozenLinear, how: str) -> Tensor:  # [..., D_in] -> [..., n]
    """The product in the dtype of x, accumulated in at least fp32, by the provider ``how``.

    ``how``: "native", "onednn", "widened" or "plain", see ``cpu_provider``; so in all functions here.
    """
    dtype = x.dtype
    if _widens(x, w, how):
        return linear(x.float(), w, provider(torch.float32, x.device)).to(dtype)
    if how == "native":
        return _unflat(native.linear(_flat(x), *w.operands(how, dtype, "forward"), w.out_features), x)
    if how == "onednn" and x.numel():
        matrix, constant = w.operands(how, dtype, "forward")
        return _by_rows(torch_private.packed_linear, x, matrix, constant)
    return _by_rows(F.linear, x, *w.plain(dtype, "forward"))


def linear_bwd(grad: Tensor, w: FrozenLinear, how: str) -> Tensor:  # [..., n] -> [..., D_in]
    """The gradient of ``linear`` by x."""
    dtype = grad.dtype
    if _widens(grad, w, how):
        return linear_bwd(grad.float(), w, provider(torch.float32, grad.device)).to(dtype)
    if how == "native":
        return _unflat(native.linear(_flat(grad), w.operands(how, dtype, "backward")[0], None, w.in_features), grad)
    if how == "onednn" and grad.numel():
        matrix, _ = w.operands(how, dtype, "backward")
        return _by_rows(torch_private.packed_linear, grad, matrix, None)
    matrix, _ = w.plain(dtype, "backward")
    return _by_rows(F.linear, grad, matrix.T, None)


def _widens(x: Tensor, w: FrozenLinear, how: str) -> bool:
    """Whether to multiply in fp32, in both directions alike: a backward pass relies on the look of the forward pass.

    Also where NaN would leave its row (``rows``); rows of whole tiles keep it.
    """
    if how in ("widened", "native"):
        return how == "widened"
    ragged = w.in_features % 32 != 0 or w.out_features % 32 != 0
    return ragged and x.is_cpu and hardware.has_tiles(x.dtype)


def linear_activation(
    x: Tensor, w: FrozenLinear, activation: str, keep: bool, how: str
) -> tuple[Tensor, Tensor]:  # [..., D_in] -> [..., n]
    """``linear``, of size 0 unless ``keep``, and its activation, one of ``ACTIVATIONS``."""
    if how == "native":
        matrix, constant = w.operands(how, x.dtype, "forward")
        code = ACTIVATIONS.index(activation)
        pre, hidden = native.linear_activation(_flat(x), matrix, constant, w.out_features, code, keep=keep)
        return x.new_empty(0) if pre is None else _unflat(pre, x), _unflat(hidden, x)
    pre = linear(x, w, how)
    return pre if keep else x.new_empty(0), activate(pre, activation)


def linear_activation_bwd(grad: Tensor, w: FrozenLinear, pre: Tensor, activation: str, how: str) -> Tensor:
    """The gradient of ``linear(activate(pre), w)`` by ``pre``."""
    if how == "native":
        matrix, _ = w.operands(how, grad.dtype, "backward")
        code = ACTIVATIONS.index(activation)
        return _unflat(native.linear_activation_bwd(_flat(grad), matrix, _flat(pre), code), pre)
    return activate_bwd(linear_bwd(grad, w, how), pre, activation)


def _by_rows(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, matrix: Tensor, constant: Tensor | None
) -> Tensor:
    # two dimensions, or PyTorch may take a batched product for one with a transposed weight
    y = product(_rows(x), matrix, constant)
    return y.view(*x.shape[:-1], y.shape[-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])  # -1 is no size where there are no columns


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim in (2, 3) else _rows(x)  # what the native product takes


def _unflat(y: Tensor, x: Tensor) -> Tensor:
    """What has been made of ``_flat(x)``, with the dimensions of ``x``."""
    return y if x.ndim in (2, 3) else y.view(*x.shape[:-1], y.shape[-1])


def provider(dtype: torch.dtype, device: torch.device) -> str:
    """What multiplies by a frozen weight in ``dtype`` on ``device``, see ``cpu_provider``."""
    if device.type != "cpu":
        return "plain"
    return _override(dtype) if _override is not None else cpu_provider(dtype)


_override: Callable[[torch.dtype], str] | None = None


@contextmanager
def override_provider(choose: Callable[[torch.dtype], str]) -> Iterator[None]:
    """Take the provider that ``choose`` names for a dtype on the CPU, to measure one beside another."""
    global _override
    before, _override = _override, choose
    try:
        yield
    finally:
        _override = before


def cpu_provider(dtype: torch.dtype) -> str:
    """How this CPU multiplies by a frozen weight in ``dtype``: "native", "onednn", "widened" or "plain".

    "native": the native library's product with prepacked weights, for fp32 and bf16 with at least AVX2; where the CPU
    has matrix tiles (AMX), for bf16 only if the library uses them. "onednn": oneDNN with prepacked weights, for 16 bits
    where the CPU has instructions for them, for fp32 with AVX-512. "widened": 16-bit operands multiplied in fp32, where
    there are none. "plain": ``torch.nn.functional.linear``. The first two only if a self-test passes.
    """
    return _cpu_provider(dtype, native.native_status())


@cache
def _cpu_provider(dtype: torch.dtype, status: native.NativeStatus) -> str:
    tiles = dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_tile", False)
    fast = status.isa == "amx" if tiles else status.isa != "generic"
    if native.available(dtype) and fast and _works(_native_product, dtype):
        return "native"
    if not hardware.has_products(dtype):
        return "widened"
    packs = dtype in HALF or (dtype == torch.float32 and hardware.wide_vectors())
    return "onednn" if packs and onednn_works(dtype) else "plain"


def onednn_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies by packed weights in ``dtype`` here."""
    return _works(_onednn_product, dtype)


@cache
def _works(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bool:
    with ThreadPoolExecutor(1) as thread:  # which modes, transforms and the default device of the caller do not reach
        return thread.submit(_gives_products, product, dtype).result()


def _gives_products(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bool:
    def numbers(first: float, rows: int) -> Tensor:
        return torch.linspace(first, -first, rows * 48, dtype=torch.float32).view(rows, 48).to(dtype)

    x, w = numbers(-1, 7), numbers(1, 64)
    try:
        y = product(x, w)
    except (AttributeError, RuntimeError):  # private operators: absent from this build, or refused on this CPU
        return False
    exact = x.double() @ w.double().T
    return bool((y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max())


def _onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch_private.packed_linear(x, _pack(weight), None)


def _native_product(x: Tensor, weight: Tensor) -> Tensor:
    return native.linear(x, native.pack_linear(weight, weight.dtype), None, len(weight))


def _pack(matrix: Tensor) -> Tensor:
    return torch_private.pack_linear(matrix.contiguous())
