"""A whole model in integers: the transformer's linear layers and key/value caches, and the decoder's convolutions.

Embedding tables stay float32: a token reads one row of each, so they cost nothing. Keys and values are cached as int8
with one scale for each channel, fixed at export, for ONNX Runtime's ``GroupQueryAttention``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from dvq_rt.layout import TokenLayout
from export.quantization.calibration import Case, calibration_cases, observe
from export.quantization.decoder import quantize_decoder
from export.quantization.layers import linear_layers, replace_layer
from export.quantization.tuning import tune
from export.quantization.weights import BLOCK, CachedProjection, QuantLinear, quantize_weight
from runtimes.errors import ExportError
from training.checkpoint import Model
from training.models.transformer import StackedTransformer

BITS = {"int8": 8, "int4": 4}


def quantize_model(model: Model, weights: str, calibrate: int, tuning: int) -> Model:
    """A copy of a model with integer weights.

    Args:
        weights: ``int8`` or ``int4``.
        calibrate: images that the model draws for itself; 0 rounds weights to the nearest and takes the ranges of
            keys, values and the decoder's maps from random codes.
        tuning: optimization steps on those images, see ``tuning.tune``.

    Raises:
        ExportError: a layer is too narrow for blocks of integers.
    """
    vae, net = model.both()
    check_widths(net, weights)
    cases, maps = calibration_cases(model, calibrate)
    quantized = quantize_transformer(net, weights, cases, feed_back=calibrate > 0)
    if tuning:
        quantized = tune(net, quantized, cases, tuning)
    return model.with_parts(quantize_decoder(vae, [torch.from_numpy(codes) for codes in maps]), quantized)


def quantize_weights(model: Model, weights: str, calibrate: int) -> Model:
    """A copy of a model of which the transformer's linear layers alone have integer weights: activations, caches and
    the decoder keep their format. This is what CUDA's ``MatMulNBits`` computes.

    Raises:
        ExportError: a layer is too narrow for blocks of integers.
    """
    vae, net = model.both()
    check_widths(net, weights)
    cases, _ = calibration_cases(model, calibrate)
    quantized = quantize_transformer(net, weights, cases, feed_back=calibrate > 0, weights_only=True)
    return model.with_parts(copy.deepcopy(vae), quantized)


def quantize_transformer(
    model: StackedTransformer,
    weights: str,
    cases: Sequence[Case],
    *,
    feed_back: bool = True,
    weights_only: bool = False,
) -> StackedTransformer:
    """A copy of a transformer with QuantLinear layers and int8 caches.

    Args:
        weights: ``int8`` or ``int4``.
        cases: of typical images, which the caches' ranges come from.
        feed_back: feed rounding errors back along the inputs' second moments over these, as in GPTQ
            (arXiv 2210.17323); if not, weights are rounded to the nearest.
        weights_only: leave activations and caches as they are.
    """
    net = copy.deepcopy(model)
    moments, scales_of_caches = observe(net, cases, moments=feed_back)

    def quantized(name: str, layer: nn.Linear) -> nn.Module:
        bits = layer_bits(name, weights, net.layout)
        levels, scales = quantize_weight(layer.weight.detach(), bits, moments.get(name))
        integers = QuantLinear(levels, scales, bits, layer.bias, rounds=not weights_only)
        cached = name.endswith("attn.qkv") and not weights_only
        return CachedProjection(integers, scales_of_caches[name]) if cached else integers

    for name, layer in list(linear_layers(net)):
        replace_layer(net, name, quantized(name, layer))
    return net.eval().requires_grad_(False)


def check_widths(model: StackedTransformer, weights: str) -> None:
    """
    Raises:
        ExportError: a layer's number of inputs is not a multiple of ``BLOCK``.
    """
    for name, layer in linear_layers(model):
        if layer.in_features % BLOCK:
            raise ExportError(
                f"{name} has {layer.in_features} inputs; {weights} needs a multiple of {BLOCK}, so use --weights fp32 "
                "or fp16"
            )


def layer_bits(name: str, weights: str, layout: TokenLayout) -> int:
    """Bits of a layer's weights. With ``int4`` those layers keep 8 whose rounding moves the distributions most: the
    heads, because a logit's error is the draw's error; the first block, whose error all others carry on; and the first
    layer of each MLP."""
    first = name.startswith(f"{layout.heads[0]}_blocks.0.")
    return 8 if weights == "int8" or first or name.endswith(("head.linear", ".mlp.0")) else 4
