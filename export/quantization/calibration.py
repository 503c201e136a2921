"""What quantization is calibrated with: sequences that a model draws for itself, and what they do to its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.decoding import cells_to_maps
from dvq_rt.editing import given_first
from dvq_rt.layout import UNORDERED, TokenLayout, Tokens
from dvq_rt.sampling import SamplingParams
from export.parity import half_given, random_prompts, random_rows, read_prompts
from export.quantization.layers import linear_layers, watching
from training.checkpoint import Model
from training.models.transformer import StackedTransformer
from training.sampling import embed_prompts
from training.torch_program import drawn_tokens, sample_events, teacher_forced

CALIBRATION = 64
"""Images that a model draws to be calibrated with."""
UNCALIBRATED = 4
"""Images that ranges come from if none are to be drawn: of random codes, or drawn where codes have no sequence."""


class Case(NamedTuple):
    """A sequence, the prompt in front of it (token ids or features), and the kind of its tokens where some are given;
    see ``teacher_forced``."""

    tokens: Tokens
    prompt: NDArray[Any] | None = None
    kind: NDArray[np.int64] | None = None


def calibration_cases(model: Model, images: int, seed: int = 2**32) -> tuple[list[Case], list[NDArray[np.int64]]]:
    """Sequences and code maps [side, side] of images that the model draws for itself, with labels from the first to the
    last. With 0 images a few of random codes, or drawn where codes have no sequence.

    A model that reads prompts gets random ones, every fourth of them empty. Where tokens may be given, every second
    sequence begins with its left half."""
    net = model.both()[1]
    layout = net.layout
    labels = spread_labels(layout, images or UNCALIBRATED)
    texts: list[Any] = read_prompts(model, random_prompts(model, len(labels)))
    if not images and layout.order != UNORDERED:
        rows = random_rows(layout, labels)
        maps = [layout.to_map(row.content.tolist(), row.position.tolist())[0] for row in rows]
    else:
        prompts = embed_prompts(net, texts) if texts else []
        events = sample_events(net, labels, SamplingParams(), seed=seed, prompts=prompts)
        rows, maps = [drawn_tokens(layout, e) for e in events], [cells_to_maps(layout, e.cells)[0] for e in events]
    cases = [Case(row, text) for row, text in zip(rows, texts or [None] * len(rows), strict=True)]
    if net.config.given:
        for i in range(0, len(cases), 2):
            tokens, kind = given_first(layout, cases[i].tokens, half_given(layout))
            cases[i] = Case(tokens, cases[i].prompt, kind)
    return cases, maps


def spread_labels(layout: TokenLayout, images: int) -> list[int]:
    """Start labels for so many images: the first, the last, which is the null label if there is one, and others
    evenly between them."""
    return [round(i * (layout.starts - 1) / max(1, images - 1)) for i in range(images)]


@torch.no_grad()
def observe(
    model: StackedTransformer, cases: Sequence[Case], *, moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What sequences do to a model, by names of linear layers.

    Args:
        moments: whether to measure second moments, which takes long for large models; there are none if not.

    Returns:
        second moments, the mean of x x^T over the inputs x of every layer, float32 [K, K]; and the scales of the
        caches' channels, float32 [2, H, 1, D] by projection to query, key and value: the largest key or value that
        occurs becomes 127.
    """
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    seen: dict[str, int] = {}  # inputs of every layer

    def look(name: str, x: Tensor, y: Tensor) -> None:
        if moments:
            x = x.flatten(0, -2)
            seen[name] = seen.get(name, 0) + len(x)
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x
        if name.endswith("attn.qkv"):
            keys_and_values = y[..., y.shape[-1] // 3 :].abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest.get(name, keys_and_values), keys_and_values)

    with watching(linear_layers(model), look):
        for case in cases:
            teacher_forced(model, *case)
    scales = {name: (top.clamp_min(1e-6) / 127).view(2, model.config.heads, 1, -1) for name, top in largest.items()}
    return {name: total / seen[name] for name, total in sums.items()}, scales
