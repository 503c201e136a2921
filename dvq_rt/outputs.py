"""Where the command line writes its pictures: names that are checked before any work, files that are whole."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt.files import write_file
from dvq_rt.images import grid
from runtimes.errors import InputError

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FOLDER_GRID = "grid.png"


def picture_target(text: str) -> tuple[Path, Path | None]:
    """The picture to write, and the folder if ``--out`` names one; checked to be writable before any work."""
    folder = Path(text) if text.endswith(("/", os.sep)) or os.path.isdir(text) else None
    target = folder / FOLDER_GRID if folder else Path(text)
    if target.suffix.lower() not in PICTURES:
        raise InputError(f"--out is {text}; end it with one of {', '.join(PICTURES)}, or with / for a folder")
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"--out {target} exists and is not a regular file; choose another name")
        parent = target.absolute().parent
        while folder and not parent.exists():  # it is made later; the nearest parent that exists must take it
            parent = parent.parent
        probe = parent / f".{secrets.token_hex(4)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write --out {text}: {reason}; choose a folder that can be written") from error
    return target, folder


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder {folder}: {error.strerror}") from error


def write_picture(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    kind = PICTURES[path.suffix.lower()]
    try:
        picture.save(buffer, kind, **({"quality": 95} if kind != "PNG" else {}))
    except (OSError, ValueError) as error:
        raise InputError(
            f"a picture of {picture.width} x {picture.height} cannot be stored as {kind}: {error}"
        ) from error
    write_file(path, buffer.getvalue())


def blocks(rows: list[list[NDArray[np.uint8]]], columns: int) -> Image.Image:
    """Rows of pictures side by side, broken into blocks of at most ``columns``."""
    across = min(columns, len(rows[0]))
    blank = np.full_like(rows[0][0], 255)
    cells: list[NDArray[np.uint8]] = []
    for start in range(0, len(rows[0]), across):
        for row in rows:
            part = row[start : start + across]
            cells += part + [blank] * (across - len(part))
    return grid(np.stack(cells), across)
