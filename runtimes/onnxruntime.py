"""ONNX Runtime on the CPU or a GPU (``runtimes.onnxruntime_cuda``), every step tensor bound once and kept there."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from runtimes.cuda import Device, GpuBuffer, failed, find_gpu
from runtimes.cuda_devices import open_device
from runtimes.devices import read_device
from runtimes.errors import BackendError, EngineError
from runtimes.graph_files import AGAIN, external_files, identity, read_file
from runtimes.in_flight import IN_FLIGHT
from runtimes.onnxruntime_cuda import PROVIDER, CudaProgram, cuda_options, load_libraries
from runtimes.protocol import Array, Buffer, Files, TensorSpec

FLOOR = (1, 19)
"""Oldest version that runs float engines rightly; ``tests/oldest_and_newest.sh`` tries it."""
INTEGER_FLOOR = (1, 28)
"""The same for integer weights: older ones lack the operators, or draw other tokens without a word."""
INSTALL = "pip install 'dvq-rt[cpu]', or 'dvq-rt[gpu]' for CUDA"
LEAST_CAP = 64
"""Threads that may be asked for on any machine, so that settings of a larger one work on a smaller one."""
IN_MEMORY = "add_external_initializers_from_files_in_memory"
DTYPES = {"float": "float32", "double": "float64", "bfloat16": "uint16"}
"""numpy's names of number formats where ONNX Runtime's differ; bfloat16, which numpy lacks, passes as its 16 bits."""
Providers = Sequence[str | tuple[str, Mapping[str, Any]]]


@functools.cache
def import_onnxruntime() -> ModuleType:
    """The onnxruntime module, from whichever package it comes.

    Raises:
        BackendError: there is none, or it is broken or too old.
    """
    try:
        import onnxruntime
    except Exception as error:  # a broken build raises many kinds
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise BackendError(f"onnxruntime is not installed; {INSTALL}") from None
        raise BackendError(
            f"onnxruntime is installed but broken ({str(error) or type(error).__name__}); reinstall it: {INSTALL}"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):  # a folder of that name, or what an uninstallation left
        raise BackendError(
            f"the package onnxruntime in {', '.join(getattr(onnxruntime, '__path__', [onnxruntime.__file__]))} has no "
            f"InferenceSession: it is another one, or the rest of one; remove or rename it, then {INSTALL}"
        )
    if onnxruntime_version(onnxruntime) < FLOOR:
        least = ".".join(map(str, FLOOR))
        raise BackendError(f"onnxruntime {onnxruntime.__version__} is too old; {least} or newer is needed: {INSTALL}")
    if len(builds := installed_builds(onnxruntime)) > 1:
        warnings.warn(
            f"{' and '.join(builds)} overwrite each other's files; in use is {onnxruntime.__version__} with "
            f"{onnxruntime.get_available_providers()}; if something is amiss, uninstall them all and install one",
            stacklevel=2,
        )
    return onnxruntime


def onnxruntime_version(module: ModuleType) -> tuple[int, int]:
    """Major and minor number, also of a nightly build."""
    major, minor = re.findall(r"\d+", module.__version__)[:2]
    return int(major), int(minor)


def installed_builds(module: ModuleType) -> list[str]:
    """Name and version of every distribution that holds the module's own files: onnxruntime, -gpu, nightlies, ..."""
    folder = Path(module.__file__ or "").parents[1]
    builds = [Distribution.at(path) for kind in ("onnxruntime*", "ort_*") for path in folder.glob(f"{kind}.dist-info")]
    own = [build for build in builds if "onnxruntime/__init__.py" in map(str, build.files or ())]
    return sorted(f"{build.metadata['Name']} {build.version}" for build in own)


def check_weights(weights: str, engine: str | os.PathLike[str]) -> None:
    """
    Raises:
        BackendError: the installed version does not run weights of this number format.
    """
    ort = import_onnxruntime()
    if weights.startswith("int") and onnxruntime_version(ort) < INTEGER_FLOOR:
        least = ".".join(map(str, INTEGER_FLOOR))
        raise BackendError(
            f"engine {engine} has {weights} weights, which need onnxruntime {least} or newer; installed is "
            f"{ort.__version__}: pip install -U onnxruntime, or export it with --weights fp16"
        )


def check_threads(threads: int | None) -> None:
    """
    Raises:
        BackendError: no operator can have that many threads. More than there are cores never help, and tens of
            thousands end the process.
    """
    cores = os.cpu_count() or 1
    most = max(LEAST_CAP, 4 * cores)
    good = isinstance(threads, int | np.integer) and not isinstance(threads, bool) and 1 <= threads <= most
    if threads is not None and not good:
        raise BackendError(
            f"threads is {threads!r:.200}; it must be an integer of 1 to {most}, or None for one per core: this "
            f"machine has {cores}"
        )


