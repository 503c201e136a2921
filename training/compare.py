"""Models that draw, side by side: ``python -m training.compare DATA [NAME=]MODEL [NAME=]MODEL ... --out DIR``.

All are judged in one run by the same real images: reconstructions of held-out ones; samples of each label, by
classifiers of all classes of the data; samples of the labels that all models have, by their distance to the training
images beside that of held-out ones; how near they are to single training images; and, of models that read prompts,
samples of training captions against all training images. ``compare.md``, ``compare.json`` and pictures go into DIR.

Models may make images of different sizes. Each codes images of its own size; all is judged at the smallest, and
reconstructions at the others as well, to which images are resized by Lanczos' filter.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dvq_rt import Generator
from dvq_rt.files import write_file
from runtimes.errors import InputError, guard
from training.checkpoint_engine import named, open_model
from training.cli import guarded
from training.config import read_config
from training.judging.features import efficientnet_features
from training.judging.report import save_json, save_picture
from training.judging.side_by_side import RealImages, compare, picture_codes, picture_labels, tables
from training.loop import TrainConfig
from training.objective import StageOneConfig
from training.run import say
from training.train_tokenizer import held_out_folder
from training.train_transformer import SECTIONS


def open_models(models: list[str]) -> dict[str, Generator]:
    """Engines, or checkpoints that act as such, by name.

    Raises:
        InputError: two have the same name.
    """
    return {name: open_model(path) for name, path in named(models).items()}


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.compare", description="Models that draw, side by side.")
    parser.add_argument("data", help="folder of images that the models were trained on")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[NAME=]PATH: engine, demo:dq, or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and pictures")
    parser.add_argument("--config", default="emoji_transformer", help="stage 2, for labels and held-out images")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="overrides")
    parser.add_argument("--tokenizer-config", default="emoji_tokenizer", help="stage 1, for its held-out images")
    parser.add_argument("--n", type=int, default=16, help="samples per label for the judge (16)")
    parser.add_argument("--number", type=int, default=256, help="samples that are compared with real images (256)")
    parser.add_argument("--images", type=int, default=5000, help="real images of a side at most (5000)")
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("n", "number", "images", "classifier_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    config = read_config(args.config, SECTIONS, args.set)
    sections: dict[str, Any] = {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}
    first = read_config(args.tokenizer_config, sections, [])
    models = open_models(args.models)
    size = min(generator.manifest.image_size for generator in models.values())
    stage_1 = held_out_folder(args.data, size, first["training"], first["stage"])
    real = RealImages.of(args.data, stage_1, config["training"], config["stage"], args.images)
    extractor = efficientnet_features()
    with guard(InputError, f"cannot make the folder {args.out}", "choose another --out"):
        args.out.mkdir(parents=True, exist_ok=True)
    numbers = {"n": args.n, "number": args.number, "seed": args.seed}
    result, drawn = compare(models, real, extractor, **numbers, steps=args.classifier_steps)
    result["settings"] = {
        **{"models": args.models, "data": args.data, "config": args.config, "overrides": args.set, **numbers},
        **{"images": args.images, "classifier_steps": args.classifier_steps, "extractor": extractor.title},
    }
    text = tables(result)
    save_json(args.out / "compare.json", result)
    write_file(args.out / "compare.md", f"{text}\n".encode())
    save_picture(args.out / "codes.png", picture_codes(models, real))
    if drawn:
        save_picture(args.out / "samples.png", picture_labels(drawn))
    say(text)
    print(args.out)


if __name__ == "__main__":
    main()
