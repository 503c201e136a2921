"""Pictures in and out: files and PIL images to arrays, arrays to grids, and a view of the granularity."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from runtimes.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
MAX_PIXELS = 64_000_000
COARSEST, BETWEEN, FINEST, MASKED = (64, 110, 190), (20, 140, 110), (205, 30, 95), (70, 70, 78)
"""Colours of the segments, and of cells without a code, in ``grain_overlay``."""

ImageLike = Image.Image | str | os.PathLike[str] | NDArray[np.uint8]


def to_array(image: ImageLike, size: int) -> NDArray[np.float32]:
    """One picture as the encoder wants it.

    Transparent pictures are laid on white, a camera's orientation mark is obeyed, and a picture of another size is
    resized with a Lanczos filter so that its shorter side is ``size``, of which the centre is kept.

    Args:
        image: a file of PNG, JPEG, WebP, BMP or GIF (first frame), a PIL image of mode RGB, RGBA, L, LA, P or 1,
            or a uint8 array [H, W, 3]; at most 64 megapixels, which is checked before anything is decoded.
        size: pixels per side.

    Returns:
        float32 [3, size, size] in [-1, 1]; byte v becomes v / 127.5 - 1.

    Raises:
        InputError: the picture cannot be read, or its type, mode, shape or size is not one of those.
    """
    if size < 1:
        raise InputError(f"size is {size}; it must be at least 1")
    rgb = _read(image)
    if rgb.size != (size, size):
        # fit() resizes the centre alone, so a very long picture does not become a huge one on the way.
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1).copy() / 127.5 - 1.0


def to_uint8(images: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Decoded pictures as bytes: (x + 1) * 127.5, cut to [0, 255] and rounded (halves to even).

    Args:
        images: float [B, 3, H, W], nominally in [-1, 1].

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        InputError: the shape is another one, or a value is NaN.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images have shape {images.shape}; it must be [B, 3, H, W]")
    if np.isnan(images).any():
        raise InputError("images hold NaN; the engine that made them is broken: run `python -m dvq_rt verify DIR`")
    scaled = np.rint(np.clip((images.astype(np.float32) + 1.0) * 127.5, 0.0, 255.0))
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape in dB; infinite if they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def grid(images: NDArray[np.uint8], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures side by side on white, in reading order.

    Args:
        images: uint8 [N, H, W, 3], N at least 1.
        columns: pictures per row; None makes the grid about square.
        gap: white pixels between pictures and around them.

    Raises:
        InputError: the array is not of that kind, ``columns`` is below 1 or ``gap`` below 0.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise InputError(f"images are {images.dtype} {images.shape}; a grid needs uint8 [N, H, W, 3] with N >= 1")
    if columns is not None and columns < 1:
        raise InputError(f"columns is {columns}; it must be at least 1")
    if gap < 0:
        raise InputError(f"gap is {gap}; it must be at least 0")
    count, height, width, _ = images.shape
    across = min(columns or math.ceil(math.sqrt(count)), count)
    down = math.ceil(count / across)
    canvas = np.full((down * (height + gap) + gap, across * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(images):
        top, left = (index // across) * (height + gap) + gap, (index % across) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas)


def grain_overlay(
    image: NDArray[np.uint8], grain: NDArray[np.integer[Any]], sides: Sequence[int], scale: int = 4
) -> Image.Image:
    """A picture with the cells of its code drawn over it: each cell outlined and tinted by its granularity, or dark
    where it has no code.

    Args:
        image: uint8 [H, W, 3].
        grain: int [hc, wc], the segment that codes each coarsest cell, in 0..len(sides)-1, or -1 for none.
        sides: cells per image side of each segment, coarse to fine.
        scale: enlargement, at least 1.

    Returns:
        A picture of (W * scale) x (H * scale).

    Raises:
        InputError: a shape or value is not of that kind.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(f"image is {image.dtype} {image.shape}; it must be uint8 [H, W, 3]")
    if grain.shape != (sides[0], sides[0]) or grain.min() < -1 or grain.max() >= len(sides):
        raise InputError(
            f"grain has shape {grain.shape}; it must be ({sides[0]}, {sides[0]}) with values in -1..{len(sides) - 1}"
        )
    if scale < 1:
        raise InputError(f"scale is {scale}; it must be at least 1")
    canvas = image.repeat(scale, 0).repeat(scale, 1).astype(np.float32)
    rows, columns = np.arange(canvas.shape[0]), np.arange(canvas.shape[1])
    segment = grain[np.ix_(rows * sides[0] // rows.size, columns * sides[0] // columns.size)]
    for s, side in enumerate(sides):
        tint = np.array(COARSEST if s == 0 else FINEST if s == len(sides) - 1 else BETWEEN, dtype=np.float32)
        # A line is the first pixel of each cell; the picture's own edge stays free.
        line_rows = np.diff(rows * side // rows.size, prepend=0) > 0
        line_columns = np.diff(columns * side // columns.size, prepend=0) > 0
        lines = line_rows[:, None] | line_columns[None, :]
        strength = np.where(lines, 0.6, 0.0 if s == 0 else 0.2)[..., None]
        strength = strength * (segment == s)[..., None]
        canvas += (tint - canvas) * strength
    canvas += (np.array(MASKED, dtype=np.float32) - canvas) * 0.8 * (segment < 0)[..., None]
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def _read(image: ImageLike) -> Image.Image:
    """Any input as a decoded RGB picture."""
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the image")
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(f"the image is an array {image.dtype} {image.shape}; it must be uint8 [H, W, 3]")
        _check_pixels(image.shape[1], image.shape[0], "the image")
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, str | os.PathLike):
        raise InputError(f"the image is a {type(image).__name__}; give a path, a PIL image or a uint8 array [H, W, 3]")
    path = Path(image)
    if not os.path.isfile(path):
        raise InputError(f"image {path} does not exist or is not a file")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            return _to_rgb(opened, f"image {path}")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        _check_pixels(*_declared_size(path), f"image {path}")
        raise InputError(f"image {path}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"image {path} is damaged or of another format than {', '.join(FORMATS)}") from error
    except OSError as error:
        raise InputError(f"cannot read image {path}: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(*image.size, name)
    if image.mode not in MODES:
        raise InputError(
            f"{name} has mode {image.mode}, not one of {', '.join(MODES)}: "
            f"convert it to 8-bit colour first, e.g. image.convert('RGB')"
        )
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in ("RGBA", "LA") and "transparency" not in upright.info:
            return upright.convert("RGB")
        colours = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise InputError(f"{name} cannot be decoded: {error}") from error


def _check_pixels(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} x {height} pixels; it has no content")
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is {width} x {height} pixels, {width * height / 1e6:.0f} megapixels; at most "
            f"{MAX_PIXELS // 10**6} megapixels are read: scale it down first"
        )


def _declared_size(path: Path) -> tuple[int, int]:
    """Width and height in the header of a file that Pillow itself refuses to open because of its size."""
    Image.init()
    with path.open("rb") as file:
        prefix = file.read(16)
        for name in FORMATS:
            factory, accept = Image.OPEN[name]
            if accept is not None and accept(prefix) is True:
                file.seek(0)
                return factory(file, str(path)).size
    raise InputError(
        f"image {path} is too large; at most {MAX_PIXELS // 10**6} megapixels are read: scale it down first"
    )
