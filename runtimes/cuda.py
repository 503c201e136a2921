"""The CUDA driver; and memory, copies, events and graphs on one stream, by PyTorch if installed, else cuda-python.

Written to the documented APIs; nothing here but the driver probe has run on a GPU, for lack of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtimes.errors import BackendError
from runtimes.in_flight import IN_FLIGHT
from runtimes.protocol import Array

Bytes = NDArray[np.uint8]
LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
OWN_CAPTURES = 1  # CUstreamCaptureMode: thread local
OUT_OF_MEMORY = "out of GPU memory ({asked}): use fewer slots, or close what else uses the GPU"
LOST = {46: "it is in use or not available", 214: "its memory had an error", 700: "a kernel touched wrong memory"}
LOST |= {702: "a kernel took too long", 719: "a kernel failed"}
"""CUDA errors after which a process can use the GPU no more."""
LOST_WORDS = (
    "illegal memory access",
    "unspecified launch failure",
    "uncorrectable",
    "device-side assert",
    "launch timed out",
    "devices unavailable",
)
RESTART = "start a new process; if it happens again, look into nvidia-smi and the kernel's log"


class Gpu(NamedTuple):
    """A GPU: ``name``, ``target`` such as ``sm89``, CUDA ``version`` of its driver, e.g. (13, 0), and where it is,
    ``bus``, e.g. ``0000:65:00.0``."""

    name: str
    target: str
    version: tuple[int, int]
    bus: str = ""


def driver_version() -> tuple[int, int] | None:
    """Highest CUDA version of the installed driver; None without a driver."""
    library, number = _driver(), ctypes.c_int(0)
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def find_gpu(needed: int | None = None, index: int = 0) -> Gpu:
    """A GPU of this machine.

    Args:
        needed: CUDA version that the driver must have at least.
        index: which one, in the driver's order.

    Raises:
        BackendError: there is no driver or no such GPU, or the driver is too old.
    """
    version = driver_version()
    if version is None:
        raise BackendError(f"no NVIDIA driver on this machine ({LIBRARY}); install one, or use an engine of to_onnx")
    if needed and version[0] < needed:
        raise BackendError(
            f"the NVIDIA driver is too old: it has CUDA {version[0]}.{version[1]}, CUDA {needed} is needed; update it"
        )
    library = _driver()
    device, count, numbers = ctypes.c_int(0), ctypes.c_int(0), [ctypes.c_int(0), ctypes.c_int(0)]
    name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
    assert library is not None
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if not status and 0 < count.value <= index:
        raise BackendError(f"device is 'cuda:{index}', but the driver finds {count.value} GPU(s), counted from 0")
    status = status or library.cuDeviceGet(ctypes.byref(device), index)
    if status:
        raise BackendError(f"the NVIDIA driver finds no usable GPU (CUDA error {status}); check nvidia-smi")
    library.cuDeviceGetName(name, len(name), device)
    for number, attribute in zip(numbers, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    library.cuDeviceGetPCIBusId(bus, len(bus), device)
    target = f"sm{numbers[0].value}{numbers[1].value}"
    return Gpu(name.value.decode(errors="replace"), target, version, bus.value.decode(errors="replace"))


def _driver() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


_THREAD = threading.local()


def mind_own_captures() -> None:
    """Let the calling thread use GPUs while another one captures a graph.

    ONNX Runtime captures in CUDA's strictest mode: allocating, freeing and copying then fail in all threads of the
    process, and take the capture with them, but in threads that have said that only captures of their own count.
    """
    if getattr(_THREAD, "told", False):
        return
    library, mode = _driver(), ctypes.c_int(OWN_CAPTURES)
    _THREAD.told = library is None or not library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class Device(Protocol):
    """Memory and order of work on one stream of one GPU. All but ``wait`` only queue work on the stream."""

    index: int
    """Which GPU, as in ``cuda:1``."""
    stream: int
    """Handle of the stream."""

    def current(self) -> AbstractContextManager[None]:
        """Make this GPU the calling thread's, for calls into other libraries."""

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

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes from one address of the GPU to another."""

    def capture(self, work: Callable[[], None]) -> Any:
        """The work as a CUDA graph, without doing it."""

    def launch(self, graph: Any) -> None:
        """Do a captured graph's work."""


