"""Integer convolutions of the image decoder, for ONNX Runtime's ``QLinearConv``.

The 3x3 convolutions of residual blocks and after upsampling, which are nearly all of the decoder's work, read and write
uint8 maps with a scale and a zero point that are fixed at export, so that no image depends on another, and have int8
weights with one scale for each output channel. The first and the last convolution, those of 1x1, attention, norms and
the de-masker of MQ stay float32. The encoder stays float32 as a whole: rounding would change codes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.quantization.layers import replace_layer, watching
from training.models.tokenizer import Tokenizer

Range = tuple[float, float]
"""Least and largest value."""
WEIGHT_LEVELS = 63
"""Largest weight. 7 bits, because processors without VNNI add two products in 16 bits: 2 * 255 * 63 < 2**15."""
LARGEST_BIAS = 2**22
"""In steps of the sums of products, so that float32 holds it."""


class QuantConv(nn.Module):
    """A convolution of integers: x float [B, C, H, W] -> float [B, N, H, W].

    Args:
        conv: the float convolution.
        input_range, output_range: of its input and of its output.
    """

    levels: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, input_range: Range, output_range: Range) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        self.scale_in, self.zero_in = affine(*input_range)
        self.scale_out, self.zero_out = affine(*output_range)
        largest = conv.weight.detach().abs().amax((1, 2, 3)).clamp_min(1e-12)
        bias = torch.zeros_like(largest) if conv.bias is None else conv.bias.detach()
        least = bias.abs() / (self.scale_in * LARGEST_BIAS)
        self.register_buffer("scales", torch.maximum(largest / WEIGHT_LEVELS, least))
        self.register_buffer("levels", (conv.weight.detach() / self.scales[:, None, None, None]).round().to(torch.int8))
        self.register_buffer("bias", (bias / (self.scales * self.scale_in)).round().to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self.traced(x)
        levels_in = ((x / self.scale_in).round() + self.zero_in).clamp(0, 255) - self.zero_in
        sums = F.conv2d(levels_in, self.levels.to(x.dtype), self.bias.to(x.dtype), padding=1)
        levels_out = (sums * (self.scales * (self.scale_in / self.scale_out))[:, None, None]).round() + self.zero_out
        return (levels_out.clamp(0, 255) - self.zero_out) * self.scale_out

    def traced(self, x: Tensor) -> Tensor:
        """The runtime's operators. For tracing only; it computes nothing in PyTorch."""

        def operator(name: str, inputs: Sequence[Tensor], dtype: torch.dtype, channels: int, **attrs: Any) -> Tensor:
            shape = [x.shape[0], channels, *x.shape[2:]]
            out: Tensor = torch.onnx.ops.symbolic(name, inputs, attrs=attrs, dtype=dtype, shape=shape, version=10)
            return out

        def constants(scale: float, zero: int) -> tuple[Tensor, Tensor]:
            return torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)

        grid_in, grid_out = constants(self.scale_in, self.zero_in), constants(self.scale_out, self.zero_out)
        weight = self.levels, self.scales, torch.zeros_like(self.scales, dtype=torch.int8)
        y = operator("QuantizeLinear", [x, *grid_in], torch.uint8, x.shape[1])
        inputs = [y, *grid_in, *weight, *grid_out, self.bias]
        y = operator("QLinearConv", inputs, torch.uint8, len(self.levels), pads=[1] * 4)
        return operator("DequantizeLinear", [y, *grid_out], torch.float32, len(self.levels))


def affine(least: float, largest: float) -> tuple[float, int]:
    """Scale and zero point of uint8 levels for values from ``least`` to ``largest``; 0 is always one of them."""
    least, largest = min(least, 0.0), max(largest, 1e-6)
    scale = (largest - least) / 255
    return scale, round(-least / scale)


def quantize_decoder(tokenizer: Tokenizer, maps: Sequence[Tensor]) -> Tokenizer:
    """A copy of a tokenizer with QuantConv layers in its decoder.

    Args:
        maps: int64 [h, w] code maps of typical images, which the ranges of activations come from.
    """
    quantized = copy.deepcopy(tokenizer)
    ranges = activation_ranges(quantized, maps)
    for name, conv in list(convolutions(quantized)):
        replace_layer(quantized, name, QuantConv(conv, *ranges[name]))
    return quantized.eval().requires_grad_(False)


def convolutions(tokenizer: Tokenizer) -> Iterator[tuple[str, nn.Conv2d]]:
    """The layers that become integers, by name."""
    for name, layer in tokenizer.named_modules():
        inside = name.startswith("decoder.") and not name.endswith(("conv_in", "conv_out"))
        if inside and isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            yield name, layer


@torch.no_grad()
def activation_ranges(tokenizer: Tokenizer, maps: Sequence[Tensor]) -> dict[str, tuple[Range, Range]]:
    """Least and largest input and output of each of those layers over all maps."""
    ranges: dict[str, tuple[Range, Range]] = {}

    def wider(one: Range, values: Tensor) -> Range:
        return min(one[0], float(values.min())), max(one[1], float(values.max()))

    def look(name: str, x: Tensor, y: Tensor) -> None:
        empty = (math.inf, -math.inf)
        input_range, output_range = ranges.get(name, (empty, empty))
        ranges[name] = wider(input_range, x), wider(output_range, y)

    with watching(convolutions(tokenizer), look):
        for codes in maps:
            tokenizer.decode_maps(codes[None])
    return ranges
