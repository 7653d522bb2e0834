"""The operations: one contract each, carried out by whatever is fastest where the tensors are.

One file per operation, all alike: the public function, which checks its arguments; the formula, ``<op>_reference``, and
its gradient written out, ``<op>_bwd_reference``; the operands of the operator as a named tuple; the autograd function;
the implementations, each with the reason why it may not cover some operands; and their registration (``registry.py``).
Gradients are first-order only.

Letters as in ``reference.py``.
"""

from insvp_fast.ops.attention import ATTENTION, attention
from insvp_fast.ops.conv import conv
from insvp_fast.ops.conv_pool import conv_pool
from insvp_fast.ops.linear import linear, project_q_kv
from insvp_fast.ops.mlp import mlp
from insvp_fast.ops.norm_insert import norm_insert
from insvp_fast.ops.query_attention import query_attention
from insvp_fast.ops.registry import implementation
from insvp_fast.ops.superpose import Blend, PatchWeights, superpose
from insvp_fast.runtime.products import FrozenLinear

__all__ = [
    "ATTENTION",
    "Blend",
    "FrozenLinear",
    "PatchWeights",
    "attention",
    "conv",
    "conv_pool",
    "implementation",
    "linear",
    "mlp",
    "norm_insert",
    "project_q_kv",
    "query_attention",
    "superpose",
]
