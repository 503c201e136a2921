"""The TensorRT backend without a GPU: which buffer goes where, what becomes a graph when, what an error means.

The device below is host memory, and the "plans" are ONNX graphs that ONNX Runtime executes on it: this tests all that
stands between ``Generator`` and a plan, and claims nothing of plans.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from standin import HostApi, HostDevice
from test_tensorrt_export import SLOTS, TARGETS, Traced

import runtimes.cuda as cuda
import runtimes.cuda_devices as devices
import runtimes.tensorrt as backend
from dvq_rt.__main__ import main
from dvq_rt.decoding import Request, Scheduler
from dvq_rt.generator import Generator
from dvq_rt.manifest import GRAPHS, Manifest, read_engine, write_engine
from dvq_rt.sampling import SamplingParams
from runtimes.cuda import Gpu, find_gpu
from runtimes.cuda_devices import CudaPythonDevice, TorchDevice
from runtimes.errors import BackendError, EngineError, InputError
from runtimes.graph_files import check_interface
from runtimes.protocol import TensorSpec
from runtimes.tensorrt import GpuBuffer, binding_table, check_machine, explain, row_parts

ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", (13, 0))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture(scope="module")
def engine(traced: Traced) -> Path:
    """An engine folder whose "plans" are the ONNX graphs."""
    folder, manifest = traced.graphs("dq", "fp32")
    target = traced.folder / "engine"

    def build(into: Path) -> Manifest:
        for name in GRAPHS:
            (into / f"{name}.plan").write_bytes((folder / f"{name}.onnx").read_bytes())
        (into / "golden.safetensors").write_bytes((folder / "golden.safetensors").read_bytes())
        tools = {**manifest.tools, "tensorrt-rtx": HostApi.version}
        return Manifest(**{n: getattr(manifest, n) for n in manifest.__dataclass_fields__} | {"tools": tools})

    write_engine(target, build)
    return target


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """A machine that seems to have a GPU."""
    device = HostDevice()

    def api(flavor: str) -> HostApi:
        made = HostApi(flavor)
        made.device = device
        return made

    monkeypatch.setattr(backend, "find_gpu", lambda needed=None, index=0: ADA)
    monkeypatch.setattr(backend, "open_device", lambda index=0: device)
    monkeypatch.setattr(backend, "TensorRT", api)
    return device


# --- the whole way ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(guidance=2.0, temperature=0.8), SamplingParams(positions="drawn")]
)
def test_images_are_those_of_the_other_backend(
    params: SamplingParams, engine: Path, host: HostDevice, generator: Generator
) -> None:
    """Buffers, caches on both sides, double-buffered state, graphs, late ``done`` and refills of slots: eleven images
    in four fixed slots are those of the CPU engine, twice, and scores agree."""
    ours = Generator(engine)
    labels = [i % 3 for i in range(11)]
    for seed in (3, 4):
        found, want = (g.sample(11, labels, seed=seed, params=params) for g in (ours, generator))
        assert found.codes == want.codes
        np.testing.assert_allclose(found.to_numpy().astype(int), want.to_numpy(), atol=1)
    scores = [[s.total for s in g.score(want.codes)] for g in (ours, generator)]
    np.testing.assert_allclose(*scores, rtol=1e-4)
    assert ours.encode(want.images[:3]) == generator.encode(want.images[:3])


def test_verify_on_the_command_line(engine: Path, host: HostDevice, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m dvq_rt verify ENGINE_DIR`` needs no option for a folder of plans, and prints its table."""
    assert main(["verify", str(engine)]) == 0
    printed = capsys.readouterr().out
    assert "all 11 passed" in printed and "identical slots" in printed and "free run" in printed


def test_each_direction_becomes_one_graph(engine: Path, host: HostDevice) -> None:
    """The two bindings of a loop run once plainly, are captured at once, and from then on only launch; no step waits
    for the device but the eighth."""
    ours = Generator(engine)
    loop = ours.engine.loop(1)
    assert loop.slots == SLOTS
    host.log.clear()
    for _ in range(6):
        loop.step()
    assert host.log == ["execute", "capture"] * 2 + ["launch"] * 4
    host.log.clear()
    ours.sample(2, seed=1, params=SamplingParams())
    log = host.log[host.log.index("execute") :]
    assert log[:9] == ["execute", "capture"] * 2 + ["launch"] * 5
    assert log[9:12] == ["download", "launch", "wait"]  # the eighth step is queued before the wait for the seventh


