"""Products in which NaN and infinity stay in their rows, also on CPUs with matrix tiles (AMX).

There oneDNN loads the end of a row together with the beginning of the next, which it multiplies by 0. Of a NaN or an
infinity this makes NaN, in a row that had none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from insvp_fast.runtime import hardware, torch_private

__all__ = ["rows_apart"]


Function = TypeVar("Function", bound=Callable[..., Any])


def rows_apart(function: Function) -> Function:
    """Compute in fp32 instead where a result is not finite, if tiles may be at fault.

    The first argument is a tensor, the arguments that are tensors of its dtype are operands, and a tensor or a tuple of
    them is returned.
    A graph that is traced cannot choose by values, and keeps PyTorch's own products.
    """

    @functools.wraps(function)
    def run(x: Tensor, *others: Any) -> Any:
        results = function(x, *others)
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch_private.dispatch_modes():
            return results
        cast_to = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not hardware.has_tiles(cast_to if x.dtype == torch.float32 else x.dtype):
            return results
        narrow = results if isinstance(results, tuple) else (results,)
        if all(bool(result.sum(dtype=torch.float32).isfinite()) for result in narrow):
            return results
        with torch.autocast("cpu", enabled=False):
            wide = function(*(_widened(argument, x.dtype) for argument in (x, *others)))
        if not isinstance(results, tuple):
            return wide.to(results.dtype)
        return tuple(value.to(result.dtype) for value, result in zip(wide, results, strict=True))

    return cast(Function, run)


def _widened(argument: Any, dtype: torch.dtype) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.dtype == dtype else argument
