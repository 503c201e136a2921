"""The image decoder in integers: one convolution exactly, whole decoders closely, and each image by itself."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_models import masked_model, small_model
from torch import nn

from export.graphs import DecoderGraph
from export.quantization.decoder import QuantConv, affine, convolutions, quantize_decoder
from export.tracing import trace


def test_affine() -> None:
    """Zero is a level, both ends are within half a level, and ranges on one side of zero reach to it."""
    for least, largest in [(-0.28, 6.0), (-3.0, 2.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)]:
        scale, zero = affine(least, largest)
        assert 0 <= zero <= 255
        for value in (min(least, 0.0), max(largest, 0.0)):
            assert abs((np.clip(np.round(value / scale) + zero, 0, 255) - zero) * scale - value) <= scale * 0.51


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_kernel_equals_pytorch(bias: bool, tmp_path: Path) -> None:
    """The runtime's convolution gives the very levels that QuantConv gives, also outside the ranges and for the
    largest weights and activations, whose products fit in pairs into 16 bits."""
    torch.manual_seed(0)
    conv = nn.Conv2d(40, 24, 3, padding=1, bias=bias)
    conv.weight[0] = conv.weight[0].sign()  # as far out as levels go
    conv.weight[1] = 0  # a bias alone
    x = torch.nn.functional.silu(torch.randn(3, 40, 9, 7) * 2)
    x[0] = x.max() * 1.5
    y = conv(x)
    layer = QuantConv(conv, (float(x[1].min()), float(x[1].max())), (float(y[1].min()), float(y[1].max()))).eval()
    trace(layer, {"x": x}, ["y"], tmp_path / "layer.onnx")
    found = onnxruntime.InferenceSession(tmp_path / "layer.onnx").run(None, {"x": x.numpy()})[0]
    differ = np.abs(found - layer(x).numpy()) / layer.scale_out
    print(f"integer convolution: {(differ > 0.5).mean():.2e} of the levels differ, by {differ.max():.1f}")
    assert differ.max() < 0.01
    rounding = float((layer(x[1:]) - conv(x[1:]).clamp(float(y[1].min()), float(y[1].max()))).abs().max())
    assert 0 < rounding < 0.05 * float(y[1].abs().max())


@torch.no_grad()
@pytest.mark.parametrize("make", [small_model, masked_model])
def test_decoders(make: object, tmp_path: Path) -> None:
    """A quantized decoder stays near the float one, in PyTorch and in the runtime; the runtime really computes
    integers; an image is the same alone and beside others; the model given is not changed."""
    model = make(("ant", "bee", "cat"))  # type: ignore[operator]
    vae, side = model.tokenizer, model.layout.sides[-1]
    torch.manual_seed(0)
    maps = torch.randint(0, model.layout.codebook_size, (6, side, side))
    before = vae.decode_maps(maps)
    made = quantize_decoder(vae, list(maps[:4]))
    assert torch.equal(vae.decode_maps(maps), before)
    count = len(list(convolutions(vae)))
    assert count == sum(isinstance(layer, QuantConv) for layer in made.modules()) >= 6
    path = tmp_path / "decoder.onnx"
    trace(DecoderGraph(made), {"codes": maps[:2]}, ["images"], path)
    assert sum(node.op_type == "QLinearConv" for node in onnx.load(path).graph.node) == count
    session = onnxruntime.InferenceSession(path)
    together = session.run(None, {"codes": maps.numpy()})[0]
    for i in range(len(maps)):
        np.testing.assert_array_equal(session.run(None, {"codes": maps[i : i + 1].numpy()})[0][0], together[i])
    size = float(before.square().mean().sqrt())
    for name, images in (("PyTorch", made.decode_maps(maps).numpy()), ("runtime", together)):
        error = float(np.sqrt(np.square(images - before.numpy()).mean())) / size
        print(f"{name}: root mean square of integer against float decoder {error:.2e}")
        assert 1e-5 < error < 0.05  # measured 0.036: 8 bits of each map, over random weights