class CpuBuffer:
    """A numpy array that graphs read and write in place."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        try:
            self.array = np.zeros(shape, dtype)
        except (MemoryError, ValueError, OverflowError) as error:  # the last two: more than numpy can count
            raise BackendError(out_of_memory(shape, dtype)) from error

    def write(self, values: Array) -> None:
        self.array[...] = values

    def request(self) -> None:
        pass

    def read(self) -> Array:
        return self.array


def out_of_memory(shape: tuple[int, ...], dtype: DTypeLike) -> str:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return f"there is no memory for a buffer of {size:,} bytes, {list(shape)} {np.dtype(dtype)}; use fewer slots"


def physical_memory() -> int:
    """Bytes of this machine's memory; where the system does not say, more than there can be."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # AttributeError: Windows
        return sys.maxsize


class OrtBinding:
    """A session with bound buffers."""

    def __init__(self, session: Any, binding: Any, buffers: list[Buffer]) -> None:
        self._session, self._binding, self._buffers = session, binding, buffers

    def run(self) -> None:
        with IN_FLIGHT:
            try:
                self._session.run_with_iobinding(self._binding)
            except Exception as error:  # onnxruntime raises many kinds
                raise BackendError(f"onnxruntime failed while running the step: {error}") from error


class OrtProgram:
    """A loaded ONNX graph, over host arrays; ``gpu`` says where it runs."""

    def __init__(self, session: Any, gpu: bool = False) -> None:
        self._session, self._gpu = session, gpu
        self.inputs, self.outputs = (
            {t.name: TensorSpec(_dtype(t.type), tuple(t.shape)) for t in side}
            for side in (session.get_inputs(), session.get_outputs())
        )

    def run(self, inputs: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        wanted = list(names or self.outputs)
        with IN_FLIGHT:
            try:
                values = self._session.run(wanted, dict(inputs))
            except Exception as error:  # onnxruntime raises many kinds
                if self._gpu:
                    raise BackendError(failed("a graph", str(error))) from error
                raise BackendError(f"onnxruntime failed while running a graph: {error}") from error
        return dict(zip(wanted, values, strict=True))

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBinding:
        binding = self._session.io_binding()
        for bound, specs in ((inputs, self.inputs), (outputs, self.outputs)):
            if odd := set(specs) ^ set(bound):
                raise EngineError(
                    f"the graph's inputs and outputs differ from its manifest by {sorted(odd)}; re-export"
                )
        for kind, bound in (("input", inputs), ("output", outputs)):
            for name, buffer in bound.items():
                assert isinstance(buffer, CpuBuffer)
                array = buffer.array
                getattr(binding, f"bind_{kind}")(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return OrtBinding(self._session, binding, [*inputs.values(), *outputs.values()])


def _dtype(text: str) -> str:
    name = text.removeprefix("tensor(").removesuffix(")")
    return DTYPES.get(name, name)


class OnnxRuntimeBackend:
    """ONNX Runtime on one device.

    Args:
        device: where the buffers are, ``cpu``, ``cuda`` or ``cuda:N``; its execution provider runs the graphs.
        threads: threads of each operator on the CPU; None for one per core.
        providers: execution providers in place of that one, as onnxruntime takes them: names, or (name, options). On a
            GPU options that ``CUDAExecutionProvider`` is not given are those of ``cuda_options``.
        session_options: attributes of ``onnxruntime.SessionOptions`` by name, e.g. ``{"enable_profiling": True}``,
            and its configuration entries, whose names have a dot. They are set last.

    Raises:
        BackendError: the package, the device or a provider is not there, or an option is none. There is no silent
            fallback: every provider asked for must be granted when a graph is opened.
    """

    suffix = ".onnx"

    def __init__(
        self,
        device: str = "cpu",
        threads: int | None = None,
        *,
        providers: Providers | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        name = read_device(device)
        check_threads(threads)
        self._ort = import_onnxruntime()
        self.device, self.threads = device, threads
        self.poll = 1 if name.kind == "cpu" else 8
        self._buffers: list[weakref.ref[CpuBuffer]] = []
        own = {"cpu": "CPUExecutionProvider", "cuda": PROVIDER}[name.kind]
        available = self._ort.get_available_providers()
        if providers is None and own not in available:
            raise BackendError(
                f"device={device!r} needs {own}, but this onnxruntime has {available}; "
                "install dvq-rt[gpu] instead of dvq-rt[cpu], or use device='cpu'"
            )
        self._providers: Providers = [own] if providers is None else providers
        try:
            self._names = [p if isinstance(p, str) else p[0] for p in self._providers]
            known = bool(self._names) and set(self._names) <= set(available)
        except (TypeError, LookupError):
            known = False
        if not known:
            raise BackendError(f"providers is {providers!r:.200}; it must be a list of some of {available}")
        if not isinstance(session_options, Mapping | None):
            raise BackendError(f"session_options is {session_options!r:.200}; it must be a mapping of names to values")
        self._session_options = session_options or {}
        self._options(main=True)
        self._gpu: Device | None = None
        self._lock = threading.RLock()
        if name.kind == "cuda":
            find_gpu(None, name.number)
            self._gpu = open_device(name.number)
            load_libraries(self._ort)

    def _options(self, main: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads:
            options.intra_op_num_threads = int(self.threads)
        if not main:  # only one pool of spinning threads: two of them cost a factor of 2
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for name, value in self._session_options.items():
            try:
                if "." in name:
                    options.add_session_config_entry(name, str(value))
                else:
                    getattr(options, name)
                    setattr(options, name, value)
            except Exception as error:  # of the attribute's own kind
                raise BackendError(
                    f"session_options has {name!r}: {value!r:.200}, which onnxruntime {self._ort.__version__} does not "
                    f"take: {error}"
                ) from error
        return options

    def load(self, path: Path, files: Files | None = None, *, main: bool = False) -> OrtProgram | CudaProgram:
        seen = identity(path)
        graph = read_file(path, files)
        assert isinstance(graph, bytes)
        options = self._options(main)
        beside = {
            name: read_file(path.with_name(name), files, mapped=True) for name in sorted(external_files(path, graph))
        }
        if beside and not hasattr(options, IN_MEMORY):
            raise BackendError(
                f"{path} keeps weights in {', '.join(beside)}, which needs onnxruntime 1.24 or newer; installed is "
                f"{self._ort.__version__}: pip install -U onnxruntime"
            )
        if beside:  # not by path: newer versions refuse links
            sizes = [len(data) for data in beside.values()]
            getattr(options, IN_MEMORY)(list(beside), list(beside.values()), sizes)
        try:
            # from its path a graph's weights lie better in memory than from bytes: steps are 1.05 times as fast
            source = graph if beside else str(path)
            # onnxruntime leaves its GPU as the thread's current one
            with IN_FLIGHT, contextlib.nullcontext() if self._gpu is None else self._gpu.current():
                session = self._ort.InferenceSession(
                    source, options, providers=self._for_program(main), enable_fallback=0
                )
        except Exception as error:
            raise BackendError(f"onnxruntime cannot open {path} on {self.device}: {error}") from error
        finally:
            for data in beside.values():
                if isinstance(data, mmap.mmap):
                    data.close()
        session._model_bytes = None  # it would keep the whole file, for a fallback that is off
        if identity(path) != seen:
            raise EngineError(f"{path} was replaced while it was opened; {AGAIN}")
        granted = session.get_providers()
        if granted[: len(self._names)] != self._names:
            raise BackendError(
                f"asked for {', '.join(self._names)}, granted {granted}; check the driver and libraries of what is "
                "missing"
            )
        if self._gpu is None:
            return OrtProgram(session)
        return CudaProgram(self._ort, session, OrtProgram(session, gpu=True), self._gpu, self._lock)

    def _for_program(self, main: bool) -> list[Any]:
        """The providers, on a GPU with their options."""
        if self._gpu is None:
            return list(self._providers)
        own = cuda_options(self._gpu, main)
        pairs = [(p, {}) if isinstance(p, str) else (p[0], dict(p[1])) for p in self._providers]
        return [(name, {**own, **options} if name == PROVIDER else options) for name, options in pairs]

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        if self._gpu is not None:
            return GpuBuffer(self._gpu, self._lock, shape, dtype)
        # systems that promise more memory than there is would end the process when it is used
        alive = [buffer for reference in self._buffers if (buffer := reference())]
        held = sum(buffer.array.nbytes for buffer in alive)
        if held + math.prod(shape) * np.dtype(dtype).itemsize > physical_memory():
            raise BackendError(f"{out_of_memory(shape, dtype)} (this machine has {physical_memory():,}, {held:,} held)")
        buffer = CpuBuffer(shape, dtype)
        self._buffers = [weakref.ref(kept) for kept in (*alive, buffer)]
        return buffer
