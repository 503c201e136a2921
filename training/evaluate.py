"""Judge models on real images: ``python -m training.evaluate MODEL [MODEL ...] DATA --out DIR``.

- **Tokenizers** (checkpoints; several stand side by side): cost, fidelity and use of the codebook on held-out images,
  at their own rates and at equal budgets, in ``tokenizers.md`` and ``tokenizers.json``; rate against distortion in
  ``rate_distortion.png``.
- **An engine**, or one checkpoint of both stages: samples against the training images (Fréchet distance, Inception
  Score, precision, recall; of held-out images too), the likelihood of held-out images, and the verdict of classifiers
  that are trained on the real images of all classes, also those of none of the model's labels. Samples that are
  compared with real images have their labels and, if the model reads prompts, captions; those that are judged have a
  label alone. The model draws, encodes and decodes as an engine does; PyTorch runs the judges. Pictures and
  ``evaluation.json`` (with ``--sweep``: ``sweep.json``) go into DIR, with all settings.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from dvq_rt import Generator, SamplingParams
from dvq_rt.files import parse_json, write_file
from runtimes.errors import ConfigError, InputError, guard
from runtimes.onnxruntime import import_onnxruntime
from training.checkpoint import load_checkpoint, load_tokenizer
from training.checkpoint_engine import is_checkpoint, named, open_model
from training.cli import guarded
from training.config import read_config
from training.data.folder import ImageFolder
from training.judging.distribution import NEIGHBOURS, Statistics
from training.judging.engine import judge_engine, open_data, sweep, train_judge
from training.judging.features import Extractor, efficientnet_features, extract, inception
from training.judging.plot import line_plot
from training.judging.report import pick, report, save_json, save_picture, table
from training.judging.samples import (
    alike,
    at_equal_numbers,
    compare_samples,
    conditions,
    draw,
    likelihood,
    read_samples,
    sample_rows,
)
from training.judging.tokenizers import Coded, Judges, check_budgets, compare_rates, rate_distortion, rate_table
from training.loop import TrainConfig
from training.objective import StageOneConfig
from training.perceptual import load_perceptual
from training.train_tokenizer import held_out_folder
from training.train_transformer import SECTIONS


def numbers(name: str, text: str) -> list[float]:
    """Of a list with commas.

    Raises:
        InputError: something is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} is {text!r}; it must be numbers with commas between them") from None


def extractor_of(weights: str | None) -> Extractor:
    """The FID network with its weights, or without them EfficientNet-Lite0."""
    return inception(weights) if weights else efficientnet_features()


def make_folder(out: Path) -> None:
    """
    Raises:
        InputError: the disk refused.
    """
    with guard(InputError, f"cannot make the folder {out}", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)


