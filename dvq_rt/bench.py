"""How fast an engine is: ``python -m dvq_rt bench``.

What is compared runs in turns, A B A B, and every number is a median over the turns, with its spread. DRAM
read bandwidth is measured in the same turns, because it is what bounds a step of one large model.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.decoding import Event, Job, Loop
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout, Tokens
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import InputError
from runtimes.onnxruntime import import_onnxruntime

PAUSE = 0.1
"""Seconds between two competitors, for idle threads of the first to stop spinning."""
READER_BYTES = 512 * 2**20
Runs = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one thing in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)

    def to_dict(self) -> dict[str, Any]:
        return {"median_s": self.median, "spread": self.spread, "seconds": list(self.seconds)}


def interleave(runs: Runs, rounds: int, least: float = 0.3, pause: float = PAUSE) -> dict[str, Timing]:
    """Time several things in turns.

    In each round every one runs once unmeasured, then as often as fits into ``least`` seconds, at least once; the
    round's number is the fastest of those, because what other programs do can only add to it.

    Raises:
        InputError: ``rounds`` is not positive.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; it must be at least 1")
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(pause)
            run()
            times: list[float] = []
            while not times or sum(times) < least:
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
            found[name].append(min(times))
    return {name: Timing(tuple(times)) for name, times in found.items()}


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster ``fast`` is: the median over the rounds of the ratio in each, its lowest and highest."""
    ratios = np.array(slow.seconds) / np.array(fast.seconds)
    return {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}


class Reader:
    """Reads ``READER_BYTES`` of memory with one thread per core; ``run`` once per pass."""

    def __init__(self, threads: int | None = None) -> None:
        count = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(count)
        self._parts = np.array_split(np.ones(READER_BYTES // 4, np.int32), count)

    def run(self) -> None:
        list(self._pool.map(np.max, self._parts))

    def bandwidth(self, timing: Timing) -> float:
        """Bytes per second of a timing of ``run``."""
        return READER_BYTES / timing.median


# --- one token -------------------------------------------------------------------------------------------------
def middle_state(layout: TokenLayout, slots: int, length: int) -> dict[str, NDArray[Any]]:
    """State of slots that are all in the middle of an image, with ``length`` tokens cached and cells to fill.

    Raises:
        InputError: the layout has no sequence of that length and one token more.
    """
    if not 0 <= length < layout.max_length:
        raise InputError(f"length is {length}; this engine takes 0 to {layout.max_length - 1}")
    return {
        "content": np.zeros(slots, np.int64),
        "position": np.full(slots, layout.position_offset(layout.segments - 1), np.int64),
        "length": np.full(slots, length, np.int32),
        "done": np.zeros(slots, bool),
        "cells": np.full((slots, layout.cells), -1, np.int32),
    }


class EngineStep:
    """One token of every slot at one length, again and again."""

    def __init__(self, generator: Generator, slots: int, length: int) -> None:
        self._state = middle_state(generator.layout, slots, length)
        self._loop = generator._new_loop(slots)

    def run(self) -> None:
        self._loop.set_state(self._state)
        self._loop.step()


def step_bytes(generator: Generator, slots: int, length: int) -> dict[str, int]:
    """Bytes that one token of every slot must read: ``weights`` (without embedding tables) and ``caches``."""
    manifest = generator.manifest
    stored = sum(entry["bytes"] for name, entry in manifest.files.items() if name.startswith("step.onnx"))
    size = 2 if manifest.weights == "fp16" else 4
    weights = stored - size * manifest.parameters.get("embeddings", 0)
    specs = {spec["name"]: spec for spec in manifest.step["inputs"]}
    caches = [specs[name] for name, _ in manifest.step["caches"]]
    row = sum(spec["shape"][1] * spec["shape"][3] * np.dtype(spec["dtype"]).itemsize for spec in caches)
    return {"weights": weights * (4 // size if size == 2 else 1), "caches": slots * row * (length + 1)}


# --- whole images ----------------------------------------------------------------------------------------------
def given_tokens(layout: TokenLayout, steps: int, rng: np.random.Generator, label: int = 0) -> Tokens:
    """Random codes of an image that takes about ``steps`` tokens, or of any image if all take as many."""
    grain = np.zeros(layout.sides[0] ** 2, np.int64)
    if not layout.covering:
        grain[rng.permutation(grain.size)[layout.filled_cells :]] = -1
    elif layout.segments > 1:  # every region that is one level finer has ``more`` codes instead of one
        more = (layout.sides[1] // layout.sides[0]) ** 2
        finer = round((steps - 2 - grain.size) / (more - 1))
        grain[rng.permutation(grain.size)[: max(0, finer)]] = 1  # at most all of them
    codes = rng.integers(0, layout.codebook_size, layout.cells)
    return layout.to_tokens(codes, grain, label)


def given_jobs(layout: TokenLayout, lengths: Sequence[int]) -> list[Job]:
    """Jobs that are forced along random codes of about these lengths."""
    rng, params = np.random.default_rng(0), SamplingParams(positions="drawn")
    jobs = []
    for i, length in enumerate(lengths):
        tokens = given_tokens(layout, length, rng)
        forced = (tokens.position[1:], tokens.content[1:])
        jobs.append(Job(i, 0, uniforms(0, i, layout.max_length), params, forced))
    return jobs


@dataclass(slots=True)
class Split:
    """Seconds of one call: inside the ``step`` graph, inside the ``decoder``, and in all; ``calls`` of the step."""

    step: float = 0.0
    decoder: float = 0.0
    total: float = 0.0
    calls: int = 0

    @property
    def host(self) -> float:
        return self.total - self.step - self.decoder


def draw_images(generator: Generator, loop: Loop, jobs: list[Job], decode: bool = True) -> Split:
    """Draw jobs and decode each as it ends, between two steps and not beside them as ``Generator.sample`` does, so
    that the time can be split."""
    split, step = Split(), loop.step

    def timed() -> None:
        began = time.perf_counter()
        step()
        split.step += time.perf_counter() - began
        split.calls += 1

    def finish(event: Event) -> None:
        began = time.perf_counter()
        generator.decode(generator._codes(event))
        split.decoder += time.perf_counter() - began

    loop.step = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        for event in loop.run(jobs):
            if decode:
                finish(event)
    finally:
        loop.step = step  # type: ignore[method-assign]
    split.total = time.perf_counter() - began
    return split


def mixed_lengths(generator: Generator, rounds: int, images: int = 64, slots: int = 8) -> dict[str, Any]:
    """Images of evenly spread lengths in random order: slots that refill, against batches that wait for the longest.

    ``seconds`` and step ``calls`` of both, decoding left out; ``ideal`` is what refilling could gain at most.
    """
    layout = generator.layout
    shortest = layout.sides[0] ** 2 + 2 if layout.covering else layout.max_length
    lengths = np.random.default_rng(1).permutation(np.linspace(shortest, layout.max_length - 1, images).astype(int))
    loop = generator._new_loop(slots)
    calls: dict[str, int] = {}

    def continuous() -> None:
        calls["continuous"] = draw_images(generator, loop, given_jobs(layout, lengths.tolist()), False).calls

    def static() -> None:
        jobs = given_jobs(layout, lengths.tolist())
        groups = [jobs[i : i + slots] for i in range(0, images, slots)]
        calls["static"] = sum(draw_images(generator, loop, group, False).calls for group in groups)

    timings = interleave({"static": static, "continuous": continuous}, rounds, least=0)
    longest = [max(lengths[i : i + slots]) for i in range(0, images, slots)]
    return {
        "images": images,
        "slots": slots,
        "calls": calls,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "ratio": ratio(timings["static"], timings["continuous"]),
        "ideal": float(np.mean(longest) / np.mean(lengths)),
    }


def growth(generator: Generator, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds and the process's peak memory after drawing so many images, fewest first."""
    rows = []
    label = 0 if generator.layout.classes else None
    for count in sorted(counts):
        began = time.perf_counter()
        samples = generator.sample(count, label)
        seconds = time.perf_counter() - began
        tokens = sum(c.length for c in samples.codes)
        rows.append({"images": count, "codes": tokens, "seconds": seconds, "peak_bytes": peak_memory()})
    return rows


