"""The released samplers of the Stackformer (spec/mq.md section 6), for parity with published results.

Their rules differ from ``training.sampling``'s in three small ways: positions come in any order, only those already
taken are excluded; both heads' filters cut as ``training.published`` does; and one temperature serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from runtimes.errors import InputError
from training.models.transformer import StackedTransformer
from training.published.sampler import Choose, Draw, filter_probabilities, most_probable


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
                found = draw(head, logits, params.top_k, params.top_p)
                content = torch.cat([content, found[:, None]], 1)
            else:
                logits = logits.scatter(1, position, -torch.inf)
                logits[:, layout.cells :] = -torch.inf
                found = draw(head, logits, params.top_k_position, params.top_p_position)
                position = torch.cat([position, found[:, None]], 1)
    return PublishedKept(content[:, 1:], position[:, 1:])
