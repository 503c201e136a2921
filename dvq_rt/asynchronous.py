"""``AsyncGenerator``: a ``Generator`` for programs on asyncio, such as web servers.

No thread waits for an image. The one thread of the batch draws for everybody, and a small pool decodes, encodes and
checks arguments.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator as Stream
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dvq_rt.codes import Codes
from dvq_rt.decoding import Event, Request
from dvq_rt.editing import Edit
from dvq_rt.engine import LOGPROBS
from dvq_rt.generator import CodesLike, Generator, Label
from dvq_rt.images import ImageLike
from dvq_rt.labels import whole
from dvq_rt.results import Preview, Samples, Score
from runtimes.errors import ClosedError

THREADS = 2
"""That decode and encode."""
Result = TypeVar("Result")


class AsyncGenerator:
    """A generator whose calls are awaited. They share its batch with each other and with those of the generator's own
    threads, and draw the same images. Cancelling a task, or leaving a stream, frees its slots in the next step.

    Args:
        generator: an open one; closing it ends all calls.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._pool = ThreadPoolExecutor(THREADS, "dvq_rt images")

    def close(self) -> None:
        """Close the generator and its helpers; closing twice does no harm. Calls under way raise ``ClosedError``."""
        self.generator.close()
        self._pool.shutdown(wait=False)

    async def sample(self, *arguments: Any, edit: Edit | None = None, **options: Any) -> Samples:
        """Draw images. Arguments and errors are those of ``Generator.requests``, the images ``Generator.sample``'s, or
        with an edit of ``Generator.edit_of`` those of ``Generator.edit``."""
        requests = await self.run(partial(self.generator.requests, *arguments, edit=edit, **options))
        return await self.draw(requests, edit)

    async def stream(
        self, *arguments: Any, every: int = 16, edit: Edit | None = None, **options: Any
    ) -> Stream[Preview, None]:
        """Previews as ``Generator.stream`` gives them; arguments and errors are those of ``Generator.requests``. Leave
        it by ``contextlib.aclosing`` if it is not read to its end."""
        every = whole("every", every, 1, 2**31 - 1)
        requests = await self.run(partial(self.generator.requests, *arguments, every=every, edit=edit, **options))
        async with aclosing(self.previews(requests, edit)) as previews:
            async for preview in previews:
                yield preview

    async def draw(self, requests: list[Request], edit: Edit | None = None) -> Samples:
        """``sample`` of requests that ``Generator.requests`` has made, with the same edit. ``Samples.law`` is not
        told."""
        drawn: dict[int, Preview] = {}
        async with aclosing(self.previews(requests, edit)) as previews:
            async for preview in previews:
                if preview.codes is not None:
                    drawn[preview.index] = preview
        images, codes = [], []
        for index in range(len(requests)):
            images.append(drawn[index].image)
            codes.append(drawn[index].codes)
        of, known = requests[0], [c for c in codes if c is not None]
        prompts = [c.prompt for c in known]
        return Samples(images, known, [c.label for c in known], of.seed, of.params, of.image, prompts)

    async def previews(self, requests: list[Request], edit: Edit | None = None) -> Stream[Preview, None]:
        """``stream`` of requests that ``Generator.requests`` has made; arguments as for ``draw``."""
        async with aclosing(self._events(requests)) as events:
            async for event in events:
                yield await self.run(partial(self.generator.preview, event, edit))

    async def encode(self, images: ImageLike | Iterable[ImageLike], **rate: Any) -> list[Codes]:
        """As ``Generator.encode``."""
        return await self.run(partial(self.generator.encode, images, **rate))

    async def decode(self, codes: CodesLike) -> NDArray[np.uint8]:
        """As ``Generator.decode``."""
        return await self.run(partial(self.generator.decode, codes))

    async def reconstruct(self, images: ImageLike | Iterable[ImageLike], **rate: Any) -> NDArray[np.uint8]:
        """As ``Generator.reconstruct``."""
        return await self.run(partial(self.generator.reconstruct, images, **rate))

    async def score(self, codes: CodesLike, labels: Label | Iterable[Label] = None, **prompts: Any) -> list[Score]:
        """As ``Generator.score``."""
        rows, before = await self.run(partial(self.generator.rows, codes, labels, **prompts))
        layout, scores = self.generator.layout, {}
        requests = [
            Request.along(layout, row, record=LOGPROBS, key=i, prompt=prompt)
            for i, (row, prompt) in enumerate(zip(rows, before, strict=True))
        ]
        async with aclosing(self._events(requests)) as events:
            async for event in events:
                steps = layout.steps_of(rows[event.request.key])
                table = [event.records[name][:steps].astype(np.float64) for name in LOGPROBS]
                scores[event.request.key] = Score(*table)
        return [scores[i] for i in range(len(rows))]

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do something short, such as decoding an image, in the pool.

        Raises:
            ClosedError: this is closed.
        """
        try:
            doing = asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RuntimeError as error:  # of a pool that was shut down
            raise ClosedError("this generator is closed; make a new one") from error
        return await doing

    async def _events(self, requests: list[Request]) -> Stream[Event, None]:
        """Events of requests in the order in which they happen, as ``SharedBatch.draw`` gives them."""
        loop, woken, engine = asyncio.get_running_loop(), asyncio.Event(), self.generator.engine

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(woken.set)

        call = engine.batch.open(requests, wake=wake)
        try:
            over = False
            while not over:
                await woken.wait()
                woken.clear()
                events, over = engine.batch.take(call)
                for event in events:
                    yield event
            engine.batch.check(call)
        finally:
            engine.batch.leave(call)
