"""The network of the Fréchet Inception Distance: Inception-v3 as TensorFlow trained it for 1,008 classes, under the
names of its published PyTorch weights. It differs from the usual Inception-v3 in its average poolings, which do not
count the padding, and in its last block, whose pooled branch takes the maximum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, WIDTH, SIDE = 1008, 2048, 299
Size = int | tuple[int, int]
Link = tuple[str, int, Size] | tuple[str, int, Size, int]
"""Suffix of the name, output channels, kernel and, if it is not 1, stride."""


class Conv(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Size = 1, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, and a pooling of the input; their outputs joined along the channels.

    Args:
        inputs: channels.
        chains: name -> links. Links whose suffix ends in a letter fork: each reads the link before them. Those with a
            stride are not padded.
        pool: ``mean``, ``max`` (both 3 x 3) or ``halve`` (maximum, with stride 2).
        projection: channels of a convolution behind the pooling, 0 for none.
    """

    def __init__(self, inputs: int, chains: Mapping[str, Sequence[Link]], pool: str, projection: int = 0) -> None:
        super().__init__()
        self.pool, self.chains = pool, [[name + link[0] for link in links] for name, links in chains.items()]
        self.outputs = projection or inputs
        for name, links in chains.items():
            width, ends = inputs, 0
            for suffix, outputs, kernel, *strides in links:
                stride = strides[0] if strides else 1
                self.add_module(name + suffix, Conv(width, outputs, kernel, stride, padded=stride == 1))
                if suffix[-1:].isalpha():
                    ends += outputs
                else:
                    width = outputs
            self.outputs += ends or width
        if projection:
            self.branch_pool = Conv(inputs, projection)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.chains:
            h, ends = x, []
            for name in names:
                conv = self.get_submodule(name)
                if name[-1].isalpha():
                    ends.append(conv(h))
                else:
                    h = conv(h)
            outputs += ends or [h]
        if self.pool == "mean":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.max_pool2d(x, 3, 2)
        outputs.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(outputs, 1)


def _small(inputs: int, projection: int) -> Mixed:
    chains: dict[str, list[Link]] = {
        "branch1x1": [("", 64, 1)],
        "branch5x5": [("_1", 48, 1), ("_2", 64, 5)],
        "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)],
    }
    return Mixed(inputs, chains, "mean", projection)


def _long(inputs: int, width: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    twice: list[Link] = [("_1", width, 1), ("_2", width, down), ("_3", width, across), ("_4", width, down)]
    chains: dict[str, list[Link]] = {
        "branch1x1": [("", 192, 1)],
        "branch7x7": [("_1", width, 1), ("_2", width, across), ("_3", 192, down)],
        "branch7x7dbl": [*twice, ("_5", 192, across)],
    }
    return Mixed(inputs, chains, "mean", 192)


def _wide(inputs: int, pool: str) -> Mixed:
    across, down = (1, 3), (3, 1)
    chains: dict[str, list[Link]] = {
        "branch1x1": [("", 320, 1)],
        "branch3x3": [("_1", 384, 1), ("_2a", 384, across), ("_2b", 384, down)],
        "branch3x3dbl": [("_1", 448, 1), ("_2", 384, 3), ("_3a", 384, across), ("_3b", 384, down)],
    }
    return Mixed(inputs, chains, pool, 192)


class Inception(nn.Module):
    """The network, from pixels to the means of its last block and the logits without the last layer's bias, as the
    Inception Score of the field takes them. An ``Extractor``."""

    title = "Inception (FID weights)"
    frechet = "FID"
    class_score = "Inception Score"
    width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _small(192, 32), _small(256, 64), _small(288, 64)
        halved: list[Link] = [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3, 2)]
        self.Mixed_6a = Mixed(288, {"branch3x3": [("", 384, 3, 2)], "branch3x3dbl": halved}, "halve")
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", _long(768, width))
        both: dict[str, list[Link]] = {
            "branch3x3": [("_1", 192, 1), ("_2", 320, 3, 2)],
            "branch7x7x3": [("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, 3, 2)],
        }
        self.Mixed_7a = Mixed(768, both, "halve")
        self.Mixed_7b, self.Mixed_7c = _wide(1280, "mean"), _wide(2048, "max")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 2048] and logits [B, 1008] of images float [B, 3, S, S] in [-1, 1], which are resized to 299
        pixels, bilinearly and without a filter."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        for name, part in self.named_children():
            if name == "fc":
                break
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = part(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T
