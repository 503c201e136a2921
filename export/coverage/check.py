"""Every node of a graph for CUDA is looked up among ONNX Runtime's CUDA kernels, so that none falls to the CPU unseen.

A node that only computes sizes (from ``Shape``) belongs on the host: ONNX Runtime leaves it there, and CUDA graphs
allow it, since sizes do not change between two runs. Everything else must have a kernel for its types.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import TensorProto

from export.coverage.kernels import OPEN, Kernel, Table, read_table, short_type
from export.fusion import empty_values
from export.tracing import load_graph
from runtimes.errors import ExportError

NAMES = {TensorProto.FLOAT: "float", TensorProto.DOUBLE: "double"}
SIZES = ("Shape", "Size")
OF_SIZES = ("Add", "Cast", "Concat", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
"""Operators that make sizes of sizes."""


class Coverage(NamedTuple):
    """Of a graph: nodes by operator that have a CUDA kernel, nodes by operator that compute sizes on the host, and what
    has no kernel: name, operator and types of each."""

    name: str
    on_cuda: Counter[str]
    on_host: Counter[str]
    missing: list[str]

    def __str__(self) -> str:
        return (
            f"{self.name}: {sum(self.on_cuda.values())} nodes on CUDA, {sum(self.on_host.values())} of sizes on the "
            f"host, {len(self.missing)} without a kernel"
        )


def cover(proto: onnx.ModelProto, name: str, table: Table | None = None) -> Coverage:
    """Look up every node of a graph.

    Args:
        proto: as exported; every tensor's type must be known, as the exporter writes it.
        name: what the result is called.
        table: of kernels; None takes the one that comes along.
    """
    table = table or read_table()
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    types = _types(proto)
    constants = {tensor.name for tensor in proto.graph.initializer}
    empty = empty_values(proto.graph)
    sizes: set[str] = set()
    on_cuda: Counter[str] = Counter()
    on_host: Counter[str] = Counter()
    missing = []
    for node in proto.graph.node:
        given = [value for value in node.input if value]
        if node.op_type == "Constant" or (node.op_type == "Cast" and set(given) <= constants):
            constants.update(node.output)  # folded when the graph is opened
            continue
        of_sizes = node.op_type in OF_SIZES and set(given) & sizes and set(given) <= sizes | constants
        if node.op_type in SIZES or of_sizes:
            sizes.update(node.output)
            on_host[node.op_type] += 1
            continue
        faults = _faults(node, opsets, types, table)
        if node.op_type.startswith("Reduce") and node.input[0] in empty:
            faults = f"nothing, {empty[node.input[0]]}"  # CUDA's kernels refuse it
        if faults is None:
            on_cuda[node.op_type] += 1
        else:
            missing.append(f"{node.name or node.output[0]} ({node.op_type} of {faults})")
    return Coverage(name, on_cuda, on_host, missing)


def check_coverage(path: Path) -> Coverage:
    """
    Raises:
        ExportError: nodes of an ONNX file have no CUDA kernel; names them.
    """
    coverage = cover(load_graph(path), path.stem)
    if coverage.missing:
        more = f" and {len(coverage.missing) - 5} more" if len(coverage.missing) > 5 else ""
        raise ExportError(
            f"{path.name} has nodes that onnxruntime-gpu {read_table().version} would run on the CPU: "
            f"{'; '.join(coverage.missing[:5])}{more}"
        )
    return coverage


def _types(proto: onnx.ModelProto) -> dict[str, str]:
    graph = proto.graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    values |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: NAMES.get(kind) or TensorProto.DataType.Name(kind).lower() for name, kind in values.items()}


def _faults(node: onnx.NodeProto, opsets: dict[str, int], types: dict[str, str], table: Table) -> str | None:
    """None if a kernel takes the node, else the types that it has."""
    schema: tuple[list[tuple[str, str]], list[tuple[str, str]]]
    if node.domain in ("", "ai.onnx"):
        known = onnx.defs.get_schema(node.op_type, opsets[""])
        since = known.since_version
        inputs, outputs = ([(p.name, p.type_str) for p in side] for side in (known.inputs, known.outputs))
        schema = inputs, outputs
    else:
        since = opsets[node.domain]
        schema = table.schemas.get((node.domain, node.op_type), ([], []))
    actual: dict[str, set[str]] = {}
    for names, formal in ((node.input, schema[0]), (node.output, schema[1])):
        for i, value in enumerate(names):
            if value and formal:
                for key in formal[min(i, len(formal) - 1)]:  # of a variadic operator the last one repeats
                    actual.setdefault(key, set()).add(types.get(value, "unknown"))
    text = ", ".join(types.get(value, "unknown") for value in (*node.input, *node.output) if value)
    if node.domain in ("", "ai.onnx"):  # the operator itself may not have the type
        for limit in known.type_constraints:
            allowed = {short_type(name) for name in limit.allowed_type_strs}
            if not actual.get(limit.type_param_str, set()) <= allowed:
                return text
    domain = "" if node.domain == "ai.onnx" else node.domain
    for kernel in table.kernels.get((domain, node.op_type), []):
        if _of_version(kernel, since) and all(
            actual.get(name, set()) <= allowed for name, allowed in kernel.types.items()
        ):
            return None
    return text


def _of_version(kernel: Kernel, since: int) -> bool:
    """ONNX Runtime's rule: a kernel without an end serves its own version of the operator alone."""
    return kernel.since == since or (kernel.until != OPEN and kernel.since <= since <= kernel.until)
