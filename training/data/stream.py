"""Augmented batches over an ImageFolder, each a function of the seed and its number; and an endless stream of them
that threads or worker processes prepare ahead."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from runtimes.errors import DataError, guard
from training.data.folder import Batch, ImageFolder, Indices
from training.data.listing import some
from training.data.pixels import Pixels

CROPS = ("centre", "random")
THREADS = 2
"""That prepare batches where there are no worker processes."""


@dataclass(frozen=True, slots=True)
class Augment:
    """Random changes of a training image.

    Attributes:
        shift: most pixels of a random translation, in x and in y apart, which repeats the outermost ones; 0 for none.
        flip: mirror half of the images left to right.
        flip_exclude: names of classes that are never mirrored.
        flip_exclude_images: indices of images that are never mirrored.
        crop: which square of an oblong image is taken: ``centre``, or ``random``, anywhere along its longer side.
    """

    shift: int = 0
    flip: bool = False
    flip_exclude: frozenset[str] = frozenset()
    flip_exclude_images: frozenset[int] = frozenset()
    crop: str = "centre"

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise DataError(f"Augment.shift is {self.shift}; choose 0 or more pixels")
        if self.crop not in CROPS:
            raise DataError(f"Augment.crop is {self.crop!r}; choose one of {list(CROPS)}")


class Rows(NamedTuple):
    """A batch: ``images`` uint8 [B, size, size, 3], ``labels`` int64 [B], ``indices`` int64 [B] into the folder."""

    images: Pixels
    labels: Indices
    indices: Indices


class Batches:
    """Batch k of a seed, for any k; arguments and errors as for ``batches``."""

    def __init__(
        self,
        folder: ImageFolder,
        indices: Sequence[int] | Indices,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.folder, self.pool, self.augment = folder, np.array(indices, dtype=np.int64), augment or Augment()
        self.batch_size, self.seed, self.part = batch_size, seed, part
        self._orders: dict[int, Indices] = {}
        augment, pool = self.augment, self.pool
        if pool.ndim != 1 or len(pool) == 0:
            raise DataError(f"{folder.root}: no images to draw batches from; add images or change val_fraction")
        if pool.min() < 0 or pool.max() >= len(folder):
            raise DataError(f"indices span {pool.min()} .. {pool.max()}; {folder.root} has 0 .. {len(folder) - 1}")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; choose 1 or more")
        process, processes = part
        if not 0 <= process < processes:
            raise DataError(f"part is {part}; choose (number of the process, number of processes)")
        if batch_size % processes:
            raise DataError(
                f"batch_size {batch_size} cannot be shared by {processes} processes; choose a multiple of that"
            )
        if len(pool) < processes:
            raise DataError(f"{folder.root}: {len(pool)} images are fewer than the {processes} processes; start fewer")
        if not 0 <= seed < 1 << 64:
            raise DataError(f"seed is {seed}; choose 0 <= seed < 2**64")
        if augment.shift >= folder.size:
            raise DataError(f"Augment.shift is {augment.shift}; choose less than the image size {folder.size}")
        if unknown := sorted(augment.flip_exclude - set(folder.classes)):
            raise DataError(f"Augment.flip_exclude names {some(unknown)}; the classes are {some(folder.classes, 200)}")

    def batch(self, number: int) -> Rows:
        """Batch ``number``, or this process's rows of it.

        Raises DataError when no image can be decoded.
        """
        process, processes = self.part
        first = number * self.batch_size
        rows = range(process * self.batch_size // processes, (process + 1) * self.batch_size // processes)
        made = [self._image(first + row) for row in rows]
        indices = np.array([index for index, _ in made], dtype=np.int64)
        return Rows(np.stack([pixels for _, pixels in made]), self.folder.labels[indices], indices)

    def epoch(self, number: int) -> int:
        """How often all images were seen before batch ``number``."""
        return number * self.batch_size // len(self.pool)

    def _image(self, serial: int) -> tuple[int, Pixels]:
        """The image with this number in the stream: its index and its pixels."""
        epoch, position = divmod(serial, len(self.pool))
        changes = _changes(_rng(self.seed, epoch, position), self.augment)
        index, pixels = _first_readable(self.folder, self._order(epoch), position, changes.place)
        name = self.folder.classes[self.folder.labels[index]]
        fixed = name in self.augment.flip_exclude or index in self.augment.flip_exclude_images
        return index, _changed(pixels, self.augment, changes, self.augment.flip and not fixed)

    def _order(self, epoch: int) -> Indices:
        """In which the images of an epoch come."""
        order = self._orders.get(epoch)
        if order is None:
            order = _rng(self.seed, epoch, None).permutation(self.pool)
            self._orders = {**{n: old for n, old in self._orders.items() if n >= epoch - 1}, epoch: order}
        return order


def batches(
    folder: ImageFolder,
    indices: Sequence[int] | Indices,
    batch_size: int,
    *,
    seed: int,
    step: int = 0,
    augment: Augment | None = None,
    workers: int = 0,
    indexed: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """An endless stream of (images uint8 [B, size, size, 3], labels int64 [B]) over ``indices``.

    Each epoch visits every index once in a new order; a batch may span two epochs. The stream depends on ``seed`` and
    the files alone: started at ``step`` it goes on exactly as if it had run from 0, whatever ``workers`` is. In place
    of a file that cannot be decoded comes the next one in the epoch's order; one warning at the end of the epoch (or
    when the stream is closed) counts those files. See ``ImageFolder.check_readable`` for what ends the stream.

    Args:
        folder: where the images come from.
        indices: images to draw from, such as ``folder.train``; not empty, no repeats needed.
        batch_size: B, 1 or more.
        seed: 0 <= seed < 2**64.
        step: number of batches to leave out, 0 or more.
        augment: random changes, None for none.
        workers: processes that decode and prepare up to two batches each ahead; 0 leaves it to two threads of this one.
        indexed: give the images' indices in place of their labels.
        part: (number of this process, number of processes P). Process r gets rows r B / P .. (r + 1) B / P of each
            batch, so the processes together see what one sees alone.

    Raises DataError at once when an argument is out of range or ``augment`` excludes a class the folder lacks, and
    while running when no image of ``indices`` can be decoded, or a worker process dies.
    """
    for name, value in (("step", step), ("workers", workers)):
        if value < 0:
            raise DataError(f"{name} is {value}; choose 0 or more")
    source = Batches(folder, indices, batch_size, seed, augment, part)

    def stream() -> Iterator[Batch]:
        epoch = source.epoch(step)
        try:
            with closing(_in_processes(source, step, workers) if workers else _in_threads(source, step)) as ahead:
                for number, made in enumerate(ahead, start=step + 1):
                    folder.check_readable()
                    if source.epoch(number) > epoch:
                        epoch = source.epoch(number)
                        folder.report_unreadable()
                    yield made.images, made.indices if indexed else made.labels
        finally:
            folder.report_unreadable()

    return stream()


def _in_threads(source: Batches, step: int) -> Generator[Rows, None, None]:
    """Batches ``step``, ``step + 1``, ... in order, a few of them prepared ahead by threads."""
    executor = ThreadPoolExecutor(THREADS, thread_name_prefix="batches")
    try:
        waiting: deque[Future[Rows]] = deque()
        while True:
            while len(waiting) < 2 * THREADS:
                waiting.append(executor.submit(source.batch, step))
                step += 1
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class _Prepared(Dataset[Any]):
    """Batches by number for a DataLoader: tensors, and which files turned out unreadable; or an error's text."""

    def __init__(self, source: Batches) -> None:
        self.source = source
        self.known = 0

    def __getitem__(self, number: int) -> Any:
        try:
            made: Any = [torch.from_numpy(part) for part in self.source.batch(number)]
        except DataError as error:
            made = str(error)
        unreadable = self.source.folder.unreadable
        fresh, self.known = unreadable[self.known :], len(unreadable)
        return made, fresh


