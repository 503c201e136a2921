"""TensorRT plans on an NVIDIA GPU: caches that stay in place, and the step as CUDA graphs.

A plan has fixed sizes. The step is bound twice, once for each direction of the double-buffered state, and each binding
becomes a CUDA graph after its first run, so that a token is one launch. Every program has a stream of its own, so that
the image decoder runs beside the steps.

Written to the documented API of TensorRT and TensorRT-RTX. What decides (which buffer goes where, what becomes a graph
when, what an error means) is tested against a device and a context that compute on the host; no plan has been run.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from runtimes.cuda import OUT_OF_MEMORY, Device, Gpu, GpuBuffer, find_gpu
from runtimes.cuda_devices import open_device
from runtimes.errors import BackendError, EngineError
from runtimes.graph_files import read_file
from runtimes.in_flight import IN_FLIGHT
from runtimes.protocol import Array, Buffer, Files, TensorSpec
from runtimes.tensorrt_api import CURRENT, TensorRT, cuda_major

Specs = Mapping[str, Mapping[str, Any]]
CAPTURE_TRIES = 4
"""Runs of a binding after which it stays without a CUDA graph if the context still cannot be captured."""
REMAKE = "export it again on this machine: python -m export.to_tensorrt CKPT --target current"


def binding_table(
    inputs: Mapping[str, Buffer],
    outputs: Mapping[str, Buffer],
    wanted: tuple[Specs, Specs],
    aliases: Mapping[str, str],
) -> dict[str, int]:
    """Address of every tensor of a plan.

    Args:
        inputs, outputs: buffers by name.
        wanted: the plan's own inputs and outputs, ``{"dtype", "shape"}`` by name.
        aliases: outputs that must have an input's address, with that input.

    Raises:
        EngineError: a name, number format or shape differs, or a cache would not be updated in place, or something
            that is no cache would.
    """
    table: dict[str, int] = {}
    for bound, specs in ((inputs, wanted[0]), (outputs, wanted[1])):
        if odd := set(bound) ^ set(specs):
            raise EngineError(f"the plan's inputs and outputs differ from its manifest by {sorted(odd)}; re-export")
        for name, buffer in bound.items():
            assert isinstance(buffer, GpuBuffer)
            have, want = (buffer.dtype.name, list(buffer.shape)), (specs[name]["dtype"], list(specs[name]["shape"]))
            if have != want:
                raise EngineError(f"{name} is {have} in the manifest, {want} in the plan; re-export")
            table[name] = buffer.address
    owners = {table[name]: name for name in inputs}
    for name in outputs:
        if owners.get(table[name]) != aliases.get(name):
            raise EngineError(
                f"{name} has the address of {owners.get(table[name])}, the plan wants that of {aliases.get(name)}; "
                "re-export"
            )
    return table


class TrtBinding:
    """A plan with every tensor at a fixed address. A plain run settles the addresses; then the same run is captured,
    and later ones launch the CUDA graph."""

    def __init__(self, program: TrtProgram, table: dict[str, int], buffers: list[Buffer]) -> None:
        self._program, self._table, self._buffers = program, table, buffers
        self.graph: Any = None
        self._runs = 0

    def run(self) -> None:
        program = self._program
        with IN_FLIGHT, program.lock:
            if self.graph is not None:
                program.device.launch(self.graph)
                return
            program.enqueue(self._table)
            self._runs += 1
            if program.capturable(self._runs):
                self.graph = program.device.capture(lambda: program.enqueue(self._table))


class TrtProgram:
    """A deserialised plan with one execution context."""

    def __init__(self, name: str, api: TensorRT, engine: Any, runtime: Any, device: Device, lock: Any) -> None:
        self._name, self._api, self._engine, self._runtime = name, api, engine, runtime
        self.device, self.lock = device, lock
        self.wanted = api.specs(engine)
        self.inputs, self.outputs = (
            {
                n: TensorSpec(s["dtype"], tuple(None if size < 0 else size for size in s["shape"]))
                for n, s in side.items()
            }
            for side in self.wanted
        )
        self._aliases = api.aliases(engine, list(self.wanted[1]))
        self._context = engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"no execution context for {name}: {explain(api.complaint())}")
        self._pointed: dict[str, int] | None = None
        self._own: tuple[dict[str, Buffer], dict[str, Buffer], TrtBinding] | None = None

    def run(self, inputs: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Execute on host arrays, in parts of as many rows as the plan has."""
        with self.lock:
            if self._own is None:
                into, out = ({name: self._buffer(spec) for name, spec in side.items()} for side in self.wanted)
                self._own = into, out, self.bind(into, out)
            into, out, binding = self._own
            if odd := set(inputs) ^ set(into):
                raise EngineError(f"{self._name} has no inputs {sorted(odd)}, or lacks them; re-export")
            rows = next(iter(self.wanted[0].values()))["shape"][0]
            results: list[dict[str, Array]] = []
            for part in row_parts(inputs, rows):
                for name, values in part.items():
                    into[name].write(values)
                binding.run()
                results.append({name: out[name].read() for name in names or out})
            count = len(next(iter(inputs.values())))
            return {name: np.concatenate([result[name] for result in results])[:count] for name in names or out}

    def _buffer(self, spec: Mapping[str, Any]) -> Buffer:
        return GpuBuffer(self.device, self.lock, tuple(spec["shape"]), spec["dtype"])

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> TrtBinding:
        table = binding_table(inputs, outputs, self.wanted, self._aliases)
        return TrtBinding(self, table, [*inputs.values(), *outputs.values()])

    def enqueue(self, table: dict[str, int]) -> None:
        """Queue one run on the stream, from and to these addresses."""
        if table is not self._pointed:
            self._pointed = None
            for name, address in table.items():
                if not self._context.set_tensor_address(name, address):
                    raise BackendError(f"{self._name} refused the address of {name}: {explain(self._api.complaint())}")
            self._pointed = table
        with self.device.current():
            good = self._context.execute_async_v3(self.device.stream)
        if not good:
            raise BackendError(f"{self._name} failed to run: {explain(self._api.complaint())}")

    def capturable(self, runs: int) -> bool:
        """Whether to capture the binding that ran last, after so many plain runs of it."""
        if runs > CAPTURE_TRIES:
            return False
        good = self._api.capturable(self._context, self.device.stream)
        if not good and runs == CAPTURE_TRIES:
            warnings.warn(f"{self._name} cannot be captured as a CUDA graph; tokens will be slower", stacklevel=2)
        return good


