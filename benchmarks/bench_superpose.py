"""The image prompt, unfolded: images and prompts in, tokens out."""

import torch

from benchmarks.measure import CASES, DEVICE, time_operation
from insvp_fast import ops
from insvp_fast.ops import Blend, PatchWeights
from insvp_fast.ops.superpose import superpose_reference

P, R, K, N = 16, 16, 768, 196


@CASES
def bench_superpose(benchmark, tiny, implementation, direction, precision):
    B = 1 if tiny else 8 if DEVICE.type == "cpu" else 256

    def make(dtype):
        image, prompt = (torch.randn(B, 3, 224, 224, device=DEVICE).to(dtype) for _ in range(2))
        shapes = (R, K), (R,), (K, R), (K,)
        weights = [torch.randn(shape, device=DEVICE).div_(shape[-1] ** 0.5).requires_grad_() for shape in shapes]
        return [image, prompt.requires_grad_(), *weights]

    def plain(image, prompt, *weights):  # the weights as autocast would have them
        return superpose_reference(
            image, prompt, PatchWeights(*(w.to(image.dtype) for w in weights)), Blend(P, 0.7, 0.3)
        )

    def fast(image, prompt, *weights):
        return ops.superpose(image, prompt, PatchWeights(*weights), Blend(P, 0.7, 0.3))

    # forward: image and prompt in, tokens out; backward: gradient and image in, the prompt's gradient out
    passes = 3 if direction == "forward" else 6
    time_operation(
        benchmark,
        implementation,
        direction,
        precision,
        name=f"superpose {B}x3x224x224",
        plain=plain,
        fast=fast,
        make=make,
        flops=B * N * K * R * 4 * (1 if direction == "forward" else 2.5),
        nbytes=passes * B * N * K * (4 if precision == "fp32" else 2),
    )
