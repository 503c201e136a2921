"""Judge a model that reads prompts: ``python -m training.evaluate_prompts MODEL DATA --run RUN --out DIR``.

Everything is drawn, encoded and scored by the engine, or the checkpoint, under prompts alone, without a label.
``prompts.json`` and pictures go into DIR.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt import Generator
from dvq_rt.files import open_regular, parse_json, read_json
from dvq_rt.progress import progress_bar
from runtimes.errors import DataError, InputError, guard
from training.checkpoint_engine import open_model
from training.cli import guarded
from training.data.captions import holds
from training.data.folder import ImageFolder
from training.evaluate import sampling
from training.judging.features import efficientnet_features, extract
from training.judging.metrics import nearest_pixels
from training.judging.prompts import (
    COLOURS,
    TONES,
    by_word,
    families,
    foreground_colour,
    in_two_styles,
    matching,
    nearest_word,
)
from training.judging.report import enlarged, pick, save_json, save_picture, sheet
from training.run import IMAGES, SETTINGS, say

Draw = Callable[[int, str], NDArray[np.uint8]]
"""So many samples [N, S, S, 3] of a prompt."""
OTHERS = 50
"""Captions that an image's own is compared with."""
MOST_FAMILIES = 8
"""Of captions that differ in one word, for each kind of word."""
MOST_PAIRS = 24
"""Of captions that differ in their style alone; ``SHOWN`` of them come into the picture."""
SHOWN = 12


def read_split(folder: ImageFolder, run: Path) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Indices of the images that a run trained on and held out, and the phrases that it held out.

    Raises:
        DataError: the run's files cannot be read, or an image is gone.
    """
    with guard(DataError, f"{run / IMAGES} or {run / SETTINGS} cannot be read", "give the folder of the training run"):
        with open_regular(run / IMAGES) as file:
            side = {path: where for path, _, where in map(parse_json, file)}
        phrases = tuple(read_json(run / SETTINGS)["stage"]["hold_out"])
    sides = [side.get(folder.relative(i)) for i in range(len(folder))]
    train, held = ([i for i, where in enumerate(sides) if where == name] for name in ("train", "val"))
    if len(train) + len(held) != len(side):
        raise DataError(f"{folder.root} lacks images that {run} was trained with; give the same data")
    return train, held, phrases


def captioned(folder: ImageFolder) -> dict[str, int]:
    """First caption to index, of equal ones the first image's; images without captions are left out."""
    return {text: i for i in reversed(range(len(folder))) for text in folder.captions(i)[:1]}


