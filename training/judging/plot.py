"""A line plot, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 600
LEFT, TOP, RIGHT, BOTTOM = 84, 44, 24, 68
"""Pixels around the axes."""
SCALE = 3  # drawn larger and made smaller, which smooths the lines
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Told apart by eyes that see red and green alike; after the last one they come again with another mark."""
MARKS = (0, 4, 3, 5)
"""Corners of the marks, 0 for a disc."""


class Line(NamedTuple):
    """``name`` for the legend; ``points`` (x, y) in ascending x; ``special`` ones, which get a ring."""

    name: str
    points: Sequence[tuple[float, float]]
    special: Sequence[tuple[float, float]] = ()


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most ``most`` + 1 round numbers, evenly, of which the first is at most ``low`` and the last at least ``high``.

    The distance of two is 1, 2, 2.5 or 5 times a power of ten.
    """
    span = max(high - low, 1e-9)
    exponent = math.floor(math.log10(span / most))
    steps = (factor * 10.0**power for power in (exponent, exponent + 1) for factor in (1, 2, 2.5, 5))
    for step in steps:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def line_plot(lines: Sequence[Line], title: str, x_label: str, y_label: str, ring: str = "") -> Image.Image:
    """A picture of 960 x 600 pixels with labelled axes, a grid and a legend.

    Args:
        lines: at least one, with at least one point in all.
        ring: what the legend says of the special points.
    """
    every = [point for line in lines for point in (*line.points, *line.special)]
    xs, ys = (ticks(min(values), max(values)) for values in zip(*every, strict=True))
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw = ImageDraw.Draw(picture)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (
            low + (value - axis[0]) / (axis[-1] - axis[0]) * (high - low)
            for value, axis, low, high in zip(point, (xs, ys), (LEFT, bottom), (right, TOP), strict=True)
        )
        return x * SCALE, y * SCALE

    def text(x: float, y: float, content: str, anchor: str, size: int = 15, colour: str = "black") -> None:
        font = ImageFont.load_default(size * SCALE)
        draw.text((x * SCALE, y * SCALE), content, fill=colour, font=font, anchor=anchor)

    for axis, across in ((xs, True), (ys, False)):
        digits = max(0, -math.floor(math.log10(axis[1] - axis[0]) + 1e-9) + (0 if _round(axis[1] - axis[0]) else 1))
        for value in axis:
            ends = ((value, ys[0]), (value, ys[-1])) if across else ((xs[0], value), (xs[-1], value))
            draw.line([place(end) for end in ends], fill="#dddddd", width=SCALE)
            x, y = (part / SCALE for part in place(ends[0]))
            text(*((x, y + 8) if across else (x - 8, y)), f"{value:.{digits}f}", "ma" if across else "rm", 14)
    draw.rectangle([LEFT * SCALE, TOP * SCALE, right * SCALE, bottom * SCALE], outline="black", width=SCALE)
    text((LEFT + right) / 2, HEIGHT - 14, x_label, "ms", 16)
    text((LEFT + right) / 2, 14, title, "ma", 17)
    picture.paste(_upright(y_label), (10 * SCALE, (TOP + bottom) // 2 * SCALE - _upright(y_label).height // 2))

    styles = [(COLOURS[i % len(COLOURS)], MARKS[(i + i // len(COLOURS)) % len(MARKS)]) for i in range(len(lines))]
    for line, (colour, corners) in zip(lines, styles, strict=True):
        points = [place(point) for point in line.points]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2 * SCALE, joint="curve")
        for point in points:
            _mark(draw, point, 4 * SCALE, corners, colour)
        for point in line.special:
            _ring(draw, place(point), colour)
    _legend(draw, lines, styles, ring, right, bottom)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _legend(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Line],
    styles: Sequence[tuple[str, int]],
    ring: str,
    right: int,
    bottom: int,
) -> None:
    """Names and marks in the lower right corner, where curves that rise with x leave room."""
    font = ImageFont.load_default(14 * SCALE)
    names = [line.name for line in lines] + ([ring] if ring else [])
    width = int(max(font.getlength(name) for name in names)) // SCALE + 46
    x, y = right - width - 10, bottom - 22 * len(names) - 16
    box = [value * SCALE for value in (x, y, right - 10, bottom - 10)]
    draw.rectangle(box, fill="white", outline="#999999", width=SCALE)
    for row, name in enumerate(names):
        middle = (y + 14 + 22 * row) * SCALE
        draw.text(((x + 38) * SCALE, middle), name, fill="black", font=font, anchor="lm")
        centre = ((x + 20) * SCALE, middle)
        if row < len(lines):
            colour, corners = styles[row]
            draw.line([(x + 6) * SCALE, middle, (x + 34) * SCALE, middle], fill=colour, width=2 * SCALE)
            _mark(draw, centre, 4 * SCALE, corners, colour)
        else:
            _ring(draw, centre, "black")


def _mark(draw: ImageDraw.ImageDraw, at: tuple[float, float], radius: int, corners: int, colour: str) -> None:
    if corners:
        draw.regular_polygon((*at, int(radius * 1.4)), corners, fill=colour)
    else:
        draw.circle(at, radius, fill=colour)


def _ring(draw: ImageDraw.ImageDraw, at: tuple[float, float], colour: str) -> None:
    draw.circle(at, 8 * SCALE, outline=colour, width=2 * SCALE)


def _upright(label: str) -> Image.Image:
    """A label to be read from below."""
    font = ImageFont.load_default(16 * SCALE)
    picture = Image.new("RGB", (int(font.getlength(label)) + 1, 22 * SCALE), "white")
    ImageDraw.Draw(picture).text((0, 0), label, fill="black", font=font)
    return picture.rotate(90, expand=True)


def _round(step: float) -> bool:
    """Whether a step of ``ticks`` is 1, 2 or 5 times a power of ten, and not 2.5."""
    return abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - 2.5) > 1e-6
