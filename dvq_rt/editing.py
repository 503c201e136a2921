"""Editing: what is kept of an image, as the step needs it, and what corrects the draws.

The model draws tokens in one order and sees no later ones. So keeping a beginning of the sequence is exact: the rest is
drawn from the model's own law. Keeping anything else by *pins* draws each token among what the pins allow. An image x
then comes with another probability than the model's given what is kept, in proportion to 1 / w(x), where log w is the
sum of the steps' reports ``position_logmass`` and ``content_logmass``: the logarithm of the share of the model's
probability that was left to draw from. Of several candidates one is therefore chosen with probability proportional to w
(self-normalized importance resampling); the more there are, the nearer it comes to the model's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dvq_rt.codes import Codes
from dvq_rt.labels import whole
from dvq_rt.layout import TokenLayout, Tokens
from runtimes.errors import InputError, guard, short

FREE = -1
"""The pin of a cell that may end in any way."""
GRAINS = ("free", "keep", "finest")
Mask = NDArray[np.bool_]
Forced = tuple[NDArray[np.int64], NDArray[np.int64]]


# --- which cells ---------------------------------------------------------------------------------------------------
def cell_mask(mask: Any, layout: TokenLayout, size: int, dilate: int = 0) -> Mask:
    """Which coarsest cells are to be redrawn, bool [sides[0], sides[0]]: those of which any pixel is.

    Args:
        mask: a PIL image or array [size, size] whose non-zero pixels are redrawn, or a bool array [sides[0], sides[0]]
            of cells.
        size: pixels per side of the model's images.
        dilate: rings of neighbouring cells that are redrawn too.

    Raises:
        InputError: the mask is of another size or kind, or covers nothing or everything.
    """
    side = layout.sides[0]
    dilate = whole("dilate", dilate, 0, side)
    with guard(InputError, "the mask cannot be read"):
        values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if values.shape == (size, size) and values.dtype.kind in "biuf":
        cells = (values != 0).reshape(side, size // side, side, size // side).any((1, 3))
    elif values.shape == (side, side) and values.dtype == bool:
        cells = values.copy()
    else:
        raise InputError(
            f"the mask is {values.dtype} {values.shape}; it must be a picture or numbers [{size}, {size}], as the "
            f"image, or truth values [{side}, {side}], one a cell"
        )
    for _ in range(dilate):
        wide = np.pad(cells, 1)
        cells = np.any([wide[y : y + side, x : x + side] for y in range(3) for x in range(3)], axis=0)
    if not cells.any():
        raise InputError("the mask is empty: there is nothing to redraw")
    if cells.all():
        raise InputError(
            "the mask covers the whole image, of which nothing is kept; that is plain sampling: use sample"
        )
    return cells


def region_mask(region: Any, size: int) -> Mask:
    """A rectangle (left, top, right, bottom) in pixels as a mask bool [size, size].

    Raises:
        InputError: it is no such rectangle, or lies outside the image.
    """
    words = (
        f"region is {short(region)}; it must be (left, top, right, bottom) with 0 <= left < right <= {size}, and so on"
    )
    try:
        left, top, right, bottom = (whole("region", value, 0, size) for value in region)
    except (TypeError, ValueError, InputError):
        raise InputError(words) from None
    if left >= right or top >= bottom:
        raise InputError(words)
    mask = np.zeros((size, size), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


# --- what is kept --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """An image of which some cells are redrawn.

    Args:
        codes: of the image.
        redraw: bool [sides[0], sides[0]], the coarsest cells that are redrawn; the others keep their codes, or that
            they have none.
        grain: of what is redrawn: ``free`` lets the model choose it, ``keep`` keeps it (and, where some cells have no
            code, which), ``finest`` prescribes the finest one.
        hints: int [sides[0], sides[0]], codes in the coarsest grain of redrawn cells that get finer ones, -1 for none;
            only models that were trained with what is kept first are told.
        original: uint8 [size, size, 3], whose pixels are shown outside; None shows what the codes decode to.

    Raises:
        InputError: the parts do not fit.
    """

    codes: Codes
    redraw: Mask
    grain: str = "free"
    original: NDArray[np.uint8] | None = None
    hints: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.grain not in GRAINS:
            raise InputError(f"grain is {short(self.grain)}; it must be one of {GRAINS}")
        if self.grain == "finest" and not self.codes.layout.covering:
            raise InputError("grain 'finest' is for models with several grains; this one keeps some cells of one grid")
        if self.redraw.shape != self.codes.grain.shape or self.redraw.dtype != bool:
            raise InputError(
                f"redraw is {self.redraw.dtype} {self.redraw.shape}; it must be bool {self.codes.grain.shape}"
            )

    @property
    def pinned(self) -> NDArray[np.int32]:
        return pins(self.codes, ~self.redraw, self.grain)

    @property
    def beginning(self) -> bool:
        """Whether what is kept is the beginning of every sequence that may follow, so that pins draw from the model's
        law: nothing that is kept comes after the first token that may be another one."""
        layout, tokens = self.codes.layout, self.codes.tokens(0)
        kept, drawn = ~redrawn_tokens(layout, tokens, self.redraw), redrawn_tokens(layout, tokens, self.redraw)
        code = tokens.content < layout.codebook_size
        if self.grain == "keep":  # as many tokens as there were
            first = np.flatnonzero(drawn)
        else:  # the first segment may code any of them
            places = layout.ordered_positions(0)[self.redraw.reshape(-1)[layout.ordered_positions(0)]]
            first = np.flatnonzero((tokens.segment > 0) | (tokens.position >= places[0]) & code)
        return not first.size or not (kept & code)[first[0] :].any()

    def constraint(self, given: bool = False) -> dict[str, Any]:
        """Fields of a ``Request``. With ``given`` what is kept comes first, for models that were trained with it.

        Raises:
            InputError: with the hints the sequence is longer than any of the model's.
        """
        layout = self.codes.layout
        if not given:
            return scheduled(self, False) if layout.first == "content" else {"pinned": self.pinned}
        tokens, kind = given_first(layout, self.codes.tokens(0), ~self.redraw, self.hints)
        first = np.flatnonzero(kind)
        most = len(first) + int(self.redraw.sum()) * layout.codes_per_cell[-1] + 2 * layout.segments - 1
        if self.hints is not None and most > layout.max_length:
            raise InputError(
                f"with hints the image has up to {most} tokens, and {layout.max_length} fit; refine fewer cells"
            )
        forced = (tokens.position[first], tokens.content[first])
        fields = scheduled(self, True) if layout.first == "content" else {"pinned": self.pinned, "forced": forced}
        return {**fields, "given": kind[first]}

    def shown(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A decoded image [size, size, 3] as it is shown: with the original's pixels outside."""
        return image if self.original is None else composite(self.original, image, self.redraw)


