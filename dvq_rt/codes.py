"""Codes: what an image is coded as. Maps to sequences, their cost in bits, and files.

A file holds one image or many of one layout, as ``.npz`` (arrays ``header``, ``codes``, ``grain``) or as ``.json``
(one object: the header's keys, ``codes`` and ``grain`` as nested lists). The header is
``{"format": "dvq-codes", "schema": 1, "layout": {...}, "labels": [index or null, ...]}``; where an image has a prompt,
``schema`` is 2 and there are ``"prompts": [text or null, ...]``.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.files import MAX_JSON_BYTES, FileName, open_regular, parse_json, write_file
from dvq_rt.labels import as_index, whole
from dvq_rt.layout import TokenLayout, Tokens
from dvq_rt.prompts import check_prompt
from runtimes.errors import ConfigError, DvqError, InputError, guard, short

FORMAT = "dvq-codes"
SCHEMA, PROMPTED = 1, 2
SUFFIXES = (".npz", ".json")
MAX_CODES = 1 << 26
"""Codes in one file, such as those of 65,536 images of 32 x 32 cells: half a GiB in memory."""
MAX_IMAGES = 1 << 20
MAX_HEADER_BYTES = 64 << 20
MAX_DIRECTORY_BYTES = 1024
"""Of an archive, whose three members take less than 200."""
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Codes:
    """The codes of one image. Arrays are copied and cannot be written to. Iterating gives (segment, row, column, code)
    of every code, coarse to fine, on the segment's own grid.

    Args:
        codes: int [h, w] of the finest grid, each in 0..K-1; the cells of one coarser position hold one code. Where
            the layout does not cover the image, cells without a code hold -1.
        grain: int [hc, wc], the segment (0 is the coarsest) that codes each cell of the coarsest grid, -1 for none.
        layout: the token layout of the model.
        label: index of the image's label, None if it has none.
        prompt: the text that the image was drawn from, None if there was none.

    Raises:
        InputError: a shape, type or value does not fit the layout.
    """

    codes: NDArray[np.int64]
    grain: NDArray[np.int8]
    layout: TokenLayout
    label: int | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        layout = self.layout
        if not isinstance(layout, TokenLayout):
            raise InputError(f"layout is {short(layout)}; it must be a TokenLayout")
        least = 0 if layout.covering else -1
        codes = _checked("codes", self.codes, layout.sides[-1], least, layout.codebook_size, np.int64)
        grain = _checked("grain", self.grain, layout.sides[0], least, layout.segments, np.int8)
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "grain", grain)
        if self.label is not None:
            label = as_index(self.label)
            if label is None:
                raise InputError(f"label is {short(self.label)}; it must be an integer or None")
            if not 0 <= label < layout.classes:
                allowed = f"0..{layout.classes - 1} or None" if layout.classes else "None: the model has no labels"
                raise InputError(f"label is {short(label)}; it must be {allowed}")
            object.__setattr__(self, "label", label)
        if self.prompt is not None:
            check_prompt(self.prompt)
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
        same = (self.layout, self.label, self.prompt) == (other.layout, other.label, other.prompt)
        return same and np.array_equal(self.codes, other.codes) and np.array_equal(self.grain, other.grain)

    def __repr__(self) -> str:
        return f"Codes({self.length} codes on grids {self.layout.sides}, label={self.label})"

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(segment, row, column, code) of every code, coarsest first, row by row of its segment's grid."""
        flat, segment_of_cell = self.codes.reshape(-1), self.layout.grain_of_cells(self.grain)
        for s, side in enumerate(self.layout.sides):
            first = self.layout.covered_cells(s)[:, 0]
            for position in np.flatnonzero(segment_of_cell[first] == s):
                yield s, int(position) // side, int(position) % side, int(flat[first[position]])

    @property
    def length(self) -> int:
        """Number of codes that the image needs: the positions of each segment that are in use."""
        return int(self.layout.count_codes(self.grain))

    @property
    def bits(self) -> float:
        """log2(codebook size) for each code, and the places: log2(segments) for each cell of the grain map or, where
        cells are kept, log2 of the number of ways to choose that many."""
        return code_bits(self.layout, self.length)

    def bits_per_pixel(self, image_size: int) -> float:
        """``bits`` over the pixels of an image of ``image_size`` x ``image_size``."""
        return self.bits / whole("image_size", image_size, 1, 1 << 32) ** 2

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
        start = whole("label", start, 0, layout.starts - 1)
        try:
            return layout.to_tokens(self.codes, self.grain, start)
        except ConfigError as error:
            raise InputError(str(error)) from None

    def save(self, path: FileName) -> None:
        """Write a file of one image (see ``save_codes``)."""
        save_codes(path, [self])

    @classmethod
    def load(cls, path: FileName) -> Codes:
        """Read a file of one image (see ``load_codes``).

        Raises:
            InputError: as ``load_codes``, or the file holds several images.
        """
        several = load_codes(path)
        if len(several) != 1:
            raise InputError(f"{path} holds the codes of {len(several)} images; read it with load_codes")
        return several[0]


