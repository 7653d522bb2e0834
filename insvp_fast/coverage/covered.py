"""``Covered``: a module with a fast path, and whether that path covers the module as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from insvp_fast.coverage.rules import CALLED, Table, difference, foreign, full_name
from insvp_fast.coverage.snapshot import Snapshot
from insvp_fast.coverage.surroundings import surroundings_reason
from insvp_fast.errors import warn
from insvp_fast.runtime.torch_private import overrides

__all__ = [
    "Covered",
    "Requirements",
    "check_image_type",
    "covers",
    "dtypes_fit",
    "forget",
    "kept",
    "obstacle",
    "overridden",
    "unsupported_reason",
]


class Requirements(NamedTuple):
    """What the fast path of a ``Covered`` module requires."""

    name: str  # of ``root``, in messages
    root: nn.Module
    table: Table  # for all submodules of ``root``, and itself under ""
    frozen: bool = False  # whether the parameters must not be trained and have one dtype


class Covered(nn.Module):
    """A module with a fast path and a general path; its ``forward`` asks ``covers(self)`` which one to take.

    Attributes:
        replaced_methods: methods of the reference whose steps the fast path takes itself; none may be overridden.
    """

    replaced_methods: tuple[str, ...] = ()

    def _requirements(self) -> Requirements:
        """What the fast path requires, for the module as it is now."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its fast path requires")

    def _requirements_depend_on(self) -> object:
        """What ``_requirements`` depends on besides the modules of its table; compared by ``==``."""
        return None

    def _own_reason(self) -> str | None:
        """Why the fast path does not cover this module, if that is not a matter of the table; asked each time."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        forget(self)  # and what is kept, which may hold memory on the old device
        return self

    # a method, because torch 2.11 takes no module as a constant argument
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_covered(self) -> bool:
        return _judge(self)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_overridden(self, *methods: str) -> bool:
        return foreign(self, *methods) is not None


def unsupported_reason(part: Covered) -> str | None:
    """Why a model or a prompter takes the general path, in words; None if it takes the fast path.

    Args:
        part: an ``InsVPViT``, ``MethodViT`` or ``AdapterBank`` (the answer is about its backbone), or a prompter of the
            first, which takes a fast or general path of its own.

    Raises:
        TypeError: for another module, which has no fast path.
    """
    if not isinstance(part, Covered):
        raise TypeError(f"part is {full_name(type(part))}: expected an InsVPViT or one of its prompters")
    return _changeable_reason(part) or _examine(part._requirements())[0]


def covers(part: nn.Module, obstacle: str | None = None) -> bool:
    """Whether the fast path covers ``part`` as it is now; if not, a warning says why, once for each reason.

    ``obstacle``: why it does not in this call.
    """
    if obstacle or not isinstance(part, Covered):
        reason = obstacle or f"{full_name(type(part))} has no fast path"
        return not torch.compiler.is_compiling() and _report(part, reason)
    if torch.compiler.is_compiling():
        _guard(part)
        _look_up(part, part.replaced_methods)
    covered: bool = part._is_covered()
    return covered


def obstacle(image: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why no fast path takes these, whatever the model."""
    if attn_mask is not None:
        return "attn_mask was given"
    if overrides(image):
        own = f"image is of the class {type(image).__name__}, which has operations of its own"
        return f"{own}: image.as_subclass(torch.Tensor) has PyTorch's"
    return None


def check_image_type(image: object) -> None:
    """Raise TypeError for what is neither a dense tensor of floating-point numbers nor one of 8-bit pixels."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image is a {type(image).__name__}: expected a tensor [B, C, H, W], of whole images")
    if image.layout is not torch.strided or image.is_nested:
        kind = "nested" if image.is_nested else image.layout
        raise TypeError(f"image is {kind}: expected a dense tensor [B, C, H, W]")
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise TypeError(f"image is {image.dtype}: expected floating-point numbers, or torch.uint8 for 8-bit pixels")


def dtypes_fit(image: Tensor, *weights: Tensor) -> bool:
    """Whether PyTorch would multiply these: they have one dtype, or autocast casts them, as all but fp64."""
    dtypes = {image.dtype, *(weight.dtype for weight in weights)}
    if len(dtypes) == 1 or image.is_meta:  # autocast does not know the meta device
        return len(dtypes) == 1
    return torch.is_autocast_enabled(image.device.type) and image.is_floating_point() and torch.float64 not in dtypes


def _guard(module: nn.Module) -> int:
    """While a model is traced, read what only ``_is_covered`` reads, so that a change makes PyTorch trace again."""
    read = len(module._forward_hooks) + len(module._forward_pre_hooks) + module.training
    for child in module.children():
        read += _guard(child)
    return read


def _look_up(part: nn.Module, methods: Iterable[str]) -> None:
    """While a model is traced, look methods up as a call does, so that PyTorch traces again when one is overridden."""
    for name in methods:
        getattr(part, name, None)


def overridden(part: Covered, *methods: str) -> bool:
    """Whether one of these methods is not this package's, also in compiled code."""
    if torch.compiler.is_compiling():
        _look_up(part, methods)
    found: bool = part._is_overridden(*methods)
    return found


