"""The images API: ``/v1/models``, ``/v1/images/generations`` with its stream, ``/v1/images/edits``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dvq_rt.decoding import Request as Drawn
from dvq_rt.editing import Edit
from dvq_rt.images import open_rgb, square
from dvq_rt.results import Preview, Samples
from dvq_rt.serve.answers import EventStream, attended, base64_png, image_item, png, sse, too_late, usage
from dvq_rt.serve.bodies import clear_pixels, form, picture_file
from dvq_rt.serve.engines import Served
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.forms import Edition, Generation
from dvq_rt.serve.gate import refusal
from dvq_rt.serve.server import Server, server_of
from dvq_rt.serve.settings import SMALL_BODY

routes = APIRouter(tags=["images"])
EDITION = {"requestBody": {"content": {"multipart/form-data": {"schema": Edition.model_json_schema()}}}}
GENERATION = {"requestBody": {"content": {"application/json": {"schema": Generation.model_json_schema()}}}}


@routes.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The models, with their labels, sizes and recommended sampling parameters."""
    return {"object": "list", "data": [s.describe() for s in server_of(request).engines.served.values()]}


@routes.get("/v1/models/{name}")
async def show_model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    return server_of(request).engines.pick(name).describe()


@routes.post("/v1/images/generations", openapi_extra=GENERATION, response_model=None)
async def generate(request: Request) -> Response:
    """Draw images, in the form of OpenAI's images API. The same seed gives the same images."""
    server = server_of(request)
    body = Generation.model_validate_json(await server.receive(request, SMALL_BODY))
    served = server.engines.pick(body.model)
    requests = await body.requests(served, server.settings.images)
    request.state.log.update({"model": served.name, "images": body.n})
    if body.stream:
        served.check_room(body.n)
        return EventStream(_events(server, served, body, requests, request))
    with served.admit(body.n):
        drawing = served.engine.draw(requests)
        samples = await attended(request, server.settings.timeout, drawing)
    server.metrics.images.labels(served.name).inc(body.n)
    headers = {"X-Seed": str(samples.seed)}
    if body.response_format == "png":
        return Response(await served.engine.run(lambda: png(samples[0])), media_type="image/png", headers=headers)
    return JSONResponse(await served.engine.run(lambda: _answer(served, body, samples)), headers=headers)


@routes.post("/v1/images/edits", openapi_extra=EDITION, response_model=None)
async def edit(request: Request) -> Response:
    """Draw a part of an image anew, in the form of OpenAI's images API, where the model can: the mask, or else the
    image, is transparent there. Both are cropped to their centre square and resized. It streams as generations do."""
    server = server_of(request)
    raw = await server.receive(request, server.settings.body_bytes)
    texts, files = form(raw, request.headers.get("content-type", ""))
    body = Edition.model_validate_strings(texts)
    served = server.engines.pick(body.model)
    generator = served.generator
    if not generator.edits:
        raise ApiError(
            501,
            f"{served.name} does not edit images; take a model whose `edits` in /v1/models is true, or draw with "
            "/v1/images/generations",
            kind="server_error",
            code="not_implemented",
        )
    body.check(served, server.settings.images)

    def prepare() -> tuple[list[Drawn], Edit]:  # decodes and encodes pictures, so it needs room and has a deadline too
        size, pixels = generator.manifest.image_size, server.settings.pixels
        picture = picture_file(files.get("image", b""), pixels)
        clear = clear_pixels(picture_file(files.get("mask", files.get("image", b"")), pixels), size)
        edit = generator.edit_of(square(open_rgb(picture), size), clear, grain=body.grain)
        return body.drawn(generator, edit), edit

    async def draw() -> Samples:
        return await served.engine.draw(*await served.engine.run(prepare))

    request.state.log.update({"model": served.name, "images": body.n})
    if body.stream:
        with served.admit(body.n, drawing=False):
            requests, edit = await attended(request, server.settings.timeout, served.engine.run(prepare))
        return EventStream(_events(server, served, body, requests, request, edit))
    with served.admit(body.n):
        samples = await attended(request, server.settings.timeout, draw())
    server.metrics.images.labels(served.name).inc(body.n)
    return JSONResponse(await served.engine.run(lambda: _answer(served, body, samples)))


def _common(served: Served, requests_seed: int) -> dict[str, Any]:
    side = served.generator.manifest.image_size
    return {"model": served.name, "seed": requests_seed, "size": f"{side}x{side}", "output_format": "png"}


def _answer(served: Served, body: Generation | Edition, samples: Samples) -> dict[str, Any]:
    pairs = enumerate(zip(samples.images, samples.codes, strict=True))
    return {
        "created": int(time.time()),
        "data": [image_item(image, codes, index, body.with_codes) for index, (image, codes) in pairs],
        "usage": usage(sum(codes.length for codes in samples.codes)),
        "first": samples.first,
        **_common(served, samples.seed),
    }


async def _events(
    server: Server,
    served: Served,
    body: Generation | Edition,
    requests: list[Drawn],
    request: Request,
    edit: Edit | None = None,
) -> AsyncGenerator[bytes, None]:
    """The stream of a request: OpenAI's events, with ``index`` where there are several images."""
    began, first = time.perf_counter(), True
    act = "image_generation" if edit is None else "image_edit"
    counts = dict.fromkeys(range(len(requests)), 0)

    def event(preview: Preview) -> bytes:
        """Made in the pool, since PNG takes as long as the decoder of a small model."""
        kind = f"{act}.{'partial_image' if preview.codes is None else 'completed'}"
        content: dict[str, Any] = {"type": kind, "created_at": int(time.time()), "progress": preview.progress}
        content |= {**_common(served, requests[0].seed), "quality": "auto", "background": "opaque"}
        if preview.codes is None:
            content |= {"b64_json": base64_png(preview.image), "index": preview.index}
            content["partial_image_index"] = counts[preview.index]
        else:
            content |= image_item(preview.image, preview.codes, preview.index, body.with_codes)
            content["usage"] = usage(preview.codes.length)
        counts[preview.index] += 1
        return sse(kind, content)

    try:
        with served.admit(len(requests)):
            previews = served.engine.previews(requests, edit)
            async with asyncio.timeout(server.settings.timeout), aclosing(previews):
                async for preview in previews:
                    chunk = await served.engine.run(lambda preview=preview: event(preview))  # type: ignore[misc]
                    if first:
                        server.metrics.first_preview.labels(served.name).observe(time.perf_counter() - began)
                        first = False
                    if preview.codes is not None:
                        server.metrics.images.labels(served.name).inc()
                    yield chunk
    except TimeoutError:
        yield _failure(request, too_late(server.settings.timeout), server)
    except Exception as error:
        yield _failure(request, error, server)


def _failure(request: Request, error: Exception, server: Server) -> bytes:
    return sse("error", {"type": "error", **refusal(request.scope, error, server.metrics).content})
