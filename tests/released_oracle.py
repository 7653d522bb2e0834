"""The forward pass of the authors' released code, said again in plain PyTorch; it shares nothing with the package.

Written for its one geometry: images 224x224, patches 16x16, width 768. All crops and strides are literal numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, WIDTH, MLP = 12, 768, 3072


def random_state_dict(
    depth: int, layers: int, length: int, kernels: tuple[int, int, int], classes: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights under the keys of the authors' code, of sizes that let each part show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *shape: int, gain: float = 1.0) -> None:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * gain * fan_in**-0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def add_norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + torch.randn(WIDTH, generator=generator) * 0.1
        tensors[f"{name}.bias"] = torch.randn(WIDTH, generator=generator) * 0.1

    tensors["backbone.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    tensors["backbone.pos_embed"] = torch.randn(1, 197, WIDTH, generator=generator) * 0.2
    add("backbone.patch_embed.proj", WIDTH, 3, 16, 16)
    for j in range(depth):
        add_norm(f"backbone.blocks.{j}.norm1")
        add_norm(f"backbone.blocks.{j}.norm2")
        add(f"backbone.blocks.{j}.attn.qkv", 3 * WIDTH, WIDTH, gain=1.5)
        add(f"backbone.blocks.{j}.attn.proj", WIDTH, WIDTH)
        add(f"backbone.blocks.{j}.mlp.fc1", MLP, WIDTH)
        add(f"backbone.blocks.{j}.mlp.fc2", WIDTH, MLP)
    add_norm("backbone.norm")
    add("backbone.head", classes, WIDTH)
    tensors["prompts"] = torch.rand(layers, length, WIDTH, generator=generator) * 2 - 1
    add("TokenPrompt.conv1", length, 3, kernels[0], kernels[0], gain=2)
    add("TokenPrompt.conv2", 3 * length, length, kernels[1], kernels[1], gain=2)
    add("TokenPrompt.conv3", 3 * length, 3 * length, kernels[2], kernels[2], gain=2)
    add("meta_net.0", 16, WIDTH)
    add("meta_net.2", WIDTH, 16)
    add("meta_net_2.0", 6, 3, 11, 11)
    add("meta_net_2.2", 3, 6, 25, 25)
    return tensors


def forward(tensors: dict[str, Tensor], images: Tensor, simam: bool = False) -> Tensor:
    """[B, 3, 224, 224] -> [B, classes], in evaluation."""
    x = _simam(images) if simam else images
    hidden = _conv(tensors, "meta_net_2.0", x, 5).relu()
    p_g = _conv(tensors, "meta_net_2.2", hidden, 12)
    patches = F.unfold(x, kernel_size=16, stride=16).transpose(1, 2)
    patches = _linear(tensors, "meta_net.2", _linear(tensors, "meta_net.0", patches).relu())
    p_l = F.fold(patches.transpose(1, 2), (224, 224), kernel_size=16, stride=16)
    prompted = x + 2 * p_g + p_l

    weight, bias = (tensors[f"backbone.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    h = F.conv2d(prompted, weight, bias, stride=16).flatten(2).transpose(1, 2)
    cls = tensors["backbone.cls_token"].expand(len(h), -1, -1)
    h = torch.cat([cls, h], dim=1) + tensors["backbone.pos_embed"]

    prompts = tensors["prompts"]
    depth = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("backbone.blocks."))
    for j in range(depth):
        if j < len(prompts):
            p = prompts[j] + _token_prompt(tensors, prompted)  # evaluated anew in each block
            first_patch = 1 if j == 0 else 1 + prompts.shape[1]
            h = torch.cat([h[:, :1], p, h[:, first_patch:]], dim=1)
        h = _block(tensors, f"backbone.blocks.{j}", h)
    return _linear(tensors, "backbone.head", _norm(tensors, "backbone.norm", h)[:, 0])


def _simam(x: Tensor) -> Tensor:
    d = (x - x.mean(dim=(2, 3), keepdim=True)) ** 2
    n = 224 * 224 - 1
    e = d / (4 * (d.sum(dim=(2, 3), keepdim=True) / n + 1e-3)) + 0.5
    return x * torch.sigmoid(e)


def _token_prompt(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    k1, k2, k3 = (tensors[f"TokenPrompt.conv{i}.weight"].shape[-1] for i in (1, 2, 3))
    x = F.leaky_relu(_conv(tensors, "TokenPrompt.conv1", x, k1 // 2), 0.01)
    x = F.max_pool2d(x[:, :, 8:216, 8:216], 4)
    x = F.leaky_relu(_conv(tensors, "TokenPrompt.conv2", x, k2 // 2), 0.01)
    x = F.max_pool2d(x[:, :, 2:50, 2:50], 3)
    x = _conv(tensors, "TokenPrompt.conv3", x, k3 // 2)
    return x.reshape(len(x), -1, WIDTH)


def _block(tensors: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    B, T, _ = h.shape
    qkv = _linear(tensors, f"{name}.attn.qkv", _norm(tensors, f"{name}.norm1", h))
    q, k, v = qkv.reshape(B, T, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5, dim=-1)
    h = h + _linear(tensors, f"{name}.attn.proj", (weights @ v).transpose(1, 2).reshape(B, T, WIDTH))
    hidden = F.gelu(_linear(tensors, f"{name}.mlp.fc1", _norm(tensors, f"{name}.norm2", h)))
    return h + _linear(tensors, f"{name}.mlp.fc2", hidden)


def _norm(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6)


def _linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _conv(tensors: dict[str, Tensor], name: str, x: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=padding)