def evaluate_tokenizers(args: argparse.Namespace, models: dict[str, str], first: dict[str, Any], out: Path) -> None:
    """The part of ``main`` for tokenizers."""
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    sizes = {name: vae.config.image_size for name, vae in tokenizers.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"the tokenizers take images of {sizes} pixels; compare tokenizers of one size")
    distances = {"feature_distance": load_perceptual("efficientnet")}
    if args.lpips:
        distances["lpips"] = load_perceptual("lpips", args.lpips)
    judges = Judges({name: net for name, net in distances.items() if net}, extractor_of(args.inception))
    folder = held_out_folder(args.data, next(iter(sizes.values())), first["training"], first["stage"])
    folder.check_held_out()
    images, _ = folder.load(folder.val[pick(len(folder.val), args.images)])
    make_folder(out)

    coded = [Coded(name, vae, images) for name, vae in tokenizers.items()]
    budgets = numbers("--tokens", args.tokens) if args.tokens else [round(min(each.tokens for each in coded))]
    check_budgets(coded, budgets)
    rows = compare_rates(coded, budgets, judges)
    curve, lines = rate_distortion(coded, rows[: len(coded)])
    picture = line_plot(lines, f"{len(images)} held-out images", "bits per pixel", "PSNR, dB", "a tokenizer's own rate")
    text = table(*rate_table(rows, judges.extractor))
    note = (
        f"{len(images)} held-out images of {args.data}. Features: {judges.extractor.title}. The Fréchet distance is "
        "that of the images and their reconstructions."
    )
    settings = {
        "models": models,
        "data": args.data,
        "images": len(images),
        "tokenizer_config": args.tokenizer_config,
        "budgets": budgets,
        "lpips": args.lpips,
        "extractor": judges.extractor.title,
        "inception": args.inception,
        "versions": versions(),
    }
    save_json(out / "tokenizers.json", {"settings": settings, "rows": rows, "rate_distortion": curve})
    write_file(out / "tokenizers.md", f"{note}\n\n{text}\n".encode())
    save_picture(out / "rate_distortion.png", picture)
    print(f"{note}\n\n{text}")
    print(out)


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("dvq-rt", "torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def evaluate_model(
    args: argparse.Namespace, generator: Generator, config: dict[str, Any], first: dict[str, Any], out: Path
) -> None:
    """The part of ``main`` for an engine, or a checkpoint that acts as one."""
    folder, stage = open_data(generator, args.data, config["training"], config["stage"])
    held_out = held_out_folder(args.data, folder.size, first["training"], first["stage"])
    if not len(held_out.val) or not len(folder.val):
        raise ConfigError(f"no image of {args.data} is held out; add images, or raise val_fraction in both stages")
    params = sampling(generator, args.param)
    make_folder(out)
    manifest = generator.manifest
    settings = {
        "model": str(generator.path),
        "engine": {"files": manifest.files, "tools": manifest.tools, "parameters": manifest.parameters},
        "config": args.config,
        "overrides": args.set,
        "tokenizer_config": args.tokenizer_config,
        "n": args.sweep or args.n,
        "seed": args.seed,
        "versions": {**versions(), "onnxruntime": import_onnxruntime().__version__},
    }
    if not args.sweep:
        fields, rows = field_numbers(args, generator, folder, params)
        print(table(["measure", "value"], rows), end="\n\n")
    if args.no_classifier or not generator.class_names:
        if not args.no_classifier:
            print("the model has no labels, so no classifier judges what its samples show")
        save_json(out / "evaluation.json", {"settings": settings, "field": fields})
        print(out)
        return
    began = time.monotonic()
    judge = train_judge(folder, config["training"], stage, generator.class_names, args.classifier_steps)
    settings["classifier"] = {
        "steps": args.classifier_steps,
        "seconds": time.monotonic() - began,
        "classes": len(judge.label_of),
        "parameters": sum(p.numel() for net in judge.nets for p in net.parameters()),
    }
    if args.sweep:
        trials = sweep(generator, folder, judge, args.sweep, args.seed)
        save_json(out / "sweep.json", {"settings": settings, "rows": trials})
        shown = [name for name in trials[0] if name != "labels"]
        print(table(shown, [[trial[name] for name in shown] for trial in trials]))
    else:

        def save(name: str, picture: Image.Image) -> None:
            save_picture(out / name, picture)

        result = judge_engine(generator, folder, held_out, judge, args.n, args.seed, params, save)
        save_json(out / "evaluation.json", {"settings": settings, "field": fields, **result})
        print(report(result))
    print(out)


def sampling(generator: Generator, given: list[str]) -> SamplingParams:
    """The recommended sampling parameters with what ``--param`` gives.

    Raises:
        InputError: one is no parameter, or the model cannot draw with it.
    """
    values = dict(generator.manifest.defaults)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--param {text!r} is not NAME=VALUE, such as temperature=0.8")
        try:
            values[name] = parse_json(value)
        except (ValueError, RecursionError):
            values[name] = value
    return generator.engine.sampling(SamplingParams.from_dict(values))