def row_parts(inputs: Mapping[str, Array], rows: int) -> list[dict[str, Array]]:
    """Inputs of any number of rows as parts of ``rows``; the last one is filled up with its last row."""
    count = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, count, rows):
        index = np.minimum(np.arange(start, start + rows), count - 1)
        parts.append({name: np.asarray(values)[index] for name, values in inputs.items()})
    return parts


class TensorRTBackend:
    """One GPU.

    Args:
        flavor: package that built the plans, ``tensorrt`` or ``tensorrt-rtx``.
        version: its version then.
        targets: GPUs that they were built for, e.g. ``sm86,sm89``.
        index: which GPU, as in ``cuda:1``.

    Raises:
        BackendError: no driver, an old one, no package, or plans for another GPU or version; says which.
    """

    poll = 8
    suffix = ".plan"

    def __init__(self, flavor: str, version: str, targets: str, index: int = 0) -> None:
        find_gpu(None, index)
        self._api = TensorRT(flavor)
        check_machine(self._api.flavor, version, targets, self._api.version, find_gpu(cuda_major(flavor), index))
        self.device = open_device(index)
        self.lock = threading.RLock()

    def load(self, path: Path, files: Files | None = None, *, main: bool = False) -> TrtProgram:
        plan = read_file(path, files)
        assert isinstance(plan, bytes)
        device, lock = (self.device, self.lock) if main else (open_device(self.device.index), threading.RLock())
        with IN_FLIGHT, device.current():
            runtime, engine = self._api.deserialize(plan)
        if engine is None:
            raise BackendError(f"{self._api.flavor} cannot open {path}: {explain(self._api.complaint())}")
        with device.current():
            return TrtProgram(path.name, self._api, engine, runtime, device, lock)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        return GpuBuffer(self.device, self.lock, shape, dtype)


def check_machine(flavor: str, built_with: str, targets: str, installed: str, gpu: Gpu) -> None:
    """
    Raises:
        BackendError: plans of ``built_with`` for ``targets`` do not run with the ``installed`` version on this GPU.
    """
    if built_with != installed:
        raise BackendError(
            f"the plans were built with {flavor} {built_with}, installed is {installed}, and plans are read by the "
            f"version that built them: install {flavor} {built_with}, or {REMAKE}"
        )
    if gpu.target not in targets.split(",") and targets != CURRENT:
        raise BackendError(
            f"the plans were built for {targets}, this GPU ({gpu.name}) is {gpu.target}; {REMAKE}, or anywhere with "
            f"--target {gpu.target}"
        )


def explain(words: str) -> str:
    """TensorRT's error message with what it means for the user."""
    meanings = {
        r"out of memory|OutOfMemory|MemoryAllocation|OUT_OF_MEMORY": OUT_OF_MEMORY.format(asked="TensorRT's workspace"),
        r"incompatible device|compute capability|expecting compute": f"the plan was built for another GPU; {REMAKE}",
        r"version tag|library version|version of TensorRT|kSERIALIZATION_VERSION": (
            f"the plan was built with another TensorRT version; {REMAKE}"
        ),
        r"(error|cudaError|status)[: ]*35\b|insufficient driver|driver version is insufficient": (
            "the NVIDIA driver is missing or too old; update it"
        ),
    }
    for pattern, meaning in meanings.items():
        if re.search(pattern, words, re.IGNORECASE):
            return f"{meaning} ({words})"
    return words
