"""Images as token sequences: tokenized once, collated into padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.layout import TokenLayout
from dvq_rt.progress import progress_bar
from training.data.holes import arranged
from training.data.pixels import to_float
from training.models.tokenizer import Tokenizer


class Tokenized(NamedTuple):
    """``codes`` int32 [N, h, w], ``grain`` int8 [N, hc, wc], ``labels`` int64 [N]; where it is asked for,
    ``coarse`` int32 [N, hc, wc], the codes that the cells would have in the coarsest grain."""

    codes: NDArray[np.int32]
    grain: NDArray[np.int8]
    labels: NDArray[np.int64]
    coarse: NDArray[np.int32] | None = None


@torch.no_grad()
def tokenize(
    vae: Tokenizer, images: Iterator[tuple[np.ndarray, np.ndarray]], count: int, title: str, coarse: bool = False
) -> Tokenized:
    """Codes of the first ``count`` of a stream of (uint8 [B, S, S, 3], labels [B]) batches; ``coarse``: those of every
    cell too."""
    codes: list[np.ndarray] = []
    grains: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    coarsest: list[np.ndarray] = []
    done = 0
    with progress_bar(total=count, desc=title, unit="image") as bar:
        for pixels, label in images:
            if coarse:
                code, grain, _, every = vae.encode_grains(to_float(pixels))
                block = code.shape[1] // grain.shape[1]
                coarsest.append(every[:, 0, ::block, ::block].numpy().astype(np.int32))
            else:
                code, grain = vae.encode_maps(to_float(pixels))
            codes.append(code.numpy().astype(np.int32))
            grains.append(grain.numpy().astype(np.int8))
            labels.append(label)
            done += len(pixels)
            bar.update(len(pixels))
            if done >= count:
                break
    parts = [codes, grains, labels, *([coarsest] if coarse else [])]
    return Tokenized(*(np.concatenate(part)[:count] for part in parts))


def code_counts(layout: TokenLayout, grain: NDArray[np.int8]) -> NDArray[np.int64]:
    """Number of codes of each image, int64 [N], of grain maps [N, hc, wc]."""
    codes_of_a_cell = np.array([*((side // layout.sides[0]) ** 2 for side in layout.sides), 0])  # -1 has none
    return codes_of_a_cell[grain].sum((1, 2))


def collate(
    layout: TokenLayout,
    data: Tokenized,
    images: NDArray[np.int64],
    labels: NDArray[np.int64],
    holes: Sequence[tuple[int, int] | None] | None = None,
) -> dict[str, Tensor]:
    """Token sequences of images padded on the right, where causal attention never looks.

    Args:
        holes: of each image the key of the random numbers by which a part of it is given first
            (``training.data.holes.arranged``), or None; None at all for models that are not trained for it.

    Returns:
        int64 [B, T]: inputs ``content``, ``position`` (joint), ``segment``; ``following`` (see StackedTransformer);
        targets ``target_content``, ``target_position`` (local; both -1 in the padding), ``target_segment``. With
        ``holes`` also ``kind`` of the inputs, and targets are -1 where the next token is given.
    """
    rows = [layout.to_tokens(data.codes[i], data.grain[i], int(label)) for i, label in zip(images, labels, strict=True)]
    kinds: list[NDArray[np.int64]] = [np.zeros(len(row.content), np.int64) for row in rows]
    for place, key in enumerate(holes or ()):
        if key is not None:
            i = images[place]
            coarse = None if data.coarse is None else data.coarse[i].astype(np.int64)
            rows[place], kinds[place] = arranged(layout, rows[place], data.grain[i].astype(np.int64), coarse, key)
    length = max(len(r.content) for r in rows) - 1
    offsets = np.array([layout.position_offset(s) for s in range(layout.segments)])
    names = ("content", "position", "segment", "following", "target_content", "target_position", "target_segment")
    names = names if holes is None else (*names, "kind")
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
