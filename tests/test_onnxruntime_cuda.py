"""ONNX Runtime on CUDA without a GPU: buffers, graphs and errors over a device that computes on the host, and the
graphs in half precision. No test here but the one marked ``gpu`` touches a GPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from small_models import small_model
from standin import CudaOnnxRuntime, HostDevice, LateDevice
from torch import nn

import runtimes.card as card
import runtimes.onnxruntime as backend
from dvq_rt.__main__ import main
from dvq_rt.accept import REHEARSAL, accept
from dvq_rt.engine import Engine
from dvq_rt.generator import Generator
from dvq_rt.manifest import read_engine
from dvq_rt.sampling import SamplingParams
from export.coverage.check import check_coverage, cover
from export.coverage.kernels import read_table
from export.folding import SHIFT, fold
from export.fusion import fuse_residual_norms, replace_empty_sums
from export.gpu_baselines import measure
from export.precision import narrow
from export.to_onnx import export_onnx
from runtimes.cuda import Gpu
from runtimes.cuda_devices import copy_bandwidth
from runtimes.devices import read_device
from runtimes.errors import BackendError, ConfigError, ExportError, InputError
from training.checkpoint import Model

ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", (13, 0), "0000:65:00.0")
PARAMS = SamplingParams(guidance=1.5, temperature=0.8)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model(("ant", "bee", "cat"))


@pytest.fixture(scope="module")
def half(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 engine for CUDA; the export compares it with PyTorch in ONNX Runtime on the CPU, within the bounds of
    TensorRT's float16, and looks up every node."""
    folder = tmp_path_factory.mktemp("cuda") / "half"
    export_onnx(model, folder, slots=4, target="cuda", precision="fp16", check_tokens=8)
    return folder


def on(monkeypatch: pytest.MonkeyPatch, device: HostDevice) -> CudaOnnxRuntime:
    """A machine that seems to have a GPU and onnxruntime-gpu."""
    ort = CudaOnnxRuntime(device)
    monkeypatch.setattr(backend, "import_onnxruntime", lambda: ort)
    monkeypatch.setattr(backend, "find_gpu", lambda needed=None, index=0: ADA)

    def open_device(index: int = 0) -> HostDevice:
        assert index == device.index
        return device

    monkeypatch.setattr(backend, "open_device", open_device)
    return ort


