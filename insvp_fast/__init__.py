"""InsVP, instance visual prompting for frozen Vision Transformers: the reference's numbers, faster."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


class _AfterTimm(MetaPathFinder):
    """Registers our names with timm as soon as it is imported, without importing it, and torch, for that."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        # transformers asks for a spec of timm without importing it: so this finder stays
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        import_timm = spec.loader.exec_module

        def import_and_register(timm: ModuleType) -> None:
            import_timm(timm)
            import_module("insvp_fast.timm_models")

        spec.loader.exec_module = import_and_register  # type: ignore[assignment, method-assign]
        return spec


if "timm" in sys.modules:
    import_module("insvp_fast.timm_models")
else:
    sys.meta_path.insert(0, _AfterTimm())