def open_device(index: int = 0) -> Device:
    """A GPU with a stream of its own, through PyTorch if that has CUDA, else through cuda-python.

    Raises:
        BackendError: neither package is there.
    """
    try:
        torch = importlib.import_module("torch")  # by name: the runtime must not need it
        if torch.cuda.is_available():
            return TorchDevice(torch, index)
    except ImportError:
        pass
    try:
        return CudaPythonDevice(importlib.import_module("cuda.bindings.runtime"), index)
    except ImportError as error:
        raise BackendError(
            f"GPU memory needs PyTorch with CUDA or cuda-python ({error}); pip install cuda-python"
        ) from error


class TorchDevice:
    """Device memory as PyTorch tensors of bytes."""

    def __init__(self, torch: Any, index: int = 0) -> None:
        self._torch, self.index = torch, index
        self._tensors: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._stream = torch.cuda.Stream(device=f"cuda:{index}")
        self.stream: int = self._stream.cuda_stream

    def current(self) -> AbstractContextManager[None]:
        mind_own_captures()
        context: AbstractContextManager[None] = self._torch.cuda.device(self.index)
        return context

    @contextlib.contextmanager
    def _queue(self, work: str) -> Iterator[None]:
        """The stream and its GPU, with PyTorch's errors as ours."""
        mind_own_captures()
        try:
            with self._torch.cuda.stream(self._stream):
                yield
        except self._torch.cuda.OutOfMemoryError as error:
            raise BackendError(OUT_OF_MEMORY.format(asked=work)) from error
        except RuntimeError as error:
            raise BackendError(failed(work, str(error))) from error

    def allocate(self, size: int) -> int:
        with self._queue(f"allocating {size:,} bytes"):
            tensor = self._torch.zeros(size, dtype=self._torch.uint8, device=f"cuda:{self.index}")
        self._tensors[tensor.data_ptr()] = tensor
        return int(tensor.data_ptr())

    def release(self, address: int) -> None:
        self._tensors.pop(address, None)

    def pinned(self, size: int) -> Bytes:
        with self._queue(f"pinning {size:,} bytes"):
            tensor = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        array: Bytes = tensor.numpy()
        self._pinned[array.ctypes.data] = tensor
        weakref.finalize(array, self._pinned.pop, array.ctypes.data, None).atexit = False
        return array

    def upload(self, address: int, values: Bytes) -> None:
        with self._queue("a copy to the GPU"):  # from pageable memory: read before this returns
            self._tensors[address][: values.size].copy_(self._torch.from_numpy(values), non_blocking=True)

    def download(self, address: int, into: Bytes) -> Any:
        with self._queue("a copy from the GPU"):
            event = self._torch.cuda.Event()
            self._pinned[into.ctypes.data].copy_(self._tensors[address][: into.size], non_blocking=True)
            event.record()
        return event

    def wait(self, mark: Any) -> None:
        with self._queue("work before a copy from the GPU"):
            mark.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        with self._queue("a copy on the GPU"):
            self._tensors[target][:size].copy_(self._tensors[source][:size])

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


class Handle:
    """Holds a thing of CUDA's, which itself takes no weak references."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing


class CudaPythonDevice:
    """Device memory through NVIDIA's own bindings of the CUDA runtime."""

    def __init__(self, runtime: Any, index: int = 0) -> None:
        self._cuda, self.index = runtime, index
        with self.current():
            self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        mind_own_captures()
        error, *result = getattr(self._cuda, name)(*arguments)
        if int(error):
            raise BackendError(cuda_error(name, int(error), getattr(error, "name", str(error))))
        return result[0] if result else None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self.index)
        try:
            yield
        finally:
            if before != self.index:
                self._cuda.cudaSetDevice(before)

    def allocate(self, size: int) -> int:
        with self.current():
            address = int(self._call("cudaMalloc", size))
            self._call("cudaMemsetAsync", address, 0, size, self._stream)
        return address

    def release(self, address: int) -> None:
        self._drop("cudaFree", address)

    def _drop(self, name: str, thing: Any) -> None:
        """Free something, in whichever thread; a lost GPU has freed it itself."""
        mind_own_captures()
        getattr(self._cuda, name)(thing)

    def _kept(self, thing: Any, end: str) -> Handle:
        """A thing of CUDA's that the call ``end`` frees with the last reference to it."""
        handle = Handle(thing)
        weakref.finalize(handle, self._drop, end, thing).atexit = False
        return handle

    def pinned(self, size: int) -> Bytes:
        with self.current():
            address = int(self._call("cudaMallocHost", size))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        weakref.finalize(array, self._drop, "cudaFreeHost", address).atexit = False
        return array

    def upload(self, address: int, values: Bytes) -> None:
        # from pageable memory: read before this returns
        self._copy(address, values.ctypes.data, values.size, "HostToDevice")

    def download(self, address: int, into: Bytes) -> Any:
        with self.current():
            self._copy(into.ctypes.data, address, into.size, "DeviceToHost")
            event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
            mark = self._kept(event, "cudaEventDestroy")
            self._call("cudaEventRecord", event, self._stream)
        return mark

    def wait(self, mark: Any) -> None:
        self._call("cudaEventSynchronize", mark.thing)

    def copy(self, target: int, source: int, size: int) -> None:
        self._copy(target, source, size, "DeviceToDevice")

    def _copy(self, target: int, source: int, size: int, way: str) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{way}")
        self._call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self.current():
            self._call("cudaStreamBeginCapture", self._stream, mode)
            try:
                work()
            except BaseException:
                self._cuda.cudaStreamEndCapture(self._stream)  # what it says of the failed capture hides the cause
                raise
            graph = self._kept(self._call("cudaStreamEndCapture", self._stream), "cudaGraphDestroy")
            return self._kept(self._call("cudaGraphInstantiate", graph.thing, 0), "cudaGraphExecDestroy")

    def launch(self, graph: Any) -> None:
        with self.current():
            self._call("cudaGraphLaunch", graph.thing, self._stream)


