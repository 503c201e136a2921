"""The decode step.

The step does one whole token for B slots. Every slot has its own state, label, sampling parameters and random numbers;
nothing of one slot reaches another but the logits of its named partner (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dvq_rt.layout import HEADS
from export.lowering import Attention, reference_attention
from runtimes.errors import ConfigError
from training.models.transformer import Block, StackedTransformer

STATE = ("content", "position", "length", "done", "cells")
REPORTS = ("position_logits", "content_logits", "position_logprob", "content_logprob")


class Step(nn.Module):
    """One token of every slot.

    State (in and out): ``content`` and joint ``position`` int64 [B] of the last token, ``length`` int32 [B] tokens
    cached, ``done`` bool [B], ``cells`` int32 [B, cells] with -1 where no code stands yet and segment * K + code
    elsewhere; and the caches [B, H, Tmax, D], two per block, those of the first stack first.

    Controls (in): ``reset`` bool [B] starts a slot afresh with ``label`` int64 [B]; ``uniforms`` float32
    [B, Tmax, 2] holds the random numbers of each step and head; sampling parameters per slot (``top_k`` of the
    vocabulary's size or more switches it off); ``ordered`` bool [B] takes the positions of the last segment in
    order; ``partner`` int64 [B] and ``partner_weight`` float32 [B], see ``mix``; ``forced_position`` (joint) and
    ``forced_content`` int64 [B] override the draws of slots that are not done, where they are not negative.

    Reports (out): logits of both heads before the grammar's mask and after mixing, and the log-probability of what
    was taken under the mask at temperature 1, [B] each.
    """

    place: Tensor  # [segments, cells], the position of each segment that covers a cell
    offset: Tensor  # [segments], joint id of each segment's local id 0
    eos: Tensor  # [segments], local end id, -1 for none
    sos: Tensor  # [segments], first local start id
    ranks: Tensor  # [cells], place of each position of the last segment in its order
    position_ids: Tensor
    content_ids: Tensor

    def __init__(self, model: StackedTransformer, attention: Attention = reference_attention) -> None:
        super().__init__()
        self.model, self.layout, self.attention = model, model.layout, attention
        layout = model.layout
        place = np.zeros((layout.segments, layout.cells), dtype=np.int64)
        for s in range(layout.segments):
            for position, covered in enumerate(layout.covered_cells(s)):
                place[s, covered] = position
        segments = range(layout.segments)
        tables = {
            "place": torch.from_numpy(place),
            "offset": torch.tensor([layout.position_offset(s) for s in segments]),
            "eos": torch.tensor([layout.position_eos(s) for s in segments]),
            "sos": torch.tensor([layout.position_sos(s) for s in segments]),
            "ranks": torch.from_numpy(layout.ordered_positions(layout.segments - 1)).argsort(),
            "position_ids": torch.arange(layout.position_head),
            "content_ids": torch.arange(layout.content_vocabulary),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        length: Tensor,
        done: Tensor,
        cells: Tensor,
        reset: Tensor,
        label: Tensor,
        uniforms: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        top_k_position: Tensor,
        top_p_position: Tensor,
        ordered: Tensor,
        partner: Tensor,
        partner_weight: Tensor,
        forced_position: Tensor,
        forced_content: Tensor,
        caches: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        layout, model = self.layout, self.model
        start_content = layout.content_sos + label
        start_local = label if layout.label_in_position else torch.zeros_like(label)
        content = torch.where(reset, start_content, content)
        position = torch.where(reset, self.sos[0] + start_local, position)
        length = torch.where(reset, torch.zeros_like(length), length)
        done = done & ~reset
        cells = torch.where(reset[:, None], torch.full_like(cells, -1), cells)

        # where this token's draw belongs
        here = (position[:, None] >= self.offset[1:]).sum(1)  # segment of the last token
        starting = position == (self.offset + self.eos)[here]  # it closed a segment: the next one's start follows
        segment = here + starting.long()
        eos, offset, start = self.eos[segment], self.offset[segment], self.sos[segment] + start_local
        random = uniforms.gather(1, length.long()[:, None, None].expand(-1, 1, 2)).squeeze(1)
        filters = {"position": (top_k_position, top_p_position), "content": (top_k, top_p)}
        forced = {"position": forced_position, "content": forced_content}

        x = model.embed(content, position, here, length.long())[:, None]
        unused, new_caches = list(caches), []
        logits: dict[str, Tensor] = {}
        taken: dict[str, Tensor] = {}
        logprob: dict[str, Tensor] = {}
        for head in layout.heads:
            blocks, project, embedding = model.parts(head)
            for block in blocks:
                assert isinstance(block, Block)
                x, *new = self.block(block, x, unused.pop(0), unused.pop(0), length)
                new_caches += new
            logits[head] = mix(project(x)[:, 0], partner, partner_weight)
            if head == "position":
                allowed = self.allowed_positions(cells, segment, starting, eos, start, ordered, position)
            else:
                allowed = self.allowed_contents(starting, start_content, taken.get("position", start), offset + eos)
            taken[head], logprob[head] = draw(
                logits[head],
                allowed,
                random[:, HEADS.index(head)],
                temperature,
                *filters[head],
                forced[head] - offset if head == "position" else forced[head],
                (forced[head] >= 0) & ~done,
            )
            if head == "position":
                taken[head] = taken[head] + offset
            x = x + embedding(taken[head])[:, None]  # what the second stack reads

        # advance; a slot that was done stays as it is
        local = taken["position"] - offset
        covered = (self.place[segment] == local[:, None]) & (~starting & (local != eos) & ~done)[:, None]
        new_cells = torch.where(covered, (taken["content"] + segment * layout.codebook_size).int()[:, None], cells)
        new_done = done | ((new_cells >= 0).sum(1) >= layout.filled_cells)
        return (
            torch.where(done, content, taken["content"]),
            torch.where(done, position, taken["position"]),
            length + (~new_done).int(),  # stays below Tmax
            new_done,
            new_cells,
            *(part[head] for part in (logits, logprob) for head in HEADS),
            *new_caches,
        )

    def block(self, block: Block, x: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        """A transformer block over a cache: [B, 1, C] and the two new caches."""
        attn = block.attn
        scales = getattr(attn.qkv, "cache_scales", None)  # a quantized model's
        y, keys, values = self.attention(attn.qkv(block.ln1(x)), keys, values, length, attn.heads, scales)
        x = x + attn.proj(y)
        return x + block.mlp(block.ln2(x)), keys, values

    def allowed_contents(self, starting: Tensor, start: Tensor, position: Tensor, end: Tensor) -> Tensor:
        """The grammar: which contents each slot may take next, bool [B, content vocabulary].

        Args:
            starting: bool [B], the start token of a segment follows; start: its id.
            position: joint id drawn already, if there is a choice of EOS; end: that of the segment's end.
        """
        codes = (self.content_ids < self.layout.codebook_size)[None]
        if not self.layout.covering:
            return codes
        special = torch.where(starting, start, torch.full_like(start, self.layout.content_eos))
        return choose((~starting & (position != end))[:, None], codes, self.content_ids == special[:, None])

    def allowed_positions(
        self,
        cells: Tensor,
        segment: Tensor,
        starting: Tensor,
        eos: Tensor,
        start: Tensor,
        ordered: Tensor,
        last: Tensor,
    ) -> Tensor:
        """The grammar: which local positions each slot may take next, bool [B, position head]."""
        layout = self.layout
        b, width = cells.shape[0], layout.position_head
        empty = cells < 0
        result = torch.zeros(1, 1, dtype=torch.bool)
        for s, side in enumerate(layout.sides):
            block = layout.sides[-1] // side
            free = empty.view(b, side, block, side, block).all(4).all(2).view(b, side * side)
            ends = torch.ones_like(free[:, :1])
            if s == layout.segments - 1:
                ends = ~free.any(1, keepdim=True)
                free = free & (~ordered[:, None] | self.next_in_order(free, last))
            if not layout.covering:  # without an end, a slot that is done draws on, unheeded
                free = free | ~free.any(1, keepdim=True)
            pad = torch.zeros_like(free[:, :1])
            special = [pad, ends] if layout.covering else []
            mask = torch.cat([free, *special, pad.expand(b, width - side * side - len(special))], 1)
            result = mask if s == 0 else choose((segment == s)[:, None], mask, result)
        return choose(starting[:, None], self.position_ids == start[:, None], result)

    def next_in_order(self, free: Tensor, last: Tensor) -> Tensor:
        """Of the last segment's ``free`` positions bool [B, cells] those that keep the order and leave room for the
        codes to come, bool [B, cells]; ``last`` is the joint id of the last token."""
        layout = self.layout
        if layout.covering:  # all free ones are to come
            rank = torch.where(free, self.ranks, torch.full_like(self.ranks, layout.cells))
            return rank == rank.amin(1, keepdim=True)
        before = torch.where(last < layout.cells, self.ranks[last.clamp_max(layout.cells - 1)], -1)
        to_come = free.sum(1) - (layout.cells - layout.filled_cells)
        return (self.ranks > before[:, None]) & (self.ranks <= (layout.cells - to_come)[:, None])


def choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``torch.where`` of bool tensors, for which ONNX Runtime has no kernel."""
    return (condition & yes) | (~condition & no)


def mix(logits: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Classifier-free guidance over pairs of slots, float [B, V].

    Of a slot and its partner the lower one is conditional, the higher one unconditional; both get
    ``unconditional + weight * (conditional - unconditional)``, by the same arithmetic and so with the same bits. A
    slot that is its own partner keeps its logits.
    """
    own = torch.arange(logits.shape[0])
    low, high = logits[torch.minimum(own, partner)], logits[torch.maximum(own, partner)]
    return high + weight[:, None] * (low - high)


def draw(
    logits: Tensor,
    allowed: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    forced: Tensor,
    use_forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token per slot: grammar mask, temperature, top-k, softmax, top-p, inverse CDF in descending order.

    Args:
        logits: float [B, V]; allowed: bool, broadcastable to it; the other tensors [B].

    Returns:
        token ids int64 [B], the forced one where asked, and their log-probability under the mask alone [B].
    """
    masked = logits.masked_fill(~allowed, -torch.inf)
    ordered, ids = torch.topk(masked / temperature[:, None], logits.shape[-1])
    kth = ordered.gather(1, top_k[:, None].clamp(1, logits.shape[-1]) - 1)
    probabilities = torch.softmax(ordered.masked_fill(ordered < kth, -torch.inf), dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * ((before < top_p[:, None]) | (top_p[:, None] >= 1))
    cumulative = probabilities.cumsum(-1)
    rank = (cumulative <= uniform[:, None] * cumulative[:, -1:]).long().sum(-1, keepdim=True)
    last = (probabilities > 0).long().sum(-1, keepdim=True) - 1
    token = torch.where(use_forced, forced, ids.gather(1, torch.minimum(rank, last)).squeeze(1))
    return token, torch.log_softmax(masked, dim=-1).gather(1, token[:, None]).squeeze(1)


def example_inputs(model: StackedTransformer, slots: int) -> dict[str, Tensor | list[Tensor]]:
    """Inputs of ``Step.forward`` for an idle engine: every slot done, caches zero."""
    b, layout, config = slots, model.layout, model.config
    tmax = cache_length(model)
    whole = torch.zeros(b, dtype=torch.long)
    cache = (b, config.heads, tmax, config.width // config.heads)
    return {
        "content": whole.clone(),
        "position": whole.clone(),
        "length": torch.zeros(b, dtype=torch.int32),
        "done": torch.ones(b, dtype=torch.bool),
        "cells": torch.full((b, layout.cells), -1, dtype=torch.int32),
        "reset": torch.zeros(b, dtype=torch.bool),
        "label": whole.clone(),
        "uniforms": torch.zeros(b, tmax, 2),
        "temperature": torch.ones(b),
        "top_k": torch.full((b,), layout.content_vocabulary),
        "top_p": torch.ones(b),
        "top_k_position": torch.full((b,), layout.position_head),
        "top_p_position": torch.ones(b),
        "ordered": torch.ones(b, dtype=torch.bool),
        "partner": torch.arange(b),
        "partner_weight": torch.ones(b),
        "forced_position": torch.full((b,), -1),
        "forced_content": torch.full((b,), -1),
        "caches": [torch.zeros(cache) for _ in range(2 * (config.position_blocks + config.content_blocks))],
    }


def cache_length(model: StackedTransformer) -> int:
    """Tmax: the longest sequence the grammar allows.

    Raises:
        ConfigError: the model's position table is shorter.
    """
    if model.config.block_size < model.layout.max_length:
        raise ConfigError(
            f"transformer.block_size is {model.config.block_size}; this layout needs up to {model.layout.max_length}"
        )
    return model.layout.max_length
