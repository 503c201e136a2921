"""ONNX Runtime on a GPU: the step bound to fixed buffers on one stream, each binding a CUDA graph.

The buffers are this project's own (``runtimes.cuda``), and the session runs on their stream, so that copies, steps and
the reads between them are in order without waiting. ONNX Runtime captures a graph for each ``gpu_graph_id`` that a run
names: the two bindings of a loop, one per direction of the double-buffered state, have one each. When an id is new it
runs the graph plainly, captures it and launches it; a step that is run several times from one state gives the same. A
capture forbids other threads much, see ``runtimes.cuda.mind_own_captures``.

Written to the documented API and tried with ONNX Runtime's own CUDA code over a driver that computes nothing
(``tests/standin_cuda``); nothing here has run on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from runtimes.cuda import Device, GpuBuffer, failed
from runtimes.errors import BackendError, EngineError
from runtimes.in_flight import IN_FLIGHT
from runtimes.protocol import Array, Buffer, Program

PROVIDER = "CUDAExecutionProvider"
BFLOAT16 = 16
"""onnx's number of the format that numpy lacks."""
ASYNCHRONOUS = "disable_synchronize_execution_providers"
GRAPH_ID = "gpu_graph_id"


def load_libraries(ort: ModuleType) -> None:
    """CUDA's and cuDNN's libraries from their pip packages; of itself onnxruntime looks in the system's folders only,
    and in what PyTorch has loaded. What it prints of missing ones goes to standard error."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def cuda_options(device: Device, main: bool) -> dict[str, str]:
    """Options of the provider for a program.

    Products of float32 keep all their digits (``use_tf32``), fused layer norms sum in float32 as the others do
    (``strict_mode``), and convolutions are chosen without trying, so that an engine gives the same numbers every time
    it is opened. The step (``main``) runs on the stream of its buffers and becomes CUDA graphs; other programs have
    streams of their own, beside which it goes on.
    """
    options = {
        "device_id": str(device.index),
        "use_tf32": "0",
        "enable_skip_layer_norm_strict_mode": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    return {**options, "user_compute_stream": str(device.stream), "enable_cuda_graph": "1"} if main else options


class CudaBinding:
    """A session with every tensor at a fixed address; a run only queues work, where ONNX Runtime lets it."""

    def __init__(self, program: CudaProgram, binding: Any, options: Any, buffers: list[Buffer]) -> None:
        self._program, self._binding, self._options, self._buffers = program, binding, options, buffers

    def run(self) -> None:
        program = self._program
        with IN_FLIGHT, program.lock, program.device.current():
            try:
                program.session.run_with_iobinding(self._binding, self._options)
            except Exception as error:  # onnxruntime raises many kinds
                raise BackendError(failed("the step", str(error))) from error


class CudaProgram:
    """A graph on a GPU.

    Args:
        ort: the onnxruntime module.
        session: the opened graph.
        host: the same as a program over host arrays.
        device, lock: of the buffers that it is bound to.
    """

    def __init__(self, ort: ModuleType, session: Any, host: Program, device: Device, lock: threading.RLock) -> None:
        self._ort, self.session, self._host, self.device, self.lock = ort, session, host, device, lock
        self.inputs, self.outputs = host.inputs, host.outputs
        self._ids = itertools.count(1)  # 0 is that of runs that name none

    def run(self, inputs: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        with self.device.current():
            return self._host.run(inputs, names)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> CudaBinding:
        binding = self.session.io_binding()
        for side, bound, tensors in (
            ("input", inputs, self.session.get_inputs()),
            ("output", outputs, self.session.get_outputs()),
        ):
            types = {tensor.name: tensor.type for tensor in tensors}
            if odd := set(types) ^ set(bound):
                raise EngineError(f"the graph's {side}s differ from its manifest by {sorted(odd)}; re-export")
            for name, buffer in bound.items():
                assert isinstance(buffer, GpuBuffer)
                dtype = BFLOAT16 if types[name] == "tensor(bfloat16)" else buffer.dtype.type
                bind = getattr(binding, f"bind_{side}")
                bind(name, "cuda", self.device.index, dtype, buffer.shape, buffer.address)
        options = self._ort.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(next(self._ids)))
        options.add_run_config_entry(ASYNCHRONOUS, "1")
        return CudaBinding(self, binding, options, [*inputs.values(), *outputs.values()])
