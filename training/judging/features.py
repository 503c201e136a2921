"""Networks whose features tell sets of images apart, with their published weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq_rt.progress import progress_bar
from training.data.pixels import Pixels, to_float
from training.models.perceptual import EfficientNetLite0, SameConv, norm
from training.perceptual import load_lite0

BATCH = 32


class Extracted(NamedTuple):
    """``features`` float32 [N, D] and ``logits`` float32 [N, classes]."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]


class Extractor(Protocol):
    """A frozen network.

    Attributes:
        title: what tables call it.
        frechet: what they call the Fréchet distance in its features.
        width: D.
    """

    title: str
    frechet: str
    width: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and logits [B, classes] of images float [B, 3, S, S] in [-1, 1]."""
        ...


class EfficientNetFeatures(EfficientNetLite0):
    """EfficientNet-Lite0 on images of 224 pixels, the size that it was trained with: the means of its last stage over
    the picture, and its logits of ImageNet's classes. An ``Extractor``."""

    title = "EfficientNet-Lite0"
    frechet = "Fréchet distance (EfficientNet-Lite0)"
    width, side = EfficientNetLite0.STAGES[-1][1], 224

    def __init__(self) -> None:
        super().__init__((len(EfficientNetLite0.STAGES) - 1,))
        self.conv_head, self.bn1, self.fc = SameConv(self.width, 1280, 1), norm(1280), nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        last = super().forward(F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True))[0]
        top = F.relu6(self.bn1(self.conv_head(last)))
        return last.mean((2, 3)), self.fc(top.mean((2, 3)))


def efficientnet_features() -> EfficientNetFeatures:
    """With the weights of its package, frozen.

    Raises:
        ConfigError: the package is missing; names the extra that brings it.
    """
    net = EfficientNetFeatures()
    load_lite0(net)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def extract(extractor: Extractor, images: Pixels | Iterator[Pixels], title: str, count: int | None = None) -> Extracted:
    """Features and logits of images uint8 [N, S, S, 3], or of ``count`` that come in batches."""
    chunks = images
    if isinstance(images, np.ndarray):
        count = len(images)
        chunks = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    features, logits = [], []
    with progress_bar(total=count, desc=title, unit="image", delay=3, leave=False) as bar:
        for chunk in chunks:
            f, y = extractor(to_float(chunk))
            features.append(f.numpy())
            logits.append(y.numpy())
            bar.update(len(chunk))
    return Extracted(np.concatenate(features), np.concatenate(logits))
