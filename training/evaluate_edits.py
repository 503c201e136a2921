"""How well edits are drawn: ``python -m training.evaluate_edits CKPT DATA --out DIR``.

Of held-out images the log-likelihood of what they hold in a hole, given the rest, in nats: drawn by pins alone, chosen
among weighted candidates, and with what is kept first, if the model was trained for it. The higher, the better the
model of what belongs there. Images are asked for by their own labels and captions, as far as the model knows such.
``edits.json``, ``edits.md`` and pictures of edits go into DIR.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dvq_rt.codes import Codes
from dvq_rt.decoding import Request
from dvq_rt.editing import Edit, Mask, given_first, stack_weights
from dvq_rt.engine import LOGMASSES, run_alone
from dvq_rt.files import write_file
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout, Tokens
from dvq_rt.progress import progress_bar
from dvq_rt.sampling import SamplingParams
from runtimes.errors import DataError, InputError
from training.checkpoint_engine import CheckpointEngine
from training.cli import guarded
from training.config import read_config
from training.data.folder import ImageFolder
from training.data.pixels import Pixels
from training.judging.engine import open_data
from training.judging.report import enlarged, pick, save_json, save_picture, sheet, table
from training.judging.samples import conditions
from training.models.transformer import StackedTransformer
from training.run import say
from training.sampling import Grammar
from training.torch_program import decode_loop, teacher_forced
from training.train_transformer import SECTIONS

SLOTS = 64
CANDIDATES = (8, 64)
RESULTS = 4
SHOWN_HOLES = ("right half", "centre", "upper half", "object")
"""Of the picture with four images, in turn."""
HOLE = 170
"""Grey level of what is redrawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What an image is asked for by: its label's number; and of its caption the text, what ``teacher_forced`` takes and
    the rows that requests take, None where there is none."""

    label: int
    text: str | None = None
    prompt: NDArray[Any] | None = None
    rows: NDArray[np.float32] | None = None


def engine_of(generator: Generator) -> CheckpointEngine:
    """The checkpoint behind a generator."""
    assert isinstance(generator.engine, CheckpointEngine), "made by main"
    return generator.engine


def asked_of(generator: Generator, folder: ImageFolder, index: int) -> Asked:
    """The label and caption of an image; a caption that is too long for the model counts for none."""
    engine = engine_of(generator)
    (label,), texts = conditions(generator, folder, np.array([index]))
    number = engine.layout.classes if label is None and engine.layout.null_label else label or 0
    text = None if texts is None else texts[0]
    if text is None:
        return Asked(number)
    try:
        ids = engine.prompts.tokenizer.encode(text)
    except InputError:
        return Asked(number)
    return Asked(number, text, engine.read(ids), engine.prompts.rows(text))


def holes(layout: TokenLayout, grain: NDArray[np.int8]) -> dict[str, Mask]:
    """What is redrawn, bool [side, side], by name; the last two where there are grains."""
    side = layout.sides[0]
    row, column = np.mgrid[:side, :side]
    half, quarter = side // 2, side // 4
    centre = (abs(2 * row - side + 1) < 2 * quarter) & (abs(2 * column - side + 1) < 2 * quarter)
    halves = {"left half": column < half, "right half": column >= half, "upper half": row < half}
    shapes = {**halves, "lower half": row >= half, "centre": centre}
    if layout.segments > 1:
        shapes |= {"object": grain > 0, "background": grain == 0}
    return {name: mask for name, mask in shapes.items() if 0 < mask.sum() < side**2 and (grain[mask] >= 0).any()}


def likelihood(net: StackedTransformer, edit: Edit, asked: Asked, given: bool = False) -> tuple[float, float]:
    """Of the codes that an image has in the hole: their log-likelihood as an edit draws them, and log w of the draws
    (``dvq_rt.editing``)."""
    layout, fields = net.layout, edit.constraint(given)
    tokens: Tokens = edit.codes.tokens(asked.label)
    wide, narrow = (Grammar(layout, True, pins) for pins in (None, fields["pinned"]))
    kind, before = None, 0
    if given:
        tokens, kind = given_first(layout, tokens, ~edit.redraw, edit.hints)
        before = int((kind > 0).sum())
        for grammar in (wide, narrow):
            grammar.give(fields["forced"][0][:before], kind[1:])
    logits = teacher_forced(net, tokens, asked.prompt, kind)
    forced = fields["forced"][1] if "forced" in fields else np.zeros(0)
    drawn = weight = 0.0
    for t in range(before, layout.steps_of(tokens)):
        local, code = int(layout.local(tokens.position[t + 1 : t + 2])[0]), int(tokens.content[t + 1])
        if not wide.starting:
            place = among(logits["position"][t], wide.allowed())
            allowed = narrow.allowed()
            content = torch.log_softmax(logits["content"][t, : layout.codebook_size].double(), 0)
            if t < len(forced) and forced[t] >= 0:
                weight += float(place[local] + content[code])
            else:
                left = float(place[allowed].logsumexp(0))
                weight, drawn = weight + left, drawn + float(place[local]) - left
                if code < layout.codebook_size:
                    pinned = narrow.pinned_content(local) is not None
                    weight, drawn = weight + pinned * float(content[code]), drawn + (not pinned) * float(content[code])
        wide.advance(local)
        narrow.advance(local)
    return drawn, weight


def among(logits: Tensor, allowed: list[int]) -> Tensor:
    """Log-probabilities [V] with all but the allowed ids at minus infinity."""
    masked = torch.full_like(logits, -torch.inf, dtype=torch.float64)
    masked[allowed] = logits[allowed].double()
    return torch.log_softmax(masked, 0)


def other_weights(net: StackedTransformer, edit: Edit, asked: Asked, count: int) -> NDArray[np.float64]:
    """log w of so many edits of the same hole, float64 [count]."""
    fields = {**edit.constraint(), "prompt": asked.rows, "record": LOGMASSES}
    requests = [Request(asked.label, SamplingParams(), 1, i, key=i, **fields) for i in range(count)]
    return stack_weights([event.records for event in run_alone(decode_loop(net, min(SLOTS, count)), requests)])


def hole_nats(net: StackedTransformer, edit: Edit, asked: Asked, candidates: Sequence[int]) -> dict[str, float]:
    """Log-likelihood of what an image has in one hole, by way of drawing."""
    drawn, weight = likelihood(net, edit, asked)
    out = {"pins": drawn}
    others = other_weights(net, edit, asked, max(candidates) - 1) if candidates else np.zeros(0)
    for m in candidates:  # the law of the chosen one, with these others beside it
        among_all = np.logaddexp.reduce([weight, *others[: m - 1]])
        out[f"{m} candidates"] = drawn + weight + float(np.log(m) - among_all)
    if net.config.given:
        out["given"] = likelihood(net, edit, asked, given=True)[0]
    return out


@torch.no_grad()
def measure(
    generator: Generator,
    folder: ImageFolder,
    images: Sequence[int],
    candidates: Sequence[int],
) -> dict[str, dict[str, dict[str, float]]]:
    """By hole and way of drawing the mean log-likelihood in nats, how much it is above that by pins, and the standard
    error of that difference; and of how many images."""
    net = engine_of(generator).model.both()[1]
    found: dict[str, list[dict[str, float]]] = {}
    with progress_bar(total=len(images), desc="images", unit="image") as bar:
        for index in images:
            (codes,), asked = generator.encode(folder.pixels(index)), asked_of(generator, folder, index)
            for name, redraw in holes(codes.layout, codes.grain).items():
                found.setdefault(name, []).append(hole_nats(net, Edit(codes, redraw), asked, candidates))
            bar.update(1)
    return {hole: {way: summary(rows, way) for way in rows[0]} for hole, rows in found.items()}


def summary(rows: Sequence[dict[str, float]], way: str) -> dict[str, float]:
    """One place of the table, of the images' numbers."""
    values, above = np.array([row[way] for row in rows]), np.array([row[way] - row["pins"] for row in rows])
    error = float(above.std(ddof=1) / np.sqrt(len(above))) if len(above) > 1 else float("nan")
    return {"nats": float(values.mean()), "above_pins": float(above.mean()), "error": error, "images": len(rows)}


