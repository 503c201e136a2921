"""DQ-VAEs of two and three grains with either router, from the model to the engine: the same numbers at every step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import BOUND, VARIANTS, engine_logits, ragged_tokens, small_model
from test_export import MODES, check_tokens, largest_error
from test_tensorrt_export import Api, needs_rtx

import export.to_tensorrt as to_tensorrt
from dvq_rt.codes import Codes
from dvq_rt.engine import Engine
from dvq_rt.files import write_tensors
from dvq_rt.generator import Generator
from dvq_rt.images import grain_overlay, segment_colours
from dvq_rt.sampling import SamplingParams
from dvq_rt.verify import verify
from export.parity import golden_values
from export.precision import narrow
from export.to_onnx import export_onnx
from runtimes.onnxruntime import OnnxRuntimeBackend
from training.checkpoint import Model, load_checkpoint, save_checkpoint
from training.step import step_table

NAMES = ("ant", "bee", "cat")
TRIPLES = [name for name, sizes in VARIANTS.items() if sizes.grains == 3]


def variant(name: str) -> Model:
    """Three labels and the null label; of three grains one is row-first."""
    order = "row-first" if name == "triple feature" else "region-first"
    return small_model(NAMES, order, sizes=VARIANTS[name])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, Generator]]:
    """A variant and its engine, exported once."""
    done: dict[str, tuple[Model, Generator]] = {}

    def get(name: str) -> tuple[Model, Generator]:
        if name not in done:
            folder = tmp_path_factory.mktemp("variants") / name.replace(" ", "-")
            save_checkpoint(variant(name), folder / "checkpoint")
            model = load_checkpoint(folder / "checkpoint")
            export_onnx(model, folder / "engine", slots=4)
            done[name] = model, Generator(folder / "engine", slots=4, threads=1)
        return done[name]

    return get


def pictures(size: int, count: int = 8) -> np.ndarray:
    """Pictures with a flat half and noise of growing strength, uint8 [count, size, size, 3]."""
    noise = np.random.default_rng(0).integers(-64, 64, (count, size, size, 3))
    out = 128 + noise * np.linspace(0.05, 1, count)[:, None, None, None]
    out[:, :, : size // 2] = 200
    return out.astype(np.uint8)


@pytest.mark.parametrize("name", VARIANTS)
def test_encoder_and_decoder_equal_pytorch(name: str, engines: Any) -> None:
    """Codes and grain of pictures with every grain among them, and their reconstructions within half a level."""
    model, generator = engines(name)
    vae, images = model.tokenizer, pictures(model.tokenizer.config.image_size)
    with torch.no_grad():
        codes, grain = vae.encode_maps(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        decoded = vae.decode_maps(codes)
    encoded = generator.encode(list(images))
    assert [c.codes.tolist() for c in encoded] == codes.tolist()
    assert [c.grain.tolist() for c in encoded] == grain.tolist()
    assert set(grain.flatten().tolist()) == set(range(vae.config.grains))
    exact = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(generator.decode(encoded) - exact).max() <= 0.5 + 1e-3 * 127.5
    alone = [generator.encode(image)[0] for image in images]
    assert [c.grain.tolist() for c in alone] == grain.tolist()


@pytest.mark.parametrize("name", TRIPLES)
def test_engine_logits_equal_pytorch(name: str, engines: Any) -> None:
    """The step over three segments, at every position of ragged images side by side."""
    model, generator = engines(name)
    rows = ragged_tokens(model.layout, 8)
    error = largest_error(model, rows, engine_logits(generator.engine, rows, 4))
    print(f"\n{name}: largest relative logit error {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRIPLES)
def test_engine_tokens_equal_the_oracle(name: str, mode: str, engines: Any) -> None:
    """Free runs of all labels and none, in both orders of positions."""
    model, generator = engines(name)
    check_tokens(model, generator.engine, MODES[mode], [0, 1, 2, None] * 3)


@pytest.mark.parametrize("name", TRIPLES)
def test_generator(name: str, engines: Any, tmp_path: Path) -> None:
    """What a user calls: samples that do not depend on their batch, a stream that ends in them, their scores, their
    files, and an overlay with three colours."""
    model, generator = engines(name)
    params = SamplingParams(temperature=1.1)
    samples = generator.sample(6, [0, 1, 2] * 2, seed=3, params=params)
    assert {int(g) for codes in samples.codes for g in codes.grain.flat} == {0, 1, 2}
    alone = generator.sample(1, 2, seed=3, params=params, first=5)
    assert alone.codes[0] == samples.codes[5]
    np.testing.assert_array_equal(alone.to_numpy()[0], samples.to_numpy()[5])
    last = {preview.index: preview.codes for preview in generator.stream(2, [0, 1], seed=3, params=params, every=8)}
    assert [last[0], last[1]] == samples.codes[:2]
    assert all(np.isfinite(score.total) and score.total < 0 for score in generator.score(samples.codes))
    samples.codes[0].save(tmp_path / "image.npz")
    assert Codes.load(tmp_path / "image.npz") == samples.codes[0]
    assert samples.codes[0].length == model.layout.count_codes(samples.codes[0].grain)
    for rate in ({"fine_ratio": (0.25, 0.5)}, {"bits_per_pixel": 0.8}):
        coded = generator.encode(pictures(16)[0], **rate)[0]
        assert generator.decode(coded).shape == (1, 16, 16, 3) and coded.bits_per_pixel(16) <= 1.2
    assert (generator.encode(pictures(16)[0], fine_ratio=(0.25, 0.5))[0].grain == 2).sum() == 2
    assert len(set(segment_colours(3))) == 3
    picture = grain_overlay(samples.to_numpy()[0], samples.codes[0].grain, model.layout.sides)
    assert picture.size == (64, 64)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_tensorrt_graphs_agree_with_pytorch(name: str, precision: str, tmp_path: Path) -> None:
    """All checks of ``verify`` on the graphs that TensorRT gets, run by ONNX Runtime; routers stay float32."""
    model = variant(name)
    traced = narrow(model, precision)
    table = step_table(traced.both()[1])
    to_tensorrt.trace_graphs(traced, tmp_path, table, 4)
    manifest = to_tensorrt.describe_plans(model, table, 4, precision, Api, ["sm89"])  # type: ignore[arg-type]
    write_tensors(tmp_path / "golden.safetensors", golden_values(model, model.layout.max_length))
    checks = verify(Engine(tmp_path, manifest, OnnxRuntimeBackend()))
    assert [check for check in checks if not check.ok] == [] and len(checks) == 11


@needs_rtx
@pytest.mark.parametrize("name", TRIPLES)
def test_plans(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan of three segments is built and checked against its network, without a GPU."""
    save_checkpoint(variant(name), tmp_path / "checkpoint")
    options = ["--precision", "fp32", "--target", "sm89", "--slots", "2", "--check-tokens", "12"]
    to_tensorrt.main([str(tmp_path / "checkpoint"), "--out", str(tmp_path / "engine"), *options])
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["step"] and line.split()[2:4] == ["6", "3"] for line in printed)
