"""An endless, resumable stream of augmented batches over an ImageFolder, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from runtimes.errors import DataError
from training.data.folder import Batch, ImageFolder, Indices
from training.data.listing import some
from training.data.pixels import Pixels


@dataclass(frozen=True, slots=True)
class Augment:
    """Random changes of a training image.

    Attributes:
        shift: most pixels of a random translation, in x and in y apart, which repeats the outermost ones; 0 for none.
        flip: mirror half of the images left to right.
        flip_exclude: names of classes that are never mirrored.
    """

    shift: int = 0
    flip: bool = False
    flip_exclude: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise DataError(f"Augment.shift is {self.shift}; choose 0 or more pixels")


def batches(
    folder: ImageFolder,
    indices: Sequence[int] | Indices,
    batch_size: int,
    *,
    seed: int,
    step: int = 0,
    augment: Augment | None = None,
    workers: int = 2,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """An endless stream of (images uint8 [B, size, size, 3], labels int64 [B]) over ``indices``.

    Each epoch visits every index once in a new order; a batch may span two epochs. The stream depends on ``seed`` and
    the files alone: started at ``step`` it goes on exactly as if it had run from 0, whatever ``workers`` is. In place
    of a file that cannot be decoded comes the next one in the epoch's order; one warning at the end of the epoch (or
    when the stream is closed) counts those files.

    Args:
        folder: where the images come from.
        indices: images to draw from, such as ``folder.train``; not empty, no repeats needed.
        batch_size: B, 1 or more.
        seed: 0 <= seed < 2**64.
        step: number of batches to leave out, 0 or more.
        augment: random changes, None for none.
        workers: threads that prepare batches ahead; 0 prepares them in the caller's thread.
        part: (r, w), of which the batches hold the rows r * B / w to (r + 1) * B / w alone.

    Raises DataError at once when an argument is out of range or ``augment`` excludes a class the folder lacks, and
    while running when no image of ``indices`` can be decoded.
    """
    augment = augment or Augment()
    pool = np.array(indices, dtype=np.int64)
    if pool.ndim != 1 or len(pool) == 0:
        raise DataError(f"{folder.root}: no images to draw batches from; add images or change val_fraction")
    if pool.min() < 0 or pool.max() >= len(folder):
        raise DataError(f"indices span {pool.min()} .. {pool.max()}; {folder.root} has 0 .. {len(folder) - 1}")
    for name, value, least in (("batch_size", batch_size, 1), ("step", step, 0), ("workers", workers, 0)):
        if value < least:
            raise DataError(f"{name} is {value}; choose {least} or more")
    if not 0 <= seed < 1 << 64:
        raise DataError(f"seed is {seed}; choose 0 <= seed < 2**64")
    if augment.shift >= folder.size:
        raise DataError(f"Augment.shift is {augment.shift}; choose less than the image size {folder.size}")
    unknown = sorted(augment.flip_exclude - set(folder.classes))
    if unknown:
        raise DataError(f"Augment.flip_exclude names {some(unknown)}; the classes are {some(folder.classes, 200)}")

    @lru_cache(maxsize=3)
    def order(epoch: int) -> Indices:
        return _rng(seed, epoch, None).permutation(pool)

    def item(serial: int) -> tuple[Pixels, int]:
        epoch, position = divmod(serial, len(pool))
        index, pixels = _first_readable(folder, order(epoch), position)
        label = int(folder.labels[index])
        flips = augment.flip and folder.classes[label] not in augment.flip_exclude
        return _augmented(pixels, augment, flips, _rng(seed, epoch, position)), label

    def batch(number: int) -> Batch:
        r, w = part
        items = [item(number * batch_size + row) for row in range(r * batch_size // w, (r + 1) * batch_size // w)]
        return np.stack([pixels for pixels, _ in items]), np.array([label for _, label in items], dtype=np.int64)

    def stream() -> Iterator[Batch]:
        epoch = step * batch_size // len(pool)
        try:
            with closing(_ahead(batch, step, workers)) as ahead:
                for number, made in enumerate(ahead, start=step + 1):
                    if number * batch_size // len(pool) > epoch:
                        epoch = number * batch_size // len(pool)
                        folder.report_unreadable()
                    yield made
        finally:
            folder.report_unreadable()

    return stream()


def _ahead(batch: Callable[[int], Batch], step: int, workers: int) -> Generator[Batch, None, None]:
    """``batch(step)``, ``batch(step + 1)``, ... in order, a few of them prepared ahead by threads."""
    if workers == 0:
        while True:
            yield batch(step)
            step += 1
    executor = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    try:
        waiting: deque[Future[Batch]] = deque()
        while True:
            while len(waiting) < 2 * workers:
                waiting.append(executor.submit(batch, step))
                step += 1
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _rng(seed: int, epoch: int, position: int | None) -> np.random.Generator:
    """The random numbers of one image's augmentation, or (position None) of one epoch's order."""
    words = [0, 0, 0, 1] if position is None else [0, 0, position, 0]
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(words, dtype=np.uint64)))


def _first_readable(folder: ImageFolder, order: Indices, position: int) -> tuple[int, Pixels]:
    """The first image from ``position`` on, around the epoch's order, that can be decoded: index and pixels."""
    for offset in range(len(order)):
        index = int(order[(position + offset) % len(order)])
        try:
            return index, folder.pixels(index)
        except DataError:
            continue
    raise DataError(f"{folder.root}: none of the {len(order)} images can be decoded; replace the files")


def _augmented(pixels: Pixels, augment: Augment, flips: bool, rng: np.random.Generator) -> Pixels:
    """uint8 [S, S, 3] in and out; always draws the same number of random numbers."""
    down, right = rng.integers(0, 2 * augment.shift + 1, size=2)
    mirrored = rng.random() < 0.5
    if augment.shift:
        around = ((augment.shift, augment.shift), (augment.shift, augment.shift), (0, 0))
        padded = np.pad(pixels, around, mode="edge")
        side = len(pixels)
        pixels = padded[down : down + side, right : right + side]
    return pixels[:, ::-1] if flips and mirrored else pixels
