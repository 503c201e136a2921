"""Backends by the name that a manifest gives them. Their packages are imported when one is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from runtimes.devices import DeviceName, read_device
from runtimes.errors import BackendError
from runtimes.onnxruntime import OnnxRuntimeBackend, Providers, check_threads, check_weights
from runtimes.protocol import Backend
from runtimes.tensorrt import TensorRTBackend


def open_backend(
    kind: str,
    *,
    engine: str | os.PathLike[str],
    target: str,
    weights: str,
    tools: Mapping[str, str],
    device: str | None = None,
    threads: int | None = None,
    providers: Providers | None = None,
    session_options: Mapping[str, Any] | None = None,
) -> Backend:
    """What runs an engine on a device.

    Args:
        kind: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        engine: what errors call the engine.
        target: what its graphs were made for: ``cpu``, ``cuda``, or GPUs such as ``sm86,sm89``.
        weights: number format of its weights.
        tools: versions of the programs that made it.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes the CPU, or the first GPU for TensorRT plans.
        threads: of each operator on the CPU; None for one per core.
        providers, session_options: see ``OnnxRuntimeBackend``; not for TensorRT plans.

    Raises:
        BackendError: the kind is unknown, its package is missing or too old, the device is not there or not the
            engine's, or an option is out of range.
    """
    check_threads(threads)
    name = None if device is None else read_device(device)
    if kind == "onnxruntime":
        name = name or DeviceName("cpu")
        if name.kind == "cuda" and target != "cuda":
            raise BackendError(f"engine {engine} was exported for the CPU; export it again with --target cuda")
        backend = OnnxRuntimeBackend(str(name), threads, providers=providers, session_options=session_options)
        check_weights(weights, engine)
        return backend
    if kind not in ("tensorrt", "tensorrt-rtx"):
        raise BackendError(f"engine {engine} is for {kind!r}; there are onnxruntime, tensorrt and tensorrt-rtx")
    name = name or DeviceName("cuda")
    if name.kind != "cuda":
        raise BackendError(f"engine {engine} holds TensorRT plans, which run on cuda only; device is {device!r}")
    if providers is not None or session_options is not None:
        raise BackendError(
            f"engine {engine} holds TensorRT plans; providers and session_options are of onnxruntime: leave them out"
        )
    return TensorRTBackend(kind, tools.get(kind, "unknown"), target, name.number)
