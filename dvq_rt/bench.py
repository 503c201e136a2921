"""How fast an engine is: ``python -m dvq_rt bench``.

What is compared runs in turns, A B A B, and every number is a median over the turns, with its spread. DRAM
read bandwidth is measured in the same turns, because it is what bounds a step of one large model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.decoding import DecodeLoop, Request, Scheduler, cells_to_maps
from dvq_rt.engine import Engine
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout
from dvq_rt.step import CACHE, STATE, StepTable
from dvq_rt.timing import Reader, Timing, interleave, machine, ms, peak_memory, percent, ratio
from runtimes.errors import InputError


# --- one token -------------------------------------------------------------------------------------------------
def middle_state(table: StepTable, slots: int, length: int) -> dict[str, NDArray[Any]]:
    """State of slots that are all in the middle of an image, with ``length`` tokens cached and cells to fill.

    Raises:
        InputError: the layout has no sequence of that length and one token more.
    """
    layout = table.layout
    if not 0 <= length < layout.max_length:
        raise InputError(f"length is {length}; this engine takes 0 to {layout.max_length - 1}")
    state = {port.name: port.idle_values(slots) for port in table.role(STATE)}
    state["position"][:] = layout.position_offset(layout.segments - 1)
    state["length"][:] = length
    if "phase" in state:
        state["phase"][:] = layout.segments - 1
    state["done"][:] = False
    return state


class EngineStep:
    """One token of every slot at one length, again and again."""

    def __init__(self, engine: Engine, slots: int, length: int) -> None:
        self._state = middle_state(engine.table, slots, length)
        self.loop = engine.loop(slots)

    def run(self) -> None:
        self.loop.set_state(self._state)
        self.loop.step()
        if self.loop.poll > 1:  # a GPU has only been told
            self.loop.read("done")


def step_bytes(engine: Engine, slots: int, length: int) -> dict[str, int]:
    """Bytes that one token of every slot must read: ``weights`` (without embedding tables) and ``caches``."""
    manifest = engine.manifest
    narrow = manifest.precision != "fp32"
    size = 2 if narrow or manifest.weights == "fp16" else 4
    embeddings = manifest.parameters.get("embeddings", 0)
    stored = sum(entry["bytes"] for name, entry in manifest.files.items() if name.startswith("step.onnx"))
    # a plan holds more than weights
    weights = stored - size * embeddings if stored else size * (manifest.parameters["transformer"] - embeddings)
    if manifest.weights == "fp16" and not narrow:  # stored so, and read as float32
        weights *= 2
    row = 0
    for port in engine.table.role(CACHE):
        _, heads, _, width = port.sized(slots)
        row += heads * width * np.dtype(port.dtype).itemsize
    return {"weights": weights, "caches": slots * row * (length + 1)}


# --- whole images ----------------------------------------------------------------------------------------------
def given_requests(layout: TokenLayout, lengths: Sequence[int]) -> list[Request]:
    """Requests that are forced along random codes of about these lengths; where all images take as many tokens, of any
    image."""
    rng = np.random.default_rng(0)
    requests = []
    for i, length in enumerate(lengths):
        more = np.mean(layout.codes_per_cell[1:]) - 1 if layout.segments > 1 else 1.0  # codes that a finer cell adds
        finer = (length - layout.segments - layout.sides[0] ** 2) / more
        grain = layout.random_grain(rng, float(np.clip(finer / layout.sides[0] ** 2, 0, 1)))
        requests.append(Request.along(layout, layout.random_tokens(rng, grain=grain), key=i))
    return requests


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


def draw_images(engine: Engine, loop: DecodeLoop, requests: Sequence[Request], decode: bool = True) -> Split:
    """Draw requests and decode each as it ends, between two steps and not beside them as ``Generator.sample`` does, so
    that the time can be split."""
    split = Split(step=-loop.seconds, calls=-loop.calls)
    started = time.perf_counter()
    scheduler = Scheduler(loop)
    for request in requests:
        scheduler.submit(request)
    while scheduler.busy:
        for event in scheduler.step():
            if decode:
                began = time.perf_counter()
                engine.decode(cells_to_maps(engine.layout, event.cells)[0][None])
                split.decoder += time.perf_counter() - began
    split.total = time.perf_counter() - started
    split.step += loop.seconds
    split.calls += loop.calls
    return split


def mixed_lengths(engine: Engine, rounds: int, images: int = 64, slots: int = 8) -> dict[str, Any]:
    """Images of evenly spread lengths in random order: slots that refill, against batches that wait for the longest.

    ``seconds`` and step ``calls`` of both, decoding left out; ``ideal`` is what refilling could gain at most.
    """
    layout = engine.layout
    shortest = layout.sides[0] ** 2 + layout.segments if layout.covering else layout.max_length
    lengths = np.random.default_rng(1).permutation(np.linspace(shortest, layout.max_length - 1, images).astype(int))
    loop = engine.loop(slots)
    calls: dict[str, int] = {}
    requests = given_requests(layout, lengths.tolist())

    def continuous() -> None:
        calls["continuous"] = draw_images(engine, loop, requests, False).calls

    def static() -> None:
        groups = [requests[i : i + slots] for i in range(0, images, slots)]
        calls["static"] = sum(draw_images(engine, loop, group, False).calls for group in groups)

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


def prompt_times(engine: Engine, slots: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of drawing ``slots`` images of ``steps`` tokens behind prompts of no, 12 and the most tokens, in turns;
    ``calls`` of the step, and ``of_none``, how long one takes over one without prompts. Empty for models that read
    none."""
    if not engine.table.prompt:
        return []
    lengths = sorted({0, min(12, engine.table.prompt), engine.table.prompt})
    requests, loop = given_requests(engine.layout, [steps] * slots), engine.loop(slots)
    rows = np.zeros(loop.prefix_shape, np.float32)  # what they hold does not matter here
    calls: dict[int, int] = {}

    def run(length: int) -> Callable[[], Any]:
        asked = [replace(request, prompt=rows[:length]) for request in requests]
        return lambda: calls.update({length: draw_images(engine, loop, asked, False).calls})

    timings = interleave({str(length): run(length) for length in lengths}, rounds, least=0)
    of_calls = {length: np.array(timings[str(length)].seconds) / calls[length] for length in lengths}
    return [
        {"slots": slots, "prompt": length, "calls": calls[length], **timings[str(length)].to_dict()}
        | {"of_none": float(np.median(of_calls[length] / of_calls[0]))}
        for length in lengths
    ]


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


