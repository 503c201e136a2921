"""Samples against real images, as papers report them: Fréchet distance, Inception Score, precision and recall; and the
likelihood of held-out images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt import Generator, SamplingParams
from dvq_rt.files import read_json
from dvq_rt.images import open_rgb, square
from dvq_rt.layout import UNORDERED
from runtimes.errors import InputError, guard
from training.data.folder import ImageFolder, Indices
from training.data.listing import SUFFIXES
from training.data.pixels import Pixels
from training.judging.distribution import Features, Statistics, frechet_distance, inception_score, precision_recall
from training.judging.features import Extracted, Extractor

BATCH = 64
PLAN = "plan.json"
"""What ``dvq-rt sample --n N --out FOLDER/`` writes beside its shards: how they were drawn."""


class Conditions(NamedTuple):
    """What images are drawn and scored under: ``labels``, None for none, and ``prompts``, None for the empty one; the
    latter are None altogether for a model that reads none."""

    labels: list[int | None]
    prompts: list[str | None] | None


def conditions(generator: Generator, folder: ImageFolder, indices: Indices) -> Conditions:
    """The own labels and first captions of real images, as far as the model knows such."""
    known = generator.layout.classes
    labels = [int(label) if label < known else None for label in folder.labels[indices]]
    captions = [next(iter(folder.captions(int(i))), None) for i in indices]
    return Conditions(labels, captions if generator.takes_prompts else None)


def alike(indices: Indices, count: int) -> Indices:
    """``count`` of some images, evenly over them, each as often as the others if there are fewer."""
    return indices[np.linspace(0, len(indices), count, endpoint=False).astype(np.int64)]


def draw(generator: Generator, wanted: Conditions, seed: int, params: SamplingParams) -> Iterator[Pixels]:
    """Samples in batches, uint8 [B, S, S, 3]: the images that one call with all conditions would give."""
    labels, prompts = wanted
    for first in range(0, len(labels), BATCH):
        part = slice(first, first + BATCH)
        texts = None if prompts is None else prompts[part]
        own = labels[part]
        options: dict[str, Any] = {"first": first, "prompts": texts, "truncate": True}
        yield generator.sample(len(own), own, seed, params, **options).to_numpy()


def read_samples(folder: str | Path, size: int) -> tuple[Iterator[Pixels], int, Any]:
    """The pictures of a folder, as files or in tar shards, in batches; their number; and what ``plan.json`` says of
    them, None without it.

    Args:
        size: to which they are resized, in pixels.

    Raises:
        InputError: there are none, or one cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"--samples is {root}, which is no folder; give one of pictures or of shards")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    shards = sorted(root.rglob("*.tar"))
    count = len(files) + sum(len(_members(path)) for path in shards)
    if not count:
        raise InputError(f"--samples is {root}, which holds no picture; give a folder of pictures or of shards")
    plan = read_json(root / PLAN) if (root / PLAN).is_file() else None

    def pictures() -> Iterator[Image.Image]:
        yield from map(open_rgb, files)
        for path in shards:
            with _reading(path), tarfile.open(path) as shard:
                for name in _members(path):
                    member = shard.extractfile(name)
                    assert member is not None, "a picture is a file"
                    yield open_rgb(io.BytesIO(member.read()))

    def chunks() -> Iterator[Pixels]:
        squares = (square(picture, size) for picture in pictures())
        while batch := list(islice(squares, BATCH)):
            yield np.stack(batch)

    return chunks(), count, plan


def _members(path: Path) -> list[str]:
    """Names of the pictures of a shard."""
    with _reading(path), tarfile.open(path) as shard:
        return [name for name in shard.getnames() if Path(name).suffix.lower() in SUFFIXES]


def _reading(path: Path) -> AbstractContextManager[None]:
    return guard(InputError, f"cannot read the shard {path}", "draw it again")