def peak_memory() -> int:
    """Most resident bytes that the process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        name = {key.strip(): value.strip() for key, value in fields.items()}.get("model name", name)
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": import_onnxruntime().__version__,
    }


def tokenizer_times(generator: Generator, slots: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of the image encoder and decoder for each batch size, in turns."""
    side, size = generator.layout.sides[-1], generator.manifest.image_size
    codes = np.random.default_rng(0).integers(0, generator.layout.codebook_size, (max(slots), side, side))
    images = np.random.default_rng(0).uniform(-1, 1, (max(slots), 3, size, size)).astype(np.float32)
    programs = {name: generator._program(name) for name in ("encoder", "decoder")}
    given: dict[str, dict[str, NDArray[Any]]] = {"encoder": {"images": images}, "decoder": {"codes": codes}}

    def run(part: str, count: int) -> Callable[[], Any]:
        inputs = {name: values[:count] for name, values in given[part].items()}
        return lambda: programs[part].run(inputs)

    runs = {(part, b): run(part, b) for part in programs for b in slots}
    timings = interleave({f"{part} {b}": call for (part, b), call in runs.items()}, rounds, least=0)
    return [{"part": part, "slots": b, **timings[f"{part} {b}"].to_dict()} for part, b in runs]


# --- the command -----------------------------------------------------------------------------------------------
def bench(
    generator: Generator,
    *,
    slots: Sequence[int] = (1, 8),
    length: int | None = None,
    rounds: int = 5,
    images: Sequence[int] = (1, 10),
    steps: int | None = None,
    mixed: bool = False,
) -> dict[str, Any]:
    """Measure one engine.

    Args:
        slots: batch sizes.
        length: tokens cached when one token is timed; None takes half of the longest sequence.
        rounds: turns.
        images: numbers of images that ``growth`` draws; empty leaves it out.
        steps: tokens of the images whose time is split; None takes five eighths of the longest sequence.
        mixed: also compare refilled slots with static batches, which takes long for large models.

    Returns:
        JSON values: ``machine``, ``engine``, ``dram_bytes_per_s``, ``token``, ``image`` and ``tokenizer`` rows,
        ``growth``, ``mixed``, ``peak_bytes``.
    """
    layout = generator.layout
    length = layout.max_length // 2 if length is None else length
    steps = layout.max_length * 5 // 8 if steps is None else steps
    grown = growth(generator, images)  # first, so that its peak memory is its own
    reader = Reader()
    runs = {"dram": reader.run, **{f"b{b}": EngineStep(generator, b, length).run for b in slots}}
    timings = interleave(runs, rounds)
    dram = reader.bandwidth(timings["dram"])
    del reader, runs
    token = []
    for b in slots:
        size, found = step_bytes(generator, b, length), timings[f"b{b}"]
        row = {"slots": b, "length": length, **found.to_dict(), "bytes": size}
        known = "embeddings" in generator.manifest.parameters  # engines older than this command lack it
        row["of_dram"] = sum(size.values()) / found.median / dram if known else None
        token.append(row)
    image = []
    for b in slots:
        loop = generator._new_loop(b)
        splits = [draw_images(generator, loop, given_jobs(layout, [steps] * b)) for _ in range(rounds)]
        middle = sorted(splits, key=lambda s: s.total)[len(splits) // 2]
        seconds = Timing(tuple(s.total for s in splits)).to_dict()
        parts = {name: getattr(middle, name) for name in ("step", "decoder", "host", "calls")}
        image.append({"slots": b, "steps": steps, **seconds, **parts})
    manifest = generator.manifest
    return {
        "machine": machine(),
        "engine": {"path": str(generator.path), "weights": manifest.weights, "parameters": manifest.parameters},
        "dram_bytes_per_s": dram,
        "token": token,
        "image": image,
        "tokenizer": tokenizer_times(generator, slots, rounds),
        "growth": grown,
        "mixed": mixed_lengths(generator, rounds) if mixed else None,
        "peak_bytes": peak_memory(),
    }


def report(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table of what ``bench`` returns, headed."""
    rows: list[tuple[str, ...]] = [("what", "median", "spread", "remarks")]
    rows.append(("DRAM read", f"{result['dram_bytes_per_s'] / 1e9:.1f} GB/s", "", ""))
    for r in result["token"]:
        read = sum(r["bytes"].values())
        share = "unknown share" if r["of_dram"] is None else f"{r['of_dram']:.2f}"
        remark = f"{read / 1e6:.1f} MB, {share} of DRAM read"
        rows.append((f"token, b{r['slots']}, length {r['length']}", ms(r["median_s"]), percent(r["spread"]), remark))
    for r in result["image"]:
        total = r["step"] + r["decoder"] + r["host"]
        remark = ", ".join(f"{name} {r[name] / total:.1%}" for name in ("step", "decoder", "host"))
        name = f"{r['slots']} image(s) of {r['steps']} tokens"
        rows.append((name, ms(r["median_s"]), percent(r["spread"]), remark))
    for r in result["tokenizer"]:
        remark = f"{r['median_s'] / r['slots'] * 1e3:.2f} ms an image"
        rows.append((f"{r['part']}, b{r['slots']}", ms(r["median_s"]), percent(r["spread"]), remark))
    for r in result["growth"]:
        remark = f"{r['seconds'] / r['images'] * 1e3:.1f} ms an image, peak {r['peak_bytes'] / 1e6:.0f} MB"
        rows.append((f"sample({r['images']})", ms(r["seconds"]), "", remark))
    if mixed := result["mixed"]:
        for name, r in mixed["seconds"].items():
            remark = f"{mixed['calls'][name]} steps of {mixed['slots']} slots"
            rows.append((f"{mixed['images']} mixed, {name}", ms(r["median_s"]), percent(r["spread"]), remark))
        rows.append(("refilled against static", f"{mixed['ratio']['median']:.2f}x", "", f"ideal {mixed['ideal']:.2f}x"))
    return rows


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def percent(share: float) -> str:
    return f"{share:.1%}"