def tokenizer_times(engine: Engine, slots: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of the image encoder and decoder for each batch size, in turns."""
    side, size = engine.layout.sides[-1], engine.manifest.image_size
    codes = np.random.default_rng(0).integers(0, engine.layout.codebook_size, (max(slots), side, side))
    images = np.random.default_rng(0).uniform(-1, 1, (max(slots), 3, size, size)).astype(np.float32)
    programs = {name: engine.program(name) for name in ("encoder", "decoder")}
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
        JSON values: ``machine``, ``engine``, ``dram_bytes_per_s``, ``token``, ``image``, ``prompts`` and ``tokenizer``
        rows, ``growth``, ``mixed``, ``peak_bytes``.
    """
    engine, layout = generator.engine, generator.layout
    length = layout.max_length // 2 if length is None else length
    steps = layout.max_length * 5 // 8 if steps is None else steps
    grown = growth(generator, images)  # first, so that its peak memory is its own
    reader = Reader()
    runs = {"dram": reader.run, **{f"b{b}": EngineStep(engine, b, length).run for b in slots}}
    timings = interleave(runs, rounds)
    dram = reader.bandwidth(timings["dram"])
    del reader, runs
    token = []
    for b in slots:
        size, timing = step_bytes(engine, b, length), timings[f"b{b}"]
        row = {"slots": b, "length": length, **timing.to_dict(), "bytes": size}
        known = "embeddings" in generator.manifest.parameters  # engines older than this command lack it
        row["of_dram"] = sum(size.values()) / timing.median / dram if known else None
        token.append(row)
    image = []
    for b in slots:
        loop = engine.loop(b)
        splits = [draw_images(engine, loop, given_requests(layout, [steps] * b)) for _ in range(rounds)]
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
        "prompts": prompt_times(engine, max(slots), steps, rounds),
        "tokenizer": tokenizer_times(engine, slots, rounds),
        "growth": grown,
        "mixed": mixed_lengths(engine, rounds) if mixed else None,
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
    for r in result["prompts"]:
        remark = f"{r['calls']} steps, {r['of_none']:.3f} times as long each as without prompts"
        name = f"{r['slots']} image(s) behind {r['prompt']} tokens"
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
