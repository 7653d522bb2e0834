"""Make the small backbone that the package ships: a Vision Transformer pretrained on procedurally drawn scenes.

    python tools/pretrain_backbone.py                      # about 20 minutes on 2 CPU cores

No data is downloaded. Every scene is a textured background with one or two textured shapes or strokes on it. From its
class token the network learns which shapes and textures it sees, how many, in which colours, and how the background is
oriented; from the token of each patch, which of its pixels a shape covers. Letters and digits are left out on purpose:
handwriting stays a new domain for the backbone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

NAME = "vit_shapes_32"
SIZE, PATCH = 32, 8
MEAN, STD = 0.5, 0.5
HELD_OUT = 2048  # scenes on which the result is measured
ARCHITECTURE = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "in_chans": 3,
    "num_classes": 0,
    "global_pool": "token",
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
}

# ------------------------------------------------------------------------------------------------------ the pictures


def draw_scenes(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw random scenes: images [count, 3, SIZE, SIZE] in [0, 1], and their labels; the same seed, the same pixels."""
    g = torch.Generator().manual_seed(seed)
    image, ground = draw_texture(count, g)
    shapes, covered, objects = torch.zeros(count, len(SHAPES)), torch.zeros(count, SIZE, SIZE), []
    number = torch.randint(1, 3, (count,), generator=g)
    for i in range(2):
        seen = number > i
        kind = torch.randint(len(SHAPES), (count,), generator=g)
        fill, paint = draw_texture(count, g, plain=0.5)
        cover = draw_shape(kind, g) * seen[:, None, None]
        image = image + cover[:, None] * (fill - image)
        covered = torch.maximum(covered, cover)
        shapes[seen, kind[seen]] = 1.0
        objects.append(paint)
    image = image + uniform(g, count, 0, 0.05).view(-1, 1, 1, 1) * torch.randn(image.shape, generator=g)
    first = objects[0]
    labels = {
        "mask": covered,  # [count, SIZE, SIZE] in [0, 1], where a shape is
        "shapes": shapes,  # [count, kinds], which of them are there
        "number": number - 1,  # [count]
        "ground": ground["kind"],  # [count]
        "fill": first["kind"],  # [count]
        "colours": torch.cat([ground["colours"], first["colours"]], 1),  # [count, 12], in [0, 1]
        "slant": ground["slant"],  # [count, 2], in [-1, 1]
    }
    return image.clamp(0, 1), labels


