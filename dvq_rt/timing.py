"""What every measurement shares: turns, ratios, memory bandwidth, and the machine they are of."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.onnxruntime import import_onnxruntime

PAUSE = 0.1
"""Seconds between two competitors, for idle threads of the first to stop spinning."""
READER_BYTES = 512 * 2**20
Runs = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one thing in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)

    def to_dict(self) -> dict[str, Any]:
        return {"median_s": self.median, "spread": self.spread, "seconds": list(self.seconds)}


def interleave(runs: Runs, rounds: int, least: float = 0.3, pause: float = PAUSE) -> dict[str, Timing]:
    """Time several things in turns.

    In each round every one runs once unmeasured, then as often as fits into ``least`` seconds, at least once; the
    round's number is the fastest of those, because what other programs do can only add to it.

    Raises:
        InputError: ``rounds`` is not positive.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; it must be at least 1")
    fastest: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(pause)
            run()
            times: list[float] = []
            while not times or sum(times) < least:
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
            fastest[name].append(min(times))
    return {name: Timing(tuple(times)) for name, times in fastest.items()}


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster ``fast`` is: the median over the rounds of the ratio in each, its lowest and highest."""
    ratios = np.array(slow.seconds) / np.array(fast.seconds)
    return {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}


class Reader:
    """Reads ``READER_BYTES`` of memory with one thread per core; ``run`` once per pass."""

    def __init__(self, threads: int | None = None) -> None:
        count = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(count)
        self._parts = np.array_split(np.ones(READER_BYTES // 4, np.int32), count)

    def run(self) -> None:
        list(self._pool.map(np.max, self._parts))

    def bandwidth(self, timing: Timing) -> float:
        """Bytes per second of a timing of ``run``."""
        return READER_BYTES / timing.median


def peak_memory() -> int:
    """Most resident bytes that the process ever had."""
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _windows_peak() -> int:
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_ulong),
            ("faults", ctypes.c_ulong),
            *((f"field_{i}", ctypes.c_size_t) for i in range(8)),
        )

    counters = Counters()
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), ctypes.sizeof(counters))
    return int(counters.field_0)  # PeakWorkingSetSize


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        name = {key.strip(): value.strip() for key, value in fields.items()}.get("model name", name)
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": import_onnxruntime().__version__,
    }


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def percent(share: float) -> str:
    return f"{share:.1%}"