def test_an_image_that_starts_late_is_not_done(engine: Path, host: HostDevice) -> None:
    """An image that takes its slot after ``done`` was asked for, and before it is read, is not ended by what the slot
    held before."""
    scheduler = Scheduler(Generator(engine).engine.loop(1))
    early = scheduler.submit(Request(0, SamplingParams(), image=0))
    while (scheduler.loop.calls + 1) % scheduler.loop.poll:
        scheduler.step()
    late = scheduler.submit(Request(1, SamplingParams(), image=1))
    cells: dict[Any, NDArray[np.int32]] = {}
    while scheduler.busy:
        cells |= {event.handle: event.cells for event in scheduler.step() if event.finished}
    assert set(cells) == {early, late} and min(values.min() for values in cells.values()) >= 0


def test_graphs_wait_until_the_context_is_ready(
    engine: Path, host: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that cannot be captured yet is asked again after further plain runs, and given up with a warning."""
    monkeypatch.setattr(HostApi, "ready_after", 3)
    loop = Generator(engine).engine.loop(1)
    host.log.clear()
    for _ in range(7):
        loop.step()
    assert host.log == ["execute"] * 3 + ["execute", "capture"] * 2 + ["launch"] * 2
    monkeypatch.setattr(HostApi, "ready_after", 10**6)
    loop = Generator(engine).engine.loop(1)
    host.log.clear()
    with pytest.warns(UserWarning, match=r"step\.plan cannot be captured as a CUDA graph"):
        for _ in range(12):
            loop.step()
    assert host.log == ["execute"] * 12


def test_plans_are_what_their_manifests_say(engine: Path, host: HostDevice) -> None:
    """A plan's tensors are compared with the manifest's as a graph's are, fixed sizes included."""
    step = read_engine(engine).step
    inputs, outputs = (
        {t["name"]: TensorSpec(t["dtype"], tuple(t["shape"])) for t in step[side]} for side in ("inputs", "outputs")
    )
    program = backend.TensorRTBackend("tensorrt-rtx", HostApi.version, "sm89").load(engine / "step.plan")
    check_interface(engine / "step.plan", program, inputs, outputs)
    inputs["done"] = TensorSpec("bool", (SLOTS + 1,))
    with pytest.raises(EngineError, match=r"'done' is bool \[5\] in the manifest, bool \[4\] in the graph"):
        check_interface(engine / "step.plan", program, inputs, outputs)


def test_memory_goes_back(engine: Path, host: HostDevice) -> None:
    """A dropped loop gives its buffers back, and only those."""
    ours = Generator(engine)
    ours.engine.program("step")
    before = set(host.memory)
    loop = ours.engine.loop(1)
    assert len(host.memory) > len(before) + 30
    del loop
    assert set(host.memory) == before


def test_slots_are_fixed(engine: Path, host: HostDevice) -> None:
    """The plan's own number of slots is the only one."""
    assert Generator(engine, slots=SLOTS).sample(1, params=SamplingParams()).codes
    with pytest.raises(InputError, match="slots is 3; this engine has 4, fixed at its export; leave it out"):
        Generator(engine, slots=3)


def test_changed_plans_are_not_opened(engine: Path, host: HostDevice, tmp_path: Path) -> None:
    """Only bytes with the manifest's hash reach TensorRT, even if the file changes after the folder was checked."""
    ours = Generator(engine)
    plan = (engine / "step.plan").read_bytes()
    (engine / "step.plan").write_bytes(plan[:-1] + bytes([plan[-1] ^ 1]))
    try:
        with pytest.raises(EngineError, match=r"step\.plan is not the file that the manifest lists"):
            ours.sample(1)
        with pytest.raises(EngineError, match=r"step\.plan is corrupted"):
            Generator(engine)
    finally:
        (engine / "step.plan").write_bytes(plan)
    (tmp_path / "empty.plan").write_bytes(b"")
    with pytest.raises(BackendError, match=r"cannot open .*empty\.plan: the plan was built for another GPU.*--target"):
        ours.engine.backend.load(tmp_path / "empty.plan")


# --- the parts -------------------------------------------------------------------------------------------------
def spec(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


def test_binding_table() -> None:
    """Every tensor gets its buffer's address; what does not fit is named: other names, formats, shapes, a cache that
    would not be in place, a state that would be."""
    device, lock = HostDevice(), threading.RLock()
    length, cache, other = (GpuBuffer(device, lock, shape, "float32") for shape in ((2,), (2, 3), (2, 3)))
    wanted = (
        {"length": spec("float32", 2), "cache": spec("float32", 2, 3)},
        {"cache_out": spec("float32", 2, 3)},
    )
    inputs, aliases = {"length": length, "cache": cache}, {"cache_out": "cache"}
    table = binding_table(inputs, {"cache_out": cache}, wanted, aliases)
    assert table == {"length": length.address, "cache": cache.address, "cache_out": cache.address}
    with pytest.raises(EngineError, match=r"differ from its manifest by \['length'\]"):
        binding_table({"cache": cache}, {"cache_out": cache}, wanted, aliases)
    with pytest.raises(EngineError, match="cache_out has the address of None, the plan wants that of cache"):
        binding_table(inputs, {"cache_out": other}, wanted, aliases)
    with pytest.raises(EngineError, match="cache_out has the address of cache, the plan wants that of None"):
        binding_table(inputs, {"cache_out": cache}, wanted, {})
    for dtype, shape in (("float16", (2, 3)), ("float32", (2, 4))):
        wrong = (wanted[0], {"cache_out": spec(dtype, *shape)})
        with pytest.raises(EngineError, match=r"cache_out is \('float32', \[2, 3\]\) in the manifest"):
            binding_table(inputs, {"cache_out": cache}, wrong, aliases)


def test_buffers() -> None:
    """Values go in and come out; a requested read gives the values of the request, and a write cancels it."""
    device = HostDevice()
    buffer = GpuBuffer(device, threading.RLock(), (2, 3), "int64")
    assert not buffer.read().any()
    values = np.arange(6).reshape(3, 2).T
    buffer.write(values)
    np.testing.assert_array_equal(buffer.read(), values)
    buffer.request()
    device.memory[buffer.address][:] = 0
    np.testing.assert_array_equal(buffer.read(), values)
    assert not buffer.read().any()
    buffer.write(values)
    buffer.request()
    buffer.write(values + 1)
    np.testing.assert_array_equal(buffer.read(), values + 1)
    scalars = GpuBuffer(device, threading.RLock(), (3,), "bool")
    scalars.write(np.array([True, False, True]))
    assert scalars.read().tolist() == [True, False, True]


def test_rows_go_in_parts() -> None:
    """Seven rows through a plan of three: three parts, the last one filled up with its last row."""
    parts = row_parts({"x": np.arange(14).reshape(7, 2)}, 3)
    assert [part["x"][:, 0].tolist() for part in parts] == [[0, 2, 4], [6, 8, 10], [12, 12, 12]]


# --- errors ----------------------------------------------------------------------------------------------------
def test_another_machine() -> None:
    """Plans for another GPU or of another version are refused before they are read; the same ones are not."""
    check_machine("tensorrt-rtx", "1.7.1", "sm86,sm89", "1.7.1", ADA)
    with pytest.raises(
        BackendError, match=r"built for sm86,sm120, this GPU \(NVIDIA GeForce RTX 4090\) is sm89; .*sm89"
    ):
        check_machine("tensorrt-rtx", "1.7.1", "sm86,sm120", "1.7.1", ADA)
    with pytest.raises(
        BackendError, match=r"built with tensorrt 10\.15\.1, installed is 11\.0\.0, .*install tensorrt 10"
    ):
        check_machine("tensorrt", "10.15.1", ",".join(TARGETS), "11.0.0", ADA)


class Driver:
    """A CUDA driver of a version, with a GPU or without."""

    def __init__(self, number: int, status: int = 0) -> None:
        self.number, self.status = number, status
        self.modes: list[tuple[int, int]] = []

    def cuDriverGetVersion(self, pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = self.number
        return 0

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = 2
        return 0

    def cuDeviceGet(self, pointer: Any, index: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"GPU"
        return 0

    def cuDeviceGetPCIBusId(self, bus: Any, size: int, device: Any) -> int:
        bus.value = b"0000:65:00.0"
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.modes.append((threading.get_ident(), ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))[0]))
        return 0

    def cuDeviceGetAttribute(self, pointer: Any, attribute: int, device: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = {75: 12, 76: 0}[attribute]
        return 0


def test_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, a stub without one, an old one, one without a GPU, and a good one."""
    for library, words in (
        (None, "no NVIDIA driver on this machine"),
        (Driver(0), "no NVIDIA driver on this machine"),
        (Driver(12040), r"too old: it has CUDA 12\.4, CUDA 13 is needed; update it"),
        (Driver(13000, 100), r"finds no usable GPU \(CUDA error 100\); check nvidia-smi"),
    ):
        monkeypatch.setattr(cuda, "_driver", lambda library=library: library)
        with pytest.raises(BackendError, match=words):
            find_gpu(13)
    monkeypatch.setattr(cuda, "_driver", lambda: Driver(13010))
    assert find_gpu(13) == find_gpu(13, 1) == Gpu("GPU", "sm120", (13, 1), "0000:65:00.0")
    with pytest.raises(BackendError, match=r"device is 'cuda:2', but the driver finds 2 GPU\(s\), counted from 0"):
        find_gpu(13, 2)


def test_captures_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread that uses a GPU says once that only captures of its own forbid it anything: ONNX Runtime's forbid
    all others to allocate and copy."""
    driver = Driver(13000)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    device = CudaPythonDevice(Memory(0))

    def work() -> None:
        for _ in range(2):
            device.release(device.allocate(8))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [mode for ident, mode in driver.modes if ident != threading.get_ident()]
    assert told == [1, 1]


class Memory:
    """The CUDA runtime's bindings over the host's memory, with everything counted that must be freed again. What goes
    to a stream wants the stream's GPU to be the current one, but for copies."""

    cudaStreamNonBlocking = cudaEventDisableTiming = 1

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice = range(3)

    class cudaStreamCaptureMode:
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, stream_of: int) -> None:
        self.current, self.stream_of = 0, stream_of
        self.held: dict[Any, Any] = {}
        self.capturing = False

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, self.current

    def cudaSetDevice(self, index: int) -> tuple[int]:
        self.current = index
        return (0,)

    def hold(self, key: Any, thing: Any = None) -> tuple[int, Any]:
        assert key not in self.held
        self.held[key] = thing
        return 0, key

    def drop(self, key: Any) -> tuple[int]:
        del self.held[key]
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        assert self.current == self.stream_of
        array = np.zeros(size, np.uint8)
        return self.hold(array.ctypes.data, array)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, Any]:
        return self.hold(("event", len(self.held)))

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        self.capturing = False
        return self.hold("graph")

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return self.hold("exec")

    cudaMallocHost = cudaMalloc
    cudaFree = cudaFreeHost = cudaEventDestroy = cudaGraphDestroy = cudaGraphExecDestroy = drop

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.capturing = True
        return (0,)

    def on_stream(self, *_: Any) -> tuple[int]:
        assert self.current == self.stream_of
        return (0,)

    cudaMemsetAsync = cudaEventRecord = cudaGraphLaunch = on_stream

    def cudaEventSynchronize(self, event: Any) -> tuple[int]:
        assert event in self.held
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert self.current == self.stream_of
        return 0, 5


def test_nothing_of_cuda_is_left() -> None:
    """Through cuda-python, on the third GPU: values go in and out, the thread's own GPU stays current, and buffers,
    pinned memory, events and graphs are freed with their last reference, also an event that is never waited for."""
    runtime = Memory(2)
    device = CudaPythonDevice(runtime, 2)
    buffer, other = (GpuBuffer(device, threading.RLock(), (4,), "int32") for _ in range(2))
    buffer.write(np.arange(4))
    assert buffer.read().tolist() == [0, 1, 2, 3]
    buffer.request()
    buffer.write(np.ones(4))
    device.copy(other.address, buffer.address, 16)
    assert other.read().tolist() == [1] * 4
    graph = device.capture(lambda: None)
    device.launch(graph)
    assert runtime.current == 0 and "exec" in runtime.held and "graph" not in runtime.held
    del graph, buffer, other
    assert not runtime.held


def test_a_failed_capture_says_why() -> None:
    """The error of what is captured is told, not what CUDA says of the capture that it ended; the stream is free."""
    runtime = Memory(0)
    device = CudaPythonDevice(runtime)

    def refuse() -> None:
        raise BackendError("the plan refuses")

    with pytest.raises(BackendError, match="the plan refuses"):
        device.capture(refuse)
    assert not runtime.capturing


def test_pinned_memory_of_pytorch_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's pinned memory is freed with the array over it."""
    device = TorchDevice(Torch())
    array = device.pinned(8)
    assert len(device.held) == 1
    del array
    assert not device.held


def test_no_memory_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither PyTorch with CUDA nor cuda-python: the error says which to install."""

    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(devices.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"PyTorch with CUDA or cuda-python .*pip install cuda-python"):
        devices.open_device()


class Runtime:
    """The CUDA runtime's bindings on a machine where every call fails in one way."""

    cudaStreamNonBlocking = 1

    def __init__(self, number: int, name: str) -> None:
        self.error = type("Error", (int,), {"name": name})(number)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 5

    def cudaMalloc(self, size: int) -> tuple[Any, None]:
        return self.error, None

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0,)


