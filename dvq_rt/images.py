"""Pictures in and out: the one decoder of files, PIL images and arrays; grids, and a view of the granularity."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from dvq_rt.files import open_regular
from dvq_rt.labels import whole
from runtimes.errors import DvqError, InputError, guard

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""Read as far as Pillow can here: AVIF from its version 11.3 on, HEIF (HEIC) where the package pillow-heif is there."""
MAX_PIXELS = 1 << 26
MAX_FILE_BYTES = 1 << 30
COARSEST, BETWEEN, FINEST, MASKED = (64, 110, 190), (20, 140, 110), (205, 30, 95), (70, 70, 78)
"""Colours in ``grain_overlay``: of the segments, with those between on the way from one to the next, and of cells
without a code."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by its EXIF orientation."""


class ArrayLike(Protocol):
    """What numpy takes as an array, such as its own arrays and PyTorch's tensors."""

    def __array__(self, *arguments: Any, **options: Any) -> NDArray[Any]: ...


ImageLike = Image.Image | str | os.PathLike[str] | IO[bytes] | ArrayLike


# --- in --------------------------------------------------------------------------------------------------------
def open_rgb(source: ImageLike, *, error: type[DvqError] = InputError) -> Image.Image:
    """One picture, decoded, upright, in sRGB.

    - Transparency is laid on white. Of an animation the first frame is taken.
    - 16-bit grey, and 32-bit integers within 0..65535, are scaled to 8 bits; floats count from 0 to 1.
    - Colours of an ICC profile are converted to sRGB; a profile that is broken or of another kind of colours than the
      picture is ignored, as is a broken EXIF orientation. CMYK without a profile is converted by its definition.

    Args:
        source: a path; a PIL image; a binary file, read from its start; or an array, uint8 [H, W, 3], [H, W, 4] (with
            transparency), [H, W] or [H, W, 1] (grey). Files are of ``FORMATS``, regular, and of at most 1 GiB;
            pictures of at most 2 ** 26 pixels (67 megapixels), which is checked before anything is decoded.
        error: what is raised.

    Raises:
        error: the picture cannot be read, or is of another kind; the text names it.
    """
    with _opened(source, error) as (image, name):
        mend = "replace it, or convert it to 8-bit colour first, e.g. image.convert('RGB')"
        with guard(error, f"{name} has mode {image.mode} and cannot be decoded", mend):
            image.load()
            return _rgb(image)


def image_size(source: ImageLike, *, error: type[DvqError] = InputError) -> tuple[int, int]:
    """Width and height of a picture by its header; decodes nothing. Arguments and errors as for ``open_rgb``."""
    with _opened(source, error) as (image, _):
        return image.size


def square(image: Image.Image, size: int, place: float = 0.5) -> NDArray[np.uint8]:
    """A square of an RGB picture, its shorter side resized to ``size`` (Lanczos): uint8 [size, size, 3].

    ``place``, from 0 (left or top) to 1 (right or bottom), says where along the longer side it is; 0.5 is the centre.
    """
    side = min(image.size)
    left, top = (image.width - side) * place, (image.height - side) * place
    box = (left, top, left + side, top + side)  # cut before resizing, so a long strip does not become a huge picture
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS, box), dtype=np.uint8)


def to_array(image: ImageLike, size: int) -> NDArray[np.float32]:
    """One picture as the encoder wants it: ``open_rgb`` and ``square``.

    Args:
        image: as for ``open_rgb``.
        size: pixels per side.

    Returns:
        float32 [3, size, size] in [-1, 1]; byte v becomes v / 127.5 - 1.

    Raises:
        InputError: as ``open_rgb``, or ``size`` is not from 1 to 65536.
    """
    pixels = square(open_rgb(image), whole("size", size, 1, 1 << 16))
    return pixels.astype(np.float32).transpose(2, 0, 1).copy() / 127.5 - 1.0


def image_list(images: ImageLike | Iterable[ImageLike]) -> list[Any]:
    """One picture or several as a list of what ``open_rgb`` takes: arrays [N, H, W, C] are cut into their rows, lists,
    generators and other sequences are gone through.

    Raises:
        InputError: they have no order, as those of a set, or going through them fails.
    """
    if _is_array(images):
        array = _as_array(images, InputError)
        several = array.ndim == 4 or (array.ndim == 1 and array.dtype.kind in "UO")  # of paths
        return list(array) if several else [array]
    one = isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read")
    if one or not isinstance(images, Iterable):
        return [images]
    if isinstance(images, Mapping | Set):
        raise InputError(f"the images are a {type(images).__name__}, which has no order; give a list")
    with guard(InputError, "the images cannot be listed"):
        return list(images)