def draw_texture(count: int, g: torch.Generator, plain: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Fill whole images, [count, 3, SIZE, SIZE], each with one texture of two colours; more of them plain if wished."""
    kind = torch.randint(len(TEXTURES), (count,), generator=g)
    kind[torch.rand(count, generator=g) < plain] = list(TEXTURES).index("plain")
    angle, pitch, phase = uniform(g, count, 0, math.pi), uniform(g, count, 5, 16), uniform(g, count, 0, 2 * math.pi)
    field = torch.empty(count, SIZE, SIZE)
    for i, texture in enumerate(TEXTURES.values()):
        mine = kind == i
        u, v = plane(angle[mine])
        p, q = pitch[mine].view(-1, 1, 1), phase[mine].view(-1, 1, 1)
        field[mine] = texture(u, torch.sin(p * u + q), torch.sin(p * v + q), g)
    colours = torch.rand(count, 2, 3, generator=g)
    first, second = colours[:, :, :, None, None].unbind(1)
    image = first + field.clamp(0, 1)[:, None] * (second - first)
    slanted = (kind == list(TEXTURES).index("linear")) | (kind == list(TEXTURES).index("grating"))
    slant = torch.stack([torch.cos(2 * angle), torch.sin(2 * angle)], 1) * slanted[:, None]
    return image, {"kind": kind, "colours": colours.flatten(1), "slant": slant}


def clouds(u: Tensor, g: torch.Generator) -> Tensor:
    return F.interpolate(torch.rand(len(u), 1, 5, 5, generator=g), size=(SIZE, SIZE), mode="bicubic")[:, 0]


# how the second colour is mixed in, [count, SIZE, SIZE], from a coordinate u and the waves along and across it
TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]] = {
    "plain": lambda u, along, across, g: torch.zeros_like(u),
    "linear": lambda u, along, across, g: 0.5 + 0.4 * u,
    "grating": lambda u, along, across, g: 0.5 + 0.5 * along,
    "checker": lambda u, along, across, g: torch.sigmoid(12 * along * across),
    "dots": lambda u, along, across, g: torch.sigmoid(12 * (along + across - 0.9)),
    "clouds": lambda u, along, across, g: clouds(u, g),
    "grain": lambda u, along, across, g: torch.rand(u.shape, generator=g),
}


def draw_shape(kind: Tensor, g: torch.Generator) -> Tensor:
    """Coverage, [count, SIZE, SIZE] in [0, 1], of one shape per image at a random place, size and turn."""
    count = len(kind)
    size, thick = uniform(g, count, 0.4, 0.9).view(-1, 1, 1), uniform(g, count, 0.12, 0.3).view(-1, 1, 1)
    x, y = plane(uniform(g, count, 0, 2 * math.pi), uniform(g, count, -0.4, 0.4), uniform(g, count, -0.4, 0.4))
    x, y = x / size, y / size
    distance = torch.empty(count, SIZE, SIZE)
    for i, shape in enumerate(SHAPES.values()):
        mine = kind == i
        distance[mine] = shape(x[mine], y[mine], thick[mine])
    return torch.sigmoid(-distance * size * SIZE)  # an edge about two pixels wide


def radius(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt()


def box(x: Tensor, y: Tensor, left: float, right: float, bottom: float, top: float) -> Tensor:
    return torch.maximum(torch.maximum(left - x, x - right), torch.maximum(bottom - y, y - top))


def polygon(x: Tensor, y: Tensor, sides: int) -> Tensor:
    corner = 2 * math.pi / sides
    return radius(x, y) * torch.cos(torch.remainder(torch.atan2(y, x), corner) - corner / 2) - math.cos(corner / 2)


def ring(x: Tensor, y: Tensor, thick: Tensor) -> Tensor:
    return (radius(x, y) - 0.8).abs() - thick


# distance to the edge, negative inside; not exact far away, where coverage is 0 all the same
SHAPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y, thick: radius(x, y) - 0.9,
    "ring": ring,
    "half": lambda x, y, thick: torch.maximum(radius(x, y) - 1, y),
    "moon": lambda x, y, thick: torch.maximum(radius(x, y) - 1, 0.85 - radius(x - 0.5, y)),
    "square": lambda x, y, thick: box(x, y, -0.8, 0.8, -0.8, 0.8),
    "bar": lambda x, y, thick: box(x, y, -1, 1, -0.2, 0.2),
    "cross": lambda x, y, thick: torch.minimum(box(x, y, -1, 1, -0.25, 0.25), box(x, y, -0.25, 0.25, -1, 1)),
    "ell": lambda x, y, thick: torch.minimum(box(x, y, -0.8, 0.8, -0.8, -0.35), box(x, y, -0.8, -0.35, -0.8, 0.8)),
    "triangle": lambda x, y, thick: polygon(x, y, 3),
    "hexagon": lambda x, y, thick: polygon(x, y, 6),
    "star": lambda x, y, thick: radius(x, y) - 0.6 - 0.35 * torch.cos(5 * torch.atan2(y, x)),
    "arc": lambda x, y, thick: torch.maximum(ring(x, y, thick), torch.atan2(y, x).abs() - 2),
    "wave": lambda x, y, thick: torch.maximum((y - 0.4 * torch.sin(4 * x)).abs() - thick, x.abs() - 1),
    "vee": lambda x, y, thick: torch.maximum((y - 1.2 * x.abs() + 0.6).abs() - thick, x.abs() - 0.9),
}


def plane(angle: Tensor, left: Tensor | float = 0.0, down: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The coordinates of every pixel, [count, SIZE, SIZE] each, from -1 to 1 before they are moved and turned."""
    line = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    x = line.view(1, 1, -1) - torch.as_tensor(left).view(-1, 1, 1)
    y = line.view(1, -1, 1) - torch.as_tensor(down).view(-1, 1, 1)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * x + sin * y, cos * y - sin * x


def uniform(g: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=g)


# ------------------------------------------------------------------------------------------------------ the training


READOUT = {
    "shapes": len(SHAPES),
    "number": 2,
    "ground": len(TEXTURES),
    "fill": len(TEXTURES),
    "colours": 12,
    "slant": 2,
}


class Reader(nn.Module):
    """The backbone and two linear layers: the labels come from the class token, the mask from the patch tokens."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.labels = nn.Linear(backbone.embed_dim, sum(READOUT.values()))
        self.mask = nn.Linear(backbone.embed_dim, PATCH * PATCH)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone.forward_features((images - MEAN) / STD)
        said = dict(zip(READOUT, self.labels(tokens[:, 0]).split(list(READOUT.values()), 1), strict=True))
        patches, grid = self.mask(tokens[:, 1:]), SIZE // PATCH
        mask = patches.reshape(-1, grid, grid, PATCH, PATCH).transpose(2, 3).reshape(-1, SIZE, SIZE)
        return said | {"mask": mask}


def loss_of(said: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    total = F.binary_cross_entropy_with_logits(said["mask"], labels["mask"]) * 3
    total = total + 2 * F.binary_cross_entropy_with_logits(said["shapes"], labels["shapes"]) * math.sqrt(len(SHAPES))
    for name in ("number", "ground", "fill"):
        total = total + F.cross_entropy(said[name], labels[name])
    return total + 5 * sum(F.mse_loss(said[name], labels[name]) for name in ("colours", "slant"))


def accuracies(said: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    right = {name: said[name].argmax(1) == labels[name] for name in ("number", "ground", "fill")}
    likeliest = said["shapes"].argmax(1, keepdim=True)
    right["shapes"] = labels["shapes"].gather(1, likeliest) > 0
    right["mask"] = (said["mask"] > 0) == (labels["mask"] > 0.5)
    return {name: round(hit.float().mean().item(), 4) for name, hit in right.items()}


def pretrain(steps: int, batch: int, lr: float, seed: int) -> tuple[VisionTransformer, dict[str, float]]:
    """Train the backbone; step i sees the scenes of seed (seed + 1)·10⁶ + i. Returns it and its held-out accuracies."""
    torch.manual_seed(seed)
    backbone = VisionTransformer(**ARCHITECTURE)
    model = Reader(backbone)
    optimiser = torch.optim.AdamW(param_groups_weight_decay(model, weight_decay=0.05), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        images, labels = draw_scenes(batch, (seed + 1) * 10**6 + step)
        said = model(images)
        loss = loss_of(said, labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * batch / (time.perf_counter() - start)
            print(f"{step}/{steps} loss {loss.item():.3f} {accuracies(said, labels)} {speed:.0f} images/s", flush=True)
    with torch.inference_mode():
        images, labels = draw_scenes(HELD_OUT, (seed + 1) * 10**6 - 1)
        return backbone, accuracies(model.eval()(images), labels)


def write(backbone: VisionTransformer, folder: Path, facts: dict[str, object]) -> None:
    """Write NAME.safetensors, in fp16, and NAME.json beside it."""
    data = save({name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.safetensors").write_bytes(data)
    description = {
        "architecture": ARCHITECTURE,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "sha256": hashlib.sha256(data).hexdigest(),
        **facts,
    }
    (folder / f"{NAME}.json").write_text(json.dumps(description, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "insvp_fast" / "assets")
    args = parser.parse_args()
    backbone, held_out = pretrain(args.steps, args.batch, args.lr, args.seed)
    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("steps", "batch", "lr", "seed"))
    facts = {
        "made_by": f"python tools/pretrain_backbone.py {options}",
        "made_with": f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
        "accuracy_on_unseen_scenes": held_out,
    }
    write(backbone, args.output, facts)
    print(f"unseen scenes: {held_out}; written to {args.output}")


if __name__ == "__main__":
    main()
