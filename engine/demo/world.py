"""A small world by code: endless clips of moving, occluding, textured objects under a moving camera and changing light.

Everything of a clip follows from (domain, split, index): that names a seed, the seed gives a row of uniform numbers, and the
numbers give the scene. Positions are closed forms of time, so any frame can be drawn alone, and many clips at once, on any
device (bits are promised for one device and version). Training sees `familiar` alone; `shifted` has other textures, shapes,
palettes and motions, so that adapting to a clip has something to learn.

Axes: B clips, F frames, H rows, W columns. Lengths are in units of the picture's height, times in seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..seeds import generator_for
from . import textures
from .textures import PIXEL, TEXTURE_NUMBERS, Shape, Texture, along

OBJECTS = 4
"""Most objects of a clip; from 2 on each is there with an even chance."""
NUMBERS = 9 + (OBJECTS + 1) * (14 + TEXTURE_NUMBERS)
"""Uniform numbers of a clip: of the camera, the light and the count, then of the background and each object."""
SPLITS = ("training", "tuning", "test")
VERSION = 2
"""Part of a clip's content hash: to be raised when a change here moves a pixel."""


@dataclass(frozen=True)
class Domain:
    """What clips are made of. colours: name -> (hue, saturation, value), each clip jittering them; motion: of the objects."""

    textures: dict[str, Texture]
    shapes: dict[str, Shape]
    colours: dict[str, tuple[float, float, float]]
    motion: Callable[[Tensor, Tensor], Tensor]


def _fold(x: Tensor, limit: float) -> Tensor:
    """Reflect a coordinate at -limit and limit: what a ball does between two walls."""
    return ((x - limit) % (4 * limit) - 2 * limit).abs() - limit


def bounce(numbers_B4: Tensor, time_F: Tensor) -> Tensor:
    """Inertia between four walls, [B, F, 2]: 0.2 to 0.7 heights a second in any direction."""
    place, angle, speed = (
        numbers_B4[:, :2] * 2 - 1,
        2 * math.pi * numbers_B4[:, 2],
        0.2 + 0.5 * numbers_B4[:, 3],
    )
    travelled = speed[:, None] * time_F
    x = _fold(0.6 * place[:, :1] + angle.cos()[:, None] * travelled, 0.62)
    y = _fold(0.45 * place[:, 1:] + angle.sin()[:, None] * travelled, 0.46)
    return torch.stack((x, y), dim=-1)


def orbit(numbers_B4: Tensor, time_F: Tensor) -> Tensor:
    """A circle, [B, F, 2], at 1.5 to 4 radians a second either way round."""
    spin = (1.5 + 2.5 * numbers_B4[:, 2]) * torch.where(numbers_B4[:, 3] < 0.5, -1.0, 1.0)
    angle = 2 * math.pi * (numbers_B4[:, 3] * 2 % 1)[:, None] + spin[:, None] * time_F
    radius = (0.12 + 0.2 * numbers_B4[:, 2])[:, None]
    middle = (numbers_B4[:, :2] * 2 - 1) * torch.tensor([0.45, 0.25], device=numbers_B4.device)
    return middle[:, None] + torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)


DOMAINS = {
    "familiar": Domain(
        textures={
            "plain": textures.plain,
            "striped": textures.stripes,
            "checked": textures.checks,
            "cloudy": textures.clouds,
        },
        shapes={
            "disc": textures.disc,
            "square": textures.square,
            "triangle": textures.triangle,
            "ring": textures.ring,
        },
        colours={
            "red": (0.0, 0.75, 0.8),
            "orange": (0.08, 0.7, 0.9),
            "green": (0.35, 0.6, 0.6),
            "blue": (0.6, 0.65, 0.7),
            "grey": (0.6, 0.1, 0.6),
            "white": (0.1, 0.1, 0.95),
            "black": (0.6, 0.3, 0.15),
        },
        motion=bounce,
    ),
    "shifted": Domain(
        textures={"ringed": textures.rings, "dotted": textures.dots, "woven": textures.weave},
        shapes={"cross": textures.cross, "diamond": textures.diamond, "disc": textures.disc},
        colours={
            "yellow": (0.16, 0.7, 0.9),
            "teal": (0.5, 0.6, 0.8),
            "purple": (0.76, 0.55, 0.55),
            "pink": (0.9, 0.4, 0.95),
            "khaki": (0.2, 0.6, 0.4),
        },
        motion=orbit,
    ),
}


