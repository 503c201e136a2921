"""What quantization is calibrated with: sequences that a model draws for itself, and what they do to its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dvq_rt.layout import UNORDERED, TokenLayout
from dvq_rt.sampling import SamplingParams
from export.parity import random_rows
from export.quantization.layers import linear_layers, watching
from export.torch_program import draw_tokens, teacher_forced
from training.models.transformer import StackedTransformer

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Sequences, (content, joint position) each, start tokens included."""
CALIBRATION, TOGETHER = 64, 16
"""Images that a model draws to be calibrated with, and how many of them at once."""
UNCALIBRATED = 4
"""Images that ranges come from if none are to be drawn: of random codes, or drawn where codes have no sequence."""


def calibration_sequences(model: StackedTransformer, images: int, seed: int = 2**32) -> Rows:
    """Sequences of images that the model draws for itself, with labels from the first to the last. With 0 images a few
    of random codes, or drawn where codes have no sequence."""
    layout = model.layout
    if not images and layout.order != UNORDERED:
        return random_rows(layout, spread_labels(layout, UNCALIBRATED))
    labels, rows = spread_labels(layout, images or UNCALIBRATED), []
    for first in range(0, len(labels), TOGETHER):
        batch = labels[first : first + TOGETHER]
        rows += draw_tokens(model, batch, SamplingParams(), seed=seed, first_image=first)
    return rows


def spread_labels(layout: TokenLayout, images: int) -> list[int]:
    """Start labels for so many images: the first, the last, which is the null label if there is one, and others
    evenly between them."""
    return [round(i * (layout.starts - 1) / max(1, images - 1)) for i in range(images)]


@torch.no_grad()
def observe(model: StackedTransformer, rows: Rows, *, moments: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
        for content, position in rows:
            teacher_forced(model, content, position)
    tokens, heads = sum(len(content) - 1 for content, _ in rows), model.config.heads
    scales = {name: (top.clamp_min(1e-6) / 127).view(2, heads, 1, -1) for name, top in largest.items()}
    return {name: total / tokens for name, total in sums.items()}, scales
