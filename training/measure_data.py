"""How fast training batches are read, and what memory that takes: ``python -m training.measure_data DATA``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

from runtimes.errors import ConfigError
from training.cli import guarded
from training.data.folder import ImageFolder
from training.data.stream import CROPS, Augment, batches

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
"""Of /proc, in a second."""


def used() -> tuple[float, float]:
    """Resident memory in MB and processor time in s of this process and its workers by /proc, NaN where there is none.
    Memory that they share counts in each."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    megabytes = seconds = 0.0
    try:
        for pid in pids:
            status, stat = (Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8") for name in ("status", "stat"))
            megabytes += int(status.split("VmRSS:")[1].split()[0]) / 1024
            seconds += sum(map(int, stat.rpartition(")")[2].split()[11:13])) / TICKS
    except OSError:
        return float("nan"), float("nan")
    return megabytes, seconds


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.measure_data",
        description="Read the training batches of a data set as a training does, without a model.",
    )
    parser.add_argument("data", help="folder of images, list of paths, or tar shards")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--workers", type=int, default=0, help="as training.workers")
    parser.add_argument("--crop", choices=CROPS, default="centre", help="as training.crop")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise ConfigError(f"--epochs is {args.epochs}; choose 1 or more")
    began = time.perf_counter()
    folder = ImageFolder(args.data, args.size)
    print(f"{len(folder)} images listed in {time.perf_counter() - began:.1f} s, {used()[0]:.0f} MB", flush=True)
    augment = Augment(flip=True, crop=args.crop)
    stream = batches(folder, folder.train, args.batch, seed=0, augment=augment, workers=args.workers)
    next(stream)  # the workers have started
    steps = max(1, len(folder.train) // args.batch // 4)
    for part in range(4 * args.epochs):
        began, before = time.perf_counter(), used()[1]
        for _ in range(steps):
            next(stream)
        wall, (memory, after) = time.perf_counter() - began, used()
        images = steps * args.batch
        cost = 1000 * (after - before) / images
        speed = f"{images / wall:.0f} images/s, {cost:.2f} ms of processor time an image"
        print(f"epoch {(part + 1) / 4:.2f}: {speed}, {memory:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
