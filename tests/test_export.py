"""Exported engines against PyTorch: logits, tokens, images; and that an export without parity is refused."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import DTypeLike, NDArray
from small_models import (
    BOUND,
    Logits,
    cells_of,
    engine_logits,
    full_logits,
    ragged_tokens,
    relative_error,
    small_model,
)
from torch import Tensor

import export.to_onnx as to_onnx
import export.tracing as tracing
from dvq_rt.codes import Codes
from dvq_rt.decoding import Request, Scheduler
from dvq_rt.engine import Engine
from dvq_rt.generator import Generator
from dvq_rt.layout import HEADS, Tokens
from dvq_rt.manifest import Manifest, read_engine, write_engine
from dvq_rt.sampling import SamplingParams
from export.labels import keep_labels
from export.parity import golden_values
from runtimes.errors import CheckpointError, DvqError, EngineError, ExportError, InputError
from runtimes.onnxruntime import OnnxRuntimeBackend
from runtimes.protocol import Buffer
from training.checkpoint import Model, save_checkpoint
from training.import_published import import_published
from training.sampling import sample_tokens
from training.torch_program import StaticCache

GOLDEN = Path(__file__).parent / "data" / "golden" / "dq" / "e_class2_entropy"
MODES = {
    "ordered": SamplingParams(),
    "drawn": SamplingParams(positions="drawn"),
    "filtered": SamplingParams(1.2, 12, 0.9, 8, 0.8, positions="drawn"),
    "greedy": SamplingParams(top_k=1, top_k_position=1),
    "guided": SamplingParams(temperature=0.8, guidance=2.0),
    "guided drawn": SamplingParams(top_p=0.9, guidance=0.5, positions="drawn"),
}
GENERATORS = {"class": "generator", "plain": "plain_generator", "mq": "mq_generator"}


def largest_error(model: Model, rows: Sequence[Tokens], found: Sequence[Logits]) -> float:
    """Over both heads and all positions of every row, each relative to the row's largest logit."""
    wanted = [full_logits(model.both()[1], row) for row in rows]
    return float(np.max([relative_error(found[i][h], want[h]) for i, want in enumerate(wanted) for h in HEADS]))


