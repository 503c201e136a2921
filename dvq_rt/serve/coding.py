"""Images to codes and back, and their likelihood: ``/encode``, ``/decode``, ``/reconstruct``, ``/score``."""

from __future__ import annotations

import io
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Query
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dvq_rt.codes import Codes, codes_from_dict, codes_to_dict
from dvq_rt.images import open_rgb, psnr, square
from dvq_rt.labels import read_label
from dvq_rt.serve.answers import attended, base64_png, cost, png
from dvq_rt.serve.bodies import json_body, picture_file
from dvq_rt.serve.engines import Served
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.server import Server, server_of
from runtimes.errors import InputError

routes = APIRouter(tags=["codes"])
Result = TypeVar("Result")
PICTURE: dict[str, Any] = {
    "requestBody": {
        "description": "the bytes of a picture: PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF, and HEIC where the server can",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
CODES: dict[str, Any] = {
    "requestBody": {
        "description": "codes as /encode answers them, of one image or several",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}
Model = Query(None, description="a model of GET /v1/models; the first of them if left out")
Bits = Query(None, description="the most that codes may cost; the tokenizer chooses if no rate is given")
Ratio = Query(None, description="share of each finer grain, for models with several")
Kept = Query(None, description="cells that keep a code, for models that keep some")


def _rate(
    bits_per_pixel: float | None = Bits, fine_ratio: list[float] | None = Ratio, kept: int | None = Kept
) -> dict[str, Any]:
    shares = fine_ratio[0] if fine_ratio and len(fine_ratio) == 1 else fine_ratio
    return {"bits_per_pixel": bits_per_pixel, "fine_ratio": shares, "kept": kept}


Rate = Depends(_rate)


@routes.post("/encode", openapi_extra=PICTURE, response_model=None)
async def encode(
    request: Request,
    model: str | None = Model,
    rate: dict[str, Any] = Rate,
) -> Response:
    """The codes of a picture, which is cropped to its centre square and resized."""
    server, served = _pick(request, model)
    file = await _picture(server, request)

    def work() -> dict[str, Any]:
        (codes,) = served.generator.encode(file, **rate)
        size = served.generator.manifest.image_size
        return {"model": served.name, "codes": codes_to_dict([codes]), **cost(codes, size)}

    return JSONResponse(await _attended(server, served, request, served.engine.run(work)))


@routes.post("/reconstruct", openapi_extra=PICTURE, response_model=None)
async def reconstruct(
    request: Request,
    model: str | None = Model,
    rate: dict[str, Any] = Rate,
    response_format: Literal["b64_json", "png"] = "b64_json",
) -> Response:
    """A picture through its codes and back: with the codes, their cost, PSNR in dB, and the square that was coded."""
    server, served = _pick(request, model)
    file = await _picture(server, request)

    def work() -> Response:
        generator = served.generator
        original = square(open_rgb(file), generator.manifest.image_size)
        (codes,) = generator.encode(original, **rate)
        restored = generator.decode(codes)[0]
        if response_format == "png":
            return Response(png(Image.fromarray(restored)), media_type="image/png")
        quality = psnr(original, restored)
        content = {"model": served.name, "codes": codes_to_dict([codes]), **cost(codes, restored.shape[0])}
        content |= {"psnr": quality if np.isfinite(quality) else None}
        content |= {"original": base64_png(Image.fromarray(original))}
        return JSONResponse({**content, "data": [{"b64_json": base64_png(Image.fromarray(restored))}]})

    return await _attended(server, served, request, served.engine.run(work))


@routes.post("/decode", openapi_extra=CODES, response_model=None)
async def decode(
    request: Request, model: str | None = Model, response_format: Literal["b64_json", "png"] = "b64_json"
) -> Response:
    """Pictures of codes."""
    server, served = _pick(request, model)
    codes = await _codes(server, served, request)
    if response_format == "png" and len(codes) != 1:
        raise InputError(f"png answers with one image, but there are codes of {len(codes)}; use b64_json")

    def work() -> Response:
        pictures = [Image.fromarray(row) for row in served.generator.decode(codes)]
        if response_format == "png":
            return Response(png(pictures[0]), media_type="image/png")
        return JSONResponse({"model": served.name, "data": [{"b64_json": base64_png(p)} for p in pictures]})

    return await _attended(server, served, request, served.engine.run(work), len(codes))


@routes.post("/score", openapi_extra=CODES, response_model=None)
async def score(
    request: Request, model: str | None = Model, label: str | None = None, prompt: str | None = None
) -> Response:
    """Log-likelihood of the tokens of codes in nats: in all, and of each token's position and content.

    A label by name or index takes the place of the codes' own, a prompt that of theirs."""
    server, served = _pick(request, model)
    codes = await _codes(server, served, request)
    named = None if label is None else read_label(label, served.generator.class_names)
    scoring = served.engine.score(codes, named, prompts=prompt)
    scores = await _attended(server, served, request, scoring, len(codes))
    rows = [{"total": s.total, "position": s.position.tolist(), "content": s.content.tolist()} for s in scores]
    return JSONResponse({"model": served.name, "scores": rows})


def _pick(request: Request, model: str | None) -> tuple[Server, Served]:
    server = server_of(request)
    served = server.engines.pick(model)
    request.state.log["model"] = served.name
    return server, served


async def _picture(server: Server, request: Request) -> io.BytesIO:
    return picture_file(await server.receive(request, server.settings.body_bytes), server.settings.pixels)


async def _codes(server: Server, served: Served, request: Request) -> list[Codes]:
    """
    Raises:
        ApiError: of too many images.
    """
    body, most = await server.receive(request, server.settings.body_bytes), server.settings.images
    codes = await served.engine.run(lambda: codes_from_dict(json_body(body)))
    if not 1 <= len(codes) <= most:
        raise ApiError(400, f"there are codes of {len(codes)} images; send those of 1 to {most}", param="codes")
    return codes


async def _attended(
    server: Server, served: Served, request: Request, work: Coroutine[Any, Any, Result], images: int = 1
) -> Result:
    try:
        with served.admit(images, drawing=False):
            return await attended(request, server.settings.timeout, work)
    finally:
        work.close()
