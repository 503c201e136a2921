"""The engine folder: its manifest, and reading, verifying and writing it whole.

An engine folder holds ``manifest.json`` and the files that it lists with size and SHA-256; its own key ``sha256`` is
that of its other keys as compact JSON with sorted keys. The folder is written beside its final name and renamed when
complete, so it is either whole or absent. A hash shows that a file is intact, not where it came from: open engines
only from a source that you trust.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from runtimes.errors import ConfigError, DvqError, EngineError, InputError

SCHEMA = 1
MANIFEST = "manifest.json"
DEMOS = {"demo:dq": Path(__file__).with_name("demo"), "demo:mq": Path(__file__).with_name("demo_mq")}
"""The engines that ship with the package; names for them that stand in place of a folder."""
FAMILIES = ("dq", "mq")
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
TARGETS = ("cpu", "cuda")
GPU_TARGETS = re.compile(r"sm\d{2,3}(,sm\d{2,3})*")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?"},
}
"""Number formats of safetensors, but for those that numpy lacks."""
DTYPE_NAMES = tuple(np.dtype(code).name for code in DTYPES.values())


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an engine folder says of itself.

    Args:
        layout: token layout of the model.
        image_size: pixels per side, a multiple of the finest grid's side.
        slots: number of slots when the caller asks for none, at least 1.
        step: the step graph's interface: ``inputs`` and ``outputs``, lists of ``{"name", "dtype", "shape"}`` with a
            numpy dtype name and sizes of at least 1 or ``"B"``; ``caches``, pairs [input name, output name] of equal
            dtype and shape that may share one buffer.
        precision: number format of the computation, e.g. ``fp32``.
        weights: number format of the stored weights, e.g. ``fp16``.
        tools: versions of the programs that made the engine.
        files: ``{"sha256", "bytes"}`` of every file; ``write_engine`` fills it.
        class_names: one name per label, or none at all.
        defaults: recommended values of SamplingParams fields.
        tolerances: errors measured at export, by name.
        parameters: parameter counts, by name.
        target: device that the graphs were lowered for; those for ``cuda`` run on a CPU too, though slower. Of
            TensorRT plans the GPUs, e.g. ``sm86,sm89``.
        family, backend, schema: kind of model, kind of engine, version of this format.

    Raises:
        ConfigError: a field has the wrong type or is out of its range.
    """

    layout: TokenLayout
    image_size: int
    slots: int
    step: dict[str, Any]
    precision: str
    weights: str
    tools: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    family: str = "dq"
    backend: str = "onnxruntime"
    target: str = "cpu"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check(self.schema == SCHEMA, "schema", self.schema, f"must be {SCHEMA}")
        _check(self.family in FAMILIES, "family", self.family, f"must be one of {FAMILIES}")
        _check(self.backend in BACKENDS, "backend", self.backend, f"must be one of {BACKENDS}")
        if self.backend == "onnxruntime":
            _check(self.target in TARGETS, "target", self.target, f"must be one of {TARGETS}")
        else:
            named = isinstance(self.target, str) and GPU_TARGETS.fullmatch(self.target) is not None
            _check(named, "target", self.target, "must be names such as 'sm86,sm89'")
        _check(isinstance(self.layout, TokenLayout), "layout", self.layout, "must be a TokenLayout")
        finest = self.layout.sides[-1]
        whole = _is_int(self.image_size, 1) and self.image_size % finest == 0
        _check(whole, "image_size", self.image_size, f"must be a positive multiple of {finest}, the finest grid's side")
        _check(_is_int(self.slots, 1), "slots", self.slots, "must be an integer of at least 1")
        for name in ("precision", "weights"):
            _check(_is_text(getattr(self, name)), name, getattr(self, name), "must be a name such as 'fp32'")
        names = self.class_names
        good = isinstance(names, list | tuple) and all(_is_text(n) for n in names) and len(set(names)) == len(names)
        _check(good, "class_names", names, "must be different, non-empty names")
        object.__setattr__(self, "class_names", tuple(names))
        fits = len(names) in (0, self.layout.classes)
        _check(fits, "class_names", len(names), f"must be none or one for each of {self.layout.classes} labels")
        _check_dict("tools", self.tools, _is_text, "version texts")
        _check_dict("tolerances", self.tolerances, lambda v: isinstance(v, int | float) and 0 <= v < math.inf, "errors")
        _check_dict("parameters", self.parameters, lambda v: _is_int(v, 0), "counts of at least 0")
        _check_dict("defaults", self.defaults, lambda v: v is None or isinstance(v, int | float | str), "plain values")
        guidance = SamplingParams.from_dict(self.defaults).guidance
        _check(
            guidance == 1 or self.layout.null_label, "defaults.guidance", guidance, "must be 1: there is no null label"
        )
        _check_dict("files", self.files, _is_file_entry, "entries {sha256: 64 hex digits, bytes: size}")
        for name in self.files:
            plain = FILE_NAME.fullmatch(name) is not None and name != MANIFEST
            _check(plain, "files", name, "must be plain file names of letters, digits, '.', '_' and '-'")
        _check_step(self.step)

    @property
    def fixed_slots(self) -> bool:
        """Whether the step takes exactly ``slots`` slots, as a TensorRT plan does."""
        return not any("B" in spec["shape"] for spec in self.step["inputs"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, schema first."""
        values = {"schema": self.schema, **asdict(self)}
        return {**values, "layout": self.layout.to_dict(), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Strict inverse of ``to_dict``.

        Raises:
            DvqError: a key is unknown or missing, or a value is out of its range.
        """
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            odd, lacking = sorted(set(values) - known), sorted(known - set(values))
            raise ConfigError(f"unknown keys {odd}, missing keys {lacking}")
        return cls(**{**values, "layout": TokenLayout.from_dict(values["layout"])})


def engine_folder(name: str | os.PathLike[str] | None) -> Path:
    """The folder of an engine: a path, ``demo:dq`` or ``demo:mq`` for a bundled demo; None is ``demo:dq``."""
    return DEMOS.get(str(name or "demo:dq")) or Path(str(name))


def read_engine(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of an engine folder, after checking every file's size and SHA-256. Unlisted files are ignored.

    Raises:
        EngineError: the folder or a file is missing, altered, a link, or of another schema; the text names it.
    """
    folder = Path(path)
    remake = f"export it again (`python -m export.to_onnx CKPT --out {folder}`) or copy the folder anew"
    if not os.path.isdir(folder):
        raise EngineError(f"engine folder {folder} does not exist; name none to use the bundled demo, or {remake}")
    _describe(folder, MANIFEST, remake)
    try:
        values = json.loads((folder / MANIFEST).read_bytes(), object_pairs_hook=_no_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"engine {folder}: {MANIFEST} cannot be read: {error}; {remake}") from error
    schema: Any = values.get("schema") if isinstance(values, dict) else None
    if not _is_int(schema, 0):
        raise EngineError(f"engine {folder}: {MANIFEST} has no schema number; {remake}")
    if schema != SCHEMA:
        mend = "upgrade dvq-rt (`pip install -U dvq-rt`)" if schema > SCHEMA else remake
        raise EngineError(f"engine {folder}: {MANIFEST} has schema {schema}, this dvq-rt reads {SCHEMA}; {mend}")
    if values.pop("sha256", None) != _digest(values):
        raise EngineError(f"engine {folder}: {MANIFEST} is corrupted or edited (its own SHA-256 is wrong); {remake}")
    try:
        manifest = Manifest.from_dict(values)
    except (DvqError, TypeError, ValueError) as error:
        raise EngineError(f"engine {folder}: {MANIFEST} is wrong: {error}; {remake}") from error
    for name, entry in manifest.files.items():
        found = _describe(folder, name, remake)
        if found["bytes"] != entry["bytes"]:
            raise EngineError(f"engine {folder}: {name} has {found['bytes']} bytes, not {entry['bytes']}; {remake}")
        if found != entry:
            raise EngineError(f"engine {folder}: {name} is corrupted (its SHA-256 is not the manifest's); {remake}")
    return manifest


def write_engine(
    target: str | os.PathLike[str], build: Callable[[Path], Manifest], *, overwrite: bool = False
) -> Manifest:
    """Make an engine folder that appears whole or not at all.

    ``build`` gets an empty folder beside ``target``, writes the engine's files into it (no sub-folders, no
    manifest) and returns the manifest, whose ``files`` are filled in here. If ``build`` raises, nothing is left and
    the error passes on unchanged. Missing parent folders are made.

    Args:
        target: the folder's final name.
        build: writes the files, checks them, describes them.
        overwrite: whether an engine folder of that name is replaced; the old one is removed after the new one is in
            its place. Folders that are not engines are never replaced.

    Returns:
        The manifest as written.

    Raises:
        DvqError: the name is taken, ``build`` left something other than plain files, or the disk refused.
    """
    final = Path(os.path.abspath(target))
    taken = os.path.lexists(final)
    if taken and not overwrite:
        raise EngineError(f"{final} exists already; choose another name, or ask to overwrite it")
    if taken and (final.is_symlink() or not (final / MANIFEST).is_file()):
        raise EngineError(f"{final} is not an engine folder, so it is not overwritten; choose another name")
    made_parents = [p for p in final.parents if not os.path.exists(p)]
    temporary, old = (final.with_name(f".{final.name}.{secrets.token_hex(4)}.{kind}") for kind in ("new", "old"))
    done = False
    try:
        temporary.mkdir(parents=True)
        manifest = build(temporary)
        names = sorted(p.name for p in temporary.iterdir())
        manifest = replace(manifest, files={n: _describe(temporary, n, "build plain files only") for n in names})
        for name in names:
            sync(temporary / name)
        values = {**manifest.to_dict(), "sha256": _digest(manifest.to_dict())}
        write_file(temporary / MANIFEST, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
        sync(temporary)
        if taken:
            final.rename(old)
        temporary.rename(final)
        done = True
        sync(final.parent)
    except OSError as error:
        raise EngineError(f"cannot write engine {final}: {error}") from error
    finally:
        if old.exists() and not done:
            old.rename(final)
        shutil.rmtree(old if done else temporary, ignore_errors=True)
        for parent in [] if done else made_parents:
            with suppress(OSError):
                parent.rmdir()
    return manifest


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it, so that it is never half there.

    Raises:
        InputError: the file cannot be written, or the name belongs to something other than a regular file.
    """
    if os.path.exists(path) and not path.is_file():
        raise InputError(f"cannot write {path}: it exists and is not a regular file")
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# --- tensors ---------------------------------------------------------------------------------------------------
def read_tensors(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.safetensors`` file, in the order of their names.

    Raises:
        EngineError: the file is missing, damaged, or holds a number format that numpy lacks.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}; copy or export the engine again") from error
    try:
        return _parse_tensors(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise EngineError(f"{path} is not a whole safetensors file: {error}; copy or export it again") from error


def _parse_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > min(len(data), MAX_HEADER_BYTES):
        raise ValueError(f"the header should end at byte {start} of {len(data)}")
    entries = json.loads(data[8:start], object_pairs_hook=_no_twins)
    if not isinstance(entries, dict):
        raise ValueError("the header is not an object")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in sorted(entries.items()):
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name}: the keys are not dtype, shape, data_offsets")
        code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if code not in DTYPES:
            raise ValueError(f"{name}: dtype {code!r} is not one of {list(DTYPES)}")
        dtype = np.dtype(DTYPES[code])
        if not all(isinstance(numbers, list) and all(_is_int(n, 0) for n in numbers) for numbers in (shape, span)):
            raise ValueError(f"{name}: shape {shape} or data_offsets {span} are not lists of sizes")
        if len(span) != 2 or span[1] - span[0] != math.prod(shape) * dtype.itemsize or start + span[1] > len(data):
            raise ValueError(f"{name}: shape {shape} does not fit data_offsets {span} of {len(data) - start} bytes")
        content = data[start + span[0] : start + span[1]]
        if dtype == np.bool_ and content.strip(b"\0\1"):
            raise ValueError(f"{name}: a truth value is neither 0 nor 1")
        tensors[name] = np.frombuffer(content, dtype=dtype).reshape(shape).copy()
        spans.append(span)
    ends = [0, *(span[1] for span in sorted(spans))]
    if [span[0] for span in sorted(spans)] != ends[:-1] or ends[-1] != len(data) - start:
        raise ValueError("the tensors overlap or leave gaps")
    return tensors


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as a ``.safetensors`` file, atomically; the same arrays give the same bytes.

    Raises:
        InputError: an array has a dtype that the format lacks, or the file cannot be written.
    """
    codes = {np.dtype(numpy_name): code for code, numpy_name in DTYPES.items()}
    header: dict[str, Any] = {}
    parts, end = [], 0
    # Wide numbers first, so that each tensor starts at a multiple of its item size.
    for name, array in sorted(tensors.items(), key=lambda item: (-np.asarray(item[1]).itemsize, item[0])):
        dtype = np.asarray(array).dtype.newbyteorder("<")
        if dtype not in codes or name == "__metadata__":
            raise InputError(f"tensor {name!r} has dtype {dtype}; safetensors takes {list(map(str, codes))}")
        parts.append(np.asarray(array).astype(dtype, copy=False).tobytes())
        span = [end, end := end + len(parts[-1])]
        header[name] = {"dtype": codes[dtype], "shape": list(np.shape(array)), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(Path(path), b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


# --- checks ----------------------------------------------------------------------------------------------------
def _check(good: bool, name: str, value: Any, rule: str) -> None:
    if not good:
        raise ConfigError(f"manifest.{name} is {str(value)[:200]!r}; it {rule}")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_file_entry(value: Any) -> bool:
    good = isinstance(value, dict) and set(value) == {"sha256", "bytes"} and _is_int(value["bytes"], 0)
    return good and re.fullmatch(r"[0-9a-f]{64}", str(value["sha256"])) is not None


def _check_dict(name: str, value: Any, good: Callable[[Any], bool], words: str) -> None:
    _check(isinstance(value, dict), name, value, "must be an object")
    for key, entry in value.items():
        _check(_is_text(key) and good(entry), name, {key: entry}, f"must map names to {words}")


def _check_step(step: Any) -> None:
    keys = {"inputs", "outputs", "caches"}
    _check(isinstance(step, dict) and set(step) == keys, "step", step, f"must have exactly the keys {sorted(keys)}")
    specs: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
    for side in keys:
        _check(isinstance(step[side], list), f"step.{side}", step[side], "must be a list")
    for side in specs:
        for spec in step[side]:
            good = isinstance(spec, dict) and set(spec) == {"name", "dtype", "shape"} and _is_text(spec["name"])
            good = good and spec["dtype"] in DTYPE_NAMES and isinstance(spec["shape"], list | tuple)
            good = good and all(size == "B" or _is_int(size, 1) for size in spec["shape"])
            _check(good, f"step.{side}", spec, "must hold {name, dtype, shape}, sizes being integers >= 1 or 'B'")
            _check(spec["name"] not in specs[side], f"step.{side}", spec["name"], "must have different names")
            specs[side][spec["name"]] = spec
    for pair in step["caches"]:
        good = isinstance(pair, list | tuple) and len(pair) == 2
        good = good and pair[0] in specs["inputs"] and pair[1] in specs["outputs"]
        _check(good, "step.caches", pair, "must hold pairs [input name, output name] of the step graph")
        ends = [(s["dtype"], list(s["shape"])) for s in (specs["inputs"][pair[0]], specs["outputs"][pair[1]])]
        _check(ends[0] == ends[1], "step.caches", pair, "must have one dtype and shape on both sides")
    flat = [name for pair in step["caches"] for name in pair]
    _check(len(set(flat)) == len(flat), "step.caches", flat, "must name each input and output once")


# --- files -----------------------------------------------------------------------------------------------------
def _describe(folder: Path, name: str, remake: str) -> dict[str, Any]:
    """Size and SHA-256 of a plain file, as the manifest lists them."""
    path = folder / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise EngineError(f"engine {folder}: {name} is a link or not a file; {remake}")
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
    except OSError as error:
        raise EngineError(f"engine {folder}: {name} is missing or unreadable ({error.strerror}); {remake}") from error


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's own content, whatever its spacing and order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync(path: Path) -> None:
    """Bring a file's or a folder's content to the disk."""
    if path.is_file() or os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
