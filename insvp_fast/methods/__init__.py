"""Methods of visual prompting besides InsVP, on the same fast path: one file for each, and ``create_model``.

A method is a ``PromptMethod``: see ``insvp_fast/reference/method.py``. Its module says what it computes, for the
reference and for the fast path alike; what the two do apart is the backbone.
"""

from __future__ import annotations

from insvp_fast.methods.e2vpt import E2VPT
from insvp_fast.methods.load import load_model
from insvp_fast.methods.model import MethodViT, create_model
from insvp_fast.methods.prefix import DualPrompt
from insvp_fast.methods.table import METHODS
from insvp_fast.methods.vapt import VAPT
from insvp_fast.methods.vfpt import VFPT
from insvp_fast.methods.vp import VP
from insvp_fast.methods.vpt import VPTDeep, VPTShallow
from insvp_fast.reference import Geometry, PromptMethod, Prompts

__all__ = [
    "E2VPT",
    "METHODS",
    "VAPT",
    "VFPT",
    "VP",
    "DualPrompt",
    "Geometry",
    "MethodViT",
    "PromptMethod",
    "Prompts",
    "VPTDeep",
    "VPTShallow",
    "create_model",
    "load_model",
]