def _start_worker(number: int) -> None:
    info: Any = get_worker_info()
    info.dataset.source.folder.for_worker(info.num_workers)


def _in_processes(source: Batches, step: int, workers: int) -> Generator[Rows, None, None]:
    """``_in_threads`` with processes."""
    loader = DataLoader(
        _Prepared(source),
        batch_size=None,
        sampler=itertools.count(step),
        num_workers=workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # it draws a number, which must not be one of the training's
    )
    prepared = iter(loader)
    while True:
        with guard(DataError, "a process that prepares batches has ended", "the same command with --resume goes on"):
            made, unreadable = next(prepared)
        source.folder.leave_out(unreadable)
        if isinstance(made, str):
            raise DataError(made)
        yield Rows(*(part.numpy() for part in made))


def _rng(seed: int, epoch: int, position: int | None) -> np.random.Generator:
    """The random numbers of one image's augmentation, or (position None) of one epoch's order."""
    words = [0, 0, 0, 1] if position is None else [0, 0, position, 0]
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(words, dtype=np.uint64)))


def _first_readable(folder: ImageFolder, order: Indices, position: int, place: float) -> tuple[int, Pixels]:
    """The first image from ``position`` on, around the epoch's order, that can be decoded: index and pixels."""
    for offset in range(len(order)):
        index = int(order[(position + offset) % len(order)])
        try:
            return index, folder.pixels(index, place)
        except DataError:
            continue
    raise DataError(f"{folder.root}: none of the {len(order)} images can be decoded; replace the files")


class _Changes(NamedTuple):
    """What is drawn for one image, whatever of it the settings use."""

    down: int
    right: int
    mirrored: bool
    place: float


def _changes(rng: np.random.Generator, augment: Augment) -> _Changes:
    down, right = rng.integers(0, 2 * augment.shift + 1, size=2)
    mirrored = rng.random() < 0.5
    return _Changes(int(down), int(right), bool(mirrored), rng.random() if augment.crop == "random" else 0.5)


def _changed(pixels: Pixels, augment: Augment, changes: _Changes, flips: bool) -> Pixels:
    """uint8 [S, S, 3] in and out."""
    if augment.shift:
        around = ((augment.shift, augment.shift), (augment.shift, augment.shift), (0, 0))
        padded = np.pad(pixels, around, mode="edge")
        side = len(pixels)
        pixels = padded[changes.down : changes.down + side, changes.right : changes.right + side]
    return pixels[:, ::-1] if flips and changes.mirrored else pixels
