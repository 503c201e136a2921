"""Files that are whole or not there, tensor files, and strict reading of JSON into dataclasses.

Whoever opens a file here opens a regular one of a bounded size, and gets a ``DvqError`` that names it for anything
that is wrong with it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from io import BufferedReader
from numbers import Integral, Real
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import ConfigError, DvqError, EngineError, InputError, guard, short

T = TypeVar("T")
FileName = str | os.PathLike[str]
TEMPORARY, NEW, OLD, LOCK = "dvq-tmp", "dvq-new", "dvq-old", "dvq-lock"
"""Endings of the hidden names, beside a file or folder, that it has on the way, that an older folder waits under, and
of the file that is locked while folders are renamed."""
MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?"},
}
"""Number formats of safetensors, but for those that numpy lacks."""


# --- reading ---------------------------------------------------------------------------------------------------
@contextmanager
def open_regular(path: FileName, most: int | None = None) -> Iterator[BufferedReader]:
    """A regular file, at its start, in binary. Links are followed; pipes and devices are refused without waiting.

    Args:
        path: the file.
        most: its largest size in bytes, compared before anything is read; None for any.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else than a regular file, or larger; or the name holds what no file name may.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(os.fspath(path), "rb", opener=opener) as file:  # a number would be an open file
        status = os.fstat(file.fileno())
        if not S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if most is not None and status.st_size > most:
            raise ValueError(f"it has {status.st_size} bytes; at most {most} are read")
        yield file


def read_json(
    path: FileName,
    *,
    error: type[DvqError] = ConfigError,
    what: str = "",
    mend: str = "",
    most: int = MAX_JSON_BYTES,
) -> Any:
    """The JSON value of a UTF-8 file in which no object names a key twice.

    Args:
        path: the file.
        error: what is raised.
        what: the beginning of the error's text; "PATH cannot be read" if empty.
        mend: the way out, for the error's text.
        most: largest size in bytes.

    Raises:
        error: the file is missing, not a regular one, too large, not JSON, or nested too deeply.
    """
    with guard(error, what or f"{path} cannot be read", mend), open_regular(path, most) as file:
        return parse_json(file.read(most))


def parse_json(data: bytes | str) -> Any:
    """A JSON value in which no object names a key twice; raises what ``json`` does."""
    return json.loads(data, object_pairs_hook=_no_twins)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