# --- pictures --------------------------------------------------------------------------------------------------
def with_hole(image: Pixels, redraw: Mask) -> Pixels:
    """An image uint8 [S, S, 3] with grey in place of the cells that are redrawn."""
    cell = len(image) // len(redraw)
    wide = redraw.repeat(cell, 0).repeat(cell, 1)
    return np.where(wide[..., None], HOLE, image).astype(np.uint8)


def edited(generator: Generator, folder: ImageFolder, index: int, hole: str, seed: int) -> list[Image.Image] | None:
    """An image, the same with its hole, and what is drawn there; None if it has no such hole."""
    image, asked = folder.pixels(index), asked_of(generator, folder, index)
    codes: Codes = generator.encode(image)[0]
    redraw = holes(codes.layout, codes.grain).get(hole)
    if redraw is None:
        return None
    label = asked.label if asked.label < generator.layout.classes else None
    made = generator.edit(Image.fromarray(image), redraw, labels=label, prompts=asked.text, n=RESULTS, seed=seed)
    return [enlarged(each) for each in (image, with_hole(image, redraw), *made.to_numpy())]


def picture(generator: Generator, folder: ImageFolder, shown: Sequence[tuple[int, str]], seed: int) -> Image.Image:
    """A row for each pair of an image and a hole."""
    rows = [(hole, edited(generator, folder, index, hole, seed)) for index, hole in shown]
    return sheet([(hole, cells) for hole, cells in rows if cells], ["original", "redrawn", *["drawn"] * RESULTS])


