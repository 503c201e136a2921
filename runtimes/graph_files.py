"""Graph files: compared with the manifest, and their tensors with the interface that it describes."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtimes.errors import EngineError
from runtimes.protocol import Files, Program, TensorSpec

AGAIN = "copy or export the engine again"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
NESTED = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Fields of ONNX messages, by number, that lead to the entries that say where a tensor's values are."""


def read_file(path: Path, files: Files | None = None, *, mapped: bool = False) -> bytes | mmap.mmap:
    """A file's content, compared with what the manifest lists under its name; links are followed.

    Args:
        path: the file.
        files: what the manifest lists; None compares nothing.
        mapped: map it into memory instead of reading it, for a file that is larger than memory.

    Raises:
        EngineError: the file is missing, unreadable, not listed, or of another size or SHA-256.
    """
    wanted = None if files is None else files.get(path.name)
    if files is not None and wanted is None:
        raise EngineError(f"{path} is not a file that the manifest lists; {AGAIN}")
    try:
        if path.exists() and not path.is_file():
            raise EngineError(f"{path} is not a regular file; {AGAIN}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if wanted and size != wanted["bytes"]:
                raise EngineError(
                    f"{path} is not the file that the manifest lists: it has {size:,} bytes, not "
                    f"{wanted['bytes']:,}; {AGAIN}"
                )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped and size else file.read(size)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror or error}; {AGAIN}") from error
    if wanted and hashlib.sha256(data).hexdigest() != wanted["sha256"]:
        raise EngineError(f"{path} is not the file that the manifest lists (its SHA-256); {AGAIN}")
    return data


def external_files(path: Path, graph: bytes) -> set[str]:
    """Names of the files beside an ONNX graph that hold values of its tensors.

    Raises:
        EngineError: a name leaves the folder, or the graph is damaged.
    """
    if b"location" not in graph:  # the key of such a name
        return set()
    try:
        names = {name.decode() for name in _locations(memoryview(graph), "model")}
    except (IndexError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not a whole ONNX graph; {AGAIN}") from error
    if odd := sorted(name for name in names if not PLAIN_NAME.fullmatch(name)):
        raise EngineError(f"{path} keeps values in {odd[0]!r}, which is not the name of a file beside it; {AGAIN}")
    return names


def _locations(message: memoryview, kind: str) -> Iterator[bytes]:
    if kind == "entry":
        entry = {number: bytes(value) for number, value in _fields(message)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"")
        return
    for number, value in _fields(message):
        if number in NESTED[kind]:
            yield from _locations(value, NESTED[kind][number])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field of a protobuf message that has a length."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(integer(), 8)
        if wire == 2:
            size = integer()
            if at + size > len(message):
                raise ValueError("a field ends behind its message")
            yield number, message[at : at + size]
            at += size
        elif wire == 0:
            integer()
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to; nothing where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_interface(
    path: Path, program: Program, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> None:
    """Compare a graph's tensors with those that its manifest describes: names, number formats, ranks and sizes.

    Args:
        path: the graph's file, for errors.
        program: the graph.
        inputs, outputs: what the manifest says. A size that is a number must be the graph's, or any in the graph; one
            that is a name must be any in the graph; None is not compared.

    Raises:
        EngineError: they differ; names both sides of the first differences.
    """
    odd = []
    for side, wanted, given in (("input", inputs, program.inputs), ("output", outputs, program.outputs)):
        for name in [*wanted, *(name for name in given if name not in wanted)]:
            if name not in given or name not in wanted:
                odd.append(f"{side} {name!r} is only in the {'manifest' if name in wanted else 'graph'}")
            elif not _fits(wanted[name], given[name]):
                odd.append(
                    f"{side} {name!r} is {_text(wanted[name])} in the manifest, {_text(given[name])} in the graph"
                )
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise EngineError(f"{path} is not the graph that its manifest describes: {'; '.join(odd[:3])}{more}; {AGAIN}")


def _fits(wanted: TensorSpec, given: TensorSpec) -> bool:
    return (
        wanted.dtype == given.dtype
        and len(wanted.shape) == len(given.shape)
        and all(
            want is None or not isinstance(have, int) or want == have
            for want, have in zip(wanted.shape, given.shape, strict=True)
        )
    )


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join('any' if size is None else str(size) for size in spec.shape)}]"