def pins(codes: Codes, keep: Mask, grain: str = "free") -> NDArray[np.int32]:
    """How cells must end, int32 [cells] of the finest grid, row by row: ``segment * K + code``; ``-2 - segment`` for
    any code of that segment, where the number of segments means none; -1 for free.

    Args:
        keep: bool [sides[0], sides[0]], coarsest cells that keep their codes, or that they have none.
        grain: ``free`` leaves the others free, ``keep`` pins them to their segment, or to none, ``finest`` to the last.
    """
    layout = codes.layout
    segment, code = layout.grain_of_cells(codes.grain), codes.codes.reshape(-1)
    none = -2 - layout.segments
    own = np.where(code < 0, none, segment * layout.codebook_size + code)
    others = {"keep": np.where(code < 0, none, -2 - segment), "finest": np.full(layout.cells, -1 - layout.segments)}
    other = others.get(grain, np.full(layout.cells, FREE))
    return np.where(spread(layout, keep), own, other).astype(np.int32)


def spread(layout: TokenLayout, cells: Mask) -> Mask:
    """A mask of coarsest cells [sides[0], sides[0]] as one of finest cells [cells]."""
    return layout.grain_of_cells(cells).astype(bool)


def redrawn_tokens(layout: TokenLayout, tokens: Any, redraw: Mask) -> Mask:
    """Which tokens of a sequence code a redrawn cell, bool [T + 1]; start and end tokens do not."""
    wide, out = spread(layout, redraw), np.zeros(len(tokens.content), dtype=bool)
    for s in range(layout.segments):
        mine = (tokens.segment == s) & (tokens.content < layout.codebook_size)
        out[mine] = wide[layout.covered_cells(s)[tokens.position[mine] - layout.position_offset(s), 0]]
    return out


