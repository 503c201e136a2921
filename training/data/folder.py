"""Images for training: listed, split into training and held out, decoded."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvq_rt.images import image_size, open_rgb, square
from dvq_rt.progress import progress_bar
from runtimes.errors import DataError
from training.data.listing import SUFFIXES, some
from training.data.pixels import Pixels
from training.data.shards import Shards
from training.data.sources import open_source

Indices = npt.NDArray[np.int64]
Batch = tuple[Pixels, Indices]


class ImageFolder:
    """The images of a folder, a list or shards, decoded on demand to squares of ``size`` pixels.

    Files whose header cannot be read are left out with one warning that counts them. (Shards are not looked into
    before their images are decoded.)

    Attributes:
        root: what was given.
        classes: the label names; ``labels`` counts along this list.
        labels: int64 [N], in 0 .. len(classes) - 1.
        train, val: int64, ascending indices of images that share none and together are all. The split hashes each
            image's ``relative`` name with the seed, so other images hardly matter to it. With ``val_fraction`` > 0
            every class of 10 images or more has one in ``val``; every class has one in ``train``.
        base: the folder, or the one of the list or the shards.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int,
        *,
        val_fraction: float = 0.05,
        seed: int = 0,
        labels: Mapping[str, Sequence[str]] | None = None,
        exclude: Sequence[str] = (),
        cache_bytes: int = 256 << 20,
    ) -> None:
        """List the images.

        Args:
            root: the folder or list (see ``list_images``) or shards (see ``training.data.shards``); it is only read.
            size: side of the decoded images, 1 to 4096 pixels.
            val_fraction: share of the images held out, 0 <= val_fraction < 1.
            seed: of the split.
            labels, exclude: which classes are joined or left out, see ``list_images``.
            cache_bytes: decoded images are kept in memory until they fill this.

        Raises DataError when ``root``, ``labels`` or ``exclude`` are wrong (see ``list_images``), a label stays without
        a readable image, ``captions.json`` is malformed, or ``size`` or ``val_fraction`` is out of range.
        """
        if not 1 <= size <= 4096:
            raise DataError(f"size is {size}; choose 1 to 4096 pixels")
        if not 0 <= val_fraction < 1:
            raise DataError(f"val_fraction is {val_fraction}; choose 0 <= val_fraction < 1")
        self.root = root
        self.size = size
        self._unreadable: dict[str, None] = {}
        self._reported = 0
        self._cache: dict[int, Pixels] = {}
        self._cache_room = cache_bytes // (3 * size * size)
        self._lock = threading.Lock()

        self._source = open_source(root, labels, exclude)
        self.base, self.classes = self._source.base, self._source.classes
        self._rows = self._readable()
        self.labels: Indices = self._source.labels[self._rows]
        counts = np.bincount(self.labels, minlength=len(self.classes))
        _check_counts(self.root, self.classes, counts, len(self._source.names))
        self.train, self.val = self._split(val_fraction, seed)

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self._rows)

    @property
    def cached(self) -> int:
        """The number of images kept in memory."""
        return len(self._cache)

    @property
    def paths(self) -> list[Path]:
        """The N image files; of shards ``SHARD/MEMBER``."""
        return [self.base / self.relative(index) for index in range(len(self))]

    def relative(self, index: int) -> str:
        """The path of image ``index`` below ``base``, with ``/``; whole if it lies elsewhere."""
        return self._source.names[int(self._rows[index])]

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts that describe image ``index``; () where there are none."""
        return self._source.captions(int(self._rows[index]))

    def pixels(self, index: int, place: float = 0.5) -> Pixels:
        """A square of image ``index`` as read-only uint8 [size, size, 3]; see ``dvq_rt.images.square``.

        Raises DataError naming the file when it cannot be decoded; ``load`` and ``batches`` skip such files instead.
        """
        index = int(index)
        cached = self._cache.get(index) if place == 0.5 else None
        if cached is not None:
            return cached
        try:
            opened = self._source.open(int(self._rows[index]))
            pixels = square(open_rgb(opened, error=DataError), self.size, place)
        except DataError as error:
            path = str(self.base / self.relative(index))
            self.leave_out([path])
            raise error if path in str(error) else DataError(f"{path}: {error}") from error
        pixels.setflags(write=False)
        if place == 0.5:
            with self._lock:
                if len(self._cache) < self._cache_room:
                    self._cache[index] = pixels
        return pixels

    @property
    def unreadable(self) -> list[str]:
        """The files that were left out so far."""
        return list(self._unreadable)

    def leave_out(self, names: Iterable[str]) -> None:
        """Count files as unreadable; ``report_unreadable`` says so."""
        with self._lock:
            self._unreadable.update(dict.fromkeys(names))

    def check_readable(self) -> None:
        """Raises DataError when more than half of the images have turned out unreadable."""
        count, among = len(self._unreadable), len(self._source.names)
        if count > among / 2:
            raise DataError(
                f"{self.root}: {count} of {among} images cannot be decoded, more than half, such as "
                f"{some(self.unreadable)}; replace the files"
            )

    def at_size(self, size: int) -> ImageFolder:
        """The same images with the same split, decoded at another size, in 1 .. 4096 pixels."""
        other = copy.copy(self)  # without the decoded images
        other.size, other._cache_room = size, self._cache_room * self.size**2 // size**2
        return other

    def for_worker(self, workers: int) -> None:
        """Share the room for decoded images with the other ``workers`` of a pool, each of which has its own."""
        self._cache_room //= workers

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded images and the lock, for another process."""
        return {**self.__dict__, "_cache": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def load(self, indices: Sequence[int] | Indices) -> Batch:
        """Several images, without augmentation: uint8 [M, size, size, 3] and the int64 [M] indices that were readable.

        Files that cannot be decoded are left out with one warning that counts them; see ``check_readable``.
        """
        images: list[Pixels] = []
        kept: list[int] = []
        for index in indices:
            try:
                images.append(self.pixels(int(index)))
            except DataError:
                continue
            kept.append(int(index))
        self.report_unreadable()
        self.check_readable()
        stacked = np.stack(images) if images else np.empty((0, self.size, self.size, 3), dtype=np.uint8)
        return stacked, np.array(kept, dtype=np.int64)

    def chunks(self, indices: Indices, size: int) -> Iterator[Batch]:
        """``load`` of ``size`` indices at a time, without the chunks that hold no readable image."""
        for start in range(0, len(indices), size):
            images, kept = self.load(indices[start : start + size])
            if len(kept):
                yield images, kept

    def digest(self) -> str:
        """SHA-256 of which images there are and of which class, the pixels not included."""
        rows = sorted((self.relative(i), self.classes[label]) for i, label in enumerate(self.labels.tolist()))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @cached_property
    def sizes(self) -> Indices:
        """Bytes of each encoded image, int64 [N], when it was first asked for."""
        return np.array([self._source.size(row) for row in self._rows.tolist()], dtype=np.int64)

    def report_unreadable(self) -> None:
        """Warn once, with a count and the first few names, of the unreadable files found since the last report."""
        with self._lock:
            fresh = list(self._unreadable)[self._reported :]
            self._reported = len(self._unreadable)
        if fresh:
            warnings.warn(f"{len(fresh)} unreadable image(s) left out: {some(fresh)}", stacklevel=3)

    def check_held_out(self) -> None:
        """Leave images that cannot be decoded out of ``val``, with a warning that counts them.

        Raises DataError when none is left, where training needs images to validate on.
        """
        self.val = np.array([index for _, kept in self.chunks(self.val, 64) for index in kept], dtype=np.int64)
        if not len(self.val):
            raise DataError(
                f"none of the {len(self)} images of {self.root} is held out for validation; raise stage.val_fraction, "
                "or give every class at least 10 images"
            )

    def _readable(self) -> Indices:
        """Which files have a readable header: int64 indices into the source; all of those in shards."""
        names = self._source.names
        if isinstance(self._source, Shards):
            return np.arange(len(names), dtype=np.int64)
        kept = []
        for row in progress_bar(range(len(names)), desc="checking images", unit="image", delay=3, leave=False):
            try:
                image_size(self._source.open(row), error=DataError)
                kept.append(row)
            except DataError:
                self.leave_out([str(self.base / names[row])])
        self.report_unreadable()
        return np.array(kept, dtype=np.int64)

    def _split(self, val_fraction: float, seed: int) -> tuple[Indices, Indices]:
        """Train and validation indices, see the class."""
        draws = np.array([_hash_uniform(f"{seed}/{self.relative(index)}") for index in range(len(self))])
        held = draws < val_fraction
        for label in range(len(self.classes)):
            members = np.flatnonzero(self.labels == label)
            ordered = members[np.argsort(draws[members], kind="stable")]
            if val_fraction > 0 and len(members) >= 10:
                held[ordered[0]] = True
            held[ordered[-1]] = False
        return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def _check_counts(
    root: str | os.PathLike[str], classes: Sequence[str], counts: npt.NDArray[np.intp], files: int
) -> None:
    """DataError unless every label has an image."""
    kinds = " ".join(sorted(SUFFIXES))
    if counts.sum() == 0:
        raise DataError(f"{root}: no readable image among {files} candidates; it needs images ({kinds})")
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{root}: no readable image for {some(empty)}; add images ({kinds}) or leave the class out")


def _hash_uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6]) / (1 << 48)
