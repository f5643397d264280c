"""Glyph masks made into pictures: colours, pose, clutter, occlusion, blur and noise.

Everything random about a picture is a function of one row of uniform numbers, so a picture can be
drawn again from its row, and pretraining and the benchmark see the same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 48
NUM_UNIFORMS = 40

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 20),
    "white": (246, 246, 244),
    "gray": (128, 130, 134),
    "red": (208, 42, 40),
    "orange": (240, 132, 30),
    "yellow": (248, 212, 52),
    "green": (44, 148, 66),
    "blue": (40, 84, 200),
    "purple": (124, 58, 172),
    "pink": (240, 140, 178),
    "brown": (122, 78, 46),
}
COLOUR_NAMES = tuple(COLOURS)
_BLACK_ON_WHITE = (0, 1)
_LEAST_CONTRAST = 0.3
_SEGMENTS = 3
_NOISE_BANK = 16
_NOISE_SIZE = 2 * IMAGE_SIZE


def _luminance(rgb: Tensor) -> Tensor:
    return (rgb * torch.tensor([0.299, 0.587, 0.114])).sum(-1)


def _colour_pairs() -> Tensor:
    """Legible (glyph, background) pairs, int64 [K, 2]; black and white come more often."""
    rgb = torch.tensor([COLOURS[name] for name in COLOUR_NAMES]) / 255
    light = _luminance(rgb)
    pairs = []
    for glyph in range(len(rgb)):
        for ground in range(len(rgb)):
            if abs(float(light[glyph] - light[ground])) >= _LEAST_CONTRAST:
                plain = (glyph < 2) + (ground < 2)
                pairs += [(glyph, ground)] * (1 + 2 * plain)
    return torch.tensor(pairs)


_PALETTE = torch.tensor([COLOURS[name] for name in COLOUR_NAMES]) / 255
_PAIRS = _colour_pairs()
_NOISE = torch.randn(
    _NOISE_BANK, 3, _NOISE_SIZE, _NOISE_SIZE, generator=torch.Generator().manual_seed(0)
)


@dataclass(frozen=True)
class Appearance:
    """How each picture of a batch looks; every tensor has B rows. ``glyph_colour`` and
    ``ground_colour`` are int64 indices into COLOUR_NAMES."""

    glyph_colour: Tensor
    ground_colour: Tensor
    degrees: Tensor
    scale: Tensor
    blur: Tensor
    noise: Tensor

    @property
    def inverted(self) -> Tensor:
        """Whether the glyph is lighter than its background, bool [B]."""
        light = _luminance(_PALETTE)
        return light[self.glyph_colour] > light[self.ground_colour]


def appearance_of(uniforms: Tensor, strength: float = 1.0) -> Appearance:
    """What these uniform numbers, float [B, NUM_UNIFORMS] in [0, 1), mean in words."""
    pairs = _PAIRS[(uniforms[:, 0] * len(_PAIRS)).long()]
    plain = uniforms[:, 39] >= strength
    pairs = torch.where(plain[:, None], torch.tensor(_BLACK_ON_WHITE), pairs)
    return Appearance(
        glyph_colour=pairs[:, 0],
        ground_colour=pairs[:, 1],
        degrees=(2 * uniforms[:, 1] - 1) * 14 * strength,
        scale=1.02 - uniforms[:, 2] * 0.3 * strength,
        blur=_sometimes(uniforms[:, 3], 0.5) * 0.8 * strength,
        noise=0.02 + 0.07 * uniforms[:, 4].square() * strength,
    )


def _sometimes(uniform: Tensor, probability: float) -> Tensor:
    """Zero, or with this probability uniform in [0, 1)."""
    return (uniform - (1 - probability)).clamp(min=0) / probability


def _pose(masks: Tensor, u: Tensor, look: Appearance, strength: float) -> Tensor:
    """Masks rotated, scaled, sheared and shifted: float [B, 1, 48, 48] in [0, 1]."""
    angle = torch.deg2rad(look.degrees)
    shear = (2 * u[:, 5] - 1) * 0.14 * strength
    aspect = torch.exp((2 * u[:, 6] - 1) * 0.1 * strength)
    shift = (2 * u[:, 7:9] - 1) * 0.15 * strength
    cos, sin = torch.cos(angle) / look.scale, torch.sin(angle) / look.scale
    rows = torch.stack(
        [
            torch.stack([cos * aspect, -sin + shear, shift[:, 0]], -1),
            torch.stack([sin, cos / aspect, shift[:, 1]], -1),
        ],
        1,
    )
    size = [len(masks), 1, IMAGE_SIZE, IMAGE_SIZE]
    grid = F.affine_grid(rows, size, align_corners=False)
    return F.grid_sample(masks[:, None].float() / 255, grid, align_corners=False)


def _segments(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Coverage of stray strokes, float [B, 3, 48, 48]: each a segment between two points."""
    ends = (2.4 * u - 1.2).view(-1, _SEGMENTS, 4, 1, 1)
    x0, y0, x1, y1 = ends.unbind(2)
    dx, dy = x1 - x0, y1 - y0
    along = ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy + 1e-4)
    along = along.clamp(0, 1)
    distance = torch.hypot(x - x0 - along * dx, y - y0 - along * dy)
    return ((0.06 - distance) * (IMAGE_SIZE / 2) + 0.5).clamp(0, 1)


