"""The uncached sampler: the oracle of the parity tests, the baseline of the benchmark, the pictures during training.

Rules are ``corrected``, the engine's: every region can be coarse, the content beside a position's EOS is EOS, training
and sampling align positions alike, and every cell is covered exactly once. ``training.published.samplers`` has the
released code's rules; ``sample`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.layout import HEADS, TokenLayout
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import InputError
from training.data.tokens import collate_prompts
from training.models.text import align_right
from training.models.transformer import StackedTransformer
from training.published.samplers import multinomial, sample_published, sample_published_kept


def filter_logits(logits: Tensor, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Top-k, softmax, top-p (spec/dq.md section 12), in descending order of probability.

    Ties with the k-th largest survive top-k; top-p keeps the shortest prefix whose mass reaches ``top_p`` (1.0: all).

    Args:
        logits: float [.., V], -inf where forbidden, already divided by the temperature.

    Returns:
        unnormalised probabilities float [.., V], descending, zero where dropped; their token ids int64 [.., V]
        (the lower id first on ties).
    """
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    if top_k is not None:
        kth = ordered[..., min(top_k, logits.shape[-1]) - 1, None]
        ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)
    return probabilities, ids


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One token per row by inverse CDF over ``filter_logits``: float [B, V], uniform [B] in [0, 1) -> int64 [B]."""
    probabilities, ids = filter_logits(logits / temperature, top_k, top_p)
    cumulative = probabilities.cumsum(-1)
    rank = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return ids.gather(-1, torch.minimum(rank, last)).squeeze(-1)


class Grammar:
    """Which positions one image may take next, under the corrected rules. Plain Python, one image at a time.

    ``pinned``, int [cells], says how cells must end (``dvq_rt.editing.pins``), or [steps, cells] for each token.
    """

    def __init__(self, layout: TokenLayout, ordered: bool, pinned: NDArray[Any] | None = None) -> None:
        self.layout, self.ordered, self.pinned, self.step = layout, ordered, pinned, 0
        self.segment, self.done, self.starting = 0, False, False
        self.free = np.ones(layout.cells, dtype=bool)
        self.last = -1  # rank of the segment's last position in its order
        self.filled = np.zeros(layout.sides[0] ** 2, dtype=np.int64)  # positions of each coarsest cell it has taken

    def pins(self) -> list[int]:
        """How the cells must end that the current segment's positions cover, by position."""
        assert self.pinned is not None
        now = self.pinned if self.pinned.ndim == 1 else self.pinned[min(self.step, len(self.pinned) - 1)]
        return now[self.layout.covered_cells(self.segment)[:, 0]].tolist()

    def pinned_content(self, position: int) -> int | None:
        """The one code that a position of the current segment may have, if it is pinned to one."""
        if self.pinned is None or self.layout.first == "content" or self.starting:
            return None
        pins = self.pins()
        pin = pins[position] if position < len(pins) else -1
        return pin % self.layout.codebook_size if pin >= 0 else None

    def allowed(self) -> list[int]:
        """Local position ids of the next token; one of them is forced."""
        wide = self.grammatical()
        if self.pinned is None or self.starting or self.done:
            return wide
        layout, s, pins = self.layout, self.segment, self.pins()
        rank = {int(position): i for i, position in enumerate(layout.ordered_positions(s))}
        owner = [pin // layout.codebook_size if pin >= 0 else -2 - pin for pin in pins]  # -1: nobody
        mine = [q for q in wide if q in rank and owner[q] == s]
        due = min((rank[q] for q in mine), default=len(rank))
        fits = [q for q in wide if q in rank and owner[q] in (s, -1) and rank[q] <= due]
        if s == 0 and layout.segments > 1 and self.ordered and any(pin != -1 for pin in pins):
            fits = [q for q in fits if rank[q] > self.last]
        if layout.first == "position" and not layout.covering:
            usable = [q for q in rank if self.free[q] and owner[q] in (s, -1)]
            pinned = [q for q in usable if owner[q] == s]
            to_come = int(self.free.sum()) - (layout.cells - layout.filled_cells)
            fits = [q for q in fits if q in mine or to_come > len(pinned)]
            if self.ordered:
                fits = [q for q in fits if sum(rank[other] > rank[q] for other in usable) >= to_come - 1]
        return [*fits, *([layout.position_eos(s)] if layout.position_eos(s) in wide and not mine else [])]

    def grammatical(self) -> list[int]:
        """``allowed`` without pins."""
        layout, s = self.layout, self.segment
        if self.starting:
            return []
        order = layout.ordered_positions(s)
        fits = order[self.free[layout.covered_cells(s)[order]].all(1)]
        if s == 0 and layout.segments > 1:
            return [*fits.tolist(), layout.position_eos(s)]
        if s < layout.segments - 1:
            return self.whole_cells(order, fits)
        if not fits.size:
            return [layout.position_eos(s)]
        if not self.ordered:
            return fits.tolist()
        later = fits if layout.covering else order[[p in fits and i > self.last for i, p in enumerate(order)]]
        to_come = int(self.free.sum()) - (layout.cells - layout.filled_cells)  # of the last segment's positions
        return later[: len(later) - to_come + 1].tolist()  # leaving room for those after it

    def whole_cells(self, order: NDArray[np.int64], fits: NDArray[np.int64]) -> list[int]:
        """``grammatical`` of a segment between the first and the last: it must not leave a coarsest cell half coded."""
        layout, s = self.layout, self.segment
        cell = self.cell_of(order)  # of the places in order
        opened = (self.filled > 0) & (self.filled < layout.codes_per_cell[s])
        ends = [] if opened.any() else [layout.position_eos(s)]
        if not self.ordered:
            return [*fits.tolist(), *ends]
        ranks = [rank for rank, position in enumerate(order) if position in fits]
        gaps = [rank for rank in ranks if opened[cell[rank]]][:1]  # what comes next at the latest
        before = [rank for rank in ranks if self.last < rank < (gaps or [len(order)])[0]]
        openings = [rank for rank in before if cell[rank] not in cell[:rank]]
        return [*order[openings + gaps].tolist(), *ends]

    def cell_of(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The coarsest cells, row-major, that positions of the current segment lie in."""
        side, coarsest = self.layout.sides[self.segment], self.layout.sides[0]
        row, column = np.divmod(position, side)
        return row * coarsest // side * coarsest + column * coarsest // side

    def give(self, positions: NDArray[Any], kinds: NDArray[Any]) -> None:
        """Note joint positions that are given beforehand; hints (kind 2) fill nothing."""
        for position, kind in zip(positions, kinds, strict=False):
            self.step += 1
            if kind == 1:
                s = int(self.layout.segment_of(np.array(position)))
                self.free[self.layout.covered_cells(s)[position - self.layout.position_offset(s)]] = False

    def advance(self, position: int) -> None:
        """Note that ``position`` (a local id of the current segment) was taken, or that the segment's start was."""
        layout, s = self.layout, self.segment
        self.step += 1
        if self.starting:
            self.starting = False
        elif position == layout.position_eos(s):
            if s == layout.segments - 1:
                self.done = True
            else:
                self.segment += 1
                self.starting = True
                self.last = -1
                self.filled[:] = 0
        else:
            self.free[layout.covered_cells(s)[position]] = False
            self.filled[self.cell_of(np.array(position))] += 1
            self.last = int(np.flatnonzero(layout.ordered_positions(s) == position)[0])
            self.done = not layout.covering and (~self.free).sum() == layout.filled_cells


def check_guidance(model: StackedTransformer, params: SamplingParams) -> None:
    """
    Raises:
        InputError: guidance is asked of a model that has nothing to compare with.
    """
    empty = model.text is not None and model.text.config.empty
    if params.guidance != 1 and not model.layout.null_label and not empty:
        raise InputError("guidance needs a model trained with a null label or the empty prompt; use guidance=1")


@torch.no_grad()
def embed_prompts(model: StackedTransformer, prompts: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """Rows float32 [l, C] of prompts: token ids int64 [l], or a frozen encoder's features float32 [l, d]."""
    assert model.text is not None, "a model with text"
    columns = [collate_prompts([prompt]).values() for prompt in prompts]
    return [model.text(ids, length)[0, : int(length)].numpy() for ids, length in columns]


@torch.no_grad()
def sample_tokens(
    model: StackedTransformer,
    labels: Sequence[int],
    params: SamplingParams,
    *,
    seed: int = 0,
    first_image: int = 0,
    limit: int | None = None,
    pinned: NDArray[Any] | None = None,
    forced: tuple[NDArray[Any], NDArray[Any]] | None = None,
    given: NDArray[Any] | None = None,
    prompts: Sequence[NDArray[np.float32]] = (),
    negatives: Sequence[NDArray[np.float32]] = (),
) -> list[tuple[list[int], list[int]]]:
    """Draw token sequences with the whole sequence recomputed at every step.

    Args:
        model: in eval mode.
        labels: start labels, one per image.
        params: sampling parameters.
        seed: of the random numbers; image i uses those of index ``first_image + i``, as the engine does.
        limit: stop after so many tokens.
        pinned, forced, given: of all images, as ``dvq_rt.decoding.Request`` has them.
        prompts, negatives: rows [l, C] of each image's prompt (``embed_prompts``) and of its partner's; none at all are
            the empty ones.

    Returns:
        per image (content ids, joint position ids), start tokens included, the last EOS excluded.

    Raises:
        InputError: guidance is asked of a model without a null label or empty prompt.
    """
    layout = model.layout
    guided = params.guidance != 1.0
    check_guidance(model, params)
    count = len(labels)
    starts = [*labels, *map(layout.partner_label, labels)] if guided else list(labels)
    prefix = None
    if prompts or negatives:
        none = [np.zeros((0, model.config.width), np.float32)] * count
        rows = [*(prompts or none), *((negatives or none) if guided else [])]
        prompt, prompt_length = collate_prompts(rows).values()
        prefix = align_right(prompt, prompt_length)
    random = torch.from_numpy(np.stack([uniforms(seed, first_image + i, layout.max_length) for i in range(count)]))
    grammars = [Grammar(layout, params.positions == "ordered", pinned) for _ in range(count)]
    start = torch.tensor([layout.start(0, label) for label in starts])
    content, position = start[:, :1], start[:, 1:] + layout.position_offset(0)
    segment = torch.zeros_like(content)
    kind = torch.zeros_like(content)
    before = 0 if given is None else int((given > 0).sum())
    if given is not None and forced is not None and before:
        first = [torch.from_numpy(np.asarray(part[:before], dtype=np.int64)) for part in (forced[1], forced[0], given)]
        content, position, kind = (
            torch.cat([a, b.expand(len(starts), -1)], 1) for a, b in zip((content, position, kind), first, strict=True)
        )
        segment = torch.from_numpy(layout.segment_of(position.numpy()))
        for g in grammars:
            g.give(forced[0][:before], given)
    lengths = [0] * count

    def mixed(logits: Tensor) -> Tensor:
        if not guided:
            return logits
        return logits[count:] + params.guidance * (logits[:count] - logits[count:])

    offsets = torch.tensor([layout.position_offset(s) for s in range(layout.segments)])
    for t in range(before, min(layout.max_length, limit or layout.max_length)):
        live = [i for i, g in enumerate(grammars) if not g.done]
        if not live:
            break
        hidden = model.hidden(content, position, segment, prefix, kind)
        logits = model.first_logits(hidden[:, -1])
        following = torch.tensor([grammars[row % count].segment for row in range(len(starts))])
        places, values = torch.zeros(2, len(starts), dtype=torch.long)  # of the next token; positions are local ids
        for head in layout.heads:
            if head != layout.first:
                tokens, drawn = (position, places + offsets[following]) if head == "content" else (content, values)
                logits = model.second_logits(hidden, torch.cat([tokens[:, 1:], drawn[:, None]], 1), prefix)[:, -1]
            logits = mixed(logits)
            if head == "position":
                banned = torch.ones_like(logits, dtype=torch.bool)
                for i, g in enumerate(grammars):
                    banned[i, g.allowed() or [0]] = False
                logits = logits.masked_fill(banned, -torch.inf)
                ids = draw(logits, random[:, t, 0], params.temperature, params.top_k_position, params.top_p_position)
            else:
                logits[:, layout.codebook_size :] = -torch.inf
                for i, g in enumerate(grammars):
                    if (code := g.pinned_content(int(places[i]))) is not None and head != layout.first:
                        others = torch.arange(logits.shape[1]) != code
                        logits[i, others] = -torch.inf
                ids = draw(logits, random[:, t, 1], params.temperature, params.top_k, params.top_p)
            for row, label in enumerate(starts):
                g, value = grammars[row % count], int(ids[row % count])
                wanted = -1 if forced is None or t >= len(forced[0]) else int(forced[HEADS.index(head)][t])
                if wanted >= 0:
                    value = wanted - (layout.position_offset(g.segment) if head == "position" else 0)
                start_content, start_position = layout.start(g.segment, label)
                if head == "position":
                    places[row] = start_position if g.starting else value
                elif g.starting:
                    values[row] = start_content
                else:
                    ended = layout.covering and places[row] == layout.position_eos(g.segment)
                    values[row] = layout.content_eos if ended else value
        content = torch.cat([content, values[:, None]], 1)
        position = torch.cat([position, (places + offsets[following])[:, None]], 1)
        segment = torch.cat([segment, following[:, None]], 1)
        kind = torch.cat([kind, torch.zeros_like(following)[:, None]], 1)
        for i in live:
            grammars[i].advance(int(places[i]))
            if not grammars[i].done or not layout.covering:  # the last EOS of a covering layout is left out
                lengths[i] = t + 1
    return [(content[i, : lengths[i] + 1].tolist(), position[i, : lengths[i] + 1].tolist()) for i in range(count)]


def sample(
    model: StackedTransformer,
    labels: Sequence[int],
    params: SamplingParams,
    *,
    seed: int = 0,
    rules: str = "corrected",
) -> list[tuple[list[int], list[int]]]:
    """Draw token sequences by either set of rules.

    Args:
        rules: ``corrected`` (``sample_tokens``) or ``published`` (``sample_published``, whose images depend on their
            neighbours in the batch; ``sample_published_kept`` for layouts that keep cells).

    Returns:
        see ``sample_tokens``.

    Raises:
        InputError: the rules are unknown, or do not allow ``params``.
    """
    if rules == "corrected":
        return sample_tokens(model, labels, params, seed=seed)
    if rules == "published":
        choose = multinomial(torch.Generator().manual_seed(seed))
        published = sample_published if model.layout.covering else sample_published_kept
        return published(model, labels, params, choose=choose).sequences(model.layout, labels)
    raise InputError(f"rules are {rules!r}; they must be 'corrected' or 'published'")