class _Result(NamedTuple):
    depends_on: object
    reason: str | None
    snapshot: Snapshot
    kept: dict[str, Any]


class _Memo:
    """The last result for a part, and what it rests on; a copy of the part starts without one.

    And the one before that, as modules change to and fro between training and evaluation.
    """

    def __init__(self) -> None:
        self.result: _Result | None = None
        self.before: _Result | None = None
        self.reported: str | None = None

    def find(self, depends_on: object) -> _Result | None:
        """The result that rests on what is there now, which becomes the last one, if there is any."""
        for result in (self.result, self.before):
            if result is not None and result.depends_on == depends_on and result.snapshot.holds():
                if result is not self.result:
                    self.result, self.before = result, self.result
                return result
        return None

    def add(self, result: _Result) -> _Result:
        """Make a result the last one; one that holds other parameters or buffers than it is dropped."""
        last = self.result
        self.before = last if last is not None and last.snapshot.has_tensors_of(result.snapshot) else None
        self.result = result
        return result

    def __reduce__(self) -> Any:
        return _Memo, ()


def _memo(part: nn.Module) -> _Memo:
    memo: _Memo = vars(part).setdefault("_memo", _Memo())
    return memo


def forget(part: nn.Module) -> None:
    """Drop what is remembered of a part, about 1 KB for each of its modules; it is examined anew when it is used."""
    vars(part).pop("_memo", None)


def kept(part: Covered) -> dict[str, Any]:
    """Where to keep what rests on the decision about a part, and so on its modules: empty after a change of them.

    But that of training is there again after an evaluation, and the other way around.
    """
    result = _memo(part).result
    return {} if result is None else result.kept


def _judge(part: Covered) -> bool:
    reason = _changeable_reason(part)
    if reason is None:
        memo, key = _memo(part), part._requirements_depend_on()
        result = memo.find(key)
        if result is None:
            reason, modules = _examine(part._requirements())
            result = memo.add(_Result(key, reason, Snapshot(modules), {}))
        reason = result.reason
    return _report(part, reason)


def _report(part: nn.Module, reason: str | None) -> bool:
    """Warn of a new reason; returns whether there is none."""
    memo = _memo(part)
    if reason is not None and reason != memo.reported:
        warn(f"{type(part).__name__} takes the general path, exact but not fast: {reason}")
    memo.reported = reason
    return reason is None


def _changeable_reason(part: Covered) -> str | None:
    """A reason that no snapshot notices, so that it is looked for each time."""
    if name := foreign(part, *part.replaced_methods):
        return f"it has a {name} of its own"
    return surroundings_reason() or part._own_reason()


def _examine(requirements: Requirements) -> tuple[str | None, list[nn.Module]]:
    """The first difference from the table, and the modules that were looked at."""
    name, root, table, frozen = requirements
    seen: dict[str, nn.Module] = {}
    for path, module in _modules(root, table):
        seen[path] = module
        if reason := difference(module, table.get(path), frozen) or _compiled(path, module):
            return f"{name}{'.' * bool(path)}{path} {reason}", [*seen.values()]
    modules = [*seen.values()]
    if missing := next((path for path, rules in table.items() if rules != CALLED and path not in seen), None):
        return f"{name}.{missing} is missing", modules
    dtypes = {p.dtype for module in modules for p in module._parameters.values() if p is not None}
    if frozen and len(dtypes) > 1:
        return f"{name} has parameters in {' and '.join(sorted(map(str, dtypes)))}: expected one dtype", modules
    return None, modules


def _modules(root: nn.Module, table: Table) -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()``, but with a shared module under each of its names, and without those ``CALLED``."""
    pending = [("", root)]
    while pending:
        path, module = pending.pop()
        if table.get(path) != CALLED:
            yield path, module
            children = ((f"{path}.{key}".removeprefix("."), m) for key, m in module._modules.items() if m is not None)
            pending += reversed(list(children))


def _compiled(path: str, module: nn.Module) -> str | None:
    """A submodule that is compiled alone may be compiled to something else."""
    return "is compiled by itself" if path and module._compiled_call_impl is not None else None
