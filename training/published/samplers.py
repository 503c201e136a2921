"""The released samplers, token for token, for parity with published results. Their rules differ from
``training.sampling``'s.

DQ-Transformer (spec/dq.md section 12): the last coarse cell is never drawn (Q2); the content beside an end position is
PAD (Q3); rows that end early are padded, the pads are attended to and counted, so the rows of a batch influence one
another (Q4); in class models that mark the label in the position the coarse start id blocks one fine position (Q6);
drawn fine positions need not cover the image (Q7); and in the fine segment the content stack reads positions shifted
by one over the coarse prefix (Q1), which ``aligned=True`` alone undoes.

Stackformer (spec/mq.md section 6): positions come in any order, only those already drawn are excluded; both heads'
filters cut as above; and one temperature serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from runtimes.errors import InputError
from training.models.transformer import StackedTransformer

Choose = Callable[[Tensor], Tensor]
"""Probabilities float [B, V] -> token ids int64 [B]."""


class Draw(NamedTuple):
    """What one draw saw: ``head`` ("position" or "content"), masked ``logits`` (after the temperature) and filtered
    ``probabilities``, float [B, V]."""

    head: str
    logits: Tensor
    probabilities: Tensor


class PublishedTokens(NamedTuple):
    """Tokens without the start tokens, int64 [B, n] each, positions as local ids. A row's segment ends with (PAD, EOS)
    as (content, position), then pads."""

    coarse_content: Tensor
    coarse_position: Tensor
    fine_content: Tensor
    fine_position: Tensor

    def sequences(self, layout: TokenLayout, labels: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Per image (content ids, joint position ids) as ``training.sampling.sample_tokens`` returns them: start
        tokens included, pads and the last EOS excluded."""
        out = []
        for row, label in enumerate(labels):
            content: list[int] = []
            position: list[int] = []
            for s, (values, places) in enumerate(((self[0][row], self[1][row]), (self[2][row], self[3][row]))):
                start_content, start_position = layout.start(s, label)
                end = places.tolist().index(layout.position_eos(s)) + (s == 0)
                content += [start_content, *values[:end].tolist()]
                position += [p + layout.position_offset(s) for p in [start_position, *places[:end].tolist()]]
            out.append((content, position))
        return out


def most_probable(probabilities: Tensor) -> Tensor:
    """The greedy choice: float [B, V] -> int64 [B]."""
    return probabilities.argmax(-1)


