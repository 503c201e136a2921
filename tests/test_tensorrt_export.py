"""TensorRT engines up to the plan: the graphs' numbers in ONNX Runtime, what may not be misread, and the builds.

Nothing here executes a plan but the test marked ``gpu``.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from small_models import BOUND, engine_logits, full_logits, ragged_tokens, relative_error, small_model
from test_export import GOLDEN, MODES, check_tokens, largest_error

import export.tensorrt.plans as plans
import export.to_tensorrt as to_tensorrt
import runtimes.tensorrt_api as tensorrt_api
from dvq_rt.__main__ import main
from dvq_rt.engine import Engine
from dvq_rt.files import write_tensors
from dvq_rt.generator import Generator
from dvq_rt.images import to_uint8
from dvq_rt.layout import HEADS, TokenLayout
from dvq_rt.manifest import GRAPHS, Manifest, read_engine
from dvq_rt.step import CACHE
from dvq_rt.verify import BOUNDS, verify
from export.lowering import TENSORRT_OPSET
from export.parity import golden_values
from export.precision import narrow
from export.tensorrt.check import check_graph, check_network, specs
from export.tracing import trace
from runtimes.cuda import driver_version
from runtimes.errors import BackendError, CheckpointError, ConfigError, EngineError, ExportError, InputError
from runtimes.onnxruntime import OnnxRuntimeBackend
from runtimes.tensorrt_api import TensorRT, choose_flavor
from training.checkpoint import Model, save_checkpoint
from training.models.mqvae import MQVAE, MQVAEConfig
from training.models.transformer import StackedTransformer, TransformerConfig
from training.step import Step, example_inputs, reference_attention, step_table

TARGETS = ["sm86", "sm89", "sm120"]
SLOTS = 4
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install 'dvq-rt[tensorrt-rtx]'"
)


class Api:
    """Names that a manifest takes, for graphs that no package builds."""

    flavor, version = "tensorrt-rtx", "0"


def small_mq() -> Model:
    """MQ-VAE and Stackformer with random weights, three labels and the null label."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"channels": 8, "decoder_channels": 8, "z_channels": 8, "code_dim": 8, "norm_groups": 4}
    vae = MQVAE(
        MQVAEConfig(
            image_size=32, codebook_size=16, kept_ratio=0.5, encoder_mult=(1, 2, 2), decoder_mult=(1, 1, 2), **sizes
        )
    )
    vae.quantizer.codebook.normal_()
    layout = TokenLayout(classes=3, null_label=True, **vae.config.layout())
    config = TransformerConfig(
        width=32, heads=4, position_blocks=1, content_blocks=2, block_size=layout.max_length, segment_embedding=False
    )
    net = StackedTransformer(config, layout)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    return Model(vae, net, ("ant", "bee", "cat"), {"guidance": 1.5}).eval().requires_grad_(False)


MODELS: dict[str, Callable[[], Model]] = {"dq": lambda: small_model(("ant", "bee", "cat")), "mq": small_mq}


