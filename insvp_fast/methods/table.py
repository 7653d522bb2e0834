"""The methods by their names."""

from __future__ import annotations

from insvp_fast.methods.e2vpt import E2VPT
from insvp_fast.methods.prefix import DualPrompt
from insvp_fast.methods.vapt import VAPT
from insvp_fast.methods.vfpt import VFPT
from insvp_fast.methods.vp import VP
from insvp_fast.methods.vpt import VPTDeep, VPTShallow
from insvp_fast.reference import PromptMethod

__all__ = ["METHODS"]

METHODS: dict[str, type[PromptMethod]] = {
    "linear": PromptMethod,
    "vpt_deep": VPTDeep,
    "vpt_shallow": VPTShallow,
    "vp": VP,
    "e2vpt": E2VPT,
    "vapt": VAPT,
    "vfpt": VFPT,
    "dualprompt": DualPrompt,
}
