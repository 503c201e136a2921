"""The CUDA driver and what its errors mean, what a GPU offers (``Device``), and buffers on it.

Written to the documented APIs; nothing here has run on a GPU, for lack of one.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import weakref
from collections.abc import Callable
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
