"""The CUDA driver; and memory, copies, events and graphs on one stream, by PyTorch if installed, else cuda-python.

Written to the documented APIs; nothing here but the driver probe has run, for lack of a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import BackendError

Bytes = NDArray[np.uint8]
LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
OUT_OF_MEMORY = "out of GPU memory ({asked}): use fewer slots, or close what else uses the GPU"


class Gpu(NamedTuple):
    """A GPU: ``name``, ``target`` such as ``sm89``, and CUDA ``version`` of its driver, e.g. (13, 0)."""

    name: str
    target: str
    version: tuple[int, int]


def driver_version() -> tuple[int, int] | None:
    """Highest CUDA version of the installed driver; None without a driver."""
    library, number = _driver(), ctypes.c_int(0)
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def find_gpu(needed: int | None = None) -> Gpu:
    """The first GPU.

    Args:
        needed: CUDA version that the driver must have at least.

    Raises:
        BackendError: there is no driver or no GPU, or the driver is too old.
    """
    version = driver_version()
    if version is None:
        raise BackendError(f"no NVIDIA driver on this machine ({LIBRARY}); install one, or use an engine of to_onnx")
    if needed and version[0] < needed:
        raise BackendError(
            f"the NVIDIA driver is too old: it has CUDA {version[0]}.{version[1]}, CUDA {needed} is needed; update it"
        )
    library = _driver()
    device, numbers, name = ctypes.c_int(0), [ctypes.c_int(0), ctypes.c_int(0)], ctypes.create_string_buffer(256)
    assert library is not None
    status = library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0)
    if status:
        raise BackendError(f"the NVIDIA driver finds no usable GPU (CUDA error {status}); check nvidia-smi")
    library.cuDeviceGetName(name, len(name), device)
    for number, attribute in zip(numbers, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return Gpu(name.value.decode(errors="replace"), f"sm{numbers[0].value}{numbers[1].value}", version)


def _driver() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


class Device(Protocol):
    """Memory and order of work on one GPU. All but ``wait`` only queue work on the stream."""

    stream: int
    """Handle of the stream."""

    def allocate(self, size: int) -> int:
        """Address of ``size`` zeroed bytes."""

    def release(self, address: int) -> None:
        """Give memory back."""

    def pinned(self, size: int) -> Bytes:
        """Host memory that the GPU can write, uint8 [size]."""

    def upload(self, address: int, values: Bytes) -> None:
        """Copy host bytes to an address; they may change once this returns."""

    def download(self, address: int, into: Bytes) -> Any:
        """Start a copy into ``pinned`` memory; what it returns is for ``wait``."""

    def wait(self, mark: Any) -> None:
        """Return once a download is complete."""

    def capture(self, work: Callable[[], None]) -> Any:
        """The work as a CUDA graph, without doing it."""

    def launch(self, graph: Any) -> None:
        """Do a captured graph's work."""


def open_device() -> Device:
    """The first GPU's memory through PyTorch if that has CUDA, else through cuda-python.

    Raises:
        BackendError: neither package is there.
    """
    try:
        torch = importlib.import_module("torch")  # by name: the runtime must not need it
        if torch.cuda.is_available():
            return TorchDevice(torch)
    except ImportError:
        pass
    try:
        return CudaPythonDevice(importlib.import_module("cuda.bindings.runtime"))
    except ImportError as error:
        raise BackendError(
            f"GPU memory needs PyTorch with CUDA or cuda-python ({error}); pip install cuda-python"
        ) from error


class TorchDevice:
    """Device memory as PyTorch tensors of bytes."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._tensors: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._stream = torch.cuda.Stream()
        self.stream: int = self._stream.cuda_stream

    @contextlib.contextmanager
    def _queue(self, work: str) -> Iterator[None]:
        """The stream, with PyTorch's errors as ours."""
        try:
            with self._torch.cuda.stream(self._stream):
                yield
        except self._torch.cuda.OutOfMemoryError as error:
            raise BackendError(OUT_OF_MEMORY.format(asked=work)) from error
        except RuntimeError as error:
            raise BackendError(f"CUDA failed in {work}: {error}") from error

    def allocate(self, size: int) -> int:
        with self._queue(f"allocating {size:,} bytes"):
            tensor = self._torch.zeros(size, dtype=self._torch.uint8, device="cuda")
        self._tensors[tensor.data_ptr()] = tensor
        return int(tensor.data_ptr())

    def release(self, address: int) -> None:
        self._tensors.pop(address, None)

    def pinned(self, size: int) -> Bytes:
        with self._queue(f"pinning {size:,} bytes"):
            tensor = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        array: Bytes = tensor.numpy()
        self._pinned[array.ctypes.data] = tensor
        return array

    def upload(self, address: int, values: Bytes) -> None:
        with self._queue("a copy to the GPU"):  # from pageable memory: read before this returns
            self._tensors[address][: values.size].copy_(self._torch.from_numpy(values))

    def download(self, address: int, into: Bytes) -> Any:
        with self._queue("a copy from the GPU"):
            event = self._torch.cuda.Event()
            self._pinned[into.ctypes.data].copy_(self._tensors[address][: into.size], non_blocking=True)
            event.record()
        return event

    def wait(self, mark: Any) -> None:
        with self._queue("work before a copy from the GPU"):
            mark.synchronize()

    def capture(self, work: Callable[[], None]) -> Any:
        with self._queue("capturing a graph"):
            graph = self._torch.cuda.CUDAGraph()
            self._stream.synchronize()
            with self._torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        return graph

    def launch(self, graph: Any) -> None:
        with self._queue("launching a graph"):
            graph.replay()


class CudaPythonDevice:
    """Device memory through NVIDIA's own bindings of the CUDA runtime."""

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *result = getattr(self._cuda, name)(*arguments)
        if int(error):
            raise BackendError(cuda_error(name, int(error), getattr(error, "name", str(error))))
        return result[0] if result else None

    def allocate(self, size: int) -> int:
        address = int(self._call("cudaMalloc", size))
        self._call("cudaMemsetAsync", address, 0, size, self._stream)
        return address

    def release(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, size: int) -> Bytes:
        address = int(self._call("cudaMallocHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def upload(self, address: int, values: Bytes) -> None:
        # from pageable memory: read before this returns
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, values.ctypes.data, values.size, kind, self._stream)

    def download(self, address: int, into: Bytes) -> Any:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", into.ctypes.data, address, into.size, kind, self._stream)
        event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        self._call("cudaEventRecord", event, self._stream)
        return event

    def wait(self, mark: Any) -> None:
        self._call("cudaEventSynchronize", mark)
        self._call("cudaEventDestroy", mark)

    def capture(self, work: Callable[[], None]) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self._stream)
        return self._call("cudaGraphInstantiate", graph, 0)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)


def cuda_error(call: str, number: int, name: str) -> str:
    """What a failed CUDA call means for the user."""
    if name == "cudaErrorMemoryAllocation" or number == 2:
        return OUT_OF_MEMORY.format(asked=call)
    if name == "cudaErrorInsufficientDriver" or number == 35:
        return f"the NVIDIA driver is missing or too old for this CUDA runtime ({call}); update the driver"
    if name == "cudaErrorNoDevice" or number == 100:
        return f"the NVIDIA driver finds no GPU ({call}); check nvidia-smi"
    return f"CUDA failed in {call}: {name} ({number})"
