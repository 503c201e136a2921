"""What a server is started with."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dvq_rt.labels import whole
from dvq_rt.manifest import DEMOS
from runtimes.errors import InputError, short

KEY_VARIABLE = "DVQ_RT_API_KEY"
KEY = re.compile(r"[!-~]+")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
PLACE = re.compile(r"(.+)@(cpu|cuda(?::\d{1,3})?)", re.ASCII | re.DOTALL)
SMALL_BODY = 1 << 20
"""Bytes of a body without pictures or codes."""
UPLOADS = 16
"""Bodies that are received at the same time."""
UPLOAD_SECONDS = 20.0
"""In which a body must have come."""


@dataclass(frozen=True, slots=True)
class Settings:
    """
    Args:
        engines: pairs of the name that requests use and the engine folder (or ``demo:dq`` and so on), one or more;
            requests that name no model get the first. A folder may name a device of its own, see ``place``.
        host, port: where it listens; port 0 takes a free one.
        slots, threads: of each engine, see ``Generator``.
        device: of engines that name none.
        queue: images of each engine that may wait for a slot; those beyond are refused with status 429.
        timeout: seconds that a request may take from its admission.
        workers: processes, each with its own engines.
        images: most images of a request.
        megabytes: largest body, in MiB.
        megapixels: largest picture, in 2 ** 20 pixels.

    Raises:
        InputError: a value is out of range, or a name is unfit or taken twice.
    """

    engines: tuple[tuple[str, str], ...] = (("demo:dq", "demo:dq"),)
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int | None = None
    threads: int | None = None
    device: str | None = None
    queue: int = 64
    timeout: float = 60.0
    workers: int = 1
    images: int = 16
    megabytes: int = 8
    megapixels: int = 32

    def __post_init__(self) -> None:
        whole("port", self.port, 0, 65535)
        whole("queue", self.queue, 0, 100_000)
        whole("workers", self.workers, 1, 256)
        whole("images", self.images, 1, 1024)
        whole("megabytes", self.megabytes, 1, 1024)
        whole("megapixels", self.megapixels, 1, 64)
        if not 0 < self.timeout <= 86400:
            raise InputError(f"timeout is {self.timeout}; it must be a number of seconds above 0, at most 86400")
        names = [name for name, _ in self.engines]
        if not names or len(set(names)) < len(names):
            raise InputError(f"the models are {names}; give one or more of different names, as NAME=DIR")
        for name in names:
            if not MODEL_NAME.fullmatch(name):
                raise InputError(f"the model's name {short(name)} has other characters than letters, digits and ._:@-")

    @property
    def body_bytes(self) -> int:
        return self.megabytes << 20

    @property
    def pixels(self) -> int:
        return self.megapixels << 20


def read_key() -> str | None:
    """The API key of the environment variable ``DVQ_RT_API_KEY`` without white space around it, such as the end of the
    line of a file that it was read from; None if there is no such variable.

    Raises:
        InputError: it is empty, or holds what no key can be sent with.
    """
    text = os.environ.get(KEY_VARIABLE)
    if text is None:
        return None
    key = text.strip()
    if not KEY.fullmatch(key):
        fault = "has white space inside, or characters that are not of ASCII" if key else "is empty"
        raise InputError(f"{KEY_VARIABLE} {fault}; set it to a word of letters, digits and signs, or unset it")
    return key


def place(folder: str) -> tuple[str, str | None]:
    """An engine's folder and its device, as in ``engines/faces@cuda:1``; None where there is no device at the end."""
    match = PLACE.fullmatch(folder)
    return (match[1], match[2]) if match else (folder, None)


def named_engines(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of name and folder from ``NAME=DIR`` or ``DIR``, which is then named by the folder's last part; a demo by
    its own name. Either may end with ``@`` and a device. Nothing given is the first demo."""
    pairs = []
    for word in words or ("demo:dq",):
        name, given, folder = word.partition("=")
        if not given or not MODEL_NAME.fullmatch(name):
            alone = place(word)[0]
            name, folder = (alone if alone in DEMOS else Path(alone).resolve().name), word
        pairs.append((name, folder))
    return tuple(pairs)
