"""Memory, copies, events and graphs on one stream of a GPU, by PyTorch if installed, else by cuda-python.

Written to the documented APIs; nothing here has run on a GPU, for lack of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from runtimes.cuda import OUT_OF_MEMORY, Bytes, Device, cuda_error, failed, mind_own_captures
from runtimes.errors import BackendError


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
        self.held: dict[int, Any] = {}
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
        self.held[array.ctypes.data] = tensor
        weakref.finalize(array, self.held.pop, array.ctypes.data, None).atexit = False
        return array

    def upload(self, address: int, values: Bytes) -> None:
        with self._queue("a copy to the GPU"):  # from pageable memory: read before this returns
            self._tensors[address][: values.size].copy_(self._torch.from_numpy(values), non_blocking=True)

    def download(self, address: int, into: Bytes) -> Any:
        with self._queue("a copy from the GPU"):
            event = self._torch.cuda.Event()
            self.held[into.ctypes.data].copy_(self._tensors[address][: into.size], non_blocking=True)
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
