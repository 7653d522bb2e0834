"""The native CPU library: one typed function per operation over ``kernels/cpu``."""

from insvp_fast.native.conv import conv_bwd, conv_fwd, conv_pool_bwd, conv_pool_fwd
from insvp_fast.native.library import NativeStatus, available, native_status
from insvp_fast.native.linear import linear, pack_linear
from insvp_fast.native.superpose import superpose_bwd, superpose_fwd

__all__ = [
    "NativeStatus",
    "available",
    "conv_bwd",
    "conv_fwd",
    "conv_pool_bwd",
    "conv_pool_fwd",
    "linear",
    "native_status",
    "pack_linear",
    "superpose_bwd",
    "superpose_fwd",
]
