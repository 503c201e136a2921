"""Where images come from: files of a folder or a list, or samples of shards."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dvq_rt.files import read_json
from runtimes.errors import DataError, guard
from training.data.listing import list_images
from training.data.shards import Shards, is_shards
from training.data.texts import Texts


class Source(Protocol):
    """N encoded images.

    Attributes:
        base: the folder that holds them.
        names: path of each below ``base``, with ``/``; whole if it lies elsewhere; of shards ``SHARD/MEMBER``.
        classes: the label names.
        labels: int64 [N], in 0 .. len(classes) - 1.
    """

    base: Path
    names: Texts
    classes: list[str]
    labels: npt.NDArray[np.int64]

    def open(self, index: int) -> Path | io.BytesIO:
        """The encoded image, as ``dvq_rt.images.open_rgb`` takes it; DataError where it cannot be read."""

    def size(self, index: int) -> int:
        """Bytes of the encoded image; DataError where it is not there any more."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts that describe an image; () where there are none."""


class Files:
    """The files of a folder or a list, see ``list_images``; captions from ``base/captions.json``, if that is there: an
    object from name to a text or a list of texts.

    Raises:
        DataError: see ``list_images``; or ``captions.json`` is malformed.
    """

    def __init__(self, root: Path, labels: Mapping[str, Sequence[str]] | None, exclude: Sequence[str]) -> None:
        listed = list_images(root, labels, exclude)
        self.base = root if root.is_dir() else root.parent
        self.classes = list(listed)
        self.names = Texts(self._relative(path) for paths in listed.values() for path in paths)
        self.labels = np.repeat(np.arange(len(listed), dtype=np.int64), [len(paths) for paths in listed.values()])
        self._captions = _read_captions(self.base)

    def open(self, index: int) -> Path:
        return self.base / self.names[index]

    def size(self, index: int) -> int:
        path = self.open(index)
        with guard(DataError, f"cannot read {path}"):
            return path.stat().st_size

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions.get(self.names[index], ())

    def _relative(self, path: Path) -> str:
        return (path.relative_to(self.base) if path.is_relative_to(self.base) else path).as_posix()


def open_source(
    root: str | os.PathLike[str], labels: Mapping[str, Sequence[str]] | None, exclude: Sequence[str]
) -> Source:
    """The images of a folder, a list or shards; errors as of ``Files`` and ``Shards``."""
    return Shards(os.fspath(root), labels, exclude) if is_shards(root) else Files(Path(root), labels, exclude)


def _read_captions(base: Path) -> dict[str, tuple[str, ...]]:
    """``captions.json``, or nothing when there is none."""
    path = base / "captions.json"
    if not os.path.lexists(path):
        return {}
    captions: Any = read_json(path, error=DataError, mend="mend or remove it", most=1 << 30)
    known: dict[str, Any] = captions if isinstance(captions, dict) else {"": None}
    several: dict[str, list[str]] = {name: [text] if isinstance(text, str) else text for name, text in known.items()}
    if not all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in several.values()):
        raise DataError(f"{path} must be one JSON object from relative path to text or texts; mend or remove it")
    return {name: tuple(texts) for name, texts in several.items()}
