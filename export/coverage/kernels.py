"""The table of ONNX Runtime's CUDA kernels: ``cuda_kernels.tsv``, and how it is made.

``python -m export.coverage.kernels`` writes it anew from the registry of the onnxruntime-gpu that is installed, the
same that ONNX Runtime's published list ``docs/OperatorKernels.md`` is made from. That needs the CUDA libraries; the
table that comes along was made on a machine without a GPU (``tests/standin_cuda``). It holds what can serve opset 20
and newer, of the domains ``ai.onnx`` and ``com.microsoft``.
"""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import onnx

TABLE = Path(__file__).with_name("cuda_kernels.tsv")
PROVIDER = "CUDAExecutionProvider"
DOMAINS = ("", "com.microsoft")
OPEN = 2**31 - 1
OLDEST_OPSET = 20


class Kernel(NamedTuple):
    """A kernel: opset versions ``since`` to ``until`` of its operator, and the ``types`` that each type parameter
    may be, such as ``{"T": {"float", "float16"}}``."""

    since: int
    until: int
    types: dict[str, frozenset[str]]


class Table(NamedTuple):
    """``version`` of onnxruntime; ``kernels`` by (domain, operator); ``schemas`` of operators that onnx does not know:
    type parameters of inputs and outputs by (domain, operator), each as (name, parameter)."""

    version: str
    kernels: dict[tuple[str, str], list[Kernel]]
    schemas: dict[tuple[str, str], tuple[list[tuple[str, str]], list[tuple[str, str]]]]


@functools.cache
def read_table(path: Path = TABLE) -> Table:
    """The table of a file: lines ``kernel DOMAIN OPERATOR SINCE UNTIL T=float,float16;U=bool`` and ``schema DOMAIN
    OPERATOR query:T;past:U output:T``, separated by tabs, after a line that names the version."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    kernels: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    schemas = {}
    for line in lines:
        kind, domain, name, *rest = line.split("\t")
        domain = "" if domain == "ai.onnx" else domain
        if kind == "schema":
            sides = [[(part.split(":")[0], part.split(":")[1]) for part in side.split(";") if part] for side in rest]
            schemas[domain, name] = sides[0], sides[1]
            continue
        types = (part.split("=") for part in rest[2].split(";") if part)
        until = OPEN if rest[1] == "-" else int(rest[1])
        kernels[domain, name].append(Kernel(int(rest[0]), until, {t: frozenset(v.split(",")) for t, v in types}))
    return Table(first.removeprefix("onnxruntime-gpu "), dict(kernels), schemas)


def table_text(version: str, definitions: list[Any], schemas: list[Any]) -> str:
    """The file's text.

    Args:
        version: of onnxruntime.
        definitions: its ``get_all_opkernel_def()``; schemas: its ``get_all_operator_schema()``.
    """
    rows = set()
    for kernel in definitions:
        since, until = kernel.version_range
        if (
            kernel.provider != PROVIDER
            or kernel.domain not in DOMAINS
            or not _serves(kernel.domain, kernel.op_name, until)
        ):
            continue
        types = (
            f"{name}={','.join(sorted(short_type(t) for t in allowed))}"
            for name, allowed in sorted(kernel.type_constraints.items())
        )
        last = "-" if until == OPEN else str(until)
        rows.add(("kernel", kernel.domain or "ai.onnx", kernel.op_name, str(since), last, ";".join(types)))
    named = {(row[1], row[2]) for row in rows}
    for schema in schemas:
        if schema.domain == "com.microsoft" and (schema.domain, schema.name) in named:
            sides = (
                ";".join(f"{part.name}:{short_type(part.typeStr)}" for part in side)
                for side in (schema.inputs, schema.outputs)
            )
            rows.add(("schema", schema.domain, schema.name, *sides))
    return "\n".join([f"onnxruntime-gpu {version}", *("\t".join(row) for row in sorted(rows))]) + "\n"


def short_type(text: str) -> str:
    """``tensor(float)`` as ``float``; type parameters and other types as they are."""
    return text.removeprefix("tensor(").removesuffix(")") if text.startswith("tensor(") else text


def _serves(domain: str, name: str, until: int) -> bool:
    if until == OPEN or domain:
        return True
    try:
        return until >= onnx.defs.get_schema(name, OLDEST_OPSET).since_version
    except onnx.defs.SchemaError:
        return False


def main() -> None:
    """Write the table of the installed onnxruntime-gpu."""
    import onnxruntime

    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    text = table_text(onnxruntime.__version__, state.get_all_opkernel_def(), state.get_all_operator_schema())
    TABLE.write_text(text, encoding="utf-8")
    print(TABLE)


if __name__ == "__main__":
    main()
