"""Codes: what an image is coded as. Maps to sequences, their cost in bits, and files.

A file holds one image or many of one layout, as ``.npz`` (arrays ``header``, ``codes``, ``grain``) or as ``.json``
(one object: the header's keys, ``codes`` and ``grain`` as nested lists). The header is
``{"format": "dvq-codes", "schema": 1, "layout": {...}, "labels": [index or null, ...]}``.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.files import write_file
from dvq_rt.layout import TokenLayout, Tokens
from runtimes.errors import ConfigError, DvqError, InputError

FORMAT = "dvq-codes"
SCHEMA = 1
SUFFIXES = (".npz", ".json")


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """The codes of one image. Arrays are copied and cannot be written to.

    Args:
        codes: int [h, w] of the finest grid, each in 0..K-1; the cells of one coarser position hold one code. Where
            the layout does not cover the image, cells without a code hold -1.
        grain: int [hc, wc], the segment (0 is the coarsest) that codes each cell of the coarsest grid, -1 for none.
        layout: the token layout of the model.
        label: index of the image's label, None if it has none.

    Raises:
        InputError: a shape, type or value does not fit the layout.
    """

    codes: NDArray[np.int64]
    grain: NDArray[np.int8]
    layout: TokenLayout
    label: int | None = None

    def __post_init__(self) -> None:
        layout = self.layout
        least = 0 if layout.covering else -1
        codes = _checked("codes", self.codes, layout.sides[-1], least, layout.codebook_size, np.int64)
        grain = _checked("grain", self.grain, layout.sides[0], least, layout.segments, np.int8)
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "grain", grain)
        if self.label is not None:
            if isinstance(self.label, bool) or not isinstance(self.label, int | np.integer):
                raise InputError(f"label is {self.label!r}; it must be an integer or None")
            if not 0 <= self.label < layout.classes:
                allowed = f"0..{layout.classes - 1} or None" if layout.classes else "None: the model has no labels"
                raise InputError(f"label is {self.label}; it must be {allowed}")
            object.__setattr__(self, "label", int(self.label))
        grain_of_cell = layout.grain_of_cells(grain)
        if ((codes.reshape(-1) < 0) != (grain_of_cell < 0)).any():
            raise InputError("codes and grain must be -1 in the same cells, those without a code")
        for s in range(layout.segments - 1):
            cells = layout.covered_cells(s)
            cells = cells[grain_of_cell[cells[:, 0]] == s]
            values = codes.reshape(-1)[cells]
            uneven = np.flatnonzero((values != values[:, :1]).any(axis=1))
            if uneven.size:
                row, column = divmod(int(cells[uneven[0], 0]), layout.sides[-1])
                raise InputError(
                    f"codes differ inside the cell of segment {s} at row {row}, column {column}; all its codes must "
                    f"be equal, or its grain must be finer"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        same = self.layout == other.layout and self.label == other.label
        return same and np.array_equal(self.codes, other.codes) and np.array_equal(self.grain, other.grain)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        """The codes in the order of the sequence, coarsest first; of a layout without an order row by row."""
        grain = self.layout.grain_of_cells(self.grain)
        for s in range(self.layout.segments):
            cells = self.layout.covered_cells(s)[self.layout.ordered_positions(s), 0]
            yield from self.codes.reshape(-1)[cells[grain[cells] == s]].tolist()

    @property
    def length(self) -> int:
        """Number of codes that the image needs: the positions of each segment that are in use."""
        return int(self.layout.count_codes(self.grain))

    @property
    def bits(self) -> float:
        """log2(codebook size) for each code, and the places: log2(segments) for each cell of the grain map or, where
        cells are kept, log2 of the number of ways to choose that many."""
        layout = self.layout
        places = (
            self.grain.size * math.log2(layout.segments)
            if layout.covering
            else math.log2(math.comb(layout.cells, self.length))
        )
        return self.length * math.log2(layout.codebook_size) + places

    def bits_per_pixel(self, image_size: int) -> float:
        """``bits`` over the pixels of an image of ``image_size`` x ``image_size``."""
        if image_size < 1:
            raise InputError(f"image_size is {image_size}; it must be at least 1")
        return self.bits / image_size**2

    def tokens(self, label: int | None = None) -> Tokens:
        """The codes as a token sequence, each part int64 [T + 1] (``TokenLayout.to_tokens``).

        Args:
            label: start label; None takes the codes' own, and failing that the null label or an unconditional start.

        Raises:
            InputError: there is no label and the model has no null label, the label is out of range, or the layout
                keeps another number of cells or their order of importance.
        """
        layout = self.layout
        start = self.label if label is None else label
        if start is None:
            if layout.classes and not layout.null_label:
                raise InputError(f"these codes have no label; pass one of 0..{layout.classes - 1}")
            start = layout.classes
        if not 0 <= start < layout.starts:
            raise InputError(f"label is {start}; it must be in 0..{layout.starts - 1}")
        try:
            return layout.to_tokens(self.codes, self.grain, start)
        except ConfigError as error:
            raise InputError(str(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of one image (see ``save_codes``)."""
        save_codes(path, [self])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codes:
        """Read a file of one image (see ``load_codes``).

        Raises:
            InputError: as ``load_codes``, or the file holds several images.
        """
        found = load_codes(path)
        if len(found) != 1:
            raise InputError(f"{path} holds the codes of {len(found)} images; read it with load_codes")
        return found[0]


