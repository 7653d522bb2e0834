"""One table per operator: what carries it out, on which device, and for which operands.

``register`` declares a PyTorch operator, so that an operation traces, compiles and exports as one node, and lists its
implementations. PyTorch's own dispatcher chooses by device alone; here the choice also depends on dtypes, shapes and
the user's wish, so an operator has one kernel for all devices, which looks into its table.

- ``impl="auto"`` takes the first implementation for the device that covers the operands, else the reference formula.
- ``impl=<name>`` takes that one, or raises RuntimeError with the reason why it cannot run here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.library import Library, register_fake

from insvp_fast.runtime import native, torch_private, triton_kernels

__all__ = [
    "PACKS",
    "AnyTensor",
    "Implementation",
    "Size",
    "call",
    "check_tensors",
    "cpu_reason",
    "dtype_reason",
    "implementation",
    "native_reason",
    "register",
    "require",
    "run_alone",
    "tensor_fields",
    "triton_reason",
]

LIBRARY = Library("insvp_fast", "DEF")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PREFERRED = {"cpu": ("native",), "cuda": ("triton",)}  # a ROCm device is "cuda" to PyTorch as well
DTYPES = frozenset((*FLOATS, torch.float64))  # of operands and results
AnyTensor = Annotated[Tensor, "of dtypes that the operation checks itself"]
_CHECKED: Any = (Tensor, AnyTensor, torch.dtype)
_EXPECTED = f"{', '.join(map(str, FLOATS))} or torch.float64"
# of an operator that looks at weights and keeps what it packs: torch.compile leaves it out of its own CUDA graphs
PACKS = torch.Tag.cudagraph_unsafe
Size = Annotated[int, torch.SymInt]  # a number that a compiled graph may leave open
SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    AnyTensor: "Tensor",
    AnyTensor | None: "Tensor?",
    int: "int",
    Size: "SymInt",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


class Implementation(NamedTuple):
    """One way to carry out an operator."""

    run: Callable[[Any], Any]  # of the operands
    reason: Callable[[Any], str | None]  # of the operands: why they cannot be computed this way; None if they can
    fake: Callable[[Any], Any] | None = None  # where its results have other shapes than the reference's
    recordable: bool = False  # no value decides which native calls are made; what else computes ends a recording


class _Fields(NamedTuple):
    """Where the operands of a named tuple are tensors of numbers, other tensors, and dtypes; and all their names."""

    numbers: Sequence[int]
    others: Sequence[int]
    dtypes: Sequence[int]
    names: Sequence[str]


class _Operator(NamedTuple):
    kernel: Callable[..., Any]
    auto: Callable[[Any], Sequence[str]]
    table: dict[str, Implementation]
    fields: _Fields


_operators: dict[str, _Operator] = {}


def register(
    name: str,
    operands: type[Any],
    returns: str,
    *tags: torch.Tag,
    fake: Callable[[Any], Any],
    reference: Callable[[Any], Any],
    auto: Callable[[Any], Sequence[str]] | None = None,
    **implementations: Implementation,
) -> None:
    """Declare the operator ``insvp_fast::name`` and what carries it out.

    Args:
        operands: a named tuple, whose fields are the operator's arguments; behind them it takes ``str impl``, and then
            those that have the default None, so that programs exported before there was one still run.
        returns: in the language of ``torch.library.define``.
        tags: ``torch.Tag.nondeterministic_seeded`` of what draws random numbers, whose calls compiled code may not
            merge or repeat; ``PACKS`` of what packs weights.
        fake: of the operands, empty results of the right shapes and dtypes, for tracing.
        reference: of the operands, the results by the formula, for every device and dtype.
        auto: of the operands, the names to try for ``impl="auto"`` in this order; the device's ``PREFERRED`` if None.
        implementations: what there is besides the reference.

    Gradients are the business of the autograd functions: an exported program calls the operators without them.
    """
    hints = get_type_hints(operands, include_extras=True)
    optional = operands._field_defaults
    arguments = [f"{SCHEMA[hints[field]]} {field}" for field in operands._fields if field not in optional]
    behind, at = [f"{SCHEMA[hints[field]]} {field}=None" for field in optional], len(arguments)
    schema = ", ".join([*arguments, "str impl", *behind])
    LIBRARY.define(f"{name}({schema}) -> {returns}", tags=[torch.Tag.pt2_compliant_tag, *tags])
    table = {"reference": Implementation(reference, lambda operands: None), **implementations}

    def trace(*arguments: Any) -> Any:
        given, own = operands(*arguments[:at], *arguments[at + 1 :]), None
        if any(other.fake for other in table.values()):
            own = table[implementation(name, arguments[at], given)].fake
        return (own or fake)(given)

    def kernel(*arguments: Any) -> Any:
        given = operands(*arguments[:at], *arguments[at + 1 :])
        run, _, _, recordable = table[implementation(name, arguments[at], given)]
        if not recordable:
            native.interrupt()
        return run_alone(run, given)

    register_fake(f"insvp_fast::{name}", trace, lib=LIBRARY)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _operators[name] = _Operator(kernel, auto or _preferred, table, tensor_fields(operands))


def run_alone(run: Callable[[Any], Any], operands: Any) -> Any:
    """Run without gradients and autocast, which would compute in another dtype than that of the operands."""
    device = _device_type(operands)
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # which does not know the meta device
    if not autocast and not torch.is_grad_enabled():
        return run(operands)
    with torch.no_grad(), torch.autocast(device, enabled=False) if autocast else nullcontext():
        return run(operands)


def call(name: str, *arguments: Any) -> Any:
    """The results of the operator ``insvp_fast::name``, by its kernel where PyTorch's dispatcher would only call it."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.insvp_fast, name).default(*arguments)
    if torch_private.dispatches(arguments):
        native.interrupt()  # what else the dispatcher calls may read the results
        return getattr(torch.ops.insvp_fast, name).default(*arguments)
    return _operators[name].kernel(*arguments)


