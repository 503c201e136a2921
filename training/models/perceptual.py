"""Frozen networks whose features tell images apart as people do: LPIPS (spec/dq.md section 7), and a distance in the
features of EfficientNet-Lite0 for those who do not have its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def feature_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared differences of two feature maps [B, C, H, W] whose vectors along C are brought to length 1, of the same
    shape."""
    x, y = (z / (torch.linalg.vector_norm(z, dim=1, keepdim=True) + 1e-10) for z in (x, y))
    return (x - y).square()


class VGG16(nn.Module):
    """The convolutions of VGG16, under torchvision's names (``features.N``)."""

    LEVELS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    """Width and number of convolutions of each level; a level has half the side of the one before."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in self.LEVELS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The features of each level after its last ReLU, of normalized images [B, 3, H, W] of at least 16 pixels."""
        levels, x = [], images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                levels.append(x)
            x = layer(x)
        return [*levels, x]


class LPIPS(nn.Module):
    """Learned perceptual distance in the features of VGG16. The dropout of the released module is left out: it would
    be on in training (spec/dq.md Q20).

    Attributes:
        vgg: the features.
        weights: of the channels of each level.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vgg = VGG16()
        self.weights = nn.ParameterList(torch.zeros(1, width, 1, 1) for width, _ in VGG16.LEVELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance [B] of images [B, 3, H, W] in about [-1, 1], of at least 16 pixels."""
        features = (self.vgg((images - self.shift) / self.scale) for images in (x, y))
        levels = zip(*features, self.weights, strict=True)
        return torch.stack([F.conv2d(feature_distance(a, b), w).mean((1, 2, 3)) for a, b, w in levels]).sum(0)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: ``ceil(size / stride)`` outputs, the odd row and column at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        down, right = (
            max(kernel - stride if size % stride == 0 else kernel - size % stride, 0) for size in x.shape[2:]
        )
        return super().forward(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


class InvertedResidual(nn.Module):
    """Expansion to ``ratio`` times the width, depthwise convolution, projection; added to the input where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, ratio: int) -> None:
        super().__init__()
        inner = inputs * ratio
        if ratio != 1:
            self.expand_conv, self.bn0 = SameConv(inputs, inner, 1), norm(inner)
        self.expands = ratio != 1
        self.depthwise_conv, self.bn1 = SameConv(inner, inner, kernel, stride, groups=inner), norm(inner)
        self.project_conv, self.bn2 = SameConv(inner, outputs, 1), norm(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.adds else h


def norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class EfficientNetLite0(nn.Module):
    """The trunk of EfficientNet-Lite0 up to its last wanted stage, under the published names without their leading
    underscores.

    Args:
        stages: numbers of the stages of ``STAGES`` whose features are wanted, ascending.
    """

    STAGES = (
        (1, 16, 3, 1, 1),
        (2, 24, 3, 2, 6),
        (2, 40, 5, 2, 6),
        (3, 80, 3, 2, 6),
        (3, 112, 5, 1, 6),
        (4, 192, 5, 2, 6),
        (1, 320, 3, 1, 6),
    )
    """Blocks, width, kernel, stride of the first block and expansion of each stage."""
    BLOCKS = sum(blocks for blocks, *_ in STAGES)

    def __init__(self, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, stride=2), norm(32)
        blocks: list[nn.Module] = []
        channels, ends = 32, []
        for count, width, kernel, stride, ratio in self.STAGES[: stages[-1] + 1]:
            for n in range(count):
                blocks.append(InvertedResidual(channels, width, kernel, stride if n == 0 else 1, ratio))
                channels = width
            ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.wanted = {ends[stage] for stage in stages}

    def forward(self, images: Tensor) -> list[Tensor]:
        """The features at the end of each wanted stage, of images [B, 3, H, W] in about [-1, 1]."""
        x = (127.5 * images + 0.5) / 128  # the network wants (level - 127) / 128 of levels in 0..255
        x = F.relu6(self.bn0(self.conv_stem(x)))
        features = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.wanted:
                features.append(x)
        return features


class EfficientNetDistance(nn.Module):
    """Distance in the features of EfficientNet-Lite0 at the end of several stages, where the network is linear."""

    STAGES = (0, 1, 2, 3)
    """Later ones are blind to fine errors, and without the first one all are (docs/training.md)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = EfficientNetLite0(self.STAGES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance [B] of images [B, 3, H, W] in about [-1, 1]: the mean over stages and places of the squared distance
        of feature vectors of length 1, in 0..4."""
        levels = zip(self.net(x), self.net(y), strict=True)
        return torch.stack([feature_distance(a, b).sum(1).mean((1, 2)) for a, b in levels]).mean(0)