def score_captions(
    generator: Generator, folder: ImageFolder, held: Sequence[int], images: int, seed: int
) -> dict[str, float]:
    """``matching`` of so many held-out images, each with its own caption and 50 captions of other held-out images.

    Raises:
        DataError: they have fewer than two captions.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.array(held))[:images]
    texts = sorted({folder.captions(i)[0] for i in held})
    if len(texts) < 2:
        raise DataError("fewer than two captions are held out; hold more images out")
    rows = []
    for i in progress_bar(chosen, desc="scoring captions", unit="image"):
        own = folder.captions(int(i))[0]
        others = [text for text in rng.permutation(texts) if text != own][:OTHERS]
        codes = generator.encode(folder.pixels(int(i)))
        scores = generator.score(codes * (1 + len(others)), prompts=[own, *others], truncate=True)
        rows.append([score.total for score in scores])
    least = min(map(len, rows))
    return matching(np.array([row[:least] for row in rows]))


def test_words(
    draw: Draw, folder: ImageFolder, attributes: Sequence[str], count: int
) -> tuple[dict[str, Any], list[tuple[str, list[Image.Image]]]]:
    """Draw captions that differ in one word, ``count`` times each, and see whether the samples' colour is nearest to
    that of the real image with that word. Rows of a picture: the real images, and below them a sample of each."""
    images = captioned(folder)
    groups = families(list(images), attributes)
    step = max(1, -(-len(groups) // MOST_FAMILIES))
    hits: list[NDArray[np.bool_]] = []
    told, chances, rows = {}, [], []
    for name in progress_bar(list(groups)[::step], desc="drawing words", unit="caption"):
        members = {word: groups[name][word] for word in attributes if word in groups[name]}
        real = {word: folder.pixels(images[text]) for word, text in members.items()}
        drawn = {word: draw(count, text) for word, text in members.items()}
        colours = {word: np.stack([foreground_colour(image) for image in own]) for word, own in drawn.items()}
        hit, told[name] = nearest_word({word: foreground_colour(image) for word, image in real.items()}, colours)
        hits.append(hit)
        chances += [1 / len(members)] * len(hit)
        rows.append(
            (f"{name.replace('{}', '...')}: {', '.join(members)}", [enlarged(image) for image in real.values()])
        )
        rows.append(("drawn", [enlarged(own[0]) for own in drawn.values()]))
    if not hits:
        return {}, []
    numbers = {"nearest": float(np.concatenate(hits).mean()), "chance": float(np.mean(chances))}
    return {**numbers, "words": by_word(list(told.values())), "captions": told}, rows


def test_styles(
    draw: Draw, folder: ImageFolder, count: int
) -> tuple[dict[str, Any], list[tuple[str, list[Image.Image]]]]:
    """Draw captions without and with the word of a style, ``count`` times each, and see whether the samples' features
    are nearer to the real image of their own style than to that of the other. Rows of a picture: of each style the real
    image and a sample."""
    images = captioned(folder)
    pairs = in_two_styles(list(images))
    if not pairs:
        return {}, []
    extractor = efficientnet_features()
    nearest: list[NDArray[np.bool_]] = []
    rows = []
    for pair in progress_bar(pairs[:: -(-len(pairs) // MOST_PAIRS)], desc="drawing styles", unit="caption"):
        real = np.stack([folder.pixels(images[text]) for text in pair])
        drawn = [draw(count, text) for text in pair]
        features = extract(extractor, np.concatenate([real, *drawn]), "features").features
        apart = np.square(features[2:, None] - features[:2]).sum(2).reshape(2, count, 2)
        nearest.append(apart.argmin(2) == np.arange(2)[:, None])
        shown = [image for style, own in zip(real, drawn, strict=True) for image in (style, own[0])]
        rows.append((pair[0], list(map(enlarged, shown))))
    plain, styled = np.stack(nearest).mean((0, 2)).tolist()
    return {"nearest": (plain + styled) / 2, "plain": plain, "styled": styled, "captions": len(nearest)}, rows


def picture_combinations(
    draw: Draw, folder: ImageFolder, train: Sequence[int], held: Sequence[int], count: int
) -> Image.Image:
    """For held-out images: the real one, samples of its caption, and the training image nearest to the first sample."""
    training = np.stack([folder.pixels(i) for i in train])
    texts = [folder.captions(i)[0] for i in held]
    drawn = [draw(count, text) for text in progress_bar(texts, desc="drawing what was held out", unit="caption")]
    nearest = nearest_pixels(np.stack([images[0] for images in drawn]), training)[1]
    rows = [
        (text, [enlarged(image) for image in (folder.pixels(i), *images, training[near])])
        for i, text, images, near in zip(held, texts, drawn, nearest, strict=True)
    ]
    return sheet(rows, ["held out", *["drawn"] * count, "nearest trained"])


def picture_prompts(draw: Draw, prompts: Sequence[str], count: int) -> Image.Image:
    """Prompts above their samples."""
    drawn = [draw(count, text) for text in prompts]
    return sheet([("", [enlarged(images[i]) for images in drawn]) for i in range(count)], prompts)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate_prompts", description="Judge prompts.")
    parser.add_argument("model", help="engine folder or checkpoint of a model that reads prompts")
    parser.add_argument("data", help="the images it was trained on, with captions")
    parser.add_argument("--run", type=Path, required=True, help="run folder of its training, which lists what it held")
    parser.add_argument("--out", type=Path, required=True, help="folder for prompts.json and pictures")
    parser.add_argument("--images", type=int, default=32, help="held-out images whose captions are scored (32)")
    parser.add_argument("--samples", type=int, default=4, help="pictures drawn of each caption (4)")
    parser.add_argument("--show", nargs="*", default=[], metavar="PROMPT", help="short ones, drawn into prompts.png")
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="another sampling parameter than recommended"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.images < 1 or args.samples < 1:
        raise InputError(f"--images is {args.images}, --samples {args.samples}; both must be at least 1")
    with open_model(args.model) as generator:
        if not generator.takes_prompts:
            raise InputError(f"{args.model} reads no prompts; give a model that was trained with text")
        params = sampling(generator, args.param)

        def draw(count: int, text: str) -> NDArray[np.uint8]:
            return generator.sample(count, prompts=text, seed=args.seed, params=params).to_numpy()

        folder = ImageFolder(args.data, generator.manifest.image_size, val_fraction=0)
        train, held, phrases = read_split(folder, args.run)
        held = [i for i in held if folder.captions(i)]
        args.out.mkdir(parents=True, exist_ok=True)
        if args.show:
            save_picture(args.out / "prompts.png", picture_prompts(draw, args.show, args.samples))
        result: dict[str, Any] = {"model": args.model, "run": str(args.run), "seed": args.seed}
        result["params"] = params.to_dict()
        result["captions"] = score_captions(generator, folder, held, args.images, args.seed)
        result["colours"], rows = test_words(draw, folder, COLOURS, args.samples)
        result["skin_tones"], more = test_words(draw, folder, TONES, args.samples)
        result["styles"], styles = test_styles(draw, folder, args.samples)
        save_json(args.out / "prompts.json", result)
        if rows + more:
            save_picture(args.out / "words.png", sheet(rows + more))
        if styles:
            headings = ["plain", "drawn", "styled", "drawn"]
            save_picture(args.out / "styles.png", sheet([styles[i] for i in pick(len(styles), SHOWN)], headings))
        if novel := [i for i in held if holds(folder.captions(i)[0], phrases)]:
            save_picture(
                args.out / "combinations.png",
                picture_combinations(draw, folder, train, novel, args.samples),
            )
    for name in ("captions", "colours", "skin_tones", "styles"):
        numbers = {k: round(v, 3) for k, v in result[name].items() if isinstance(v, int | float)}
        say(f"{name}: {numbers}")
    print(args.out)


if __name__ == "__main__":
    main()
