"""The engines of a server: which model a request means, and whether there is room for it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dvq_rt.asynchronous import AsyncGenerator
from dvq_rt.codes import code_bits
from dvq_rt.generator import Generator
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.settings import Settings

PACE = 64
"""Finished images that tell how long one takes."""


class Served:
    """One engine.

    Attributes:
        held: images that were admitted and are not finished.
    """

    def __init__(self, name: str, generator: Generator, queue: int) -> None:
        self.name, self.generator, self.engine = name, generator, AsyncGenerator(generator)
        self.most = generator.engine.slots + queue
        self.created, self.held = int(time.time()), 0
        self._finished: deque[float] = deque(maxlen=PACE)

    def check_room(self, images: int) -> None:
        """
        Raises:
            ApiError: 429 if the queue is full, with the time after which half of it is expected to be done.
        """
        if self.held + images > self.most:
            times = self._finished
            pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.1
            seconds = max(1, min(60, math.ceil(self.held * pace / 2)))
            raise ApiError(
                429,
                f"{self.held} images are being drawn or waiting, {self.most} is the most, and {images} do not fit; "
                f"try again in {seconds} s",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold room for so many images.

        Raises:
            ApiError: as ``check_room``.
        """
        self.check_room(images)
        self.held += images
        try:
            yield
            self._finished.extend([time.monotonic()] * images)
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
            "guidance": layout.null_label,
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


class Engines:
    """All engines of a server, opened at its start.

    Raises:
        DvqError: as ``Generator``.
    """

    def __init__(self, settings: Settings) -> None:
        options: dict[str, Any] = {"slots": settings.slots, "threads": settings.threads, "device": settings.device}
        self.served: dict[str, Served] = {}
        for name, folder in settings.engines:
            self.served[name] = Served(name, Generator(folder, **options), settings.queue)
        self.closing = False

    def pick(self, name: str | None) -> Served:
        """The engine of a name; the first one if a request names none.

        Raises:
            ApiError: 404 for a name that the server was not started with.
        """
        if self.closing:
            raise ApiError(503, "the server is closing; try another one", kind="server_error", code="closing")
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
            codes = generator.sample(1, labels=0 if generator.layout.classes else None).codes
            generator.encode(generator.decode(codes))

    def close(self) -> None:
        self.closing = True
        for served in self.served.values():
            served.engine.close()
