"""What quantization costs: ``python -m export.accuracy CKPT DATA ENGINE...``.

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

from dvq_rt.engine import Engine
from dvq_rt.files import write_file
from dvq_rt.images import to_uint8
from dvq_rt.labels import whole
from dvq_rt.layout import HEADS, Tokens
from dvq_rt.sampling import uniforms
from runtimes.errors import ConfigError
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.config import read_config
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.judging.metrics import psnr
from training.judging.report import table
from training.step import sample_token
from training.torch_program import teacher_forced
from training.train_transformer import SECTIONS

MOST_IMAGES = 1_000_000


@torch.no_grad()
def held_out(model: Model, data: str | Path, config: str, images: int | None) -> list[Tokens]:
    """Token sequences of the images that training of stage 2 did not see.

    Raises:
        ConfigError: the checkpoint's labels are not the configuration's, or no image is held out.
    """
    settings = read_config(config, SECTIONS, [])
    stage, names, (vae, _) = settings["stage"], model.class_names, model.both()
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
    indices = folder.val[:images]
    sequences = []
    for pixels, kept in folder.chunks(indices, 16):
        starts = folder.labels[kept] if names else np.zeros_like(kept)
        for code, grain, start in zip(
            *(part.numpy() for part in vae.encode_maps(to_float(pixels))), starts, strict=True
        ):
            sequences.append(model.layout.to_tokens(code, grain, int(start)))
    return sequences


def choices(model: Model, tokens: Tokens) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Per head the steps at which there is a choice, and what the image has there (local position ids)."""
    layout, segment = model.layout, tokens.segment[1:]
    local = layout.local(tokens.position[1:])
    start = np.array([layout.position_sos(s) for s in range(layout.segments)])[segment]
    free = (local < start) & ((segment < layout.segments - 1) | (not layout.covering))
    coded = tokens.content[1:] < layout.codebook_size
    return {
        "position": (np.flatnonzero(free), local[free]),
        "content": (np.flatnonzero(coded), tokens.content[1:][coded]),
    }


def compare(
    model: Model, rows: list[Tokens], logits: list[dict[str, NDArray[np.float32]]]
) -> dict[str, dict[str, float]]:
    """What an engine's logits along given sequences, as ``Engine.force`` records them, are against the model's.

    Returns:
        per head and for both: ``choices``, ``logit_error`` (largest, relative to the row's largest logit), ``top1``
        (share of choices with the same most probable token), ``draw`` (share with the same token drawn by the same
        random number from the whole vocabulary), ``nll`` and ``nll_fp32`` (nats per choice) and ``nll_change``, their
        relative difference; all before the grammar's mask.
    """
    _, net = model.both()
    sums = {head: np.zeros(5) for head in HEADS}
    errors = dict.fromkeys(HEADS, 0.0)
    for i, (row, record) in enumerate(zip(rows, logits, strict=True)):
        random = torch.from_numpy(uniforms(0, i, model.layout.max_length))
        exact_logits = teacher_forced(net, row)
        for head, (steps, targets) in choices(model, row).items():
            given = record[f"{head}_logits"]
            reached = steps < len(given)
            steps, target = steps[reached], torch.from_numpy(targets[reached])
            uniform = random[steps, HEADS.index(head)]
            mine, exact = torch.from_numpy(given[steps]), exact_logits[head][steps]
            errors[head] = max(errors[head], float((mine - exact).abs().max() / exact.abs().max()))
            sums[head] += [
                len(steps),
                float((mine.argmax(-1) == exact.argmax(-1)).sum()),
                float((plain_draw(mine, uniform) == plain_draw(exact, uniform)).sum()),
                float(torch.nn.functional.cross_entropy(mine, target, reduction="sum")),
                float(torch.nn.functional.cross_entropy(exact, target, reduction="sum")),
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
    return sample_token(logits, allowed, allowed, uniform, one, everything, one, everything, none)[0]


@torch.no_grad()
def decoder_psnr(model: Model, engine: Engine, rows: list[Tokens]) -> float:
    """Mean PSNR in dB of an engine's images of held-out codes against the checkpoint's, both of 8 bits."""
    vae, net = model.both()
    ratios = []
    for row in rows:
        codes = net.layout.to_map(row.content.tolist(), row.position.tolist())[0][None]
        exact = to_uint8(vae.decode_maps(torch.from_numpy(codes)).numpy())
        ratios.append(psnr(*(torch.from_numpy(pixels) / 127.5 - 1 for pixels in (exact, engine.decode(codes)))))
    return float(torch.cat(ratios).mean())


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
    if args.images is not None:
        whole("--images", args.images, 1, MOST_IMAGES)
    model = load_checkpoint(args.checkpoint).eval().requires_grad_(False)
    engines = [Engine.open(path) for path in args.engines]
    for engine in engines:
        if engine.layout != model.layout:
            raise ConfigError(f"engine {engine.path} has another token layout than {args.checkpoint}; export it anew")
    rows = held_out(model, args.data, args.config, args.images)
    result: list[dict[str, Any]] = []
    for engine in engines:
        parts = compare(model, rows, engine.force(rows))
        entry = {"engine": str(engine.path), "weights": engine.manifest.weights, "heads": parts}
        result.append({**entry, "psnr": decoder_psnr(model, engine, rows)})
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