def multinomial(generator: torch.Generator) -> Choose:
    """The stochastic choice, with a generator's random numbers."""
    return lambda probabilities: torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def filter_probabilities(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Top-k, softmax, top-p with the released tie and tail rules (spec section 12 and Q26).

    Unlike ``training.sampling.filter_logits`` the result keeps the ids' order and sums to 1, and ``top_p=1.0`` drops
    the tail behind the token at which the float32 cumulative sum reaches 1.

    Args:
        logits: float [.., V], -inf where forbidden, already divided by the temperature.
        top_k: entries below the ``top_k``-th largest are dropped, ties with it stay; None keeps all.
        top_p: see ``keep_top_p``; None keeps all.

    Returns:
        probabilities float [.., V].

    Raises:
        InputError: ``top_k`` exceeds V.
    """
    if top_k is not None:
        if top_k > logits.shape[-1]:
            raise InputError(f"top_k is {top_k}; the published rules allow at most the vocabulary, {logits.shape[-1]}")
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities if top_p is None else keep_top_p(probabilities, top_p)


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities float [.., V] without the tokens whose predecessors, in descending order, hold at least ``top_p``;
    the rest sums to 1 again."""
    ordered, ids = torch.sort(probabilities, dim=-1, descending=True)
    late = torch.zeros_like(ids, dtype=torch.bool)
    late[..., 1:] = ordered.cumsum(-1)[..., :-1] >= top_p
    kept = probabilities.masked_fill(torch.zeros_like(late).scatter(-1, ids, late), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def only(logits: Tensor, choices: Tensor) -> Tensor:
    """Logits float [B, V] with -inf at every id that ``choices`` bool [B, n], n <= V, does not allow."""
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[:, : choices.shape[1]] = choices
    return logits.masked_fill(~allowed, -torch.inf)


def fixed_positions(layout: TokenLayout, free: Tensor) -> Tensor:
    """The fine positions of the fixed order, one row per image, each ended by EOS and padded.

    Args:
        free: bool [B, cells], fine positions that no coarse token covers.

    Returns:
        local ids int64 [B, most positions + 1].
    """
    order = torch.from_numpy(layout.ordered_positions(1))
    rows = [torch.cat([order[f[order]], torch.tensor([layout.position_eos(1)])]) for f in free]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=layout.position_pad(1))


@torch.no_grad()
def sample_published(
    model: StackedTransformer,
    labels: Sequence[int],
    params: SamplingParams | None = None,
    *,
    choose: Choose = most_probable,
    aligned: bool = False,
    record: list[Draw] | None = None,
) -> PublishedTokens:
    """Draw a batch of token sequences with the released rules, every step recomputed from scratch.

    Args:
        model: dual granularity, in eval mode, on the CPU.
        labels: one per image; zeros for an unconditional model.
        params: sampling parameters, without guidance; the defaults when left out.
        choose: how a token is taken from the filtered probabilities; called once per draw, position before content.
        aligned: align positions in the fine segment as in training (undoes Q1 and nothing else).
        record: list that every draw is appended to.

    Raises:
        InputError: there are no labels, guidance is asked for, ``top_k`` exceeds a vocabulary, or the batch outgrows
            the model's ``block_size``.
    """
    params = SamplingParams() if params is None else params
    layout = model.layout
    if layout.segments != 2:
        raise InputError(f"the published rules know two segments, coarse and fine, not {layout.segments}")
    if params.guidance != 1.0:
        raise InputError(f"guidance is {params.guidance}; the published rules have none, use guidance=1")
    if not labels:
        raise InputError("labels are empty; give one per image, zeros for an unconditional model")

    def draw(head: str, logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
        probabilities = filter_probabilities(logits, top_k, top_p)
        if record is not None:
            record.append(Draw(head, logits, probabilities))
        return choose(probabilities)

    batch = len(labels)
    content = position = segment = torch.zeros(batch, 0, dtype=torch.long)
    covered = torch.from_numpy(layout.covered_cells(0))
    free = torch.ones(batch, layout.cells, dtype=torch.bool)
    lengths: list[int] = []  # tokens at the end of each segment, start included
    for s in range(2):
        pad, eos, offset = layout.position_pad(s), layout.position_eos(s), layout.position_offset(s)
        start = torch.tensor([layout.start(s, label) for label in labels])
        content = torch.cat([content, start[:, :1]], 1)
        position = torch.cat([position, start[:, 1:] + offset], 1)
        segment = torch.cat([segment, torch.full((batch, 1), s)], 1)
        legal = free.clone() if s else torch.ones(batch, pad, dtype=torch.bool)
        if s == 0:
            legal[:, -1] = False  # Q2
        elif layout.classes and layout.label_in_position:
            for row, label in enumerate(labels):  # Q6
                legal[row, layout.start(0, label)[1] :][:1] = False
        fixed = fixed_positions(layout, free) if s and params.positions == "ordered" else None
        ended = torch.zeros(batch, dtype=torch.bool)
        while not ended.all():
            if content.shape[1] > model.config.block_size:
                raise InputError(
                    f"the padded batch of {batch} outgrows the model's block_size of {model.config.block_size} tokens; "
                    "sample fewer images at once"
                )
            hidden = model.hidden(content, position, segment)
            if fixed is not None:
                local = fixed[:, content.shape[1] - 1 - lengths[0]]
            else:
                logits = model.first_logits(hidden[:, -1]) / params.temperature
                choices = torch.cat([legal & ~ended[:, None], ended[:, None], ~ended[:, None]], 1)  # values, PAD, EOS
                local = draw("position", only(logits, choices), params.top_k_position, params.top_p_position)
            ended = ended | (local == eos)
            for row in torch.nonzero(local < pad).flatten().tolist():
                legal[row, local[row]] = False
                if s == 0:
                    free[row, covered[local[row]]] = False
            joint = local[:, None] + offset
            following = torch.cat([position[:, 1:], joint], 1)
            if s and not aligned:  # Q1
                following = torch.cat([position[:, : lengths[0]], position[:, lengths[0] + 1 :], joint], 1)
            logits = model.second_logits(hidden, following)[:, -1] / params.temperature
            choices = torch.cat([~ended[:, None].expand(-1, layout.codebook_size), ended[:, None]], 1)  # Q3: codes, PAD
            values = draw("content", only(logits, choices), params.top_k, params.top_p)
            content = torch.cat([content, values[:, None]], 1)
            position = torch.cat([position, joint], 1)
            segment = torch.cat([segment, torch.full((batch, 1), s)], 1)
        lengths.append(content.shape[1])
    coarse, fine = slice(1, lengths[0]), slice(lengths[0] + 1, None)
    local_fine = position[:, fine] - layout.position_offset(1)
    return PublishedTokens(content[:, coarse], position[:, coarse], content[:, fine], local_fine)


class PublishedKept(NamedTuple):
    """``content`` codes and ``position`` ids without the start token, int64 [B, K] each."""

    content: Tensor
    position: Tensor

    def sequences(self, layout: TokenLayout, labels: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Per image (content ids, joint position ids) as ``training.sampling.sample_tokens`` returns them: start
        token included."""
        starts = [layout.start(0, label) for label in labels]
        return [
            ([start[0], *content.tolist()], [start[1], *position.tolist()])
            for start, content, position in zip(starts, self.content, self.position, strict=True)
        ]


@torch.no_grad()
def sample_published_kept(
    model: StackedTransformer,
    labels: Sequence[int],
    params: SamplingParams | None = None,
    *,
    choose: Choose = most_probable,
    record: list[Draw] | None = None,
) -> PublishedKept:
    """Draw a batch of token sequences with the released rules, every step recomputed from scratch.

    Args:
        model: with a layout that keeps cells, in eval mode, on the CPU.
        labels: one per image; zeros for an unconditional model.
        params: sampling parameters, without guidance and with drawn positions. A ``top_p`` of 1 is the released None.
            When left out: no filters, temperature 1.
        choose: how a token is taken from the filtered probabilities; called once per draw, in the order of the heads.
            ``most_probable`` takes positions by their logits, as the released greedy pass does (spec Q17).
        record: list that every draw is appended to.

    Raises:
        InputError: there are no labels, guidance or ordered positions are asked for, or ``top_k`` exceeds a vocabulary.
    """
    params = SamplingParams(positions="drawn") if params is None else params
    layout = model.layout
    if layout.covering:
        raise InputError("these rules are for layouts that keep cells; use sample_published for one that covers them")
    if params.guidance != 1.0:
        raise InputError(f"guidance is {params.guidance}; the published rules have none, use guidance=1")
    if params.positions != "drawn":
        raise InputError(
            f"positions are {params.positions!r}; the published rules let the position head choose among all free "
            "cells, use positions='drawn'"
        )
    if not labels:
        raise InputError("labels are empty; give one per image, zeros for an unconditional model")

    def draw(head: str, logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
        probabilities = filter_probabilities(logits, top_k, top_p if top_p < 1 else None)
        if record is not None:
            record.append(Draw(head, logits, probabilities))
        return choose(logits if choose is most_probable and head == "position" else probabilities)

    content, position = torch.tensor([layout.start(0, label) for label in labels]).unsqueeze(2).unbind(1)
    for _ in range(layout.filled_cells):
        hidden = model.hidden(content, position, torch.zeros_like(content))
        logits = model.first_logits(hidden[:, -1])
        for head in layout.heads:
            if head != layout.first:
                logits = model.second_logits(hidden, (content if layout.first == "content" else position)[:, 1:])[:, -1]
            logits = logits / params.temperature
            if head == "content":
                logits[:, layout.codebook_size :] = -torch.inf
                drawn = draw(head, logits, params.top_k, params.top_p)
                content = torch.cat([content, drawn[:, None]], 1)
            else:
                logits = logits.scatter(1, position, -torch.inf)
                logits[:, layout.cells :] = -torch.inf
                drawn = draw(head, logits, params.top_k_position, params.top_p_position)
                position = torch.cat([position, drawn[:, None]], 1)
    return PublishedKept(content[:, 1:], position[:, 1:])
