"""An engine against PyTorch: ``python -m export.bench CKPT --engine DIR [--engine DIR ...]``.

Three baselines, all with the same weights, grammar and draws: ``uncached`` is what the released code does, the whole
sequence recomputed for every token; ``eager`` keeps key/value caches, written in place and read only as far as they
are filled; ``compiled`` is that under ``torch.compile``, with an assertion that Inductor generated code.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvq_rt.bench import EngineStep, Split, draw_images, given_requests, middle_state, step_bytes
from dvq_rt.decoding import cells_to_maps
from dvq_rt.engine import Engine, run_alone
from dvq_rt.files import write_file
from dvq_rt.labels import whole
from dvq_rt.timing import Reader, interleave, machine, ms, peak_memory, percent, ratio
from runtimes.errors import ConfigError, InputError
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.judging.report import table
from training.models.transformer import StackedTransformer
from training.torch_program import decode_loop

BASELINES = ("uncached", "compiled")
MOST = 1024
"""Largest number of slots, rounds and threads."""
UNCACHED_AT = (0.1, 0.4, 0.7, 1.0)
"""Where the uncached baseline of a whole image is timed, as shares of its length; between them it is interpolated."""


def torch_token(model: StackedTransformer, slots: int, length: int, compiled: bool = False) -> Callable[[], None]:
    """One token at one length in PyTorch with caches, as ``dvq_rt.bench.EngineStep`` takes it."""
    loop = decode_loop(model, slots, compiled)
    state = middle_state(loop.table, slots, length)

    def run() -> None:
        loop.set_state(state)
        loop.step()

    return run


def uncached_token(model: StackedTransformer, slots: int, length: int) -> Callable[[], None]:
    """The two stacks over a whole sequence of ``length`` + 1 tokens, with the last token's logits of both heads: what
    the released sampler computes for one token, its draws left out."""
    content = torch.zeros(slots, length + 1, dtype=torch.long)
    heads = model.layout.heads

    @torch.inference_mode()
    def run() -> None:
        hidden = model.hidden(content, content, torch.zeros_like(content))
        model.first_logits(hidden[:, -1])
        blocks, head, _ = model.parts(heads[1])
        x = hidden + model.parts(heads[0])[2](content)
        for block in blocks:
            x = block(x)
        head(x[:, -1])

    return run


def tokens_bench(
    model: Model, engines: dict[str, Engine], slots: int, length: int, rounds: int, baselines: Sequence[str]
) -> dict[str, Any]:
    """One token of ``slots`` slots: the baselines asked for, ``eager`` and every engine in turns, with DRAM read
    bandwidth."""
    _, net = model.both()
    reader = Reader()
    runs: dict[str, Callable[[], None]] = {"dram": reader.run}
    if "uncached" in baselines:
        runs["uncached"] = uncached_token(net, slots, length)
    runs["eager"] = torch_token(net, slots, length)
    if "compiled" in baselines:
        runs["compiled"] = torch_token(net, slots, length, True)
    runs |= {name: EngineStep(engine, slots, length).run for name, engine in engines.items()}
    timings = interleave(runs, rounds)
    dram = reader.bandwidth(timings.pop("dram"))
    shares = {
        name: sum(step_bytes(engine, slots, length).values()) / timings[name].median / dram
        for name, engine in engines.items()
        if "embeddings" in engine.manifest.parameters  # engines older than this command lack it
    }
    return {
        "slots": slots,
        "length": length,
        "dram_bytes_per_s": dram,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "of_dram": shares,
        "faster_than_eager": {name: ratio(timings["eager"], t) for name, t in timings.items() if name != "eager"},
    }


def torch_images(model: Model, slots: int, steps: int) -> Callable[[], None]:
    """Whole images in PyTorch with caches, forced along the engines' tokens, and the decoder."""
    vae, net = model.both()
    loop, requests = decode_loop(net, slots), given_requests(net.layout, [steps] * slots)

    @torch.inference_mode()
    def run() -> None:
        for event in run_alone(loop, requests):
            vae.decode_maps(torch.from_numpy(cells_to_maps(net.layout, event.cells)[0])[None])

    return run