def given_first(
    layout: TokenLayout, tokens: Tokens, keep: Mask, hints: NDArray[Any] | None = None
) -> tuple[Tokens, NDArray[np.int64]]:
    """A sequence with the kept tokens in front, so that all that is drawn after them sees them: the start, the codes of
    kept cells, hints, then what is left of the sequence in its order.

    Args:
        tokens: as of ``TokenLayout.to_tokens``.
        keep: bool [sides[0], sides[0]], coarsest cells that are kept.
        hints: int [sides[0], sides[0]], for cells that are drawn in a finer grain their code in the coarsest one, which
            fills no cell; -1 for none.

    Returns:
        the sequence, and the kind of each token, int64: 0 for the sequence's own, 1 for kept ones, 2 for hints.
    """
    kept = (tokens.content < layout.codebook_size) & ~redrawn_tokens(layout, tokens, ~keep)
    own = ~kept
    own[0] = False
    told = np.zeros(0, np.int64) if hints is None else np.flatnonzero(np.asarray(hints).reshape(-1) >= 0)
    code = told if hints is None else np.asarray(hints, np.int64).reshape(-1)[told]
    between = (code, told, np.zeros_like(told))
    parts = [
        np.concatenate([part[:1], part[kept], hint, part[own]]) for part, hint in zip(tokens, between, strict=True)
    ]
    return Tokens(*parts), np.repeat([0, 1, 2, 0], [1, kept.sum(), len(told), own.sum()])


def thinned(
    layout: TokenLayout, redraw: Mask, scores: NDArray[np.float32], codes: NDArray[np.int64], density: Any
) -> Codes:
    """The codes of an image of a model that keeps some cells, shared out between what is kept and the hole.

    Args:
        redraw: bool [side, side]; scores: float [side, side], how important each cell is; codes: int [side, side], -1
            where the tokenizer gives none, nor does this.
        density: codes of what is kept over its share of the cells, at most; the hole gets the others, code 0, where it
            is most important.

    Raises:
        InputError: there are too few cells on one side, or ``density`` is no number of at least 0.
    """
    assert layout.kept is not None, "a layout that keeps cells"
    there = int((codes[~redraw] >= 0).sum())
    number = float(density) if isinstance(density, int | float | np.number) else -1.0
    outside = min(there, round(layout.kept * float((~redraw).mean()) * number)) if 0 <= number <= 1000 else -1
    if outside < 0 or layout.kept - outside > redraw.sum():
        raise InputError(
            f"density is {short(density)}; of {layout.kept} codes what is kept has {there} at most, and the hole has "
            f"room for {redraw.sum()}"
        )
    chosen = np.zeros(redraw.shape, dtype=bool)
    for cells, count in ((~redraw & (codes >= 0), outside), (redraw, layout.kept - outside)):
        ranked = np.argsort(np.where(cells, -scores, np.inf).reshape(-1), kind="stable")
        chosen.reshape(-1)[ranked[:count]] = True
    return Codes(np.where(chosen, np.where(redraw, 0, codes), -1), np.where(chosen, 0, -1).astype(np.int8), layout)


def forced_beginning(codes: Codes, label: int, count: int) -> Forced:
    """The first ``count`` tokens of an image after its start, as ``Request.forced``. Start tokens are left to the
    grammar, since those of a guided pair differ."""
    tokens = codes.tokens(label)
    start = tokens.content[1 : count + 1] >= codes.layout.content_sos
    return tuple(np.where(start, -1, part[1 : count + 1]) for part in (tokens.position, tokens.content))  # type: ignore[return-value]


