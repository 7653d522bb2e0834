"""The classes of the methods by their names in ``METHODS``."""

from __future__ import annotations

from insvp_fast.methods.adapter import Adapter, AdaptFormer
from insvp_fast.methods.dam_vp import DAMVP
from insvp_fast.methods.e2vpt import E2VPT
from insvp_fast.methods.lora import LoRA
from insvp_fast.methods.mlp_head import MLPHead
from insvp_fast.methods.partial import BitFit, FullTuning, PartialTuning
from insvp_fast.methods.prefix import DualPrompt
from insvp_fast.methods.side_tuning import SideTuning
from insvp_fast.methods.ssf import SSF
from insvp_fast.methods.tuning import Tuning
from insvp_fast.methods.vapt import VAPT
from insvp_fast.methods.vfpt import VFPT
from insvp_fast.methods.vp import VP
from insvp_fast.methods.vpt import VPTDeep, VPTShallow
from insvp_fast.reference import PromptMethod

__all__ = ["CLASSES"]

CLASSES: dict[str, type[PromptMethod | Tuning]] = {
    "linear": PromptMethod,
    "full": FullTuning,
    "partial_1": PartialTuning,
    "mlp_3": MLPHead,
    "bias": BitFit,
    "adapter": Adapter,
    "adaptformer": AdaptFormer,
    "lora": LoRA,
    "ssf": SSF,
    "sidetune": SideTuning,
    "vp": VP,
    "vpt_shallow": VPTShallow,
    "vpt_deep": VPTDeep,
    "e2vpt": E2VPT,
    "vfpt": VFPT,
    "vapt": VAPT,
    "dualprompt": DualPrompt,
    "dam_vp": DAMVP,
}