class Traced:
    """Models, and generators over the graphs that TensorRT gets, run by ONNX Runtime on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {name: make().requires_grad_(False) for name, make in MODELS.items()}
        self.done: dict[tuple[str, str], tuple[Path, Manifest]] = {}

    def graphs(self, family: str, precision: str) -> tuple[Path, Manifest]:
        if (family, precision) not in self.done:
            folder, model = self.folder / f"{family}-{precision}", self.models[family]
            folder.mkdir()
            traced = narrow(model, precision)
            table = step_table(traced.both()[1])
            to_tensorrt.trace_graphs(traced, folder, table, SLOTS)
            manifest = to_tensorrt.describe_plans(model, table, SLOTS, precision, Api, TARGETS)  # type: ignore[arg-type]
            write_tensors(folder / "golden.safetensors", golden_values(model, model.layout.max_length))
            self.done[family, precision] = (folder, manifest)
        return self.done[family, precision]

    def engine(self, family: str, precision: str) -> Engine:
        return Engine(*self.graphs(family, precision), OnnxRuntimeBackend())


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("tensorrt"))


# --- numbers, up to the plan builder ---------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", MODELS)
def test_graphs_agree_with_pytorch(family: str, precision: str, traced: Traced) -> None:
    """All checks of ``verify`` on the graphs that TensorRT gets: encoder, decoder with its bytes, both heads' logits,
    slots that do not disturb one another, free-running tokens; float32 within 2e-4, float16 within 2e-2."""
    assert BOUNDS["fp32"].logits == BOUND == 2e-4 and BOUNDS["fp16"].logits == 2e-2
    checks = verify(traced.engine(family, precision))
    for check in checks:
        print(f"\n{family} {precision} {check.name}: {check.measured:.2g} (at most {check.bound:.2g})", end="")
    assert [check for check in checks if not check.ok] == []
    assert len(checks) == 11


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_lowering_equals_the_other(precision: str, traced: Traced, generator: Generator) -> None:
    """TensorScatter and Attention give the logits of the fused attention of the CPU engine and of PyTorch, at every
    position of ragged images in four slots."""
    model = traced.models["dq"]
    assert model.transformer is not None
    rows = ragged_tokens(model.layout, 8)
    found, fused = (engine_logits(e, rows, SLOTS) for e in (traced.engine("dq", precision), generator.engine))
    error = max(relative_error(one[h], other[h]) for one, other in zip(found, fused, strict=True) for h in HEADS)
    exact = largest_error(model, rows, found)
    print(f"\n{precision}: {error:.1e} from the fused lowering, {exact:.1e} from PyTorch")
    assert max(error, exact) <= BOUNDS[precision].logits
    assert exact > 1e-4 or precision == "fp32"  # float16 really computed in float16


@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_equal_the_oracle(mode: str, traced: Traced) -> None:
    """Free runs of the float32 graphs are the uncached sampler's, token for token, guided and filtered."""
    check_tokens(traced.models["dq"], traced.engine("dq", "fp32"), MODES[mode], [0, 1, 2, None] * 2)


def test_bytes_of_the_device_are_the_images(traced: Traced) -> None:
    """The decoder's second output is what the host would make of the first; an engine hands it out."""
    engine = traced.engine("dq", "fp32")
    side = engine.layout.sides[-1]
    for codes in np.random.default_rng(3).integers(0, engine.layout.codebook_size, (2, 1, side, side)):
        out = engine.program("decoder").run({"codes": codes})
        np.testing.assert_array_equal(out["pixels"], to_uint8(out["images"]))
        np.testing.assert_array_equal(engine.decode(codes), out["pixels"])
        assert out["pixels"].std() > 1


@pytest.mark.parametrize("family", MODELS)
def test_bf16_in_pytorch(family: str, traced: Traced) -> None:
    """ONNX Runtime cannot run bf16 on a CPU, so the narrowed model itself is run in PyTorch: the first logits of all
    labels within the bound, in bfloat16 and not otherwise."""
    model = traced.models[family]
    narrowed = narrow(model, "bf16")
    outputs = []
    for each in (model, narrowed):
        net = each.both()[1]
        inputs = example_inputs(step_table(net), SLOTS)
        ports, caches = inputs["ports"], inputs["caches"]
        ports.update(reset=torch.ones(SLOTS, dtype=torch.bool), label=torch.arange(SLOTS))
        names = [port.name for port in step_table(net).outputs]
        out = dict(zip(names, Step(net)(ports, caches), strict=True))
        outputs.append([out[name].numpy() for name in ("position_logits", "content_logits")])
        reports = [part for name, part in out.items() if "_log" in name]
        assert len(reports) == 6 and all(part.dtype == torch.float32 for part in reports)
        made = [port.name for port in step_table(net).outputs if port.role == CACHE]
        assert made and all(out[name].dtype == next(net.parameters()).dtype for name in made)
    error = max(relative_error(got, want) for want, got in zip(*outputs, strict=True))
    print(f"\n{family}: largest relative logit error in bfloat16 {error:.1e}")
    assert 1e-4 < error <= BOUNDS["bf16"].logits