class _Numbers:
    """Uniform numbers [B, n], handed out column by column in a fixed order."""

    def __init__(self, numbers_BN: Tensor) -> None:
        self.rest = numbers_BN

    def take(self, count: int) -> Tensor:
        taken, self.rest = self.rest[:, :count], self.rest[:, count:]
        return taken

    def between(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.take(1)[:, 0]

    def choice(self, options: int) -> Tensor:
        return (self.take(1)[:, 0] * options).long().clamp(max=options - 1)


@dataclass(frozen=True)
class Surface:
    """A texture between two colours. kind, colour: index in the domain's lists, [B]; low, high: RGB in [0, 1], [B, 3]."""

    kind: Tensor
    colour: Tensor
    low: Tensor
    high: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Thing:
    """One object of every clip. present: [B] 0 or 1; path: [B, 4] numbers of its motion; size: radius; swell: how much that changes."""

    surface: Surface
    present: Tensor
    shape: Tensor
    size: Tensor
    swell: Tensor
    pace: Tensor
    angle: Tensor
    spin: Tensor
    path: Tensor


@dataclass(frozen=True)
class Scene:
    """Many clips of one domain, a number a clip in every tensor. pan: heights a second, [B, 2]; zoom, turn: a second."""

    domain: Domain
    background: Surface
    things: tuple[Thing, ...]
    pan: Tensor
    zoom: Tensor
    turn: Tensor
    light: Tensor
    flicker: Tensor
    phase: Tensor
    slope: Tensor


def clip_numbers(domain: str, split: str, indices: Sequence[int]) -> Tensor:
    """The uniform numbers of clips, [B, NUMBERS], each from the seed that (domain, split, index) names; on the CPU."""
    rows = [torch.rand(NUMBERS, generator=generator_for(0, f"{domain}/{split}", "scene", index)) for index in indices]
    return torch.stack(rows)


def build_scene(domain: Domain, numbers_BN: Tensor) -> Scene:
    """The scenes that numbers [B, NUMBERS] stand for, on their device."""
    draw = _Numbers(numbers_BN)
    angle, speed = draw.between(0, 2 * math.pi), draw.between(-0.2, 0.2).clamp(min=0)  # every second camera is still
    moves = (speed > 0).float()
    camera = {
        "pan": torch.stack((angle.cos() * speed, angle.sin() * speed), dim=-1),
        "zoom": draw.between(-0.1, 0.1) * moves,
        "turn": draw.between(-0.1, 0.1) * moves,
    }
    light = {
        "light": draw.between(0.0, 0.25),
        "flicker": draw.between(1.0, 4.0),
        "phase": draw.between(0, 2 * math.pi),
        "slope": draw.between(-0.15, 0.15),
    }
    count = 2 + draw.choice(OBJECTS - 1)
    surfaces, things = [], []
    for k in range(OBJECTS + 1):
        # A faint ground: what moves in front of it is most of what there is to continue.
        surfaces.append(_surface(domain, draw, *((0.2, 0.6) if k == 0 else (0.35, 1.0))))
        things.append(
            Thing(
                surface=surfaces[-1],
                present=(count >= k).float(),
                shape=draw.choice(len(domain.shapes)),
                size=draw.between(0.1, 0.22),
                swell=draw.between(0.0, 0.2),
                pace=draw.between(2.0, 5.0),
                angle=draw.between(0, 2 * math.pi),
                spin=draw.between(-2.0, 2.0),
                path=draw.take(4),
            )
        )
    return Scene(domain, surfaces[0], tuple(things[1:]), **camera, **light)


def _surface(domain: Domain, draw: _Numbers, faintest: float, strongest: float) -> Surface:
    kind, colour = draw.choice(len(domain.textures)), draw.take(1)[:, 0]
    other, contrast, numbers = draw.take(1)[:, 0], draw.between(faintest, strongest), draw.take(TEXTURE_NUMBERS)
    palette = torch.tensor(list(domain.colours.values()), device=numbers.device)
    first = (colour * len(palette)).long()
    # The second colour is another of the palette, never the same.
    second = (first + 1 + (other * (len(palette) - 1)).long()) % len(palette)
    jitter = (torch.stack((colour, other), dim=-1) * 1000 % 1 - 0.5) * 0.12
    low, high = (
        _rgb(palette[at] + jitter[:, [k]] * palette.new_tensor([0.25, 1, 1])) for k, at in enumerate((first, second))
    )
    return Surface(kind, first, low, low + (high - low) * contrast[:, None], numbers)


def _rgb(hsv_B3: Tensor) -> Tensor:
    """Hue, saturation and value in [0, 1] to red, green and blue, [B, 3]."""
    hue, saturation, value = hsv_B3[:, :1] % 1, hsv_B3[:, 1:2].clamp(0, 1), hsv_B3[:, 2:].clamp(0, 1)
    k = (hsv_B3.new_tensor([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def render(scene: Scene, time_F: Tensor, height: int, width: int) -> Tensor:
    """Frames at the times `time_F` in seconds, float32 [B, 3, F, H, W] in [-1, 1]."""
    device = scene.pan.device
    time_F = time_F.to(device)
    y = (torch.arange(height, device=device) + 0.5 - height / 2) / height
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / height
    screen = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # [H, W, 2], x first
    points = _camera(scene, screen, time_F)
    picture = _paint(scene.domain, scene.background, points)
    for thing in scene.things:
        local, radius = _local(scene.domain, thing, points, time_F)
        distance = _chosen(tuple(scene.domain.shapes.values()), thing.shape, lambda shape, at=local: shape(at))
        alpha = torch.sigmoid(-distance * radius / (PIXEL / 2)) * along(thing.present, distance)
        picture = picture + (_paint(scene.domain, thing.surface, local * radius[..., None]) - picture) * alpha[:, None]
    gain = (
        1
        + along(scene.light, points[..., 0])
        * torch.sin(scene.flicker[:, None] * time_F + scene.phase[:, None])[:, :, None, None]
    )
    gain = gain + along(scene.slope, gain) * screen[..., 0]
    return (picture * gain[:, None]).clamp(0, 1) * 2 - 1


def frames_of(scene: Scene, frames: int, fps: float, height: int, width: int) -> Tensor:
    """The first `frames` frames as a video file would give them, uint8 [B, F, 3, H, W]."""
    pixels = render(scene, torch.arange(frames) / fps, height, width)
    return pixels.add(1).mul(127.5).round().to(torch.uint8).transpose(1, 2).contiguous()


def _camera(scene: Scene, screen_HW2: Tensor, time_F: Tensor) -> Tensor:
    """The world's point behind each pixel, [B, F, H, W, 2]."""
    angle, scale = scene.turn[:, None] * time_F, torch.exp(-scene.zoom[:, None] * time_F)
    cos, sin = ((scale * f(angle))[:, :, None, None] for f in (torch.cos, torch.sin))
    x, y = screen_HW2.unbind(-1)
    moved = (scene.pan[:, None] * time_F[:, None])[:, :, None, None]
    return torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1) + moved


def _local(domain: Domain, thing: Thing, points: Tensor, time_F: Tensor) -> tuple[Tensor, Tensor]:
    """Points in an object's own turned frame, in radii, [B, F, H, W, 2], and its radius [B, F, 1, 1]."""
    from_middle = points - domain.motion(thing.path, time_F)[:, :, None, None]
    radius = thing.size[:, None] * (1 + thing.swell[:, None] * torch.sin(thing.pace[:, None] * time_F))
    angle = thing.angle[:, None] + thing.spin[:, None] * time_F
    cos, sin = (f(angle)[:, :, None, None] for f in (torch.cos, torch.sin))
    x, y = from_middle.unbind(-1)
    radius = radius[:, :, None, None]
    return torch.stack((cos * x + sin * y, cos * y - sin * x), dim=-1) / radius[..., None], radius


def _paint(domain: Domain, surface: Surface, points: Tensor) -> Tensor:
    """Colours of points, [B, 3, F, H, W] in [0, 1]."""
    value = _chosen(tuple(domain.textures.values()), surface.kind, lambda t: t(points, surface.numbers))
    low, high = (c[:, :, None, None, None] for c in (surface.low, surface.high))
    return low + (high - low) * value[:, None]


def _chosen(options: tuple, kind_B: Tensor, evaluate: Callable) -> Tensor:
    """For each sample the value of the option that `kind` names: all are evaluated, so that a batch needs no sorting."""
    total: Tensor | None = None
    for index, option in enumerate(options):
        value = evaluate(option)
        value = torch.where(along(kind_B == index, value), value, 0)
        total = value if total is None else total + value
    assert total is not None
    return total


def captions(scene: Scene) -> list[str]:
    """A sentence a clip: what is there, what it lies on, and what the camera and the light do."""
    domain = scene.domain
    names, kinds, shapes = list(domain.colours), list(domain.textures), list(domain.shapes)

    def look(surface: Surface, b: int) -> str:
        return f"{names[int(surface.colour[b])]} {kinds[int(surface.kind[b])]}"

    sentences = []
    for b in range(len(scene.zoom)):
        things = [
            f"a {'big' if thing.size[b] > 0.16 else 'small'} {look(thing.surface, b)} {shapes[int(thing.shape[b])]}"
            for thing in scene.things
            if thing.present[b]
        ]
        x, y = scene.pan[b].tolist()
        way = ("rightward" if x > 0 else "leftward") if abs(x) > abs(y) else ("downward" if y > 0 else "upward")
        camera = f"the camera moves {way}" if math.hypot(x, y) > 0.08 else "the camera is still"
        light = "the light changes" if scene.light[b] > 0.1 else "the light is steady"
        listed = ", ".join(things[:-1]) + " and " + things[-1]
        sentences.append(f"{listed} over a {look(scene.background, b)} ground, {camera}, {light}")
    return sentences
