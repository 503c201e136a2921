"""What ``nvidia-smi`` says of a GPU: memory in use, power, clock. None where it does not say."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

FIELDS = {
    "name": str,
    "driver": str,
    "memory_used_mib": float,
    "memory_total_mib": float,
    "power_w": float,
    "power_limit_w": float,
    "clock_mhz": float,
    "memory_clock_mhz": float,
    "temperature_c": float,
}
QUERY = "name,driver_version,memory.used,memory.total,power.draw,power.limit,clocks.sm,clocks.mem,temperature.gpu"
SECONDS = 10
"""Longest wait for an answer."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU at one moment; MiB, watts, MHz and degrees Celsius."""

    name: str | None = None
    driver: str | None = None
    memory_used_mib: float | None = None
    memory_total_mib: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_card(bus: str) -> Card:
    """A GPU as it is now; empty without ``nvidia-smi``, or if it does not answer.

    Args:
        bus: where it is, such as ``0000:65:00.0``: ``nvidia-smi`` counts GPUs in another order than CUDA, and counts
            those that ``CUDA_VISIBLE_DEVICES`` hides.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Card()
    command = [tool, f"--id={bus}", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return Card()
    return parse_card(done.stdout)


def parse_card(line: str) -> Card:
    """The card of a line of comma-separated values; what is ``[N/A]`` or the like is None."""
    values: dict[str, Any] = {}
    for (name, kind), text in zip(FIELDS.items(), line.strip().split(","), strict=False):
        try:
            values[name] = None if text.strip().startswith("[") else kind(text.strip())
        except ValueError:
            values[name] = None
    return Card(**values)
