"""Images for training: listed, split into training and held out, decoded."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dvq_rt.files import read_json
from dvq_rt.images import image_size, open_rgb, square
from dvq_rt.progress import progress_bar
from runtimes.errors import DataError
from training.data.listing import SUFFIXES, list_images, some
from training.data.pixels import Pixels

Indices = npt.NDArray[np.int64]
Batch = tuple[Pixels, Indices]


class ImageFolder:
    """The images of a folder or a list (see ``list_images``), decoded on demand to squares of ``size`` pixels.

    Files whose header cannot be read are left out with one warning that counts them.

    Attributes:
        classes: the label names; ``labels`` counts along this list.
        paths: the N image files.
        labels: int64 [N], in 0 .. len(classes) - 1.
        train, val: int64, ascending indices into ``paths`` that share none and together are all. The split hashes each
            file's path below ``base`` with the seed, so other files hardly matter to it. With ``val_fraction`` > 0
            every class of 10 images or more has one in ``val``; every class has one in ``train``.
        captions: path below ``base`` (with ``/``) to text, from ``base/captions.json``; empty without that file.
        base: the folder, or the one of the list.
        unreadable: the files that were left out so far.
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
        cache_bytes: int = 2 << 30,
    ) -> None:
        """List the folder.

        Args:
            root: the folder or list; it is only read.
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
        self.root = Path(root)
        self.size = size
        self.unreadable: list[Path] = []
        self._reported = 0
        self._cache: dict[int, Pixels] = {}
        self._cache_room = cache_bytes // (3 * size * size)
        self._lock = threading.Lock()

        listed = list_images(self.root, labels, exclude)
        self.base = self.root if self.root.is_dir() else self.root.parent
        self.classes = list(listed)
        candidates = [(path, label) for label, paths in enumerate(listed.values()) for path in paths]
        kept: list[tuple[Path, int]] = []
        for path, label in progress_bar(candidates, desc="checking images", unit="image", delay=3, leave=False):
            try:
                image_size(path, error=DataError)
                kept.append((path, label))
            except DataError:
                self.unreadable.append(path)
        self.report_unreadable()
        self.paths = [path for path, _ in kept]
        self.labels: Indices = np.array([label for _, label in kept], dtype=np.int64)
        counts = np.bincount(self.labels, minlength=len(self.classes))
        _check_counts(self.root, self.classes, counts, len(candidates))
        self.train, self.val = self._split(val_fraction, seed)
        self.captions = _captions(self.base)

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.paths)

    @property
    def cached(self) -> int:
        """The number of images kept in memory."""
        return len(self._cache)

    def relative(self, index: int) -> str:
        """The path of image ``index`` below ``base``, with ``/``; whole if it lies elsewhere."""
        path = self.paths[index]
        return (path.relative_to(self.base) if path.is_relative_to(self.base) else path).as_posix()

    def caption(self, index: int) -> str | None:
        """The caption of image ``index``, None without one."""
        return self.captions.get(self.relative(index))

    def pixels(self, index: int) -> Pixels:
        """The centre square of image ``index`` as read-only uint8 [size, size, 3]; see ``dvq_rt.images.open_rgb``.

        Raises DataError naming the file when it cannot be decoded; ``load`` and ``batches`` skip such files instead.
        """
        index = int(index)
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        path = self.paths[index]
        try:
            pixels = square(open_rgb(path, error=DataError), self.size)
        except DataError:
            with self._lock:
                if path not in self.unreadable:
                    self.unreadable.append(path)
            raise
        pixels.setflags(write=False)
        with self._lock:
            if len(self._cache) < self._cache_room:
                self._cache[index] = pixels
        return pixels

    def load(self, indices: Sequence[int] | Indices) -> Batch:
        """Several images, without augmentation: uint8 [M, size, size, 3] and the int64 [M] indices that were readable.

        Files that cannot be decoded are left out with one warning that counts them.
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
        rows = sorted((self.relative(i), self.classes[label]) for i, label in enumerate(self.labels))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def report_unreadable(self) -> None:
        """Warn once, with a count and the first few names, of the unreadable files found since the last report."""
        with self._lock:
            fresh = self.unreadable[self._reported :]
            self._reported = len(self.unreadable)
        if fresh:
            names = some([str(path) for path in fresh])
            warnings.warn(f"{len(fresh)} unreadable image(s) left out: {names}", stacklevel=3)

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


def _check_counts(root: Path, classes: Sequence[str], counts: npt.NDArray[np.intp], files: int) -> None:
    """DataError unless every label has an image."""
    kinds = " ".join(sorted(SUFFIXES))
    if counts.sum() == 0:
        raise DataError(f"{root}: no readable image among {files} candidates; it needs images ({kinds})")
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{root}: no readable image for {some(empty)}; add images ({kinds}) or leave the class out")


def _captions(base: Path) -> dict[str, str]:
    """``captions.json``, or nothing when there is none."""
    path = base / "captions.json"
    if not os.path.lexists(path):
        return {}
    captions = read_json(path, error=DataError, mend="mend or remove it")
    if not isinstance(captions, dict) or not all(isinstance(value, str) for value in captions.values()):
        raise DataError(f"{path} must be one JSON object from relative path to text; mend or remove it")
    return captions


def _hash_uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6]) / (1 << 48)
