"""Procedural scenes for the demo model: flat coloured shapes on a flat background.

The idea is that of the Fill50K set of the ControlNet tutorial (Zhang et al. 2023), with more shapes, two
shapes at once, rotation, and a caption that names shape and colours. Coordinates are fractions of the
picture's side, so one scene renders at any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 150, 70),
    "light blue": (140, 200, 240),
    "blue": (40, 70, 200),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
"""Colour names and their sRGB values."""

TRAINED_SHAPES = (
    "circle",
    "oval",
    "square",
    "rectangle",
    "triangle",
    "diamond",
    "star",
    "cross",
    "moon",
    "arrow",
    "shape",
)
"""Shapes the demo model is trained on; ``shape`` is a random smooth outline."""

HELD_OUT_SHAPES = ("heart", "hexagon")
"""Shapes kept out of training, to see whether control follows outlines rather than names."""

CANNY_THRESHOLDS = (100, 200)
GRID = 8  # cells a side of a colour grid: of 64 pixels at 512x512, the annotator's default
MARGIN = 0.05  # nothing is drawn closer to the border than this fraction of the side


def _polygon(corners: int, phase: float = -np.pi / 2) -> np.ndarray:
    angles = phase + 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _outline(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Outline of one shape inside the unit circle: (points, 2), float64, y down."""
    if kind == "circle":
        return _polygon(96)
    if kind == "oval":
        return _polygon(96) * [1.0, 0.6]
    if kind == "square":
        return _polygon(4, np.pi / 4)
    if kind == "rectangle":
        return np.array([[-0.88, -0.47], [0.88, -0.47], [0.88, 0.47], [-0.88, 0.47]])
    if kind == "triangle":
        return _polygon(3)
    if kind == "diamond":
        return _polygon(4) * [0.62, 1.0]
    if kind == "star":
        return _polygon(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    if kind == "cross":
        arm = 0.3
        quarter = np.array([[arm, -0.95], [arm, -arm], [0.95, -arm]])
        turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])
    if kind == "moon":
        outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 64)
        tip = np.sqrt(0.5)
        centre, radius = tip, tip
        inner = np.linspace(1.5 * np.pi, 0.5 * np.pi, 48)
        return np.concatenate(
            [
                np.stack([np.cos(outer), np.sin(outer)], axis=1),
                np.stack([centre + radius * np.cos(inner), radius * np.sin(inner)], axis=1),
            ]
        )
    if kind == "arrow":
        return np.array([[-1, -0.3], [0.1, -0.3], [0.1, -0.75], [1, 0], [0.1, 0.75], [0.1, 0.3], [-1, 0.3]]) * 0.95
    if kind == "hexagon":
        return _polygon(6)
    if kind == "heart":
        t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y - 2.5], axis=1) / 17
    if kind == "shape":
        angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        radius = np.ones_like(angles)
        for order in range(2, 6):
            radius += rng.normal(0, 0.45 / order) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
        radius = np.clip(radius, 0.3, None)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * (radius / radius.max())[:, None]
    raise ValueError(f"unknown shape {kind!r}; known: {', '.join(TRAINED_SHAPES + HELD_OUT_SHAPES)}")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One filled outline. ``points`` is (n, 2) in fractions of the side."""

    kind: str
    points: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two shapes of one colour on a background of another."""

    shapes: tuple[Shape, ...]
    colour: str
    background: str

    @property
    def prompt(self) -> str:
        """The caption, such as ``a red star and a red moon on a light blue background``."""
        shapes = " and ".join(f"{_article(self.colour)} {self.colour} {shape.kind}" for shape in self.shapes)
        return f"{shapes} on {_article(self.background)} {self.background} background"

    def coverage(self, size: int) -> np.ndarray:
        """How much of each pixel the shapes cover: (size, size), float32 in [0, 1]."""
        canvas = np.zeros((size, size), np.uint8)
        for shape in self.shapes:
            fixed_point = np.round((shape.points * size - 0.5) * 256).astype(np.int32)
            cv2.fillPoly(canvas, [fixed_point], 255, lineType=cv2.LINE_AA, shift=8)
        return canvas.astype(np.float32) / 255

    def silhouette(self, size: int) -> np.ndarray:
        """Which pixels the shapes fill: (size, size), bool."""
        return self.coverage(size) >= 0.5

    def render(self, size: int) -> np.ndarray:
        """The picture: (size, size, 3), uint8 RGB, anti-aliased."""
        coverage = self.coverage(size)[..., None]
        colour, background = (np.float32(PALETTE[name]) for name in (self.colour, self.background))
        return np.round(coverage * colour + (1 - coverage) * background).astype(np.uint8)

    def control(self, name: str, size: int) -> np.ndarray:
        """The control picture ``canny``, ``mask`` (0 or 255) or ``color`` (a grid): (size, size, 3), uint8."""
        if name == "color":  # the annotator t2ia_color_grid, of as many cells at every size
            cells = cv2.resize(self.render(size), (GRID, GRID), interpolation=cv2.INTER_CUBIC)
            return cv2.resize(cells, (size, size), interpolation=cv2.INTER_NEAREST)
        if name == "canny":
            plane = cv2.Canny(self.render(size), *CANNY_THRESHOLDS)
        elif name == "mask":
            plane = self.silhouette(size).astype(np.uint8) * 255
        else:
            raise ValueError(f"unknown control {name!r}; known: canny, color, mask")
        return np.repeat(plane[..., None], 3, axis=2)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_scene(rng: np.random.Generator, kinds: tuple[str, ...] = TRAINED_SHAPES) -> Scene:
    """Draws a scene: one shape, or in three scenes of ten two that do not overlap."""
    colour, background = rng.choice(list(PALETTE), size=2, replace=False)
    count = 2 if rng.random() < 0.3 else 1
    while True:
        centres, radii, shapes = [], [], []
        for _ in range(count):
            kind = str(rng.choice(kinds))
            radius = rng.uniform(0.15, 0.22) if count == 2 else rng.uniform(0.16, 0.34)
            centre = rng.uniform(MARGIN + radius, 1 - MARGIN - radius, size=2)
            angle = rng.uniform(0, 2 * np.pi)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            shapes.append(Shape(kind=kind, points=_outline(kind, rng) @ turn * radius + centre))
            centres.append(centre)
            radii.append(radius)
        if count == 1 or np.linalg.norm(centres[0] - centres[1]) > sum(radii) + 0.04:
            return Scene(shapes=tuple(shapes), colour=str(colour), background=str(background))
