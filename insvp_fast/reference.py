"""The specification: InsVP in stock PyTorch and stock timm blocks, one equation after another.

Equation numbers are those of the paper (InsVP, ACM MM 2024). Nothing here is tuned and nothing here imports a kernel;
everything fast in this package is measured against these functions.

Letters: B images, C channels, H and W image size, P patch size, N patches, K = C·P·P pixels of a patch, R hidden width
of the patch prompter, T tokens of the backbone (prefix + N), L prompt tokens of a block, S = T + L, D embedding width,
J blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig

__all__ = ["GlobalPrompter", "ImagePrompt", "InsVPReference", "PatchPrompter", "SpecificPrompter"]


def unfold(image: Tensor, patch_size: int) -> Tensor:  # [B, C, H, W] -> [B, N, K]
    """Cut an image into patches, row by row, each flattened as channel, row, column."""
    B, C, H, W = image.shape
    P = patch_size
    return (
        image.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, (H // P) * (W // P), C * P * P)
    )


def fold(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:  # [B, N, K] -> [B, C, H, W]
    """The inverse of ``unfold``."""
    B, _, K = patches.shape
    P = patch_size
    C = K // (P * P)
    return patches.reshape(B, height // P, width // P, C, P, P).permute(0, 3, 1, 4, 2, 5).reshape(B, C, height, width)


def normalize(image: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # [B, C, H, W], uint8
    """The values u·scale + shift that an 8-bit image stands for; both [C], the dataset's mean and deviation in them."""
    return image.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]


def simam(image: Tensor) -> Tensor:  # [B, C, H, W]
    """Weigh each pixel by its SimAM energy, the parameter-free attention of the authors' release."""
    H, W = image.shape[-2:]
    deviation = (image - image.mean(dim=(2, 3), keepdim=True)).square()
    energy = deviation / (4 * (deviation.sum(dim=(2, 3), keepdim=True) / (H * W - 1) + 1e-3)) + 0.5
    return image * energy.sigmoid()


class GlobalPrompter(nn.Module):
    """G_g: two dilated convolutions with a ReLU between, dropout after (eq. 4). [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, config: InsVPConfig) -> None:
        super().__init__()
        (k1, k2), (d1, d2) = config.global_kernels, config.global_dilations
        self.conv1 = nn.Conv2d(channels, config.global_hidden, k1, padding="same", dilation=d1)
        self.conv2 = nn.Conv2d(config.global_hidden, channels, k2, padding="same", dilation=d2)
        self.dropout = nn.Dropout(config.global_dropout)

    def forward(self, image: Tensor) -> Tensor:
        return self.dropout(self.conv2(self.conv1(image).relu()))


class PatchPrompter(nn.Module):
    """G_l: two fully connected layers with a ReLU between, on every patch (eq. 5). [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, patch_size: int, config: InsVPConfig) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.fc1 = nn.Linear(channels * patch_size**2, config.patch_hidden)
        self.fc2 = nn.Linear(config.patch_hidden, channels * patch_size**2)
        self.dropout = nn.Dropout(config.patch_dropout)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.fc2(self.fc1(unfold(image, self.patch_size)).relu())
        return self.dropout(fold(patches, self.patch_size, *image.shape[-2:]))


class SpecificPrompter(nn.Module):
    """G_s: three convolutions with pooling between that make L tokens from an image (eq. 9). [B, C, H, W] -> [B, L, D].

    The paper reshapes [c·L, grid, grid] to [L, D], which needs D = c·grid². Its own case is c = 3 and grid = P = 16;
    for other widths c and grid come from ``token_grid``. Each pooling window is the largest that fits, on the center
    of the image, and for 224 pixels, P = 16 and D = 768 all sizes are those of the authors' release.
    """

    def __init__(self, channels: int, patch_size: int, embed_dim: int, config: InsVPConfig) -> None:
        super().__init__()
        self.token_channels, self.grid = self.token_grid(embed_dim, patch_size)
        L, (k1, k2, k3) = config.prompt_length, config.specific_kernels
        self.conv1 = nn.Conv2d(channels, L, k1, padding="same")
        self.conv2 = nn.Conv2d(L, self.token_channels * L, k2, padding="same")
        self.conv3 = nn.Conv2d(self.token_channels * L, self.token_channels * L, k3, padding="same")
        self.dropout = nn.Dropout(config.specific_dropout)

    @staticmethod
    def token_grid(embed_dim: int, patch_size: int) -> tuple[int, int]:
        """(c, grid) with c·grid² = D, where grid is the possible value nearest to the patch size."""
        fits = [grid for grid in range(1, embed_dim + 1) if embed_dim % grid**2 == 0]
        grid = min(fits, key=lambda grid: (abs(grid - patch_size), -grid))
        return embed_dim // grid**2, grid

    def forward(self, image: Tensor) -> Tensor:
        B, L, D = image.shape[0], self.conv1.out_channels, self.token_channels * self.grid**2
        x = pool_center(F.leaky_relu(self.conv1(image)), 3 * self.grid + 4)
        x = F.leaky_relu(self.conv2(self.dropout(x)))
        x = F.max_pool2d(crop_center(x, 3 * self.grid, 3 * self.grid), 3)
        return self.conv3(self.dropout(x)).reshape(B, L, D)


