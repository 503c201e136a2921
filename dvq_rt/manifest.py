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
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dvq_rt.files import (
    DTYPES,
    FileName,
    new_folder,
    open_regular,
    read_dataclass,
    read_json,
    restore_folder,
    write_file,
)
from dvq_rt.hub import PREFIX, fetch
from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from runtimes.errors import ConfigError, EngineError, guard, short

SCHEMA, OLDER = 3, (1, 2)
"""The version that is written, and those that are read too: 1 lacks ``tokenizer``, both ``conditioning``."""
MANIFEST = "manifest.json"
GRAPHS = ("encoder", "decoder", "step")
TEXT_GRAPH = "text"
"""The graph that models which read prompts have beside the others."""
DEMOS = {
    "demo:dq": Path(__file__).with_name("demo"),
    "demo:dq3": Path(__file__).with_name("demo_dq3"),
    "demo:mq": Path(__file__).with_name("demo_mq"),
}
"""The engines that ship with the package; names for them that stand in place of a folder."""
FAMILIES = ("dq", "mq")
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
TARGETS = ("cpu", "cuda")
GPU_TARGETS = re.compile(r"sm\d{2,3}(,sm\d{2,3})*")
CACHES = {"fp32": "float32", "fp16": "float16"}
"""Number format of the caches by ``precision``; with weights of integers on a CPU they are int8."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
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
        tokenizer: how it chooses what gets codes, as plain values, e.g. ``entropy_low``; empty if it is not known.
        conditioning: of a model that reads prompts, ``{"kind": "prefix", "max": most tokens of a prompt, "tokenizer":
            "tokenizer.json" or "bytes", "empty": whether the empty prompt stands for anything}``; empty for others.
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
    tokenizer: dict[str, Any] = field(default_factory=dict)
    conditioning: dict[str, Any] = field(default_factory=dict)
    family: str = "dq"
    backend: str = "onnxruntime"
    target: str = "cpu"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check(self.schema in (SCHEMA, *OLDER), "schema", self.schema, f"must be {SCHEMA}")
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
        for name in ("defaults", "tokenizer"):
            plain_values: Any = lambda v: v is None or isinstance(v, int | float | str)  # noqa: E731
            _check_dict(name, getattr(self, name), plain_values, "plain values")
        _check_conditioning(self.conditioning)
        guidance = SamplingParams.from_dict(self.defaults).guidance
        _check(guidance == 1 or self.guidable, "defaults.guidance", guidance, "must be 1: there is no null label")
        _check_dict("files", self.files, _is_file_entry, "entries {sha256: 64 hex digits, bytes: size}")
        for name in self.files:
            plain = FILE_NAME.fullmatch(name) is not None and name != MANIFEST
            _check(plain, "files", name, "must be plain file names of letters, digits, '.', '_' and '-'")
        _check_step(self.step)
        self._check_agreement()

    def _check_agreement(self) -> None:
        """What two fields say of the same thing must agree; the graphs themselves are not needed for that."""
        kept = not self.layout.covering
        _check(kept == (self.family == "mq"), "family", self.family, "must be 'mq' exactly where layout has a kept")
        specs = {
            spec["name"]: {**spec, "shape": list(spec["shape"])}
            for side in ("inputs", "outputs")
            for spec in self.step[side]
        }
        rows = {name: spec["shape"][:1] for name, spec in specs.items()}
        even = all(row == ["B"] for row in rows.values()) or all(row == [self.slots] for row in rows.values())
        even = even and all("B" not in spec["shape"][1:] for spec in specs.values())
        _check(even, "step", rows, f"must have 'B', or everywhere the {self.slots} of slots, as the first size alone")
        number = "int8" if self.rounds_activations else CACHES.get(self.precision)
        for name, _ in self.step["caches"]:
            shape, dtype = specs[name]["shape"], specs[name]["dtype"]
            longest = self.layout.max_length + self.prompt
            long = shape[2:3] == [longest]
            _check(long, "step", specs[name], f"must have {longest}, the longest prompt and image, as 3rd size")
            _check(number in (None, dtype), "step", specs[name], f"must be {number}: see precision and weights")

    @property
    def rounds_activations(self) -> bool:
        """Whether activations, caches and the decoder's maps are integers too, as with integer weights on a CPU."""
        return self.weights.startswith("int") and self.target == "cpu"

    @property
    def prompt(self) -> int:
        """Most tokens of a prompt; 0 where none are read."""
        return int(self.conditioning.get("max", 0))

    @property
    def empty_prompt(self) -> bool:
        """Whether the empty prompt stands for anything."""
        return bool(self.conditioning.get("empty", False))

    @property
    def guidable(self) -> bool:
        """Whether there is something that guidance can compare with: a null label, or the empty prompt."""
        return self.layout.null_label or self.empty_prompt

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs, without their suffix."""
        return (*GRAPHS, TEXT_GRAPH) if self.conditioning else GRAPHS

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
            ConfigError: a key is unknown or missing, or a value is of the wrong type or out of its range.
        """
        if values.get("schema") in OLDER:
            values = {"tokenizer": {}, "conditioning": {}, **values}
        return read_dataclass(cls, values, "manifest")


