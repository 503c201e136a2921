"""Two processes train as one does, and a run that is killed goes on: measured, by hand, in some minutes.

    python tests/two_processes.py same      # 50 steps of each kind of run, with one process and with two
    python tests/two_processes.py kills     # ten kills of a two-process run
    python tests/two_processes.py full      # a two-process run into a disk that gets full (Linux, as root)

Prints what docs/training.md says. ``tests/stages/test_processes.py`` does less of it, fast.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent / "stages"), str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from small_runs import ADVERSARIAL, MASKED, STAGE_1, STAGE_2  # noqa: E402

from training import loop, processes, train_tokenizer, train_transformer  # noqa: E402
from training.checkpoint import load_training_state  # noqa: E402

JUDGED = ADVERSARIAL["stage"] | {"warmup_fraction": 0.2, "adversarial_start": 0.2}
AT_ONCE = JUDGED | {"warmup_fraction": 0}
FEATURE = STAGE_1["tokenizer"] | {"router": "feature", "router_norm_groups": 8, "dropout": 0.1}
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "DQ, entropy router, discriminator": ({**STAGE_1, "stage": JUDGED}, 1e-3),
    "DQ, feature router, dropout, discriminator": ({**STAGE_1, "tokenizer": FEATURE, "stage": JUDGED}, 1e-3),
    "MQ, discriminator": ({**MASKED, "stage": AT_ONCE}, 1e-4),
    "MQ, random scorer": ({**MASKED, "tokenizer": MASKED["tokenizer"] | {"scorer": "random"}}, 1e-4),
}
"""Stage 1, with learning rates; at step 10 of 50 the codebook (of MQ at once, but for the last) and the discriminator
start."""


def pictures(folder: Path) -> None:
    """Smooth random pictures of 16 pixels, two classes of 30."""
    rng = np.random.default_rng(0)
    for kind in ("warm", "cold"):
        (folder / kind).mkdir(parents=True)
        for i in range(30):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((16, 16), Image.Resampling.BICUBIC).save(folder / kind / f"{i:02}.png")


def job(name: str, config: dict[str, Any], work: Path, *settings: str, tokenizer: str = "") -> list[str]:
    """Arguments of a run into ``work/name``."""
    (work / f"{name}.json").write_text(json.dumps(config))
    base = [str(work / "data"), "--config", str(work / f"{name}.json"), "--out", str(work / name)]
    base += [word for setting in settings for word in ("--set", f"training.{setting}")]
    return base + (["--tokenizer", str(work / tokenizer / "best")] if tokenizer else [])


def together(count: int) -> list[dict[str, str]]:
    """What tells processes of each other, as torchrun does: environment variables of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    return [{k: str(v) for k, v in {**same, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(count)]


def run(count: int, jobs: list[list[str]], output: Path, every: int = 10) -> None:
    """Do jobs one after another, in processes of their own; the loop reads its numbers after so many steps."""
    command = [sys.executable, __file__, "worker", str(every), json.dumps(jobs)]
    with output.open("ab") as file:
        places: list[dict[str, str]] = together(count) if count > 1 else [{"OMP_NUM_THREADS": "1"}]
        made = [subprocess.Popen(command, env={**os.environ, **own}, stdout=file, stderr=file) for own in places]
    if any([process.wait() for process in made]):
        sys.exit(output.read_text()[-3000:])


def worker(every: int, jobs: list[list[str]]) -> None:
    loop.READ_EVERY = every
    torch.set_num_threads(1)
    leave, processes.leave = processes.leave, lambda: None
    for arguments in jobs:
        (train_transformer if "--tokenizer" in arguments else train_tokenizer).main(arguments)
    leave()


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["train"] for line in rows(folder / "log.jsonl")]


def difference(one: Path, two: Path) -> tuple[float, float]:
    """Largest relative difference of the loss, and of any scalar, over all steps."""
    pairs = list(zip(losses(one), losses(two), strict=True))
    largest = {k: max(abs(a[k] - b[k]) / max(abs(a[k]), 1e-6) for a, b in pairs if k in a) for k in pairs[-1][0]}
    return largest["loss"], max(largest.values())


def same(work: Path, steps: int = 50) -> None:
    settings = [f"{name}_every={steps}" for name in ("checkpoint", "validate", "picture")]
    settings += [f"steps={steps}"]
    names: dict[str, str] = {}
    for count in (1, 2):
        jobs = []
        for n, (kind, (config, rate)) in enumerate(KINDS.items()):
            jobs.append(job(f"{n}-{count}", config, work, *settings, f"lr={rate}"))
            names[kind] = str(n)
        for n, family in ((0, "DQ"), (2, "MQ")):
            two = {**STAGE_2, "stage": STAGE_2["stage"] | {"min_psnr": 0}}
            jobs.append(job(f"two{n}-{count}", two, work, *settings, "lr=0.001", "accumulate=2", tokenizer=f"{n}-1"))
            names[f"stage 2 of {family}, dropout, two parts a batch"] = f"two{n}"
        run(count, jobs, work / "output", 1)
    for kind, name in names.items():
        found = [f"{x:.1e}" for x in difference(work / f"{name}-1", work / f"{name}-2")]
        print(f"{kind:45} loss {found[0]}, any scalar {found[1]}", flush=True)


def kills(work: Path, count: int = 10) -> None:
    """Kill both processes at random moments, go on, and compare with a run that was left alone."""
    config = {**ADVERSARIAL, "training": STAGE_1["training"] | {"ema": 0.9, "checkpoint_every": 5, "keep_last": 2}}
    whole, cut = ([*job(name, config, work, "steps=160"), "--resume"] for name in ("whole", "cut"))
    ended(whole, work)
    rng, log = random.Random(1), work / "cut" / "log.jsonl"
    for n in range(count):
        before = len(rows(log))
        together = forked(cut, work / "output")
        while len(rows(log)) <= before:
            if not all(process.is_alive() for process in together):
                sys.exit((work / "output").read_text()[-2000:])
            time.sleep(0.2)
        last = json.loads(rows(log)[-1])
        time.sleep(rng.uniform(0, 5 * last["s"] / last["step"]))  # of about five steps
        for process in rng.sample(together, 2):
            process.kill()
            time.sleep(rng.uniform(0, 0.5))
        for process in together:
            process.join()
        step = load_training_state(work / "cut" / "checkpoint", tensors=False).step
        print(f"kill {n + 1}: with {len(rows(log))} rows in the log, the checkpoint of step {step}", flush=True)
    ended(cut, work)
    compare(work)


def full(work: Path) -> None:
    """Fill the disk of a run up at several places, make room, go on, and compare with a run that was left alone."""
    config = {**ADVERSARIAL, "training": STAGE_1["training"] | {"ema": 0.9, "checkpoint_every": 5}}
    whole, cut = ([*job(name, config, work, "steps=40"), "--resume"] for name in ("whole", "cut"))
    ended(whole, work)
    (work / "cut").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(work / "cut")]
    if subprocess.run(mount, check=False).returncode:
        sys.exit("no small disk can be mounted here: be root on Linux")
    try:
        filler = work / "cut" / "filler"
        for free in (0, 1_000_000, 3_000_000):
            disk = os.statvfs(work / "cut")
            filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - free)))
            output = work / f"output-{free}"
            codes = [process.join(600) or process.exitcode for process in forked(cut, output)]
            filler.unlink()
            begun = (work / "cut" / "checkpoint").exists()
            step = load_training_state(work / "cut" / "checkpoint", tensors=False).step if begun else None
            told = sorted({line for line in output.read_text().splitlines() if line.startswith("error: ")})
            print(f"{free} bytes free: exit codes {codes}, checkpoint of step {step}", *told, sep="\n  ", flush=True)
        ended(cut, work)
        compare(work)
    finally:
        subprocess.run(["umount", str(work / "cut")], check=False)


def ended(arguments: list[str], work: Path) -> None:
    """A job of two processes that has to come right."""
    for process in forked(arguments, work / "output"):
        process.join()
        if process.exitcode:
            sys.exit((work / "output").read_text()[-2000:])


def compare(work: Path) -> None:
    """Say whether two runs ended alike."""
    for name in ("model.safetensors", "training.safetensors"):
        one, two = (load_file(work / run / "checkpoint" / name) for run in ("whole", "cut"))
        print(name, "equal to the bit:", set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one))
    print("losses equal:", losses(work / "whole") == losses(work / "cut"))


def forked(arguments: list[str], output: Path) -> list[Any]:
    """Two processes that do one job together; as copies of this one, which spares them the imports."""
    places = together(2)

    def work(rank: int) -> None:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        os.environ |= places[rank]
        worker(10, [arguments])

    made = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in made:
        process.start()
    return made


def rows(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if '"train"' in line] if log.exists() else []


def main() -> None:
    if sys.argv[1] == "worker":
        return worker(int(sys.argv[2]), json.loads(sys.argv[3]))
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder) / "data")
        {"same": same, "kills": kills, "full": full}[sys.argv[1]](Path(folder))


if __name__ == "__main__":
    main()
