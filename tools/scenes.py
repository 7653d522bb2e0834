"""Procedurally drawn scenes with labels, on which the built-in backbone is pretrained.

A scene is a textured background with one or two textured shapes or strokes on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32  # pixels of a side


def draw_scenes(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Random scenes: images [count, 3, SIZE, SIZE] in [0, 1] and their labels; the same seed gives the same scenes."""
    g = torch.Generator().manual_seed(seed)
    image, background = draw_texture(count, g)
    shapes, covered, fills = torch.zeros(count, len(SHAPES)), torch.zeros(count, SIZE, SIZE), []
    number = torch.randint(1, 3, (count,), generator=g)
    for i in range(2):
        present = number > i
        kind = torch.randint(len(SHAPES), (count,), generator=g)
        texture, fill = draw_texture(count, g, plain=0.5)
        coverage = draw_shape(kind, g) * present[:, None, None]
        image = image + coverage[:, None] * (texture - image)
        covered = torch.maximum(covered, coverage)
        shapes[present, kind[present]] = 1.0
        fills.append(fill)
    image = image + uniform(g, count, 0, 0.05).view(-1, 1, 1, 1) * torch.randn(image.shape, generator=g)
    labels = {
        "mask": covered,  # [count, SIZE, SIZE] in [0, 1], the coverage of each pixel by shapes
        "shapes": shapes,  # [count, kinds], 1 for the kinds that are present
        "number": number - 1,  # [count], of shapes
        "ground": background["kind"],  # [count], texture of the background
        "fill": fills[0]["kind"],  # [count], texture of the first shape
        "colors": torch.cat([background["colors"], fills[0]["colors"]], 1),  # [count, 12], in [0, 1]
        "slant": background["slant"],  # [count, 2], in [-1, 1], orientation of the background
    }
    return image.clamp(0, 1), labels


def draw_texture(count: int, g: torch.Generator, plain: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Images [count, 3, SIZE, SIZE], each filled with one texture of two colors, and their labels.

    Args:
        plain: probability that a texture is plain, besides its share as one of the kinds.
    """
    kind = torch.randint(len(TEXTURES), (count,), generator=g)
    kind[torch.rand(count, generator=g) < plain] = list(TEXTURES).index("plain")
    angle, pitch, phase = uniform(g, count, 0, math.pi), uniform(g, count, 5, 16), uniform(g, count, 0, 2 * math.pi)
    field = torch.empty(count, SIZE, SIZE)
    for i, texture in enumerate(TEXTURES.values()):
        mine = kind == i
        u, v = plane(angle[mine])
        p, q = pitch[mine].view(-1, 1, 1), phase[mine].view(-1, 1, 1)
        field[mine] = texture(u, torch.sin(p * u + q), torch.sin(p * v + q), g)
    colors = torch.rand(count, 2, 3, generator=g)
    first, second = colors[:, :, :, None, None].unbind(1)
    image = first + field.clamp(0, 1)[:, None] * (second - first)
    slanted = (kind == list(TEXTURES).index("linear")) | (kind == list(TEXTURES).index("grating"))
    slant = torch.stack([torch.cos(2 * angle), torch.sin(2 * angle)], 1) * slanted[:, None]
    return image, {"kind": kind, "colors": colors.flatten(1), "slant": slant}


def clouds(u: Tensor, g: torch.Generator) -> Tensor:
    return F.interpolate(torch.rand(len(u), 1, 5, 5, generator=g), size=(SIZE, SIZE), mode="bicubic")[:, 0]


# the fraction of the second color, [count, SIZE, SIZE], from a coordinate u and waves along and across it
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
    """The coverage [count, SIZE, SIZE] in [0, 1] by one shape per image, of random position, size and rotation."""
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


# signed distance to the edge, negative inside; inexact far away, where the coverage is 0 anyway
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


def plane(angle: Tensor, shift_x: Tensor | float = 0.0, shift_y: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The coordinates (x, y) of every pixel, [count, SIZE, SIZE] each: in [-1, 1], then shifted, then rotated."""
    line = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    x = line.view(1, 1, -1) - torch.as_tensor(shift_x).view(-1, 1, 1)
    y = line.view(1, -1, 1) - torch.as_tensor(shift_y).view(-1, 1, 1)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * x + sin * y, cos * y - sin * x


def uniform(g: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=g)
