"""The codes of a data set, on the disk: ``python -m training.tokenize DATA --tokenizer CKPT --out CODES``."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvq_rt.progress import progress_bar
from runtimes.errors import ConfigError, DataError, guard
from training.checkpoint import load_tokenizer
from training.cli import guarded
from training.config import read_config
from training.data.codes import Part, Tokenization, begin
from training.train_transformer import SECTIONS, tokenization

RAY_STORE = 256 << 20
"""Bytes of shared memory for a Ray that is started here; what is sent through it is small."""


def write_in_turn(work: Tokenization, out: Path, parts: list[Part]) -> Iterator[int]:
    """Write parts in this process; the number of images after each."""
    work.tokenizer.to(device_here())
    for part in parts:
        work.write(out, part)
        yield part.count


def write_in_processes(work: Tokenization, out: Path, parts: list[Part], workers: int) -> Iterator[int]:
    """Write parts in worker processes; the number of images after each.

    Raises:
        DataError: a part cannot be written, or a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (work, out)) as pool:
        try:
            for written in as_completed([pool.submit(_write, part) for part in parts]):
                yield written.result()
        except BrokenProcessPool as error:
            raise DataError("a worker process was killed; the same command goes on") from error
        finally:
            pool.shutdown(cancel_futures=True)


_of_this_worker: list[tuple[Tokenization, Path]] = []


def _start(work: Tokenization, out: Path) -> None:
    torch.set_num_threads(1)
    work.tokenizer.to(device_here())
    _of_this_worker[:] = [(work, out)]


def _write(part: Part) -> int:
    work, out = _of_this_worker[0]
    work.write(out, part)
    return part.count


def write_on_ray(work: Tokenization, out: Path, parts: list[Part], workers: int) -> Iterator[int]:
    """Write parts on a Ray cluster ($RAY_ADDRESS, otherwise one that is started on this machine), where every machine
    must see the images and ``out`` under the same paths; the number of images after each.

    Raises:
        ConfigError: the package ray is missing.
        DataError: a part cannot be written.
    """
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ConfigError("--ray needs the package ray: pip install 'dvq-rt[ray]'") from error
    address = os.environ.get("RAY_ADDRESS", "local")
    here = {"num_cpus": workers, "object_store_memory": RAY_STORE, "include_dashboard": False}
    with guard(DataError, f"Ray cannot be started ({address})"):
        ray.init(address=address, log_to_driver=False, **(here if address == "local" else {}))
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one here
    try:
        rows = ray.data.from_items([{"part": number} for number in range(len(parts))], override_num_blocks=len(parts))
        written = rows.map(
            RayWriter,
            fn_constructor_args=(work, out, parts),
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        for row in written.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield row["images"]
    finally:
        ray.shutdown()


class RayWriter:
    """Writes parts in an actor of Ray."""

    def __init__(self, work: Tokenization, out: Path, parts: list[Part]) -> None:
        torch.set_num_threads(1)
        work.tokenizer.to(device_here())
        self.work, self.out, self.parts = work, out, parts

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = self.parts[row["part"]]
        try:
            self.work.write(self.out, part)
        except DataError as error:
            return {"images": 0, "error": str(error)}
        return {"images": part.count, "error": ""}


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.tokenize",
        description="Write the codes of a data set, for train_transformer --codes. A command that was killed goes on "
        "with what it lacks; several may run at once (torchrun).",
    )
    parser.add_argument("data", help="folder of images, list of paths, or tar shards")
    parser.add_argument("--tokenizer", required=True, help="checkpoint folder of stage 1")
    parser.add_argument("--out", required=True, help="folder of codes")
    parser.add_argument("--config", default="emoji_transformer", help="the configuration of train_transformer")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--copies", type=int, help="augmented copies of the training images; as stage.copies")
    parser.add_argument("--shard-size", type=int, default=4096, help="images in a file")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 does it in this one")
    parser.add_argument("--ray", action="store_true", help="have Ray Data start the workers")
    args = parser.parse_args(argv)
    config = read_config(args.config, SECTIONS, args.set)
    stage = config["stage"] if args.copies is None else replace(config["stage"], copies=args.copies)
    if args.workers < 0 or (args.ray and args.workers < 1):
        raise ConfigError(f"--workers is {args.workers}; choose {1 if args.ray else 0} or more")
    out = Path(args.out)
    vae = load_tokenizer(args.tokenizer).requires_grad_(False)
    work = tokenization(args.data, vae, config["training"], stage, args.shard_size)
    begin(out, work)
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = work.parts()[process::processes]
    if args.ray:
        written = write_on_ray(work, out, parts, args.workers)
    elif args.workers:
        written = write_in_processes(work, out, parts, args.workers)
    else:
        written = write_in_turn(work, out, parts)
    count = sum(part.count for part in parts)
    with progress_bar(total=count, desc="tokenizing", unit="image", disable=process > 0) as bar:
        for images in written:
            bar.update(images)
    print(out)


def device_here() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


if __name__ == "__main__":
    main()
