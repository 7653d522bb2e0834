"""The native CPU library: finding it, loading it with ctypes, and one typed function per operation.

Letters: `B` images, `C` channels, `H, W` image size, `P` patch side, `N` patches, `K = C*P*P`, `R` hidden width.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch  # before the library: torch's OpenMP runtime becomes the only one of the process
from torch import Tensor

_ABI = 2
_LIBRARY = Path(__file__).with_name("libinsvp_fast_cpu.so")
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_ptr, _int, _i64, _f32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "linear_pack": [_ptr, _ptr, *[_i64] * 4, _int],
    "linear": [*[_ptr] * 4, *[_i64] * 3, _int],
    "superpose_fwd": [*[_ptr, _int] * 2, *[_ptr] * 4, _ptr, _int, _ptr, *[_i64] * 6, _f32, _f32, _int],
    "superpose_bwd": [*[_ptr, _int] * 2, *[_ptr] * 3, *[_ptr, _int] * 2, *[_ptr] * 4, *[_i64] * 6, _f32, _f32, _int],
}


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native CPU library is in use, with which instruction set, and if not, why."""

    loaded: bool
    isa: str | None  # "generic", "avx2" or "avx512"
    detail: str

    def __bool__(self) -> bool:
        return self.loaded

    def __str__(self) -> str:
        return self.detail


@lru_cache(None)
def _load() -> tuple[ctypes.CDLL | None, NativeStatus]:
    def absent(why: str) -> tuple[None, NativeStatus]:
        return None, NativeStatus(False, None, f"native CPU library not in use: {why}")

    if os.environ.get("INSVP_FAST_NATIVE") == "0":
        return absent("switched off by INSVP_FAST_NATIVE=0")
    if not _LIBRARY.exists():
        return absent("not built; INSVP_FAST_NATIVE=1 pip install -v -e . shows why")
    try:
        lib = ctypes.CDLL(str(_LIBRARY))
        abi = lib.insvp_fast_abi_version()
    except (OSError, AttributeError) as error:
        return absent(f"cannot load {_LIBRARY.name}: {error}")
    if abi != _ABI:
        return absent(f"{_LIBRARY.name} has interface {abi}, this version needs {_ABI}; run pip install -e . again")

    lib.insvp_fast_select_isa.argtypes, lib.insvp_fast_select_isa.restype = [ctypes.c_char_p], ctypes.c_char_p
    limit = os.environ.get("INSVP_FAST_CPU_ISA", "")
    selected = lib.insvp_fast_select_isa(limit.encode())
    if selected is None:
        return absent(f"INSVP_FAST_CPU_ISA={limit!r} is none of generic, avx2, avx512")
    for name, argtypes in _SIGNATURES.items():
        getattr(lib, name).argtypes = argtypes
    lib.linear_packed_size.argtypes, lib.linear_packed_size.restype = [_i64] * 2, _i64
    isa = selected.decode()
    return lib, NativeStatus(True, isa, f"native CPU library in use ({isa})")


def native_status() -> NativeStatus:
    """Tells whether the native CPU library is in use, and why not; never raises."""
    return _load()[1]


def available(*dtypes: torch.dtype) -> bool:
    """Whether the native operations can be used for image, prompt and tokens of `dtypes` (float32 and bfloat16 can).

    Raises RuntimeError where INSVP_FAST_NATIVE=1 demands a library that is not there.
    """
    status = native_status()
    if not status and os.environ.get("INSVP_FAST_NATIVE") == "1":
        raise RuntimeError(f"INSVP_FAST_NATIVE=1, but {status}")
    return status.loaded and all(dtype in _TYPE_CODES for dtype in dtypes)


def _require_kind(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}, the native library computes on the CPU")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}")


