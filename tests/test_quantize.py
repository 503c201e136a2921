"""Integer weights: their arithmetic, what calibration buys, the kernel against PyTorch, and quantized engines."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_models import ragged_tokens, small_model, small_transformer
from torch import Tensor

import export.accuracy as accuracy
from dvq_rt.bench import step_bytes
from dvq_rt.generator import Generator
from export.accuracy import choices, compare, decoder_psnr
from export.lowering import grouped_query_attention
from export.quantization.calibration import Case, calibration_cases, observe
from export.quantization.model import quantize_transformer
from export.quantization.tuning import tune
from export.quantization.weights import (
    BLOCK,
    CachedProjection,
    QuantLinear,
    dequantize,
    pack,
    quantize_weight,
    round_activations,
)
from export.to_onnx import export_onnx
from export.tracing import trace
from runtimes.errors import ConfigError, ExportError, InputError
from training.checkpoint import Model
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer
from training.step import Attention, reference_attention
from training.torch_program import stacked


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.008), (4, 0.12)])
def test_round_to_nearest(bits: int, bound: float) -> None:
    """Half a step of each block's own scale at most; zeros stay zeros, and both signs reach the outermost level."""
    torch.manual_seed(0)
    weight = torch.randn(6, 2 * BLOCK) * torch.tensor([1e-3, 1, 30, 1, 1, 1])[:, None]
    weight[3] = 0
    levels, scales = quantize_weight(weight, bits)
    found = dequantize(levels, scales, bits)
    error = (found - weight).norm(dim=1) / weight.norm(dim=1).clamp_min(1e-9)
    assert error.max() < bound and error[0] > 0
    assert (found[3] == 0).all()
    assert levels.dtype == torch.uint8 and int(levels.max()) < 2**bits


