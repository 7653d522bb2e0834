"""The arithmetic of the authors' released code, written anew in plain PyTorch around timm's blocks.

It covers the one geometry of the release: images 224x224, patches 16x16, width 768, with all crops and strides as
literal numbers. It shares no code with the package, so that tests can compare with it and benchmarks can time it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["Released"]


class Released(nn.Module):
    """The released model, [B, 3, 224, 224] -> [B, classes], under the state-dict keys of the authors' code.

    As released, nothing is frozen: backward computes the gradients of all weights, although the optimizer gets neither
    the backbone's nor the specific prompter's.

    Args:
        backbone: timm's ViT-B/16, of any depth.
        layers: how many blocks get prompts of their own; later blocks take the previous block's outputs of the prompts.
        frozen: freeze the backbone but for its head.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        layers: int = 12,
        length: int = 16,
        kernels: tuple[int, int, int] = (7, 9, 3),
        dropout: float = 0.1,
        simam: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        L, (k1, k2, k3) = length, kernels
        self.backbone = backbone
        self.prompts = nn.Parameter(torch.empty(layers, L, 768).uniform_(-1, 1))
        self.TokenPrompt = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(3, L, k1, padding=k1 // 2),
                "conv2": nn.Conv2d(L, 3 * L, k2, padding=k2 // 2),
                "conv3": nn.Conv2d(3 * L, 3 * L, k3, padding=k3 // 2),
            }
        )
        self.meta_net = nn.Sequential(nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 768))
        self.meta_net_2 = nn.Sequential(nn.Conv2d(3, 6, 11, padding=5), nn.ReLU(), nn.Conv2d(6, 3, 25, padding=12))
        self.dropout = nn.Dropout(dropout)
        self.simam, self.frozen = simam, frozen
        if frozen:
            backbone.requires_grad_(False)
            backbone.head.requires_grad_(True)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets."""
        left_out = ("backbone.",) if self.frozen else ("backbone.", "TokenPrompt.")
        names = dict(self.named_parameters())
        return [p for name, p in names.items() if name.startswith("backbone.head.") or not name.startswith(left_out)]

    def forward(self, image: Tensor) -> Tensor:
        x = simam(image) if self.simam else image
        p_g = self.dropout(self.meta_net_2(x))
        patches = self.meta_net(F.unfold(x, kernel_size=16, stride=16).transpose(1, 2))
        p_l = self.dropout(F.fold(patches.transpose(1, 2), (224, 224), kernel_size=16, stride=16))
        prompted = x + 2 * p_g + p_l

        h = self.backbone._pos_embed(self.backbone.patch_embed(prompted))
        for j, block in enumerate(self.backbone.blocks):
            if j < len(self.prompts):
                p_s = self.token_prompt(prompted)  # evaluated anew in each block
                p = self.dropout(self.prompts[j].expand(len(h), -1, -1)) + p_s
                first_patch = 1 if j == 0 else 1 + self.prompts.shape[1]
                h = torch.cat([h[:, :1], p, h[:, first_patch:]], dim=1)
            h = block(h)
        return self.backbone.head(self.backbone.fc_norm(self.backbone.norm(h)[:, 0]))

    def token_prompt(self, x: Tensor) -> Tensor:  # [B, 3, 224, 224] -> [B, L, 768]
        x = F.leaky_relu(self.TokenPrompt["conv1"](x), 0.01)
        x = self.dropout(F.max_pool2d(x[:, :, 8:216, 8:216], 4))
        x = F.leaky_relu(self.TokenPrompt["conv2"](x), 0.01)
        x = self.dropout(F.max_pool2d(x[:, :, 2:50, 2:50], 3))
        return self.TokenPrompt["conv3"](x).reshape(len(x), -1, 768)


def simam(x: Tensor) -> Tensor:
    d = (x - x.mean(dim=(2, 3), keepdim=True)) ** 2
    e = d / (4 * (d.sum(dim=(2, 3), keepdim=True) / (224 * 224 - 1) + 1e-3)) + 0.5
    return x * torch.sigmoid(e)
