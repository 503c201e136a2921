"""ONNX Runtime on the CPU or a CUDA device, with every step tensor bound once and kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from runtimes.errors import BackendError, EngineError
from runtimes.protocol import Array, Buffer

DEVICES = ("cpu", "cuda")


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        BackendError: neither or both of onnxruntime and onnxruntime-gpu are installed (they overwrite each other).
    """
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) != 1:
        state = "both " + " and ".join(found) + " are" if found else "neither onnxruntime nor onnxruntime-gpu is"
        raise BackendError(
            f"{state} installed; exactly one is needed: pip install 'dvq-rt[cpu]' or pip install 'dvq-rt[gpu]'"
            + (", after pip uninstall onnxruntime onnxruntime-gpu" if found else "")
        )
    import onnxruntime

    return onnxruntime


class CpuBuffer:
    """A numpy array that graphs read and write in place."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.array = np.zeros(shape, dtype)

    def write(self, values: Array) -> None:
        self.array[...] = values

    def request(self) -> None:
        pass

    def read(self) -> Array:
        return self.array


class CudaBuffer:
    """An OrtValue in device memory. Written to the documented API; not run for lack of a GPU."""

    def __init__(self, ort: ModuleType, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0)
        self.dtype = np.dtype(dtype)

    def write(self, values: Array) -> None:
        self.value.update_inplace(np.ascontiguousarray(values, dtype=self.dtype))

    def request(self) -> None:
        pass

    def read(self) -> Array:
        return self.value.numpy()


class OrtBinding:
    """A session with bound buffers."""

    def __init__(self, session: Any, binding: Any, buffers: list[Buffer]) -> None:
        self._session, self._binding, self._buffers = session, binding, buffers

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises many kinds
            raise BackendError(f"onnxruntime failed while running the step: {error}") from error


class OrtProgram:
    """A loaded ONNX graph."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [o.name for o in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            found = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # onnxruntime raises many kinds
            raise BackendError(f"onnxruntime failed while running a graph: {error}") from error
        return dict(zip(self._outputs, found, strict=True))

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBinding:
        binding = self._session.io_binding()
        for bound, names in ((inputs, self._session.get_inputs()), (outputs, self._session.get_outputs())):
            if odd := {n.name for n in names} ^ set(bound):
                raise EngineError(
                    f"the graph's inputs and outputs differ from its manifest by {sorted(odd)}; re-export"
                )
        for kind, bound in (("input", inputs), ("output", outputs)):
            for name, buffer in bound.items():
                if isinstance(buffer, CudaBuffer):
                    getattr(binding, f"bind_ortvalue_{kind}")(name, buffer.value)
                else:
                    assert isinstance(buffer, CpuBuffer)
                    array = buffer.array
                    getattr(binding, f"bind_{kind}")(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return OrtBinding(self._session, binding, [*inputs.values(), *outputs.values()])


class OnnxRuntimeBackend:
    """ONNX Runtime on one device.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: threads of each operator on the CPU; None for one per core.

    Raises:
        BackendError: the package or the device is not there. There is no silent fallback.
    """

    suffix = ".onnx"

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        if device not in DEVICES:
            raise BackendError(f"device is {device!r}; it must be one of {DEVICES}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise BackendError(f"threads is {threads!r}; it must be a positive integer or None")
        self._ort = import_onnxruntime()
        self.device, self.threads = device, threads
        self.poll = 1 if device == "cpu" else 8
        self._provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        available = self._ort.get_available_providers()
        if self._provider not in available:
            raise BackendError(
                f"device={device!r} needs {self._provider}, but this onnxruntime has {available}; "
                "install dvq-rt[gpu] instead of dvq-rt[cpu], or use device='cpu'"
            )

    def load(self, path: Path, *, main: bool = False) -> OrtProgram:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads:
            options.intra_op_num_threads = self.threads
        if not main:  # only one pool of spinning threads: two of them cost a factor of 2
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = self._ort.InferenceSession(str(path), options, providers=[self._provider])
        except Exception as error:
            raise BackendError(f"onnxruntime cannot open {path} on {self.device}: {error}") from error
        if session.get_providers()[0] != self._provider:
            raise BackendError(f"asked for {self._provider}, granted {session.get_providers()}; check the CUDA driver")
        return OrtProgram(session)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        return CpuBuffer(shape, dtype) if self.device == "cpu" else CudaBuffer(self._ort, shape, dtype)
