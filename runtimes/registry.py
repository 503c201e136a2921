"""placeholder until the backend registry lands"""
from __future__ import annotations
from pathlib import Path
from typing import Any
from runtimes.errors import BackendError
from runtimes.onnxruntime import OnnxRuntimeBackend
from runtimes.protocol import Backend
from runtimes.tensorrt import TensorRTBackend


def open_backend(path: Path, manifest: Any, device: str | None, threads: int | None) -> Backend:
    if manifest.backend == "onnxruntime":
        backend = OnnxRuntimeBackend(device or "cpu", threads)
        if device == "cuda" and manifest.target != "cuda":
            raise BackendError(f"engine {path} was exported for the CPU; export it again with --target cuda")
        return backend
    if device not in (None, "cuda"):
        raise BackendError(f"engine {path} holds TensorRT plans, which run on cuda only; device is {device!r}")
    digests = {name: entry["sha256"] for name, entry in manifest.files.items()}
    version = manifest.tools.get(manifest.backend, "unknown")
    return TensorRTBackend(manifest.backend, version, manifest.target, digests)