# --- the whole way ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [HostDevice, LateDevice])
def test_images_are_those_of_the_cpu(kind: Any, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images in four slots, guided, through fixed buffers, both bindings and polled reads, are those of the CPU,
    also where the stream does nothing before it is waited for."""
    want = Generator(half, slots=4, threads=1).sample(7, "bee", seed=3, params=PARAMS)
    device = kind(1)
    ort = on(monkeypatch, device)
    ours = Generator(half, slots=4, device="cuda:1")
    found = ours.sample(7, "bee", seed=3, params=PARAMS)
    assert found.codes == want.codes
    np.testing.assert_array_equal(found.to_numpy(), want.to_numpy())
    step, decoder = ort.options
    assert (step["enable_cuda_graph"], step["user_compute_stream"], step["device_id"]) == ("1", "7", "1")
    assert "enable_cuda_graph" not in decoder and decoder["device_id"] == "1", "the decoder has a stream of its own"
    assert {o["enable_skip_layer_norm_strict_mode"] for o in ort.options} == {"1"}, "norms sum in float32"
    steps = [word for word in device.log if word in ("capture", "launch")]
    assert steps[:2] == ["capture"] * 2 and set(steps[2:]) == {"launch"}, "one graph for each direction"
    assert device.log.count("wait") <= len(steps) // 8 + 2 * 7, "the host waits when it polls, and for each image"


def test_a_loop_has_graphs_of_its_own(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new loop has new addresses, so it names graphs that none named before."""
    device = HostDevice()
    on(monkeypatch, device)
    engine = Engine.open(half, device="cuda")
    for slots in (4, 2):
        loop = engine.loop(slots)
        device.log.clear()
        for _ in range(4):
            loop.step()
        assert device.log == ["capture", "capture", "launch", "launch"]


def test_no_memory(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is full: the error says what to do, what was taken goes back, and with room the engine draws."""
    device = HostDevice()
    on(monkeypatch, device)
    ours = Generator(half, slots=4, device="cuda")
    device.room = 2000
    with pytest.raises(BackendError, match=r"out of GPU memory .*use fewer slots"):
        ours.sample(2, "ant", params=PARAMS)
    device.room = 2**40
    assert len(ours.sample(2, "ant", params=PARAMS)) == 2


def test_a_lost_gpu(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that fails while an image is drawn: this call and the next end with what to do, and closing works."""
    device = HostDevice()
    on(monkeypatch, device)
    ours = Generator(half, slots=4, device="cuda")

    def lose(image: int, tokens: int) -> None:
        device.lost = True

    with pytest.raises(BackendError, match=r"the GPU is lost to this process .*start a new process"):
        ours.sample(2, "ant", params=PARAMS, on_token=lose)
    with pytest.raises(BackendError, match="the GPU is lost to this process"):
        ours.sample(1, "ant", params=PARAMS)
    ours.close()


def test_two_engines_on_one_card(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines draw on one device at once what each draws alone."""
    on(monkeypatch, HostDevice())
    pair = [Generator(half, slots=4, device="cuda") for _ in range(2)]
    want = pair[0].sample(6, "cat", seed=1, params=PARAMS).codes
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = pair[i].sample(6, "cat", seed=1, params=PARAMS).codes

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: want, 1: want}


def test_names_of_devices() -> None:
    """Numbers of GPUs are read; anything else is refused with the form that is wanted."""
    assert [str(read_device(name)) for name in ("cpu", "cuda", "cuda:0", "cuda:12")] == [
        "cpu",
        "cuda",
        "cuda",
        "cuda:12",
    ]
    assert read_device("cuda:3").number == 3
    for odd in ("cuda:", "cuda:-1", "cpu:0", "gpu", "CUDA", "", None, 1, "cuda:1 ", "cuda:1234"):
        with pytest.raises(BackendError, match=r"device is .*; it must be 'cpu', 'cuda'"):
            read_device(odd)


# --- the graphs ------------------------------------------------------------------------------------------------
def test_the_exported_engine(half: Path) -> None:
    """Caches are float16 and attended to by one operator, which no bias is added before, sampling stays float32, pixels
    are bytes of the device, and no node lacks a kernel."""
    manifest = read_engine(half)
    assert (manifest.target, manifest.precision, manifest.weights) == ("cuda", "fp16", "fp16")
    assert {spec["dtype"] for spec in manifest.step["inputs"] if spec["name"].startswith("cache")} == {"float16"}
    graph = onnx.load(half / "step.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 3 and kinds.count("SkipLayerNormalization") == 7
    makers = {value: node.op_type for node in graph.node for value in node.output}
    assert {makers[n.input[0]] for n in graph.node if n.op_type == "GroupQueryAttention"} == {"MatMul"}
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    for node in graph.node:
        if node.op_type in ("TopK", "CumSum", "Softmax", "LogSoftmax"):
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
    for part in ("encoder", "decoder", "step"):
        assert not check_coverage(half / f"{part}.onnx").missing
    assert "pixels" in Engine.open(half).program("decoder").outputs


def test_a_node_without_a_kernel() -> None:
    """An operator, a type and a version that CUDA lacks are each named; sizes are not held against a graph."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.BOOL, ["B"]) for name in "xy")
    flag = helper.make_node("Where", ["x", "x", "x"], ["y"], name="choice")
    odd = helper.make_node("Det", ["z"], ["d"], name="determinant")
    size = helper.make_node("Shape", ["x"], ["s"], name="size")
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 2])
    outputs = [y, helper.make_tensor_value_info("d", TensorProto.FLOAT, [])]
    outputs.append(helper.make_tensor_value_info("s", TensorProto.INT64, [1]))
    graph = helper.make_graph([flag, odd, size], "g", [x, z], outputs)
    found = cover(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), "g")
    assert found.missing == ["choice (Where of bool, bool, bool, bool)", "determinant (Det of float, float)"]
    assert found.on_host == {"Shape": 1}
    assert read_table().version == "1.31.1"


def test_bf16_convolutions_are_refused(tmp_path: Path) -> None:
    """What the operator itself does not take is found too: convolutions of bfloat16 in opset 20."""
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1, 1, 4, 4])
    w = helper.make_tensor_value_info("w", TensorProto.BFLOAT16, [1, 1, 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [1, 1, 2, 2])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], "g", [x, w], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=r"g\.onnx has nodes that onnxruntime-gpu .* would run on the CPU: conv"):
        check_coverage(tmp_path / "g.onnx")