def read_dataclass(
    cls: type[T], values: object, where: str, *, defaults: bool = False, error: type[DvqError] = ConfigError
) -> T:
    """A dataclass from a JSON-like object, whose values are checked against the declared plain types.

    Numbers must be finite, a float may be given as an integer, a tuple as a list, a nested dataclass as an object
    (read in the same way). Fields declared as anything else than these, ``str``, ``bool``, ``dict``, ``None`` and
    unions of them are passed on as they are.

    Args:
        cls: the dataclass.
        values: what JSON gave.
        where: the value's name in errors.
        defaults: fields that have a default may be left out; otherwise exactly the fields must be there.
        error: what is raised.

    Raises:
        error: names ``where`` and the key: it is unknown or missing, or its value is of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise error(f"{where} is {short(values)}; it must be an object of named fields")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values if key not in known)
    optional = {n for n, f in known.items() if f.default is not MISSING or f.default_factory is not MISSING}
    missing = sorted(set(known) - set(values) - (optional if defaults else set()))
    if missing or (unknown and not defaults):
        raise error(f"{where}: unknown keys {short(unknown)}, missing keys {short(missing)}")
    if unknown:
        raise error(f"{where}: unknown fields {short(unknown)}; there are {sorted(known)}")
    hints = typing.get_type_hints(cls)
    ready = {n: _typed(hints[n], value, where, n, defaults, error) for n, value in values.items()}
    with guard(error, where):
        try:
            return cls(**ready)
        except DvqError as refused:  # its text names the field already
            raise error(str(refused)) from refused


def _typed(hint: Any, value: Any, where: str, name: str, defaults: bool, error: type[DvqError]) -> Any:
    """A value as its declared type wants it."""
    if is_dataclass(hint) and isinstance(hint, type) and not isinstance(value, hint):
        return read_dataclass(hint, value, f"{where}.{name}", defaults=defaults, error=error)
    if not _fits(hint, value):
        wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        raise error(f"{where}: {name} is {short(value)}; it must be of type {wanted}")
    holds_tuple = typing.get_origin(hint) is tuple or hint is tuple
    return tuple(value) if holds_tuple and isinstance(value, list) else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a declared plain type; of any other type it always is."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(each, value) for each in inner)
    if origin is tuple:
        several = isinstance(value, list | tuple)
        if several and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(_fits(h, v) for h, v in zip(inner, value, strict=True))
        return several and (not inner or all(_fits(inner[0], each) for each in value))
    if origin is dict:
        named = isinstance(value, Mapping)
        return named and (not inner or all(_fits(inner[0], k) and _fits(inner[1], v) for k, v in value.items()))
    if origin in (int, float):
        number = isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
        return number and (origin is int or _is_finite(value))
    if origin in (str, bool, types.NoneType):
        return isinstance(value, origin)
    return True


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that is too large for a float
        return False


# --- writing ---------------------------------------------------------------------------------------------------
def write_file(path: FileName, data: bytes, *, error: type[DvqError] = InputError) -> None:
    """Write a file under a hidden name, bring it to the disk and rename it, so that it is never half there: a full
    disk or a killed process leaves the older file as it was.

    Raises:
        error: the file cannot be written, or the name belongs to something other than a regular file.
    """
    with guard(error, f"cannot write {path}"):
        final = Path(path)
        if os.path.exists(final) and not final.is_file():
            raise error(f"cannot write {path}: it exists and is not a regular file")
        near = final.with_name(final.name[:60])  # room for more in a name of 255 bytes
        _remove_dead(_hidden(near, TEMPORARY))
        with _beside(near, TEMPORARY, lambda name: name.open("xb").close()) as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)


@contextmanager
def new_folder(target: FileName, *, overwrite: bool = False, error: type[DvqError] = InputError) -> Iterator[Path]:
    """A folder that appears under its name whole or not at all.

    The block gets an empty folder beside ``target`` and fills it; when it ends the content is brought to the disk and
    the folder takes its name. If the block raises, nothing is left. If the process is killed, the next ``new_folder``
    of that name removes what it left, and ``restore_folder`` gives the name back to a folder that was to be replaced.
    Missing parent folders are made.

    Args:
        target: the folder's final name.
        overwrite: whether a folder of that name is replaced; it stands until the new one is complete.
        error: what is raised.

    Raises:
        error: the name is taken, or the disk refused. What the block raises passes on, but for an OSError.
    """
    with guard(error, f"cannot write {short(target)}"):
        final = Path(os.path.abspath(target))
        if b"\0" in os.fsencode(final):
            raise ValueError("its name holds a NUL")
    with _renaming(final):
        _restore(final)
        if os.path.lexists(final) and not (overwrite and final.is_dir()):
            raise error(f"{final} exists already; choose another name, or ask to overwrite the folder")
    made_parents = [p for p in final.parents if not os.path.exists(p)]
    done = False
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        left = re.compile(rf"\.{re.escape(final.name)}(\.[0-9a-f]{{8}})?\.{NEW}")
        for name in filter(left.fullmatch, os.listdir(final.parent)):
            _remove_dead(final.with_name(name))
        with _beside(final, NEW, Path.mkdir) as temporary:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    sync(path)
            _swap(temporary, final, overwrite)
            done = True
    except OSError as cause:
        raise error(f"cannot write {final}: {cause.strerror or cause}") from cause
    finally:
        for parent in [] if done else made_parents:
            with suppress(OSError):
                parent.rmdir()


def restore_folder(target: FileName) -> Path:
    """Give a folder its name back if a process died while it replaced it.

    Returns:
        ``target``; or the folder's present name where it cannot be renamed, such as on a disk that is read only.
    """
    final = Path(target)
    if os.path.lexists(final) or not os.path.isdir(_hidden(final, OLD)):
        return final
    with _renaming(final):  # after a living process that is between two renames
        return _restore(final)


def _restore(final: Path) -> Path:
    """``restore_folder`` for who has the right to rename."""
    old = _hidden(final, OLD)
    if not os.path.lexists(final) and os.path.isdir(old):
        try:
            old.rename(final)
        except OSError:
            return old
    return final


def sync(path: Path) -> None:
    """Bring a file's or a folder's content to the disk."""
    if path.is_file() or os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as cause:  # some network disks do not do this for folders
            if path.is_file() or cause.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(handle)


def _swap(temporary: Path, final: Path, overwrite: bool) -> None:
    """Give a new folder its name, and remove the folder that had it."""
    old = _hidden(final, OLD)
    with _renaming(final):
        _restore(final)
        if not os.path.lexists(final):
            temporary.rename(final)
            sync(final.parent)
            return
        if not overwrite:
            raise FileExistsError(errno.EEXIST, "it has appeared meanwhile")
        _remove(old)
        try:
            final.rename(old)
            temporary.rename(final)
        except BaseException:
            if not os.path.lexists(final):
                old.rename(final)
            raise
        sync(final.parent)
        dead = _hidden(final, f"{secrets.token_hex(4)}.{NEW}")  # swept like one if this process ends here
        old.rename(dead)
    _remove(dead)


@contextmanager
def _renaming(final: Path) -> Iterator[None]:
    """The sole right, among processes and threads, to rename what is or was ``final``: a locked file beside it."""
    path = _hidden(final, LOCK)
    while True:
        with _locked(path, wait=True, create=True) as locked:
            if locked is False:
                continue  # the one before has removed it
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _hidden(final: Path, ending: str) -> Path:
    return final.with_name(f".{final.name}.{ending}")


@contextmanager
def _beside(final: Path, ending: str, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new hidden file or folder beside ``final``, which the block renames; removed if the block raises.

    It has one name, so that the next process finds it if this one dies; or another one while a living process has
    that, or where the disk has no locks to tell.
    """
    usual = _hidden(final, ending)
    for path in (usual, *(_hidden(final, f"{secrets.token_hex(4)}.{ending}") for _ in range(100))):
        try:
            make(path)
        except FileExistsError:
            continue
        with _locked(path) as locked:
            if locked is False or not os.path.lexists(path):
                continue  # somebody takes it for a dead one and removes it
            if locked is None and path == usual:
                _remove(path)
                continue
            try:
                yield path
            except BaseException:
                _remove(path)
                raise
            return
    raise FileExistsError(errno.EEXIST, f"{path} exists already")


