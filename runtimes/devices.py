"""Names of devices: ``cpu``, ``cuda``, ``cuda:1``."""

from __future__ import annotations

import re
from typing import NamedTuple

from runtimes.errors import BackendError, short

DEVICE = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


class DeviceName(NamedTuple):
    """A device: ``kind`` is ``cpu`` or ``cuda``, ``number`` counts GPUs from 0."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}" if self.number else self.kind


def read_device(text: object) -> DeviceName:
    """The device of a name.

    Raises:
        BackendError: it names none.
    """
    match = DEVICE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise BackendError(f"device is {short(text)}; it must be 'cpu', 'cuda' (the first GPU) or 'cuda:N', N from 0")
    return DeviceName(match[0].partition(":")[0], int(match[1] or 0))