def chosen(folder: ImageFolder, known: Sequence[int], paths: Sequence[str]) -> list[int]:
    """Images of the pictures: those of the paths below the folder, or four held-out ones.

    Raises:
        DataError: there is no such image.
    """
    if not paths:
        return [known[i] for i in pick(len(known), 4)]
    index = {folder.relative(i): i for i in range(len(folder))}
    if lacking := [path for path in paths if path not in index]:
        raise DataError(f"--show names {lacking}, which {folder.root} lacks; give paths such as {folder.relative(0)}")
    return [index[path] for path in paths]


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate_edits",
        description="Log-likelihood of held-out images' content in holes, given the rest, and pictures of edits.",
    )
    parser.add_argument("checkpoint", help="checkpoint folder with both stages")
    parser.add_argument("data", help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for edits.json, edits.md and pictures")
    parser.add_argument("--config", default="emoji_text_transformer", help="whose labels and held-out images are taken")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="overrides")
    parser.add_argument("--images", type=int, default=12, help="held-out images (12)")
    parser.add_argument("--candidates", type=int, nargs="*", default=list(CANDIDATES), help="numbers of them (8 64)")
    parser.add_argument("--show", nargs="*", default=[], metavar="PATH", help="images of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    args = parser.parse_args(argv)
    if args.images < 1 or min(args.candidates, default=2) < 2:
        raise InputError(f"--images is {args.images}, --candidates {args.candidates}; at least 1 and 2 are needed")
    generator = Generator.over(CheckpointEngine(args.checkpoint))
    read = read_config(args.config, SECTIONS, args.set)
    folder, _ = open_data(generator, args.data, read["training"], read["stage"])
    folder.check_held_out()
    known = [int(i) for i in folder.val]
    shown = chosen(folder, known, args.show)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    images = [known[i] for i in pick(len(known), args.images)]
    result = measure(generator, folder, images, args.candidates)
    ways = list(next(iter(result.values())))
    rows = [[hole, *(told(row[way], way) for way in ways)] for hole, row in result.items()]
    text = table(["hole", *ways], rows)
    settings = {"checkpoint": args.checkpoint, "config": args.config, "images": [folder.relative(i) for i in images]}
    settings |= {"shown": [folder.relative(i) for i in shown], "seconds": round(time.monotonic() - began, 1)}
    save_json(args.out / "edits.json", {"settings": settings, "holes": result})
    write_file(args.out / "edits.md", f"{text}\n".encode())
    pairs = [(index, SHOWN_HOLES[i % len(SHOWN_HOLES)]) for i, index in enumerate(shown)]
    save_picture(args.out / "edits.png", picture(generator, folder, pairs, args.seed))
    every = [(shown[0], hole) for hole in result]
    save_picture(args.out / "holes.png", picture(generator, folder, every, args.seed))
    say(f"Nats of {len(images)} held-out images, in brackets above pins:\n\n{text}")
    print(args.out)


def told(place: dict[str, float], way: str) -> str:
    """One place of the table as text."""
    above = "" if way == "pins" else f" ({place['above_pins']:+.1f} ± {place['error']:.1f})"
    return f"{place['nats']:.1f}{above}"


if __name__ == "__main__":
    main()