def engine_folder(name: FileName | None) -> Path:
    """The folder of an engine: a path, one of ``DEMOS``, or ``hf:owner/name@revision``, see ``dvq_rt.hub``;
    None is ``demo:dq``.

    Raises:
        EngineError: the name is empty, as an unset shell variable makes it, or no path; or the hub does not give it.
    """
    if name is None:
        name = "demo:dq"
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise EngineError(f"the engine is {short(name)}; give the path of a folder, or one of {', '.join(DEMOS)}")
    if str(name).startswith(PREFIX):
        return fetch(str(name))
    return DEMOS.get(str(name)) or Path(name)


def read_engine(path: FileName) -> Manifest:
    """The manifest of an engine folder, after checking every file's size and SHA-256. Unlisted files are ignored, and
    links are followed, since the hash tells whether they lead to the right content.

    Raises:
        EngineError: the folder or a file is missing, altered, not a regular file, or of another schema; the text
            names it.
    """
    with guard(EngineError, f"engine folder {short(path)} cannot be opened"):
        folder = restore_folder(path)
    remake = f"export it again (`python -m export.to_onnx CKPT --out {folder}`) or copy the folder anew"
    if not os.path.isdir(folder):
        if any(parent.is_file() for parent in folder.parents):
            raise EngineError(f"engine {folder} lies inside an archive; engines are read from folders: unpack it")
        raise EngineError(f"engine folder {folder} does not exist; name none to use the bundled demo, or {remake}")
    values = read_json(
        folder / MANIFEST, error=EngineError, what=f"engine {folder}: {MANIFEST} is missing or unreadable", mend=remake
    )
    schema: Any = values.get("schema") if isinstance(values, dict) else None
    if not _is_int(schema, 0):
        raise EngineError(f"engine {folder}: {MANIFEST} has no schema number; {remake}")
    if schema not in (SCHEMA, *OLDER):
        mend = "upgrade dvq-rt (`pip install -U dvq-rt`)" if schema > SCHEMA else remake
        raise EngineError(f"engine {folder}: {MANIFEST} has schema {schema}, this dvq-rt reads {SCHEMA}; {mend}")
    if values.pop("sha256", None) != manifest_digest(values):
        raise EngineError(f"engine {folder}: {MANIFEST} is corrupted or edited (its own SHA-256 is wrong); {remake}")
    with guard(EngineError, f"engine {folder}: {MANIFEST} is wrong", remake):
        manifest = Manifest.from_dict(values)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry, remake)
    return manifest


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], remake: str) -> None:
    """Compare a file's size, and then its SHA-256, with what the manifest lists."""
    what = f"engine {folder}: {name} is missing or unreadable"
    with guard(EngineError, what, remake), open_regular(folder / name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise EngineError(f"engine {folder}: {name} has {size} bytes, not {entry['bytes']}; {remake}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise EngineError(f"engine {folder}: {name} is corrupted (its SHA-256 is not the manifest's); {remake}")


def write_engine(target: FileName, build: Callable[[Path], Manifest], *, overwrite: bool = False) -> Manifest:
    """Make an engine folder that appears whole or not at all (``dvq_rt.files.new_folder``).

    ``build`` gets an empty folder beside ``target``, writes the engine's files into it (no sub-folders, links or
    manifest) and returns the manifest, whose ``files`` are filled in here. If ``build`` raises, nothing is left and
    the error passes on unchanged.

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
    with guard(EngineError, f"cannot write engine {short(target)}"):
        final = restore_folder(os.path.abspath(target))
    if overwrite and os.path.lexists(final) and (final.is_symlink() or not (final / MANIFEST).is_file()):
        raise EngineError(f"{final} is not an engine folder, so it is not overwritten; choose another name")
    with new_folder(target, overwrite=overwrite, error=EngineError) as folder:
        manifest = build(folder)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        manifest = replace(manifest, files=files)
        values = {**manifest.to_dict(), "sha256": manifest_digest(manifest.to_dict())}
        write_file(folder / MANIFEST, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    return manifest


def _describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file that was just made, as the manifest lists them."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise EngineError(f"{path.name} is a link or not a file; build plain files only")
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def manifest_digest(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's own content, whatever its spacing and order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- checks ----------------------------------------------------------------------------------------------------
def _check(good: bool, name: str, value: Any, rule: str) -> None:
    if not good:
        raise ConfigError(f"manifest.{name} is {short(value)}; it {rule}")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not re.search("[\ud800-\udfff]", value)


def _is_file_entry(value: Any) -> bool:
    good = isinstance(value, dict) and set(value) == {"sha256", "bytes"} and _is_int(value["bytes"], 0)
    return good and re.fullmatch(r"[0-9a-f]{64}", str(value["sha256"])) is not None


def _check_dict(name: str, value: Any, good: Callable[[Any], bool], words: str) -> None:
    _check(isinstance(value, dict), name, value, "must be an object")
    for key, entry in value.items():
        _check(_is_text(key) and good(entry), name, {key: entry}, f"must map names to {words}")


def _check_conditioning(value: Any) -> None:
    good = isinstance(value, dict)
    if value:
        good = good and set(value) == {"kind", "max", "tokenizer", "empty"} and value["kind"] == "prefix"
        good = good and _is_int(value["max"], 1) and isinstance(value["empty"], bool)
        good = good and value["tokenizer"] in ("tokenizer.json", "bytes")
    _check(good, "conditioning", value, "must be empty or {kind: 'prefix', max, tokenizer, empty}")


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
