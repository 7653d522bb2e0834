"""What PyTorch has and does not promise: the only file that names its private functions and operators.

Each is tried once, while this is imported, since inside torch.compile the question could not be traced. Where one is
gone or does something else, public functions take its place. Call them as ``torch_private.<name>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

__all__ = [
    "FLASH_KEEPS_NAN",
    "HAS_FLASH",
    "HAS_PRODUCTS",
    "batched",
    "current_stream",
    "dispatch_modes",
    "dispatches",
    "end_allocating",
    "flash_attention",
    "flash_attention_bwd",
    "foreign_dispatch_modes",
    "function_modes",
    "global_hooks",
    "is_replica",
    "overrides",
    "pack_linear",
    "packed_linear",
    "saving_hooks",
    "sdpa_backend",
    "sdpa_order",
    "softmax_bwd",
    "transforming",
]


def _attempt(function: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return function()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # gone, refused here, or with other arguments
        return otherwise


def _works(self_test: Callable[[], bool]) -> bool:
    """In one thread: those that an import started would be missing in forked processes, which wait for them forever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return bool(_attempt(self_test, False))
    finally:
        torch.set_num_threads(threads)


def _has_products(onednn_says_so: Callable[[], bool], *instructions: str) -> bool:
    found = torch.cpu.get_capabilities()
    if found["architecture"] != "x86_64":
        return bool(_attempt(onednn_says_so, False))
    # with AVX-512 alone oneDNN says so and emulates them, at two thirds of the speed of fp32
    has_one = torch.backends.mkldnn.is_available() and any(found.get(name, False) for name in instructions)
    return has_one and bool(_attempt(onednn_says_so, True))


# whether oneDNN has instructions for products of the dtype
HAS_PRODUCTS = {
    torch.bfloat16: _has_products(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(), "avx512_bf16", "amx_bf16"),
    torch.float16: _has_products(lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(), "avx512_fp16", "amx_fp16"),
}


def _softmax_bwd(grad: Tensor, p: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad, p, -1, p.dtype)


def _softmax_bwd_formula(grad: Tensor, p: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    p, grad, dtype = p.to(wide), grad.to(wide), p.dtype
    return (p * (grad - (p * grad).sum(-1, keepdim=True))).to(dtype)


def _softmax_works() -> bool:
    grad, p = torch.linspace(-1, 1, 12, device="cpu").view(2, 2, 3).unbind(0)
    p = p.softmax(-1)
    return torch.allclose(_softmax_bwd(grad, p), _softmax_bwd_formula(grad, p), atol=1e-6)


# gradient of a softmax over the last dimension by its argument, of that by the probabilities `p`
softmax_bwd = _softmax_bwd if _works(_softmax_works) else _softmax_bwd_formula


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, heads, T or S, d] -> the attended values and, for backward, the logarithms of the softmax's sums."""
    q, k, v = map(_dense_rows, (q, k, v))
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=scale)
    return out, logsumexp


def flash_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``flash_attention`` by q, k and v."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    grad, q, k, v, out = map(_dense_rows, (grad, q, k, v, out))
    d_q, d_k, d_v = backward(grad, q, k, v, out, logsumexp, 0.0, False, scale=scale)
    return d_q, d_k, d_v


def _dense_rows(x: Tensor) -> Tensor:
    """What the kernel reads right: it takes rows to have no gaps, whatever their stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_works() -> bool:
    q, k, v, grad = torch.linspace(-1, 1, 4 * 2 * 3 * 8, device="cpu").view(4, 1, 2, 3, 8).sin().unbind(0)
    p = (0.5 * q @ k.mT).softmax(-1)
    d_scores = 0.5 * _softmax_bwd_formula(grad @ v.mT, p)
    out, logsumexp = flash_attention(q, k, v, 0.5)
    found = out, *flash_attention_bwd(grad, q, k, v, out, logsumexp, 0.5)
    expected = p @ v, d_scores @ k, d_scores.mT @ q, p.mT @ grad
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, expected, strict=True))


def _flash_keeps_nan() -> bool:
    ones = torch.ones(1, 1, 16, 16, device="cpu")
    k = ones.clone()
    k[0, 0, 2, 0] = torch.inf
    out, logsumexp = flash_attention(ones, k, ones, 1.0)
    _, _, d_v = flash_attention_bwd(ones, ones, k, ones, out, logsumexp, 1.0)
    return bool(out.isnan().all() and d_v.isnan().all())


# whether the two above are there, and make NaN of NaN; without them, the plain products
HAS_FLASH, FLASH_KEEPS_NAN = _works(_flash_works), _works(_flash_keeps_nan)


def pack_linear(matrix: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's layout; ``products.py`` tries for each dtype whether the two are there."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` of a packed weight."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def sdpa_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which of its kernels PyTorch's attention takes, for reports only: "unknown" where it does not tell."""
    name: str = _attempt(lambda: SDPBackend(torch._fused_sdp_choice(q, k, v)).name, "unknown")
    return name


def sdpa_order() -> tuple[int, ...]:
    """The order in which PyTorch's attention tries its kernels; empty where it does not tell."""
    order: tuple[int, ...] = _attempt(lambda: tuple(torch._C._get_sdp_priority_order()), ())
    return order


def current_stream(device: torch.device) -> int:
    """What names the current stream of a GPU; PyTorch's object for it takes longer to make."""
    if _raw_stream is None or device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)


