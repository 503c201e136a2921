"""The patch discriminator of the adversarial loss (spec/mq.md section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from training.models.whole_batch import BatchNorm2d


class PatchDiscriminator(nn.Module):
    """Convolutional network that says of every patch of an image whether it is real.

    Args:
        width: channels of the first layer; each further one doubles them, up to eight times as many.
        layers: layers of stride 2, at least 1; one of stride 1 and the projection to logits follow. The images must be
            at least ``3 * 2 ** layers`` pixels wide.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            steps += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                BatchNorm2d(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 1, h, w], positive for real, of images [B, 3, H, W] in about [-1, 1]."""
        return self.main(images)
