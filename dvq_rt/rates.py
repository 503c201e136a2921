"""Rate control: other grains, or fewer cells, than the tokenizer would choose, from one run of the encoder.

The encoder gives a score of every grain for each coarsest cell, and the codes that the cells would have in each. So any
rate is a choice made here. ``docs/glossary.md`` explains grain and cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.codes import code_bits
from dvq_rt.labels import whole
from dvq_rt.layout import TokenLayout
from runtimes.errors import InputError, short

Grain = NDArray[np.int64]
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rate:
    """How many codes an image may have. One of these, or none for the tokenizer's own choice:

    Args:
        fine_ratio: share of the coarsest cells that get the finest grain, in [0, 1]; with three grains a pair, the
            shares of the median and the finest one, together at most 1. Not for models that keep cells.
        bits_per_pixel: the most that codes and places may cost.
        kept: number of cells that keep a code, at most the trained one. Only for models that keep cells.

    Raises:
        InputError: several are given, or one is no number of its kind.
    """

    fine_ratio: Any = None
    bits_per_pixel: float | None = None
    kept: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given; one of them says the rate")
        if self.bits_per_pixel is not None:
            _share("bits_per_pixel", self.bits_per_pixel, math.inf)

    @property
    def own(self) -> bool:
        """Whether the tokenizer chooses."""
        return self.fine_ratio is None and self.bits_per_pixel is None and self.kept is None

    def grain(self, layout: TokenLayout, image_size: int, own: Grain, scores: Scores) -> Grain:
        """The grain map of one image at this rate.

        Args:
            layout: of the model; ``image_size`` in pixels.
            own: int [hc, wc], the tokenizer's choice.
            scores: float [hc, wc, n], how well each grain suits each cell.

        Raises:
            InputError: the layout has no such rate; says which it has.
        """
        if self.kept is not None or (not layout.covering and self.bits_per_pixel is not None):
            return _keep(own, scores, self._kept(layout, image_size))
        if self.fine_ratio is not None:
            return by_shares(scores, self._shares(layout))
        if self.bits_per_pixel is not None:
            return by_codes(layout, scores, self._codes(layout, image_size))
        return own

    def _kept(self, layout: TokenLayout, image_size: int) -> int:
        """Cells that keep a code."""
        if layout.kept is None:
            raise InputError("kept is for models that keep some cells; this one codes all, give fine_ratio")
        if self.kept is not None:
            return whole("kept", self.kept, 1, layout.kept)
        fitting = [k for k in range(1, layout.kept + 1) if code_bits(layout, k) <= self._bits(image_size)]
        if not fitting:
            raise self._out_of_reach(layout, image_size, 1, layout.kept)
        return max(fitting)

    def _shares(self, layout: TokenLayout) -> list[float]:
        """Share of each grain but the coarsest."""
        finer = layout.segments - 1
        if not finer:
            raise InputError("fine_ratio is for models with several grains; this one has one, give kept")
        several = isinstance(self.fine_ratio, Sequence | np.ndarray) and not isinstance(self.fine_ratio, str | bytes)
        given = list(self.fine_ratio) if several else [self.fine_ratio]
        if len(given) != finer:
            raise InputError(f"fine_ratio is {short(self.fine_ratio)}; this model takes {finer}, one a finer grain")
        shares = [_share("fine_ratio", share, 1.0) for share in given]
        if sum(shares) > 1 + 1e-9:
            raise InputError(f"fine_ratio is {short(self.fine_ratio)}; together the shares are at most 1")
        return shares

    def _codes(self, layout: TokenLayout, image_size: int) -> int:
        """Most codes of an image whose cells are all coded."""
        least, most = layout.sides[0] ** 2, layout.cells
        codes = math.floor((self._bits(image_size) - code_bits(layout, 0)) / math.log2(layout.codebook_size) + 1e-9)
        if codes < least:
            raise self._out_of_reach(layout, image_size, least, most)
        return codes

    def _bits(self, image_size: int) -> float:
        assert self.bits_per_pixel is not None
        return float(self.bits_per_pixel) * image_size**2

    def _out_of_reach(self, layout: TokenLayout, image_size: int, least: int, most: int) -> InputError:
        low, high = (code_bits(layout, codes) / image_size**2 for codes in (least, most))
        return InputError(
            f"bits_per_pixel is {self.bits_per_pixel:g}; this model codes an image with {low:.3f} to {high:.3f}"
        )


def rate_of(values: Mapping[str, Any]) -> Rate:
    """A rate from named values.

    Raises:
        InputError: a name is unknown, or as for Rate.
    """
    if unknown := sorted(set(values) - set(Rate.__dataclass_fields__)):
        raise InputError(f"unknown rates {unknown}; there are {list(Rate.__dataclass_fields__)}")
    return Rate(**values)


def by_shares(scores: Scores, shares: Sequence[float]) -> Grain:
    """Grains of given shares: the finest one for the cells that it suits best against the coarsest, then the next finer
    one for those of the others, and so on; the rest is coarsest.

    Args:
        scores: float [hc, wc, n]; shares: of grains 1 to n - 1.
    """
    flat = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
    grain = np.zeros(len(flat), dtype=np.int64)
    for s in range(len(shares), 0, -1):
        gain = np.where(grain == 0, flat[:, s] - flat[:, 0], -np.inf)
        count = min(round(shares[s - 1] * len(flat)), int((grain == 0).sum()))  # both may be rounded up
        grain[np.argsort(-gain, kind="stable")[:count]] = s
    return grain.reshape(scores.shape[:2])


def by_codes(layout: TokenLayout, scores: Scores, most: int) -> Grain:
    """The grains that suit best with at most so many codes in all: cells become finer step by step, those first whose
    score gains most for each code that the step adds, as long as the codes suffice."""
    flat = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
    gains = np.diff(flat, axis=1) / np.diff(layout.codes_per_cell)
    gains = np.minimum.accumulate(gains, axis=1)  # a later step of a cell never comes before an earlier
    grain, left = np.zeros(len(flat), dtype=np.int64), most - len(flat)
    for place in np.argsort(-gains.reshape(-1), kind="stable"):
        cell, s = divmod(int(place), gains.shape[1])
        more = layout.codes_per_cell[s + 1] - layout.codes_per_cell[s]
        if grain[cell] == s and more <= left:
            grain[cell], left = s + 1, left - more
    return grain.reshape(scores.shape[:2])


def _keep(own: Grain, scores: Scores, count: int) -> Grain:
    """Of the cells that have a code the ``count`` with the highest scores."""
    ranked = np.where(own.reshape(-1) >= 0, scores.reshape(-1), -np.inf)
    grain = np.full(own.size, -1, dtype=np.int64)
    grain[np.argsort(-ranked, kind="stable")[:count]] = 0
    return grain.reshape(own.shape)


def select_codes(layout: TokenLayout, grain: Grain, grain_codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The code map of a grain map, int64 [h, w], from the codes in every grain, int64 [n, h, w]."""
    spread = layout.grain_of_cells(grain).reshape(grain_codes.shape[1:])
    codes = np.take_along_axis(grain_codes, np.maximum(spread, 0)[None], 0)[0]
    return np.where(spread < 0, -1, codes)


def _share(name: str, value: Any, most: float) -> float:
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except Exception:
        number = math.nan
    if not 0 <= number <= most or math.isinf(number):
        kind = "a number of at least 0" if math.isinf(most) else f"a number from 0 to {most:g}"
        raise InputError(f"{name} is {short(value)}; it must be {kind}")
    return number
