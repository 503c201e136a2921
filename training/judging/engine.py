"""An engine judged on real images by a classifier of them: accuracy, diversity, nearness to training images."""

from __future__ import annotations

from collections.abc import Callable
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
from training.judging.classifier import Classifier, judge
from training.judging.metrics import (
    accuracy,
    cost,
    diversity,
    fidelity,
    memorisation,
    nearest_features,
    nearest_pixels,
    spreads,
    through,
)
from training.judging.report import pick, picture_grain, picture_nearest, picture_reconstructions, picture_samples
from training.loop import TrainConfig
from training.train_transformer import StageTwoConfig, labelled_images

COPIES = 128  # training images whose reconstructions show how near a verbatim copy would be
SWEEP = {"temperature": (0.6, 0.7, 0.8, 0.9), "guidance": (1.0, 1.5, 2.0, 2.5), "top_k": (None, 100)}


def open_data(
    generator: Generator, data: str | Path, training: TrainConfig, stage: StageTwoConfig
) -> tuple[ImageFolder, Augment]:
    """The images of stage 2 that have the engine's labels, in its order, with the split and the augmentation; for a
    model without labels all images, under the label "".

    Raises:
        InputError: the engine has labels without names.
        ConfigError: its labels are not among the configuration's.
        DataError: the folder cannot be used, or holds no held-out image.
    """
    names, size = generator.class_names, generator.manifest.image_size
    if not names and generator.layout.classes:
        raise InputError(
            f"the labels of {generator.path} have no names, so nothing says what its samples should show; export it "
            "from a checkpoint with class_names"
        )
    if not names:
        return labelled_images(data, size, training, replace(stage, labels={"": ["*"]}, flip_exclude=()))
    if set(names) <= set(stage.labels):
        exclude = tuple(name for name in stage.flip_exclude if name in names)
        stage = replace(stage, labels={name: stage.labels[name] for name in names}, flip_exclude=exclude)
    folder, augment = labelled_images(data, size, training, stage)
    if folder.classes != list(names):
        raise ConfigError(
            f"engine {generator.path} has the labels {sorted(names)}, the configuration has {sorted(folder.classes)}; "
            "give the one it was trained with by --config"
        )
    return folder, augment


def judge_engine(
    generator: Generator,
    folder: ImageFolder,
    held_out: ImageFolder,
    model: Classifier,
    n: int,
    seed: int,
    params: SamplingParams,
    save: Callable[[str, Image.Image], None],
) -> dict[str, Any]:
    """All numbers of ``evaluation.json`` but the settings.

    Args:
        folder: labelled as the engine is; held_out: with stage 1's split.
        model: trained on ``folder.train``; n: samples per label; params: how they are drawn.
        save: called with each picture's name and picture.
    """
    names, size = folder.classes, folder.size
    samples = generator.sample(n * len(names), [i for i in range(len(names)) for _ in range(n)], seed, params, True)
    drawn = judge(model, samples.to_numpy())
    wanted = np.array(samples.labels, dtype=np.int64)
    training, used = folder.load(folder.train)
    real, kept = folder.load(folder.val)
    real_codes, real_decoded = through(generator, real, "held-out labelled images")
    seen, seen_decoded = judge(model, real), judge(model, real_decoded)
    images, _ = held_out.load(held_out.val)
    codes, decoded = through(generator, images, "held-out images")
    origins = np.array(pick(len(training), COPIES))
    copies = through(generator, training[origins], "training images")[1]

    queries = np.concatenate([samples.to_numpy(), real, copies])
    parts = [len(samples), len(samples) + len(real)]
    pixels = nearest_pixels(queries, training)
    features = np.concatenate([drawn.features, seen.features, judge(model, copies).features])
    mirrored = judge(model, training[:, :, ::-1]).features
    plain = judge(model, training).features
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
            "held_out": accuracy(seen.labels, folder.labels[kept], names),
            "held_out_reconstructed": accuracy(seen_decoded.labels, folder.labels[kept], names),
            "samples": accuracy(drawn.labels, wanted, names),
        },
        "reconstruction": {"count": len(images), **fidelity(images, decoded)},
        "cost": {
            "held_out": cost(codes, size),
            "held_out_labelled": cost(real_codes, size),
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


def sweep(generator: Generator, folder: ImageFolder, model: Classifier, n: int, seed: int) -> list[dict[str, Any]]:
    """Accuracy and diversity of ``n`` samples per label over the grid ``SWEEP``, the best worst label first."""
    names = folder.classes
    labels = [i for i in range(len(names)) for _ in range(n)]
    wanted = np.array(labels, dtype=np.int64)
    images, used = folder.load(folder.train)
    real = spreads(judge(model, images).features, folder.labels[used], len(names))
    base = SamplingParams.from_dict(generator.manifest.defaults)
    guidance = SWEEP["guidance"] if generator.layout.null_label else (1.0,)
    rows = []
    for values in progress_bar(list(product(SWEEP["temperature"], guidance, SWEEP["top_k"])), desc="sweep"):
        varied = dict(zip(SWEEP, values, strict=True))
        samples = generator.sample(len(labels), labels, seed, replace(base, **varied))
        verdict = judge(model, samples.to_numpy())
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
