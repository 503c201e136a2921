"""The acceptance of engines on a machine with a GPU: ``dvq-rt accept ENGINE... --out report.json``.

One run of less than ten minutes holds everything that must hold there, and measures what can only be measured there:
every check of ``verify``; 200 images that do not depend on their neighbours; two minutes of drawing with the memory
watched; tokens per second, the share of the card's own memory speed, and power. With ``--rehearse`` the same code runs
on the CPU, with fewer images and less time; its numbers are those of the CPU and say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.bench import middle_state, step_bytes
from dvq_rt.decoding import Request
from dvq_rt.engine import Engine, run_alone
from dvq_rt.labels import MOST_IMAGES, whole
from dvq_rt.manifest import engine_folder, read_engine
from dvq_rt.sampling import SamplingParams
from dvq_rt.timing import Reader, interleave, machine, peak_memory
from dvq_rt.verify import Check, check, verify
from runtimes.card import Card, read_card
from runtimes.cuda import find_gpu
from runtimes.cuda_devices import copy_bandwidth, open_device
from runtimes.devices import read_device
from runtimes.errors import InputError

FORMAT = "dvq-rt acceptance 1"
GROWTH = 64.0
"""MiB that memory may grow between the end of the first quarter of the soak and its end."""
STEPS = 32
"""Tokens that are timed together, since waiting for a GPU takes time of its own."""
LONGEST_SOAK = 86_400.0
CHECKED_EVERY = 4
"""Calls of the soak between two that repeat the first."""


Baselines = Callable[[str, Sequence[int], int, int], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much an acceptance does: ``images`` whose neighbours change, ``soak`` seconds of drawing, ``rounds`` of
    timing, ``slots`` that are timed, and whether it is a rehearsal on the CPU.

    Raises:
        InputError: a number is out of its range.
    """

    images: int = 200
    soak: float = 120.0
    rounds: int = 5
    slots: tuple[int, ...] = (1, 8)
    rehearsal: bool = False

    def __post_init__(self) -> None:
        for name, most in (("images", MOST_IMAGES), ("rounds", 1000)):
            whole(name, getattr(self, name), 1, most)
        if not 0 <= self.soak <= LONGEST_SOAK:
            raise InputError(f"soak is {self.soak}; it must be 0 to {LONGEST_SOAK:.0f} seconds")


REHEARSAL = Plan(images=6, soak=2.0, rounds=1, rehearsal=True)


class Machine:
    """The device that is accepted: its own words, its memory's speed, and its memory in use.

    Args:
        device: ``cuda`` or ``cuda:N``.
        rehearsal: take the CPU in its place.

    Raises:
        InputError: the device is a CPU, and it is no rehearsal.
        BackendError: there is no such GPU.
    """

    def __init__(self, device: str, rehearsal: bool) -> None:
        name = read_device(device)
        if name.kind != "cuda":
            raise InputError(f"device is {device!r}; accept is for GPUs: use cuda or cuda:N, or --rehearse on a CPU")
        self.index, self.rehearsal = name.number, rehearsal
        self.device = "cpu" if rehearsal else str(name)
        self._gpu = None if rehearsal else find_gpu(None, name.number)

    def describe(self) -> dict[str, Any]:
        """The machine, and of the GPU its name, kind, driver and clocks."""
        gpu = None if self._gpu is None else {k: v for k, v in self._gpu._asdict().items() if k != "bus"}
        return {**machine(), "rehearsal": self.rehearsal, "gpu": gpu, "card": self.card().to_dict()}

    def card(self) -> Card:
        return Card() if self._gpu is None else read_card(self._gpu.bus)

    def memory(self) -> dict[str, float]:
        """MiB in use: the process's peak on the host, and all on the GPU."""
        used = self.card().memory_used_mib
        return {"host": peak_memory() / 2**20, **({} if used is None else {"gpu": used})}

    def bandwidth(self) -> float:
        """Bytes per second: of copies on the GPU, read and written; in a rehearsal of reads on the host."""
        if not self.rehearsal:
            return copy_bandwidth(open_device(self.index))
        reader = Reader(1)
        return reader.bandwidth(interleave({"dram": reader.run}, 1, least=0)["dram"])


