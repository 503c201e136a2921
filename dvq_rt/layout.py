"""Token ids, sequences and grammar of coded images: the one source of them.

An image is a sequence of (position, content) pairs in segments of growing resolution. Segment ``s`` tiles the image
with ``sides[s] x sides[s]`` cells; the last segment is the finest. There are two grammars:

- *covering* (DQ; spec/dq.md section 9): every cell is coded by exactly one segment, each segment ends with EOS, and
  so the length varies. Dual granularity has two segments (coarse, fine).
- *keeping* (MQ; spec/mq.md section 4): one segment; ``kept`` of its cells have a code, at any places, and no EOS is
  needed.

In each vocabulary come first the values, then PAD and EOS where the grammar has them, and the start token(s), one per
label where the vocabulary carries the label. Covering ids are those of the released code.

Two position numberings appear: *local* ids, one vocabulary per segment, which the position head predicts; and
*joint* ids, the local ids of all segments laid end to end, which index the one position embedding table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvq_rt.files import read_dataclass
from runtimes.errors import ConfigError

ORDERS = ("row-first", "region-first")
UNORDERED = "importance"
"""Order of released Stackformers that were trained without a permuter; code maps do not hold it."""
HEADS = ("position", "content")
NONE = -1
"""In place of a special token's id where the grammar has no such token."""


class Tokens(NamedTuple):
    """One image as tokens, start tokens included: ``content``, joint ``position``, ``segment``, each int64 [T + 1]."""

    content: NDArray[np.int64]
    position: NDArray[np.int64]
    segment: NDArray[np.int64]


