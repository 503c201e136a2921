"""PyTorch behind ``runtimes.protocol``: a model's step with static key/value caches, run by the engines' own loop.

It draws what the uncached sampler draws (``training.sampling``), in a fraction of the time: pictures during training,
golden sequences, images to calibrate with; and it is the baseline of ``export.bench``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from dvq_rt.decoding import DecodeLoop, Event, Request
from dvq_rt.engine import run_alone
from dvq_rt.layout import TokenLayout, Tokens, padded
from dvq_rt.sampling import SamplingParams
from dvq_rt.step import CACHE, CONTROL, REPORT, STATE
from runtimes.errors import BackendError
from runtimes.protocol import Array, Buffer
from training.data.tokens import collate_prompts
from training.models.transformer import StackedTransformer
from training.sampling import check_guidance
from training.step import Step, step_table

SIDE_BY_SIDE = 16
"""Images that are drawn at once."""
TOKENS = ("content", "position")


class TorchBuffer:
    """A tensor in the host's memory."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.array = np.zeros(shape, dtype)
        self.tensor = torch.from_numpy(self.array)

    def write(self, values: Array) -> None:
        self.array[...] = values

    def request(self) -> None:
        pass

    def read(self) -> Array:
        return self.array


class TorchDevice:
    """PyTorch on the CPU."""

    poll = 1

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> TorchBuffer:
        return TorchBuffer(shape, dtype)


class StaticCache:
    """Cached attention that writes in place and reads only the rows in use; a form of ``training.step.Attention``.

    Attributes:
        seen: rows that attention reads: the largest length and the new token.
        ragged: whether lengths differ, so that a mask is needed.
    """

    def __init__(self) -> None:
        self.seen, self.ragged = 1, False

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


class TorchProgram:
    """The step of a model with caches in place.

    Args:
        model: in eval mode.
        compiled: run it under ``torch.compile``. Every length is compiled anew, so this is for timing one length.

    Raises:
        BackendError: ``compiled``, and Inductor compiled nothing (raised by the first run).
    """

    def __init__(self, model: StackedTransformer, compiled: bool = False) -> None:
        self.table, self.cache = step_table(model), StaticCache()
        step = Step(model, self.cache).eval()
        self._step = torch.compile(step) if compiled else step
        self._unproven = compiled

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> TorchBinding:
        return TorchBinding(self, inputs, outputs)

    @torch.inference_mode()
    def advance(self, ports: dict[str, Tensor], caches: list[Tensor]) -> tuple[Tensor, ...]:
        """``Step.forward``; the caches change in place."""
        length = np.where(ports["reset"].numpy(), 0, ports["length"].numpy())
        self.cache.seen = int(length.max()) + 1
        self.cache.ragged = int(length.min()) + 1 < self.cache.seen
        if self._unproven:
            self._prove(ports, caches)
        outputs: tuple[Tensor, ...] = self._step(ports, caches)
        return outputs

    def _prove(self, ports: dict[str, Tensor], caches: list[Tensor]) -> None:
        """Run once, and see that Inductor generated code for it."""
        from torch._dynamo.utils import counters
        from torch._inductor import metrics

        torch.compiler.reset()
        counters.clear()
        metrics.reset()
        try:
            self._step(ports, caches)
        except Exception as error:  # of the compiler, of many kinds
            raise BackendError(f"torch.compile failed: {str(error)[:500]}; leave the baseline out") from error
        graphs, kernels = counters["stats"]["unique_graphs"], metrics.generated_kernel_count
        if graphs < 1 or kernels < 1:
            raise BackendError(
                f"torch.compile made {graphs} graphs and {kernels} kernels for the step; the compiled baseline would "
                "be eager PyTorch; check that a C++ compiler works, or leave the baseline out"
            )
        self._unproven = False


