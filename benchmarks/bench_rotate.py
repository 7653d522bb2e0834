"""rotate: the rotary position embedding of queries and keys in a DINOv3-B; values, prompts and prefix are copied."""

import functools

import torch

from benchmarks.operations import DTYPES, Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.ops.rotate import rotate_reference
from insvp_fast.testing import DEVICE

PREFIX, N, L, HEADS, D = 5, 196, 9, 12, 768


def operation(batch, itemsize, half=True):
    """``half``: how features are paired, in halves of a head as in DINOv3, or with their neighbors as in EVA-02."""
    S = PREFIX + N + L
    rotation = torch.randn(N, 2 * D // HEADS, device=DEVICE)
    run = {"num_heads": HEADS, "rotation": rotation, "first": PREFIX, "half": half}
    nbytes = 6.0 * batch * S * D * itemsize
    return Operation(
        name=f"rotate {batch}x{S}x{D}, {'halves' if half else 'neighbors'}",
        plain=functools.partial(rotate_reference, **run),
        fast=functools.partial(ops.rotate, **run),
        make=lambda dtype: [torch.randn(batch, S, 3 * D, device=DEVICE).to(dtype).requires_grad_()],
        nbytes=(nbytes, 2 * nbytes),
        matmul=False,
    )


@each_case
def bench_rotate(benchmark, tiny, implementation, direction, precision):
    batch = 1 if tiny else 8 if DEVICE.type == "cpu" else 256
    time_operation(benchmark, operation(batch, DTYPES[precision].itemsize), implementation, direction, precision)
