"""What an engine for CUDA consists of, and how long a token should take: ``python -m export.coverage ENGINE...``.

    seconds = bytes / bandwidth + calls * gap

``bytes`` are the weights and cache rows that a token reads, ``bandwidth`` is the published one of a card, ``calls`` are
counted from the step's operators, and ``gap``, the time from one call of a CUDA graph to the next, is assumed. Nothing
of this has been measured on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from dvq_rt.bench import step_bytes
from dvq_rt.engine import Engine
from export.coverage.check import Coverage, check_coverage
from runtimes.errors import InputError
from training.cli import guarded
from training.judging.report import table

CARDS = {"H100 SXM": 3.35e12, "RTX 4090": 1.008e12}
"""Bytes per second, as NVIDIA publishes them."""
GAPS = (1e-6, 2e-6)
"""Seconds from one call of a CUDA graph to the next, at best and at worst; assumed."""
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity")
CALLS = {"GroupQueryAttention": 4, "Gelu": 0, "TopK": 2, "CumSum": 2}
"""Calls of operators that make other than one: two or three kernels with their memsets, and a Gelu that is one with
the bias before it. Attention over a cache that is too short to be split makes one call. The sum is 2 % under the count
in docs/gpu.md for the DQ demo, and 6 % over that for the MQ demo."""


class Prediction(NamedTuple):
    """Seconds of one token on a card: reading alone, and with the calls at the shortest and the longest gap."""

    card: str
    reading: float
    best: float
    worst: float


def calls_of(step: Coverage) -> int:
    """Calls of one token: kernels, products, memsets and copies on the device."""
    return sum(CALLS.get(name, 1) * count for name, count in step.on_cuda.items() if name not in VIEWS)


def predict(size: int, calls: int) -> list[Prediction]:
    """Times of a token that reads ``size`` bytes and makes so many calls, on every card."""
    return [
        Prediction(card, size / speed, *(size / speed + calls * gap for gap in GAPS)) for card, speed in CARDS.items()
    ]


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m export.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="+", help="engines of export.to_onnx --target cuda")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, help="tokens cached (half of the longest)")
    args = parser.parse_args(argv)
    for folder in args.engines:
        engine = Engine.open(folder, device="cpu")
        if engine.manifest.target != "cuda" or engine.manifest.backend != "onnxruntime":
            raise InputError(f"engine {folder} is not for ONNX Runtime on CUDA; export it with --target cuda")
        covered = {part: check_coverage(Path(folder) / f"{part}.onnx") for part in engine.manifest.graphs}
        print(folder, *covered.values(), sep="\n")
        length = engine.layout.max_length // 2 if args.length is None else args.length
        calls = calls_of(covered["step"])
        rows = []
        for slots in args.slots:
            size = sum(step_bytes(engine, slots, length).values())
            for p in predict(size, calls):
                span = f"{p.best * 1e3:.2f} to {p.worst * 1e3:.2f} ms"
                rows.append([p.card, str(slots), f"{size / 1e6:.1f} MB", f"{p.reading * 1e3:.3f} ms", str(calls), span])
        print(table(["card", "slots", "reads", "reading alone", "calls", "predicted, one token"], rows))


if __name__ == "__main__":
    main()
