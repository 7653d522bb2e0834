"""Whether a fast path computes what the modules that it replaces would compute.

A fast path computes the result of timm's modules and of the prompters without calling them, so it is right only for
modules that it knows. Each class with a fast path is a ``Covered`` module and gives a table of what it assumes of its
submodules; the tables stand beside the code that relies on them, in ``backbones/`` and ``prompters.py``. A module that
differs from its table in type, attributes, parameters or hooks sends the forward pass down the general path, which
calls every module. The tables also list the modules that a fast path skips because they do nothing, such as a dropout
in evaluation mode.

- ``rules.py``: the entries of a table, and how one module is compared with them.
- ``covered.py``: ``Covered``, and the decision for a whole part, repeated only after something has changed.
- ``snapshot.py``: whether something has changed.
- ``copies.py``: shallow copies of modules with other parameters, which are decided about anew.
- ``surroundings.py``: what outside of a model changes its modules, such as global hooks and replaced functions.

``torch.compile`` evaluates the decision while it traces. It traces again when a module is replaced, hooked (not with
torch 2.11), trained or set to training, or a method of the reference is; after other changes to a compiled model call
``torch.compiler.reset()``.
"""

from insvp_fast.coverage.covered import (
    Covered,
    Requirements,
    check_image_type,
    covers,
    dtypes_fit,
    forget,
    kept,
    obstacle,
    overridden,
    unsupported_reason,
)
from insvp_fast.coverage.rules import Rule, Table, rule
from insvp_fast.coverage.surroundings import watch

__all__ = [
    "Covered",
    "Requirements",
    "Rule",
    "Table",
    "check_image_type",
    "covers",
    "dtypes_fit",
    "forget",
    "kept",
    "obstacle",
    "overridden",
    "rule",
    "unsupported_reason",
    "watch",
]
