"""norm_insert: residual addition, LayerNorm and placement of the prompts; an fp32 stream, products in any dtype."""

import torch

from benchmarks.operations import DTYPES, Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.ops.norm_insert import norm_insert_reference
from insvp_fast.testing import DEVICE

T, L, D = 197, 9, 768


def plain(residual, branch, prompts, weight=None, bias=None):
    total, normed = norm_insert_reference(residual, branch, prompts, weight, bias, 1e-6)
    return total, normed.to(branch.dtype)


def fast(residual, branch, prompts, weight=None, bias=None):
    return ops.norm_insert(residual, branch, prompts, weight, bias, 1e-6, dtype=branch.dtype)


def make_operands(batch, dtype):
    residual, prompts = (torch.randn(batch, length, D, device=DEVICE).requires_grad_() for length in (T, L))
    branch = torch.randn(batch, T, D, device=DEVICE).to(dtype).requires_grad_()
    return residual, branch, prompts, 1 + 0.1 * torch.randn(D, device=DEVICE), torch.randn(D, device=DEVICE)


def operation(batch, itemsize, folded=False):
    """``folded``: without the affine map, which is in the next product, as the model runs it."""
    # forward: residual, branch and prompts in, residual and normalized tokens out; backward: both gradients and the
    # normalized tokens in, the gradients of the three operands out, of which the residual's is the branch's in fp32
    forward = T * (4 + itemsize + 4 + itemsize) + L * (4 + itemsize)
    branch = itemsize if itemsize < 4 else 0
    backward = T * (4 + itemsize + itemsize + 4 + branch) + L * (itemsize + itemsize + 4)
    return Operation(
        name=f"norm_insert {batch}x({T}+{L})x{D}" + ", folded" * folded,
        plain=plain,
        fast=fast,
        make=lambda dtype: make_operands(batch, dtype)[: 3 if folded else 5],
        nbytes=(batch * D * forward, batch * D * (forward + backward)),
        matmul=False,
    )


@each_case
def bench_norm_insert(benchmark, tiny, implementation, direction, precision):
    batch = 1 if tiny else 8 if DEVICE.type == "cpu" else 256
    time_operation(benchmark, operation(batch, DTYPES[precision].itemsize), implementation, direction, precision)
