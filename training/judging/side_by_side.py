"""Models that draw, judged in one run by the same real images and the same classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt import Generator, Samples, SamplingParams
from dvq_rt.images import grain_overlay
from runtimes.errors import DataError, InputError
from training.data.folder import ImageFolder, Indices
from training.data.pixels import Pixels, to_float
from training.judging.classifier import Judge
from training.judging.distribution import NEIGHBOURS, Features
from training.judging.engine import train_judge
from training.judging.features import Extractor, extract
from training.judging.metrics import (
    accuracy,
    cost,
    fidelity,
    memorisation,
    nearest_features,
    nearest_pixels,
    resized,
    through,
)
from training.judging.report import enlarged, pick, sheet, table
from training.judging.samples import Conditions, alike, at_equal_numbers, conditions, draw
from training.loop import TrainConfig
from training.perceptual import load_perceptual
from training.train_transformer import StageTwoConfig, labelled_images

NEAREST = 64
"""Images of each set whose nearest training image is looked for."""
COLUMNS = 10
SHOWN = 8


@dataclass(frozen=True)
class RealImages:
    """What models are compared with.

    Attributes:
        folder: images with the configuration's labels, behind them "" for those without; split as for stage 2. Models
            are judged at its size.
        stage_1: the images with the split of stage 1, and ``held_out`` the indices that the tokenizers did not see.
        training, stage: of the configuration.
        train, val: indices into the folder, at most so many as are used.
    """

    folder: ImageFolder
    stage_1: ImageFolder
    held_out: Indices
    training: TrainConfig
    stage: StageTwoConfig
    train: Indices
    val: Indices

    @classmethod
    def of(
        cls, data: str | Path, stage_1: ImageFolder, training: TrainConfig, stage: StageTwoConfig, most: int
    ) -> RealImages:
        """
        Args:
            stage_1: the images with the split of stage 1; most: images of a side at most.

        Raises:
            DataError: the folder cannot be used, or holds no held-out image.
        """
        stage_1.check_held_out()
        folder, _ = labelled_images(data, stage_1.size, training, stage)
        folder.check_held_out()
        held_out = stage_1.load(stage_1.val[pick(len(stage_1.val), most)])[1]
        train, val = (folder.load(side[pick(len(side), most)])[1] for side in (folder.train, folder.val))
        return cls(folder, stage_1, held_out, training, stage, train, val)

    @property
    def names(self) -> list[str]:
        """The labels, without that of images that have none."""
        return [name for name in self.folder.classes if name]

    def pixels(self, indices: Indices, size: int | None = None) -> Pixels:
        """Images of ``folder``, uint8 [N, S, S, 3]."""
        return self.folder.at_size(size or self.folder.size).load(indices)[0]

    def unseen(self, size: int) -> Pixels:
        """The images of ``held_out``, uint8 [N, S, S, 3]."""
        return self.stage_1.at_size(size).load(self.held_out)[0]


def compare(
    models: Mapping[str, Generator],
    real: RealImages,
    extractor: Extractor,
    *,
    n: int,
    number: int,
    seed: int,
    steps: int,
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """All numbers of ``compare.json`` but the settings, and each model's samples by label.

    Args:
        n: samples per label; number: samples whose distance to real images is measured; steps: of the classifier.

    Raises:
        InputError: a model has labels that the configuration lacks.
        DataError: too few images are held out.
    """
    names = real.names
    for name, generator in models.items():
        if lacking := sorted(set(generator.class_names) - set(names)):
            raise InputError(f"{name} has the labels {lacking}, which the configuration lacks; give another --config")
    offered = {name: [label for label in names if label in g.class_names] for name, g in models.items()}
    shared = [label for label in names if all(label in labels for labels in offered.values())]
    prompted = {name: g for name, g in models.items() if g.takes_prompts}
    kinds = {"shared": (models, shared), "captions": (prompted, real.folder.classes if prompted else [])}
    used = {key: used_images(real, labels) for key, (_, labels) in kinds.items() if labels}

    sizes = sorted({g.manifest.image_size for g in models.values()})
    result: dict[str, Any] = {"sizes": sizes}
    result["reconstruction"] = {name: reconstruction(g, real, sizes, name) for name, g in models.items()}
    drawn: dict[str, Samples] = {}
    if any(offered.values()):
        judge = train_judge(real.folder, real.training, real.stage, names, steps)
        result["labels"], drawn = judged_labels(models, offered, real, judge, n, seed)
        result["nearest"] = nearest(models, drawn, real, judge)
    sides = (real.train, real.val)
    features = [extract(extractor, real.pixels(side), "features of real images").features for side in sides]
    for key, use in used.items():
        wanted = alike(real.train[use[0]], number)
        sources: dict[str, tuple[Generator, Conditions]] = {}
        for name, g in kinds[key][0].items():
            prompts = conditions(g, real.folder, wanted).prompts if key == "captions" else None
            sources[name] = g, Conditions(labels_in(g, real.folder, wanted), prompts)
        train, val = (own[rows] for own, rows in zip(features, use, strict=True))
        sets = distances(sources, extractor, train, val, real.folder.size, seed)
        result[key] = {"labels": kinds[key][1], "images": [len(train), len(val)], "sets": sets}
    return result, drawn


def used_images(real: RealImages, labels: Sequence[str]) -> list[NDArray[np.bool_]]:
    """Which of the training and of the held-out images have one of some labels.

    Raises:
        DataError: too few are held out for precision and recall.
    """
    numbers = [real.folder.classes.index(label) for label in labels]
    train, val = (np.isin(real.folder.labels[side], numbers) for side in (real.train, real.val))
    if val.sum() <= NEIGHBOURS:
        raise DataError(f"{val.sum()} images of {list(labels)} are held out; precision needs more than {NEIGHBOURS}")
    return [train, val]


def labels_in(generator: Generator, folder: ImageFolder, indices: Indices) -> list[int | None]:
    """The labels of images as a model numbers them; None of those that it does not have."""
    own = {name: i for i, name in enumerate(generator.class_names)}
    return [own.get(folder.classes[label]) for label in folder.labels[indices]]


def reconstruction(generator: Generator, real: RealImages, sizes: Sequence[int], title: str) -> dict[str, Any]:
    """What held-out images cost and how they come back: by size, in ``at``, ``fidelity`` and the mean distance in the
    features of EfficientNet-Lite0."""
    own = generator.manifest.image_size
    codes, decoded = through(generator, real.unseen(own), title)
    distance = load_perceptual("efficientnet")
    assert distance is not None, "a network of that name"
    at = {}
    for size in sizes:
        pair = real.unseen(size), resized(decoded, size)
        chunks = [[to_float(x[i : i + 32]) for x in pair] for i in range(0, len(decoded), 32)]
        far = np.concatenate([distance(x, y).detach().reshape(-1).numpy() for x, y in chunks])
        at[str(size)] = {**fidelity(*pair), "feature_distance": float(far.mean())}
    return {"images": len(decoded), "image_size": own, **cost(codes, own), "at": at}


def judged_labels(
    models: Mapping[str, Generator],
    offered: Mapping[str, list[str]],
    real: RealImages,
    judge: Judge,
    n: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """By label how many training images it has, the share of the held-out images and of each model's samples that the
    judge names so; and the samples."""
    names, folder = real.names, real.folder
    truth = folder.labels[folder.val]
    use = truth < len(names)
    seen = judge(real.pixels(folder.val[use]))
    count = np.bincount(folder.labels[folder.train], minlength=len(folder.classes))
    out: dict[str, Any] = {
        "training_images": {name: int(count[i]) for i, name in enumerate(names)},
        "held_out": accuracy(seen.labels, truth[use], names),
        "samples": {},
    }
    drawn = {}
    for name, generator in models.items():
        if labels := [label for label in offered[name] for _ in range(n)]:
            drawn[name] = generator.sample(len(labels), labels, seed, progress=True)
            wanted = np.array([names.index(label) for label in labels])
            out["samples"][name] = accuracy(judge(drawn[name].to_numpy()).labels, wanted, names)
    return out, drawn


def nearest(
    models: Mapping[str, Generator], drawn: Mapping[str, Samples], real: RealImages, judge: Judge
) -> dict[str, Any]:
    """``memorisation`` by pixels and by the judge's features, of some samples of each model."""
    training, held = (real.pixels(i, judge.size) for i in (real.train, real.val[pick(len(real.val), NEAREST)]))
    plain, mirrored = judge(training).features, judge(training[:, :, ::-1]).features
    out: dict[str, Any] = {}
    for name, samples in drawn.items():
        shown = resized(samples.to_numpy()[pick(len(samples), NEAREST)], judge.size)
        originals = real.pixels(real.train[pick(len(real.train), NEAREST)], models[name].manifest.image_size)
        copies = resized(through(models[name], originals, name)[1], judge.size)
        queries = np.concatenate([shown, held, copies])
        parts = [len(shown), len(shown) + len(held)]
        by = {
            "pixels": nearest_pixels(queries, training)[0],
            "features": nearest_features(judge(queries).features, plain, mirrored)[0],
        }
        out[name] = {space: memorisation(*np.split(values, parts)) for space, values in by.items()}
    return out


