"""Pictures and tables of ``training.evaluate``."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dvq_rt import Codes, Samples
from dvq_rt.files import write_file
from dvq_rt.images import grain_overlay
from runtimes.errors import InputError, guard
from training.data.folder import Indices
from training.data.pixels import Pixels
from training.judging.metrics import QUANTILES, Distances

GAP, TEXT = 6, 15  # pixels in the pictures


# --- pictures --------------------------------------------------------------------------------------------------
def enlarged(image: NDArray[np.uint8], least: int = 128) -> Image.Image:
    """A picture of [S, S, 3] at the smallest whole multiple of its size that is at least ``least`` pixels wide."""
    scale = -(-least // image.shape[1])
    return Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], headings: Sequence[str] = ()) -> Image.Image:
    """Rows of pictures of one size on white, each row's title at its left, the columns' headings above."""
    font = ImageFont.load_default(TEXT)
    side = rows[0][1][0].width
    left = GAP + int(max(font.getlength(title) for title, _ in rows)) + GAP
    top = GAP + (TEXT + GAP if headings else 0)
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (left + columns * (side + GAP), top + len(rows) * (side + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(headings):
        draw.text((left + column * (side + GAP) + side // 2, GAP), text, fill="black", font=font, anchor="ma")
    for row, (title, pictures) in enumerate(rows):
        y = top + row * (side + GAP)
        draw.text((GAP, y + side // 2), title, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (left + column * (side + GAP), y))
    return canvas


def pick(count: int, most: int) -> list[int]:
    """At most ``most`` indices, evenly over 0..count-1."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})


def picture_samples(samples: Samples, names: Sequence[str], per_label: int = 8) -> Image.Image:
    """A row of samples per label."""
    pictures = samples.to_numpy()
    of_label = [np.flatnonzero(np.array(samples.labels) == i)[:per_label] for i in range(len(names))]
    return sheet([(name, [enlarged(pictures[i]) for i in of_label[row]]) for row, name in enumerate(names)])


def picture_reconstructions(images: Pixels, decoded: Pixels, columns: int = 8) -> Image.Image:
    """Originals above their reconstructions."""
    shown = pick(len(images), 2 * columns)
    rows = []
    for start in range(0, len(shown), columns):
        for title, source in (("original", images), ("decoded", decoded)):
            rows.append((title, [enlarged(source[i]) for i in shown[start : start + columns]]))
    return sheet(rows)


def picture_grain(images: Pixels, codes: Sequence[Codes], columns: int = 6) -> Image.Image:
    """Originals above the same with the cells of their code."""
    shown, size = pick(len(images), columns), images.shape[1]
    scale, layout = -(-192 // size), codes[0].layout
    sides, title = layout.sides, "grain" if layout.covering else "kept"
    overlays = [grain_overlay(images[i], codes[i].grain, sides, scale).convert("RGB") for i in shown]
    originals = [enlarged(images[i], 192) for i in shown]
    headings = [f"{codes[i].length} of {sides[-1] ** 2} codes" for i in shown]
    return sheet([("original", originals), (title, overlays)], headings)


def picture_nearest(
    samples: Samples, names: Sequence[str], training: Pixels, pixels: tuple[Distances, Indices], features: Indices
) -> Image.Image:
    """Two samples per label, the first one and the other that is nearest in pixels, with their nearest training images.

    Args:
        pixels: of ``nearest_pixels``; features: the indices of ``nearest_features``.
    """
    pictures, distances = samples.to_numpy(), pixels[0]
    rows = []
    for label, name in enumerate(names):
        members = np.flatnonzero(np.array(samples.labels) == label)
        samples_shown = [members[0], *members[1:][distances[members[1:]].argsort()[:1]]]
        cells = [(pictures[i], training[pixels[1][i]], training[features[i]]) for i in samples_shown]
        rows.append((name, [enlarged(image) for cell in cells for image in cell]))
    nearest = ("nearest (pixels)", "nearest (features)")
    return sheet(rows, ("first sample", *nearest, "closest sample", *nearest))


# --- tables ----------------------------------------------------------------------------------------------------
def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; floats with three digits after the point."""

    def text(value: Any) -> str:
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def report(result: dict[str, Any]) -> str:
    """The numbers of ``evaluate`` as Markdown tables."""
    accuracies = [result["accuracy"][name] for name in ("held_out", "held_out_reconstructed", "samples")]

    def shares(rows: Sequence[dict[str, Any]]) -> list[str]:
        return ["–" if r["share"] is None else f"{r['share']:.1%} of {r['count']}" for r in rows]

    counts = result["training_images"]
    lines = [[name, counts[name], *shares([each["labels"][name] for each in accuracies])] for name in counts]
    lines.append(["**all**", sum(counts.values()), *shares(accuracies)])
    first = table(["label", "training images", "held-out named right", "their reconstructions", "samples"], lines)

    held, drawn = result["cost"]["held_out"], result["cost"]["samples"]
    measured = result["reconstruction"]
    second = table(
        ["measure", "value"],
        [
            [f"PSNR of {measured['count']} held-out images, dB", f"{measured['psnr']:.2f}"],
            ["SSIM of the same", measured["ssim"]],
            ["codes per held-out image", f"{held['codes']:.1f} of {held['fixed_codes']}"],
            ["codes per sample", f"{drawn['codes']:.1f} of {drawn['fixed_codes']}"],
            ["bits per pixel, held-out", f"{held['bits_per_pixel']:.3f} of {held['fixed_bits_per_pixel']:.3f}"],
            ["bits per pixel, samples", f"{drawn['bits_per_pixel']:.3f} of {drawn['fixed_bits_per_pixel']:.3f}"],
            ["diversity of samples relative to real images", result["diversity"]],
        ],
    )
    rows = []
    for space, unit in (("pixels", "grey levels RMS"), ("features", "cosine distance")):
        values = result["memorisation"][space]
        for name in ("samples", "held_out", "copies"):
            rows.append([f"{name}, {unit}", *(values[name].get(f"p{q}") for q in QUANTILES)])
    third = table(["distance to the nearest training image", *(f"p{q}" for q in QUANTILES)], rows)
    near = [
        [space, *(result["memorisation"][space][name] for name in ("closer", "copy_like", "copies_found"))]
        for space in ("pixels", "features")
    ]
    fourth = table(
        ["by", "samples below held-out's p5", "samples below copies' p95", "copies traced to their original"], near
    )
    return "\n\n".join((first, second, third, fourth))


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture whole, in the format of its ending.

    Raises:
        InputError: Pillow has no such format, or the disk refused.
    """
    with guard(InputError, f"cannot write {path}"):
        kind, data = Image.registered_extensions().get(path.suffix.lower()), io.BytesIO()
        if kind is None:
            raise InputError(f"cannot write {path}: no picture has the ending {path.suffix!r}; take .png")
        picture.save(data, kind)
        write_file(path, data.getvalue())


def save_json(path: Path, values: dict[str, Any]) -> None:
    """Numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    write_file(path, (json.dumps(plain(values), indent=1, allow_nan=False) + "\n").encode())
