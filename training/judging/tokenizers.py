"""Tokenizers side by side: what their codes cost and what the images that come back are worth, at several rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dvq_rt.codes import code_bits
from dvq_rt.images import to_uint8
from dvq_rt.layout import TokenLayout
from dvq_rt.progress import progress_bar
from dvq_rt.rates import Rate, by_codes, select_codes
from runtimes.errors import InputError
from training.data.pixels import Pixels, to_float
from training.judging.distribution import Statistics, frechet_distance
from training.judging.features import Extractor, extract
from training.judging.metrics import fidelity
from training.judging.plot import Line
from training.models.router import GRAINS
from training.models.tokenizer import Tokenizer

BATCH = 16
CURVE_POINTS = 9
KEPT_LEAST = 0.25
"""Share of its kept cells with which the curve of a model that keeps cells begins."""


@dataclass(frozen=True, slots=True)
class Judges:
    """What reconstructions are compared by.

    Attributes:
        distances: name -> frozen network (images, images) -> distance [B].
        extractor: for the Fréchet distance between images and reconstructions.
    """

    distances: dict[str, nn.Module]
    extractor: Extractor


class Coded:
    """A tokenizer and what its encoder says of images, from which codes of any rate follow.

    Args:
        name: for tables.
        tokenizer: in eval mode.
        images: uint8 [N, S, S, 3].
    """

    def __init__(self, name: str, tokenizer: Tokenizer, images: Pixels) -> None:
        self.name, self.tokenizer, self.images = name, tokenizer, images
        self.layout = TokenLayout(**tokenizer.config.layout())
        chunks = []
        with torch.no_grad(), progress_bar(total=len(images), desc=f"encoding: {name}", unit="image") as bar:
            for start in range(0, len(images), BATCH):
                chunk = images[start : start + BATCH]
                chunks.append([part.numpy() for part in tokenizer.encode_grains(to_float(chunk))])
                bar.update(len(chunk))
        self.codes, self.grain, self.scores, self.grain_codes = (
            np.concatenate(part) for part in zip(*chunks, strict=True)
        )

    @property
    def reach(self) -> tuple[int, int]:
        """Fewest and most codes of an image."""
        layout = self.layout
        return (layout.sides[0] ** 2, layout.cells) if layout.kept is None else (1, layout.kept)

    @property
    def tokens(self) -> float:
        """Mean number of codes of an image at the tokenizer's own rate."""
        return float(self.layout.count_codes(self.grain).mean())

    @property
    def targets(self) -> tuple[float, ...]:
        """Share of the coarsest cells that each grain but the coarsest shall have, or the share of cells kept."""
        config = self.tokenizer.config
        return tuple(config.ratios) if self.layout.kept is None else (self.layout.kept / self.layout.cells,)

    def at(self, tokens: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Code and grain maps with a mean of so many codes.

        The budget is one of all images together, as a threshold shares it: busy images get more. Models that keep
        cells keep the most important ones, equally many in each image.

        Raises:
            InputError: the tokenizer cannot code with so many.
        """
        least, most = self.reach
        if not least <= tokens <= most:
            raise InputError(f"{self.name} codes an image with {least} to {most} codes, not with {tokens:g}")
        if self.layout.kept is not None:
            rate, size = Rate(kept=round(tokens)), self.tokenizer.config.image_size
            rows = zip(self.grain, self.scores, strict=True)
            grain = np.stack([rate.grain(self.layout, size, *row) for row in rows])
        else:
            pool = self.scores.reshape(1, -1, self.scores.shape[-1])
            grain = by_codes(self.layout, pool, round(tokens * len(self.grain))).reshape(self.grain.shape)
        codes = [select_codes(self.layout, *row) for row in zip(grain, self.grain_codes, strict=True)]
        return np.stack(codes), grain

    @torch.no_grad()
    def decode(self, codes: NDArray[np.int64]) -> Pixels:
        """Images uint8 [N, S, S, 3] of code maps."""
        chunks = (torch.from_numpy(codes[start : start + BATCH]) for start in range(0, len(codes), BATCH))
        return np.concatenate([to_uint8(self.tokenizer.decode_maps(chunk).numpy()) for chunk in chunks])

    def used_codes(self, codes: NDArray[np.int64], grain: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often each code is used, int64 [codebook_size]; a code of a coarser cell counts once."""
        flat, counts = codes.reshape(len(codes), -1), np.zeros(self.layout.codebook_size, dtype=np.int64)
        of_cell = np.stack([self.layout.grain_of_cells(each) for each in grain])
        for segment in range(self.layout.segments):
            first = self.layout.covered_cells(segment)[:, 0]
            used = flat[:, first][of_cell[:, first] == segment]
            counts += np.bincount(used, minlength=len(counts))
        return counts


def cost_and_fidelity(coded: Coded, grain: NDArray[np.int64], decoded: Pixels) -> dict[str, Any]:
    """``tokens``, ``bits`` and ``bits_per_pixel`` of a mean image, ``psnr`` (dB) and ``ssim``."""
    bits = float(np.mean([code_bits(coded.layout, int(n)) for n in coded.layout.count_codes(grain)]))
    tokens = float(coded.layout.count_codes(grain).mean())
    per_pixel = bits / coded.tokenizer.config.image_size**2
    return {"tokens": tokens, "bits": bits, "bits_per_pixel": per_pixel, **fidelity(coded.images, decoded)}


def row(
    coded: Coded, rate: str, codes: NDArray[np.int64], grain: NDArray[np.int64], judges: Judges, real: Statistics
) -> dict[str, Any]:
    """All numbers of a tokenizer at one rate.

    Args:
        rate: what tables call it.
        real: of the images' features.
    """
    decoded = coded.decode(codes)
    counts = coded.used_codes(codes, grain)
    p = counts[counts > 0] / counts.sum()
    covering = coded.layout.kept is None
    names = GRAINS[coded.layout.segments] if covering else ("kept",)
    shares = [float((grain == s).mean()) for s in range(len(names))]
    targets = [1 - sum(coded.targets), *coded.targets] if covering else list(coded.targets)
    out = {"tokenizer": coded.name, "rate": rate, **cost_and_fidelity(coded, grain, decoded)}
    with torch.no_grad():
        for name, network in judges.distances.items():
            starts = range(0, len(decoded), BATCH)
            parts = [to_float(of[start : start + BATCH]) for start in starts for of in (coded.images, decoded)]
            pairs = zip(parts[::2], parts[1::2], strict=True)
            out[name] = float(torch.cat([network(x, y) for x, y in pairs]).mean())
    out["frechet"] = frechet_distance(real, Statistics.of(extract(judges.extractor, decoded, coded.name).features))
    out["codes_used"] = float((counts > 0).mean())
    out["perplexity"] = float(np.exp(-(p * np.log(p)).sum()))
    out["shares"] = dict(zip(names, shares, strict=True))
    out["targets"] = dict(zip(names, map(float, targets), strict=True))
    return out


def check_budgets(coded: Sequence[Coded], budgets: Sequence[float]) -> None:
    """
    Raises:
        InputError: a budget is none that any of the tokenizers can code with.
    """
    for budget in budgets:
        if not any(each.reach[0] <= budget <= each.reach[1] for each in coded):
            reach = {each.name: "{} to {}".format(*each.reach) for each in coded}
            raise InputError(f"no tokenizer codes an image with {budget:g} codes; they reach {reach}")


def compare_rates(coded: Sequence[Coded], budgets: Sequence[float], judges: Judges) -> list[dict[str, Any]]:
    """Rows of every tokenizer at its own rate, then at each budget of mean codes an image that it reaches."""
    real = Statistics.of(extract(judges.extractor, coded[0].images, "features of the images").features)
    rows = [row(each, "own", each.codes, each.grain, judges, real) for each in coded]
    for budget in budgets:
        for each in coded:
            if each.reach[0] <= budget <= each.reach[1]:
                rows.append(row(each, f"{budget:g} codes", *each.at(budget), judges, real))
    return rows


def rate_distortion(coded: Sequence[Coded], own: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Line]]:
    """Cost and fidelity along each tokenizer's rates, as rows and as lines of bits per pixel and PSNR.

    Args:
        own: rows at the own rates, which are marked.
    """
    rows, lines = [], []
    for each, mine in zip(coded, own, strict=True):
        least, most = each.reach
        least = round(KEPT_LEAST * most) if each.layout.kept else least
        points = []
        for tokens in progress_bar(np.linspace(least, most, CURVE_POINTS), desc=f"rates: {each.name}", unit="rate"):
            codes, grain = each.at(float(tokens))
            points.append(cost_and_fidelity(each, grain, each.decode(codes)))
        rows += [{"tokenizer": each.name, **point} for point in points]
        place = [(point["bits_per_pixel"], point["psnr"]) for point in points]
        lines.append(Line(each.name, place, [(mine["bits_per_pixel"], mine["psnr"])]))
    return rows, lines


def rate_table(rows: Sequence[dict[str, Any]], extractor: Extractor) -> tuple[list[str], list[list[Any]]]:
    """Headings and lines for ``report.table``."""
    names = {
        "tokenizer": "tokenizer",
        "rate": "rate",
        "tokens": "codes an image",
        "bits": "bits an image",
        "bits_per_pixel": "bits a pixel",
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "lpips": "LPIPS",
        "feature_distance": "feature distance (EfficientNet-Lite0)",
        "frechet": "rFID" if extractor.frechet == "FID" else extractor.frechet,
        "codes_used": "codebook used",
        "perplexity": "perplexity",
    }
    digits = {"tokens": ".1f", "bits": ".0f", "psnr": ".2f", "frechet": ".2f", "codes_used": ".1%", "perplexity": ".0f"}
    shown = [name for name in names if name in rows[0]]
    headings = [names[name] for name in shown] + ["share of cells (target)"]
    lines = []
    for values in rows:
        shares = ", ".join(f"{g} {s:.3f} ({values['targets'][g]:.3f})" for g, s in values["shares"].items())
        lines.append([format(values[n], digits[n]) if n in digits else values[n] for n in shown] + [shares])
    return headings, lines