def distances(
    sources: Mapping[str, tuple[Generator, Conditions]],
    extractor: Extractor,
    train: Features,
    val: Features,
    size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """``at_equal_numbers`` of held-out images and of each model's samples against training images, whose features
    ``val`` and ``train`` are, at one size."""
    sets: dict[str, Features] = {"held-out images": val}
    for name, (generator, wanted) in sources.items():
        params = SamplingParams.from_dict(generator.manifest.defaults)
        chunks = (resized(chunk, size) for chunk in draw(generator, wanted, seed, params))
        sets[name] = extract(extractor, chunks, name, len(wanted.labels)).features
    return at_equal_numbers(train, sets)


# --- tables and pictures ---------------------------------------------------------------------------------------
def tables(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    rows = []
    for name, r in result["reconstruction"].items():
        measured = [[f"{at['psnr']:.2f}", at["ssim"], at["feature_distance"]] for at in r["at"].values()]
        rows.append([name, r["image_size"], r["codes"], r["bits_per_pixel"], *(x for row in measured for x in row)])
    images = next(iter(result["reconstruction"].values()))["images"]
    headings = ["pixels a side", "codes an image", "bits per pixel"]
    for size in result["sizes"]:
        at = f", at {size}" if len(result["sizes"]) > 1 else ""
        headings += [f"PSNR, dB{at}", f"SSIM{at}", f"distance in EfficientNet-Lite0{at}"]
    parts = [f"Reconstructions of {images} held-out images:", table(["model", *headings], rows)]
    if labels := result.get("labels"):
        models = labels["samples"]
        rows = []
        for name, count in labels["training_images"].items():
            shares = [labels["held_out"]["labels"][name], *(each["labels"][name] for each in models.values())]
            rows.append([name, count, *map(share, shares)])
        rows.append(["**all**", sum(labels["training_images"].values()), share(labels["held_out"])])
        rows[-1] += [share(each) for each in models.values()]
        parts += [
            "Named as their label by classifiers of all classes of the data:",
            table(["label", "training images", "held-out images", *(f"{name}, samples" for name in models)], rows),
        ]
    for key, title in (("shared", "labels that all models have"), ("captions", "labels and captions of real images")):
        if key in result:
            sets, (train, val) = result[key]["sets"], result[key]["images"]
            size = next(iter(sets.values()))["images"]
            rows = [
                [name, r["frechet"], r["precision"], r["recall"], r["images"] * r["parts"]] for name, r in sets.items()
            ]
            headings = ["Fréchet distance (EfficientNet-Lite0)", "precision", "recall", "images"]
            parts += [
                f"Samples of {title}, {size} at a time, against {train} training images; {val} are held out:",
                table(["of", *headings], rows),
            ]
    if "nearest" in result:
        rows = [
            [name, *(r[space][key] for space in ("pixels", "features") for key in ("closer", "copy_like"))]
            for name, r in result["nearest"].items()
        ]
        headings = [f"{what}, {space}" for space in ("pixels", "features") for what in ("closer", "like copies")]
        parts += [
            f"Share of {NEAREST} samples that are closer to a training image than the nearest 5 % of held-out images, "
            "and that are as near as 95 % of reconstructed training images:",
            table(["model", *headings], rows),
        ]
    return "\n\n".join(parts)


def share(row: dict[str, Any]) -> str:
    """Of ``accuracy``, as text."""
    return "–" if row["share"] is None else f"{row['share']:.1%} of {row['count']}"


def picture_labels(drawn: Mapping[str, Samples]) -> Image.Image:
    """For each label a row of samples of each model that has it."""
    rows = []
    size = max(samples.to_numpy().shape[1] for samples in drawn.values())
    for name, samples in drawn.items():
        pictures, labels = resized(samples.to_numpy(), size), np.array(samples.labels)
        for label in dict.fromkeys(samples.labels):
            shown = np.flatnonzero(labels == label)[:SHOWN]
            rows.append((label, name, [enlarged(pictures[i]) for i in shown]))
    return sheet([(f"{label}, {name}", pictures) for label, name, pictures in sorted(rows, key=lambda row: row[:2])])


def picture_codes(models: Mapping[str, Generator], real: RealImages) -> Image.Image:
    """Held-out images above each model's coded cells and reconstructions."""
    size = max(generator.manifest.image_size for generator in models.values())
    shown = pick(len(real.held_out), COLUMNS)
    images = real.unseen(size)[shown]
    rows = [("original", [enlarged(image) for image in images])]
    scale = rows[0][1][0].width // images.shape[1]
    for name, generator in models.items():
        codes, decoded = through(generator, real.unseen(generator.manifest.image_size)[shown], name)
        decoded = resized(decoded, size)
        pairs = zip(images, codes, strict=True)
        sides = generator.layout.sides
        overlays = [grain_overlay(image, c.grain, sides, scale).convert("RGB") for image, c in pairs]
        rows += [(f"{name}: codes", overlays), (f"{name}: decoded", [enlarged(image) for image in decoded])]
    return sheet(rows)
