"""Methods besides InsVP: one file for each, ``create_model`` for them by name, and ``load_model``.

A method of visual prompting is a ``PromptMethod``: see ``insvp_fast/reference/method.py``. Its module says what it
computes, for the reference and for the fast path alike; what the two do apart is the backbone. A method that changes
the backbone itself is a ``Tuning``, and runs module by module.
"""

from __future__ import annotations

from insvp_fast.method_names import METHODS
from insvp_fast.methods.adapter import Adapter, AdaptFormer
from insvp_fast.methods.dam_vp import DAMVP
from insvp_fast.methods.e2vpt import E2VPT
from insvp_fast.methods.load import create_model, load_model
from insvp_fast.methods.lora import LoRA
from insvp_fast.methods.mlp_head import MLPHead
from insvp_fast.methods.model import MethodViT
from insvp_fast.methods.partial import BitFit, FullTuning, PartialTuning
from insvp_fast.methods.prefix import DualPrompt
from insvp_fast.methods.side_tuning import SideTuning
from insvp_fast.methods.ssf import SSF
from insvp_fast.methods.table import CLASSES
from insvp_fast.methods.tuned import TunedViT
from insvp_fast.methods.tuning import Branch, Tuning
from insvp_fast.methods.vapt import VAPT
from insvp_fast.methods.vfpt import VFPT
from insvp_fast.methods.vp import VP
from insvp_fast.methods.vpt import VPTDeep, VPTShallow
from insvp_fast.reference import Geometry, PromptMethod, Prompts

__all__ = [
    "CLASSES",
    "DAMVP",
    "E2VPT",
    "METHODS",
    "SSF",
    "VAPT",
    "VFPT",
    "VP",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "Branch",
    "DualPrompt",
    "FullTuning",
    "Geometry",
    "LoRA",
    "MLPHead",
    "MethodViT",
    "PartialTuning",
    "PromptMethod",
    "Prompts",
    "SideTuning",
    "TunedViT",
    "Tuning",
    "VPTDeep",
    "VPTShallow",
    "create_model",
    "load_model",
]
