"""InsVP, instance visual prompting for frozen Vision Transformers: the reference's numbers, faster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insvp_fast.bank import AdapterBank
    from insvp_fast.config import InsVPConfig
    from insvp_fast.coverage import unsupported_reason
    from insvp_fast.model import InsVPViT
    from insvp_fast.reference import InsVPReference
    from insvp_fast.runtime.native import native_status

__version__ = "0.1.0"
__all__ = ["AdapterBank", "InsVPConfig", "InsVPReference", "InsVPViT", "native_status", "unsupported_reason"]

_HOME = {
    "AdapterBank": "bank",
    "InsVPConfig": "config",
    "InsVPReference": "reference",
    "InsVPViT": "model",
    "native_status": "runtime.native",
    "unsupported_reason": "coverage",
}


def __getattr__(name: str) -> Any:
    # loaded when first asked for: `insvp --help` must not wait for torch
    if name in _HOME:
        return getattr(import_module(f"insvp_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'insvp_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
