"""Devices that compute on the host, for what stands between ``Generator`` and a GPU: which buffer goes where, what
becomes a graph when, what an error means. They claim nothing of GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtimes.cuda import cuda_error
from runtimes.errors import BackendError


class HostDevice:
    """A device whose memory is the host's, and whose stream does everything at once.

    Attributes:
        room: bytes that there are; lost: whether all work fails from now on.
    """

    stream = 7
    room = 2**40
    lost = False

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.log: list[str] = []
        self.captured: list[Callable[[], None]] | None = None

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def do(self, work: Callable[[], None]) -> None:
        """What goes through the stream."""
        if self.lost:
            raise BackendError(cuda_error("cudaLaunchKernel", 719, "cudaErrorLaunchFailure"))
        work()

    def copy(self, target: int, source: int, size: int) -> None:
        self.do(lambda: self.memory[target].__setitem__(slice(size), self.memory[source][:size]))

    def allocate(self, size: int) -> int:
        if size > self.room - sum(array.size for array in self.memory.values()):
            raise BackendError(cuda_error("cudaMalloc", 2, "cudaErrorMemoryAllocation"))
        array = np.zeros(size, dtype=np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def release(self, address: int) -> None:
        del self.memory[address]

    def pinned(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, dtype=np.uint8)

    def upload(self, address: int, values: NDArray[np.uint8]) -> None:
        array, given = self.memory[address], values.copy()
        self.do(lambda: array.__setitem__(slice(given.size), given))

    def download(self, address: int, into: NDArray[np.uint8]) -> object:
        self.log.append("download")
        array = self.memory[address]
        self.do(lambda: into.__setitem__(slice(None), array[: into.size]))
        return into

    def wait(self, mark: object) -> None:
        self.log.append("wait")

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        self.captured = []
        work()
        graph, self.captured = self.captured, None
        self.log.append("capture")
        return graph

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.log.append("launch")
        for work in graph:
            self.do(work)


class LateDevice(HostDevice):
    """A device whose stream does nothing before it is waited for."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.queue: list[Callable[[], None]] = []

    def do(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def download(self, address: int, into: NDArray[np.uint8]) -> object:
        into[:] = 77  # nothing may read this before the wait
        super().download(address, into)
        return len(self.queue)

    def wait(self, mark: object) -> None:
        super().wait(mark)
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class HostContext:
    """Runs a graph from and to raw addresses, as a context of TensorRT does; while a capture is under way it only
    notes what to do, with the addresses of that moment."""

    def __init__(self, session: Any, device: HostDevice) -> None:
        self.session, self.device = session, device
        self.addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.device.stream
        binding = self.session.io_binding()
        for kind, values in (("input", self.session.get_inputs()), ("output", self.session.get_outputs())):
            for value in values:
                dtype = HostApi.dtype(value)
                getattr(binding, f"bind_{kind}")(value.name, "cpu", 0, dtype, value.shape, self.addresses[value.name])
        if self.device.captured is not None:
            self.device.captured.append(lambda: self.session.run_with_iobinding(binding))
        else:
            self.device.log.append("execute")
            self.device.do(lambda: self.session.run_with_iobinding(binding))
        return True


class HostApi:
    """What ``TensorRT`` offers the backend, over ONNX graphs."""

    flavor, version = "tensorrt-rtx", "1.7.1"
    ready_after = 0

    def __init__(self, flavor: str) -> None:
        assert flavor == self.flavor
        self.device: Any = None
        self.asked = 0

    @staticmethod
    def dtype(value: Any) -> Any:
        names = {"float": "float32", "float16": "float16", "int64": "int64", "int32": "int32", "bool": "bool"}
        return np.dtype({**names, "uint8": "uint8"}[value.type[len("tensor(") : -1]])

    def deserialize(self, plan: bytes) -> tuple[Any, Any]:
        if not plan:
            return None, None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        return None, type("Engine", (), {"session": session, "create_execution_context": lambda e: self.context(e)})()

    def context(self, engine: Any) -> HostContext:
        return HostContext(engine.session, self.device)

    def specs(self, engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        both = (engine.session.get_inputs(), engine.session.get_outputs())
        sides = [{v.name: {"dtype": self.dtype(v).name, "shape": v.shape} for v in values} for values in both]
        return sides[0], sides[1]

    def aliases(self, engine: Any, outputs: list[str]) -> dict[str, str]:
        return {name: name.removesuffix("_out") for name in outputs if name.startswith("cache_")}

    def capturable(self, context: Any, stream: int) -> bool:
        self.asked += 1
        return self.asked > self.ready_after

    def complaint(self) -> str:
        return "incompatible device, expecting compute 8.6 got compute 8.9"


class CudaOnnxRuntime:
    """The onnxruntime module, whose CUDA provider computes on a stand-in device's host memory.

    A run that names a new ``gpu_graph_id`` is executed more than once, as ONNX Runtime does it to capture a graph.
    """

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.options: list[Mapping[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, source: Any, options: Any, *, providers: Any, enable_fallback: int) -> CudaSession:
        assert not enable_fallback
        self.options.append(dict(providers[0][1]))
        options.intra_op_num_threads = 1
        return CudaSession(
            onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]), self.device
        )


class CudaSession:
    """A session on the host that takes bindings to a stand-in device."""

    def __init__(self, session: Any, device: HostDevice) -> None:
        self._session, self._device = session, device
        self._graphs: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()

        class Binding:
            real = binding

            @staticmethod
            def bind_input(name: str, device: str, index: int, *rest: Any) -> None:
                assert (device, index) == ("cuda", self._device.index)
                binding.bind_input(name, "cpu", 0, *rest)

            @staticmethod
            def bind_output(name: str, device: str, index: int, *rest: Any) -> None:
                assert (device, index) == ("cuda", self._device.index)
                binding.bind_output(name, "cpu", 0, *rest)

        return Binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        graph = options.get_run_config_entry("gpu_graph_id")
        new = graph not in self._graphs
        self._graphs.add(graph)
        self._device.log.append("capture" if new else "launch")
        for _ in range(3 if new else 1):
            self._device.do(lambda: self._session.run_with_iobinding(binding.real))