def code_bits(layout: TokenLayout, length: int) -> float:
    """Bits of an image of so many codes: see ``Codes.bits``."""
    cells = layout.sides[0] ** 2
    places = cells * math.log2(layout.segments) if layout.covering else math.log2(math.comb(layout.cells, length))
    return length * math.log2(layout.codebook_size) + places


def codes_of(layout: TokenLayout, codes: Any) -> list[Codes]:
    """One image's codes, several, or what holds them as ``.codes``, as a list.

    Raises:
        InputError: something is no codes, or its codebook or grids are not those of ``layout``.
    """
    several = getattr(codes, "codes", codes) if not isinstance(codes, Codes) else [codes]
    try:
        several = list(several)
    except TypeError:
        several = [several]
    for c in several:
        if not isinstance(c, Codes):
            raise InputError(f"got a {type(c).__name__}; codes come from encode, sample or load_codes")
        ours, theirs = (
            f"a codebook of {of.codebook_size} and grids {of.sides}, "
            + ("every cell coded" if of.covering else "some cells kept")
            for of in (layout, c.layout)
        )
        if ours != theirs:
            raise InputError(f"the codes have {theirs}; this model has {ours}")
    return several


def save_codes(path: FileName, codes: Codes | Iterable[Codes]) -> None:
    """Write the codes of one or more images of one layout, atomically; the suffix chooses ``.npz`` or ``.json``.

    Raises:
        InputError: another suffix, no codes, codes of several layouts, more than ``load_codes`` reads (``MAX_CODES``
            codes, ``MAX_IMAGES`` images, JSON of 64 MiB), or the file cannot be written.
    """
    suffix = _suffix(path)
    with guard(InputError, "the codes cannot be listed"):
        several = [codes] if isinstance(codes, Codes) else list(codes)
    if not several:
        raise InputError("there are no codes to save; give at least one image's")
    if odd := [c for c in several if not isinstance(c, Codes)]:
        raise InputError(f"cannot save {short(odd[0])} as codes; give Codes, as encode and load_codes make them")
    layout = several[0].layout
    _check_count(layout, len(several))
    if any(c.layout != layout for c in several):
        raise InputError("the codes have different layouts; save those of each model in a file of their own")
    if suffix == ".json":
        data = json.dumps(codes_to_dict(several)).encode()
        if len(data) > MAX_JSON_BYTES:
            raise InputError(f"{len(several)} images make a JSON file of {len(data)} bytes; save them as .npz")
    else:
        buffer = io.BytesIO()
        maps, grains = np.stack([c.codes for c in several]), np.stack([c.grain for c in several])
        header = np.array(json.dumps(_header(several)))
        np.savez_compressed(buffer, header=header, codes=maps.astype(np.int32), grain=grains)
        data = buffer.getvalue()
    write_file(path, data)


def load_codes(path: FileName) -> list[Codes]:
    """Read the codes that ``save_codes`` wrote. All sizes are compared before anything is unpacked.

    Raises:
        InputError: another suffix; no such file, or not a regular one; a damaged, newer or too large one.
    """
    suffix, mend = _suffix(path), "save the codes again"
    most = MAX_JSON_BYTES if suffix == ".json" else 4 * MAX_CODES + MAX_HEADER_BYTES
    with (
        guard(InputError, f"cannot read the codes {path}"),
        open_regular(path, most) as file,
        guard(InputError, f"{path} is not a readable file of codes", mend),
    ):
        try:
            layout, tags, maps, grains = _parse_json(file) if suffix == ".json" else _parse_npz(file)
            return [Codes(m, g, layout, *tag) for m, g, tag in zip(maps, grains, tags, strict=True)]
        except DvqError as cause:  # which does not name the file
            raise ValueError(str(cause)) from cause


def codes_to_dict(codes: Sequence[Codes]) -> dict[str, Any]:
    """The content of a ``.json`` file of the codes of one or more images of one layout."""
    maps, grains = [c.codes.tolist() for c in codes], [c.grain.tolist() for c in codes]
    return {**_header(codes), "codes": maps, "grain": grains}


def codes_from_dict(content: Any) -> list[Codes]:
    """Inverse of ``codes_to_dict``.

    Raises:
        InputError: the content is no such thing; says what is wrong.
    """
    with guard(InputError, "the codes cannot be read"):
        layout, tags = _parse_header(content)
        rows = zip(content["codes"], content["grain"], tags, strict=True)
        return [Codes(maps, grain, layout, *tag) for maps, grain, tag in rows]


