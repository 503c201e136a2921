"""What quantisation costs: ``python -m export.accuracy CKPT DATA ENGINE...``.

Engines are forced along the codes of held-out images and compared with the checkpoint in PyTorch at float32, in the
kernels that they run in, at every choice that the model has: positions of all segments but the last, whose order is
fixed, and codes. Their decoders' images of the same codes are compared too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.codes import Codes
from dvq_rt.decoding import Job
from dvq_rt.files import write_file
from dvq_rt.generator import Generator
from dvq_rt.images import to_uint8
from dvq_rt.layout import HEADS, Tokens
from dvq_rt.sampling import SamplingParams, uniforms
from export.steps import draw
from export.torch_program import teacher_forced
from runtimes.errors import ConfigError, ExportError
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded, read_config
from training.data import ImageFolder
from training.judging.report import table
from training.loop import TrainConfig
from training.losses import psnr
from training.train_transformer import StageTwoConfig, tokenise

Logits = dict[str, NDArray[np.float32]]


def held_out(model: Model, data: str | Path, config: str, images: int | None) -> list[Tokens]:
    """Token sequences of the images that training of stage 2 did not see.

    Raises:
        ConfigError: the checkpoint's labels are not the configuration's, or no image is held out.
    """
    sections: dict[str, Any] = {"transformer": dict, "training": TrainConfig, "stage": StageTwoConfig}
    settings = read_config(config, sections, [])
    stage, names, vae = settings["stage"], model.class_names, model.tokenizer
    if vae is None or model.transformer is None:
        raise ExportError("the checkpoint lacks a stage; give one of training.train_transformer")
    if not set(names) <= set(stage.labels):
        raise ConfigError(
            f"the checkpoint's labels {list(names)} are not in {config}; give the --config of its training"
        )
    labels = {name: stage.labels[name] for name in names} or stage.labels or None
    folder = ImageFolder(
        data, vae.config.image_size, val_fraction=stage.val_fraction, seed=settings["training"].seed, labels=labels
    )
    if names and folder.classes != list(names):
        raise ConfigError(f"the checkpoint's labels are {list(names)}, the data's {folder.classes}; reorder --config")
    folder.check_held_out()
    chosen = folder.val[:images]
    chunks = ((pixels, folder.labels[kept]) for pixels, kept in folder.chunks(chosen, 16))
    codes = tokenise(vae, chunks, len(chosen), "tokenising held-out images")
    starts = codes.labels if names else np.zeros_like(codes.labels)
    return [model.layout.to_tokens(c, g, int(y)) for c, g, y in zip(codes.codes, codes.grain, starts, strict=True)]


def choices(model: Model, tokens: Tokens) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Per head the steps at which there is a choice, and what the image has there (local position ids)."""
    layout, segment = model.layout, tokens.segment[1:]
    offsets = np.array([layout.position_offset(s) for s in range(layout.segments)])
    local = tokens.position[1:] - offsets[segment]
    start = np.array([layout.position_sos(s) for s in range(layout.segments)])[segment]
    free = (local < start) & ((segment < layout.segments - 1) | (not layout.covering))
    coded = tokens.content[1:] < layout.codebook_size
    return {
        "position": (np.flatnonzero(free), local[free]),
        "content": (np.flatnonzero(coded), tokens.content[1:][coded]),
    }


def engine_logits(generator: Generator, rows: list[Tokens]) -> list[Logits]:
    """Both heads' logits, [steps, V] each, of an engine forced along sequences."""
    layout, params = generator.layout, SamplingParams(positions="drawn")
    loop = generator._new_loop(min(8, len(rows)))
    jobs = [
        Job(
            i,
            int(row.content[0]) - layout.content_sos,
            uniforms(0, i, layout.max_length),
            params,
            (row[1][1:], row[0][1:]),
        )
        for i, row in enumerate(rows)
    ]
    seen: list[dict[str, list[NDArray[np.float32]]]] = [{head: [] for head in HEADS} for _ in rows]

    def watch(active: dict[int, Job]) -> None:
        for slot, job in active.items():
            for head, found in seen[job.index].items():
                found.append(loop.report(f"{head}_logits")[slot].copy())

    for _ in loop.run(jobs, watch=watch):
        pass
    return [{head: np.stack(found) for head, found in heads.items()} for heads in seen]


