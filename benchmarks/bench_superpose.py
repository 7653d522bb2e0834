"""superpose: images and their prompts in, prompted patches out, as the patch embedding's product takes them."""

import torch

from benchmarks.operations import DTYPES, Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.ops import Blend, PatchWeights
from insvp_fast.ops.superpose import superpose_reference
from insvp_fast.testing import DEVICE

P, R, K, N = 16, 16, 768, 196
BLEND = Blend(patch_size=P, global_weight=0.7, patch_weight=0.3)


def plain(image, prompt, *weights):  # the weights as autocast would have them
    cast = PatchWeights(*(w.to(prompt.dtype) for w in weights))
    return superpose_reference(image.to(prompt.dtype), prompt, cast, BLEND)


def fast(image, prompt, *weights):
    return ops.superpose(image, prompt, PatchWeights(*weights), BLEND, dtype=prompt.dtype)


def make_operands(batch, dtype, autocast):
    image, prompt = (torch.randn(batch, 3, 224, 224, device=DEVICE) for _ in range(2))
    image, prompt = image if autocast else image.to(dtype), prompt.to(dtype)
    shapes = (R, K), (R,), (K, R), (K,)
    weights = [torch.randn(shape, device=DEVICE).div_(shape[-1] ** 0.5).requires_grad_() for shape in shapes]
    return [image, prompt.requires_grad_(), *weights]


def operation(batch, itemsize, autocast=False):
    """``autocast``: of images in fp32, as the model gets them under autocast."""
    flops, map_bytes = 4 * batch * N * K * R, batch * N * K * itemsize
    image_bytes = batch * N * K * 4 if autocast else map_bytes
    return Operation(
        name=f"superpose {batch}x3x224x224" + ", fp32 images" * autocast,
        plain=plain,
        fast=fast,
        make=lambda dtype: make_operands(batch, dtype, autocast),
        flops=(flops, 2.5 * flops),
        # forward: image and prompt in, tokens out; backward: gradient and image in, the prompt's gradient out
        nbytes=(2 * map_bytes + image_bytes, 4 * map_bytes + 2 * image_bytes),
    )


@each_case
def bench_superpose(benchmark, tiny, implementation, direction, precision):
    batch = 1 if tiny else 8 if DEVICE.type == "cpu" else 256
    time_operation(benchmark, operation(batch, DTYPES[precision].itemsize), implementation, direction, precision)
