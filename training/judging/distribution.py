"""How far one set of images is from another, by the features of a network: the numbers that papers report.

All take features float [N, D], one row per image.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dvq_rt.files import open_regular, write_file
from runtimes.errors import InputError, guard

Features = NDArray[np.floating]
NEIGHBOURS = 3
"""k of precision and recall, as published."""


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Mean ``mu`` float64 [D] and covariance ``sigma`` float64 [D, D] of features, as the field stores them."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def of(cls, features: Features) -> Statistics:
        """Of features [N, D], N at least 2; the covariance is that of a sample (over N - 1).

        Raises:
            InputError: there are fewer than two rows.
        """
        if len(features) < 2:
            raise InputError(f"there is a feature of {len(features)} images; a covariance needs at least 2")
        wide = features.astype(np.float64)
        return cls(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False)))

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` of ``mu`` and ``sigma``, whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma)
        write_file(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, width: int) -> Statistics:
        """Read an ``.npz`` that holds ``mu`` [D] and ``sigma`` [D, D]; other arrays in it are passed over.

        Args:
            width: D that is needed.

        Raises:
            InputError: it cannot be read, or holds other shapes or numbers that are not finite.
        """
        mend = "give statistics that were written by --write-statistics with the same extractor"
        with (
            guard(InputError, f"the statistics {path} cannot be read", mend),
            open_regular(Path(path)) as file,
            guard(InputError, f"{path} is no archive of statistics", mend),
        ):
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not an .npz")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                mu, sigma = (archive[name].astype(np.float64) for name in ("mu", "sigma"))
        if mu.shape != (width,) or sigma.shape != (width, width):
            raise InputError(
                f"{path} holds mu {mu.shape} and sigma {sigma.shape}; this extractor has {width} features; {mend}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"{path} holds numbers that are not finite; {mend}")
        return cls(mu, sigma)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0: the Fréchet distance of two Gaussians (Heusel et
    al. 2017). With Inception's features it is FID.

    The root's trace is that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), which is symmetric, so that few images, whose
    covariances are singular, do no harm.
    """
    values, vectors = np.linalg.eigh(a.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    middle = root @ b.sigma @ root
    trace = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(0)).sum()
    distance = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace
    return max(float(distance), 0.0)


def inception_score(logits: Features, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean Kullback-Leibler divergence of each image's class probabilities from their mean (Salimans et al.
    2016), mean and standard deviation over parts of the images, which are shuffled first.

    Args:
        logits: float [N, classes], N at least ``splits``.

    Raises:
        InputError: there are fewer images than parts.
    """
    if len(logits) < splits:
        raise InputError(f"there are {len(logits)} images for an Inception Score in {splits} parts; draw more")
    order = np.random.default_rng(seed).permutation(len(logits))
    wide = logits[order].astype(np.float64)
    wide = wide - wide.max(1, keepdims=True)
    logs = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    scores = []
    for part in np.array_split(logs, splits):
        mean = np.log(np.exp(part).mean(0))
        scores.append(np.exp((np.exp(part) * (part - mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if splits > 1 else 0.0


def precision_recall(real: Features, made: Features, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of the made images that lie among the real ones, and of the real ones that lie among the made (Kynkäänniemi
    et al. 2019): a set reaches around each of its members as far as that one's k-th nearest neighbour in the set.

    Args:
        real, made: float [N, D] and [M, D], each with more than ``k`` rows.

    Raises:
        InputError: there are fewer.
    """
    if min(len(real), len(made)) <= k:
        raise InputError(f"there are {len(real)} real and {len(made)} made images; precision needs more than {k}")
    return _covered(made, real, k), _covered(real, made, k)


def _covered(queries: Features, members: Features, k: int) -> float:
    """Share of the queries within reach of any member."""
    reach = np.concatenate(
        [np.partition(d, k, 1)[:, k] for d in _distances(members, members)]
    )  # 0 is the member itself
    inside = [(d <= reach).any(1) for d in _distances(queries, members)]
    return float(np.concatenate(inside).mean())


def _distances(rows: Features, columns: Features) -> Iterator[NDArray[np.float64]]:
    """Squared distances of all pairs, float64 [up to 512, M] at a time."""
    columns = columns.astype(np.float64)
    norms = (columns**2).sum(1)
    for start in range(0, len(rows), 512):
        part = rows[start : start + 512].astype(np.float64)
        yield ((part**2).sum(1)[:, None] + norms - 2 * part @ columns.T).clip(0)
