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


def resident_megabytes() -> float:
    """Memory of this process and its worker processes by /proc; NaN where there is none. Shared pages count in each."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    try:
        texts = [Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for pid in pids]
    except OSError:
        return float("nan")
    return sum(int(text.split("VmRSS:")[1].split()[0]) for text in texts) / 1024


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
    print(
        f"{len(folder)} images listed in {time.perf_counter() - began:.1f} s; {resident_megabytes():.0f} MB", flush=True
    )
    augment = Augment(flip=True, crop=args.crop)
    stream = batches(folder, folder.train, args.batch, seed=0, augment=augment, workers=args.workers)
    parts = 4 * args.epochs
    steps = max(1, len(folder.train) // args.batch // 4)
    for part in range(parts):
        began = time.perf_counter()
        for _ in range(steps):
            next(stream)
        speed = steps * args.batch / (time.perf_counter() - began)
        print(f"epoch {(part + 1) / 4:.2f}: {speed:.0f} images/s, {resident_megabytes():.0f} MB", flush=True)


if __name__ == "__main__":
    main()