@contextmanager
def _opened(source: Any, error: type[DvqError]) -> Iterator[tuple[Image.Image, str]]:
    """A picture whose size is checked and that is not decoded yet, and what to call it in errors."""
    name = "the image"
    if isinstance(source, Image.Image):
        _check_pixels(*source.size, name, error)
        yield source, name
    elif isinstance(source, str | os.PathLike):
        name = f"image {os.fspath(source)!s}"
        if not os.path.isfile(source):
            raise error(f"{name} does not exist or is not a file")
        with guard(error, f"cannot read {name}"), open_regular(source, MAX_FILE_BYTES) as file:
            yield _identify(file, name, error), name
    elif hasattr(source, "read"):
        with guard(error, f"cannot read {name}"):
            if not (hasattr(source, "seekable") and source.seekable()):
                source = io.BytesIO(source.read(MAX_FILE_BYTES + 1))
            if source.seek(0, io.SEEK_END) > MAX_FILE_BYTES:
                raise error(f"{name} is a file of more than {MAX_FILE_BYTES} bytes; scale it down first")
            yield _identify(source, name, error), name
    elif _is_array(source):
        array = _as_array(source, error)
        good = array.dtype == np.uint8 and array.size and (array.ndim == 2 or array.shape[2:] in ((1,), (3,), (4,)))
        if not good:
            raise error(
                f"{name} is an array {array.dtype} {array.shape}; it must be uint8 [H, W, 3], [H, W, 4] with "
                "transparency, or [H, W] or [H, W, 1] in grey"
            )
        _check_pixels(array.shape[1], array.shape[0], name, error)
        yield Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array)), name
    else:
        kind = type(source).__name__
        raise error(f"{name} is a {kind}; give a path, a PIL image, a binary file or a uint8 array [H, W, 3]")


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Image.Image)


def _as_array(value: Any, error: type[DvqError]) -> NDArray[Any]:
    with guard(error, f"the image, a {type(value).__name__}, cannot be read as an array"):
        return np.asarray(value)


@cache
def readers() -> dict[str, tuple[Callable[..., Any], Callable[[bytes], bool | str] | None]]:
    """Pillow's reader of each of our formats that it has, and what tells the format by the first bytes of a file."""
    Image.init()
    with suppress(Exception):  # not there, or broken
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return {name: Image.OPEN[name] for name in FORMATS if name in Image.OPEN}


