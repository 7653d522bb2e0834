"""Residual addition, LayerNorm and placement of the prompts, in the stream's fp32 and the products' precision."""

import torch

from benchmarks.measure import CASES, DEVICE, DTYPES, time_operation
from insvp_fast import ops
from insvp_fast.ops.norm_insert import norm_insert_reference

T, L, D = 197, 9, 768


@CASES
def bench_norm_insert(benchmark, tiny, implementation, direction, precision):
    B = 1 if tiny else 8 if DEVICE.type == "cpu" else 256
    out = DTYPES[precision]
    size = out.itemsize

    def make(dtype):
        residual, prompts = (torch.randn(B, length, D, device=DEVICE).requires_grad_() for length in (T, L))
        branch = torch.randn(B, T, D, device=DEVICE).to(dtype).requires_grad_()
        return residual, branch, prompts, 1 + 0.1 * torch.randn(D, device=DEVICE), torch.randn(D, device=DEVICE)

    def plain(residual, branch, prompts, weight, bias):
        total, normed = norm_insert_reference(residual, branch, prompts, weight, bias, 1e-6)
        return total, normed.to(out) if residual.dtype == torch.float32 else normed

    def fast(*operands):
        return ops.norm_insert(*operands, 1e-6, dtype=out)

    # forward: residual, branch and prompts in, residual and normalised tokens out; backward: both gradients and the
    # kept tokens in, the gradients of the three operands out
    forward = T * (4 + size + 4 + size) + L * (4 + size)
    backward = T * (4 + size + 4 + 4 + size) + L * (size + 4 + 4)
    time_operation(
        benchmark,
        implementation,
        direction,
        precision,
        name=f"norm_insert {B}x({T}+{L})x{D}",
        plain=plain,
        fast=fast,
        make=make,
        nbytes=B * D * (forward + (backward if direction != "forward" else 0)),
        products=False,
    )
