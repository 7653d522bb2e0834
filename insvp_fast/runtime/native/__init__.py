"""The native CPU library: typed functions over ``kernels/cpu``, one file per operation.

They check their arguments before C++ reads them, and return contiguous tensors.

Raises:
    ValueError: for a tensor of another shape, or on another device than the CPU; for sizes and indices outside of one.
    TypeError: for another dtype.
    RuntimeError: where the library is not in use; ``native_status()`` says why.
    MemoryError: where there is no memory for the results or the workspace.
"""

from insvp_fast.runtime.native.absorbed_attention import (
    absorbed_attention_bwd_rows,
    absorbed_attention_bwd_tokens,
    absorbed_attention_fwd,
)
from insvp_fast.runtime.native.attention import (
    Windows,
    attention_bwd,
    attention_fwd,
    window_attention_bwd,
    window_attention_fwd,
)
from insvp_fast.runtime.native.conv import conv_bwd, conv_fwd, conv_pool_bwd, conv_pool_fwd
from insvp_fast.runtime.native.copy import copy
from insvp_fast.runtime.native.dropout import STATE_BYTES, dropout_bwd, dropout_fwd, dropout_mask
from insvp_fast.runtime.native.fingerprint import LINES, Checksums, Look
from insvp_fast.runtime.native.gate import gate_bwd, gate_fwd
from insvp_fast.runtime.native.library import DTYPES, Call, NativeStatus, available, native_status, ptr
from insvp_fast.runtime.native.linear import linear, linear_activation, linear_activation_bwd, pack_linear
from insvp_fast.runtime.native.norm_insert import norm_insert_bwd, norm_insert_fwd
from insvp_fast.runtime.native.program import Place, Steps
from insvp_fast.runtime.native.rotate import rotate
from insvp_fast.runtime.native.superpose import superpose_bwd, superpose_fwd
from insvp_fast.runtime.native.weighted_sum import weighted_sum
from insvp_fast.runtime.recording import interrupt, lasting

__all__ = [
    "DTYPES",
    "LINES",
    "STATE_BYTES",
    "Call",
    "Checksums",
    "Look",
    "NativeStatus",
    "Place",
    "Steps",
    "Windows",
    "absorbed_attention_bwd_rows",
    "absorbed_attention_bwd_tokens",
    "absorbed_attention_fwd",
    "attention_bwd",
    "attention_fwd",
    "available",
    "conv_bwd",
    "conv_fwd",
    "conv_pool_bwd",
    "conv_pool_fwd",
    "copy",
    "dropout_bwd",
    "dropout_fwd",
    "dropout_mask",
    "gate_bwd",
    "gate_fwd",
    "interrupt",
    "lasting",
    "linear",
    "linear_activation",
    "linear_activation_bwd",
    "native_status",
    "norm_insert_bwd",
    "norm_insert_fwd",
    "pack_linear",
    "ptr",
    "rotate",
    "superpose_bwd",
    "superpose_fwd",
    "weighted_sum",
    "window_attention_bwd",
    "window_attention_fwd",
]
