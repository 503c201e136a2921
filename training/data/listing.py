"""Which image files a data set has, and of which class: a folder of sub-folders, a flat folder, or a list of paths."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dvq_rt.files import open_regular
from runtimes.errors import DataError, guard, short

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"})
LISTS = frozenset({".txt", ".tsv", ".lst"})
MAX_LIST_BYTES = 1 << 30
NAMED = 5  # how many files a warning or an error names


def list_images(
    root: Path, labels: Mapping[str, Sequence[str]] | None = None, exclude: Sequence[str] = ()
) -> dict[str, list[Path]]:
    """The candidates of each label, by their suffix (``SUFFIXES``); none of them is opened.

    - A folder with sub-folders: each is a class, with the images at any depth below it.
    - A folder without: its images are of the one class "".
    - A file of ``LISTS``, UTF-8: a path on each line, which starts at the file's folder, and behind a tab its class, or
      nowhere one, then they are of the class "". Empty lines and those that start with ``#`` count for nothing.

    Hidden files and folders, and what macOS adds to archives (``__MACOSX``), are ignored.

    Args:
        root: folder or list.
        labels: label name to the classes that it joins, in which ``flat-*`` stands for all that begin so; ``["*"]``
            joins all that no other label names; None: each class, sorted, is one.
        exclude: classes that are left out before.

    Raises:
        DataError: ``root`` is none of these, ``labels`` or ``exclude`` name a class that is not there, or ``labels``
            names one twice or none.
    """
    listed: dict[str, list[Path]] | None = None
    if not root.exists():
        raise DataError(f"the image folder {root} does not exist; check the path")
    if root.is_dir():
        there = _sub_folders(root)
    elif root.suffix.lower() in LISTS:
        listed = _read_list(root)
        there = sorted(listed)
    else:
        raise DataError(
            f"{root} is a file; give the folder that holds the images, or a list of them ({' '.join(sorted(LISTS))})"
        )
    groups = choose_classes(root, there, labels, exclude)

    def files(name: str) -> list[Path]:
        return _files(root / name) if listed is None else listed[name]

    return {label: sorted(path for name in names for path in files(name)) for label, names in groups.items()}


def some(names: Sequence[str], most: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def choose_classes(
    root: Path | str, there: Sequence[str], labels: Mapping[str, Sequence[str]] | None, exclude: Sequence[str]
) -> dict[str, Sequence[str]]:
    """Label name to names of the classes that are ``there``; arguments and errors as for ``list_images``."""
    if unknown := sorted(set(exclude) - set(there)):
        raise DataError(f"exclude names {some(unknown)}, which {root} lacks; its classes are {some(there, 200)}")
    there = [name for name in there if name not in set(exclude)]
    if labels is None:
        return {name: [name] for name in there}
    groups: dict[str, Sequence[str]] = {label: _matching(there, names) for label, names in labels.items()}
    named = {name for names in groups.values() for name in names}
    groups = {
        label: [n for n in there if n not in named] if names == ["*"] else names for label, names in groups.items()
    }
    if not groups:
        raise DataError(f"labels is empty; name at least one label, or pass None to make each class of {root} one")
    listed = [name for names in groups.values() for name in names]
    unknown = sorted(set(listed) - set(there))
    if unknown:
        raise DataError(f"labels names {some(unknown)}, which {root} lacks; its classes are {some(there, 200)}")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"labels names {some(twice)} more than once; give each class to one label")
    return groups


def _matching(there: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names of classes, in which ``flat-*`` stands for those of ``there`` that begin so, if there are any."""
    begin = {name: [n for n in there if n.startswith(name[:-1])] for name in names if name[:-1] and name[-1] == "*"}
    return [found for name in names for found in begin.get(name) or [name]]


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not _ignored(name)


def _sub_folders(root: Path) -> list[str]:
    """The names of the classes of a folder, sorted: its sub-folders, or "" where it has none."""
    with guard(DataError, f"cannot list {root}", "make it readable"):
        entries = list(root.iterdir())
    there = sorted(entry.name for entry in entries if entry.is_dir() and not _ignored(entry.name))
    beside = sorted(entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir())
    if there and beside:
        warnings.warn(
            f"{len(beside)} image(s) directly in {root} are left out ({some(beside)}), since it has sub-folders; "
            "move them into one",
            stacklevel=4,
        )
    return there or [""]


def _files(folder: Path) -> list[Path]:
    """The image files below a folder, by suffix."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error}; make it readable") from error

    files: list[Path] = []
    for place, inner, members in os.walk(folder, onerror=fail):
        inner[:] = [name for name in inner if not _ignored(name)]
        files += [Path(place, name) for name in members if _is_image(name)]
    return files


def _read_list(path: Path) -> dict[str, list[Path]]:
    """Class name to files of a list."""
    with guard(DataError, f"the list {path} cannot be read"), open_regular(path, MAX_LIST_BYTES) as file:
        lines = file.read(MAX_LIST_BYTES).decode("utf-8-sig").splitlines()
    rows = [line.rstrip().partition("\t") for line in lines if line.strip() and not line.startswith("#")]
    if not rows:
        raise DataError(f"the list {path} names no image; write a path on each line, and a class behind a tab")
    if len({bool(tab) for _, tab, _ in rows}) > 1:
        lacking = next(name for name, tab, _ in rows if not tab)
        raise DataError(f"the list {path} has a class behind some paths and none behind {short(lacking)}; give all one")
    classes: dict[str, list[Path]] = {}
    for name, _, label in rows:
        classes.setdefault(label.strip(), []).append(path.parent / name)
    times = Counter(file for members in classes.values() for file in members)
    if twice := sorted(str(file) for file, count in times.items() if count > 1):
        raise DataError(f"the list {path} names {some(twice)} more than once; name each image once")
    return classes
