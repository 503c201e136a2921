"""Images for training: any folder with one sub-folder per class, listed, split into training and held out, decoded."""

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
from PIL import Image
from tqdm import tqdm

from runtimes.errors import DataError
from training.data.pixels import SUFFIXES, Pixels, decode, header_is_good

Indices = npt.NDArray[np.int64]
Batch = tuple[Pixels, Indices]

NAMED = 5  # how many files a warning or an error names


class ImageFolder:
    """The images under ``root/<sub-folder>/``, decoded on demand to squares of ``size`` pixels.

    Files are found by their suffix (``SUFFIXES``) at any depth below a sub-folder; hidden ones and other suffixes are
    ignored. Files whose header cannot be read are left out with one warning that counts them.

    Attributes:
        classes: the label names; ``labels`` counts along this list.
        paths: the N image files.
        labels: int64 [N], in 0 .. len(classes) - 1.
        train, val: int64, ascending indices into ``paths`` that share none and together are all. The split hashes each
            file's path below ``root`` with the seed, so other files hardly matter to it. With ``val_fraction`` > 0
            every class of 10 images or more has one in ``val``; every class has one in ``train``.
        captions: path below ``root`` (with ``/``) to text, from ``captions.json``; empty without that file.
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
        cache_bytes: int = 2 << 30,
    ) -> None:
        """List the folder.

        Args:
            root: the folder; it is only read.
            size: side of the decoded images, 1 to 4096 pixels.
            val_fraction: share of the images held out, 0 <= val_fraction < 1.
            seed: of the split.
            labels: label name to the sub-folders it joins, ``["*"]`` joins all, others are left out; None: each
                sub-folder, sorted, is one.
            cache_bytes: decoded images are kept in memory until they fill this.

        Raises DataError when the folder is missing, holds no class folders or no readable image, a label stays empty,
        ``labels`` names a sub-folder that is not there or names one twice, ``captions.json`` is malformed, or ``size``
        or ``val_fraction`` is out of range.
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

        groups = _groups(self.root, labels)
        self.classes = list(groups)
        candidates = [(path, label) for label, name in enumerate(groups) for path in _files(self.root, groups[name])]
        kept: list[tuple[Path, int]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # too large: counted below like the others
            for path, label in tqdm(candidates, desc="checking images", unit="image", delay=3, leave=False):
                if header_is_good(path):
                    kept.append((path, label))
                else:
                    self.unreadable.append(path)
        self.report_unreadable()
        self.paths = [path for path, _ in kept]
        self.labels: Indices = np.array([label for _, label in kept], dtype=np.int64)
        counts = np.bincount(self.labels, minlength=len(self.classes))
        _check_counts(self.root, groups, counts, len(candidates))
        self.train, self.val = self._split(val_fraction, seed)
        self.captions = _captions(self.root)

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.paths)

    def relative(self, index: int) -> str:
        """The path of image ``index`` below ``root``, with ``/``."""
        return self.paths[index].relative_to(self.root).as_posix()

    def caption(self, index: int) -> str | None:
        """The caption of image ``index``, None without one."""
        return self.captions.get(self.relative(index))

    def pixels(self, index: int) -> Pixels:
        """Image ``index`` as read-only uint8 [size, size, 3]: RGB, on white, upright, the centre square.

        The shorter side becomes ``size`` (Lanczos). 16-bit values are scaled to 8 bits, floats count as 0 .. 1. Raises
        DataError naming the file when it cannot be decoded; ``load`` and ``batches`` skip such files instead.
        """
        index = int(index)
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        path = self.paths[index]
        try:
            pixels = decode(path, self.size)
        except Exception as error:  # Pillow's readers raise nearly anything on broken bytes
            with self._lock:
                if path not in self.unreadable:
                    self.unreadable.append(path)
            raise DataError(f"cannot decode {path}: {error}; replace or remove the file") from error
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


def _groups(root: Path, labels: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    """Label name to sub-folder names, checked against what ``root`` holds."""
    if not root.exists():
        raise DataError(f"the image folder {root} does not exist; check the path")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give the folder that holds one sub-folder of images per class")
    try:
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list {root}: {error}; make it readable") from error
    if not there:
        raise DataError(f"{root} has no sub-folders; put the images of each class into a sub-folder named after it")
    if labels is None:
        return {name: [name] for name in there}
    groups = {label: there if list(names) == ["*"] else list(names) for label, names in labels.items()}
    if not groups:
        raise DataError(f"labels is empty; name at least one label, or pass None to make each sub-folder of {root} one")
    listed = [name for names in groups.values() for name in names]
    unknown = sorted(set(listed) - set(there))
    if unknown:
        raise DataError(f"labels names {some(unknown)}, which {root} lacks; its sub-folders are {some(there, 200)}")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"labels names {some(twice)} more than once; give each sub-folder to one label")
    return groups


def _files(root: Path, names: Sequence[str]) -> list[Path]:
    """The image files below the sub-folders, by suffix, sorted."""

    def fail(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error}; make it readable") from error

    files: list[Path] = []
    for name in names:
        for folder, inner, members in os.walk(root / name, onerror=fail):
            inner[:] = [each for each in inner if not each.startswith(".")]
            files += [
                Path(folder, each)
                for each in members
                if os.path.splitext(each)[1].lower() in SUFFIXES and not each.startswith(".")
            ]
    return sorted(files)


def _check_counts(root: Path, groups: Mapping[str, Sequence[str]], counts: npt.NDArray[np.intp], files: int) -> None:
    """DataError unless every label has an image."""
    kinds = " ".join(sorted(SUFFIXES))
    if counts.sum() == 0:
        raise DataError(f"{root}: no readable image among {files} candidates; its sub-folders need images ({kinds})")
    empty = [name for name, count in zip(groups, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{root}: no readable image for {some(empty)}; add images ({kinds}) or leave the class out")


def _captions(root: Path) -> dict[str, str]:
    """``captions.json``, or nothing when there is none."""
    path = root / "captions.json"
    try:
        text = path.read_text(encoding="utf-8")
        captions = json.loads(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; mend or remove it") from error
    if not isinstance(captions, dict) or not all(isinstance(value, str) for value in captions.values()):
        raise DataError(f"{path} must be one JSON object from relative path to text; mend or remove it")
    return captions


def _hash_uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6]) / (1 << 48)


def some(names: Sequence[str], most: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