class OutOfMemory(Exception):
    pass


class Torch:
    """PyTorch with a GPU that is full."""

    uint8 = torch.uint8

    class cuda:
        OutOfMemoryError = OutOfMemory

        class Stream:
            cuda_stream = 3

            def __init__(self, device: str) -> None:
                assert device == "cuda:0"

        @staticmethod
        def stream(stream: Any) -> Any:
            return contextlib.nullcontext()

    @staticmethod
    def zeros(*_: Any, **__: Any) -> Any:
        raise OutOfMemory

    @staticmethod
    def empty(size: int, dtype: Any, pin_memory: bool) -> Any:
        return torch.empty(size, dtype=dtype)


def test_out_of_memory() -> None:
    """Both ways to GPU memory, and TensorRT's own words, end in the same advice."""
    device = CudaPythonDevice(Runtime(2, "cudaErrorMemoryAllocation"))
    with pytest.raises(BackendError, match=r"out of GPU memory \(cudaMalloc\): use fewer slots, or close"):
        device.allocate(10)

    with pytest.raises(BackendError, match=r"out of GPU memory \(allocating 10 bytes\): use fewer slots"):
        TorchDevice(Torch()).allocate(10)
    assert "use fewer slots" in explain("[executionContext.cpp] OutOfMemory: requested 123 bytes")


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("incompatible device, expecting compute 7.5 got compute 8.6, please rebuild", "built for another GPU"),
        ("expecting library version 10.15.1 got 11.0.0, please rebuild", "built with another TensorRT version"),
        ("kSERIALIZATION_VERSION failed. Version tag does not match", "built with another TensorRT version"),
        ("CUDA initialization failure with error: 35", "driver is missing or too old"),
        ("something new", "something new"),
    ],
)
def test_what_tensorrt_says(words: str, meaning: str) -> None:
    """TensorRT's messages with their meaning first; unknown ones as they are."""
    assert explain(words).startswith(meaning) or meaning in explain(words).partition("(")[0]
    assert words in explain(words)


@pytest.mark.parametrize(
    ("number", "name", "words"),
    [
        (2, "cudaErrorMemoryAllocation", "use fewer slots"),
        (35, "cudaErrorInsufficientDriver", "update the driver"),
        (100, "cudaErrorNoDevice", "check nvidia-smi"),
        (700, "cudaErrorIllegalAddress", r"GPU is lost to this process \(a kernel touched wrong memory.* new process"),
        (1, "cudaErrorInvalidValue", r"CUDA failed in cudaMalloc: cudaErrorInvalidValue \(1\)"),
    ],
)
def test_cuda_errors(number: int, name: str, words: str) -> None:
    """Numbers of the CUDA runtime in the user's terms."""
    device = CudaPythonDevice(Runtime(number, name))
    with pytest.raises(BackendError, match=words):
        device.allocate(1)
