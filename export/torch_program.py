"""The decode step in PyTorch with static key/value caches: what a user of PyTorch would run.

The baseline of ``export.bench``, and the way to draw sequences from models that are too large for the uncached
sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams, uniforms
from export.steps import STATE, Step, example_inputs
from runtimes.errors import ExportError, InputError
from training.models.transformer import StackedTransformer


class StaticCache:
    """Cached attention that writes in place and reads only the rows in use; form of ``export.lowering.Attention``.

    Attributes:
        seen: rows that attention reads, the largest length and the new token.
        ragged: whether lengths differ, so that a mask is needed.
    """

    def __init__(self, seen: int = 1, ragged: bool = False) -> None:
        self.seen, self.ragged = seen, ragged

    def __call__(
        self, qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, _, width = qkv.shape
        q, k, v = qkv.view(b, 3, heads, 1, width // 3 // heads).unbind(1)
        if self.ragged:
            rows = torch.arange(b)
            keys[rows, :, length], values[rows, :, length] = k[:, :, 0], v[:, :, 0]
            mask = (torch.arange(self.seen) <= length[:, None])[:, None, None]
        else:
            keys[:, :, self.seen - 1], values[:, :, self.seen - 1] = k[:, :, 0], v[:, :, 0]
            mask = None
        y = F.scaled_dot_product_attention(q, keys[:, :, : self.seen], values[:, :, : self.seen], attn_mask=mask)
        return y.reshape(b, 1, width // 3), keys, values


class TorchStep:
    """``export.steps.Step`` with its state, for a fixed number of slots.

    Args:
        model: in eval mode.
        slots: B.
        compiled: run it under ``torch.compile``. Lengths must then be equal, and every length is compiled anew: only
            for timing one length.

    Raises:
        ExportError: ``compiled``, and Inductor compiled nothing (raised by the first ``run``).
    """

    def __init__(self, model: StackedTransformer, slots: int, compiled: bool = False) -> None:
        self.layout, self.cache = model.layout, StaticCache()
        self.inputs: dict[str, Any] = example_inputs(model, slots)
        step = Step(model, self.cache).eval()
        self._step = torch.compile(step) if compiled else step
        self._unproven = compiled

    @torch.inference_mode()
    def run(self) -> tuple[Tensor, ...]:
        """One token of every slot; returns the new state, in the order of ``STATE``."""
        if self._unproven:
            self._prove()
        return self._advance()

    def _prove(self) -> None:
        """Run once, and assert that Inductor generated code for it."""
        from torch._dynamo.utils import counters
        from torch._inductor import metrics

        torch.compiler.reset()
        counters.clear()
        metrics.reset()
        self._advance()
        graphs, kernels = counters["stats"]["unique_graphs"], metrics.generated_kernel_count
        if graphs < 1 or kernels < 1:
            raise ExportError(
                f"torch.compile made {graphs} graphs and {kernels} kernels for the step; the compiled baseline would "
                "be eager PyTorch; check that a C++ compiler works, or leave the baseline out"
            )
        self.kernels, self._unproven = kernels, False

    def _advance(self) -> tuple[Tensor, ...]:
        out = self._step(**self.inputs)
        for name, tensor in zip(STATE, out, strict=False):
            self.inputs[name] = tensor
        self.reports = out[len(STATE) : len(STATE) + 4]
        return tuple(out[: len(STATE)])

    def place(self, state: dict[str, NDArray[np.generic]], length: int) -> None:
        """Set the state of every slot (``Loop.place`` makes it for both sides of a comparison)."""
        for name, values in state.items():
            self.inputs[name] = torch.from_numpy(values)
        self.cache.seen, self.cache.ragged = length + 1, False


@torch.inference_mode()
def draw_tokens(
    model: StackedTransformer, labels: Sequence[int], params: SamplingParams, *, seed: int = 0, first_image: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Draw as ``training.sampling.sample_tokens`` does, with caches, so that long sequences of large models end.

    Raises:
        InputError: guidance is asked for, which takes pairs of slots.
    """
    if params.guidance != 1:
        raise InputError(f"guidance is {params.guidance}; draw_tokens takes 1")
    layout, count = model.layout, len(labels)
    step = TorchStep(model, count)
    inputs = step.inputs
    inputs["label"] = torch.tensor(labels)
    inputs["reset"] = torch.ones(count, dtype=torch.bool)
    numbers = [uniforms(seed, first_image + i, layout.max_length) for i in range(count)]
    inputs["uniforms"] = torch.from_numpy(np.stack(numbers))
    inputs["temperature"].fill_(params.temperature)
    inputs["top_p"].fill_(params.top_p)
    inputs["top_p_position"].fill_(params.top_p_position)
    inputs["top_k"].fill_(params.top_k or layout.content_vocabulary)
    inputs["top_k_position"].fill_(params.top_k_position or layout.position_head)
    inputs["ordered"].fill_(params.positions == "ordered")
    starts = [start_tokens(layout, label) for label in labels]
    rows = [([content], [position]) for content, position in starts]
    for t in range(layout.max_length):
        step.cache.seen = t + 1  # a slot that is done stays where it is
        live = torch.ones(count, dtype=torch.bool) if t == 0 else ~inputs["done"]
        if not live.any():
            break
        step.cache.ragged = not bool(live.all())
        step.run()
        inputs["reset"] = torch.zeros(count, dtype=torch.bool)
        for i in live.nonzero()[:, 0].tolist():
            rows[i][0].append(int(inputs["content"][i]))
            rows[i][1].append(int(inputs["position"][i]))
    return rows


def start_tokens(layout: TokenLayout, label: int) -> tuple[int, int]:
    """Content and joint position of the first token."""
    content, position = layout.start(0, label)
    return content, position + layout.position_offset(0)


@torch.no_grad()
def teacher_forced(model: StackedTransformer, content: Sequence[int], position: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both heads' logits, [T, V] each, of one sequence of T + 1 tokens (joint positions), all at once."""
    layout, values, joint = model.layout, torch.tensor(content)[None], torch.tensor(position)[None]
    offsets = torch.tensor([layout.position_offset(s) for s in range(layout.segments)])
    segment = (joint[..., None] >= offsets[1:]).sum(-1)
    following = joint if layout.first == "position" else values
    out = model(values[:, :-1], joint[:, :-1], segment[:, :-1], following[:, 1:])
    return out[0][0], out[1][0]
