"""The floor under the time of a step: its needed operations, at the best rate of products that the machine reaches.

Unlike the ratio to another model, the ratio to this floor says nothing of how good the other model's products are. The
rate is that of a block's products, each called by itself: a step on one image has been up to a tenth faster.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention import AttentionRope
from timm.models import beit
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast.backbones import family_of
from insvp_fast.config import InsVPConfig
from insvp_fast.reference import InsVPReference
from insvp_fast.runtime import cuda_graphs, hardware, native, products, torch_private
from insvp_fast.testing import DEVICE

__all__ = ["BlockProducts", "needed_flops", "require_known"]

TITLES = {
    "plain": "F.linear",
    "onednn": "oneDNN packed",
    "native": "native library",
    "widened": "widened to fp32",
}  # the names of ``runtime.products``, and ours for readers


class Shape(NamedTuple):
    """A product of one image in a block: its rows, inputs and outputs."""

    rows: int
    d_in: int
    d_out: int


class BlockProducts:
    """The products of a block, by every provider that this machine has.

    Attributes:
        runs: by the provider's name, all products, on a GPU ten times.
        flops: of a run.

    Args:
        config: of InsVP, whose prompts are multiplied for keys and values only, as rows of the first product.
        dtype: of the operands.
        backbone_kwargs: for ``timm.create_model``.
    """

    def __init__(self, name: str, config: InsVPConfig, batch: int, dtype: torch.dtype, **backbone_kwargs: Any) -> None:
        with torch.device("meta"):
            shapes = _block_shapes(timm.create_model(name, **backbone_kwargs), config.prompt_length)
        repeats = 10 if DEVICE.type == "cuda" else 1  # a GPU is launched ahead, so that waiting for it costs nothing
        self.flops = repeats * sum(2 * batch * math.prod(shape) for shape in shapes)
        random = functools.partial(torch.randn, device=DEVICE)  # zeros would be faster on a GPU
        operands = [
            (random(batch * rows, d_in).to(dtype), products.FrozenLinear(random(d_out, d_in).to(dtype)))
            for rows, d_in, d_out in shapes
        ]
        self.runs: dict[str, Callable[[], object]] = {}
        for how in _providers(dtype):
            run = functools.partial(_multiply, [_product(*pair, how) for pair in operands] * repeats)
            self.runs[TITLES[how]] = run if DEVICE.type == "cpu" else _launched_at_once(run)

    def rates(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """FLOP/s by provider, of the seconds that each of ``runs`` took in each round."""
        return {by: self.flops / statistics.median(seconds[by]) for by in self.runs}

    def floor_ratio(self, step: Sequence[float], flops: float, seconds: Mapping[str, Sequence[float]]) -> float:
        """The median ratio of a step's time to that of its operations at the best rate, both of the same round.

        Args:
            step: its seconds in each round.
            flops: what it needs (``needed_flops``).
            seconds: as of ``rates``.
        """
        rates = self.rates(seconds)
        best = seconds[max(rates, key=lambda by: rates[by])]
        return statistics.median(mine * self.flops / (flops * each) for mine, each in zip(step, best, strict=True))


def _product(x: Tensor, layer: products.FrozenLinear, how: str) -> Callable[[], Tensor]:
    """A product by itself: the weight is packed before, and nobody looks whether it has changed."""
    if how == "native":
        return functools.partial(native.linear, x, *layer.operands(how, x.dtype, "forward"), layer.out_features)
    if how == "onednn":
        return functools.partial(torch_private.packed_linear, x, layer.operands(how, x.dtype, "forward")[0], None)
    if how == "widened":
        return functools.partial(products.linear, x, layer, how)
    return functools.partial(F.linear, x, layer.weight)


def _multiply(all_products: Sequence[Callable[[], Tensor]]) -> None:
    with torch.inference_mode():
        for product in all_products:
            product()


def _launched_at_once(run: Callable[[], None]) -> Callable[[], None]:
    """A run as a CUDA graph: at small batches, launching takes longer than multiplying."""
    run()  # cuBLAS asks for memory
    _, replay = cuda_graphs.Space(DEVICE).capture(run)
    return functools.partial(_replay, replay, run)


def _replay(replay: Callable[[], None], run: Callable[[], None]) -> None:
    """``run`` holds the operands that the graph reads."""
    replay()


def _providers(dtype: torch.dtype) -> list[str]:
    if DEVICE.type != "cpu":
        return ["plain"]
    if not hardware.has_products(dtype):
        return [products.cpu_provider(dtype)]  # the others take minutes
    return ["plain"] + ["onednn"] * products.onednn_works(dtype) + ["native"] * native.available(dtype)


def _block_shapes(backbone: Any, L: int) -> list[Shape]:
    """Those of a ViT's block, or of the stage of a Swin Transformer with the most blocks."""
    if isinstance(backbone, SwinTransformer):
        stage = max(backbone.layers, key=lambda stage: len(stage.blocks))
        T, block = math.prod(stage.output_resolution), stage.blocks[0]
    else:
        T, block = backbone.patch_embed.num_patches + backbone.num_prefix_tokens, backbone.blocks[0]
    D = block.norm1.normalized_shape[0]
    return [
        Shape(T + L, D, 3 * D),
        Shape(T, D, D),
        *(Shape(T, layer.in_features, layer.out_features) for layer in _linears(block.mlp)),
    ]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def require_known(backbone: nn.Module) -> None:
    """Check that ``needed_flops`` knows all that a backbone computes.

    Raises:
        ValueError: if it does not.
    """
    if not isinstance(backbone, VisionTransformer | SwinTransformer | beit.Beit | Eva):
        found = type(backbone).__name__
        raise ValueError(f"expected a VisionTransformer, SwinTransformer, Beit or Eva of timm, found {found}")
    swin = isinstance(backbone, SwinTransformer)
    blocks: Any = [block for stage in backbone.layers for block in stage.blocks] if swin else backbone.blocks
    parts = [part for block in blocks for part in (block, getattr(block, "attn", None), getattr(block, "mlp", None))]
    known = {Block, Attention, SwinTransformerBlock, WindowAttention, beit.Block, beit.Attention, Mlp, PatchEmbed}
    known |= {EvaBlock, EvaAttention, AttentionRope, GluMlp, SwiGLU}
    parts += [backbone.patch_embed, getattr(backbone, "attn_pool", None)]
    if unknown := {type(part) for part in parts} - known - {type(None)}:
        names = " and ".join(sorted(kind.__name__ for kind in unknown))
        raise ValueError(f"expected blocks, patch embedding and pooling whose operations are known, found {names}")


