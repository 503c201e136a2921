"""Images larger than the model's: windows over a canvas, each of which keeps what earlier ones drew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.codes import Codes
from dvq_rt.editing import Edit, composite, spread
from dvq_rt.layout import TokenLayout
from runtimes.errors import InputError


@dataclass(slots=True)
class Canvas:
    """Codes and pixels of an image that grows window by window.

    Attributes:
        layout: of the model; ``size`` pixels per side of its images, ``cell`` of a coarsest cell.
        grain: int [rows, columns] of coarsest cells, -1 for no code; ``known`` says which are drawn.
        codes: int [rows * block, columns * block] of finest cells, -1 for no code.
        pixels, weight: float32 sums over windows [H, W, 3] and [H, W], each window weighing less towards its edges.
    """

    layout: TokenLayout
    size: int
    cell: int
    grain: NDArray[np.int64]
    known: NDArray[np.bool_]
    codes: NDArray[np.int64]
    pixels: NDArray[np.float32]
    weight: NDArray[np.float32]

    @classmethod
    def around(cls, codes: Codes, size: int, border: tuple[int, int, int, int]) -> Canvas:
        """With the codes of an image in its place; ``border`` in coarsest cells: left, top, right, bottom."""
        layout, side = codes.layout, codes.layout.sides[0]
        left, top, right, bottom = border
        rows, columns, block = side + top + bottom, side + left + right, layout.sides[-1] // side
        cell = size // side
        grain = np.full((rows, columns), -1, dtype=np.int64)
        fine = np.full((rows * block, columns * block), -1, dtype=np.int64)
        pixels = np.zeros((rows * cell, columns * cell, 3), np.float32)
        canvas = cls(layout, size, cell, grain, grain == 0, fine, pixels, np.zeros(pixels.shape[:2], np.float32))
        canvas.put(codes, top, left)
        return canvas

    def windows(self, top: int, left: int) -> Iterator[tuple[int, int]]:
        """Rows and columns of the windows' corners, away from the image at (top, left), by half a window at a time."""
        side = self.layout.sides[0]
        places = []
        for start, length in ((top, self.grain.shape[0]), (left, self.grain.shape[1])):
            step = max(1, side // 2)
            after = [min(start + i, length - side) for i in range(step, length - side - start + step, step)]
            before = [max(start - i, 0) for i in range(step, start + step, step)]
            places.append([start, *after, *before])
        for y in places[0]:
            for x in places[1]:
                yield y, x

    def edit(self, y: int, x: int, seed: int) -> Edit | None:
        """What is to be drawn in a window, None if nothing is.

        Raises:
            InputError: a model that keeps cells has no room for its number of codes there.
        """
        layout, side = self.layout, self.layout.sides[0]
        block = layout.sides[-1] // side
        known = self.known[y : y + side, x : x + side]
        if known.all():
            return None
        grain = self.grain[y : y + side, x : x + side].copy()
        codes = self.codes[y * block : (y + side) * block, x * block : (x + side) * block].copy()
        wide = spread(layout, known).reshape(codes.shape)
        if layout.kept is None:
            codes[~wide], grain[~known] = 0, 0  # anything: they are redrawn
        else:  # as many codes as there are to be, at even places
            free, missing = np.flatnonzero(~known), layout.kept - int((grain[known] >= 0).sum())
            if not 0 <= missing <= free.size:
                raise InputError(
                    f"a window at row {y}, column {x} would need {missing} codes in {free.size} cells; extend the "
                    "image by another border"
                )
            rng = np.random.Generator(np.random.Philox(key=np.array([seed, y * 65536 + x], dtype=np.uint64)))
            chosen = rng.permutation(free)[:missing]
            codes[~wide], grain[~known] = -1, -1
            codes.reshape(-1)[chosen], grain.reshape(-1)[chosen] = 0, 0
        return Edit(Codes(codes, grain.astype(np.int8), layout), ~known)

    def put(self, codes: Codes, y: int, x: int) -> None:
        """Note the codes of a window."""
        side = self.layout.sides[0]
        block = self.layout.sides[-1] // side
        self.grain[y : y + side, x : x + side] = codes.grain
        self.codes[y * block : (y + side) * block, x * block : (x + side) * block] = codes.codes
        self.known[y : y + side, x : x + side] = True

    def paint(self, image: NDArray[np.uint8], y: int, x: int) -> None:
        """Add a window's decoded image [size, size, 3]."""
        ramp = np.minimum(np.arange(self.size) + 1, self.size - np.arange(self.size)).clip(max=self.cell) / self.cell
        weight = (ramp[:, None] * ramp).astype(np.float32)
        area = np.s_[y * self.cell : y * self.cell + self.size, x * self.cell : x * self.cell + self.size]
        self.pixels[area] += image * weight[..., None]
        self.weight[area] += weight

    def picture(self, original: Any, top: int, left: int) -> NDArray[np.uint8]:
        """All windows as one image uint8 [H, W, 3], with the original's pixels, if there are any, in their place."""
        image = np.rint(self.pixels / self.weight[..., None]).astype(np.uint8)
        if original is None:
            return image
        base = image.copy()
        side = self.layout.sides[0]
        base[top * self.cell :, left * self.cell :][: self.size, : self.size] = original
        inside = np.zeros(self.grain.shape, dtype=bool)
        inside[top : top + side, left : left + side] = True
        return composite(base, image, ~inside)