def test_fused_norms() -> None:
    """A sum, the bias before it and the norm after it become one node that also gives the sum; a norm of what is no sum
    stays."""
    names = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 1, 4]) for name in "abcdxyz"}
    vectors = [
        helper.make_tensor(name, TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0]) for name in ("bias", "gain", "shift")
    ]
    nodes = [
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Add", ["c", "b"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["y"], name="norm", epsilon=1e-5),
        helper.make_node("Add", ["x", "y"], ["d"]),
        helper.make_node("LayerNormalization", ["c", "gain", "shift"], ["z"], name="other"),
    ]
    graph = helper.make_graph(
        nodes, "g", [names["a"], names["c"]], [names["d"], names["z"]], vectors, value_info=[names[n] for n in "abcxy"]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    given = {n: np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32) for n in "ac"}
    run = lambda: backend.import_onnxruntime().InferenceSession(proto.SerializeToString()).run(None, given)  # noqa: E731
    want = run()
    assert fuse_residual_norms(proto) == 1
    assert [node.op_type for node in proto.graph.node] == ["SkipLayerNormalization", "Add", "LayerNormalization"]
    for one, other in zip(want, run(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [0, 1])
def test_empty_sums(keep: int) -> None:
    """A sum over nothing, which CUDA's kernel refuses, becomes zeros, or is named where it has another form."""
    x = helper.make_tensor_value_info("x", TensorProto.INT64, ["B", 1])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["B", 1] if keep else ["B"])
    none = helper.make_tensor_value_info("none", TensorProto.INT64, ["B", 0])
    constants = [helper.make_tensor("nothing", TensorProto.INT64, [0], []), helper.make_tensor("axis", 7, [1], [1])]
    nodes = [
        helper.make_node("Add", ["x", "nothing"], ["none"]),
        helper.make_node("ReduceSum", ["none", "axis"], ["y"], name="total", keepdims=keep),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], constants, value_info=[none])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert cover(proto, "g").missing == ["total (ReduceSum of nothing, [-1, 0])"]
    assert replace_empty_sums(proto) == 1 - keep
    assert bool(cover(proto, "g").missing) == bool(keep)
    onnx.checker.check_model(proto)
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": np.ones((3, 1), np.int64)})
    assert found.dtype == np.int64 and found.shape == ((3, 1) if keep else (3,)) and not found.any()


def test_folded_biases() -> None:
    """A projection without its bias, behind a norm that shifts by a constant, gives what it gave before."""
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(32).double(), nn.Linear(32, 96).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, layer.bias):
            tensor.normal_()
        x = torch.randn(5, 32, dtype=torch.float64) * 3 + 1
        want = layer(norm(x))
        fold(norm, layer)
        assert layer.bias is None and norm.bias.unique().tolist() == [SHIFT]
        torch.testing.assert_close(layer(norm(x)), want, rtol=0, atol=1e-12)


def test_bf16_in_pytorch(model: Model) -> None:
    """bfloat16, for which ONNX Runtime has no kernels on a CPU: each block of the narrowed model computes in PyTorch
    what the float32 one does, within an eighth of the digits of float16; the tokenizer stays float32."""
    narrowed = narrow(model, "bf16", tokenizer=False)
    vae, net = narrowed.both()
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    blocks = [n for n, _ in net.named_modules() if n.endswith("_blocks.0")]
    for name in blocks:
        wide, thin = model.both()[1].get_submodule(name), net.get_submodule(name)
        assert isinstance(wide, nn.Module) and isinstance(thin, nn.Module)
        want, got = wide(x), thin(x.bfloat16()).float()
        assert float((got - want).abs().max() / want.abs().max()) < 0.16, name
    assert len(blocks) == 2


