"""The decode step in PyTorch: one token of every slot, with key/value caches. What is exported, and what PyTorch itself
draws with (``training.torch_program``).

Every slot has its own state, label, sampling parameters and random numbers; nothing of one slot reaches another but the
logits of its named partner (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dvq_rt.layout import HEADS
from dvq_rt.step import CACHE, StepTable
from runtimes.errors import ConfigError
from training.models.transformer import Block, StackedTransformer

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""Cached attention, which each backend computes its own way. It appends one token to a cache and attends over what the
cache then holds:

    qkv float [B, 1, 3 C] (query, key and value side by side), keys and values float [B, H, Tmax, D],
    length int32 [B] (tokens already cached, less than Tmax), heads H, scales None
    -> output float [B, 1, C], and both caches with the new token in row ``length``

Rows beyond ``length`` never count. Caches start at zero. With ``scales`` float32 [2, H, 1, D], of keys and of values,
an exported cache may hold int8, value / scale to the nearest; in PyTorch it holds floats all the same."""
NARROW = {torch.bfloat16: "uint16"}
"""Names that number formats which numpy lacks go by in a step table."""


def reference_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form of ``Attention``, of standard operators only.

    The scatters are in place when an engine binds one buffer on both sides.
    """
    b, _, width = qkv.shape
    q, k, v = qkv.view(b, 3, heads, 1, width // 3 // heads).unbind(1)  # [B, H, 1, D]
    at = length.long()[:, None, None, None]
    keys, values = keys.scatter(2, at.expand_as(k), k), values.scatter(2, at.expand_as(v), v)
    scores = (q @ keys.transpose(2, 3)) * q.shape[-1] ** -0.5  # [B, H, 1, Tmax]
    seen = torch.arange(keys.shape[2], device=qkv.device) <= at
    weight = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return (weight @ values).view(b, 1, width // 3), keys, values


class Step(nn.Module):
    """One token of every slot. Names, shapes and number formats of its tensors are in ``dvq_rt.step``.

    State (in and out): ``content`` and joint ``position`` of the last token, ``length`` tokens cached, ``done``,
    ``cells`` with -1 where no code stands yet and segment * K + code elsewhere; and the caches, two per block, those of
    the first stack first.

    Controls (in): ``reset`` starts a slot afresh with ``label``; ``uniforms`` holds the random numbers of each step and
    head; sampling parameters per slot (``top_k`` of the vocabulary's size or more switches it off); ``ordered`` takes
    the positions of the last segment in order, and those of the segments between it and the first (``whole_cells``);
    ``partner`` and ``partner_weight``, see ``apply_guidance``; ``forced_position`` (joint) and ``forced_content``
    override the draws of slots that are not done, where they are not negative. ``pinned`` says how cells must end:
    segment * K + code; -2 - segment for any code of that segment, where the number of segments means none; -1 leaves
    the cell free. Cells of one coarsest cell are pinned to one segment or all free, and pins that keep cells fit their
    number (``dvq_rt.editing``).

    Of a model with text, a slot whose ``length`` is below ``prefix_length`` reads row ``length`` of ``prefix`` and
    draws nothing; then its image begins.

    Models that were trained with what is kept first have three more: ``given`` says that the token which is forced
    is one of what is kept (1) or a hint (2), which fills no cell; ``kind`` is that of the last token; ``phase`` counts
    the segments that the image's own sequence has closed.

    Reports (out): logits of both heads before the grammar's mask and after mixing; the log-probability of each token
    under the grammar at temperature 1; and the logarithm of the share of the grammar's probability that was left to
    draw from: of what the pins leave (0 where they leave all), and of a forced token its own.
    """

    place: Tensor  # [segments, cells], the position of each segment that covers a cell
    offset: Tensor  # [segments], joint id of each segment's local id 0
    eos: Tensor  # [segments], local end id, -1 for none
    sos: Tensor  # [segments], first local start id
    corner: Tensor  # [segments, position head], first finest cell that each local position covers, 0 for other ids
    real: Tensor  # [segments, position head], whether a local id is a position
    rank: Tensor  # [segments, position head], place in the segment's order; past all for EOS, 0 for start tokens
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
        segments, head = range(layout.segments), layout.position_head
        corner, rank = (np.zeros((layout.segments, head), dtype=np.int64) for _ in range(2))
        real = np.zeros((layout.segments, head), dtype=bool)
        for s, side in enumerate(layout.sides):
            corner[s, : side**2], real[s, : side**2] = layout.covered_cells(s)[:, 0], True
            rank[s, layout.ordered_positions(s)] = np.arange(side**2)
            rank[s, layout.position_eos(s)] = head if layout.covering else rank[s, layout.position_eos(s)]
        tables = {
            "place": torch.from_numpy(place),
            "offset": torch.from_numpy(layout.offsets),
            "eos": torch.tensor([layout.position_eos(s) for s in segments]),
            "sos": torch.tensor([layout.position_sos(s) for s in segments]),
            "corner": torch.from_numpy(corner),
            "real": torch.from_numpy(real),
            "rank": torch.from_numpy(rank),
            "position_ids": torch.arange(head),
            "content_ids": torch.arange(layout.content_vocabulary),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, ports: Mapping[str, Tensor], caches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """
        Args:
            ports: state and controls by name.
            caches: in order.

        Returns:
            state, reports and caches, in the order of ``StepTable.outputs``.
        """
        layout, model = self.layout, self.model
        label, reset = ports["label"], ports["reset"]

        # A slot that is reset forgets its image: its last token is the start of the first segment.
        start_content = layout.content_sos + label
        start_local = label if layout.label_in_position else torch.zeros_like(label)
        content = torch.where(reset, start_content, ports["content"])
        position = torch.where(reset, self.sos[0] + start_local, ports["position"])
        length = torch.where(reset, torch.zeros_like(ports["length"]), ports["length"])
        done = ports["done"] & ~reset
        given = ports["given"] > 0 if model.given_emb is not None else None  # the next token is given, not drawn
        cells = torch.where(reset[:, None], torch.full_like(ports["cells"], -1), ports["cells"])

        # Where the next token belongs: to the segment of the last one or, after its end, to the following one.
        here = (position[:, None] >= self.offset[1:]).sum(1)  # segment of the last token
        ends = (self.offset + self.eos).index_select(0, here)
        starting = position == ends  # it ended its segment: the start of the next follows
        kind = last = phase = None
        if given is None:
            segment = here + starting.long()
        else:  # given tokens may be of any segment: the image's own sequence has closed so many segments
            kind, phase = (torch.where(reset, torch.zeros_like(ports[name]), ports[name]) for name in ("kind", "phase"))
            theirs = (ports["forced_position"][:, None] >= self.offset[1:]).sum(1)
            segment = torch.where(given, theirs, phase)
        eos, offset, sos = (table.index_select(0, segment) for table in (self.eos, self.offset, self.sos))
        start = sos + start_local
        last = position if kind is None else torch.where(kind > 0, offset + start, position)  # of its own sequence

        # A prompt is read before the image begins.
        reading = None if model.text is None else length < ports["prefix_length"]

        # This step's random number of each head, and how each head draws.
        random = ports["uniforms"].gather(1, self.time(length, ports)[:, None, None].expand(-1, 1, 2)).squeeze(1)
        filters = {
            "position": (ports["top_k_position"], ports["top_p_position"]),
            "content": (ports["top_k"], ports["top_p"]),
        }
        forced = {"position": ports["forced_position"], "content": ports["forced_content"]}

        # Embed the last token; each stack reads its caches and draws one half of the next token.
        x = model.embed(content, position, here, self.time(length, ports), kind)[:, None]
        if reading is not None:
            row = length.long().clamp_max(ports["prefix"].shape[1] - 1)
            prompt = ports["prefix"].gather(1, row[:, None, None].expand(-1, 1, x.shape[-1]))
            x = torch.where(reading[:, None, None], prompt.to(x.dtype), x)
        unused, new_caches = list(caches), []
        logits: dict[str, Tensor] = {}
        token: dict[str, Tensor] = {}
        logprob: dict[str, Tensor] = {}
        logmass: dict[str, Tensor] = {}
        pins = self.pins_at(ports["pinned"], segment, done if given is None else done | given)
        for head in layout.heads:
            blocks, project, embedding = model.parts(head)
            for block in blocks:
                assert isinstance(block, Block)
                x, *new = self.block(block, x, unused.pop(0), unused.pop(0), length)
                new_caches += new
            logits[head] = apply_guidance(project(x)[:, 0], ports["partner"], ports["partner_weight"])
            if head == "position":
                grammar = self.allowed_positions(cells, segment, starting, eos, start, ports["ordered"], last)
                allowed = self.pinned_positions(grammar, pins, cells, segment, ports["ordered"], last)
            else:
                grammar = self.allowed_contents(starting, start_content, token.get("position", start), offset + eos)
                allowed = self.pinned_contents(grammar, pins, token.get("position"), offset, segment)
            token[head], logprob[head], logmass[head] = sample_token(
                logits[head],
                grammar,
                allowed,
                random[:, HEADS.index(head)],
                ports["temperature"],
                *filters[head],
                forced[head] - offset if head == "position" else forced[head],
                (forced[head] >= 0) & ~done,
            )
            if given is not None:
                logprob[head], logmass[head] = (
                    values.masked_fill(given, 0.0) for values in (logprob[head], logmass[head])
                )
            if head == "position":  # drawn as a local id
                token[head] = token[head] + offset
            told = embedding(token[head])[:, None]
            if reading is not None:
                told = torch.where(reading[:, None, None], torch.zeros_like(told), told)
            x = x + told  # what the second stack reads

        # A code fills the cells that its position covers; an image is done when no code is to come.
        local = token["position"] - offset
        still = done if reading is None else done | reading  # draws nothing
        fills = ~starting & (local != eos) & ~still
        fills = fills if given is None else fills & (ports["given"] != 2)
        covered = (self.place.index_select(0, segment) == local[:, None]) & fills[:, None]
        new_cells = torch.where(covered, (token["content"] + segment * layout.codebook_size).int()[:, None], cells)
        new_done = done | ((new_cells >= 0).sum(1) >= layout.filled_cells)

        # A slot that was done stays as it is, and one that reads its prompt stays at the start.
        return (
            torch.where(still, content, token["content"]),
            torch.where(still, position, token["position"]),
            length + (~new_done).int(),  # stays below Tmax
            new_done,
            new_cells,
            *self.own_sequence(ports, phase, kind, still, ~starting & (local == eos)),
            *(part[head] for part in (logits, logprob, logmass) for head in HEADS),
            *new_caches,
        )

    def own_sequence(
        self, ports: Mapping[str, Tensor], phase: Tensor | None, kind: Tensor | None, still: Tensor, ended: Tensor
    ) -> tuple[Tensor, ...]:
        """``phase`` and ``kind`` after the token, of models that have them."""
        if phase is None or kind is None:
            return ()
        return phase + (ended & ~still).long(), torch.where(still, kind, ports["given"])

    def time(self, length: Tensor, ports: Mapping[str, Tensor]) -> Tensor:
        """Tokens of each slot's image so far, int64 [B], from those cached, which its prompt's are among."""
        time = length.long()
        return time if self.model.text is None else (time - ports["prefix_length"]).clamp_min(0)

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
        index, real, rank = (t.index_select(0, segment) for t in (self.corner, self.real, self.rank))
        free = (cells.gather(1, index) < 0) & real
        if not layout.covering:
            free = free & (~ordered[:, None] | self.next_in_order(free, last))
            # without an end, a slot that is done draws on, unheeded
            return free | (real & ~free.any(1, keepdim=True))
        first = torch.where(free, rank, layout.position_head).amin(1, keepdim=True)
        final = (segment == layout.segments - 1)[:, None]
        ends = ~final | (first == layout.position_head)
        result = free & (~(ordered[:, None] & final) | (rank == first))  # of the last segment all free ones are to come
        for s in range(1, layout.segments - 1):
            count = layout.sides[s] ** 2
            whole, closed = self.whole_cells(s, cells, free[:, :count], ordered, last)
            whole = torch.cat([whole, torch.zeros_like(free[:, count:])], 1)
            result = choose((segment == s)[:, None], whole, result)
            ends = choose((segment == s)[:, None], closed, ends)
        result = result | ((self.position_ids == eos[:, None]) & ends)
        return choose(starting[:, None], self.position_ids == start[:, None], result)

    def pins_at(self, pinned: Tensor, segment: Tensor, done: Tensor) -> Tensor:
        """The pin of each local position of a segment, int32 [B, position head]; -1 for special ids and where a slot
        is done."""
        index, real = self.corner.index_select(0, segment), self.real.index_select(0, segment)
        return torch.where(real & ~done[:, None], pinned.gather(1, index), -1)

    def pinned_positions(
        self, grammar: Tensor, pins: Tensor, cells: Tensor, segment: Tensor, ordered: Tensor, last: Tensor
    ) -> Tensor:
        """What the pins leave of the ``grammar``'s positions, bool [B, position head]: none that must have another
        segment or no code, and none behind, in the order of training, of one that this segment must code yet; so the
        segment does not end before. The first of several segments keeps that order too, from the last token on, which
        without pins it need not. Where cells are kept, enough room for the codes to come."""
        layout, k = self.layout, self.layout.codebook_size
        low, rank = (segment * k).int()[:, None], self.rank.index_select(0, segment)
        mine = ((pins >= low) & (pins < low + k)) | (pins == -2 - segment.int()[:, None])
        due = torch.where(mine & grammar, rank, layout.position_head).amin(1, keepdim=True)
        free = pins == -1
        fits = (mine | free) & (rank <= due)
        if not layout.covering and layout.first == "position":
            fits = fits & (self.room(mine, pins, cells, ordered) | free.all(1, keepdim=True))
        elif layout.segments > 1:  # positions of the first segment, their ranks, and their joint ids are the same
            begun = (segment == 0) & (last < layout.sides[0] ** 2) & ordered
            fits = fits & ((self.position_ids > last[:, None]) | ~begun[:, None] | free.all(1, keepdim=True))
        return grammar & fits

    def room(self, mine: Tensor, pins: Tensor, cells: Tensor, ordered: Tensor) -> Tensor:
        """Positions of the one grid that leave room for the codes to come, pinned and free ones, bool [B, position
        head]. Where content comes first, the pins of each step see to that."""
        layout, rest = self.layout, self.layout.position_head - self.layout.cells
        empty = torch.nn.functional.pad(cells < 0, (0, rest))
        usable, due = (mine | (pins == -1)) & empty, mine & empty
        usable = usable & (self.position_ids < layout.cells)
        to_come = layout.filled_cells - (cells >= 0).long().sum(1, keepdim=True)
        after = usable.long().sum(1, keepdim=True) - usable.long().cumsum(1)
        spare = to_come > due.long().sum(1, keepdim=True)  # codes that no pin asks for
        return (mine | spare) & (~ordered[:, None] | (after >= to_come - 1))

    def pinned_contents(
        self, grammar: Tensor, pins: Tensor, position: Tensor | None, offset: Tensor, segment: Tensor
    ) -> Tensor:
        """What the pins leave of the ``grammar``'s contents, bool [B, content vocabulary]: the code of a drawn
        position that is pinned to one. Where content comes first, codes are forced."""
        if position is None:
            return grammar
        code = pins.gather(1, (position - offset)[:, None]) - (segment * self.layout.codebook_size).int()[:, None]
        return grammar & ((code < 0) | (self.content_ids == code))

    def whole_cells(self, s: int, cells: Tensor, free: Tensor, ordered: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Keep segment ``s``, neither the first nor the last, from coding a part of a coarsest cell only.

        A cell is open while some of its positions are taken by the segment and some are not. The segment ends when no
        cell is open. In order, ranks rise, a cell is opened at its first position, and no open place is passed by.

        Args:
            free: bool [B, side * side], positions that cover empty cells.
            last: joint id of the last token.

        Returns:
            which positions may be taken, bool as ``free``, and whether the segment may end, bool [B, 1].
        """
        layout, (b, count) = self.layout, free.shape
        side, block, fan = layout.sides[s], layout.sides[-1] // layout.sides[s], layout.sides[s] // layout.sides[0]
        corner = cells.view(b, side, block, side, block)[:, :, 0, :, 0]
        mine = (corner >= s * layout.codebook_size) & (corner < (s + 1) * layout.codebook_size)
        filled = mine.view(b, layout.sides[0], fan, layout.sides[0], fan).long().sum((2, 4))
        partial = (filled > 0) & (filled < fan**2)
        within = partial[:, :, None, :, None].expand(-1, -1, fan, -1, fan).reshape(b, count)

        ranks = self.rank[s, :count]
        local = last - self.offset[s]
        before = torch.where((local >= 0) & (local < count), ranks[local.clamp(0, count - 1)], -1)
        limit = torch.where(free & within, ranks, torch.full_like(ranks, count)).amin(1, keepdim=True)
        first = torch.zeros(side, side, dtype=torch.bool)
        first[::fan, ::fan] = True
        in_order = (within | (first.view(-1) & (ranks > before[:, None]))) & (ranks <= limit)
        return free & (~ordered[:, None] | in_order), ~within.any(1, keepdim=True)

    def next_in_order(self, free: Tensor, last: Tensor) -> Tensor:
        """Of the one segment's ``free`` positions, bool [B, position head], those that keep the order and leave room
        for the codes to come; ``last`` is the id of the last token."""
        layout, ranks = self.layout, self.rank[0]
        before = torch.where(last < layout.cells, ranks[last.clamp_max(layout.cells - 1)], -1)
        to_come = free.sum(1) - (layout.cells - layout.filled_cells)
        return (ranks > before[:, None]) & (ranks <= (layout.cells - to_come)[:, None])


def choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``torch.where`` of bool tensors, for which ONNX Runtime has no kernel."""
    return (condition & yes) | (~condition & no)


def apply_guidance(logits: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Classifier-free guidance over pairs of slots, float [B, V].

    Of a slot and its partner the lower one is conditional, the higher one unconditional; both get
    ``unconditional + weight * (conditional - unconditional)``, by the same arithmetic and so with the same bits. A
    slot that is its own partner keeps its logits.
    """
    own = torch.arange(logits.shape[0])
    low, high = (logits.index_select(0, rows) for rows in (torch.minimum(own, partner), torch.maximum(own, partner)))
    return high + weight[:, None] * (low - high)


def sample_token(
    logits: Tensor,
    grammar: Tensor,
    allowed: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    forced: Tensor,
    use_forced: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per slot: mask, temperature, top-k, softmax, top-p, inverse CDF in descending order.

    Args:
        logits: float [B, V].
        grammar, allowed: bool, broadcastable to it; what could be drawn, and the part of it that is drawn from.
        the other tensors: [B].

    Returns:
        token ids int64 [B], the forced one where asked; their log-probability under the grammar alone [B]; and the
        logarithm of the share that ``allowed``, or the forced token, has of the grammar's probability [B].
    """
    masked = torch.where(allowed, logits, -torch.inf)

    # Top-k and top-p, in descending order of probability; ties with the k-th stay.
    ordered, ids = torch.topk(masked / temperature[:, None], logits.shape[-1])
    kth = ordered.gather(1, top_k[:, None].clamp(1, logits.shape[-1]) - 1)
    probabilities = torch.softmax(torch.where(ordered < kth, -torch.inf, ordered), dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * ((before < top_p[:, None]) | (top_p[:, None] >= 1))

    # The token at which the cumulative probability passes the random number.
    cumulative = probabilities.cumsum(-1)
    rank = (cumulative <= uniform[:, None] * cumulative[:, -1:]).long().sum(-1, keepdim=True)
    last = (probabilities > 0).long().sum(-1, keepdim=True) - 1
    token = torch.where(use_forced, forced, ids.gather(1, torch.minimum(rank, last)).squeeze(1))

    # The share is what the token's probability gains by the narrower mask; equal masks give equal bits, and 0.
    id = token[:, None]
    logprob = torch.log_softmax(torch.where(grammar, logits, -torch.inf), dim=-1).gather(1, id)
    narrow = torch.log_softmax(masked, dim=-1).gather(1, id)
    logmass = torch.where(use_forced[:, None], logprob, logprob - narrow)
    return token, logprob.squeeze(1), logmass.squeeze(1)


def step_table(model: StackedTransformer, cache: torch.dtype | None = None) -> StepTable:
    """The interface of a model's step; ``cache`` is the number format of the caches, None that of the weights.

    Raises:
        ConfigError: the model's position table is shorter than the longest sequence that the grammar allows.
    """
    config, layout = model.config, model.layout
    if config.block_size < layout.max_length:
        raise ConfigError(f"transformer.block_size is {config.block_size}; this layout needs up to {layout.max_length}")
    cache = cache or model.content_emb.weight.dtype
    name = NARROW.get(cache) or str(cache).removeprefix("torch.")
    blocks = config.position_blocks + config.content_blocks
    prompt = 0 if model.text is None else model.text.config.length
    return StepTable.of(layout, 2 * blocks, config.heads, config.width // config.heads, name, prompt, config.given)


def example_inputs(table: StepTable, slots: int) -> dict[str, dict[str, Tensor] | list[Tensor]]:
    """Inputs of ``Step.forward`` for idle slots."""
    dtypes = {name: dtype for dtype, name in NARROW.items()}
    tensors = {port.name: torch.from_numpy(port.idle_values(slots)) for port in table.inputs}
    caches = [(tensors.pop(port.name), dtypes.get(port.dtype)) for port in table.role(CACHE)]
    return {"ports": tensors, "caches": [values.view(dtype or values.dtype) for values, dtype in caches]}
