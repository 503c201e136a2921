"""Pixels for training: image files as squares of bytes, bytes as the floats that the models take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 1 << 26  # 8192 x 8192, read from the header before anything is decoded


def to_float(images: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def header_is_good(path: Path) -> bool:
    """Whether the header names an allowed format and a size from 1 pixel to MAX_PIXELS; decodes nothing."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return 0 < image.width * image.height <= MAX_PIXELS
    except Exception:  # Pillow's readers raise nearly anything on broken bytes
        return False


def decode(path: Path, size: int) -> Pixels:
    """The file as uint8 [size, size, 3]; raises whatever Pillow does, ValueError above MAX_PIXELS."""
    with Image.open(path, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels, more than {MAX_PIXELS}")
        image = _rgb(ImageOps.exif_transpose(opened))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.array(square, dtype=np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: deep modes scaled to 8 bits, transparency composited on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) * (255 if image.mode == "F" else 255 / 65535)
        grey = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")
