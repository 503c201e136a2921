"""PyTorch's time for one token on a device, for ``dvq-rt accept --checkpoint``.

``uncached`` recomputes the whole sequence, as the released code does; ``eager`` has static key/value caches, read only
as far as they are filled; ``compiled`` is that under ``torch.compile``, on a GPU with CUDA graphs, and called
``compiled without graphs`` where Inductor made none. On a GPU they run in float16 as well, on a CPU in float32.
Compiling takes longest, so on a GPU it is done in float16 alone. They have run on a CPU only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from dvq_rt.accept import Baselines
from dvq_rt.bench import middle_state
from dvq_rt.step import CACHE
from dvq_rt.timing import interleave
from export.bench import uncached_token
from runtimes.errors import BackendError
from training.checkpoint import Model, load_checkpoint
from training.models.transformer import StackedTransformer
from training.step import Step, step_table
from training.torch_program import StaticCache

COMPILED = {"cuda": "reduce-overhead", "cpu": "default"}
"""Modes of ``torch.compile``; the first one captures CUDA graphs."""


def baselines(checkpoint: str, compiled: bool = True) -> Baselines:
    """What measures a checkpoint's transformer: (device, slots, length, rounds) -> seconds of a token by name.

    Raises:
        CheckpointError: it cannot be read, or has no transformer.
    """
    model = load_checkpoint(checkpoint).eval().requires_grad_(False)
    model.both()
    return lambda device, slots, length, rounds: measure(model, device, slots, length, rounds, compiled)


def measure(
    model: Model, device: str, slots: Sequence[int], length: int, rounds: int, compiled: bool = True
) -> dict[str, float]:
    """Seconds of one token at a length, by ``"NAME PRECISION bSLOTS"``.

    Raises:
        BackendError: PyTorch has no such device.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} has no CUDA; install one that has, or leave --checkpoint out")
    kind = torch.device(device).type
    _, net = model.both()
    seconds: dict[str, float] = {}
    formats = {"fp32": torch.float32, **({"fp16": torch.float16} if kind == "cuda" else {})}
    for precision, dtype in formats.items():
        there = copy.deepcopy(net).to(device, dtype)
        for b in slots:
            with torch.device(device):
                uncached = uncached_token(there, b, length)
            runs: dict[str, Callable[[], Any]] = {
                "uncached": on_device(uncached, device),
                "eager": cached_token(there, b, length, device),
            }
            if compiled and precision == list(formats)[-1]:
                runs["compiled"] = cached_token(there, b, length, device, COMPILED[kind])
            skipped = skipped_graphs()
            for name, timing in interleave(runs, rounds).items():
                graphless = name == "compiled" and skipped_graphs() > skipped
                seconds[f"{name}{' without graphs' if graphless else ''} {precision} b{b}"] = timing.median
    return seconds


def skipped_graphs() -> int:
    """How often Inductor has refused to make a CUDA graph in this process."""
    return int(counters["inductor"]["cudagraph_skips"])


def cached_token(
    model: StackedTransformer, slots: int, length: int, device: str, mode: str | None = None
) -> Callable[[], None]:
    """One token at one length with caches; ``mode`` of ``torch.compile``, None for eager."""
    table, cache = step_table(model), StaticCache()
    cache.seen = length + 1
    step: Any = Step(model, cache).to(device).eval()
    step = step if mode is None else torch.compile(step, mode=mode)
    state = middle_state(table, slots, length)
    host = {port.name: port.idle_values(slots) for port in table.inputs if port.role != CACHE} | state
    ports = {name: torch.from_numpy(values).to(device) for name, values in host.items()}
    dtype = model.content_emb.weight.dtype
    caches = [torch.zeros(port.sized(slots), dtype=dtype, device=device) for port in table.role(CACHE)]
    for tensor in caches:  # else Inductor makes no CUDA graphs, because they change in place
        torch._dynamo.mark_static_address(tensor)

    @torch.inference_mode()
    def run() -> None:
        step(ports, caches)

    return on_device(run, device)


def on_device(run: Callable[[], None], device: str) -> Callable[[], None]:
    """A run whose new tensors lie on a device, and that ends when the device has done it."""

    def waited() -> None:
        with torch.device(device):
            run()
        if device != "cpu":
            torch.cuda.synchronize(device)

    return waited