@functools.cache
def needed_flops(kind: str, name: str, config: InsVPConfig, backward: bool, **backbone_kwargs: Any) -> float:
    """The floating-point operations that a model needs for one image, but for its head.

    The bare backbone needs all of its own. With prompts, these are the operations left by the exact savings: prompts
    give keys and values only, and in the last block of a ViT only the tokens ask that the head reads. Keys and values
    of that block are counted, although InsVPViT does without: 1.4 to 1.5 % of a ViT-B/16. Backward adds each frozen
    product once, attention two and a half times, since it makes the scores again, and of the prompters what
    ``_prompter_flops`` says.

    Args:
        kind: "bare", or anything else for InsVP.
    """
    with torch.device("meta"):
        backbone = timm.create_model(name, **backbone_kwargs)
        model = None if kind == "bare" else InsVPReference(backbone, None, config)
        image = torch.empty(1, 3, *backbone.patch_embed.img_size)
    L = 0 if model is None else config.prompt_length
    terms = _swin_terms if isinstance(backbone, SwinTransformer) else _vit_terms
    matrices, scores = terms(backbone, L, model is not None)
    prompters, prompters_too = (0.0, 0.0) if model is None else _prompter_flops(model, image)
    return 2 * (matrices + scores) + prompters + (2 * matrices + 5 * scores + prompters_too) * backward


def _vit_terms(backbone: Any, L: int, saves: bool) -> tuple[float, float]:
    """The multiplications of a ViT's frozen products and of its attention.

    ``saves``: in the last block only the tokens ask that the head reads, one if that is the class token.
    """
    D, J, N = backbone.embed_dim, len(backbone.blocks), backbone.patch_embed.num_patches
    T, mlp = N + backbone.num_prefix_tokens, sum(layer.weight.numel() for layer in _linears(backbone.blocks[0].mlp))
    family: Any = family_of(backbone)
    queries = (J - 1) * T + ((saves and family.read_tokens(backbone)) or T)
    matrices = _patch_embedding(backbone) + queries * (2 * D * D + mlp) + J * (T + L) * 2 * D * D
    return matrices, queries * (T + L) * 2 * D


def _swin_terms(backbone: Any, L: int, saves: bool) -> tuple[float, float]:
    """As ``_vit_terms``; there is no query to save."""
    matrices, scores = _patch_embedding(backbone), 0.0
    for stage in backbone.layers:
        T = math.prod(stage.output_resolution)
        if stage.downsample is not backbone.layers[0].downsample:
            matrices += T * stage.downsample.reduction.weight.numel()
        for block in stage.blocks:
            D, hidden = block.dim, block.mlp.fc1.out_features
            matrices += T * 2 * D * (D + hidden) + (T + L) * 2 * D * D
            scores += T * (block.window_area + L) * 2 * D
    return matrices, scores


def _patch_embedding(backbone: Any) -> float:
    return float(backbone.patch_embed.num_patches * backbone.patch_embed.proj.weight.numel())


def _prompter_flops(model: InsVPReference, image: torch.Tensor) -> tuple[float, float]:
    """The operations of the prompters, forward and backward.

    Forward convolves what pooling reads. Backward makes the gradients that anything needs: none of the image, and
    behind max-pooling those of the one pixel of a window that was chosen.
    """
    H, W = image.shape[-2:]
    terms: list[tuple[nn.Module, int, int, int]] = []  # a layer's outputs forward, backward, gradients of each
    if (g := model.global_prompter) is not None:
        terms += [(g.conv1, H * W, H * W, 1), (g.conv2, H * W, H * W, 2)]
    if (p := model.patch_prompter) is not None:
        N = H * W // p.patch_size**2
        terms += [(p.fc1, N, N, 1), (p.fc2, N, N, 2)]
    if (s := model.specific_prompter) is not None:
        size = 3 * s.grid + 4
        read = math.prod(side // size * size or side for side in (H, W))
        terms.append((s.conv1, read, size**2, 1 if model.config.specific_input == "image" else 2))
        terms += [(s.conv2, 9 * s.grid**2, s.grid**2, 2), (s.conv3, s.grid**2, s.grid**2, 2)]
    forward = backward = 0.0
    for layer, outputs, followed, gradients in terms:
        weights = sum(w.numel() for w in layer.parameters() if w.ndim > 1)
        forward, backward = forward + 2 * weights * outputs, backward + 2 * gradients * weights * followed
    return forward, backward