_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def end_allocating(device: torch.device, pool: tuple[int, int]) -> None:
    """Let PyTorch allocate for other captures than one into this pool that has failed, if it does not do so already."""
    _attempt(lambda: torch._C._cuda_endAllocateToPool(device.index, pool), None)


def is_replica(module: torch.nn.Module) -> bool:
    """Whether ``nn.DataParallel`` has made a module for one forward pass: its parameters are copies, and attributes."""
    return getattr(module, "_is_replica", False) is True


def global_hooks() -> bool:
    """Whether there are hooks for all modules, as of ``torch.nn.modules.module.register_module_forward_hook``."""
    return any(_GLOBAL_HOOKS)


_GLOBAL_HOOKS = [
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks", {})
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def function_modes() -> bool:
    """Whether a ``TorchFunctionMode`` is under way other than PyTorch's own for a default device."""
    return any(type(mode).__name__ != "DeviceContext" for mode in _function_modes())


_function_modes: Callable[[], list[Any]] = getattr(torch.overrides, "_get_current_function_mode_stack", list)


def transforming(*arguments: object) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation (of ``arguments``, if any) is under way."""
    if _in_transform() or getattr(forward_ad, "_current_level", -1) < 0:
        return _in_transform()
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    return not arguments or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def batched(tensors: Sequence[object]) -> bool:
    """Whether one of these stands for a batch, as the gradients of ``torch.autograd.grad(is_grads_batched=True)``."""
    return any(isinstance(x, Tensor) and _is_batched(x) for x in tensors)


_is_batched: Callable[[Tensor], bool] = _attempt(lambda: torch._C._functorch.is_legacy_batchedtensor, lambda x: False)


def dispatches(arguments: Sequence[object]) -> bool:
    """Whether PyTorch's dispatcher has more to do for an operator on these than to run its kernel.

    It has for modes, traces, transforms and the profiler of this thread, and for tensors of other classes or with other
    keys: fake, meta, sparse, lazily negated and the like. It decides by what is asked here, which takes less time.
    """
    if not _KEYS or _len_function_modes() or _len_dispatch_modes() or _profiles():
        return True
    if _included().raw_repr() not in _INCLUDED:
        return True
    for x in arguments:
        if isinstance(x, Tensor) and (type(x) not in _CLASSES or _keys(x).raw_repr() not in _KEYS):
            return True
    return False


def dispatch_modes() -> bool:
    """Whether a ``TorchDispatchMode`` is under way, as that of fake tensors."""
    return bool(_len_dispatch_modes())


def foreign_dispatch_modes() -> bool:
    """Whether one is under way other than those by which PyTorch traces, which change no result."""
    known = ("FakeTensorMode", "FunctionalTensorMode", "ProxyTorchDispatchMode")
    return bool(_len_dispatch_modes()) and any(type(mode).__name__ not in known for mode in _dispatch_modes())


_dispatch_modes: Callable[[], list[Any]] = _attempt(
    lambda: torch.utils._python_dispatch._get_current_dispatch_mode_stack, lambda: [None]
)


def overrides(x: Tensor) -> bool:
    """Whether PyTorch's functions or operators may do something else with a tensor of this class; not so in a trace."""
    cls = type(x)
    if cls in _CLASSES or cls.__name__ in ("FakeTensor", "FunctionalTensor"):
        return False
    if cls.__module__.startswith("torchvision.tv_tensors"):  # which say what pixels are, and compute as others do
        return False
    function, plain = (getattr(one.__torch_function__, "__func__", None) for one in (cls, Tensor))
    keeps = function is plain or cls.__torch_function__ is nn.Parameter.__torch_function__
    return not (keeps and cls.__torch_dispatch__ is Tensor.__torch_dispatch__)


def saving_hooks() -> bool:
    """Whether tensors that are saved for backward pass through hooks, which may read them."""
    return _saving_hooks(False) is not None


_saving_hooks: Callable[[bool], object | None] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: ()
)
_len_dispatch_modes: Callable[[], int] = getattr(
    torch._C, "_len_torch_dispatch_stack", lambda: type(torch.empty(0, device="cpu")) is not Tensor
)
_CLASSES = (Tensor, torch.nn.Parameter)
_keys: Callable[[Tensor], Any] = getattr(torch._C, "_dispatch_keys", lambda x: None)
_included: Callable[[], Any] = getattr(torch._C, "_dispatch_tls_local_include_set", lambda: None)
_len_function_modes: Callable[[], int | None] = getattr(torch._C, "_len_torch_function_stack", lambda: None)
_profiles: Callable[[], bool | None] = _attempt(lambda: torch._C._autograd._profiler_enabled, lambda: None)


def _usual_keys() -> tuple[set[int], set[int]]:
    """The keys of plain tensors on CPUs and GPUs, and those that a thread adds, both with and without autograd's."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    if None in (_len_function_modes(), _profiles()):
        raise AttributeError("modes and the profiler would not be seen")
    tensors, threads = [], []
    for inference in (False, True):
        with torch.inference_mode(inference):
            threads.append(_included())
            tensors.append(_keys(torch.empty(0, device="cpu")))
    moved = keys(key.CUDA) | keys(key.AutocastCUDA)
    tensors += [moved, moved | keys(key.AutogradCUDA) | keys(key.ADInplaceOrView)]
    return {x.raw_repr() for x in tensors}, {x.raw_repr() for x in threads}


# none where PyTorch does not tell: then its dispatcher is always asked
_KEYS, _INCLUDED = _attempt(_usual_keys, (set(), set()))


# where it is gone, PyTorch's autograd functions refuse by themselves, in other words
_in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