def field_numbers(
    args: argparse.Namespace, generator: Generator, folder: ImageFolder, params: SamplingParams
) -> tuple[dict[str, Any], list[list[Any]]]:
    """What papers report of samples and held-out images, with all settings, and as lines of a table."""
    extractor = extractor_of(args.inception)
    used, held = (side[pick(len(side), args.images)] for side in (folder.train, folder.val))
    if args.reference:
        real, statistics = None, Statistics.load(args.reference, extractor.width)
    else:
        chunks = (images for images, _ in folder.chunks(used, 64))
        real = extract(extractor, chunks, "features of real images", len(used)).features
        statistics = Statistics.of(real)
    if args.write_statistics:
        statistics.save(args.write_statistics)
    how: dict[str, Any]
    if args.samples:
        drawn, count, plan = read_samples(args.samples, folder.size)
        how = {"folder": args.samples, "plan": plan}
    else:
        wanted, count = conditions(generator, folder, alike(used, args.number)), args.number
        drawn = draw(generator, wanted, args.seed, params)
        how = {"params": params.to_dict(), "seed": args.seed, "number": count}
        how["conditions"] = "labels, and captions if the model reads prompts, as the real images"
    made = extract(extractor, drawn, "features of samples", count)
    numbers = compare_samples(extractor, made, real, statistics, None if real is None else len(real))
    if real is not None and min(len(held), count) > NEIGHBOURS:
        others = extract(extractor, folder.load(held)[0], "features of held-out images").features
        numbers["equal_numbers"] = at_equal_numbers(real, {"held-out images": others, "samples": made.features})
    numbers["likelihood"] = likelihood(generator, folder, held)
    numbers["settings"] = {"samples": how, "reference": args.reference or args.data, "inception": args.inception}
    return numbers, sample_rows(numbers, extractor)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Judge tokenizers, or a model that draws, on real images.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="engine, or checkpoints of tokenizers, as [NAME=]PATH"
    )
    parser.add_argument("data", help="folder of images that the models were trained on")
    parser.add_argument("--out", required=True, help="folder for numbers and pictures")
    parser.add_argument("--tokenizer-config", default="emoji_tokenizer", help="stage 1, for its held-out images")
    parser.add_argument("--inception", metavar="FILE", help="weights of the FID network; else EfficientNet-Lite0")
    of_tokenizers = parser.add_argument_group("tokenizers")
    of_tokenizers.add_argument(
        "--tokens", metavar="N[,N...]", help="budgets of mean codes an image (the smallest of the tokenizers' own)"
    )
    of_tokenizers.add_argument("--images", type=int, default=2000, metavar="N", help="images of a side at most (2000)")
    of_tokenizers.add_argument("--lpips", metavar="FOLDER", help="weights of LPIPS, see docs/training.md")
    of_models = parser.add_argument_group("an engine, or a checkpoint of both stages")
    of_models.add_argument("--config", default="emoji_transformer", help="stage 2: JSON file, or a name in configs")
    of_models.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="overrides")
    of_models.add_argument("--number", type=int, default=1000, help="samples that are compared with real images (1000)")
    of_models.add_argument("--seed", type=int, default=0, help="of the samples")
    of_models.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="another sampling parameter than recommended"
    )
    of_models.add_argument("--samples", metavar="FOLDER", help="compare these pictures or shards, and draw none")
    of_models.add_argument("--reference", metavar="NPZ", help="mu and sigma to compare with, in place of the images'")
    of_models.add_argument("--write-statistics", metavar="NPZ", help="write mu and sigma of the real images")
    of_models.add_argument("--no-classifier", action="store_true", help="leave out the judgement by a classifier")
    of_models.add_argument("--n", type=int, default=32, help="samples per label for the classifier (32)")
    of_models.add_argument("--classifier-steps", type=int, default=1500)
    of_models.add_argument(
        "--sweep", type=int, nargs="?", const=8, metavar="N", help="instead try sampling parameters, N samples a label"
    )
    args = parser.parse_args(argv)
    for name in ("n", "classifier_steps", "sweep", "images", "number"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 <= args.seed < 2**64:
        raise InputError(f"--seed is {args.seed}; it must be in 0..2**64-1")
    if args.sweep and args.no_classifier:
        raise InputError("--sweep needs the classifier; leave out --no-classifier")
    if args.reference and args.write_statistics:
        raise InputError("--write-statistics writes those of the images; leave out --reference")
    config = read_config(args.config, SECTIONS, args.set)
    sections: dict[str, Any] = {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}
    first = read_config(args.tokenizer_config, sections, [])
    models, out = named(args.models), Path(args.out)
    checkpoints = [is_checkpoint(path) for path in models.values()]
    if all(checkpoints):
        evaluate_tokenizers(args, models, first, out)
    elif len(models) > 1:
        raise InputError(
            f"{args.models} are not all checkpoints; give checkpoints of tokenizers, or one "
            "engine; training.compare compares engines"
        )
    path = next(iter(models.values()))
    if not any(checkpoints) or (len(models) == 1 and load_checkpoint(path).transformer is not None):
        evaluate_model(args, open_model(path), config, first, out)


if __name__ == "__main__":
    main()