def scheduled(edit: Edit, given: bool) -> dict[str, Any]:
    """``Edit.constraint`` for a model that draws content before the position, so that it cannot be left to the position
    which code comes next: each gap between two kept codes gets as many codes as it had, and each step is either a kept
    pair, which is forced, or a new one, whose position is drawn among the gap's cells that leave room for the rest.
    Where what is kept is ``given`` first, all that is redrawn is one gap."""
    layout, flat = edit.codes.layout, edit.codes.codes.reshape(-1)
    redraw, coded = spread(layout, edit.redraw), flat >= 0
    forced = np.full((2, layout.filled_cells), -1, dtype=np.int64)
    pinned = np.full((layout.filled_cells, layout.cells), -2 - layout.segments, dtype=np.int32)
    order = np.flatnonzero(coded | redraw)
    order = order[np.argsort(redraw[order], kind="stable")] if given else order
    step, gap = 0, np.zeros(0, dtype=np.int64)
    for cell in [*order.tolist(), None]:  # None flushes the last gap
        if cell is not None and redraw[cell]:
            gap = np.append(gap, cell)
            continue
        places = gap[coded[gap]]  # where codes were, and so how many
        for i in range(len(places)):
            pinned[step, gap[: len(gap) - len(places) + i + 1]] = FREE
            forced[0, step] = places[i] if edit.grain == "keep" else -1
            step += 1
        gap = gap[:0]
        if cell is not None:
            forced[:, step], pinned[step] = (cell, flat[cell]), FREE
            step += 1
    return {"forced": (forced[0], forced[1]), "pinned": pinned}


# --- the choice among candidates -----------------------------------------------------------------------------------
def weights(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of candidates, proportional to the exponentials of ``log_weights`` [M] (-inf: impossible)."""
    top = log_weights.max()
    values = np.exp(log_weights - top) if np.isfinite(top) else np.zeros_like(log_weights)
    if not values.sum():
        raise InputError("no candidate is possible under the model; draw with other params or a larger mask")
    return values / values.sum()


def effective(probabilities: NDArray[np.float64]) -> float:
    """How many equally probable candidates choose as evenly: 1 / sum of squares."""
    return float(1 / np.square(probabilities).sum())


def choose(probabilities: NDArray[np.float64], uniform: float) -> int:
    """The candidate at which the cumulative probability passes a random number of [0, 1)."""
    return int(min(np.searchsorted(probabilities.cumsum(), uniform, side="right"), np.flatnonzero(probabilities)[-1]))


# --- random numbers and pixels -------------------------------------------------------------------------------------
def between(a: NDArray[np.float32], b: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Random numbers on the way from ``a`` to ``b``, each float32 as of ``dvq_rt.sampling.uniforms``: as normal numbers
    they turn from one to the other, which keeps their law, so each point of the way is as random as its ends.

    Args:
        share: 0 gives ``a``, 1 gives ``b``.
    """
    normal, angle = NormalDist(), share * np.pi / 2
    z = [np.vectorize(normal.inv_cdf)(u.astype(np.float64) + 2.0**-25) for u in (a, b)]  # the middle of each step
    mixed = np.vectorize(normal.cdf)(np.cos(angle) * z[0] + np.sin(angle) * z[1])
    return (np.floor(mixed * 2**24).clip(0, 2**24 - 1) * 2.0**-24).astype(np.float32)


def composite(original: NDArray[np.uint8], image: NDArray[np.uint8], redraw: Mask) -> NDArray[np.uint8]:
    """An edited image with the pixels of the original outside the redrawn cells. The way from one to the other takes
    half a cell, on the outer side, so that no pixel of the original is left within.

    Args:
        original, image: uint8 [H, W, 3].
        redraw: bool [rows, columns] of coarsest cells.
    """
    cell, (height, width) = len(original) // len(redraw), original.shape[:2]
    mask = Image.fromarray(np.where(redraw, 255, 0).astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    half = max(1, cell // 4)
    soft = mask.filter(ImageFilter.MaxFilter(2 * half + 1)).filter(ImageFilter.BoxBlur(half))
    share = np.asarray(soft, dtype=np.float32)[..., None] / 255
    return np.rint(original + (image.astype(np.float32) - original) * share).astype(np.uint8)


def stack_weights(records: Sequence[dict[str, NDArray[Any]]]) -> NDArray[np.float64]:
    """log w of candidates from their records of both ``logmass`` reports, float64 [M]."""
    return np.array([sum(values.astype(np.float64).sum() for values in record.values()) for record in records])
