"""What quantization is calibrated with: sequences that a model draws for itself, and what they do to its layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.decoding import cells_to_maps
from dvq_rt.layout import UNORDERED, TokenLayout, Tokens
from dvq_rt.sampling import SamplingParams
from export.parity import random_rows
from export.quantization.layers import linear_layers, watching
from training.models.transformer import StackedTransformer
from training.torch_program import drawn_tokens, sample_events, teacher_forced

CALIBRATION = 64
"""Images that a model draws to be calibrated with."""
UNCALIBRATED = 4
"""Images that ranges come from if none are to be drawn: of random codes, or drawn where codes have no sequence."""


def calibration_sequences(
    model: StackedTransformer, images: int, seed: int = 2**32
) -> tuple[list[Tokens], list[NDArray[np.int64]]]:
    """Sequences and code maps [side, side] of images that the model draws for itself, with labels from the first to the
    last. With 0 images a few of random codes, or drawn where codes have no sequence."""
    layout = model.layout
    if not images and layout.order != UNORDERED:
        rows = random_rows(layout, spread_labels(layout, UNCALIBRATED))
        return rows, [layout.to_map(row.content.tolist(), row.position.tolist())[0] for row in rows]
    labels = spread_labels(layout, images or UNCALIBRATED)
    events = sample_events(model, labels, SamplingParams(), seed=seed)
    return [drawn_tokens(layout, e) for e in events], [cells_to_maps(layout, e.cells)[0] for e in events]


def spread_labels(layout: TokenLayout, images: int) -> list[int]:
    """Start labels for so many images: the first, the last, which is the null label if there is one, and others
    evenly between them."""
    return [round(i * (layout.starts - 1) / max(1, images - 1)) for i in range(images)]


@torch.no_grad()
def observe(
    model: StackedTransformer, rows: Sequence[Tokens], *, moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ``rows`` do to a model, by names of linear layers.

    Args:
        moments: whether to measure second moments, which takes long for large models; there are none if not.

    Returns:
        second moments, the mean of x x^T over the inputs x of every layer, float32 [K, K]; and the scales of the
        caches' channels, float32 [2, H, 1, D] by projection to query, key and value: the largest key or value that
        occurs becomes 127.
    """
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, y: Tensor) -> None:
        if moments:
            x = x.flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x
        if name.endswith("attn.qkv"):
            keys_and_values = y[..., y.shape[-1] // 3 :].abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest.get(name, keys_and_values), keys_and_values)

    with watching(linear_layers(model), look):
        for row in rows:
            teacher_forced(model, row)
    tokens, heads = sum(len(row.content) - 1 for row in rows), model.config.heads
    scales = {name: (top.clamp_min(1e-6) / 127).view(2, heads, 1, -1) for name, top in largest.items()}
    return {name: total / tokens for name, total in sums.items()}, scales