def _header(codes: Sequence[Codes]) -> dict[str, Any]:
    labels, layout = [c.label for c in codes], codes[0].layout.to_dict()
    header = {"format": FORMAT, "schema": SCHEMA, "layout": layout, "labels": labels}
    if any(c.prompt is not None for c in codes):
        header |= {"schema": PROMPTED, "prompts": [c.prompt for c in codes]}
    return header


def _checked(
    name: str, values: Any, side: int, least: int, count: int, dtype: type[np.signedinteger[Any]]
) -> NDArray[Any]:
    with guard(InputError, f"{name} cannot be read as an array"):
        array = np.asarray(values)
    if array.shape != (side, side) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} is {array.dtype} {array.shape}; it must be integers of shape ({side}, {side})")
    low, high = int(array.min()), int(array.max())
    if low < least or high >= count:
        raise InputError(f"{name} holds values from {low} to {high}; they must be in {least}..{count - 1}")
    kept = array.astype(dtype)
    kept.setflags(write=False)
    return kept


def _suffix(path: FileName) -> str:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"the path of codes is {short(path)}; it must be a path")
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: codes are stored as {' or '.join(SUFFIXES)}, not as {suffix or 'a bare name'}")
    return suffix


def _check_count(layout: TokenLayout, images: int) -> None:
    if images > MAX_IMAGES or images * layout.cells > MAX_CODES:
        raise InputError(
            f"{images} images of {layout.cells} cells are too many for one file, which holds at most {MAX_CODES} "
            f"codes and {MAX_IMAGES} images; split them"
        )


def _parse_header(header: Any) -> tuple[TokenLayout, list[tuple[Any, Any]]]:
    """Layout, and label and prompt of each image."""
    if not isinstance(header, dict) or not {"format", "schema", "layout", "labels"} <= set(header):
        raise InputError("there is no header with format, schema, layout and labels")
    if header["format"] != FORMAT:
        raise InputError(f"format is {short(header['format'])}, not {FORMAT!r}")
    if header["schema"] not in (SCHEMA, PROMPTED):
        raise InputError(f"schema is {short(header['schema'])}, this dvq-rt reads up to {PROMPTED}; upgrade dvq-rt")
    layout = TokenLayout.from_dict(header["layout"])
    if not isinstance(header["labels"], list):
        raise InputError(f"labels is {short(header['labels'])}; it must be a list")
    _check_count(layout, len(header["labels"]))
    prompts = header.get("prompts", [None] * len(header["labels"]))
    if not isinstance(prompts, list) or len(prompts) != len(header["labels"]):
        raise InputError(f"prompts is {short(prompts)}; it must be a list with one for each label")
    return layout, list(zip(header["labels"], prompts, strict=True))


def _parse_json(file: IO[bytes]) -> tuple[TokenLayout, list[tuple[Any, Any]], Any, Any]:
    content = parse_json(file.read())
    layout, tags = _parse_header(content)
    return layout, tags, content["codes"], content["grain"]


def _parse_npz(file: IO[bytes]) -> tuple[TokenLayout, list[tuple[Any, Any]], Any, Any]:
    file.seek(max(file.seek(0, os.SEEK_END) - 42, 0))
    end = file.read().rjust(42)
    listed = int.from_bytes(end[-10:-6], "little")  # the bytes that zipfile reads at once, if there is no longer form
    if end[-22:-18] != b"PK\5\6" or end.startswith(b"PK\6\7") or listed > MAX_DIRECTORY_BYTES:
        raise InputError("it is cut short, or no archive of header, codes and grain")
    with zipfile.ZipFile(file) as archive:
        layout, tags = _parse_header(parse_json(str(_member(archive, "header", ()))))
        maps, grains = (
            _member(archive, name, (len(tags), side, side))
            for name, side in (("codes", layout.sides[-1]), ("grain", layout.sides[0]))
        )
    return layout, tags, maps, grains


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of an archive, of a text without dimensions or of integers; unpacked only if its size is right."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{name} is packed in a way that save_codes does not use")
    with archive.open(entry) as stream:
        stored, columns_first, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
        size = math.prod(shape) * dtype.itemsize
        good = dtype.kind in "iu" if shape else dtype.kind == "U" and size <= MAX_HEADER_BYTES
        if not good or stored != shape or entry.file_size != stream.tell() + size:
            raise InputError(f"{name} is {dtype} {stored} in {entry.file_size} bytes; {shape} is needed")
        content = stream.read()  # to the end, where the checksum is compared
    return np.frombuffer(content, dtype).reshape(shape, order="F" if columns_first else "C")