def _require(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """`x`, contiguous, after a check of its device, dtype and shape."""
    _require_kind(name, x, *dtypes)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    return x.contiguous()


def _sizes(image: Tensor, w1: Tensor, patch_size: int) -> tuple[int, int, int, int, int, int, int, int]:
    """B, C, H, W, P, R, N, K."""
    if image.ndim != 4 or w1.ndim != 2:
        raise ValueError(f"expected image [B, C, H, W] and w1 [R, K], got {tuple(image.shape)} and {tuple(w1.shape)}")
    B, C, H, W = image.shape
    R, P = w1.shape[0], patch_size
    if P < 1 or H % P or W % P:
        raise ValueError(f"image size {H}x{W} is not a multiple of the patch size {P}")
    return B, C, H, W, P, R, (H // P) * (W // P), C * P * P


def _tensor(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None or x.numel() == 0 else (x.data_ptr(), _TYPE_CODES[x.dtype])


def _library() -> ctypes.CDLL:
    lib, status = _load()
    if lib is None:
        raise RuntimeError(str(status))
    return lib


def _call(name: str, *args: object) -> None:
    if getattr(_library(), name)(*args, torch.get_num_threads()):
        raise MemoryError(f"{name}: no memory for the workspace")


def superpose_fwd(
    image: Tensor,
    global_prompt: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    patch_size: int,
    global_weight: float,
    patch_weight: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Unfolded `image + global_weight * global_prompt + patch_weight * mlp(image)`, and the hidden layer of the MLP.

    image, global_prompt [B, C, H, W] in float32 or bfloat16; w1 [R, K], b1 [R], w2 [K, R], b2 [K] in float32. Returns
    tokens [B, N, K] in `dtype` and hidden [B, N, R] in float32. Raises ValueError for shapes and devices, TypeError for
    dtypes, RuntimeError where the library is not in use.
    """
    B, C, H, W, P, R, N, K = _sizes(image, w1, patch_size)
    if dtype not in _TYPE_CODES:
        raise TypeError(f"tokens cannot have dtype {dtype}, expected {' or '.join(map(str, _TYPE_CODES))}")
    image = _require("image", image, (B, C, H, W), *_TYPE_CODES)
    if global_prompt is not None:
        global_prompt = _require("global_prompt", global_prompt, (B, C, H, W), *_TYPE_CODES)
    w1 = _require("w1", w1, (R, K), torch.float32)
    b1 = _require("b1", b1, (R,), torch.float32)
    w2 = _require("w2", w2, (K, R), torch.float32)
    b2 = _require("b2", b2, (K,), torch.float32)
    tokens = torch.empty((B, N, K), dtype=dtype, device="cpu")
    hidden = torch.empty((B, N, R), dtype=torch.float32, device="cpu")
    _call(
        "superpose_fwd",
        *(*_tensor(image), *_tensor(global_prompt)),
        *(w1.data_ptr(), b1.data_ptr(), w2.data_ptr(), b2.data_ptr()),
        *(*_tensor(tokens), hidden.data_ptr()),
        *(B, C, H, W, P, R, global_weight, patch_weight),
    )
    return tokens, hidden


def superpose_bwd(
    grad: Tensor,
    image: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    patch_size: int,
    global_weight: float,
    patch_weight: float,
    need_image: bool,
    need_global: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `superpose_fwd` for `grad` of its tokens: d_image, d_global, dw1, db1, dw2, db2.

    grad [B, N, K] in float32 or bfloat16, hidden [B, N, R] in float32, the rest as in `superpose_fwd`. d_image has the
    dtype of image, d_global that of grad, each of size 0 where not needed; the weights' gradients are float32, and the
    same bits for every number of threads. Raises as `superpose_fwd`.
    """
    B, C, H, W, P, R, N, K = _sizes(image, w1, patch_size)
    grad = _require("grad", grad, (B, N, K), *_TYPE_CODES)
    image = _require("image", image, (B, C, H, W), *_TYPE_CODES)
    hidden = _require("hidden", hidden, (B, N, R), torch.float32)
    w1 = _require("w1", w1, (R, K), torch.float32)
    w2 = _require("w2", w2, (K, R), torch.float32)
    d_image = torch.empty(image.shape if need_image else 0, dtype=image.dtype, device="cpu")
    d_global = torch.empty(image.shape if need_global else 0, dtype=grad.dtype, device="cpu")
    shapes = ((R, K), (R,), (K, R), (K,))
    dw1, db1, dw2, db2 = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    _call(
        "superpose_bwd",
        *(*_tensor(grad), *_tensor(image), hidden.data_ptr(), w1.data_ptr(), w2.data_ptr()),
        *(*_tensor(d_image), *_tensor(d_global)),
        *(dw1.data_ptr(), db1.data_ptr(), dw2.data_ptr(), db2.data_ptr()),
        *(B, C, H, W, P, R, global_weight, patch_weight),
    )
    return d_image, d_global, dw1, db1, dw2, db2


def pack_linear(weight: Tensor) -> Tensor:
    """The float32 weight [D_out, D_in], of any strides, in the form that `linear` wants: a flat tensor.

    The form depends on the instruction set in use. Raises as `superpose_fwd`.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [D_out, D_in]")
    _require_kind("weight", weight, torch.float32)
    packed = torch.empty(_library().linear_packed_size(*weight.shape), dtype=torch.float32, device="cpu")
    _call("linear_pack", packed.data_ptr(), weight.data_ptr(), *weight.shape, *weight.stride())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`x @ weight.T + bias` in float32, for x [M, D_in] and the weight [out_features, D_in] that `pack_linear` packed.

    The same bits for every number of threads. Raises as `superpose_fwd`.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [M, D_in]")
    M, K = x.shape
    x = _require("x", x, (M, K), torch.float32)
    packed = _require("packed", packed, (_library().linear_packed_size(out_features, K),), torch.float32)
    if bias is not None:
        bias = _require("bias", bias, (out_features,), torch.float32)
    y = torch.empty((M, out_features), dtype=torch.float32, device="cpu")
    pointers = (x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    _call("linear", *pointers, M, out_features, K)
    return y