def render(masks: Tensor, uniforms: Tensor, *, strength: float = 1.0) -> Tensor:
    """Pictures of glyphs, uint8 [B, 3, 48, 48].

    masks: uint8 [B, 48, 48]. uniforms: float32 [B, NUM_UNIFORMS] in [0, 1); equal rows give equal
    pictures. strength, in [0, 1]: 0 draws clean glyphs, black on white, 1 is what the benchmark
    uses; between them the share of coloured pictures and every disturbance grow. Raises
    ValueError for other shapes.
    """
    if masks.ndim != 3 or masks.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"masks: expected [B, {IMAGE_SIZE}, {IMAGE_SIZE}], got {[*masks.shape]}")
    if uniforms.shape != (len(masks), NUM_UNIFORMS):
        raise ValueError(
            f"uniforms: expected [{len(masks)}, {NUM_UNIFORMS}], got {[*uniforms.shape]}"
        )
    u = uniforms
    look = appearance_of(u, strength)
    glyph = _pose(masks, u, look, strength)

    def column(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    axis = (torch.arange(IMAGE_SIZE) + 0.5) / (IMAGE_SIZE / 2) - 1
    y, x = axis[:, None], axis[None, :]

    ink = _PALETTE[look.glyph_colour] + (2 * u[:, 9:12] - 1) * 0.12
    ground = _PALETTE[look.ground_colour] + (2 * u[:, 12:15] - 1) * 0.12
    turn = column(2 * torch.pi * u[:, 15])
    slope = (torch.cos(turn) * x + torch.sin(turn) * y) * column(u[:, 16]) * 0.25 * strength
    picture = ground[:, :, None, None] + slope

    stray = _segments(u[:, 17:29], x, y) * (column(_sometimes(u[:, 29], 0.6)) * 0.65 * strength)
    stray = stray.amax(1, keepdim=True)
    picture = torch.lerp(picture, ink[:, :, None, None].expand_as(picture), stray)

    opacity = column(1 - 0.5 * u[:, 30] * strength)
    picture = torch.lerp(picture, ink[:, :, None, None].expand_as(picture), glyph * opacity)

    # An occluder: a box in a colour of its own, in front of at most a fifth of the picture.
    half = column(_sometimes(u[:, 31], 0.4)) * 0.4 * strength
    inside = ((x - column(1.6 * u[:, 32] - 0.8)).abs() < half) & (
        (y - column(1.6 * u[:, 33] - 0.8)).abs() < half * column(0.6 + 0.4 * u[:, 34])
    )
    picture = torch.where(inside, u[:, 35:38, None, None].expand_as(picture), picture)

    coarse = F.avg_pool2d(picture, 3)
    blurred = F.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    picture = torch.lerp(picture, blurred, column(look.blur).expand_as(picture))

    which = (u[:, 38] * _NOISE_BANK).long()
    offset = (u[:, 39] * (_NOISE_SIZE - IMAGE_SIZE) ** 2).long()
    rows = (offset // (_NOISE_SIZE - IMAGE_SIZE))[:, None] + torch.arange(IMAGE_SIZE)
    columns = (offset % (_NOISE_SIZE - IMAGE_SIZE))[:, None] + torch.arange(IMAGE_SIZE)
    grain = _NOISE[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    picture = picture + grain.permute(0, 3, 1, 2) * column(look.noise)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)
