"""WebDataset shards: tar files in which ``KEY.jpg``, ``KEY.cls``, ``KEY.json`` and ``KEY.txt`` are one sample.

A shard is gone through once, for an index of where its members lie, which is kept in ``cache_folder()``. From then on
any image is read by its place, so shards are shuffled, shared and resumed as a folder is. What is not a local file
(``pipe:COMMAND``, or an address that webdataset opens) is sequential; it is copied into ``cache_folder()`` once.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvq_rt.files import open_regular, parse_json, write_file
from dvq_rt.progress import progress_bar
from runtimes.errors import DataError, guard, short
from training.data.listing import SUFFIXES, choose_classes, some
from training.data.texts import Texts

Places = npt.NDArray[np.int64]
PARTS = {"cls": 1, "cls.txt": 1, "json": 2, "txt": 3}
"""Members beside the image, by what follows the first dot of their names, and their column in ``Index.places``."""
CLASS_FIELDS, CAPTION_FIELDS = ("label", "cls", "class"), ("captions", "caption", "text")
VERSION = 1
"""Of the index files."""


def cache_folder() -> Path:
    """Where indices of shards and copies of piped ones are kept: ``$DVQ_CACHE``, or ``~/.cache/dvq-rt``."""
    return Path(os.environ.get("DVQ_CACHE") or Path.home() / ".cache" / "dvq-rt")


def is_shards(root: str | os.PathLike[str]) -> bool:
    """Whether a data set's name means shards: a ``.tar``, a pattern of them, a command or an address."""
    text = os.fspath(root)
    return _is_remote(text) or text.endswith(".tar")


def expand(root: str) -> list[str]:
    """The shards that a name means, in order: ``{00..12}`` and ``{a,b}`` as a shell expands them, ``*`` and ``?`` for
    local files, ``::`` between several names.

    Raises:
        DataError: a local one is not there, one is named twice, or the package webdataset is missing.
    """
    with guard(DataError, f"the shards {root} cannot be expanded"):
        names = _webdataset("shardlists").expand_urls(root)
    shards: list[str] = []
    for name in names:
        local = not _is_remote(name)
        found = sorted(glob.glob(name)) if local and glob.has_magic(name) else [name]
        if local and (not found or not os.path.isfile(found[0])):
            raise DataError(f"no shard {name}; check the path")
        shards += found
    if twice := sorted({name for name in shards if shards.count(name) > 1}):
        raise DataError(f"{some(twice)} is named more than once; name each shard once")
    return shards