def copy_bandwidth(device: Device, size: int = 2**29, copies: int = 16) -> float:
    """Bytes per second that a GPU reads and writes while it copies ``size`` bytes, ``copies`` times."""
    ends = [device.allocate(size) for _ in range(2)]
    mark = device.pinned(1)
    try:
        times = []
        for count in (1, 1 + copies):  # the difference leaves the wait out
            began = time.perf_counter()
            for _ in range(count):
                device.copy(ends[1], ends[0], size)
            device.wait(device.download(ends[1], mark))
            times.append(time.perf_counter() - began)
    finally:
        for address in ends:
            device.release(address)
    return 2 * size * copies / max(times[1] - times[0], 1e-9)


def cuda_error(call: str, number: int, name: str) -> str:
    """What a failed CUDA call means for the user."""
    if name == "cudaErrorMemoryAllocation" or number == 2:
        return OUT_OF_MEMORY.format(asked=call)
    if name == "cudaErrorInsufficientDriver" or number == 35:
        return f"the NVIDIA driver is missing or too old for this CUDA runtime ({call}); update the driver"
    if name == "cudaErrorNoDevice" or number == 100:
        return f"the NVIDIA driver finds no GPU ({call}); check nvidia-smi"
    if number in LOST:
        return f"the GPU is lost to this process ({LOST[number]}; {call}: {name}, {number}): {RESTART}"
    return f"CUDA failed in {call}: {name} ({number})"


def failed(work: str, words: str) -> str:
    """The same for a library's own words: what it said when ``work`` failed."""
    if any(sign in words.lower() for sign in ("out of memory", "memory allocation", "failed to allocate")):
        return OUT_OF_MEMORY.format(asked=f"{work}; {words[:300]}")
    if any(sign in words.lower() for sign in LOST_WORDS):
        return f"the GPU is lost to this process ({work}; {words[:300]}): {RESTART}"
    return f"CUDA failed in {work}: {words[:500]}"


class GpuBuffer:
    """A tensor at one address of the GPU.

    Args:
        device: whose memory and stream.
        lock: held while the stream is used.
        shape, dtype: of the tensor; bfloat16 passes as ``uint16``.
    """

    def __init__(self, device: Device, lock: threading.RLock, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.size = math.prod(shape) * self.dtype.itemsize
        self._device, self._lock = device, lock
        self._host: Any = None
        self._mark: Any = None
        with lock:
            self.address = device.allocate(max(1, self.size))
        weakref.finalize(self, device.release, self.address).atexit = False

    def write(self, values: Array) -> None:
        array = np.array(np.broadcast_to(values, self.shape), dtype=self.dtype, order="C")
        with IN_FLIGHT, self._lock:
            self._mark = None
            self._device.upload(self.address, array.reshape(-1).view(np.uint8))

    def request(self) -> None:
        with IN_FLIGHT, self._lock:
            if self._host is None:
                self._host = self._device.pinned(max(1, self.size))
            self._mark = self._device.download(self.address, self._host)

    def read(self) -> Array:
        if self._mark is None:
            self.request()
        with IN_FLIGHT:
            self._device.wait(self._mark)
        self._mark = None
        values: Array = self._host[: self.size].view(self.dtype).reshape(self.shape).copy()
        return values
