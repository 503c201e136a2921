"""Codes as token sequences, collated into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dvq_rt.editing import given_first
from dvq_rt.layout import TokenLayout
from training.data.holes import Hole


class CodeRows(Protocol):
    """Codes int32 [h, w] and grains int8 [hc, wc] of images, by number."""

    @property
    def codes(self) -> Any: ...
    @property
    def grain(self) -> Any: ...


def collate(
    layout: TokenLayout,
    data: CodeRows,
    images: NDArray[np.int64],
    labels: NDArray[np.int64],
    holes: Sequence[Hole | None] | None = None,
    coarse: Any = None,
) -> dict[str, Tensor]:
    """Token sequences of images padded on the right, where causal attention never looks.

    Args:
        holes: of each image what is redrawn of it, so that the rest is given first, or None; None at all for models
            that are not trained for it.
        coarse: for hints, the codes int [hc, wc] that the cells of an image have in the coarsest grain, by its number.

    Returns:
        int64 [B, T]: inputs ``content``, ``position`` (joint), ``segment``; ``following`` (see StackedTransformer);
        targets ``target_content``, ``target_position`` (local; both -1 in the padding), ``target_segment``. With
        ``holes`` also ``kind`` of the inputs, and targets are -1 where the next token is given.
    """
    rows = [layout.to_tokens(data.codes[i], data.grain[i], int(label)) for i, label in zip(images, labels, strict=True)]
    kinds: list[NDArray[np.int64]] = [np.zeros(len(row.content), np.int64) for row in rows]
    for place, hole in enumerate(holes or ()):
        if hole is not None:
            hints = None if coarse is None else np.where(hole.told, coarse[images[place]].astype(np.int64), -1)
            rows[place], kinds[place] = given_first(layout, rows[place], ~hole.redraw, hints)
    length = max(len(r.content) for r in rows) - 1
    offsets = np.array([layout.position_offset(s) for s in range(layout.segments)])
    names = ["content", "position", "segment", "following", "target_content", "target_position", "target_segment"]
    names += [] if holes is None else ["kind"]
    out = {name: np.zeros((len(rows), length), dtype=np.int64) for name in names}
    out["target_content"] -= 1
    out["target_position"] -= 1
    for i, row in enumerate(rows):
        t = len(row.content) - 1
        out["content"][i, :t], out["position"][i, :t], out["segment"][i, :t] = (part[:-1] for part in row)
        out["following"][i, :t] = (row.position if layout.first == "position" else row.content)[1:]
        out["target_content"][i, :t] = row.content[1:]
        out["target_position"][i, :t] = row.position[1:] - offsets[row.segment[1:]]
        out["target_segment"][i, :t] = row.segment[1:]
        if holes is not None:
            out["kind"][i, :t] = kinds[i][:-1]
            for name in ("target_content", "target_position"):
                out[name][i, :t][kinds[i][1:] > 0] = -1
    return {name: torch.from_numpy(values) for name, values in out.items()}


def padded_to(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """A collated batch with sequences of a length."""
    more = length - batch["content"].shape[1]
    without = ("target_content", "target_position")  # -1 where there is none
    return {name: F.pad(x, (0, more), value=-1 if name in without else 0) for name, x in batch.items()}


def collate_prompts(prompts: Sequence[NDArray[Any]]) -> dict[str, Tensor]:
    """Prompts padded on the right: ``prompt``, token ids int64 [B, P] or features float [B, P, d], P at least 1, and
    ``prompt_length`` int64 [B]."""
    lengths = torch.tensor([len(row) for row in prompts])
    table = np.zeros((len(prompts), max(1, int(lengths.max())), *prompts[0].shape[1:]), prompts[0].dtype)
    for line, row in zip(table, prompts, strict=True):
        line[: len(row)] = row
    return {"prompt": torch.from_numpy(table), "prompt_length": lengths}