def save_codes(path: str | os.PathLike[str], codes: Sequence[Codes]) -> None:
    """Write the codes of one or more images of one layout, atomically; the suffix chooses ``.npz`` or ``.json``.

    Raises:
        InputError: another suffix, no codes, codes of several layouts, or the file cannot be written.
    """
    suffix = _suffix(path)
    if not codes:
        raise InputError("there are no codes to save; give at least one image's")
    if any(c.layout != codes[0].layout for c in codes):
        raise InputError("the codes have different layouts; save those of each model in a file of their own")
    header = {
        "format": FORMAT,
        "schema": SCHEMA,
        "layout": codes[0].layout.to_dict(),
        "labels": [c.label for c in codes],
    }
    maps, grains = np.stack([c.codes for c in codes]), np.stack([c.grain for c in codes])
    if suffix == ".json":
        text = json.dumps({**header, "codes": maps.tolist(), "grain": grains.tolist()})
        write_file(Path(path), text.encode())
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.array(json.dumps(header)), codes=maps.astype(np.int32), grain=grains)
    write_file(Path(path), buffer.getvalue())


def load_codes(path: str | os.PathLike[str]) -> list[Codes]:
    """Read the codes that ``save_codes`` wrote.

    Raises:
        InputError: another suffix, no such file, or a damaged or newer one.
    """
    suffix = _suffix(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the codes {path}: {error.strerror}") from error
    try:
        header, maps, grains = _parse_json(data) if suffix == ".json" else _parse_npz(data)
        if header["format"] != FORMAT:
            raise InputError(f"format is {header['format']!r}, not {FORMAT!r}")
        if header["schema"] != SCHEMA:
            raise InputError(f"schema is {header['schema']!r}, this dvq-rt reads {SCHEMA}; upgrade dvq-rt")
        layout, labels = TokenLayout.from_dict(header["layout"]), header["labels"]
        return [Codes(m, g, layout, label) for m, g, label in zip(maps, grains, labels, strict=True)]
    except (DvqError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise InputError(f"{path} is not a readable file of codes: {error}; save the codes again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} is damaged: {reason}; save the codes again") from error


def _checked(
    name: str, values: Any, side: int, least: int, count: int, dtype: type[np.signedinteger[Any]]
) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (side, side) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} is {array.dtype} {array.shape}; it must be integers of shape ({side}, {side})")
    low, high = int(array.min()), int(array.max())
    if low < least or high >= count:
        raise InputError(f"{name} holds values from {low} to {high}; they must be in {least}..{count - 1}")
    kept = array.astype(dtype)
    kept.setflags(write=False)
    return kept


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: codes are stored as {' or '.join(SUFFIXES)}, not as {suffix or 'a bare name'}")
    return suffix


def _parse_json(data: bytes) -> tuple[dict[str, Any], Any, Any]:
    header = json.loads(data)
    return header, [np.asarray(m) for m in header["codes"]], [np.asarray(g) for g in header["grain"]]


def _parse_npz(data: bytes) -> tuple[dict[str, Any], Any, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        broken = archive.testzip()
    if broken:
        raise InputError(f"the checksum of {broken} is wrong")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return json.loads(str(arrays["header"])), arrays["codes"], arrays["grain"]