def compare_samples(
    extractor: Extractor,
    made: Extracted,
    real: NDArray[np.float32] | None,
    statistics: Statistics,
    count: int | None,
) -> dict[str, Any]:
    """The numbers of samples.

    Args:
        made: of the samples.
        real: features of the real images, None where there are statistics alone.
        statistics: of the real images.
        count: how many real images there are, None where it is not known.
    """
    mean, deviation = inception_score(made.logits, min(10, len(made.logits)))
    precision, recall = (None, None) if real is None else precision_recall(real, made.features)
    return {
        "extractor": extractor.title,
        extractor.frechet: frechet_distance(statistics, Statistics.of(made.features)),
        extractor.class_score: {"mean": mean, "deviation": deviation},
        "precision": precision,
        "recall": recall,
        "samples": len(made.features),
        "real_images": count,
    }


def at_equal_numbers(real: Features, sets: dict[str, Features]) -> dict[str, dict[str, float]]:
    """Fréchet distance, precision and recall of several sets of images against real ones, from as many images of each
    set as the smallest one has: means over parts of that size. Few images make all three worse, equally few equally so.

    Args:
        real: features float [N, D]; sets: by name, float [M, D], M above ``distribution.NEIGHBOURS``.
    """
    size, statistics = min(map(len, sets.values())), Statistics.of(real)
    out = {}
    for name, made in sets.items():
        mixed = made[np.random.default_rng(0).permutation(len(made))]
        parts = [mixed[start : start + size] for start in range(0, len(made) - size + 1, size)]
        distances = [frechet_distance(statistics, Statistics.of(part)) for part in parts]
        shares = np.array([precision_recall(real, part) for part in parts]).mean(0)
        out[name] = {
            **{"frechet": float(np.mean(distances)), "precision": float(shares[0]), "recall": float(shares[1])},
            **{"images": size, "parts": len(parts)},
        }
    return out


def likelihood(generator: Generator, folder: ImageFolder, indices: Indices) -> dict[str, float] | None:
    """Negative log-likelihood of images under their own labels and captions, in nats, by teacher forcing under the
    grammar: a mean image's, a mean token's, and the number of tokens and images. None for a model that knows no order
    of the cells, which gives no likelihood."""
    if generator.layout.order == UNORDERED:
        return None
    images, kept = folder.load(indices)
    codes, (labels, prompts) = generator.encode(list(images)), conditions(generator, folder, kept)
    scores = generator.score(codes, labels, prompts=prompts, truncate=True)
    tokens = sum(len(score.content) for score in scores)
    nats = -sum(score.total for score in scores)
    return {
        "nats_per_image": nats / len(scores),
        "nats_per_token": nats / tokens,
        "tokens_per_image": tokens / len(scores),
        "images": len(scores),
    }


def sample_rows(values: dict[str, Any], extractor: Extractor) -> list[list[Any]]:
    """Lines of a table of what ``compare_samples`` and ``likelihood`` gave."""
    rows = []
    if extractor.frechet in values:
        score = values[extractor.class_score]
        rows = [
            [extractor.frechet, values[extractor.frechet]],
            [extractor.class_score, f"{score['mean']:.3f} ± {score['deviation']:.3f}"],
            [f"precision, by features of {extractor.title}", values["precision"]],
            [f"recall, by features of {extractor.title}", values["recall"]],
            ["samples", values["samples"]],
            ["real images", values["real_images"]],
        ]
    for name, row in values.get("equal_numbers", {}).items():
        title = f"{name.replace('_', ' ')}, {row['images']} at a time"
        numbers = "; ".join(f"{row[key]:.3f}" for key in ("frechet", "precision", "recall"))
        rows.append([f"{title}: Fréchet distance, precision, recall", numbers])
    held = values.get("likelihood")
    if held:
        rows += [
            [f"nats an image, {held['images']} held-out images", f"{held['nats_per_image']:.1f}"],
            ["nats a token", held["nats_per_token"]],
        ]
    return rows