def test_what_stays_float32(traced: Traced) -> None:
    """Everything that decides between neighbours, in the graphs themselves: entropy's logarithm, softmax and top-k,
    cumulative sums, and the distances to the codes."""
    found: dict[str, set[int]] = {}
    for family in MODELS:
        folder, _ = traced.graphs(family, "fp16")
        for name in GRAPHS:
            proto = onnx.shape_inference.infer_shapes(onnx.load(folder / f"{name}.onnx"))
            kinds = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.input)}
            kinds |= {t.name: t.data_type for t in proto.graph.initializer}
            for node in proto.graph.node:
                found.setdefault(node.op_type, set()).add(kinds.get(node.input[0], 0))
    for wide in ("Log", "Softmax", "LogSoftmax", "TopK", "CumSum", "ArgMin", "Round"):
        assert found[wide] == {TensorProto.FLOAT}, wide
    for half in ("Conv", "Attention", "TensorScatter", "Gelu"):
        assert TensorProto.FLOAT16 in found[half], half
    assert found["Attention"] == found["TensorScatter"] == {TensorProto.FLOAT16}


# --- graphs that TensorRT would misread ------------------------------------------------------------------------
def attention(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == "Attention")


def scatter(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == "TensorScatter")


def drop_mask(proto: onnx.ModelProto) -> None:
    del attention(proto).input[3:]


def plant_nonpad(proto: onnx.ModelProto) -> None:
    """Lengths in place of the mask, as the operator's own definition offers them."""
    node = attention(proto)
    del node.input[3:]
    node.input.extend(["", "", "", "label"])


def plant_causal(proto: onnx.ModelProto) -> None:
    next(a for a in attention(proto).attribute if a.name == "is_causal").i = 1


def plant_float_mask(proto: onnx.ModelProto) -> None:
    node = attention(proto)
    proto.graph.node.insert(
        list(proto.graph.node).index(node), helper.make_node("Cast", [node.input[3]], ["wide"], to=TensorProto.FLOAT)
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("wide", TensorProto.FLOAT, [SLOTS, 1, 1, None]))
    attention(proto).input[3] = "wide"


def read_cache_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Identity", ["cache_0"], ["again"]))


def attend_to_the_old_cache(proto: onnx.ModelProto) -> None:
    attention(proto).input[1] = "cache_0"


def cross_caches(proto: onnx.ModelProto) -> None:
    """Two updates write into each other's output."""
    first, second = [node for node in proto.graph.node if node.op_type == "TensorScatter"][:2]
    one, other = first.output[0], second.output[0]
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = {one: other, other: one}.get(name, name)


def copy_a_cache(proto: onnx.ModelProto) -> None:
    node = scatter(proto)
    at = list(proto.graph.node).index(node)
    proto.graph.node.insert(at, helper.make_node("Identity", [node.input[0]], ["copied"]))
    scatter(proto).input[0] = "copied"


def ring_cache(proto: onnx.ModelProto) -> None:
    next(a for a in scatter(proto).attribute if a.name == "mode").s = b"circular"


FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "no mask": (drop_mask, "has no mask, so it would read rows that no token has filled"),
    "nonpad": (plant_nonpad, "has nonpad_kv_seqlen, which TensorRT drops without a word"),
    "causal": (plant_causal, "has is_causal"),
    "float mask": (plant_float_mask, "has a mask that is not boolean"),
    "read twice": (read_cache_twice, "cache cache_0 is read 2 times, not by its update alone"),
    "old cache": (attend_to_the_old_cache, "cache cache_0 is read 2 times"),
    "crossed": (cross_caches, "cache cache_0 is not updated into cache_0_out exactly once"),
    "copied": (copy_a_cache, "cache cache_0 is not updated into cache_0_out"),
    "ring": (ring_cache, "is not a linear update"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_misreadable_graphs_are_refused(fault: str, traced: Traced) -> None:
    """One planted fault in a sound step graph, which passes without it, is refused and named."""
    folder, manifest = traced.graphs("dq", "fp16")
    proto = onnx.load(folder / "step.onnx")
    check_graph(proto, manifest.step["caches"])
    change, words = FAULTS[fault]
    change(proto)
    with pytest.raises(ExportError, match=f"TensorRT would misread this graph: .*{words}"):
        check_graph(proto, manifest.step["caches"])


def test_an_export_runs_the_check(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering that loses the mask stops the whole export, before anything is built, and nothing is left."""
    real = to_tensorrt.trace_graphs

    def spoilt(model: Model, folder: Path, *rest: Any) -> None:
        real(model, folder, *rest)
        proto = onnx.load(folder / "step.onnx")
        plant_nonpad(proto)
        onnx.save(proto, folder / "step.onnx")

    class Stub(Api):
        ahead_of_time = True

        def check_targets(self, targets: list[str]) -> None:
            pass

    monkeypatch.setattr(to_tensorrt, "trace_graphs", spoilt)
    monkeypatch.setattr(to_tensorrt, "choose_flavor", lambda *_: Stub())
    with pytest.raises(ExportError, match=r"would misread this graph.*nonpad_kv_seqlen"):
        to_tensorrt.export_tensorrt(traced.models["dq"], tmp_path / "engine", slots=SLOTS, targets=["sm86"])
    assert not list(tmp_path.iterdir())


# --- what TensorRT-RTX makes of them ---------------------------------------------------------------------------
def network_of(proto: onnx.ModelProto, tmp_path: Path) -> tensorrt_api.Network:
    onnx.save(proto, tmp_path / "step.onnx")
    return TensorRT("tensorrt-rtx").parse(tmp_path / "step.onnx")


@needs_rtx
@pytest.mark.parametrize("fault", ["no mask", "nonpad"])
def test_the_parser_misreads_and_the_network_check_notices(fault: str, traced: Traced, tmp_path: Path) -> None:
    """TensorRT's parser takes these graphs without complaint; the attention that it makes of them has no mask, and the
    second check, on the parsed network, says so too."""
    folder, manifest = traced.graphs("dq", "fp16")
    proto = onnx.load(folder / "step.onnx")
    sound = check_network(network_of(proto, tmp_path), manifest.step, 3)
    assert (sound.cache_updates, sound.attentions) == (6, 3) and sound.layers > 100
    FAULTS[fault][0](proto)
    with pytest.raises(ExportError, match=r"TensorRT would misread this network: .*has mask None, not a boolean one"):
        check_network(network_of(proto, tmp_path), manifest.step, 3)


@needs_rtx
def test_a_decomposed_step_is_noticed(traced: Traced, tmp_path: Path) -> None:
    """The same step on standard operators has neither native cache updates nor native attention."""
    folder, manifest = traced.graphs("dq", "fp32")
    net = traced.models["dq"].both()[1]
    names = [[spec["name"] for spec in manifest.step[side]] for side in ("inputs", "outputs")]
    step, inputs = Step(net, reference_attention), example_inputs(step_table(net), SLOTS)
    path = tmp_path / "plain.onnx"
    trace(step, inputs, names[1], path, names=names[0], fixed=True, opset=TENSORRT_OPSET)
    network = TensorRT("tensorrt-rtx").parse(tmp_path / "plain.onnx")
    with pytest.raises(ExportError, match=r"0 native cache updates and 0 native attentions, not 6 and 3.*decomposed"):
        check_network(network, manifest.step, 3)
    assert specs(onnx.load(tmp_path / "plain.onnx").graph)["inputs"] == manifest.step["inputs"]
    assert folder.is_dir()


@needs_rtx
def test_another_interface_is_noticed(traced: Traced, tmp_path: Path) -> None:
    """A manifest with another name, shape, number format, order or pairing than the network's."""
    folder, manifest = traced.graphs("dq", "fp16")
    network = network_of(onnx.load(folder / "step.onnx"), tmp_path)
    step = manifest.step
    for change in ({"name": "other"}, {"shape": [SLOTS + 1]}, {"dtype": "int32"}):
        wrong = {**step, "inputs": [{**step["inputs"][0], **change}, *step["inputs"][1:]]}
        with pytest.raises(ExportError, match="its inputs are not the manifest's"):
            check_network(network, wrong, 3)
    with pytest.raises(ExportError, match="its outputs are not the manifest's: another order"):
        check_network(network, {**step, "outputs": step["outputs"][::-1]}, 3)
    crossed = [["cache_0", "cache_1_out"], ["cache_1", "cache_0_out"], *step["caches"][2:]]
    with pytest.raises(ExportError, match=r"cache cache_0 is not tied to cache_1_out.*are tied, but are no pair"):
        check_network(network, {**step, "caches": crossed}, 3)
    with pytest.raises(ExportError, match="6 native cache updates and 3 native attentions, not 8 and 4"):
        check_network(network, step, 4)


@needs_rtx
@pytest.mark.parametrize(("family", "precision"), [("dq", "fp16"), ("mq", "fp32"), ("mq", "bf16")])
def test_whole_exports(
    family: str,
    precision: str,
    traced: Traced,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command, from a checkpoint to plans for three kinds of GPU, without any GPU: its summary, an engine folder
    that ``inspect`` reads, and what opening it says here."""
    for module in (to_tensorrt, plans):
        monkeypatch.setattr(module, "driver_version", lambda: None)
    monkeypatch.setattr("runtimes.cuda.driver_version", lambda: None)
    save_checkpoint(traced.models[family], tmp_path / "checkpoint")
    to_tensorrt.main([str(tmp_path / "checkpoint"), "--precision", precision, "--slots", "4", "--check-tokens", "12"])
    printed = capsys.readouterr().out.splitlines()
    engine = tmp_path / "checkpoint-tensorrt"
    assert printed[-1] == str(engine)
    assert any(line.split()[:1] == ["step"] and line.split()[2:4] == ["6", "3"] for line in printed)
    manifest = read_engine(engine)
    assert set(manifest.files) == {"encoder.plan", "decoder.plan", "step.plan", "golden.safetensors"}
    assert (manifest.backend, manifest.target, manifest.precision) == ("tensorrt-rtx", "sm86,sm89,sm120", precision)
    assert (manifest.slots, manifest.fixed_slots, manifest.family) == (4, True, family)
    assert manifest.tools["tensorrt-rtx"] == importlib.import_module("tensorrt_rtx").__version__
    assert bool(manifest.tolerances) == (precision != "bf16")
    caches = {spec["dtype"] for spec in manifest.step["inputs"] if spec["name"].startswith("cache")}
    assert caches == {{"fp32": "float32", "fp16": "float16", "bf16": "uint16"}[precision]}
    assert main(["inspect", str(engine)]) == 0
    assert f"tensorrt-rtx for sm86,sm89,sm120, {precision}, weights {precision}, 4 slots" in capsys.readouterr().out
    with pytest.raises(BackendError, match="no NVIDIA driver on this machine"):
        Generator(engine)
    with pytest.raises(BackendError, match="holds TensorRT plans, which run on cuda only; device is 'cpu'"):
        Generator(engine, device="cpu")
    with pytest.raises(EngineError, match="exists already"):
        to_tensorrt.export_tensorrt(traced.models[family], engine, slots=SLOTS, precision=precision, check_tokens=12)


@needs_rtx
def test_published_checkpoint_becomes_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A released ``.ckpt`` with its configuration goes the whole way in one command."""
    released = [str(GOLDEN / "model.ckpt"), "--config", str(GOLDEN / "config.json")]
    options = ["--precision", "fp32", "--target", "sm89", "--slots", "2", "--check-tokens", "12"]
    to_tensorrt.main([*released, "--out", str(tmp_path / "engine"), *options])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "engine")
    manifest = read_engine(tmp_path / "engine")
    assert (manifest.target, manifest.slots, manifest.layout.classes) == ("sm89", 2, 10)
    assert max(manifest.tolerances.values()) <= BOUND


# --- what it refuses -------------------------------------------------------------------------------------------
def test_bad_options(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options out of their range, half models, and a missing GPU, each by name, before any work."""
    model = traced.models["dq"]
    out = tmp_path / "engine"
    for words, error, options in (
        ("slots is 1; a plan needs at least 2", ConfigError, {"slots": 1}),
        ("slots is 2.5; it must be an integer", InputError, {"slots": 2.5}),
        ("slots is 0; it must be an integer", InputError, {"slots": 0}),
        ("slots is 5000; it must be an integer from 1 to 4096", InputError, {"slots": 5000}),
        ("precision is 'int8'; it must be one of", ConfigError, {"precision": "int8"}),
        ("check_tokens is 0; it must be an integer from 1", InputError, {"check_tokens": 0}),
        ("flavor is 'rt'; it must be one of", BackendError, {"flavor": "rt"}),
    ):
        with pytest.raises(error, match=words):
            to_tensorrt.export_tensorrt(model, out, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds stage 1 only; train stage 2"):
        to_tensorrt.export_tensorrt(Model(model.tokenizer), out)
    monkeypatch.setattr("runtimes.cuda.driver_version", lambda: None)

    class Stub(Api):
        ahead_of_time = True
        check_targets = TensorRT.check_targets

        def capabilities(self) -> list[str]:
            return ["sm86", "sm89"]

    with pytest.raises(BackendError, match="no NVIDIA driver"):
        plans.choose_targets(Stub(), ["current"])  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"target is 'sm90'; tensorrt-rtx 0 builds for \['sm86', 'sm89'\], one or sev"
    ):
        plans.choose_targets(Stub(), ["sm90"])  # type: ignore[arg-type]
    monkeypatch.setattr(Stub, "ahead_of_time", False)
    with pytest.raises(ConfigError, match="builds for the GPU of this machine only: use --target current"):
        plans.choose_targets(Stub(), ["sm86"])  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_manifests_of_plans(traced: Traced) -> None:
    """A manifest of plans names GPUs, one of graphs a device; and only plans have a fixed number of slots."""
    _, manifest = traced.graphs("dq", "fp16")
    assert manifest.fixed_slots and Manifest.from_dict(manifest.to_dict()) == manifest
    for target in ("cuda", "sm", "sm86;sm89", "sm86,", ""):
        with pytest.raises(ConfigError, match=r"manifest\.target is .*must be names such as 'sm86,sm89'"):
            replace(manifest, target=target)
    with pytest.raises(ConfigError, match=r"manifest\.target is 'sm86'; it must be one of"):
        replace(manifest, backend="onnxruntime", target="sm86")


def test_published_checkpoint_needs_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A released file without its configuration is refused by name."""
    with pytest.raises(SystemExit):
        to_tensorrt.main([str(tmp_path / "model.ckpt")])
    assert "is a published checkpoint; give its released configuration with --config" in capsys.readouterr().err


def test_neither_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without TensorRT the command says which two packages there are; a broken or old one is named as such."""
    monkeypatch.setattr(TensorRT, "_loaded", {})
    error: Exception

    def missing(name: str) -> Any:
        raise error

    monkeypatch.setattr(tensorrt_api.importlib, "import_module", missing)
    error = ModuleNotFoundError("No module named 'tensorrt_rtx'", name="tensorrt_rtx")
    with pytest.raises(BackendError, match=r"no TensorRT to build with .*\[tensorrt-rtx\].*\[tensorrt\]"):
        choose_flavor("auto", driver=False)
    with pytest.raises(BackendError, match=r"tensorrt-rtx is not installed; pip install 'dvq-rt\[tensorrt-rtx\]'"):
        choose_flavor("tensorrt-rtx", driver=False)
    error = OSError("libcudart.so.13: cannot open shared object file")
    with pytest.raises(BackendError, match="tensorrt is installed but broken: libcudart"):
        choose_flavor("tensorrt", driver=True)
    monkeypatch.setattr(
        tensorrt_api.importlib, "import_module", lambda name: type("Old", (), {"__version__": "10.9.0"})
    )
    with pytest.raises(BackendError, match=r"tensorrt 10\.9\.0 is too old; 10\.15 or newer is needed"):
        choose_flavor("tensorrt", driver=True)


def test_full_logits_are_finite(traced: Traced) -> None:
    """The reference that the comparisons lean on has no NaN, which a maximum would hide."""
    model = traced.models["dq"]
    for row in ragged_tokens(model.layout, 3):
        assert all(np.isfinite(values).all() for values in full_logits(model.both()[1], row).values())


@pytest.mark.gpu
@pytest.mark.skipif(driver_version() is None, reason="needs an NVIDIA GPU and a TensorRT package")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_plans_agree_on_the_gpu(family: str, precision: str, traced: Traced, tmp_path: Path) -> None:
    """On a GPU: plans built for it pass every check of ``verify`` there, and draw a whole call of images."""
    to_tensorrt.export_tensorrt(traced.models[family], tmp_path / "engine", slots=SLOTS, precision=precision)
    generator = Generator(tmp_path / "engine")
    for check in generator.verify():
        print(f"\n{family} {precision} {check.name}: {check.measured:.2g} (at most {check.bound:.2g})", end="")
        assert check.ok, check
    samples = generator.sample(9, seed=2)
    assert len(samples) == 9
    again = generator.sample(9, seed=2)
    assert samples.codes == again.codes