def accept(
    folders: Sequence[str],
    *,
    device: str = "cuda",
    plan: Plan = Plan(),
    threads: int | None = None,
    baselines: Baselines | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Accept engines on one device.

    Args:
        folders: of the engines.
        device: ``cuda`` or ``cuda:N``.
        plan: how much to do.
        threads: of a rehearsal.
        baselines: measures PyTorch on the same device: (device, slots, length, rounds) -> seconds of a token by
            ``"NAME bSLOTS"``; None leaves it out.
        say: told what is going on.

    Returns:
        JSON values: ``format``, ``machine``, ``bandwidth``, ``engines`` (of each its checks, speeds and soak),
        ``together``, ``baselines``, ``seconds``, ``ok``.

    Raises:
        InputError: no engine is named, or the device is a CPU.
        EngineError, BackendError: an engine cannot be opened there.
    """
    if not folders:
        raise InputError("name at least one engine folder")
    began = time.monotonic()
    here = Machine(device, plan.rehearsal)
    for folder in folders:
        read_engine(engine_folder(folder))  # a wrong name is told before anything is measured
    say("measuring the memory's speed")
    report: dict[str, Any] = {"format": FORMAT, "machine": here.describe(), "bandwidth": here.bandwidth()}
    engines = [Engine.open(folder, device=here.device, threads=threads) for folder in folders]
    report["engines"] = [accept_engine(engine, here, plan, report["bandwidth"], say) for engine in engines]
    if len(engines) > 1:
        say("two engines at once")
    report["together"] = [together(*pair) for pair in pairwise(engines)]
    length = min(engine.layout.max_length for engine in engines) // 2
    if baselines is not None:
        say("PyTorch, which is compiled first")
    report["baselines"] = {} if baselines is None else baselines(here.device, plan.slots, length, plan.rounds)
    report["seconds"] = time.monotonic() - began
    checks = [c for entry in report["engines"] for c in entry["checks"]] + report["together"]
    report["ok"] = all(c["ok"] for c in checks)
    return report


def accept_engine(
    engine: Engine, here: Machine, plan: Plan, bandwidth: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Checks, speeds and soak of one engine."""
    manifest = engine.manifest
    say(f"{engine.path}: verify")
    checks = verify(engine)
    say(f"{engine.path}: {plan.images} images beside others")
    checks += neighbours(engine, plan.images)
    say(f"{engine.path}: speed")
    tokens = [speed(engine, here, slots, plan.rounds, bandwidth) for slots in possible(engine, plan.slots)]
    say(f"{engine.path}: {plan.soak:.0f} s of drawing")
    drawn, soaked = soak(engine, here, plan.soak)
    return {
        "engine": str(engine.path),
        "made": {"backend": manifest.backend, "target": manifest.target, "tools": manifest.tools},
        "precision": manifest.precision,
        "weights": manifest.weights,
        "parameters": manifest.parameters,
        "checks": [c._asdict() for c in [*checks, *soaked]],
        "tokens": tokens,
        "soak": drawn,
    }


def possible(engine: Engine, slots: Sequence[int]) -> list[int]:
    """The numbers of slots that an engine's step can have."""
    return [engine.manifest.slots] if engine.manifest.fixed_slots else list(slots)


def some_requests(engine: Engine, count: int) -> list[Request]:
    """Images of all labels in turn, with the engine's recommended sampling; the parameters are the same for all."""
    params = SamplingParams.from_dict(engine.manifest.defaults)
    classes = engine.layout.classes
    return [Request(i % classes if classes else 0, params, seed=5, image=i, key=i) for i in range(count)]


def draw(engine: Engine, requests: Sequence[Request], slots: int) -> dict[int, NDArray[np.int32]]:
    """Cells of each image by its number, drawn in a loop of one's own."""
    slots = max(slots, requests[0].width)
    return {event.request.key: event.cells for event in run_alone(engine.loop(slots), requests) if event.finished}


def neighbours(engine: Engine, count: int) -> list[Check]:
    """Draw images, and again in the reverse order, so that each has other neighbours and another slot; and where the
    step allows it with another number of slots, where narrow numbers may turn near-ties."""
    requests = some_requests(engine, count)
    slots = engine.manifest.slots
    first, again = draw(engine, requests, slots), draw(engine, requests[::-1], slots)
    differ = [i for i in first if not np.array_equal(first[i], again[i])]
    checks = [check(f"{count} images: changed by other neighbours and slots", len(differ), 0.0)]
    if not engine.manifest.fixed_slots:
        fewer = draw(engine, requests, max(requests[0].width, slots // 2 - 1))
        differ = [i for i in first if not np.array_equal(first[i], fewer[i])]
        most = 0.0 if engine.manifest.precision == "fp32" else float(count)  # said, and not judged
        checks.append(check(f"{count} images: changed by another number of slots", len(differ), most))
    return checks


def speed(engine: Engine, here: Machine, slots: int, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One token of so many slots from the middle of the longest image on: seconds, tokens per second, and the share of
    the memory's speed; with the card's power and clock right after."""
    length = engine.layout.max_length // 2
    loop, state = engine.loop(slots), middle_state(engine.table, slots, length)
    steps = min(STEPS, engine.layout.max_length - length - 1)

    def tokens() -> None:
        loop.set_state(state)
        for _ in range(steps):
            loop.step()
        loop.read("length")  # waits for the device

    seconds = interleave({"tokens": tokens}, rounds, pause=0.0)["tokens"].median / steps
    card = here.card()
    size = step_bytes(engine, slots, length)
    return {
        "slots": slots,
        "length": length,
        "seconds": seconds,
        "tokens_per_s": slots / seconds,
        "bytes": size,
        "of_bandwidth": sum(size.values()) / seconds / bandwidth,
        "card": card.to_dict(),
    }


def soak(engine: Engine, here: Machine, seconds: float) -> tuple[dict[str, Any], list[Check]]:
    """Draw and decode for so long, with memory watched; every few calls the first one's images are drawn again."""
    count = engine.manifest.slots
    first: NDArray[np.int32] | None = None
    calls = images = wrong = 0
    memory: list[dict[str, float]] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds or calls <= CHECKED_EVERY:
        seed = 0 if calls % CHECKED_EVERY == 0 else calls
        requests = [replace(request, seed=seed) for request in some_requests(engine, count)]
        cells = {event.request.key: event.cells for event in engine.draw(requests) if event.finished}
        drawn = np.stack([cells[i] for i in range(count)])
        if seed == 0:
            first = drawn if first is None else first
            wrong += int((drawn != first).any(1).sum())
        maps = np.where(drawn < 0, -1, drawn % engine.layout.codebook_size).astype(np.int64)
        side = engine.layout.sides[-1]
        engine.decode(maps.reshape(-1, side, side)[:1])
        calls, images = calls + 1, images + count
        memory.append({"seconds": time.monotonic() - began, **here.memory()})
    settled = memory[len(memory) // 4]
    checks = [check("soak: repeated images that differ", wrong, 0.0)]
    for where in ("host", "gpu"):
        if where in settled and where in memory[-1]:
            grown = max(0.0, memory[-1][where] - settled[where])
            checks.append(check(f"soak: MiB that memory grew ({where})", grown, GROWTH))
    rate = images / memory[-1]["seconds"]
    thinned = memory[:: max(1, len(memory) // 24)]
    result = {"calls": calls, "images": images, "images_per_s": rate, "memory": thinned, "card": here.card().to_dict()}
    return result, checks


def together(one: Engine, other: Engine) -> dict[str, Any]:
    """Two engines on one device: what one draws while the other draws is what it draws alone."""
    requests = some_requests(one, one.manifest.slots)
    alone = draw(one, requests, one.manifest.slots)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(draw, other, some_requests(other, 2), other.manifest.slots)
        crowded = draw(one, requests, one.manifest.slots)
        beside.result()
    differ = sum(not np.array_equal(alone[i], crowded[i]) for i in alone)
    return check(f"{one.path.name} beside {other.path.name}: images that differ", differ, 0.0)._asdict()


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The readable form of a report, headed."""
    gpu = report["machine"]["gpu"]
    name = "rehearsal on the CPU" if gpu is None else f"{gpu['name']} ({gpu['target']})"
    lines: list[tuple[str, ...]] = [("what", "measured", "bound", "result")]
    lines.append((f"{name}: memory", f"{report['bandwidth'] / 1e9:.0f} GB/s", "", ""))
    for entry in report["engines"]:
        lines.append((f"{entry['engine']}: {entry['precision']}, weights {entry['weights']}", "", "", ""))
        lines += [checked(c) for c in entry["checks"]]
        for t in entry["tokens"]:
            power = t["card"]["power_w"]
            share = f"{t['of_bandwidth']:.2f} of the memory's speed" + (f", {power:.0f} W" if power else "")
            what = f"one token of {t['slots']} slot(s), length {t['length']}"
            lines.append((what, f"{t['seconds'] * 1e3:.3f} ms, {t['tokens_per_s']:.0f} tokens/s", "", share))
        lines.append(("images drawn and decoded", f"{entry['soak']['images_per_s']:.2f} images/s", "", ""))
    lines += [checked(c) for c in report["together"]]
    lines += [(f"PyTorch, {name}", f"{s * 1e3:.3f} ms", "", "") for name, s in report["baselines"].items()]
    lines.append(("whole run", f"{report['seconds']:.0f} s", "", "ok" if report["ok"] else "FAILED"))
    return lines


def checked(entry: dict[str, Any]) -> tuple[str, ...]:
    return entry["name"], f"{entry['measured']:.3g}", f"{entry['bound']:.3g}", "ok" if entry["ok"] else "FAILED"