def _preferred(operands: Sequence[Any]) -> Sequence[str]:
    return PREFERRED.get(_device_type(operands), ())


def _device_type(operands: Sequence[Any]) -> str:
    for x in operands:
        if isinstance(x, Tensor):
            return x.device.type
    raise AssertionError("an operator without a tensor")


def implementation(name: str, impl: str, operands: Any) -> str:
    """What carries an operator out for these operands.

    Raises:
        ValueError: for an unknown ``impl``.
        RuntimeError: if ``impl`` is one that cannot compute these operands here.
    """
    _, auto, table, _ = _operators[name]
    if impl == "auto":
        for other in auto(operands):
            if other in table and table[other].reason(operands) is None:
                return other
        return "reference"
    if impl not in table:
        raise ValueError(f"impl={impl!r}: expected one of {sorted(['auto', *table])}")
    if reason := table[impl].reason(operands):
        raise RuntimeError(f'impl="{impl}" {reason}')
    return impl


def require(name: str, impl: str, operands: Any) -> None:
    """Raise as ``check_tensors`` and ``implementation`` do; a compiled graph asks the latter when it runs."""
    check_tensors(operands, _operators[name].fields)
    if impl == "auto" or (impl in _operators[name].table and torch.compiler.is_compiling()):
        return
    implementation(name, impl, operands)


def tensor_fields(operands: type[Any]) -> _Fields:
    """What ``check_tensors`` looks at in operands of this named tuple."""
    hints = get_type_hints(operands, include_extras=True)
    kinds = [hints[name] for name in operands._fields]
    numbers, others, dtypes = (
        tuple(at for at, kind in enumerate(kinds) if kind in (own, own | None)) for own in _CHECKED
    )
    return _Fields(numbers, others, dtypes, operands._fields)


def check_tensors(operands: Sequence[Any], fields: _Fields) -> None:
    """Refuse tensors and dtypes that are not those of floating-point numbers, and tensors on several devices.

    Raises:
        ValueError: for such an operand.
    """
    device = None
    for at in fields.numbers:
        x = operands[at]
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise ValueError(f"{fields.names[at]} is {x.dtype}: expected {_EXPECTED}")
        if x.device != device:
            device = _only_device(x, device, fields.names[at])
    for at in fields.others:
        if (x := operands[at]) is not None and x.device != device:
            device = _only_device(x, device, fields.names[at])
    for at in fields.dtypes:
        if (dtype := operands[at]) is not None and dtype not in DTYPES:
            raise ValueError(f"{fields.names[at]} is {dtype}: expected {_EXPECTED}")


def _only_device(x: Tensor, device: torch.device | None, name: str) -> torch.device:
    if device is None:
        return x.device
    raise ValueError(f"{name} is on {x.device}: expected {device}, where the other operands are")


# Reasons, to be read behind 'impl="<name>"'.


def dtype_reason(covered: Sequence[torch.dtype], *dtypes: torch.dtype) -> str | None:
    """Why an implementation for the covered dtypes cannot compute in these."""
    for dtype in dtypes:
        if dtype not in covered:
            return f"cannot compute in {dtype}: expected {' or '.join(map(str, covered))}"
    return None


def cpu_reason(device: torch.device) -> str | None:
    """Why an implementation for CPUs cannot run on this device."""
    return None if device.type == "cpu" else f"cannot run here: it computes on the CPU, not on {device}"


def native_reason(device: torch.device, *dtypes: torch.dtype, weights: Sequence[Tensor | None] = ()) -> str | None:
    """Why the native library cannot compute in these dtypes with these weights, which have to be fp32.

    Raises:
        RuntimeError: where INSVP_FAST_NATIVE=1 demands a library that is not there.
    """
    if device.type != "cpu":
        return cpu_reason(device)
    if not native.available():
        return f"cannot run here: {native.native_status()}"
    if reason := dtype_reason(native.DTYPES, *dtypes):
        return reason
    return dtype_reason((torch.float32,), *(w.dtype for w in weights if w is not None)) if weights else None


def triton_reason(device: torch.device, *dtypes: torch.dtype, covered: Sequence[torch.dtype] = FLOATS) -> str | None:
    """Why Triton kernels for the covered dtypes cannot compute in these on this device."""
    return triton_kernels.missing(device) or dtype_reason(covered, *dtypes)
