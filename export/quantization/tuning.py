"""Tuning of integer weights: the quantized model learns the float model's distributions on images that the latter
draws.

Integers stay integers: each has a float beside it that gradients move, and is that float rounded (a straight-through
estimator). Scales are fixed. Norms, biases and embedding tables, which stay float32, are tuned along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dvq_rt.layout import padded
from export.quantization.calibration import Case
from export.quantization.layers import replace_layer
from export.quantization.weights import BLOCK, QuantLinear, round_activations
from training.data.tokens import collate_prompts
from training.models.transformer import StackedTransformer
from training.torch_program import stacked

BATCH = 8
LEVEL_RATE, FLOAT_RATE = 0.02, 5e-5
"""Largest change per step of an integer's float, in levels, and of other parameters."""


class TunedLinear(nn.Module):
    """A QuantLinear whose levels can be trained: ``levels`` float [N, K] around 0."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.bits, self.scales = layer.bits, layer.scales
        self.levels = nn.Parameter(layer.weight / layer.scales.repeat_interleave(BLOCK, 1))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())

    def integers(self) -> Tensor:
        """The levels as they will be stored, float [N, K] around 0."""
        half = 2 ** (self.bits - 1)
        return self.levels.clamp(-half, half - 1).round()

    def forward(self, x: Tensor) -> Tensor:
        levels = self.levels + (self.integers() - self.levels).detach()
        rounded = x + (round_activations(x) - x).detach()
        return F.linear(rounded, levels * self.scales.repeat_interleave(BLOCK, 1), self.bias)

    def finished(self) -> QuantLinear:
        """The layer to export."""
        levels = (self.integers() + 2 ** (self.bits - 1)).detach().to(torch.uint8)
        return QuantLinear(levels, self.scales, self.bits, self.bias)


def tune(
    teacher: StackedTransformer, student: StackedTransformer, cases: Sequence[Case], steps: int
) -> StackedTransformer:
    """A copy of a quantized model, tuned to the float model's distributions of both heads.

    Args:
        teacher: the float model; student: with QuantLinear layers.
        cases: sequences to tune on.
        steps: optimization steps of ``BATCH`` sequences.
    """
    net = copy.deepcopy(student).requires_grad_(True)
    swap(net, QuantLinear, TunedLinear)
    levels = [m.levels for m in net.modules() if isinstance(m, TunedLinear)]
    others = [p for name, p in net.named_parameters() if not name.endswith(".levels")]
    groups = [{"params": levels, "lr": LEVEL_RATE}, {"params": others, "lr": FLOAT_RATE}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 10) * (0.5 + 0.5 * float(np.cos(np.pi * i / steps)))
    )
    rng = np.random.default_rng(0)
    by_length = sorted(cases, key=lambda case: len(case.tokens.content))
    for _ in tqdm(range(steps), desc="tuning integers", dynamic_ncols=True):
        start = int(rng.integers(0, max(1, len(cases) - BATCH + 1)))
        batch = by_length[start : start + BATCH]
        inputs, used = stacked(teacher.layout, [case.tokens for case in batch])
        more = beside(batch)
        with torch.no_grad():
            targets = teacher(*inputs, **more)
        loss = torch.zeros(())
        for target, logits in zip(targets, net(*inputs, **more), strict=True):
            wanted, given = F.log_softmax(target[used], -1), F.log_softmax(logits[used], -1)
            loss = loss + F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    swap(net, TunedLinear, TunedLinear.finished)
    return net.eval().requires_grad_(False)


def beside(batch: Sequence[Case]) -> dict[str, Tensor]:
    """Prompts and kinds of a batch, as ``StackedTransformer.forward`` takes them; those that its cases have."""
    prompts = [case.prompt for case in batch if case.prompt is not None]
    made = collate_prompts(prompts) if prompts else {}
    if any(case.kind is not None for case in batch):
        kinds = [np.zeros(len(c.tokens.content), np.int64) if c.kind is None else c.kind for c in batch]
        made["kind"] = torch.from_numpy(padded([kind[:-1] for kind in kinds], 0))
    return made


def swap(model: nn.Module, kind: type, make: Callable[[Any], nn.Module]) -> None:
    """Replace every layer of a kind by what ``make`` makes of it."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, kind)]:
        replace_layer(model, name, make(layer))