def padded(rows: Sequence[NDArray[np.int64]], fill: int = -1) -> NDArray[np.int64]:
    """Rows of any length below each other, int64 [N, longest], ``fill`` after their end."""
    table = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Sizes of a token layout, from which every id is derived.

    Args:
        codebook_size: number of codes K.
        sides: cells per image side of each segment, coarse to fine; each is a multiple of the one before.
        order: order of the positions of every segment but the first. ``row-first`` is row-major over the image,
            ``region-first`` row-major over the cells of the first segment and row-major within each. With ``kept``
            also ``importance``: most important first, as the tokenizer found them. Then positions are to be drawn
            freely, and code maps have no sequence.
        classes: number of labels; 0 is an unconditional model.
        null_label: whether one more label, ``classes``, stands for "no label" (for classifier-free guidance).
        label_in_position: whether the start tokens of the position vocabularies carry the label too
            (released class ``dqtransformer_class2_entropy``) or only those of the content vocabulary
            (``dqtransformer_class``, and both Stackformers).
        kept: number of cells that have a code, in 1..sides[0] ** 2; None for the covering grammar.
        first: which head draws first, ``position`` or ``content``; content only with ``kept``, because only the
            position tells that a segment ends.

    Raises:
        ConfigError: a size is of the wrong type or out of range.
    """

    codebook_size: int
    sides: tuple[int, ...]
    order: str = "row-first"
    classes: int = 0
    null_label: bool = False
    label_in_position: bool = True
    kept: int | None = None
    first: str = "position"

    def __post_init__(self) -> None:
        if not _is_int(self.codebook_size, 1):
            raise ConfigError(f"layout.codebook_size is {self.codebook_size!r}; it must be an integer of at least 1")
        sides = self.sides
        if not isinstance(sides, tuple | list) or not sides or not all(_is_int(side, 1) for side in sides):
            raise ConfigError(f"layout.sides is {sides!r}; it must be a list of integers of at least 1")
        object.__setattr__(self, "sides", tuple(sides))
        if any(fine == coarse or fine % coarse for coarse, fine in pairwise(sides)):
            raise ConfigError(f"layout.sides is {self.sides}; each must be a larger multiple of the one before")
        if self.order not in ORDERS and (self.order != UNORDERED or self.kept is None):
            raise ConfigError(f"layout.order is {self.order!r}; it must be one of {ORDERS}, or with kept {UNORDERED!r}")
        if not _is_int(self.classes, 0):
            raise ConfigError(f"layout.classes is {self.classes!r}; it must be an integer, 0 (unconditional) or more")
        for name in ("null_label", "label_in_position"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"layout.{name} is {getattr(self, name)!r}; it must be true or false")
        if self.null_label and not self.classes:
            raise ConfigError("layout.null_label needs layout.classes of at least 1")
        if self.kept is not None and (len(self.sides) > 1 or not _is_int(self.kept, 1) or self.kept > self.cells):
            raise ConfigError(
                f"layout.kept is {self.kept!r} with grids {self.sides}; it must be null, or an integer from 1 to the "
                "cells of the one grid"
            )
        if self.first not in HEADS or (self.first == "content" and self.covering):
            raise ConfigError(f"layout.first is {self.first!r}; it must be 'position', or 'content' if there is a kept")

    # --- sizes -------------------------------------------------------------------------------------------------
    @property
    def segments(self) -> int:
        return len(self.sides)

    @property
    def covering(self) -> bool:
        """Whether every cell gets a code and segments end with EOS."""
        return self.kept is None

    @property
    def heads(self) -> tuple[str, str]:
        """The two heads in the order in which they draw."""
        return ("content", "position") if self.first == "content" else ("position", "content")

    def partner_label(self, label: int) -> int:
        """Start label of the slot that guidance compares a label's with: the null label, or that of a model without
        labels; where there is neither, the label itself."""
        return self.classes if self.null_label or not self.classes else label

    @property
    def filled_cells(self) -> int:
        """Cells with a code in a finished image."""
        return self.cells if self.kept is None else self.kept

    @property
    def _specials(self) -> int:
        """PAD and EOS of each vocabulary."""
        return 2 if self.covering else 0

    @property
    def cells(self) -> int:
        """Number of cells of the finest grid."""
        return self.sides[-1] ** 2

    @property
    def codes_per_cell(self) -> tuple[int, ...]:
        """Number of codes of a coarsest cell, by the segment that codes it."""
        return tuple((side // self.sides[0]) ** 2 for side in self.sides)

    def count_codes(self, grain: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Number of codes of grain maps, int [.., sides[0], sides[0]] -> int64 [..]."""
        return np.array([*self.codes_per_cell, 0])[grain].sum((-2, -1))  # -1, no code, is the last entry

    @property
    def starts(self) -> int:
        """Number of start tokens: labels, the null label included, or 1."""
        return max(self.classes, 1) + int(self.null_label)

    @property
    def max_length(self) -> int:
        """Most inputs T that one image needs: a start per segment, an end per segment but the last, and the codes."""
        return self.filled_cells + (2 * self.segments - 1 if self.covering else 0)

    # --- content ids -------------------------------------------------------------------------------------------
    @property
    def content_pad(self) -> int:
        return self.codebook_size if self.covering else NONE

    @property
    def content_eos(self) -> int:
        return self.codebook_size + 1 if self.covering else NONE

    @property
    def content_sos(self) -> int:
        """First start id; label ``y`` starts with ``content_sos + y``."""
        return self.codebook_size + self._specials

    @property
    def content_vocabulary(self) -> int:
        return self.content_sos + self.starts

    # --- position ids ------------------------------------------------------------------------------------------
    def position_pad(self, segment: int) -> int:
        return self.sides[segment] ** 2 if self.covering else NONE

    def position_eos(self, segment: int) -> int:
        return self.sides[segment] ** 2 + 1 if self.covering else NONE

    def position_sos(self, segment: int) -> int:
        return self.sides[segment] ** 2 + self._specials

    def position_vocabulary(self, segment: int) -> int:
        return self.position_sos(segment) + (self.starts if self.label_in_position else 1)

    @property
    def position_head(self) -> int:
        """Width of the one position head: the largest (finest) local vocabulary."""
        return self.position_vocabulary(self.segments - 1)

    def position_offset(self, segment: int) -> int:
        """Joint id of the segment's local id 0."""
        return sum(self.position_vocabulary(s) for s in range(segment))

    @property
    def position_table(self) -> int:
        """Number of joint position ids."""
        return self.position_offset(self.segments)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``position_offset`` of every segment, int64 [segments]."""
        return np.array([self.position_offset(s) for s in range(self.segments)], dtype=np.int64)

    def segment_of(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Segments that joint position ids belong to, int64 of any shape; ids below 0 count to the first."""
        return np.searchsorted(self.offsets[1:], position, side="right")

    def local(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Joint position ids as local ids of their segments, int64 of any shape."""
        return position - self.offsets[self.segment_of(position)]

    def start(self, segment: int, label: int) -> tuple[int, int]:
        """(content id, local position id) of a segment's start token for ``label`` (0 if unconditional)."""
        if not 0 <= label < self.starts:
            raise ConfigError(f"label {label} is outside 0..{self.starts - 1}")
        return self.content_sos + label, self.position_sos(segment) + (label if self.label_in_position else 0)

    # --- order -------------------------------------------------------------------------------------------------
    def ordered_positions(self, segment: int) -> NDArray[np.int64]:
        """All positions of a segment in sequence order, int64 [side * side] of row-major ids."""
        side = self.sides[segment]
        ids = np.arange(side * side, dtype=np.int64).reshape(side, side)
        if self.order != "region-first" or segment == 0:
            return ids.reshape(-1)
        block = side // self.sides[0]
        return ids.reshape(self.sides[0], block, self.sides[0], block).transpose(0, 2, 1, 3).reshape(-1)

    def covered_cells(self, segment: int) -> NDArray[np.int64]:
        """Finest cells that each position of a segment covers, int64 [side * side, (finest / side) ** 2]."""
        side, block = self.sides[segment], self.sides[-1] // self.sides[segment]
        ids = np.arange(self.cells, dtype=np.int64).reshape(side, block, side, block)
        return ids.transpose(0, 2, 1, 3).reshape(side * side, block * block)

    # --- sequences <-> maps ------------------------------------------------------------------------------------
    def to_tokens(self, codes: NDArray[Any], grain: NDArray[Any], label: int = 0) -> Tokens:
        """A code map as the token sequence that training sees.

        Args:
            codes: int [side, side] of the finest grid; cells of one coarser position hold one code.
            grain: int [sides[0], sides[0]], the segment that codes each coarsest cell, -1 for none.
            label: start label.

        Returns:
            Tokens of length T + 1: start, pairs, end (if there is one) for each segment in turn. Inputs are
            ``[:-1]``, targets ``[1:]``.

        Raises:
            ConfigError: the maps do not fit the grids, their number of codes is not ``kept``, or the layout's order is
                importance.
        """
        if self.order == UNORDERED:
            raise ConfigError(
                "layout.order is 'importance', which code maps do not hold; this model draws, encodes and "
                "decodes, but codes cannot be scored or trained on"
            )
        flat = np.asarray(codes, dtype=np.int64).reshape(-1)
        if flat.size != self.cells or np.size(grain) != self.sides[0] ** 2:
            raise ConfigError(
                f"code map {np.shape(codes)} and grain map {np.shape(grain)} do not fit the grids {self.sides}"
            )
        grain_of_cell = self.grain_of_cells(grain)
        if self.kept is not None and (count := int((grain_of_cell >= 0).sum())) != self.kept:
            raise ConfigError(f"the maps hold {count} codes; this layout has {self.kept} per image")
        content, position, segment = [], [], []
        for s in range(self.segments):
            first = self.covered_cells(s)[:, 0]
            coded = self.ordered_positions(s)
            coded = coded[grain_of_cell[first[coded]] == s]
            start_content, start_position = self.start(s, label)
            offset, ends = self.position_offset(s), int(self.covering)
            content += [[start_content], flat[first[coded]], [self.content_eos] * ends]
            position += [[start_position + offset], coded + offset, [self.position_eos(s) + offset] * ends]
            segment.append(np.full(coded.size + 1 + ends, s))
        return Tokens(*(np.concatenate(part).astype(np.int64) for part in (content, position, segment)))

    def grain_of_cells(self, grain: NDArray[Any]) -> NDArray[np.int64]:
        """The coarsest cells' grain spread to every finest cell, int64 [cells]."""
        block = self.sides[-1] // self.sides[0]
        spread = np.asarray(grain, dtype=np.int64).reshape(self.sides[0], self.sides[0])
        return spread.repeat(block, 0).repeat(block, 1).reshape(-1)

    def to_map(self, content: Sequence[int], position: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Code map and grain map of a token sequence (joint positions, start tokens allowed).

        Each segment is read up to its EOS, later tokens overwrite earlier ones, and in the covering grammar cells
        that nothing covers hold code 0 (spec/dq.md section 9, ``forward_back``). A segment other than the last that
        never ends is lost, as in the released code.

        Returns:
            ``codes`` int64 [side, side] of the finest grid, ``grain`` int64 [sides[0], sides[0]]; both -1 where a
            keeping grammar has no code.
        """
        codes = np.full(self.cells, 0 if self.covering else -1, dtype=np.int64)
        grain = np.full(self.cells, self.segments - 1 if self.covering else -1, dtype=np.int64)
        tokens_content = np.asarray(content, dtype=np.int64)
        tokens_position = np.asarray(position, dtype=np.int64)
        for s in range(self.segments):
            offset, end = self.position_offset(s), self.position_offset(s + 1)
            mine = (tokens_position >= offset) & (tokens_position < end)
            local, values = tokens_position[mine] - offset, tokens_content[mine]
            ends = np.flatnonzero(local == self.position_eos(s))
            if ends.size:
                local, values = local[: ends[0]], values[: ends[0]]
            elif s < self.segments - 1:
                continue
            keep = local < self.sides[s] ** 2
            cells = self.covered_cells(s)[local[keep]]
            codes[cells] = values[keep][:, None]
            grain[cells] = s
        side, block = self.sides[-1], self.sides[-1] // self.sides[0]
        return codes.reshape(side, side), grain.reshape(side, side)[::block, ::block].copy()

    def following(self, tokens: Tokens) -> NDArray[np.int64]:
        """What the first head predicts of tokens 1 .. T, which the second stack reads: int64 [T]."""
        return (tokens.position if self.first == "position" else tokens.content)[1:]

    def steps_of(self, tokens: Tokens) -> int:
        """Steps until the image is complete; what follows the last code, ends and empty segments, needs none."""
        return int(np.flatnonzero(tokens.content[1:] < self.codebook_size)[-1]) + 1

    def random_grain(self, rng: np.random.Generator, share: float = 0.5) -> NDArray[np.int64]:
        """A legal grain map with grains at random places, int64 [sides[0], sides[0]]. In the covering grammar ``share``
        of the cells, in [0, 1], have a finer grain than the coarsest, each of those equally often."""
        cells = self.sides[0] ** 2
        grain = np.zeros(cells, dtype=np.int64)
        places = rng.permutation(cells)
        if self.kept is not None:
            grain[places[self.kept :]] = -1
        elif self.segments > 1:
            finer = places[: round(share * cells)]
            grain[finer] = rng.integers(1, self.segments, finer.size)
        return grain.reshape(self.sides[0], self.sides[0])

    def random_tokens(
        self, rng: np.random.Generator, label: int = 0, grain: NDArray[np.int64] | None = None, shuffled: bool = False
    ) -> Tokens:
        """A legal sequence of random codes.

        Args:
            rng: source of the codes, and of the grain map if there is none.
            label: start label.
            grain: as for ``to_tokens``; None takes ``random_grain``.
            shuffled: put the positions of each segment in random order.

        Returns:
            as ``to_tokens``.
        """
        grain = self.random_grain(rng) if grain is None else grain
        tokens = self.to_tokens(rng.integers(0, self.codebook_size, self.cells), grain, label)
        for s in range(self.segments if shuffled else 0):
            pairs = np.flatnonzero(tokens.segment == s)[1 : -1 if self.covering else None]
            tokens.position[pairs] = tokens.position[rng.permutation(pairs)]
        return tokens

    # --- files -------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sides": list(self.sides)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenLayout:
        """Strict inverse of ``to_dict``.

        Raises:
            ConfigError: a key is unknown or missing, or a value is of the wrong type or out of range.
        """
        return read_dataclass(cls, values, "layout")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
