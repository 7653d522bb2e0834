"""The operations: one contract each, carried out by whatever is fastest where the tensors are.

One file per operation, all alike: the public function, which checks its arguments; the formula, ``<op>_reference``, and
its gradient written out, ``<op>_bwd_reference``; the operands of the operators as named tuples; the autograd function;
the implementations, each with the reason why it may not compute some operands; and their registration
(``registry.py``). ``linear``, ``project_q_kv``, ``mlp`` and ``gated_mlp`` have PyTorch's own formulas,
``absorbed_attention`` and ``query_attention`` that of ``attention``; ``query_attention`` and ``blend_prompts`` are no
operators. Gradients are first-order only. ``programs.py`` runs the native calls of many operations in a row again,
``graphs.py`` their kernels on a GPU.

The functions hide the modules of the same name: import a formula by ``from insvp_fast.ops.superpose import
superpose_reference``.

Letters as in ``insvp_fast/reference``.
"""

from insvp_fast.ops.absorbed_attention import absorbed_attention
from insvp_fast.ops.attention import ATTENTION, attention
from insvp_fast.ops.blend_prompts import blend_prompts
from insvp_fast.ops.conv import conv
from insvp_fast.ops.conv_pool import conv_pool
from insvp_fast.ops.dropout import dropout
from insvp_fast.ops.gated_mlp import gated_mlp
from insvp_fast.ops.linear import linear, project_q_kv
from insvp_fast.ops.mlp import mlp
from insvp_fast.ops.norm_insert import norm_insert
from insvp_fast.ops.query_attention import query_attention
from insvp_fast.ops.rotate import rotate
from insvp_fast.ops.superpose import Blend, PatchWeights, superpose
from insvp_fast.ops.window_attention import WINDOW_ATTENTION, window_attention
from insvp_fast.runtime.products import FrozenLinear

__all__ = [
    "ATTENTION",
    "WINDOW_ATTENTION",
    "Blend",
    "FrozenLinear",
    "PatchWeights",
    "absorbed_attention",
    "attention",
    "blend_prompts",
    "conv",
    "conv_pool",
    "dropout",
    "gated_mlp",
    "linear",
    "mlp",
    "norm_insert",
    "project_q_kv",
    "query_attention",
    "rotate",
    "superpose",
    "window_attention",
]
