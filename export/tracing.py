"""From a PyTorch module to an ONNX file: tracing, and how its weights are stored."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from dvq_rt.files import guard
from export.fusion import fuse_residual_norms, replace_empty_sums
from export.lowering import OPSET, TRANSLATIONS
from runtimes.errors import ExportError

MOST_ROWS = 4096
"""Largest batch of a graph with a symbolic one."""
EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of weights from which a graph keeps them in a file beside it; protobuf ends at 2 GiB."""


def trace(
    module: nn.Module,
    inputs: dict[str, Any],
    outputs: Sequence[str],
    path: Path,
    *,
    names: Sequence[str] = (),
    half_weights: bool = False,
    fixed: bool = False,
    fused: bool = False,
    opset: int = OPSET,
) -> None:
    """Export a module as an ONNX file.

    Args:
        inputs: of ``forward`` by name, as examples; tensors, or dicts or lists of them.
        outputs: names of what it returns.
        names: of the graph's inputs, one per tensor; those of ``forward`` if there are none.
        half_weights: see ``store_half``.
        fixed: keep the examples' batch size; otherwise all inputs have a symbolic batch ``B``.
        fused: see ``export.fusion``.

    Raises:
        ExportError: PyTorch or onnx cannot trace or write it; names the file.
    """
    batch = torch.export.Dim("B", min=1, max=MOST_ROWS)

    def symbolic(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: symbolic(value) for key, value in values.items()}
        return [symbolic(value) for value in values] if isinstance(values, list) else {0: batch}

    with guard(ExportError, f"{path.name} cannot be traced"), quiet():
        program = torch.export.export(module, (), inputs, dynamic_shapes=None if fixed else symbolic(inputs))
        graph = torch.onnx.export(
            program,
            input_names=list(names or inputs),
            output_names=list(outputs),
            opset_version=opset,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
        assert graph is not None
        proto = graph.model_proto
    for node in proto.graph.node:  # stack traces with this machine's paths
        del node.metadata_props[:]
        node.doc_string = ""
    if fused:
        fuse_residual_norms(proto)
        replace_empty_sums(proto)
    if half_weights:
        store_half(proto)
    save(proto, path)


def store_half(proto: onnx.ModelProto) -> None:
    """Store float32 weights that float16 holds exactly as float16 with a Cast, which the engine folds at load."""
    for tensor in list(proto.graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < 256 or not np.array_equal(values.astype(np.float16).astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), name + ".half"))
        cast = onnx.helper.make_node("Cast", [name + ".half"], [name], to=onnx.TensorProto.FLOAT)
        proto.graph.node.insert(0, cast)


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with its weights in ``<name>.data`` beside it if they are too large for one file.

    Raises:
        ExportError: onnx cannot write it.
    """
    with guard(ExportError, f"{path.name} cannot be written"):
        if sum(len(t.raw_data) for t in proto.graph.initializer) > EXTERNAL_ABOVE:
            onnx.save_model(proto, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
        else:
            onnx.save_model(proto, path)


def load_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file, without weights that lie beside it.

    Raises:
        ExportError: onnx cannot read it.
    """
    with guard(ExportError, f"{path.name} cannot be read"):
        return onnx.load(path, load_external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress and deprecation notices off the terminal; errors pass."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)
