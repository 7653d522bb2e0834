"""window_attention of the stages of a Swin-B, beside the formula."""

from functools import partial

import pytest
import torch

from benchmarks.operations import Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.backbones.windows import tokens_of_windows
from insvp_fast.ops.window_attention import window_attention_reference
from insvp_fast.testing import DEVICE

B, L, WIDTH = 4, 9, 32  # WIDTH: of a head
STAGES = {"first": (56, 4), "third": (14, 16)}  # side of the grid, heads


def operation(stage: str) -> Operation:
    side, heads = STAGES[stage]
    windows = tokens_of_windows((side, side), (7, 7), (3, 3), torch.empty(0, device=DEVICE))
    (n, w), T = windows.shape, side * side
    bias, mask = torch.randn(heads, w, w, device=DEVICE), torch.randn(n, w, w, device=DEVICE)
    shape = {"num_heads": heads, "windows": windows, "bias": bias, "mask": mask, "scale": WIDTH**-0.5}

    def make(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(B, T + L, 3 * heads * WIDTH, device=DEVICE).to(dtype).requires_grad_()]

    forward = 4 * B * T * (w + L) * heads * WIDTH
    fast, plain = partial(ops.window_attention, **shape), partial(window_attention_reference, **shape)
    return Operation(f"window_attention, {stage} stage", plain, fast, make, flops=(forward, 3.5 * forward))


@pytest.mark.parametrize("stage", STAGES)
@each_case
def bench_window_attention(benchmark, implementation, direction, precision, stage):
    time_operation(benchmark, operation(stage), implementation, direction, precision)
