"""Networks whose features tell sets of images apart, with their published weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq_rt.progress import progress_bar
from runtimes.errors import ConfigError
from training.data.pixels import Pixels, to_float
from training.models.inception import Inception
from training.models.perceptual import EfficientNetLite0, SameConv, norm
from training.perceptual import load_lite0, load_named, read_weights

BATCH = 32
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_WEIGHTS = (
    f"--inception must be the weights of the FID network, {INCEPTION_FILE} "
    f"(https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}); without it the "
    "features of EfficientNet-Lite0 are taken, and no number is called FID"
)


class Extracted(NamedTuple):
    """``features`` float32 [N, D] and ``logits`` float32 [N, classes]."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]


class Extractor(Protocol):
    """A frozen network.

    Attributes:
        title: what tables call it.
        frechet: what they call the Fréchet distance in its features.
        class_score: what they call ``distribution.inception_score`` of its logits.
        width: D.
    """

    title: str
    frechet: str
    class_score: str
    width: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and logits [B, classes] of images float [B, 3, S, S] in [-1, 1]."""
        ...


class EfficientNetFeatures(EfficientNetLite0):
    """EfficientNet-Lite0 on images of 224 pixels, the size that it was trained with: the means of its last stage over
    the picture, and its logits of ImageNet's classes. An ``Extractor``."""

    title = "EfficientNet-Lite0"
    frechet = "Fréchet distance (EfficientNet-Lite0)"
    class_score = "score of Inception's formula (EfficientNet-Lite0's classes)"
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
    for weight in net.parameters():
        if weight.ndim == 4:  # depthwise convolutions are faster so
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


def inception(weights: str | Path) -> Inception:
    """The network of FID with its published weights, frozen.

    Args:
        weights: ``pt_inception-2015-12-05-6726825d.pth``, or another file of the same names.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it is damaged, or does not hold exactly these tensors.
    """
    path = Path(weights)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; {INCEPTION_WEIGHTS}")
    net = Inception()
    tensors = read_weights(path, INCEPTION_WEIGHTS)
    # counts of training steps, which play no part here; files of some versions lack them
    counted = {name: t for name, t in net.state_dict().items() if name.endswith("num_batches_tracked")}
    load_named(net, {}, counted | tensors, path, INCEPTION_WEIGHTS)
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
