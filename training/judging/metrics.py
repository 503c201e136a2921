"""The numbers of judging: picture quality, cost in codes and bits, accuracy, nearness to training images, diversity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dvq_rt import Codes, Generator
from dvq_rt.images import square
from dvq_rt.progress import progress_bar
from training.data.folder import Indices
from training.data.pixels import Pixels, to_float

Distances = NDArray[np.float32]

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
SHIFT = 3  # pixels by which training images are moved in the search for the nearest one


def psnr(target: Tensor, output: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, [B], of [B, 3, H, W] in [-1, 1]; ``output`` is clamped first."""
    mse = (output.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def ssim(target: Tensor, output: Tensor) -> Tensor:
    """Structural similarity per image, [B]: 11x11 Gaussian window of sigma 1.5, mean over channels and valid places.

    Args:
        target, output: float [B, 3, H, W] in [-1, 1], H and W at least 11; ``output`` is clamped first.
    """
    x, y = (target + 1) / 2, (output.clamp(-1, 1) + 1) / 2
    axis = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window).expand(3, 1, 11, 11)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, groups=3)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return score.flatten(1).mean(1)


def accuracy(predicted: NDArray[np.int64], wanted: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """Share of ``predicted`` [N] that equals ``wanted`` [N] (None of no image) and count, overall and per label."""

    def share(use: NDArray[np.bool_]) -> dict[str, Any]:
        return {"share": float((predicted == wanted)[use].mean()) if use.any() else None, "count": int(use.sum())}

    labels = {name: share(wanted == i) for i, name in enumerate(names)}
    return {**share(np.ones(len(wanted), dtype=bool)), "labels": labels}


def resized(images: Pixels, size: int) -> Pixels:
    """Images uint8 [N, S, S, 3] at another side, as ``dvq_rt.images.square`` makes it."""
    same = images.shape[1] == size
    return images if same else np.stack([square(Image.fromarray(image), size) for image in images])


def through(generator: Generator, images: Pixels, title: str) -> tuple[list[Codes], Pixels]:
    """Codes and reconstructions of images uint8 [N, S, S, 3]."""
    codes = [generator.encode(image)[0] for image in progress_bar(images, desc=title, unit="image")]
    return codes, generator.decode(codes)


def cost(codes: Sequence[Codes], image_size: int) -> dict[str, float]:
    """Mean number of codes and bits per pixel, beside those of one code per fine cell."""
    layout = codes[0].layout
    fixed = layout.sides[-1] ** 2
    return {
        "codes": float(np.mean([c.length for c in codes])),
        "fixed_codes": fixed,
        "bits_per_pixel": float(np.mean([c.bits_per_pixel(image_size) for c in codes])),
        "fixed_bits_per_pixel": float(fixed * np.log2(layout.codebook_size) / image_size**2),
    }


def fidelity(images: Pixels, decoded: Pixels) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of uint8 [N, S, S, 3], in chunks."""
    chunks = [slice(start, start + 64) for start in range(0, len(images), 64)]
    pairs = [(to_float(images[c]), to_float(decoded[c])) for c in chunks]
    return {f.__name__: float(torch.cat([f(x, y) for x, y in pairs]).mean()) for f in (psnr, ssim)}


def nearest_pixels(queries: Pixels, training: Pixels, shift: int = SHIFT) -> tuple[Distances, Indices]:
    """The nearest training image of each query, wherever it is moved by up to ``shift`` pixels and mirrored or not.

    Args:
        queries: uint8 [N, S, S, 3]; training: uint8 [M, S, S, 3], M at least 1. Shifts bring in repeated edges.

    Returns:
        root mean square difference float32 [N] in grey levels (0..255), and index int64 [N] into ``training``.
    """
    flat = to_float(queries).sub(1).flatten(1)  # white is 0, which keeps the norms small
    norms, side = flat.square().sum(1), queries.shape[1]
    best, index = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.long)
    for start in progress_bar(range(0, len(training), 256), desc="nearest training images"):
        padded = F.pad(to_float(training[start : start + 256]).sub(1), (shift,) * 4, mode="replicate")
        for down, right, mirrored in product(range(2 * shift + 1), range(2 * shift + 1), (False, True)):
            moved = padded[..., down : down + side, right : right + side]
            moved = (moved.flip(-1) if mirrored else moved).flatten(1)
            distance, where = (norms[:, None] + moved.square().sum(1) - 2 * flat @ moved.T).min(1)
            index = torch.where(distance < best, where + start, index)
            best = torch.minimum(distance, best)
    rms = (best.clamp_min(0) / flat.shape[1]).sqrt() * 127.5
    return rms.numpy(), index.numpy()


def nearest_features(
    queries: NDArray[np.float32], training: NDArray[np.float32], mirrored: NDArray[np.float32]
) -> tuple[Distances, Indices]:
    """The training image, as it is or mirrored, whose features are nearest.

    Args:
        queries: float32 [N, D]; training, mirrored: float32 [M, D], M at least 1; all of length 1.

    Returns:
        cosine distance float32 [N] in 0..2, and index int64 [N] into ``training``.
    """
    similar = np.maximum(queries @ training.T, queries @ mirrored.T)
    return 1 - similar.max(1), similar.argmax(1)


def spreads(features: NDArray[np.float32], labels: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Mean cosine distance between the images of each label.

    Args:
        features: float32 [N, D] of length 1; labels: int64 [N] in 0..count-1.

    Returns:
        float64 [count]; NaN for labels with fewer than two images.
    """

    def spread(members: NDArray[np.float32]) -> float:
        pairs = ~np.eye(len(members), dtype=bool)
        return float((1 - members @ members.T)[pairs].mean()) if len(members) > 1 else float("nan")

    return np.array([spread(features[labels == label]) for label in range(count)])


def diversity(samples: NDArray[np.float64], real: NDArray[np.float64]) -> float:
    """Mean over the labels of the samples' spread relative to real images', both of ``spreads``; NaN without any."""
    ratios = samples / np.maximum(real, 1e-6)
    return float(ratios[~np.isnan(ratios)].mean()) if not np.isnan(ratios).all() else float("nan")


def memorisation(samples: Distances, held_out: Distances, copies: Distances) -> dict[str, Any]:
    """Quantiles of three sets' distances to the training set, and the share of the samples that is suspiciously near.

    ``copies`` are reconstructions of training images: what a verbatim copy would measure. ``closer`` is the share of
    the samples below the 5th percentile of ``held_out``, ``copy_like`` that below the 95th of ``copies``; None without.
    """

    def below(reference: Distances, percent: int) -> float | None:
        return float((samples < np.percentile(reference, percent)).mean()) if len(reference) else None

    sets = {"samples": samples, "held_out": held_out, "copies": copies}
    table = {
        name: {f"p{q}": float(np.percentile(values, q)) for q in QUANTILES} if len(values) else {}
        for name, values in sets.items()
    }
    return {**table, "closer": below(held_out, 5), "copy_like": below(copies, 95)}
