"""The functions that get traced: encoder, decoder and the decode step, as wrappers around the models.

The step does one whole token for B slots. Every slot has its own state, label, sampling parameters and random numbers;
nothing of one slot reaches another but the logits of its named partner (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from export.lowering import Attention, reference_attention
from runtimes.errors import ConfigError
from training.models.dqvae import DQVAE
from training.models.transformer import Block, StackedTransformer

STATE = ("content", "position", "length", "done", "cells")
REPORTS = ("position_logits", "content_logits", "position_logprob", "content_logprob")


class Step(nn.Module):
    """One token of every slot.

    State (in and out): ``content`` and joint ``position`` int64 [B] of the last token, ``length`` int32 [B] tokens
    cached, ``done`` bool [B], ``cells`` int32 [B, cells] with -1 where no code stands yet and segment * K + code
    elsewhere; and the caches [B, H, Tmax, D], two per block.

    Controls (in): ``reset`` bool [B] starts a slot afresh with ``label`` int64 [B]; ``uniforms`` float32
    [B, Tmax, 2] holds the random numbers of each step and head; sampling parameters per slot (``top_k`` of the
    vocabulary's size or more switches it off); ``fixed`` bool [B] takes the positions of the last segment in
    order; ``partner`` int64 [B] and ``partner_weight`` float32 [B], see ``mix``; ``forced_position`` (joint) and
    ``forced_content`` int64 [B] override the draws of slots that are not done, where they are not negative.

    Reports (out): logits of both heads before the grammar's mask and after mixing, and the log-probability of what
    was taken under the mask at temperature 1, [B] each.
    """

    place: Tensor  # [segments, cells], the position of each segment that covers a cell
    offset: Tensor  # [segments], joint id of each segment's local id 0
    eos: Tensor  # [segments], local end id
    ranks: Tensor  # [segments, cells], place of each position in the order
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
        self.register_buffer("place", torch.from_numpy(place), persistent=False)
        offsets = torch.tensor([layout.position_offset(s) for s in range(layout.segments)])
        self.register_buffer("offset", offsets, persistent=False)
        ends = torch.tensor([layout.position_eos(s) for s in range(layout.segments)])
        self.register_buffer("eos", ends, persistent=False)
        self.register_buffer("position_ids", torch.arange(layout.position_head), persistent=False)
        self.register_buffer("content_ids", torch.arange(layout.content_vocabulary), persistent=False)
        ranks = torch.zeros(layout.segments, layout.cells, dtype=torch.long)
        for s in range(layout.segments):
            order = torch.from_numpy(layout.ordered_positions(s))
            ranks[s, order] = torch.arange(len(order))
        self.register_buffer("ranks", ranks, persistent=False)

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
        fixed: Tensor,
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
        position = torch.where(reset, layout.position_sos(0) + start_local, position)
        length = torch.where(reset, torch.zeros_like(length), length)
        done = done & ~reset
        cells = torch.where(reset[:, None], torch.full_like(cells, -1), cells)

        # where this token's draw belongs
        here = (position[:, None] >= self.offset[1:]).sum(1)  # segment of the last token
        starting = position == (self.offset + self.eos)[here]  # it closed a segment: the next one's start follows
        segment = here + starting.long()
        eos = self.eos[segment]
        random = uniforms.gather(1, length.long()[:, None, None].expand(-1, 1, 2)).squeeze(1)

        # first stack: the position
        new_caches: list[Tensor] = []
        h = model.embed(content, position, here, length.long())[:, None]
        for i, block in enumerate(model.position_blocks):
            assert isinstance(block, Block)
            h = self.block(block, h, caches[2 * i], caches[2 * i + 1], length, new_caches)
        position_logits = mix(model.position_head(h)[:, 0], partner, partner_weight)
        start = eos + 1 + start_local
        allowed = self.allowed_positions(cells, segment, starting, eos, start, fixed)
        local, position_logprob = draw(
            position_logits,
            allowed,
            random[:, 0],
            temperature,
            top_k_position,
            top_p_position,
            forced_position - self.offset[segment],
            (forced_position >= 0) & ~done,
        )
        joint = local + self.offset[segment]

        # second stack: the content
        g = h + model.position_emb(joint)[:, None]
        first = 2 * len(model.position_blocks)
        for i, block in enumerate(model.content_blocks):
            assert isinstance(block, Block)
            g = self.block(block, g, caches[first + 2 * i], caches[first + 2 * i + 1], length, new_caches)
        content_logits = mix(model.content_head(g)[:, 0], partner, partner_weight)
        special = torch.where(starting, start_content, torch.full_like(label, layout.content_eos))
        codes = (self.content_ids < layout.codebook_size)[None]
        plain = (~starting & (local != eos))[:, None]
        allowed = choose(plain, codes, self.content_ids == special[:, None])
        value, content_logprob = draw(
            content_logits,
            allowed,
            random[:, 1],
            temperature,
            top_k,
            top_p,
            forced_content,
            (forced_content >= 0) & ~done,
        )

        # advance; a slot that was done stays as it is
        covered = (self.place[segment] == local[:, None]) & plain & ~done[:, None]
        coded = (value + segment * layout.codebook_size).int()[:, None]
        new_cells = torch.where(covered, coded, cells)
        new_done = done | (new_cells >= 0).all(1)
        return (
            torch.where(done, content, value),
            torch.where(done, position, joint),
            length + (~done).int(),
            new_done,
            new_cells,
            position_logits,
            content_logits,
            position_logprob,
            content_logprob,
            *new_caches,
        )

    def block(self, block: Block, x: Tensor, keys: Tensor, values: Tensor, length: Tensor, out: list[Tensor]) -> Tensor:
        """A transformer block over a cache, [B, 1, C]; appends its two new caches to ``out``."""
        attn = block.attn
        y, keys, values = self.attention(attn.qkv(block.ln1(x)), keys, values, length, attn.heads)
        out += [keys, values]
        x = x + attn.proj(y)
        return x + block.mlp(block.ln2(x))

    def allowed_positions(
        self, cells: Tensor, segment: Tensor, starting: Tensor, eos: Tensor, start: Tensor, fixed: Tensor
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
                rank = self.ranks[s, : side * side]
                lowest = torch.where(free, rank, torch.full_like(rank, side * side)).amin(1, keepdim=True)
                free = free & (~fixed[:, None] | (rank == lowest))
            pad = torch.zeros_like(free[:, :1])
            rest = pad.expand(b, width - side * side - 2)
            mask = torch.cat([free, pad, ends, rest], 1)
            result = mask if s == 0 else choose((segment == s)[:, None], mask, result)
        return choose(starting[:, None], self.position_ids == start[:, None], result)


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


class EncoderGraph(nn.Module):
    """images float32 [B, 3, S, S] in [-1, 1] -> codes int64 [B, hf, wf], grain int64 [B, hc, wc]."""

    def __init__(self, vae: DQVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.vae.encode(images)
        return encoding.codes, encoding.grain


class DecoderGraph(nn.Module):
    """codes int64 [B, hf, wf] -> images float32 [B, 3, S, S], about [-1, 1], not clamped."""

    def __init__(self, vae: DQVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, codes: Tensor) -> Tensor:
        return self.vae.decode_codes(codes)


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
        "fixed": torch.ones(b, dtype=torch.bool),
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