def uncached_image(model: Model, slots: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of whole images without caches: tokens timed at several lengths and integrated, the decoder added."""
    vae, net = model.both()
    lengths = sorted({max(1, round(share * steps)) for share in UNCACHED_AT})
    seconds = []
    for length in lengths:
        run = uncached_token(net, slots, length - 1)
        seconds.append(interleave({"uncached": run}, rounds, least=0)["uncached"].median)
    every = np.arange(1, steps + 1)
    tokens = float(np.interp(every, [0, *lengths], [0, *seconds]).sum())
    codes = torch.zeros(slots, model.layout.sides[-1], model.layout.sides[-1], dtype=torch.long)
    with torch.inference_mode():
        decoder = interleave({"decoder": lambda: vae.decode_maps(codes)}, rounds, least=0)["decoder"].median
    return {"lengths": lengths, "token_s": seconds, "decoder_s": decoder, "total_s": tokens + decoder}


def images_bench(
    model: Model, engines: dict[str, Engine], slots: int, steps: int, rounds: int, eager: bool
) -> dict[str, Any]:
    """``slots`` whole images of about ``steps`` tokens: engines in turns, with the eager baseline if asked."""
    calls: dict[str, list[Split]] = {name: [] for name in engines}
    requests = given_requests(model.layout, [steps] * slots)

    def whole_images(name: str, engine: Engine) -> Callable[[], None]:
        loop = engine.loop(slots)
        return lambda: calls[name].append(draw_images(engine, loop, requests))

    runs = {name: whole_images(name, engine) for name, engine in engines.items()}
    if eager:
        runs["eager"] = torch_images(model, slots, steps)
    timings = interleave(runs, rounds, least=0)
    base = uncached_image(model, slots, steps, min(rounds, 3))
    result: dict[str, Any] = {"slots": slots, "steps": steps, "uncached": base}
    result["seconds"] = {name: t.to_dict() for name, t in timings.items()}
    result["faster_than_uncached"] = {name: base["total_s"] / t.median for name, t in timings.items()}
    if eager:
        result["faster_than_eager"] = {name: ratio(timings["eager"], timings[name]) for name in engines}
    result["split"] = {
        name: {part: float(np.median([getattr(s, part) for s in splits])) for part in ("step", "decoder", "host")}
        for name, splits in calls.items()
    }
    return result


def open_engines(model: Model, folders: Sequence[str], threads: int) -> dict[str, Engine]:
    """Engines by the format of their weights.

    Raises:
        InputError: two have the same.
        ConfigError: one was made from another model.
    """
    engines: dict[str, Engine] = {}
    for folder in folders:
        engine = Engine.open(folder, threads=threads)
        name = engine.manifest.weights
        if name in engines:
            raise InputError(f"two engines have {name} weights, {engines[name].path} and {folder}; give one of each")
        if engine.layout != model.layout:
            raise ConfigError(f"engine {folder} has another token layout than the checkpoint; export it anew")
        engines[name] = engine
    return engines


def report(result: dict[str, Any]) -> str:
    """Tables of what the command measured."""
    parts = []
    for r in result["token"]:
        rows = []
        for name, t in r["seconds"].items():
            factor = r["faster_than_eager"].get(name, {"median": 1.0, "low": 1.0, "high": 1.0})
            span = f"{factor['median']:.2f}x ({factor['low']:.2f} to {factor['high']:.2f})"
            share = f"{r['of_dram'][name]:.2f}" if name in r["of_dram"] else None
            rows.append([name, ms(t["median_s"]), percent(t["spread"]), span, share])
        title = f"One token, b{r['slots']}, length {r['length']}; DRAM read {r['dram_bytes_per_s'] / 1e9:.1f} GB/s"
        parts.append(title + "\n\n" + table(["", "median", "spread", "against eager", "of DRAM read"], rows))
    for r in result["image"]:
        rows = [["uncached (integrated)", f"{r['uncached']['total_s']:.2f} s", "1.0x", None]]
        for name, t in r["seconds"].items():
            split = r["split"].get(name)
            share = ", ".join(f"{part} {s / t['median_s']:.0%}" for part, s in split.items()) if split else None
            rows.append([name, f"{t['median_s']:.2f} s", f"{r['faster_than_uncached'][name]:.1f}x", share])
        title = f"{r['slots']} image(s) of {r['steps']} tokens, decoder included"
        parts.append(title + "\n\n" + table(["", "median", "against uncached", "split"], rows))
    parts.append(f"Peak memory of the process, PyTorch and all engines: {result['peak_bytes'] / 1e9:.2f} GB")
    return "\n\n".join(parts)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m export.bench", description="Engines against PyTorch.")
    parser.add_argument("checkpoint", help="checkpoint folder with both stages")
    parser.add_argument("--engine", action="append", required=True, metavar="DIR", help="made from it; repeat for more")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, help="tokens cached when one token is timed (half of the longest)")
    parser.add_argument(
        "--tokens", type=int, nargs="*", help="lengths of whole images (5/8 of the longest; none: skip)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-rounds", type=int, default=3)
    parser.add_argument(
        "--baselines", nargs="*", choices=BASELINES, default=BASELINES, help="beside eager; compiled needs a compiler"
    )
    parser.add_argument("--eager-images", action="store_true", help="also whole images with caches in eager PyTorch")
    parser.add_argument("--threads", type=int, help="of PyTorch and of the engines; one per core if left out")
    parser.add_argument("--out", help="write all numbers to this JSON file")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.checkpoint).eval().requires_grad_(False)
    longest = model.both()[1].layout.max_length
    length = longest // 2 if args.length is None else whole("--length", args.length, 0, longest - 1)
    tokens = [longest * 5 // 8] if args.tokens is None else [whole("--tokens", n, 1, longest) for n in args.tokens]
    for name, values in (
        ("--slots", args.slots),
        ("--rounds", [args.rounds]),
        ("--image-rounds", [args.image_rounds]),
        ("--threads", [1 if args.threads is None else args.threads]),
    ):
        for value in values:
            whole(name, value, 1, MOST)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    engines = open_engines(model, args.engine, torch.get_num_threads())
    began = time.monotonic()
    result: dict[str, Any] = {
        "machine": {**machine(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "checkpoint": args.checkpoint,
        "token": [tokens_bench(model, engines, b, length, args.rounds, args.baselines) for b in args.slots],
        "image": [
            images_bench(model, engines, b, steps, args.image_rounds, args.eager_images)
            for b in args.slots
            for steps in tokens
        ],
    }
    result |= {"peak_bytes": peak_memory(), "minutes": (time.monotonic() - began) / 60}
    if args.out:
        write_file(Path(args.out), (json.dumps(result, indent=1) + "\n").encode())
    print(report(result))


if __name__ == "__main__":
    main()
