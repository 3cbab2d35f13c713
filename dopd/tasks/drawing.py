"""Scenes of coloured shapes on a grid of cells, drawn in pixels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (225, 205, 40),
    "purple": (150, 60, 180),
    "cyan": (60, 200, 210),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
GRID = 4  # cells in a row and in a column
CELL = 16  # pixels
IMAGE_SIZE = GRID * CELL
ROWS = "abcd"  # top to bottom
COLUMNS = "1234"  # left to right

_SIZES = (10, 13)  # least and greatest side of a shape's box, pixels
_BACKGROUNDS = (215, 250)  # grey levels
_TINT = 15  # how far a channel of a colour may stray


@dataclass(frozen=True)
class Thing:
    """A shape in a scene.

    Args:
        color, shape: Words of `COLORS` and `SHAPES`.
        row, column: Its cell, from 0, top left first.
        box: Left, top, right, bottom: its outermost pixels, counted from 0 at the image's top left corner.
    """

    color: str
    shape: str
    row: int
    column: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def label(self) -> str:
        """`red circle`."""
        return f"{self.color} {self.shape}"

    @property
    def step(self) -> str:
        """How a solution names it: label, row and column, for example `red circle b 3`."""
        return f"{self.label} {ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def place(self) -> str:
        """The quarter of the scene that it is in, for example `upper left`."""
        half = GRID // 2
        return f"{'upper' if self.row < half else 'lower'} {'left' if self.column < half else 'right'}"


def place_things(rng: random.Random, labels: Sequence[tuple[str, str]]) -> list[Thing]:
    """A thing for each (colour, shape), each in a cell of its own, in reading order; boxes lie inside their cells."""
    things = []
    for (color, shape), cell in zip(labels, rng.sample(range(GRID**2), len(labels)), strict=True):
        row, column = divmod(cell, GRID)
        size = rng.randint(*_SIZES)
        left = column * CELL + rng.randint(0, CELL - size)
        top = row * CELL + rng.randint(0, CELL - size)
        things.append(Thing(color, shape, row, column, (left, top, left + size - 1, top + size - 1)))
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def draw_scene(rng: random.Random, things: Sequence[Thing]) -> Image.Image:
    """An RGB image of `IMAGE_SIZE` pixels a side; `rng` decides the background and how colours stray."""
    grey = rng.randint(*_BACKGROUNDS)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for thing in things:
        left, top, right, bottom = thing.box
        red, green, blue = (min(255, max(0, channel + rng.randint(-_TINT, _TINT))) for channel in COLORS[thing.color])
        if thing.shape == "circle":
            draw.ellipse(thing.box, fill=(red, green, blue))
        elif thing.shape == "square":
            draw.rectangle(thing.box, fill=(red, green, blue))
        else:
            corners = [((left + right) // 2, top), (right, bottom), (left, bottom)]
            draw.polygon(corners, fill=(red, green, blue))
    return image
