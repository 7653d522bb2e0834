"""The operations: one contract each, carried out by whatever is fastest where the tensors are.

Every operation but ``linear`` and ``mlp``, which are PyTorch's layers, is the function of the same name in
``reference.py``. Where an operation has kernels, its schema is registered with PyTorch and PyTorch's dispatcher is the
device table: the reference formula for every device, the native library over it for CPU, Triton over it for CUDA and
ROCm. Gradients are first-order only.

Letters as in ``reference.py``.
"""

from insvp_fast.ops.attention import ATTENTION, attention, attention_few, require_attention
from insvp_fast.ops.conv import conv, conv_pool
from insvp_fast.ops.linear import linear, qkv_few
from insvp_fast.ops.mlp import mlp
from insvp_fast.ops.norm_insert import norm_insert
from insvp_fast.ops.superpose import superpose

__all__ = [
    "ATTENTION",
    "attention",
    "attention_few",
    "conv",
    "conv_pool",
    "linear",
    "mlp",
    "norm_insert",
    "qkv_few",
    "require_attention",
    "superpose",
]
