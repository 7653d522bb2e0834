"""The feature prompts of several blocks in one step: blend_prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.registry import call, check_tensors, tensor_fields
from insvp_fast.runtime import buffers, recording
from insvp_fast.runtime.elementwise import put_sum

__all__ = ["blend_prompts", "blend_prompts_reference"]


def blend_prompts(
    common: Sequence[Tensor], specific: Tensor | None, w_c: float, w_s: float, batch: int, p: float = 0.0
) -> tuple[Tensor, ...]:
    """w_c·c_j + w_s·p_s for each of J blocks (equation 10 of the paper), bit for bit as block by block.

    On CPUs also with dropout, whose random numbers are those of one block after another.

    Args:
        common: c_j [L, D] of each block, all in one floating dtype.
        specific: p_s [B, L, D], or None.
        w_c, w_s: of the blend.
        batch: B, the number of images.
        p: the probability that a number of c_j is dropped, for each image by itself.

    Returns:
        J prompts [B, L, D], in the dtype that PyTorch promotes both to. Nothing but dropout's mask is kept for
        backward. Gradients are sums over the blocks; on CPUs in the order of a graph of single blocks, the last first,
        with the same bits.

    Raises:
        ValueError: for shapes or a batch that do not fit, or another p.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p={p}: expected a probability below 1")
    if not common:
        raise ValueError("common is empty: expected the prompts of at least one block")
    if batch < 0:
        raise ValueError(f"batch={batch}: expected at least 0")
    shape = common[0].shape
    for prompts in common:
        check_tensors((prompts, specific), FIELDS)
        if prompts.ndim != 2 or prompts.shape != shape:
            raise ValueError(
                f"common has shapes {[tuple(c.shape) for c in common]}: expected one [L, D] for all blocks"
            )
    if specific is not None and specific.shape != (batch, *shape):
        raise ValueError(f"specific has shape {tuple(specific.shape)}: expected {(batch, *shape)}")
    if common[0].is_cpu and not torch.compiler.is_compiling():
        return cast(tuple[Tensor, ...], apply(_BlendPrompts, w_c, w_s, batch, p, specific, *common))
    return blend_prompts_reference(w_c, w_s, batch, p, specific, *common)


class _Tensors(NamedTuple):
    common: Tensor
    specific: Tensor | None


FIELDS = tensor_fields(_Tensors)


def blend_prompts_reference(
    w_c: float, w_s: float, batch: int, p: float, specific: Tensor | None, *common: Tensor
) -> tuple[Tensor, ...]:
    """The formula of ``blend_prompts``."""
    stacked = _stacked(common).unsqueeze(1)  # [J, 1, L, D]
    stacked = F.dropout(stacked.repeat(1, batch, 1, 1), p) if p else stacked
    return _blended(stacked * w_c, w_s, batch, specific)


def _stacked(common: tuple[Tensor, ...]) -> Tensor:
    with torch.autocast(common[0].device.type, enabled=False):  # which stacks no fp16 where it computes in bf16
        return torch.stack(common)


def _blended(common: Tensor, w_s: float, batch: int, specific: Tensor | None) -> tuple[Tensor, ...]:
    blended = common.expand(-1, batch, -1, -1) if specific is None else common + w_s * specific
    return blended.unbind(0)


@first_order("blend_prompts", "blend_prompts_reference of the module insvp_fast.ops.blend_prompts")
class _BlendPrompts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w_c: float, w_s: float, batch: int, p: float, specific: Tensor | None, *common: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.weights, ctx.dtypes = (w_c, w_s), (common[0].dtype, None if specific is None else specific.dtype)
        ctx.set_materialize_grads(False)
        ctx.p = p
        if p:
            stacked = _stacked(common).unsqueeze(1).repeat(1, batch, 1, 1)
            dropped, kept = call("dropout_fwd", stacked, p, "auto")
            ctx.save_for_backward(kept)
            return _blended(dropped.mul_(w_c), w_s, batch, specific)
        if recording.current() is None:  # in fewer steps
            return blend_prompts_reference(w_c, w_s, batch, p, specific, *common)
        dtype = common[0].dtype if specific is None else torch.promote_types(common[0].dtype, specific.dtype)
        images = 1 if specific is None else batch
        blended = buffers.empty((len(common), images, *common[0].shape), dtype)
        for to, prompts in zip(blended, common, strict=True):
            put_sum(to, prompts.unsqueeze(0), w_c, specific, w_s)
        return blended.expand(-1, batch, -1, -1).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (w_c, w_s), (dtype, specific_dtype), d_specific = ctx.weights, ctx.dtypes, None
        *_, needs_specific = ctx.needs_input_grad[: -len(grads)]
        kept = ctx.saved_tensors[0] if ctx.p else None
        d_common: list[Tensor | None] = [None] * len(grads)
        for j, (grad, needed) in enumerate(zip(grads, ctx.needs_input_grad[-len(grads) :], strict=True)):
            if grad is not None and needed:
                d = grad.to(dtype) * w_c
                d_common[j] = (d if kept is None else call("dropout_bwd", d, kept[j], ctx.p, "auto")).sum(0)
        if needs_specific:
            for grad in reversed([grad for grad in grads if grad is not None]):
                d = grad.to(specific_dtype) * w_s
                d_specific = d if d_specific is None else d_specific.add_(d)
        return *(None,) * 4, d_specific, *d_common