@contextmanager
def _locked(path: Path, wait: bool = False, create: bool = False) -> Iterator[bool | None]:
    """Lock a file or folder against other processes, and say whether that worked; None if there are no such locks. A
    process that dies unlocks."""
    handle, locked = -1, None
    with suppress(ImportError, OSError):
        import fcntl

        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0))
        except FileNotFoundError:
            locked = None if create else False  # no such folder; or somebody was faster and has removed it
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = os.path.samestat(os.fstat(handle), os.lstat(path))  # not if it was renamed while we waited
        except (BlockingIOError, FileNotFoundError):
            locked = False
    try:
        yield locked
    finally:
        if handle >= 0:
            os.close(handle)


def _remove_dead(path: Path) -> None:
    """Remove a hidden file or folder unless a living process holds it."""
    with _locked(path) as locked:
        if locked:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


# --- tensors ---------------------------------------------------------------------------------------------------
def read_tensors(path: FileName, *, error: type[DvqError] = EngineError) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.safetensors`` file, in the order of their names.

    Raises:
        error: the file is missing, damaged, or holds a number format that numpy lacks.
    """
    mend = "copy or export it again"
    with guard(error, f"cannot read {path}", mend), open_regular(path) as file:
        data = file.read()
    with guard(error, f"{path} is not a whole safetensors file", mend):
        return _parse_tensors(data)


def _parse_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > min(len(data), MAX_HEADER_BYTES):
        raise ValueError(f"the header should end at byte {start} of {len(data)}")
    entries = parse_json(data[8:start])
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
        if not all(
            isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in (shape, span)
        ):
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


def write_tensors(path: FileName, tensors: Mapping[str, NDArray[Any]]) -> None:
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
    write_file(path, b"".join([len(text).to_bytes(8, "little"), text, *parts]))
