"""Textures and shapes as functions of a point, so that a picture at any place, zoom and turn needs no raster.

Points are [B, ..., 2] in units of the picture's height; a texture's parameters are [B, n] uniform numbers in [0, 1). Values lie
in [0, 1] and edges are soft by about a pixel of a 96-row picture, which keeps motion free of aliasing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

TEXTURE_NUMBERS = 24
"""Uniform numbers that a texture may use."""
PIXEL = 1 / 96

Texture = Callable[[Tensor, Tensor], Tensor]
"""texture(points [B, ..., 2], numbers [B, TEXTURE_NUMBERS]) -> value [B, ...]"""
Shape = Callable[[Tensor], Tensor]
"""shape(points [B, ..., 2]) -> signed distance [B, ...] to the edge of a shape of radius 1, negative inside"""


def along(value_B: Tensor, like: Tensor) -> Tensor:
    """A number a sample, [B], shaped to multiply `like` [B, ...]."""
    return value_B.reshape(-1, *[1] * (like.ndim - 1))


def _turned(points: Tensor, numbers: Tensor, shortest: float, longest: float) -> tuple[Tensor, Tensor]:
    """Coordinates in wavelengths along two turned axes; the wavelength lies between `shortest` and `longest` heights."""
    x, y = points.unbind(-1)
    angle, frequency = math.pi * numbers[:, 0], 1 / (shortest + (longest - shortest) * numbers[:, 1])
    cos, sin = along(angle.cos() * frequency, x), along(angle.sin() * frequency, x)
    return cos * x + sin * y + along(numbers[:, 2], x), cos * y - sin * x + along(numbers[:, 3], x)


def _soft(wave: Tensor) -> Tensor:
    """A wave between -1 and 1 as a pattern with soft edges."""
    return torch.sigmoid(3 * wave)


def plain(points: Tensor, numbers: Tensor) -> Tensor:
    """A slow gradient."""
    u, _ = _turned(points, numbers, 2.5, 5.0)
    return 0.5 + 0.5 * torch.sin(2 * math.pi * u)


def stripes(points: Tensor, numbers: Tensor) -> Tensor:
    u, _ = _turned(points, numbers, 0.14, 0.35)
    return _soft(torch.sin(2 * math.pi * u))


def checks(points: Tensor, numbers: Tensor) -> Tensor:
    u, v = _turned(points, numbers, 0.2, 0.5)
    return _soft(2 * torch.sin(2 * math.pi * u) * torch.sin(2 * math.pi * v))


def clouds(points: Tensor, numbers: Tensor) -> Tensor:
    """Waves in six directions whose amplitude is their length, as natural pictures have."""
    x, y = points.unbind(-1)
    total = torch.zeros_like(x)
    for k in range(6):
        angle, phase = 2 * math.pi * numbers[:, 3 * k], 2 * math.pi * numbers[:, 3 * k + 1]
        frequency = 1.5**k * (0.8 + 0.4 * numbers[:, 3 * k + 2])
        u = along(angle.cos() * frequency, x) * x + along(angle.sin() * frequency, x) * y
        total = total + 1.3**-k * torch.sin(2 * math.pi * u + along(phase, x))
    return torch.sigmoid(1.5 * total)


def rings(points: Tensor, numbers: Tensor) -> Tensor:
    u, v = _turned(points, numbers, 0.15, 0.3)
    return _soft(torch.sin(2 * math.pi * torch.sqrt(u.square() + v.square() + 1e-3)))


def dots(points: Tensor, numbers: Tensor) -> Tensor:
    u, v = _turned(points, numbers, 0.15, 0.3)
    return _soft(torch.cos(2 * math.pi * u) + torch.cos(2 * math.pi * v) - 0.6)


def weave(points: Tensor, numbers: Tensor) -> Tensor:
    """Two sets of stripes, one over the other."""
    u, v = _turned(points, numbers, 0.16, 0.32)
    return 0.5 * _soft(torch.sin(2 * math.pi * u)) + 0.5 * _soft(torch.sin(2 * math.pi * v))


def disc(points: Tensor) -> Tensor:
    return points.square().sum(-1).add(1e-9).sqrt() - 1


def square(points: Tensor) -> Tensor:
    return points.abs().amax(-1) - 0.85


def triangle(points: Tensor) -> Tensor:
    x, y = points.unbind(-1)
    half = math.sqrt(3) / 2
    return torch.stack((-y, half * x + y / 2, -half * x + y / 2)).amax(0) - 0.6


def ring(points: Tensor) -> Tensor:
    return disc(points).add(0.3).abs() - 0.3


def cross(points: Tensor) -> Tensor:
    x, y = points.abs().unbind(-1)
    return torch.minimum(torch.maximum(x - 1, y - 0.35), torch.maximum(x - 0.35, y - 1))


def diamond(points: Tensor) -> Tensor:
    return (points.abs().sum(-1) - 1.1) / math.sqrt(2)