def _identify(file: IO[bytes], name: str, error: type[DvqError]) -> Image.Image:
    """Open a file without decoding it. ``Image.open`` is not used, because its own limits of size depend on settings
    of the process, and some readers allocate the picture before they say how large it is."""
    file.seek(0)
    head = file.read(32)
    if not isinstance(head, bytes):
        raise error(f"{name} is a text file; open it in binary mode")
    _check_pixels(*_webp_size(head), name, error)
    for kind, (reader, accepts) in readers().items():
        if accepts is None or accepts(head[:16]) is not True:  # a text says why this Pillow cannot
            continue
        file.seek(0)
        with guard(error, f"{name} is a damaged {kind} file", "replace it"):
            image: Image.Image = reader(file, "")
        _check_pixels(image.width, image.height, name, error)
        tags = getattr(image, "tag_v2", {})
        _check_pixels(tags.get(322, 1), tags.get(323, 1), f"a tile of {name}", error)
        return image
    if head[4:8] == b"ftyp":
        raise error(f"{name} is HEIC or AVIF; install pillow-heif or a Pillow that reads AVIF, or convert it")
    raise error(f"{name} is damaged or of another format than {', '.join(readers())}; convert it first")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height of a WebP file by its first 30 bytes; 1 x 1 of any other."""
    kind = head[12:16] if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30 else b""
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 1, 1


def _check_pixels(width: int, height: int, name: str, error: type[DvqError]) -> None:
    if width < 1 or height < 1:
        raise error(f"{name} is {width} x {height} pixels; it has no content")
    if width * height > MAX_PIXELS:
        raise error(
            f"{name} is {width} x {height} pixels, {width * height} in all; at most {MAX_PIXELS} "
            f"({MAX_PIXELS // 10**6} megapixels) are read: scale it down first"
        )


def _rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode as ``open_rgb`` gives it."""
    profile = image.info.get("icc_profile")
    with suppress(Exception):  # EXIF that cannot be read turns nothing
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if turn is None else image.transpose(turn)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    mode = "L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB"
    if not image.has_transparency_data:
        return _srgb(image.convert(mode), profile)
    clear = image.convert("RGBA")
    colours = _srgb(clear.getchannel("R") if mode == "L" else clear.convert("RGB"), profile)
    colours.putalpha(clear.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of deep grey values, mode I, I;16 or F, as mode L."""
    values = np.asarray(image)
    low, high, most = float(values.min()), float(values.max()), 1.0 if image.mode == "F" else 65535.0
    margin = 0.5 / 255 if image.mode == "F" else 0.0
    if not -margin <= low <= high <= most + margin:
        raise ValueError(f"its values run from {low:g} to {high:g}, those of this mode must be in 0..{most:g}")
    scaled = np.clip(np.rint(values.astype(np.float32) * np.float32(255 / most)), 0, 255)
    return Image.fromarray(scaled.astype(np.uint8))


def _srgb(image: Image.Image, profile: Any) -> Image.Image:
    """A picture of mode L, RGB or CMYK in sRGB."""
    if profile:
        with suppress(Exception):  # Pillow and LittleCMS raise many kinds
            transform = _transform(profile, image.mode)
            if transform is not None:
                converted = ImageCms.applyTransform(image, transform)
                return converted or image
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if that changes hardly anything, as for sRGB itself in one of its many spellings."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        chart = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
        change = np.asarray(ImageCms.applyTransform(Image.fromarray(chart), transform)).astype(int) - chart
        return None if np.abs(change).max() <= 2 else transform
    return transform


# --- out -------------------------------------------------------------------------------------------------------
def to_uint8(images: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Decoded pictures as bytes: (x + 1) * 127.5, cut to [0, 255] and rounded (halves to even).

    Args:
        images: float [B, 3, H, W], nominally in [-1, 1].

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        InputError: the shape is another one, or a value is NaN.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype.kind != "f":
        raise InputError(f"images are {images.dtype} of shape {images.shape}; they must be float [B, 3, H, W]")
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
    images = np.asarray(images)
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


def segment_colours(count: int) -> list[tuple[int, int, int]]:
    """A colour for each of ``count`` segments, coarse to fine."""
    places = np.linspace(0, 2, count)
    channels = [np.interp(places, [0, 1, 2], values) for values in zip(COARSEST, BETWEEN, FINEST, strict=True)]
    return [(round(r), round(g), round(b)) for r, g, b in zip(*channels, strict=True)]


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
    image, grain = np.asarray(image), np.asarray(grain)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(f"image is {image.dtype} {image.shape}; it must be uint8 [H, W, 3]")
    if grain.dtype.kind != "i" or grain.shape != (sides[0], sides[0]) or grain.min() < -1 or grain.max() >= len(sides):
        raise InputError(
            f"grain has shape {grain.shape}; it must be ({sides[0]}, {sides[0]}) with values in -1..{len(sides) - 1}"
        )
    if scale < 1:
        raise InputError(f"scale is {scale}; it must be at least 1")
    canvas = image.repeat(scale, 0).repeat(scale, 1).astype(np.float32)
    rows, columns = np.arange(canvas.shape[0]), np.arange(canvas.shape[1])
    segment = grain[np.ix_(rows * sides[0] // rows.size, columns * sides[0] // columns.size)]
    for s, (side, colour) in enumerate(zip(sides, segment_colours(len(sides)), strict=True)):
        tint = np.array(colour, dtype=np.float32)
        # A line is the first pixel of each cell; the picture's own edge stays free.
        line_rows = np.diff(rows * side // rows.size, prepend=0) > 0
        line_columns = np.diff(columns * side // columns.size, prepend=0) > 0
        lines = line_rows[:, None] | line_columns[None, :]
        strength = np.where(lines, 0.6, 0.0 if s == 0 else 0.2)[..., None]
        strength = strength * (segment == s)[..., None]
        canvas += (tint - canvas) * strength
    canvas += (np.array(MASKED, dtype=np.float32) - canvas) * 0.8 * (segment < 0)[..., None]
    return Image.fromarray(np.rint(canvas).astype(np.uint8))
