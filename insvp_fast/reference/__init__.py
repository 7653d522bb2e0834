"""The specification: InsVP in stock PyTorch and stock timm blocks, one equation after another.

Equation numbers are those of the paper (InsVP, ACM MM 2024). Nothing here is tuned and nothing here imports a kernel;
everything fast in this package is measured against these functions.

Letters: B images, C channels, H and W image size, P patch size, N patches, K = C·P·P pixels of a patch, R hidden width
of the patch prompter, T tokens of the backbone (prefix + N), L prompt tokens of a block, S = T + L, D embedding width,
J blocks.
"""

from insvp_fast.reference.heads import take_head
from insvp_fast.reference.images import crop_center, fold, normalize, pixel_scale, pool_center, simam, unfold
from insvp_fast.reference.method import Geometry, PromptMethod
from insvp_fast.reference.model import ImagePrompt, InsVPReference, split_common_prompts
from insvp_fast.reference.prompters import GlobalPrompter, PatchPrompter, PyramidPrompter, SpecificPrompter
from insvp_fast.reference.structure import Prompts, Structure
from insvp_fast.reference.structures import structure_of

__all__ = [
    "Geometry",
    "GlobalPrompter",
    "ImagePrompt",
    "InsVPReference",
    "PatchPrompter",
    "PromptMethod",
    "Prompts",
    "PyramidPrompter",
    "SpecificPrompter",
    "Structure",
    "crop_center",
    "fold",
    "normalize",
    "pixel_scale",
    "pool_center",
    "simam",
    "split_common_prompts",
    "structure_of",
    "take_head",
    "unfold",
]
