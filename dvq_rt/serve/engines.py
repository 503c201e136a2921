"""The engines of a server: which model a request means, and whether there is room for it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dvq_rt.asynchronous import AsyncGenerator
from dvq_rt.codes import code_bits
from dvq_rt.generator import Generator
from dvq_rt.serve.errors import ApiError, closing
from dvq_rt.serve.settings import Settings, place

SMOOTHING = 0.1
"""Weight of the newest image in the mean time that one takes."""


class Served:
    """One engine.

    Args:
        name: in requests.
        generator: opened; it is closed with this.
        queue: images that may wait for a slot.
        timeout: seconds that a request may take.

    Attributes:
        held: images that were admitted and are not finished.
        pace: seconds from one drawn image to the next while there is work; 0 before the first.
    """

    def __init__(self, name: str, generator: Generator, queue: int, timeout: float) -> None:
        self.name, self.generator, self.engine = name, generator, AsyncGenerator(generator)
        self.most = generator.engine.slots + queue
        self.timeout, self.created, self.held, self.pace = timeout, int(time.time()), 0, 0.0
        self._since = 0.0

    def check_room(self, images: int) -> None:
        """
        Raises:
            ApiError: 400 for more images than there is ever room for; 429 if the queue is full, or too long for the
                time that a request may take, with the time after which half of it is expected to be done.
        """
        if images > self.most:
            raise ApiError(400, f"{images} images do not fit; {self.name} takes at most {self.most} at once", param="n")
        late = self.held and (self.held + images) * self.pace > self.timeout
        if self.held + images > self.most or late:
            seconds = max(1, min(60, math.ceil(self.held * (self.pace or 0.1) / 2)))
            raise ApiError(
                429,
                f"{self.held} images are being drawn or waiting, and {images} more do not fit: there is room for "
                f"{self.most}, and for {self.timeout:g} s of work; try again in {seconds} s",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    @contextmanager
    def admit(self, images: int, *, drawing: bool = True) -> Iterator[None]:
        """Hold room for so many images; ``drawing`` says whether they tell how long one takes.

        Raises:
            ApiError: as ``check_room``.
        """
        self.check_room(images)
        if not self.held:
            self._since = time.monotonic()
        self.held += images
        try:
            yield
            if drawing:
                now = time.monotonic()
                took = (now - self._since) / images
                self.pace += (took - self.pace) * (SMOOTHING if self.pace else 1.0)
                self._since = now
        finally:
            self.held -= images

    def describe(self) -> dict[str, Any]:
        """The model as ``GET /v1/models`` lists it: OpenAI's fields, and what a client needs to know of this one."""
        manifest, layout, generator = self.generator.manifest, self.generator.layout, self.generator
        fewest, most = (layout.sides[0] ** 2 if layout.covering else 1), layout.filled_cells
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dvq-rt",
            "family": manifest.family,
            "image_size": manifest.image_size,
            "labels": list(manifest.class_names) or list(map(str, range(layout.classes))),
            "needs_label": bool(layout.classes) and not layout.null_label,
            "guidance": manifest.guidable,
            "prompts": generator.takes_prompts,
            "edits": generator.edits,
            "bits_per_pixel": [code_bits(layout, codes) / manifest.image_size**2 for codes in (fewest, most)],
            "codebook_size": layout.codebook_size,
            "sides": list(layout.sides),
            "kept": layout.kept,
            "most_codes": most,
            "slots": generator.engine.slots,
            "defaults": generator.engine.sampling(None).to_dict(),
        }


def open_engine(folder: str, settings: Settings) -> Generator:
    """An engine on its device.

    Raises:
        DvqError: as ``Generator``.
    """
    alone, device = place(folder)
    return Generator(alone, slots=settings.slots, threads=settings.threads, device=device or settings.device)


class Engines:
    """All engines of a server, opened at its start.

    Raises:
        DvqError: as ``Generator``.
    """

    def __init__(self, settings: Settings) -> None:
        self.served: dict[str, Served] = {}
        for name, folder in settings.engines:
            self.served[name] = Served(name, open_engine(folder, settings), settings.queue, settings.timeout)
        self.closing = False

    def pick(self, name: str | None) -> Served:
        """The engine of a name; the first one if a request names none.

        Raises:
            ApiError: 404 for a name that the server was not started with; 503 while it closes.
        """
        if self.closing:
            raise closing()
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            raise ApiError(
                404,
                f"there is no model {name[:128]!r} here; the models are {', '.join(self.served)}",
                code="model_not_found",
                param="model",
            )
        return self.served[name]

    def warm(self) -> None:
        """Load every graph and draw one image, so that the first request waits for nothing."""
        for served in self.served.values():
            generator = served.generator
            label, prompt = 0 if generator.layout.classes else None, "a" if generator.takes_prompts else None
            codes = generator.sample(1, label, prompts=prompt, truncate=True).codes
            generator.encode(generator.decode(codes))

    def close(self) -> None:
        self.closing = True
        for served in self.served.values():
            served.engine.close()
