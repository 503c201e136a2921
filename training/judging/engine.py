"""An engine judged on real images by classifiers of them: accuracy, diversity, nearness to training images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvq_rt import Generator, SamplingParams
from dvq_rt.progress import progress_bar
from runtimes.errors import ConfigError, InputError
from training.data.folder import ImageFolder
from training.data.stream import Augment
from training.judging.classifier import SEEDS, Judge, train_classifier
from training.judging.metrics import (
    accuracy,
    cost,
    diversity,
    fidelity,
    memorisation,
    nearest_features,
    nearest_pixels,
    resized,
    spreads,
    through,
)
from training.judging.report import pick, picture_grain, picture_nearest, picture_reconstructions, picture_samples
from training.loop import TrainConfig
from training.prompts import directed_images
from training.train_transformer import StageTwoConfig, labelled_images

LARGEST = 64
"""Pixels a side of what is judged, at most: what pictures show is seen at this size, and larger ones take long."""
COPIES = 128  # training images whose reconstructions show how near a verbatim copy would be
SWEEP = {"temperature": (0.6, 0.7, 0.8, 0.9), "guidance": (1.0, 1.5, 2.0, 2.5), "top_k": (None, 100)}


def open_data(
    generator: Generator, data: str | Path, training: TrainConfig, stage: StageTwoConfig
) -> tuple[ImageFolder, StageTwoConfig]:
    """The images of stage 2 with the engine's labels, in its order, split as for its training; behind them "" for
    images without a label, where the configuration has these or the model has no labels. And the configuration with
    just these labels.

    Raises:
        InputError: the engine has labels without names.
        ConfigError: its labels are not among the configuration's.
        DataError: the folder cannot be used, or holds no held-out image.
    """
    names = generator.class_names
    if not names and generator.layout.classes:
        raise InputError(
            f"the labels of {generator.path} have no names, so nothing says what its samples should show; export it "
            "from a checkpoint with class_names"
        )
    if not names:
        stage = replace(stage, labels={"": ["*"]}, flip_exclude=())
    elif set(names) <= set(stage.labels):
        exclude = tuple(name for name in stage.flip_exclude if name in names)
        last = [""] if "" in stage.labels else []
        stage = replace(stage, labels={name: stage.labels[name] for name in [*names, *last]}, flip_exclude=exclude)
    folder, _ = labelled_images(data, generator.manifest.image_size, training, stage)
    if [name for name in folder.classes if name] != list(names):
        raise ConfigError(
            f"engine {generator.path} has the labels {sorted(names)}, the configuration has {sorted(folder.classes)}; "
            "give the one it was trained with by --config"
        )
    return folder, stage


def train_judge(
    folder: ImageFolder, training: TrainConfig, stage: StageTwoConfig, names: Sequence[str], steps: int
) -> Judge:
    """A judge that knows every class of the data apart, those of no label too; trained on all images but those that are
    held out.

    Args:
        folder: whose held-out images it does not see; it sees images of at most ``LARGEST`` pixels a side.
        training, stage: augmentation, and which classes a label joins.
        names: the labels that it judges by, in the order of their numbers.

    Raises:
        ConfigError: ``steps`` is not positive.
        DataError: no image can be decoded.
    """
    size = min(folder.size, LARGEST)
    every, held = ImageFolder(folder.root, size, val_fraction=0), {folder.relative(int(i)) for i in folder.val}
    every.train = np.array([i for i in range(len(every)) if every.relative(i) not in held], dtype=np.int64)
    label_of = {name: label for label, joined in stage.labels.items() for name in joined}
    labels = [label_of.get(name, "" if stage.labels else name) for name in every.classes]
    apart = {name for name, label in zip(every.classes, labels, strict=True) if label in stage.flip_exclude}
    directed = directed_images(every, stage.flip_exclude_words)
    shift = training.shift * size // folder.size
    augment = Augment(shift, training.flip, frozenset(apart), directed, training.crop)
    number = {name: i for i, name in enumerate(names)}
    nets = tuple(train_classifier(every, steps, augment, seed) for seed in SEEDS)
    return Judge(nets, np.array([number.get(label, -1) for label in labels]), size)


def judge_engine(
    generator: Generator,
    folder: ImageFolder,
    held_out: ImageFolder,
    judge: Judge,
    n: int,
    seed: int,
    params: SamplingParams,
    save: Callable[[str, Image.Image], None],
) -> dict[str, Any]:
    """All numbers of ``evaluation.json`` but the settings.

    Args:
        folder: labelled as the engine is; held_out: with stage 1's split.
        judge: of the engine's labels; n: samples per label, drawn without a prompt; params: how they are drawn.
        save: called with each picture's name and picture.
    """
    names, size = generator.class_names, folder.size
    samples = generator.sample(n * len(names), [i for i in range(len(names)) for _ in range(n)], seed, params, True)
    drawn = judge(samples.to_numpy())
    wanted = np.array(samples.labels, dtype=np.int64)
    training, used = folder.load(folder.train)
    real, kept = folder.load(folder.val)
    real_codes, real_decoded = through(generator, real, "held-out labelled images")
    seen, seen_decoded = judge(real), judge(real_decoded)
    labels = folder.labels[kept]
    labelled = labels < len(names)
    images, _ = held_out.load(held_out.val)
    codes, decoded = through(generator, images, "held-out images")
    origins = np.array(pick(len(training), COPIES))
    copies = through(generator, training[origins], "training images")[1]

    queries = np.concatenate([samples.to_numpy(), real, copies])
    parts = [len(samples), len(samples) + len(real)]
    pixels = nearest_pixels(resized(queries, judge.size), resized(training, judge.size))
    features = np.concatenate([drawn.features, seen.features, judge(copies).features])
    mirrored = judge(training[:, :, ::-1]).features
    plain = judge(training).features
    close = nearest_features(features, plain, mirrored)

    save("samples.png", picture_samples(samples, names))
    save("nearest.png", picture_nearest(samples, names, training, pixels, close[1]))
    save("reconstructions.png", picture_reconstructions(images, decoded))
    save("grain.png", picture_grain(images, codes))
    files = [folder.relative(int(used[i])) for i in pixels[1][: len(samples)]]
    ranked = pixels[0][: len(samples)].argsort()[:10]
    return {
        "params": samples.params.to_dict(),
        "training_images": {name: int((folder.labels[used] == i).sum()) for i, name in enumerate(names)},
        "accuracy": {
            "held_out": accuracy(seen.labels[labelled], labels[labelled], names),
            "held_out_reconstructed": accuracy(seen_decoded.labels[labelled], labels[labelled], names),
            "samples": accuracy(drawn.labels, wanted, names),
        },
        "reconstruction": {"count": len(images), **fidelity(images, decoded)},
        "cost": {
            "held_out": cost(codes, size),
            "held_out_labelled": cost([codes for codes, use in zip(real_codes, labelled, strict=True) if use], size),
            "samples": cost(samples.codes, size),
        },
        "diversity": diversity(
            spreads(drawn.features, wanted, len(names)), spreads(plain, folder.labels[used], len(names))
        ),
        "memorisation": {
            **{
                space: {
                    **memorisation(*np.split(distances, parts)),
                    "copies_found": float((index[parts[1] :] == origins).mean()),
                }
                for space, (distances, index) in (("pixels", pixels), ("features", close))
            },
            "closest": [
                {"label": names[wanted[i]], "image": int(i), "rms": float(pixels[0][i]), "file": files[i]}
                for i in ranked
            ],
        },
    }


def sweep(generator: Generator, folder: ImageFolder, judge: Judge, n: int, seed: int) -> list[dict[str, Any]]:
    """Accuracy and diversity of ``n`` samples per label over the grid ``SWEEP``, the best worst label first."""
    names = generator.class_names
    labels = [i for i in range(len(names)) for _ in range(n)]
    wanted = np.array(labels, dtype=np.int64)
    images, used = folder.load(folder.train)
    real = spreads(judge(images).features, folder.labels[used], len(names))
    base = SamplingParams.from_dict(generator.manifest.defaults)
    guidance = SWEEP["guidance"] if generator.layout.null_label else (1.0,)
    rows = []
    for values in progress_bar(list(product(SWEEP["temperature"], guidance, SWEEP["top_k"])), desc="sweep"):
        varied = dict(zip(SWEEP, values, strict=True))
        samples = generator.sample(len(labels), labels, seed, replace(base, **varied))
        verdict = judge(samples.to_numpy())
        shares = {name: row["share"] for name, row in accuracy(verdict.labels, wanted, names)["labels"].items()}
        worst = min(shares, key=shares.__getitem__)
        rows.append(
            {
                **varied,
                "min": shares[worst],
                "mean": float(np.mean(list(shares.values()))),
                "worst_label": worst,
                "diversity": diversity(spreads(verdict.features, wanted, len(names)), real),
                "labels": shares,
            }
        )
    return sorted(rows, key=lambda row: (-row["min"], -row["mean"]))