def pool_center(x: Tensor, size: int) -> Tensor:
    """Max-pool to ``size`` x ``size`` with the largest equal windows that fit on the center of a map."""
    H, W = (side // size * size or side for side in x.shape[-2:])
    return F.adaptive_max_pool2d(crop_center(x, H, W), size)


def crop_center(x: Tensor, height: int, width: int) -> Tensor:
    """The central ``height`` x ``width`` of the last two dimensions."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


class ImagePrompt(NamedTuple):
    """The image prompt and what it is made of, each [B, C, H, W]; None where switched off."""

    patch: Tensor | None
    global_: Tensor | None
    prompt: Tensor | None
    prompted: Tensor


class InsVPReference(nn.Module):
    """InsVP around a frozen timm Vision Transformer, exactly as the equations say.

    Args:
        backbone: a timm model name, or a timm ``VisionTransformer``, which is modified: it gets frozen, and its head
            becomes the model's.
        num_classes: classes of a new head; None keeps the backbone's own head, 0 returns pooled features.
        config: the hyper-parameters; ``InsVPConfig()``, the paper's, if not given.
        pretrained, backbone_kwargs: for ``timm.create_model``, where the backbone is a name.

    Shapes: images [B, C, H, W] in, logits [B, num_classes] out. Trained: the prompters, the common prompts and the
    head. Everything under ``backbone`` is frozen and stays in evaluation mode.

    Raises:
        TypeError: if the backbone is not a timm ``VisionTransformer`` with one head.
        ValueError: if its patches are not square, or the configuration asks for blocks that it does not have.
    """

    backbone: VisionTransformer

    def __init__(
        self,
        backbone: str | VisionTransformer,
        num_classes: int | None = None,
        config: InsVPConfig | None = None,
        *,
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone = create_model(backbone, pretrained=pretrained, **backbone_kwargs)
        elif pretrained or backbone_kwargs:
            raise ValueError(
                f"pretrained and {sorted(backbone_kwargs)} belong to a backbone given by name, and a module was given"
            )
        self.patch_size = _patch_size(backbone)
        if num_classes is not None:
            backbone.reset_classifier(num_classes)
        self.num_classes = backbone.num_classes
        self.head = backbone.get_classifier()
        if not isinstance(self.head, nn.Module):
            raise TypeError(f"the {type(backbone).__name__} has {len(self.head)} heads: expected one")
        backbone.reset_classifier(0)
        self.backbone = backbone.requires_grad_(False).eval()

        self.config = config = config or InsVPConfig()
        self.prompted_blocks = config.block_indices(len(backbone.blocks))
        # a hybrid's patch embedding is a whole network: the image channels are those of its first convolution
        weight = next(module.weight for module in backbone.patch_embed.modules() if isinstance(module, nn.Conv2d))
        C, P, D = weight.shape[1], self.patch_size, backbone.embed_dim
        with torch.device(weight.device):
            self.global_prompter = GlobalPrompter(C, config) if config.global_prompt else None
            self.patch_prompter = PatchPrompter(C, P, config) if config.patch_prompt else None
            specific = config.specific_prompt and bool(self.prompted_blocks)
            self.specific_prompter = SpecificPrompter(C, P, D, config) if specific else None
            common = config.common_prompt and bool(self.prompted_blocks)
            shape = (len(self.prompted_blocks), config.prompt_length, D)
            self.common_prompts = nn.Parameter(torch.empty(shape).uniform_(-1, 1).to(weight.dtype)) if common else None
        for prompter in (self.global_prompter, self.patch_prompter, self.specific_prompter):
            if prompter is not None:
                prompter.to(weight.dtype)
        self.head.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> InsVPReference:
        """Set the mode of what is trained; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def image_prompt(self, image: Tensor) -> ImagePrompt:
        """The image prompt and its parts (eq. 4 to 7), each [B, C, H, W]; a prompt that is switched off is None."""
        return self._image_prompt(simam(image) if self.config.simam else image)

    def _image_prompt(self, image: Tensor) -> ImagePrompt:
        (w_g, w_l), p_g, p_l, prompt = self.config.blend_image, None, None, None
        if self.global_prompter is not None:
            p_g = self.global_prompter(image)  # (4)
            prompt = w_g * p_g
        if self.patch_prompter is not None:
            p_l = self.patch_prompter(image)  # (5)
            prompt = w_l * p_l if prompt is None else prompt + w_l * p_l  # (6)
        return ImagePrompt(p_l, p_g, prompt, image if prompt is None else image + prompt)  # (7)

    def specific_prompt(self, image: Tensor, prompted: Tensor) -> Tensor | None:
        """p_s, [B, L, D], from the image or from the prompted image (eq. 9)."""
        if self.specific_prompter is None:
            return None
        return self.specific_prompter(image if self.config.specific_input == "image" else prompted)

    def feature_prompt(self, block: int, p_s: Tensor | None, batch: int) -> Tensor | None:
        """p_j = w_c·c_j + w_s·p_s, [B, L, D], or None for a block without prompts of its own (eq. 8 and 10)."""
        if block not in self.prompted_blocks:
            return None
        w_c, w_s = self.config.blend_feature
        if self.common_prompts is None:
            return None if p_s is None else w_s * p_s
        c_j = self.common_prompts[self.prompted_blocks.index(block)].expand(batch, -1, -1)
        c_j = F.dropout(c_j, self.config.common_dropout, self.training)
        return w_c * c_j if p_s is None else w_c * c_j + w_s * p_s

    def apply_block(self, block: nn.Module, h: Tensor, p_j: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """B_j of tokens [B, T, D] and prompts [B, L, D], which stand between prefix tokens and patches (eq. 2 and 11).

        Returns:
            The outputs of the tokens, [B, T, D], and of the prompts, [B, L, D] or None.
        """
        if p_j is None:
            return block(h), None  # (2)
        n, L = self.backbone.num_prefix_tokens, p_j.shape[1]
        z = block(torch.cat([h[:, :n], p_j.to(h.dtype), h[:, n:]], dim=1))  # (11)
        return torch.cat([z[:, :n], z[:, n + L :]], dim=1), z[:, n : n + L]

    def block_outputs(self, image: Tensor, blocks: Collection[int]) -> list[Tensor]:
        """The tokens after each of ``blocks``, [B, T, D] without prompts, in the order in which blocks run.

        What is behind the last of them does not run.
        """
        backbone, carried, outputs = self.backbone, None, []
        image = simam(image) if self.config.simam else image
        prompted = self._image_prompt(image).prompted
        p_s = self.specific_prompt(image, prompted)
        h = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(prompted))))  # (1)
        for j in range(max(blocks) + 1):
            p_j = self.feature_prompt(j, p_s, image.shape[0])
            h, prompt_outputs = self.apply_block(backbone.blocks[j], h, carried if p_j is None else p_j)
            carried = prompt_outputs if self.config.carry_prompts else None
            if j in blocks:
                outputs.append(h)
        return outputs

    def forward_features(self, image: Tensor) -> Tensor:
        """The tokens after the backbone's last norm, [B, T, D], without prompts."""
        return self.backbone.norm(self.block_outputs(image, [len(self.backbone.blocks) - 1])[0])

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens as the backbone does and, unless ``pre_logits``, classify (eq. 3)."""
        pooled = self.backbone.forward_head(tokens, pre_logits=True)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(image))


def _patch_size(backbone: nn.Module) -> int:
    if not isinstance(backbone, VisionTransformer):
        raise TypeError(f"backbone is a {type(backbone).__name__}: expected a timm VisionTransformer")
    patch_height, patch_width = backbone.patch_embed.patch_size
    if patch_height != patch_width:
        raise ValueError(f"the backbone has {patch_height}x{patch_width} patches: expected square ones")
    return patch_height
