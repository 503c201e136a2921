"""What clients get: PNG files, the answers of the images API, and its events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Send

from dvq_rt.codes import Codes, codes_to_dict
from dvq_rt.serve.errors import ApiError

PNG_EFFORT = 3
"""Of zlib. These pictures are small, and the default of 6 takes longer for hardly less."""
Result = TypeVar("Result")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=PNG_EFFORT)
    return file.getvalue()


def base64_png(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def cost(codes: Codes, image_size: int) -> dict[str, Any]:
    """What an image's codes cost."""
    return {"length": codes.length, "bits": codes.bits, "bits_per_pixel": codes.bits_per_pixel(image_size)}


def image_item(image: Image.Image, codes: Codes, index: int, with_codes: bool) -> dict[str, Any]:
    """One image of an answer."""
    item: dict[str, Any] = {"b64_json": base64_png(image), "index": index, "label": codes.label}
    item |= cost(codes, image.width)
    return {**item, "codes": codes_to_dict([codes])} if with_codes else item


def usage(tokens: int) -> dict[str, Any]:
    """Codes that were drawn, in the form of OpenAI's API."""
    nothing = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": nothing, "output_tokens": tokens, "total_tokens": tokens}


def sse(kind: str, content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """Server-sent events; a client that goes away ends their generator at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


def too_late(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"this took more than {seconds:g} s, the most that this server allows; ask for fewer images, or try later",
        kind="server_error",
        code="deadline",
    )


async def attended(request: Request, seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client goes away or the time is over.

    Raises:
        ClientDisconnect: the client has gone.
        ApiError: 504, the time is over.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[Result], asyncio.Task[None]] = (asyncio.create_task(work), asyncio.create_task(gone()))
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            return tasks[0].result()
        raise ClientDisconnect if tasks[1] in done else too_late(seconds)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
