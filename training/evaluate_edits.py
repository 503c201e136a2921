"""How well edits are drawn: ``python -m training.evaluate_edits CKPT DATA --out TABLE.json``.

Of held-out images the log-likelihood of what they hold in a hole, given the rest, in nats: drawn by pins alone, chosen
among weighted candidates, and with what is kept first, if the model was trained for it. The higher, the better the
model of what belongs there.
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
from dvq_rt.decoding import Request
from dvq_rt.editing import Edit, Mask, given_first, stack_weights
from dvq_rt.engine import LOGMASSES, run_alone
from dvq_rt.files import write_file
from dvq_rt.layout import Tokens
from dvq_rt.progress import progress_bar
from dvq_rt.sampling import SamplingParams
from runtimes.errors import DataError
from training.checkpoint import load_checkpoint
from training.cli import guarded
from training.config import read_config
from training.data.pixels import to_float
from training.models.transformer import StackedTransformer
from training.sampling import Grammar
from training.torch_program import decode_loop, teacher_forced
from training.train_transformer import SECTIONS, tokenization

SLOTS = 32
CANDIDATES = (8, 64)


def holes(side: int, grain: NDArray[np.int64]) -> dict[str, Mask]:
    """What is redrawn, bool [side, side], by name; the last two where there are grains."""
    row, column = np.mgrid[:side, :side]
    half, quarter = side // 2, side // 4
    centre = (abs(2 * row - side + 1) < 2 * quarter) & (abs(2 * column - side + 1) < 2 * quarter)
    halves = {"left half": column < half, "right half": column >= half, "upper half": row < half}
    shapes = {**halves, "lower half": row >= half, "centre": centre, "object": grain > 0, "background": grain == 0}
    return {name: mask for name, mask in shapes.items() if 0 < mask.sum() < side**2 and (grain[mask] >= 0).any()}


def likelihood(net: StackedTransformer, edit: Edit, label: int, given: bool = False) -> tuple[float, float]:
    """Of the codes that an image has in the hole: their log-likelihood as an edit draws them, and log w of the draws
    (``dvq_rt.editing``)."""
    layout, fields = net.layout, edit.constraint(given)
    tokens: Tokens = edit.codes.tokens(label)
    wide, narrow = (Grammar(layout, True, pins) for pins in (None, fields["pinned"]))
    kind, before = None, 0
    if given:
        tokens, kind = given_first(layout, tokens, ~edit.redraw, edit.hints)
        before = int((kind > 0).sum())
        for grammar in (wide, narrow):
            grammar.give(fields["forced"][0][:before], kind[1:])
    logits = teacher_forced(net, tokens, kind=kind)
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


def other_weights(net: StackedTransformer, edit: Edit, label: int, count: int) -> NDArray[np.float64]:
    """log w of so many edits of the same hole, float64 [count]."""
    fields = edit.constraint()
    requests = [Request(label, SamplingParams(), 1, i, record=LOGMASSES, key=i, **fields) for i in range(count)]
    return stack_weights([event.records for event in run_alone(decode_loop(net, min(SLOTS, count)), requests)])


@torch.no_grad()
def evaluate(checkpoint: str, data: str, config: str, images: int, candidates: list[int]) -> dict[str, Any]:
    """Mean log-likelihoods in nats, by hole and by way of drawing; ``images`` says of how many.

    Raises:
        DataError: no held-out image has a label of the model.
    """
    model = load_checkpoint(checkpoint)
    vae, net = model.both()
    read = read_config(config, SECTIONS, [])
    folder = tokenization(data, vae, read["training"], read["stage"]).folder
    names = [folder.classes[label] for label in folder.labels[folder.val]]
    known = [i for i, name in zip(folder.val, names, strict=True) if name in model.class_names][:images]
    if not known:
        raise DataError(f"no held-out image of {data} has a label of {checkpoint}")
    table: dict[str, dict[str, list[float]]] = {}
    with progress_bar(total=len(known), desc="images", unit="image") as bar:
        for index in known:
            code, grain = vae.encode_maps(to_float(folder.pixels(index)[None]))
            codes = Codes(code[0].numpy(), grain[0].numpy().astype(np.int8), net.layout)
            label = model.class_names.index(folder.classes[folder.labels[index]])
            for name, redraw in holes(net.layout.sides[0], grain[0].numpy()).items():
                edit = Edit(codes, redraw)
                drawn, weight = likelihood(net, edit, label)
                row = table.setdefault(name, {})
                row.setdefault("pins", []).append(drawn)
                others = other_weights(net, edit, label, max(candidates) - 1) if candidates else np.zeros(0)
                for m in candidates:  # the law of the chosen one, with these others beside it
                    among_all = np.logaddexp.reduce([weight, *others[: m - 1]])
                    row.setdefault(f"{m} candidates", []).append(drawn + weight + float(np.log(m) - among_all))
                if net.config.given:
                    row.setdefault("given", []).append(likelihood(net, edit, label, given=True)[0])
            bar.update(1)
    means = {hole: {way: float(np.mean(values)) for way, values in row.items()} for hole, row in table.items()}
    return {"images": len(known), "nats": means}


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate_edits",
        description="Log-likelihood of held-out images' content in holes, given the rest, by way of drawing.",
    )
    parser.add_argument("checkpoint", help="checkpoint folder with both stages")
    parser.add_argument("data", help="folder of images")
    parser.add_argument("--config", default="emoji_edit_transformer", help="whose labels and held-out images are taken")
    parser.add_argument("--images", type=int, default=40, help="held-out images (40)")
    parser.add_argument("--candidates", type=int, nargs="*", default=list(CANDIDATES), help="numbers of them (8 64)")
    parser.add_argument("--out", help="write all numbers to this JSON file")
    args = parser.parse_args(argv)
    result = evaluate(args.checkpoint, args.data, args.config, args.images, args.candidates)
    if args.out:
        write_file(Path(args.out), (json.dumps(result, indent=1) + "\n").encode())
    ways = list(next(iter(result["nats"].values())))
    print(" | ".join(["hole", *ways]))
    for hole, row in result["nats"].items():
        print(" | ".join([hole, *(f"{row[way]:.1f}" for way in ways if way in row)]))


if __name__ == "__main__":
    main()