def check_tokens(model: Model, engine: Engine, params: SamplingParams, labels: Sequence[int | None]) -> None:
    """A free run gives the oracle's tokens."""
    layout, net = model.layout, model.both()[1]
    starts = [layout.classes if label is None else label for label in labels]
    requests = [Request(start, params, seed=9, image=i, key=i) for i, start in enumerate(starts)]
    cells = {event.request.key: event.cells for event in engine.draw(requests)}
    for i, sequence in enumerate(sample_tokens(net, starts, params, seed=9)):
        np.testing.assert_array_equal(cells[i], cells_of(layout, sequence))


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("kind", GENERATORS)
def test_engine_logits_equal_pytorch(kind: str, slots: int, request: pytest.FixtureRequest) -> None:
    """Both lowerings of the step compute the model: every position of ragged images, side by side and in turn."""
    model: Model = request.getfixturevalue(f"{kind}_model")
    generator: Generator = request.getfixturevalue(GENERATORS[kind])
    rows = ragged_tokens(model.layout, 8)
    assert len({model.layout.steps_of(row) for row in rows}) > 5 or not model.layout.covering
    error = largest_error(model, rows, engine_logits(generator.engine, rows, slots))
    print(f"\n{kind} engine, {slots} slots: largest relative logit error {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("kind", ["class", "mq"])
@pytest.mark.parametrize("mode", MODES)
def test_engine_tokens_equal_the_oracle(kind: str, mode: str, request: pytest.FixtureRequest) -> None:
    """A dozen images of all labels and none, drawn freely with the same random numbers, are the oracle's."""
    model, generator = request.getfixturevalue(f"{kind}_model"), request.getfixturevalue(GENERATORS[kind])
    check_tokens(model, generator.engine, MODES[mode], [0, 1, 2, None] * 3)


@pytest.mark.parametrize("mode", ["ordered", "drawn", "filtered"])
def test_plain_engine_tokens_equal_the_oracle(mode: str, plain_model: Model, plain_generator: Generator) -> None:
    """The same without labels, region-first, on standard operators and weights stored as float16."""
    check_tokens(plain_model, plain_generator.engine, MODES[mode], [None] * 12)


@pytest.mark.parametrize("kind", ["class", "mq"])
def test_encoder_and_decoder_equal_pytorch(kind: str, request: pytest.FixtureRequest) -> None:
    """The other two graphs: codes and grain of pictures, and pictures of codes within half an 8-bit level."""
    model, generator = request.getfixturevalue(f"{kind}_model"), request.getfixturevalue(GENERATORS[kind])
    vae, rng = model.tokenizer, np.random.default_rng(0)
    assert vae is not None
    pictures = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    pictures[:, :8] = 200
    with torch.no_grad():
        codes, grain = vae.encode_maps(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
        decoded = vae.decode_maps(codes)
    found = generator.encode(list(pictures))
    assert [c.codes.tolist() for c in found] == codes.tolist()
    assert [c.grain.tolist() for c in found] == grain.tolist()
    assert set(grain.flatten().tolist()) == ({0, 1} if kind == "class" else {-1, 0})
    exact = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(generator.decode(found) - exact).max() <= 0.5 + 1e-3 * 127.5


@torch.no_grad()
def test_any_cells_decode(mq_model: Model, mq_generator: Generator) -> None:
    """The masked decoder takes codes at any set of cells: none, one, some and all decode as in PyTorch, and flat
    pictures and noise (whose scores tie or scatter) encode to the kept number of codes."""
    layout, rng = mq_generator.layout, np.random.default_rng(1)
    assert mq_model.tokenizer is not None
    for count in (0, 1, 30, 64):
        codes = np.full(64, -1)
        codes[rng.permutation(64)[:count]] = rng.integers(0, 32, count)
        codes = codes.reshape(8, 8)
        got = mq_generator.decode(Codes(codes, np.minimum(codes, 0), layout))[0]
        want = mq_model.tokenizer.decode_maps(torch.from_numpy(codes)[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(got - (want.clip(-1, 1) + 1) * 127.5).max() <= 0.5 + 1e-3 * 127.5
    for picture in (np.full((16, 16, 3), 90, np.uint8), rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)):
        assert mq_generator.encode(picture)[0].length == layout.filled_cells == 25


def test_rows_beyond_the_length_are_never_read(class_model: Model, generator: Generator) -> None:
    """Fused attention does not touch cache rows that no token has filled: planted NaN changes no bit."""

    class Planted(OnnxRuntimeBackend):
        caches = 0

        def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
            buffer = super().allocate(shape, dtype)
            if len(shape) == 4:
                buffer.write(np.full(shape, np.nan, dtype))
                Planted.caches += 1
            return buffer

    rows = ragged_tokens(class_model.layout, 4)
    planted = Engine(generator.path, generator.manifest, Planted(threads=1))
    clean, found = engine_logits(generator.engine, rows, 4), engine_logits(planted, rows, 4)
    assert Planted.caches == 6
    for i in range(4):
        for head in HEADS:
            np.testing.assert_array_equal(clean[i][head], found[i][head])


def test_rare_polling_changes_nothing(class_model: Model, class_engine: Path, generator: Generator) -> None:
    """A device that is looked at every eighth step runs on past the end of an image, and gives the same."""
    rows = ragged_tokens(class_model.layout, 5)
    rare = Generator(class_engine, slots=4, threads=1)
    rare.engine.backend.poll = 8
    scores = [[s.total for s in g.score(generator.sample(9, seed=1).codes)] for g in (generator, rare)]
    assert scores[0] == scores[1]
    codes = [g.sample(9, seed=4, params=SamplingParams()).codes for g in (generator, rare)]
    assert codes[0] == codes[1]
    for slots in (2, 5):
        often, seldom = engine_logits(generator.engine, rows, slots), engine_logits(rare.engine, rows, slots)
        for i, row in enumerate(rows):
            for head in HEADS:
                np.testing.assert_array_equal(often[i][head], seldom[i][head][: class_model.layout.steps_of(row)])


def test_what_is_in_the_folder(class_engine: Path, plain_engine: Path) -> None:
    """Each target has its own attention, every graph a symbolic batch, float16 weights halve the file, and the
    manifest says what was measured."""
    sizes, operators = {}, {}
    for name, folder in (("class", class_engine), ("plain", plain_engine)):
        manifest = read_engine(folder)
        assert set(manifest.files) == {"encoder.onnx", "decoder.onnx", "step.onnx", "golden.safetensors"}
        assert (
            len(manifest.tolerances) == {"class": 10, "plain": 11}[name] and max(manifest.tolerances.values()) <= BOUND
        )
        assert (
            set(manifest.parameters)
            == {"encoder", "decoder", "quant_conv", "post_quant_conv", "transformer", "embeddings"}
            and min(manifest.parameters.values()) > 0
        )
        for graph in ("encoder", "decoder", "step"):
            proto = onnx.load(folder / f"{graph}.onnx")
            batched = [*proto.graph.input, *proto.graph.output]
            batches = {value.type.tensor_type.shape.dim[0].dim_param for value in batched}
            assert len(batches) == 1 and batches != {""}  # a name, not a number
        operators[name] = {node.op_type for node in proto.graph.node}
        sizes[name] = sum(len(t.raw_data) for t in proto.graph.initializer)
        assert (manifest.weights, manifest.target) == (("fp32", "cpu") if name == "class" else ("fp16", "cuda"))
    assert "GroupQueryAttention" in operators["class"] and "Softmax" in operators["plain"]
    assert "GroupQueryAttention" not in operators["plain"]
    assert sizes["plain"] < 0.6 * sizes["class"]


def test_published_checkpoint_becomes_an_engine(tmp_path: Path) -> None:
    """The way of a released model: import, the export command, verification, and the oracle's images."""
    model = import_published(GOLDEN / "config.json", GOLDEN / "model.ckpt")
    save_checkpoint(model, tmp_path / "checkpoint")
    to_onnx.main([str(tmp_path / "checkpoint"), "--slots", "3"])
    generator = Generator(tmp_path / "checkpoint-onnx", threads=1)
    assert generator.manifest.slots == 3
    for check in generator.verify():
        assert check.ok, check
    rows = ragged_tokens(model.layout, 4)
    error = largest_error(model, rows, engine_logits(generator.engine, rows, 4))
    print(f"\npublished model: largest relative logit error {error:.1e}")
    assert error <= BOUND
    for mode in ("ordered", "filtered"):
        check_tokens(model, generator.engine, MODES[mode], [0, 3, 1, 2])


def test_published_stackformer_without_an_order(tmp_path: Path) -> None:
    """A released Stackformer that saw its cells by importance becomes an engine that draws freely by default; what
    needs an order is refused, because a code map does not hold one."""
    folder = GOLDEN.parents[1] / "mq"
    model = import_published(
        folder / "stackformer_uncond/config.json", folder / "stackformer_uncond/model.ckpt", folder
    )
    to_onnx.export_onnx(model, tmp_path / "engine")
    generator = Generator(tmp_path / "engine", threads=1)
    made = generator.sample(3, seed=1)
    assert made.params.positions == "drawn" and [c.length for c in made.codes] == [32] * 3
    check_tokens(model, generator.engine, SamplingParams(positions="drawn"), [None] * 4)
    with pytest.raises(InputError, match="was trained on no order of the cells; use positions='drawn'"):
        generator.sample(1, params=SamplingParams())
    with pytest.raises(InputError, match="codes cannot be scored or trained on"):
        generator.score(made.codes)


# --- fewer labels ----------------------------------------------------------------------------------------------
def test_kept_labels_draw_the_same(class_model: Model) -> None:
    """Protects ``--labels``: a model with fewer labels, in another order, draws for each exactly what the whole model
    draws, guidance by the null label included; unknown and repeated names are refused."""
    smaller = keep_labels(class_model, ["cat", "ant"])
    assert smaller.class_names == ("cat", "ant") and smaller.layout.classes == 2
    params = SamplingParams(temperature=0.8, guidance=1.5, positions="drawn")
    assert class_model.transformer and smaller.transformer
    whole = sample_tokens(class_model.transformer, [2, 0], params, seed=4)
    fewer = sample_tokens(smaller.transformer, [0, 1], params, seed=4)
    for one, other in zip(whole, fewer, strict=True):
        np.testing.assert_array_equal(cells_of(class_model.layout, one), cells_of(smaller.layout, other))
    for names in ([], ["dog"], ["ant", "ant"]):
        with pytest.raises(ExportError, match="must be different ones of"):
            keep_labels(class_model, names)


# --- what an export refuses ------------------------------------------------------------------------------------
def graphs_of(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``export_onnx`` take the graphs of an engine instead of tracing."""

    def copy(model: Model, folder: Path, *_: Any, **options: Any) -> None:
        for name in ("encoder.onnx", "decoder.onnx", "step.onnx"):
            shutil.copy(engine / name, folder)

    monkeypatch.setattr(to_onnx, "write_graphs", copy)


def test_wrong_graphs_get_no_name(class_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export whose graphs compute another model is refused, every failed check is named, and nothing is left."""
    graphs_of(class_engine, monkeypatch)
    other = small_model(("ant", "bee", "cat"), seed=3)
    with pytest.raises(ExportError, match="do not agree with PyTorch") as caught:
        to_onnx.export_onnx(other, tmp_path / "engine")
    for words in ("share of codes", "largest pixel error", "position logit error", "content logit error", "free run"):
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_right_graphs_get_a_name_once(
    class_model: Model, class_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path with the right model passes (so that the test above fails for its reason alone), and a second
    export does not replace the first unasked."""
    graphs_of(class_engine, monkeypatch)
    to_onnx.export_onnx(class_model, tmp_path / "engine")
    with pytest.raises(EngineError, match="exists already"):
        to_onnx.export_onnx(class_model, tmp_path / "engine", slots=2)
    assert read_engine(tmp_path / "engine").slots == 8
    to_onnx.export_onnx(class_model, tmp_path / "engine", slots=2, overwrite=True)
    assert read_engine(tmp_path / "engine").slots == 2


def test_half_a_model_is_refused(class_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage-1 checkpoint, a wrong target and a missing folder each get their own error, and no engine."""
    with pytest.raises(CheckpointError, match="holds stage 1 only; train stage 2"):
        to_onnx.export_onnx(Model(class_model.tokenizer), tmp_path / "engine")
    with pytest.raises(CheckpointError, match="holds stage 2 only"):
        to_onnx.export_onnx(Model(None, class_model.transformer), tmp_path / "engine")
    with pytest.raises(ExportError, match="target is 'tpu'; it must be one of"):
        to_onnx.export_onnx(class_model, tmp_path / "engine", target="tpu")
    with pytest.raises(SystemExit):
        to_onnx.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "engine")])
    assert "nowhere is no checkpoint folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots is 0; it must be an integer from 1 to 4096"),
        ({"slots": 4097}, "slots is 4097; it must be an integer from 1 to 4096"),
        ({"slots": float("nan")}, "slots is nan; it must be an integer"),
        ({"slots": True}, "slots is True; it must be an integer"),
        ({"slots": None}, "slots is None; it must be an integer"),
        ({"weights": ["fp16"]}, r"weights is \['fp16'\]; it must be one of"),
        ({"target": {}}, r"target is \{\}; it must be one of"),
    ],
)
def test_bad_options_are_refused_before_work(
    options: dict[str, Any], words: str, class_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that are none or out of range, and things that are no names: an error that names option and value."""
    monkeypatch.setattr(to_onnx, "write_engine", None)
    with pytest.raises(DvqError, match=words):
        to_onnx.export_onnx(class_model, tmp_path / "engine", **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--default", "temperature"], "--default 'temperature' is not NAME=VALUE, such as temperature=0.8"),
        (["--default", "temperature=Infinity"], "temperature is inf; it must be"),
        (["--default", "temperature=1e999"], "temperature is inf; it must be"),
        (["--default", "guidance=NaN"], "guidance is nan; it must be"),
        (["--default", "top_k=1.5"], "top_k is 1.5; it must be"),
        (["--default", "top_k=" + "[" * 100_000], "top_k is '[[["),
        (["--default", "warmth=1"], "unknown fields ['warmth']"),
        (["--default", "guidance=2"], "defaults.guidance is 2.0; it must be 1: there is no null label"),
        (["--labels", ""], "labels [''] must be different ones of []"),
        (["--out", ""], "exists already"),
        (["--slots", "0"], "slots is 0; it must be an integer from 1 to 4096"),
    ],
)
def test_bad_arguments_of_the_command(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Recommended parameters that no engine could open with, and empty shell variables, are refused before tracing."""
    save_checkpoint(small_model(), tmp_path / "checkpoint")
    monkeypatch.setattr(to_onnx, "write_graphs", None)
    with pytest.raises(SystemExit) as caught:
        to_onnx.main([str(tmp_path / "checkpoint"), *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and len(error) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("limit", [None, 12])
def test_a_wrong_cached_step_is_noticed(limit: int | None, class_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden tokens are drawn with caches; the uncached sampler, which draws their beginning too, says if those lie."""

    def forgetful(
        cache: StaticCache, qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: object = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return qkv.chunk(3, -1)[2], keys, values

    golden_values(class_model, 12)
    monkeypatch.setattr(StaticCache, "__call__", forgetful)
    with pytest.raises(ExportError, match="PyTorch draws other tokens with caches than without: content"):
        golden_values(class_model, limit)


def test_what_libraries_raise_names_the_file(tmp_path: Path) -> None:
    """Tracing, writing and reading a graph: whatever PyTorch, onnx or the disk says becomes an ExportError."""

    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"step\.onnx cannot be traced: .*data-dependent"):
        tracing.trace(Branching(), {"x": torch.zeros(2)}, ["y"], tmp_path / "step.onnx")
    with pytest.raises(ExportError, match=r"graph\.onnx cannot be written: No such file or directory"):
        tracing.save(onnx.ModelProto(), tmp_path / "nowhere" / "graph.onnx")
    (tmp_path / "graph.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ExportError, match=r"graph\.onnx cannot be read: "):
        tracing.load_graph(tmp_path / "graph.onnx")
    with pytest.raises(ExportError, match=r"missing\.onnx cannot be read: No such file or directory"):
        tracing.load_graph(tmp_path / "missing.onnx")


def retouched(source: Path, target: Path, change: Any, external: int | None = None) -> Path:
    """A copy of an engine whose step graph was changed, under a manifest that fits it again."""

    def build(folder: Path) -> Manifest:
        for name in ("encoder.onnx", "decoder.onnx", "golden.safetensors"):
            shutil.copy(source / name, folder)
        proto = onnx.load(source / "step.onnx")
        change(proto)
        tracing.save(proto, folder / "step.onnx")
        return read_engine(source)

    write_engine(target, build)
    return target


@pytest.mark.parametrize("factor", [np.nan, 1.001])
def test_verify_notices_changed_weights(factor: float, class_engine: Path, tmp_path: Path) -> None:
    """``verify`` fails where one head's weights are NaN or off by a thousandth, although every hash is right."""

    def spoil(proto: onnx.ModelProto) -> None:
        (weight,) = (t for t in proto.graph.initializer if t.name == "model.content_head.norm.weight")
        values = onnx.numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    checks = Generator(retouched(class_engine, tmp_path / "spoilt", spoil), threads=1).verify()
    failed = [check.name for check in checks if not check.ok]
    assert "step: relative content logit error" in failed
    assert "step: relative position logit error" not in failed


def test_external_weights(class_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph too large for one file keeps its weights beside it: listed, hashed, and the images are the same."""
    monkeypatch.setattr(tracing, "EXTERNAL_ABOVE", 10_000)
    folder = retouched(class_engine, tmp_path / "external", lambda proto: None)
    assert read_engine(folder).files["step.onnx.data"]["bytes"] > 10_000
    samples = [Generator(path, threads=1).sample(3, seed=2) for path in (class_engine, folder)]
    assert samples[0].codes == samples[1].codes
    data = bytearray((folder / "step.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "step.onnx.data").write_bytes(data)
    with pytest.raises(EngineError, match=r"step\.onnx\.data is corrupted"):
        Generator(folder)


def test_guided_pairs_draw_the_same(class_model: Model, generator: Generator) -> None:
    """Both slots of a pair take the same position and content at every step but for the label's own start tokens, and
    the label does matter."""
    layout, params = class_model.layout, SamplingParams(guidance=3.0, positions="drawn")
    scheduler = Scheduler(generator.engine.loop(4))
    handles = [scheduler.submit(Request(label, params, seed=1, image=label)) for label in range(2)]
    guided: dict[int, NDArray[np.int32]] = {}
    steps = 0
    while scheduler.busy:
        events = scheduler.step()
        guided |= {event.request.image: event.cells for event in events}
        content, position, cells = (scheduler.loop.read(name) for name in ("content", "position", "cells"))
        for one, other in (handle.slots for handle in handles):
            np.testing.assert_array_equal(cells[one], cells[other])
            if content[one] < layout.content_sos:
                assert content[one] == content[other] and position[one] == position[other]
                steps += 1
    assert steps > 30
    plain = generator.sample(2, [0, 1], seed=1, params=SamplingParams(positions="drawn"))
    assert any((plain.codes[i].codes.reshape(-1) != guided[i] % layout.codebook_size).any() for i in range(2))