def compare(model: Model, rows: list[Tokens], found: list[Logits]) -> dict[str, dict[str, float]]:
    """Per head and for both: ``choices``, ``logit_error`` (largest, relative to the row's largest logit), ``top1``
    (share of choices with the same most probable token), ``draw`` (share with the same token drawn by the same random
    number from the whole vocabulary), ``nll`` and ``nll_fp32`` (nats per choice) and ``nll_change``, their relative
    difference; all before the grammar's mask."""
    assert model.transformer is not None
    sums = {head: np.zeros(5) for head in HEADS}
    errors = dict.fromkeys(HEADS, 0.0)
    for i, (row, got) in enumerate(zip(rows, found, strict=True)):
        random = torch.from_numpy(uniforms(0, i, model.layout.max_length))
        want = dict(
            zip(HEADS, teacher_forced(model.transformer, row.content.tolist(), row.position.tolist()), strict=True)
        )
        for head, (steps, target) in choices(model, row).items():
            reached = steps < len(got[head])
            steps, wanted = steps[reached], torch.from_numpy(target[reached])
            uniform = random[steps, HEADS.index(head)]
            mine, exact = torch.from_numpy(got[head][steps]), want[head][steps]
            errors[head] = max(errors[head], float((mine - exact).abs().max() / exact.abs().max()))
            sums[head] += [
                len(steps),
                float((mine.argmax(-1) == exact.argmax(-1)).sum()),
                float((plain_draw(mine, uniform) == plain_draw(exact, uniform)).sum()),
                float(torch.nn.functional.cross_entropy(mine, wanted, reduction="sum")),
                float(torch.nn.functional.cross_entropy(exact, wanted, reduction="sum")),
            ]
    parts = {**sums, "both": sum(sums.values(), np.zeros(5))}
    return {
        name: {
            "choices": float(count),
            "logit_error": errors.get(name, max(errors.values())),
            "top1": same / count,
            "draw": drawn / count,
            "nll": mine / count,
            "nll_fp32": exact / count,
            "nll_change": mine / exact - 1,
        }
        for name, (count, same, drawn, mine, exact) in parts.items()
    }


def plain_draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The step's draw for logits [N, V] and random numbers [N], without mask and filters; int64 [N]."""
    count, width = logits.shape
    one, none = torch.ones(count), torch.zeros(count, dtype=torch.bool)
    everything = torch.full((count,), width)
    allowed = torch.ones(1, width, dtype=torch.bool)
    return draw(logits, allowed, uniform, one, everything, one, everything, none)[0]


@torch.no_grad()
def decoder_psnr(model: Model, generator: Generator, rows: list[Tokens]) -> float:
    """Mean PSNR in dB of an engine's images of held-out codes against the checkpoint's, both of 8 bits."""
    assert model.tokenizer is not None
    found = []
    for row in rows:
        codes, grain = model.layout.to_map(row.content.tolist(), row.position.tolist())
        mine = generator.decode(Codes(codes, grain.astype(np.int8), model.layout))
        exact = to_uint8(model.tokenizer.decode_maps(torch.from_numpy(codes)[None]).numpy())
        found.append(psnr(*(torch.from_numpy(pixels) / 127.5 - 1 for pixels in (exact, mine))))
    return float(torch.cat(found).mean())


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m export.accuracy", description="What an engine's weights cost.")
    parser.add_argument("checkpoint", help="checkpoint folder with both stages")
    parser.add_argument("data", help="folder of images that it was trained on")
    parser.add_argument("engines", nargs="+", metavar="ENGINE", help="engine folders that were exported from it")
    parser.add_argument("--config", default="emoji_transformer", help="stage 2: JSON file, or a name in configs")
    parser.add_argument("--images", type=int, help="number of held-out images; all if left out")
    parser.add_argument("--out", help="write all numbers to this JSON file")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.checkpoint).eval().requires_grad_(False)
    generators = [Generator(path) for path in args.engines]
    for generator in generators:
        if generator.layout != model.layout:
            raise ConfigError(
                f"engine {generator.path} has another token layout than {args.checkpoint}; export it anew"
            )
    rows = held_out(model, args.data, args.config, args.images)
    result: list[dict[str, Any]] = []
    for generator in generators:
        parts = compare(model, rows, engine_logits(generator, rows))
        entry = {"engine": str(generator.path), "weights": generator.manifest.weights, "heads": parts}
        result.append({**entry, "psnr": decoder_psnr(model, generator, rows)})
    if args.out:
        write_file(Path(args.out), (json.dumps(result, indent=1) + "\n").encode())
    print(f"{len(rows)} held-out images")
    shown = [
        [
            *(entry["weights"], head, f"{r['choices']:.0f}", f"{r['logit_error']:.4f}", f"{r['top1']:.4f}"),
            f"{r['draw']:.4f}",
            *(f"{r['nll_fp32']:.4f}", f"{r['nll']:.4f}", f"{r['nll_change']:+.3%}"),
        ]
        for entry in result
        for head, r in entry["heads"].items()
    ]
    print(table(["weights", "head", "choices", "logit error", "top-1", "draw", "nats fp32", "nats", "change"], shown))
    print(table(["weights", "decoder's PSNR to fp32"], [[r["weights"], f"{r['psnr']:.1f} dB"] for r in result]))


if __name__ == "__main__":
    main()
