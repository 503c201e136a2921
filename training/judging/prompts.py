"""What prompts do, in numbers: whether likelihood finds an image's caption, and whether words move the colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.captions import words
from training.prepare_emoji import STYLES

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
WHITE = 245
"""Least value of every channel of a pixel that counts as background."""


def matching(scores: NDArray[np.float64]) -> dict[str, float]:
    """How well likelihood finds captions.

    Args:
        scores: float64 [N, 1 + M], log p of each image with its own caption (column 0) and with M others, in nats.

    Returns:
        ``own_above_mean``, the share of images that are likelier with their own caption than on average with the
        others; ``margin``, the mean difference in nats; ``recall_at_1`` and ``recall_at_10`` of the own one among all.
    """
    own, others = scores[:, :1], scores[:, 1:]
    margins = own[:, 0] - others.mean(1)
    better = (others >= own).sum(1)
    return {
        "images": len(scores),
        "others": others.shape[1],
        "own_above_mean": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "recall_at_1": float((better < 1).mean()),
        "recall_at_10": float((better < 10).mean()),
    }


def families(captions: Sequence[str], attributes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Captions that differ in one word of ``attributes`` alone: text with ``{}`` for it -> word -> caption; only those
    with all of three words or more."""
    found: dict[str, dict[str, str]] = {}
    for text in sorted(set(captions)):
        own = [word for word in attributes if word in words(text)]
        if len(own) == 1 and text.lower().count(own[0]) == 1:
            found.setdefault(text.lower().replace(own[0], "{}"), {})[own[0]] = text
    return {name: members for name, members in found.items() if len(members) >= 3}


def in_two_styles(captions: Sequence[str]) -> list[tuple[str, str]]:
    """Captions that are there without and with the suffix of a style of ``training.prepare_emoji``, sorted."""
    there, suffixes = set(captions), [style.suffix for style in STYLES.values() if style.suffix]
    return [(text, text + suffix) for text in sorted(there) for suffix in suffixes if text + suffix in there]


def foreground_colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean red, green and blue of the pixels that are not nearly white, of uint8 [S, S, 3]; white if there are none."""
    pixels = image.reshape(-1, 3).astype(np.float64)
    shown = pixels[(pixels < WHITE).any(1)]
    return shown.mean(0) if len(shown) else np.full(3, 255.0)


def hue(colours: NDArray[np.float64]) -> float:
    """Mean hue of colours [N, 3], in degrees, each weighted by how colourful it is."""
    red, green, blue = colours.T
    x, y = red - (green + blue) / 2, (green - blue) * np.sqrt(3) / 2
    return float(np.degrees(np.arctan2(y.sum(), x.sum())) % 360)


def nearest_word(
    real: dict[str, NDArray[np.float64]], drawn: dict[str, NDArray[np.float64]]
) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Whether samples are nearest to the real image of their own word.

    Args:
        real: word -> colour [3]; drawn: word -> colours [N, 3].

    Returns:
        bool [samples], and by word hue and brightness of the real image and of the samples, and the share that is
        nearest.
    """
    names = list(real)
    table = np.stack([real[name] for name in names])
    hits, told = [], {}
    for word, colours in drawn.items():
        nearest = np.square(colours[:, None] - table).sum(2).argmin(1)
        hit = nearest == names.index(word)
        hits.append(hit)
        told[word] = {
            **{"real_hue": hue(real[word][None]), "hue": hue(colours)},
            **{"real_brightness": float(real[word].mean()), "brightness": float(colours.mean())},
            "nearest": float(hit.mean()),
        }
    return np.concatenate(hits), told


def by_word(captions: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of what ``nearest_word`` told of several captions the means by word: the distance of the samples' hue from the
    real image's, ``hue_error`` in degrees (90 by chance), and both brightnesses in grey levels."""
    out = {}
    for word in dict.fromkeys(word for told in captions for word in told):
        rows = [told[word] for told in captions if word in told]
        apart = [abs((row["hue"] - row["real_hue"] + 180) % 360 - 180) for row in rows]
        means = {key: float(np.mean([row[key] for row in rows])) for key in ("real_brightness", "brightness")}
        out[word] = {"captions": len(rows), "hue_error": float(np.mean(apart)), **means}
    return out