class TorchBinding:
    """A step tied to buffers. Caches are the same buffers on both sides."""

    def __init__(self, program: TorchProgram, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._program, table = program, program.table
        self._ports = {port.name: _tensor(inputs[port.name]) for port in table.role(STATE, CONTROL)}
        self._caches = [_tensor(inputs[port.name]) for port in table.role(CACHE)]
        self._results = [_tensor(outputs[port.output]) for port in table.role(STATE, REPORT)]

    def run(self) -> None:
        outputs = self._program.advance(self._ports, self._caches)
        for result, tensor in zip(self._results, outputs, strict=False):  # without the caches, which come last
            result.copy_(tensor)


def _tensor(buffer: Buffer) -> Tensor:
    assert isinstance(buffer, TorchBuffer)
    return buffer.tensor


def decode_loop(model: StackedTransformer, slots: int, compiled: bool = False) -> DecodeLoop:
    """The engines' loop over a model in eval mode; see ``TorchProgram``."""
    program = TorchProgram(model, compiled)
    return DecodeLoop(TorchDevice(), program, program.table, slots)


def sample_events(
    model: StackedTransformer,
    labels: Sequence[int],
    params: SamplingParams,
    *,
    seed: int = 0,
    first: int = 0,
    limit: int | None = None,
    record: tuple[str, ...] = TOKENS,
    prompts: Sequence[Array] = (),
    negatives: Sequence[Array] = (),
) -> list[Event]:
    """Draw images with the random numbers of ``seed``, the first of them being number ``first``.

    Args:
        model: in eval mode.
        labels: start labels, one per image.
        limit: tokens after which an image ends, finished or not.
        record: what the events hold of each token.
        prompts, negatives: rows of each image's prompt (``embed_prompts``) and of its partner's; none at all are the
            empty ones.

    Returns:
        the last event of every image.

    Raises:
        InputError: guidance is asked of a model without a null label or empty prompt.
    """
    check_guidance(model, params)
    texts = zip_longest(prompts, negatives) if prompts or negatives else [(None, None)] * len(labels)
    requests = [
        Request(label, params, seed, first + i, None, 0, record, limit, i, prompt, negative)
        for i, (label, (prompt, negative)) in enumerate(zip(labels, texts, strict=True))
    ]
    loop = decode_loop(model, min(len(labels), SIDE_BY_SIDE) * requests[0].width)
    return sorted(run_alone(loop, requests), key=lambda event: event.request.key)


def drawn_tokens(layout: TokenLayout, event: Event) -> Tokens:
    """The sequence of an image that was drawn with ``TOKENS`` recorded: from the start to the last code."""
    content, position = layout.start(0, event.request.label)
    start = {"content": content, "position": position + layout.position_offset(0)}
    tokens = {name: np.concatenate([[start[name]], event.records[name]]) for name in TOKENS}
    return Tokens(**tokens, segment=layout.segment_of(tokens["position"]))


def stacked(layout: TokenLayout, rows: Sequence[Tokens]) -> tuple[tuple[Tensor, ...], Tensor]:
    """``StackedTransformer.forward``'s inputs, int64 [B, T] each, of sequences padded on the right, and which of their
    places are used, bool [B, T]."""
    columns = [*([row[i][:-1] for row in rows] for i in range(3)), [layout.following(row) for row in rows]]
    used = padded([np.ones(len(row.content) - 1, np.int64) for row in rows], 0)
    return tuple(torch.from_numpy(padded(column, 0)) for column in columns), torch.from_numpy(used).bool()


@torch.no_grad()
def teacher_forced(
    model: StackedTransformer, tokens: Tokens, prompt: Array | None = None, kind: NDArray[np.int64] | None = None
) -> dict[str, Tensor]:
    """Both heads' logits [T, V] by name, of one sequence, without caches: all tokens at once.

    Args:
        prompt: token ids or features in front of it.
        kind: of its tokens, see ``dvq_rt.editing.given_first``.
    """
    inputs, _ = stacked(model.layout, [tokens])
    text = {} if prompt is None else collate_prompts([prompt])
    kinds = None if kind is None else torch.from_numpy(kind[None, :-1])
    position, content = model(*inputs, **text, kind=kinds)
    return {"position": position[0], "content": content[0]}
