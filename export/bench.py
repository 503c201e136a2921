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

from dvq_rt.bench import (
    EngineStep,
    Reader,
    draw_images,
    given_jobs,
    interleave,
    machine,
    middle_state,
    ms,
    peak_memory,
    percent,
    ratio,
    step_bytes,
)
from dvq_rt.decoding import Loop
from dvq_rt.files import write_file
from dvq_rt.generator import Generator
from export.torch_program import TorchStep
from runtimes.errors import ConfigError, ExportError, InputError
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.judging.report import table
from training.models.transformer import StackedTransformer

BASELINES = ("uncached", "compiled")
UNCACHED_AT = (0.1, 0.4, 0.7, 1.0)
"""Where the uncached baseline of a whole image is timed, as shares of its length; between them it is interpolated."""


def torch_token(model: StackedTransformer, slots: int, length: int, compiled: bool = False) -> Callable[[], None]:
    """One token at one length in PyTorch with caches, as ``dvq_rt.bench.EngineStep`` takes it."""
    step, state = TorchStep(model, slots, compiled), middle_state(model.layout, slots, length)

    def run() -> None:
        step.place(state, length)
        step.run()

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
    model: Model, engines: dict[str, Generator], slots: int, length: int, rounds: int, baselines: Sequence[str]
) -> dict[str, Any]:
    """One token of ``slots`` slots: the baselines asked for, ``eager`` and every engine in turns, with DRAM read
    bandwidth."""
    net = model.transformer
    assert net is not None
    reader = Reader()
    runs: dict[str, Callable[[], None]] = {"dram": reader.run}
    if "uncached" in baselines:
        runs["uncached"] = uncached_token(net, slots, length)
    runs["eager"] = torch_token(net, slots, length)
    if "compiled" in baselines:
        runs["compiled"] = torch_token(net, slots, length, True)
    runs |= {name: EngineStep(generator, slots, length).run for name, generator in engines.items()}
    timings = interleave(runs, rounds)
    dram = reader.bandwidth(timings.pop("dram"))
    shares = {
        name: sum(step_bytes(generator, slots, length).values()) / timings[name].median / dram
        for name, generator in engines.items()
        if "embeddings" in generator.manifest.parameters  # engines older than this command lack it
    }
    return {
        "slots": slots,
        "length": length,
        "dram_bytes_per_s": dram,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "of_dram": shares,
        "faster_than_eager": {name: ratio(timings["eager"], t) for name, t in timings.items() if name != "eager"},
    }


def torch_image(model: Model, slots: int, steps: int) -> Callable[[], None]:
    """Whole images in PyTorch with caches: ``steps`` tokens of every slot, and the decoder."""
    net, vae = model.transformer, model.tokenizer
    assert net is not None and vae is not None
    step, side = TorchStep(net, slots), model.layout.sides[-1]
    codes = torch.zeros(slots, side, side, dtype=torch.long)

    @torch.inference_mode()
    def run() -> None:
        for t in range(steps):
            step.place(middle_state(model.layout, slots, t), t)
            step.run()
        vae.decode_maps(codes)

    return run


def uncached_image(model: Model, slots: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of whole images without caches: tokens timed at several lengths and integrated, the decoder added."""
    net, vae = model.transformer, model.tokenizer
    assert net is not None and vae is not None
    lengths = sorted({max(1, round(share * steps)) for share in UNCACHED_AT})
    found = []
    for length in lengths:
        run = uncached_token(net, slots, length - 1)
        found.append(interleave({"uncached": run}, rounds, least=0)["uncached"].median)
    every = np.arange(1, steps + 1)
    tokens = float(np.interp(every, [0, *lengths], [0, *found]).sum())
    codes = torch.zeros(slots, model.layout.sides[-1], model.layout.sides[-1], dtype=torch.long)
    with torch.inference_mode():
        decoder = interleave({"decoder": lambda: vae.decode_maps(codes)}, rounds, least=0)["decoder"].median
    return {"lengths": lengths, "token_s": found, "decoder_s": decoder, "total_s": tokens + decoder}


def images_bench(
    model: Model, engines: dict[str, Generator], slots: int, steps: int, rounds: int, eager: bool
) -> dict[str, Any]:
    """``slots`` whole images of about ``steps`` tokens: engines in turns, with the eager baseline if asked."""
    loops = {name: generator._new_loop(slots) for name, generator in engines.items()}
    calls: dict[str, list[Any]] = {name: [] for name in engines}

    def whole(name: str, generator: Generator, loop: Loop) -> Callable[[], None]:
        jobs = given_jobs(generator.layout, [steps] * slots)

        def run() -> None:
            for job in jobs:
                job.steps = 0
            calls[name].append(draw_images(generator, loop, jobs))

        return run

    runs = {name: whole(name, engines[name], loop) for name, loop in loops.items()}
    if eager:
        runs["eager"] = torch_image(model, slots, steps)
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


def open_engines(model: Model, folders: list[str], threads: int) -> dict[str, Generator]:
    """Engines by the format of their weights.

    Raises:
        InputError: two have the same.
        ConfigError: one was made from another model.
    """
    found: dict[str, Generator] = {}
    for folder in folders:
        generator = Generator(folder, threads=threads)
        name = generator.manifest.weights
        if name in found:
            raise InputError(f"two engines have {name} weights, {found[name].path} and {folder}; give one of each")
        if generator.layout != model.layout:
            raise ConfigError(f"engine {folder} has another token layout than the checkpoint; export it anew")
        found[name] = generator
    return found


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
    if model.tokenizer is None or model.transformer is None:
        raise ExportError("the checkpoint lacks a stage; the benchmark needs both")
    if args.threads:
        torch.set_num_threads(args.threads)
    engines = open_engines(model, args.engine, args.threads or torch.get_num_threads())
    longest = model.layout.max_length
    length = longest // 2 if args.length is None else args.length
    began = time.monotonic()
    result: dict[str, Any] = {
        "machine": {**machine(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "checkpoint": args.checkpoint,
        "token": [tokens_bench(model, engines, b, length, args.rounds, args.baselines) for b in args.slots],
        "image": [
            images_bench(model, engines, b, steps, args.image_rounds, args.eager_images)
            for b in args.slots
            for steps in ([longest * 5 // 8] if args.tokens is None else args.tokens)
        ],
    }
    result |= {"peak_bytes": peak_memory(), "minutes": (time.monotonic() - began) / 60}
    if args.out:
        write_file(Path(args.out), (json.dumps(result, indent=1) + "\n").encode())
    print(report(result))


if __name__ == "__main__":
    main()