def test_integer_weights_alone(model: Model, tmp_path: Path) -> None:
    """With integer weights for CUDA activations and caches stay float16: the engine agrees with PyTorch within the
    bounds of float16, not those of rounded activations."""
    manifest = export_onnx(
        model, tmp_path / "e", slots=2, target="cuda", precision="fp16", weights="int4", calibrate=0, check_tokens=4
    )
    assert not manifest.rounds_activations
    assert max(manifest.tolerances[f"step: relative {head} logit error"] for head in ("position", "content")) < 2e-2
    kinds = [node.op_type for node in onnx.load(tmp_path / "e" / "step.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 4 * 3 + 2 and "QLinearConv" not in kinds


def test_options_that_do_not_go_together(model: Model, tmp_path: Path) -> None:
    """Half precision on a CPU, weights of another format, and tuning for CUDA are refused before anything is traced."""
    for options, words in (
        ({"precision": "fp16"}, "ONNX Runtime computes in fp32 on CPUs; use --target cuda"),
        ({"precision": "fp16", "target": "cuda", "weights": "bf16"}, "precision is 'fp16'; leave --weights out"),
        ({"precision": "fp8", "target": "cuda"}, "precision is 'fp8'; it must be one of"),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(model, tmp_path / "engine", **options)  # type: ignore[arg-type]
    for options, words in (
        ({"target": "cuda", "weights": "int8", "tuning": 1}, "it is for target 'cpu'"),
        ({"check_tokens": 3}, "check_tokens is for precisions fp16 and bf16"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_onnx(model, tmp_path / "engine", **options)  # type: ignore[arg-type]


# --- acceptance ------------------------------------------------------------------------------------------------
def test_the_rehearsal(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``accept --rehearse`` runs every part of the report on the CPU, says that it is a rehearsal, and passes; two
    engines are drawn beside each other."""
    out = tmp_path / "report.json"
    words = ["accept", str(half), str(half), "--rehearse", "--soak", "0.1", "--images", "3", "--threads", "1"]
    assert main([*words, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert report["machine"]["rehearsal"] and report["ok"] and "rehearsal on the CPU" in printed
    entry = report["engines"][0]
    names = [c["name"] for c in entry["checks"]]
    assert any("identical slots" in n for n in names) and "3 images: changed by other neighbours and slots" in names
    assert [t["slots"] for t in entry["tokens"]] == [1, 8] and entry["tokens"][0]["tokens_per_s"] > 0
    assert len(report["together"]) == 1 and entry["soak"]["images"] >= 4


def test_the_report_of_a_gpu(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that only a GPU has, over a stand-in: its name, its memory's speed, power; and a failure is one."""
    device = HostDevice()
    on(monkeypatch, device)
    monkeypatch.setattr("dvq_rt.accept.find_gpu", lambda needed=None, index=0: ADA)
    monkeypatch.setattr("dvq_rt.accept.copy_bandwidth", lambda device: copy_bandwidth(device, 1000, 2))
    monkeypatch.setattr("dvq_rt.accept.open_device", lambda index: device)
    line = "NVIDIA GeForce RTX 4090, 580.65, 1024, 24564, 212.5, 450.00, 2520, 10501, [N/A]\n"
    monkeypatch.setattr("dvq_rt.accept.read_card", lambda bus: card.parse_card(line) if bus == ADA.bus else None)
    monkeypatch.setattr("dvq_rt.accept.GROWTH", -1.0)
    plan = type(REHEARSAL)(images=2, soak=0.1, rounds=1, slots=(2,))
    report = accept([str(half)], plan=plan, baselines=lambda device, slots, length, rounds: {"eager fp16 b2": 0.01})
    assert (
        report["machine"]["gpu"]["target"] == "sm89" and report["engines"][0]["tokens"][0]["card"]["power_w"] == 212.5
    )
    assert report["machine"]["card"]["temperature_c"] is None and ADA.bus not in str(report)
    assert not report["ok"], "memory that grows over the bound fails"
    with pytest.raises(InputError, match="accept is for GPUs: use cuda or cuda:N, or --rehearse"):
        accept([str(half)], device="cpu")


def test_pytorch_baselines(model: Model) -> None:
    """The baselines run on the CPU; compiled ones are left to a GPU, for they take long to compile."""
    seconds = measure(model, "cpu", [2], 8, 1, compiled=False)
    assert set(seconds) == {"uncached fp32 b2", "eager fp32 b2"} and min(seconds.values()) > 0


def cuda_missing() -> bool:
    """Whether this machine's ONNX Runtime has no CUDA provider."""
    return "CUDAExecutionProvider" not in backend.import_onnxruntime().get_available_providers()


@pytest.mark.gpu
@pytest.mark.skipif(cuda_missing(), reason="needs an NVIDIA GPU and onnxruntime-gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_acceptance_on_a_gpu(precision: str, model: Model, tmp_path: Path) -> None:
    """On a GPU: an engine of every precision is accepted, shortened."""
    export_onnx(model, tmp_path / "engine", slots=8, target="cuda", precision=precision)
    plan = type(REHEARSAL)(images=40, soak=5.0, rounds=3)
    report = accept([str(tmp_path / "engine")], plan=plan)
    assert report["ok"], [c for c in report["engines"][0]["checks"] if not c["ok"]]
