"""Speed of training steps: ``python -m training.bench DATA --tokenizer CKPT``.

Ours against a plain loop that works as the released code does, in turns in one process, on the same images and models:

- stage 1: the plain loop decodes every image file anew in each step; ours keeps decoded images and prepares batches
  ahead.
- stage 2: the plain loop codes the images anew in each epoch and pads every sequence to the longest that the grammar
  allows; ours codes them once and puts sequences of like length together. With ``--precision bf16`` ours alone
  computes the transformer so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq_rt.files import read_dataclass
from dvq_rt.images import open_rgb, square
from dvq_rt.layout import TokenLayout
from dvq_rt.progress import progress_bar
from runtimes.errors import InputError
from training.checkpoint import load_tokenizer, new_tokenizer
from training.cli import guarded
from training.config import read_config
from training.data.folder import ImageFolder
from training.data.pixels import Pixels, to_float
from training.data.stream import batches
from training.data.tokens import collate, padded_to
from training.judging.report import save_json, table
from training.loop import TrainConfig, make_optimizer
from training.losses import PICTURE_LOSSES
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer, TransformerConfig
from training.sequences import BUCKET
from training.train_transformer import SECTIONS, StageTwoConfig, batch_losses

Loop = Callable[[int], int]
"""Takes the step of a number and returns how many images or tokens it learned from."""


class Coded(NamedTuple):
    """``codes`` int32 [N, h, w] and ``grain`` int8 [N, hc, wc] of images."""

    codes: NDArray[np.int32]
    grain: NDArray[np.int8]


def descend(module: nn.Module, training: TrainConfig) -> Callable[[Tensor], None]:
    """What goes on in every step of either loop: gradients, their clipping, the optimizer."""
    optimizer = make_optimizer(module.train(), training)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), training.clip)
        optimizer.step()

    return step


def stage_one(vae: Tokenizer, folder: ImageFolder, training: TrainConfig) -> tuple[Loop, Loop]:
    """Ours and the plain loop over the same tokenizer. Of both are counted images."""
    down, size = descend(vae, training), training.batch_size
    ahead = batches(folder, folder.train, size, seed=training.seed, workers=2)

    def learn(images: Pixels) -> int:
        x = to_float(images)
        out = vae(x)
        down(PICTURE_LOSSES["multiscale"](x, out.images) + out.loss)
        return len(images)

    def ours(step: int) -> int:
        return learn(next(ahead)[0])

    def plain(step: int) -> int:
        chosen = np.resize(folder.train, (step + 1) * size)[step * size :]
        return learn(np.stack([square(open_rgb(folder.paths[i]), folder.size) for i in chosen]))

    return ours, plain


def stage_two(
    vae: Tokenizer, net: StackedTransformer, images: Pixels, labels: NDArray[np.int64], training: TrainConfig
) -> tuple[Loop, Loop]:
    """Ours and the plain loop over the same transformer and images, as many as ``BUCKET`` batches have. Of both are
    counted the tokens that are learned, without padding."""
    down, size, layout = descend(net, training), training.batch_size, net.layout
    parts = [coded(vae, images[start : start + size]) for start in range(0, len(images), size)]
    data = Coded(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    lengths = layout.count_codes(data.grain)
    by_length = lengths.argsort(kind="stable").reshape(BUCKET, size)
    by_length = by_length[np.random.default_rng(training.seed).permutation(BUCKET)]

    def learn(batch: dict[str, Tensor], half: bool = False) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = batch_losses(net, batch)["loss"]
        down(loss)
        return int((batch["target_content"] >= 0).sum())

    def ours(step: int) -> int:
        rows = by_length[step % BUCKET]
        return learn(collate(layout, data, rows, labels[rows]), training.precision == "bf16")

    def plain(step: int) -> int:
        rows = np.arange(size) + step % BUCKET * size
        again = coded(vae, images[rows])
        return learn(padded_to(collate(layout, again, np.arange(size), labels[rows]), layout.max_length))

    return ours, plain


@torch.no_grad()
def coded(vae: Tokenizer, images: Pixels) -> Coded:
    """The codes of images uint8 [N, S, S, 3]."""
    codes, grain = vae.encode_maps(to_float(images))
    return Coded(codes.numpy().astype(np.int32), grain.numpy().astype(np.int8))


def in_turns(ours: Loop, plain: Loop, steps: int, rounds: int, title: str) -> list[dict[str, float]]:
    """Both loops' speeds, images or tokens a second, for each round. They take steps by turns, and another first in
    each, so that what else the machine does hits both alike; one step of each goes before and is not counted."""
    loops = {"ours": ours, "plain": plain}
    for loop in loops.values():
        loop(0)
    rows = []
    with progress_bar(total=rounds * steps, desc=title, unit="step") as bar:
        for number in range(rounds):
            seconds, units = dict.fromkeys(loops, 0.0), dict.fromkeys(loops, 0)
            for step in range(steps):
                order = list(loops) if (step + number) % 2 else list(loops)[::-1]
                for name in order:
                    began = time.perf_counter()
                    units[name] += loops[name](number * steps + step)
                    seconds[name] += time.perf_counter() - began
                bar.update()
            row = {name: units[name] / seconds[name] for name in loops}
            rows.append({**row, "ratio": row["ours"] / row["plain"]})
    return rows


def line(title: str, unit: str, rows: Sequence[dict[str, float]]) -> list[Any]:
    """A line of the table: medians, and the ratio's range over the rounds."""
    middle = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    ratios = [row["ratio"] for row in rows]
    spread = f"{middle['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [title, f"{middle['ours']:.1f} {unit}", f"{middle['plain']:.1f} {unit}", spread]


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.bench", description="Speed of training steps.")
    parser.add_argument("data", help="folder of images")
    parser.add_argument("--tokenizer", required=True, help="checkpoint of stage 1; its sizes are those of stage 1 here")
    parser.add_argument("--config", default="emoji_transformer", help="stage 2: JSON file, or a name in configs")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (8)")
    parser.add_argument("--rounds", type=int, default=5, help=f"of {BUCKET} steps each (5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our stage 2 (fp32)")
    parser.add_argument("--out", help="write all numbers to this JSON file")
    args = parser.parse_args(argv)
    for name in ("batch", "rounds"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    config = read_config(args.config, SECTIONS, [])
    training = TrainConfig(steps=1, batch_size=args.batch, shift=0, precision=args.precision)
    torch.manual_seed(training.seed)
    vae = load_tokenizer(args.tokenizer).requires_grad_(False)
    stage: StageTwoConfig = config["stage"]
    folder = ImageFolder(args.data, vae.config.image_size, labels=stage.labels or None)
    images, kept = folder.load(folder.train[: BUCKET * args.batch])
    if len(images) < BUCKET * args.batch:
        raise InputError(f"{args.data} has {len(images)} training images; {BUCKET * args.batch} are needed")
    layout = TokenLayout(order=stage.order, classes=len(folder.classes), null_label=True, **vae.config.layout())
    sizes = {**config["transformer"], "block_size": layout.max_length}
    net = StackedTransformer(read_dataclass(TransformerConfig, sizes, "section 'transformer'", defaults=True), layout)
    fresh = new_tokenizer(vae.config)
    fresh.load_state_dict(vae.state_dict())

    first = in_turns(*stage_one(fresh, folder, training), BUCKET, args.rounds, "stage 1")
    second = in_turns(*stage_two(vae, net, images, folder.labels[kept], training), BUCKET, args.rounds, "stage 2")
    lines = [line("stage 1", "images/s", first), line("stage 2", "tokens/s", second)]
    print(table(["stage", "ours", "plain loop", "ratio (range of the rounds)"], lines))
    if args.out:
        settings = {
            "batch": args.batch,
            "config": args.config,
            "precision": args.precision,
            "threads": torch.get_num_threads(),
        }
        save_json(Path(args.out), {"settings": settings, "stage_1": first, "stage_2": second})


if __name__ == "__main__":
    main()