def test_packing() -> None:
    """Two 4-bit levels share a byte, the first in its low half; 8-bit ones stay as they are."""
    levels = (torch.arange(2 * BLOCK) % 16).to(torch.uint8)[None]
    packed = pack(levels, 4)
    assert packed.shape == (1, 2, BLOCK // 2) and packed[0, 0, :2].tolist() == [0x10, 0x32]
    assert pack(levels, 8).flatten().tolist() == levels.flatten().tolist()


def test_calibration_lowers_the_output_error() -> None:
    """With correlated inputs, feeding errors back makes outputs much better than rounding to the nearest does."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(512, 64)
    weight = torch.randn(32, 64)
    want = inputs @ weight.T
    errors = []
    for moments in (None, inputs.T @ inputs / 512):
        levels, scales = quantize_weight(weight, 4, moments)
        errors.append(float((inputs @ dequantize(levels, scales, 4).T - want).norm() / want.norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_kernel_equals_pytorch(bits: int, tmp_path: Path) -> None:
    """The runtime's kernel computes what QuantLinear does, rounding of activations included, for rows alone and
    together. A row is bit-identical whatever stands in the others, and in 8 bits also alone; in 4 bits a kernel without
    AVX-512 adds the products of a single row in another order."""
    torch.manual_seed(bits)
    layer = QuantLinear(*quantize_weight(torch.randn(48, 96), bits), bits, torch.randn(48)).eval()
    trace(layer, {"x": torch.zeros(2, 1, 96)}, ["y"], tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    x = torch.randn(5, 1, 96)
    together = session.run(None, {"x": x.numpy()})[0]
    alone = np.concatenate([session.run(None, {"x": x[i : i + 1].numpy()})[0] for i in range(5)])
    want = layer(x)
    exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for i in range(5):
        others = torch.randn(5, 1, 96)
        others[i] = x[i]
        np.testing.assert_array_equal(session.run(None, {"x": others.numpy()})[0][i], together[i])
    if bits == 8:
        np.testing.assert_array_equal(together, alone)
    for got in (together, alone):
        error = float(np.abs(got - want.numpy()).max() / want.abs().max())
        print(f"{bits} bits: relative error {error:.2g}")
        assert error <= 1e-6
    assert (exact - want).abs().max() > 1e-4  # the comparison can tell whether activations are rounded


def test_activations_of_zero() -> None:
    """An empty block stays empty instead of dividing by zero."""
    assert round_activations(torch.zeros(1, BLOCK)).tolist() == [[0.0] * BLOCK]


def test_moments_are_of_the_inputs(class_model: Model) -> None:
    """Every linear layer is watched, over all rows that ran, and the hooks are gone afterwards."""
    net = class_model.transformer
    assert net
    tokens = ragged_tokens(class_model.layout, 2)[1]

    found, scales = observe(net, [Case(tokens)], moments=True)
    assert len(found) == 4 * 3 + 2 and len(scales) == 3
    assert all(m.shape[0] == m.shape[1] and torch.equal(m, m.T) for m in found.values())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.fixture(scope="module", params=["int8", "int4", "int4 mq", "int8 uncalibrated", "int4 tuned text"])
def quantized(
    request: pytest.FixtureRequest, class_model: Model, mq_model: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Generator, Model]:
    weights, _, kind = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("quantized") / "engine"
    model = mq_model if kind == "mq" else class_model
    if "text" in kind:  # and given tokens
        net = small_transformer(class_model.layout, given=True, text=TextConfig(8, 256, 1))
        model = class_model.with_parts(class_model.both()[0], net)
    calibrate, tuning = 0 if kind == "uncalibrated" else 4, 2 if "tuned" in kind else 0
    export_onnx(model, folder, slots=4, weights=weights, calibrate=calibrate, tuning=tuning)
    return Generator(folder, threads=1), model


def test_quantized_engine(quantized: tuple[Generator, Model], generator: Generator) -> None:
    """The engine says what it is, its checks pass, and it is near the float model, 8 bits nearer than 4. Weights,
    caches and the decoder's convolutions are integers in the file."""
    engine, model = quantized
    weights = engine.manifest.weights
    operators = {
        part: Counter(node.op_type for node in onnx.load(engine.path / f"{part}.onnx").graph.node)
        for part in ("step", "decoder", "encoder")
    }
    assert operators["step"]["MatMulNBits"] == 4 * 3 + 2 and not operators["step"]["Gemm"]
    assert operators["decoder"]["QLinearConv"] >= 6 and not operators["encoder"]["QLinearConv"]
    interface = engine.manifest.step
    assert {s["dtype"] for s in interface["inputs"] if s["name"] in dict(interface["caches"])} == {"int8"}
    if model.layout == generator.layout:
        assert 4 * step_bytes(engine.engine, 2, 9)["caches"] == step_bytes(generator.engine, 2, 9)["caches"]
    checks = {c.name: c for c in engine.verify()}
    assert all(c.ok for c in checks.values()), checks
    assert "step: share of most probable tokens that differ" in checks
    assert not any(name.startswith("free run") for name in checks)
    rows = ragged_tokens(model.layout, 6)
    found = compare(model, rows, engine.engine.force(rows))
    images = decoder_psnr(model, engine.engine, rows)
    print({name: f"{found['both'][name]:.3g}" for name in ("top1", "logit_error", "draw")}, f"{images:.1f} dB")
    # measured: top-1 0.98 to 0.99 of both, logits 0.03 and 0.04, draws 0.82 and 0.70 at least, 43 dB at least
    low, high, drawn = {"int8": (0.97, 0.05, 0.77), "int4": (0.95, 0.1, 0.6)}[weights]
    assert found["both"]["top1"] >= low and found["both"]["logit_error"] <= high
    assert drawn < found["both"]["draw"] < 1
    assert 40 < images < 80
    assert len(engine.sample(3, labels=[0, 1, 2], seed=1)) == 3


def test_accuracy_of_the_float_engine(generator: Generator, class_model: Model) -> None:
    """Nothing is lost where nothing was rounded, and every choice is counted once: coarse positions and all codes."""
    rows = ragged_tokens(class_model.layout, 5)
    found = compare(class_model, rows, generator.engine.force(rows))
    assert found["both"]["top1"] == found["both"]["draw"] == 1 and found["both"]["logit_error"] < 2e-4
    assert abs(found["both"]["nll_change"]) < 1e-5 and decoder_psnr(class_model, generator.engine, rows) > 50
    for row in rows:
        parts = choices(class_model, row)
        assert len(parts["content"][0]) == int((row.content < class_model.layout.codebook_size).sum())
        coarse = row.segment[1:] == 0
        assert len(parts["position"][0]) == int(coarse.sum())


def test_accuracy_refuses_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read; 0 images would be all of them or none, -1 all but the last."""
    for number in ("0", "-1"):
        with pytest.raises(SystemExit):
            accuracy.main(["checkpoint", "data", "engine", "--images", number])
        assert f"--images is {number}; it must be an integer from 1" in capsys.readouterr().err


def test_refusals(class_model: Model, tmp_path: Path) -> None:
    """Unknown formats leave nothing behind."""
    with pytest.raises(ExportError, match="weights is 'int2'; it must be one of"):
        export_onnx(class_model, tmp_path / "engine", weights="int2")
    net = class_model.transformer
    assert net
    narrow = copy.deepcopy(class_model)
    narrow.transformer = StackedTransformer(replace(net.config, width=40), net.layout)
    with pytest.raises(ExportError, match=r"qkv has 40 inputs; int4 needs a multiple of 32, so use --weights fp32"):
        export_onnx(narrow, tmp_path / "engine", weights="int4")
    for options, words in (
        ({"calibrate": -1}, "calibrate is -1; it must be an integer from 0 to"),
        ({"calibrate": 10**30}, "calibrate is 10+; it must be an integer from 0 to"),
        ({"calibrate": True}, "calibrate is True; it must be an integer"),
        ({"tuning": -1}, "tuning is -1; it must be an integer from 0 to"),
        ({"tuning": float("nan")}, "tuning is nan; it must be an integer"),
        ({"calibrate": 0, "tuning": 5}, "tuning is 5 and calibrate 0; tuning needs images"),
    ):
        with pytest.raises((InputError, ConfigError), match=words):
            export_onnx(class_model, tmp_path / "engine", weights="int8", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_tuning_brings_the_model_nearer(class_model: Model) -> None:
    """A few steps on the model's own images lower the distance between its distributions and the float model's on
    others; integers stay integers, and the models given are not changed."""
    net = class_model.transformer
    assert net
    cases, other = calibration_cases(class_model, 16)[0], calibration_cases(class_model, 8, seed=1)[0]
    start = quantize_transformer(net, "int4", cases)
    before = start.content_blocks[0].mlp[2].packed.clone()

    def distance(student: torch.nn.Module) -> float:
        inputs, used = stacked(net.layout, [case.tokens for case in other])
        with torch.no_grad():
            parts = [
                torch.nn.functional.kl_div(
                    got[used].log_softmax(-1), want[used].log_softmax(-1), log_target=True, reduction="batchmean"
                )
                for want, got in zip(net(*inputs), student(*inputs), strict=True)
            ]
        return float(sum(parts))

    tuned = tune(net, start, cases, 120)
    assert distance(tuned) < 0.8 * distance(start)
    layer = tuned.content_blocks[0].mlp[2]
    assert isinstance(layer, QuantLinear) and (layer.packed != before).any()
    assert torch.equal(start.content_blocks[0].mlp[2].packed, before)
    assert all(isinstance(m.weight, torch.nn.Parameter) for m in [net.position_blocks[0].mlp[0]])


def test_layers_that_keep_8_bits() -> None:
    """With 4 bits the heads, the block that all others build on and half of each MLP keep 8; the model given is not
    changed."""
    model = small_model()
    net = model.both()[1]
    found = quantize_transformer(net, "int4", calibration_cases(model, 1)[0], feed_back=False)
    bits = {name: m.bits for name, m in found.named_modules() if isinstance(m, QuantLinear)}
    kept = {name for name, b in bits.items() if b == 8}
    first = {name for name in bits if name.startswith("position_blocks.0.")}
    rest = {"position_head.linear", "content_head.linear", "content_blocks.0.mlp.0", "content_blocks.1.mlp.0"}
    assert kept == first | rest and len(first) == 4
    assert set(bits.values()) == {4, 8} and isinstance(net.content_head.linear, torch.nn.Linear)


def test_cache_in_8_bits(class_model: Model, tmp_path: Path) -> None:
    """Attention over the engine's int8 cache is what PyTorch computes with keys and values rounded to the same
    integers: for lengths of every kind, a full cache, and values beyond the range that the export saw."""
    net = class_model.transformer
    assert net
    heads, width = 2, 128
    scales = torch.rand(2, heads, 1, width // heads) / 100 + 0.01
    nothing, ranges = observe(net, calibration_cases(class_model, 2)[0], moments=False)
    seen = ranges["position_blocks.0.attn.qkv"]
    assert not nothing
    assert seen.shape == (2, net.config.heads, 1, net.config.width // net.config.heads) and 0 < seen.max() < 1
    project = CachedProjection(torch.nn.Identity(), scales)

    class Attend(torch.nn.Module):
        def __init__(self, form: Attention) -> None:
            super().__init__()
            self.form = form

        def forward(self, qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> tuple[Tensor, ...]:
            return self.form(project(qkv), keys, values, length, heads, scales)

    torch.manual_seed(0)
    shape = (4, heads, 12, width // heads)
    qkv = torch.randn(4, 1, 3 * width)
    length = torch.tensor([0, 5, 11, 7], dtype=torch.int32)
    keys, values = (torch.randint(-128, 128, shape, dtype=torch.int8) for _ in range(2))
    inputs = {"qkv": qkv, "keys": keys, "values": values, "length": length}
    trace(Attend(grouped_query_attention), inputs, ["y", "keys_out", "values_out"], tmp_path / "attend.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "attend.onnx")
    y, *new = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    want, *want_new = Attend(reference_attention)(qkv, keys * scales[0], values * scales[1], length)
    error = float(np.abs(y - want.numpy()).max() / want.abs().max())
    print(f"attention over int8 caches: {error:.2e}")
    assert error < 2e-6
    rows = torch.arange(4), slice(None), length.long()
    for found, expected, scale in zip(new, want_new, scales, strict=True):
        np.testing.assert_array_equal(found[rows], (expected[rows] / scale[:, 0]).round().numpy())
        assert np.abs(found[rows].astype(int)).max() >= 127  # some of them were beyond the range
