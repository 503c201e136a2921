"""Many texts in two arrays: a million names take a few megabytes, and worker processes share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt


class Texts(Sequence[str]):
    """An immutable sequence of texts.

    Attributes:
        data: uint8, all texts in UTF-8, one behind the other.
        ends: int64 [N], where each of them ends in ``data``.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        coded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.data: npt.NDArray[np.uint8] = np.frombuffer(b"".join(coded), dtype=np.uint8)
        self.ends: npt.NDArray[np.int64] = np.cumsum([len(text) for text in coded], dtype=np.int64)

    @classmethod
    def of_arrays(cls, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> Texts:
        """The texts that ``data`` and ``ends`` hold."""
        texts = cls()
        texts.data, texts.ends = data, ends
        return texts

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")
