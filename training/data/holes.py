"""What is kept and what is redrawn, at random: the edits that a transformer is trained for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvq_rt.editing import Mask
from dvq_rt.layout import TokenLayout

HINTED = 0.1
"""Share of the redrawn cells of a finer grain whose coarsest code is told beforehand."""


def half_plane(side: int, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """From one of the four sides on."""
    redraw = np.zeros((side, side), dtype=bool)
    redraw[: rng.integers(1, side)] = True
    return np.rot90(redraw, int(rng.integers(4)))


def rectangle(side: int, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """Of 10 to 90 % of the area."""
    area, shape = rng.uniform(0.1, 0.9) * side**2, rng.uniform(0.5, 2)
    height, width = (int(np.clip(round(np.sqrt(area * ratio)), 1, side)) for ratio in (shape, 1 / shape))
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    redraw = np.zeros((side, side), dtype=bool)
    redraw[top : top + height, left : left + width] = True
    return redraw


def stroke(side: int, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """Cells that a thin, bent line passes."""
    redraw, at, angle = np.zeros((side, side), dtype=bool), rng.uniform(0, side, 2), rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(side, 6 * side)):
        redraw[tuple(at.astype(int).clip(0, side - 1))] = True
        angle += rng.normal(0, 0.4)
        at = (at + 0.5 * np.array([np.sin(angle), np.cos(angle)])).clip(0, side - 1e-6)
    return redraw


def scattered(side: int, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """Any cells, of any share."""
    return rng.random((side, side)) < rng.uniform(0.1, 0.9)


def background(side: int, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """Cells of the coarsest grain: what is busy, the object, is kept."""
    return grain == 0


def detail(side: int, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """Cells of finer grains: what is coarse is kept."""
    return grain > 0


SHAPES = (half_plane, rectangle, stroke, scattered)
GRAIN_SHAPES = (background, detail)
"""For layouts of several grains."""


def random_hole(layout: TokenLayout, grain: NDArray[np.int64], rng: np.random.Generator) -> Mask:
    """Coarsest cells to redraw, bool [sides[0], sides[0]]; there is a code to keep and one to draw, unless the image
    has too few."""
    shapes = SHAPES if layout.segments == 1 else (*SHAPES, *GRAIN_SHAPES)
    for _ in range(20):
        redraw = shapes[rng.integers(len(shapes))](layout.sides[0], grain, rng)
        coded = grain >= 0
        if (coded & redraw).any() and (coded & ~redraw).any():
            return redraw
    return np.ones_like(grain, dtype=bool)


class Hole(NamedTuple):
    """What an edit redraws: ``redraw`` bool [sides[0], sides[0]], coarsest cells; ``told`` likewise, those of them
    whose code in the coarsest grain is a hint."""

    redraw: Mask
    told: Mask


def drawn_hole(layout: TokenLayout, grain: NDArray[np.int64], key: tuple[int, int]) -> Hole:
    """The hole that a key draws for an image of grains int [sides[0], sides[0]], with as many hints as its sequence has
    room for, one more token each; there are none in layouts of one grain."""
    rng = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)).jumped(2))
    redraw = random_hole(layout, grain, rng)
    told = np.zeros_like(redraw)
    if layout.segments > 1:
        told = redraw & (grain > 0) & (rng.random(grain.shape) < HINTED)
        drop = np.flatnonzero(told)
        told.reshape(-1)[rng.permutation(drop)[layout.cells - int(layout.count_codes(grain)) :]] = False
    return Hole(redraw, told)