@dataclass(frozen=True)
class Index:
    """Where the N samples of a shard lie.

    Attributes:
        names: the images' member names.
        classes: the class that a sample's ``.cls`` or ``.json`` names, "" without one.
        places: int64 [N, 4, 2], start and size in bytes of the image and of the parts in ``PARTS``; size -1 for none.
        early: why the shard is not whole, "" if it is.
    """

    names: Texts
    classes: Texts
    places: Places
    early: str

    def save(self, path: Path) -> None:
        """Write it as an ``.npz`` file."""
        arrays: dict[str, Any] = {"names": self.names.data, "name_ends": self.names.ends, "places": self.places}
        arrays |= {"classes": self.classes.data, "class_ends": self.classes.ends}
        file = io.BytesIO()
        np.savez(file, early=np.frombuffer(self.early.encode(), dtype=np.uint8), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, file.getvalue(), error=DataError)

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read what ``save`` wrote."""
        with open_regular(path) as file, np.load(file) as arrays:
            names = Texts.of_arrays(arrays["names"], arrays["name_ends"])
            classes = Texts.of_arrays(arrays["classes"], arrays["class_ends"])
            return cls(names, classes, arrays["places"], arrays["early"].tobytes().decode())


class Shards:
    """The samples of some shards, see ``training.data.sources.Source``.

    A sample's class is what its ``.cls`` (or ``.cls.txt``) holds, or the field ``label`` of its ``.json``; where no
    sample has these, the first folder of its key, or "" without one. Classes that are all numbers are in their order.
    Captions are the lines of ``.txt``, then the field ``caption`` (a text or several) of ``.json``.

    Raises:
        DataError: a shard cannot be read, only some samples have a class, or ``labels`` or ``exclude`` are wrong.
    """

    def __init__(self, root: str, labels: Mapping[str, Sequence[str]] | None, exclude: Sequence[str]) -> None:
        shards = expand(root)
        self.files: list[str] = []
        indices: list[Index] = []
        for shard in progress_bar(shards, desc="listing shards", unit="shard", delay=3, leave=False):
            path = _local(shard) if _is_remote(shard) else shard
            self.files.append(path)
            indices.append(index_of(path))
        copied = [
            f"{name}, copied to {file}," if name != file else name
            for name, file in zip(shards, self.files, strict=True)
        ]
        early = [f"{name} ({index.early})" for name, index in zip(copied, indices, strict=True) if index.early]
        if early:
            warnings.warn(
                f"{len(early)} shard(s) end early or are damaged; what is whole is used: {some(early)}", stacklevel=4
            )
        self.base = Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in self.files]))
        shown = [s if _is_remote(s) else os.path.relpath(s, self.base) for s in shards]
        names = [f"{name}/{member}" for name, i in zip(shown, indices, strict=True) for member in i.names]
        classes = _classes(names, [text for i in indices for text in i.classes], [m for i in indices for m in i.names])
        there = sorted(set(classes), key=int if all(re.fullmatch(r"\d{1,18}", c) for c in classes) else None)
        groups = choose_classes(root, there, labels, exclude)
        self.classes = list(groups)
        number = {name: label for label, joined in enumerate(groups.values()) for name in joined}
        found = np.array([number.get(name, -1) for name in classes], dtype=np.int64)
        chosen = np.argsort(found, kind="stable")[int((found < 0).sum()) :]
        self.labels = found[chosen]
        self.names = Texts(names[i] for i in chosen)
        self._shard = np.repeat(np.arange(len(indices)), [len(i.names) for i in indices])[chosen]
        self._places = np.concatenate([i.places for i in indices])[chosen]

    def open(self, index: int) -> io.BytesIO:
        """The encoded image."""
        return io.BytesIO(self._read(index, 0))

    def size(self, index: int) -> int:
        """Bytes of the encoded image."""
        return int(self._places[index, 0, 1])

    def captions(self, index: int) -> tuple[str, ...]:
        """Of one image; () without any."""
        found: list[str] = []
        if self._places[index, 3, 1] >= 0:
            found += [line.strip() for line in self._read(index, 3).decode("utf-8", "replace").splitlines()]
        if self._places[index, 2, 1] >= 0:
            value = _field(_fields(self._read(index, 2), self.names[index]), CAPTION_FIELDS)
            found += [str(text) for text in (value if isinstance(value, list) else [value]) if text is not None]
        return tuple(text for text in found if text)

    def _read(self, index: int, part: int) -> bytes:
        start, size = (int(number) for number in self._places[index, part])
        path = self.files[self._shard[index]]
        with guard(DataError, f"cannot read {self.names[index]}"), open(path, "rb") as file:
            file.seek(start)
            data = file.read(size)
            if len(data) != size:
                raise DataError(f"{path} has become shorter since it was listed; start again")
            return data


def index_of(path: str) -> Index:
    """The index of a local shard, which is made where ``cache_folder()`` has none of that path, size and time.

    Raises:
        DataError: it is no plain tar file, or holds no image.
    """
    with guard(DataError, f"cannot read the shard {path}"):
        status = os.stat(path)
    key = json.dumps([VERSION, os.path.abspath(path), status.st_size, status.st_mtime_ns])
    cached = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if cached.exists():
        with suppress(Exception):  # a damaged one is made again
            return Index.load(cached)
    index = _scan(path, status.st_size)
    try:
        index.save(cached)
    except (DataError, OSError) as error:
        warnings.warn(f"the index of {path} is not kept, so that it is made at every start: {error}", stacklevel=2)
    return index


def _scan(path: str, size: int) -> Index:
    """The index of a shard by its headers."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    images: dict[str, str] = {}
    early, last, end = "", "", 0
    mend = "give plain tar files; a compressed one has to be unpacked first, since it cannot be read at any place"
    with (
        guard(DataError, f"cannot list {path}", mend),
        tarfile.open(path, "r:") as tar,
        open(path, "rb") as raw,
    ):
        while True:
            try:
                member = tar.next()
            except tarfile.ReadError:
                break
            if member is None:
                break
            tar.members = []  # type: ignore[attr-defined] # it would keep them all
            end = member.offset_data + member.size if member.isfile() else member.offset_data
            if end > size:
                early = f"within {member.name}"
                break
            last = member.name
            key, suffix = _split(last)
            column = 0 if f".{suffix.rpartition('.')[2]}" in SUFFIXES else PARTS.get(suffix)
            if member.isfile() and column is not None:
                found.setdefault(key, {})[column] = (member.offset_data, member.size)
                if column == 0:
                    images[key] = last
        raw.seek(-(-end // 512) * 512)
        if not early and raw.read(512) != bytes(512):
            early = f"behind {last}" if last else "at its start"
        if not images:
            raise ValueError(f"no image in it{', it ends early' * bool(early)}")
        places = np.full((len(images), 4, 2), -1, dtype=np.int64)
        classes = []
        for row, (key, name) in enumerate(images.items()):
            for column, place in found[key].items():
                places[row, column] = place
            classes.append(_class(raw, places[row], name))
    return Index(Texts(images.values()), Texts(classes), places, early)


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: what is before and behind the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""


def _class(raw: io.BufferedReader, places: Places, name: str) -> str:
    """The class that a sample names itself, "" for none."""

    def read(part: int) -> bytes:
        raw.seek(int(places[part, 0]))
        return raw.read(int(places[part, 1]))

    if places[1, 1] >= 0:
        return read(1).decode("utf-8", "replace").strip()
    value = _field(_fields(read(2), name), CLASS_FIELDS) if places[2, 1] >= 0 else None
    return "" if value is None else str(value).strip()


def _fields(data: bytes, name: str) -> dict[str, object]:
    with guard(DataError, f"the .json beside {name} cannot be read"):
        value = parse_json(data)
        if not isinstance(value, dict):
            raise ValueError(f"it is {short(value)}, not an object of fields")
        return value


def _field(values: dict[str, object], names: Sequence[str]) -> object:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _classes(names: Sequence[str], told: list[str], members: Sequence[str]) -> list[str]:
    """The class of each sample."""
    if not any(told):
        return [name.removeprefix("./").rpartition("/")[0].split("/")[0] for name in members]
    if not all(told):
        lacking = [name for name, text in zip(names, told, strict=True) if not text]
        raise DataError(f"{len(lacking)} of {len(told)} samples have no class ({some(lacking)}); give all one or none")
    return told


# --- what is not a local file ----------------------------------------------------------------------------------
def _is_remote(name: str) -> bool:
    return name.startswith("pipe:") or "://" in name


def _local(address: str) -> str:
    """The copy of a shard that is not a local file; it is made once, by one process at a time, and appears whole."""
    folder = cache_folder()
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.tar"
    if path.exists():
        return str(path)
    with guard(DataError, f"cannot copy the shard {address} to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if not path.exists():
                part = path.with_suffix(".part")
                with _webdataset("gopen").gopen(address, "rb") as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                part.replace(path)
    return str(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file's lock, after whoever has it; where there are no locks, nothing is held."""
    with path.open("ab") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _webdataset(module: str) -> Any:
    try:
        return __import__(f"webdataset.{module}", fromlist=[module])
    except ImportError as error:
        raise DataError("shards need the package webdataset: pip install 'dvq-rt[train]'") from error
