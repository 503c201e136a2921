"""The application: routes, page, and what happens at start and end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dvq_rt import __version__
from dvq_rt.serve import coding, images
from dvq_rt.serve.engines import Engines
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.gate import Gate, refusal
from dvq_rt.serve.server import Server, server_of
from dvq_rt.serve.settings import Settings, read_key
from runtimes.errors import ClosedError, DvqError

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
OBSERVED_EVERY = 1.0
"""Seconds between two looks at the batches for the metrics."""
SWITCH_SECONDS = 0.001
"""Python's own switch interval of 5 ms would let the answers hold up the thread that draws."""


def create_app(settings: Settings) -> Gate:
    """The application of one process. The API key is that of ``read_key``."""
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        server.engines = Engines(settings)
        await asyncio.to_thread(server.engines.warm)
        observer = asyncio.create_task(_observe(server))
        yield
        observer.cancel()
        server.engines.close()
        sys.setswitchinterval(before)

    app = FastAPI(title="dvq-rt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server

    async def refuse(request: Request, error: Exception) -> Response:
        return refusal(request.scope, error, server.metrics).response()

    kinds = (ApiError, DvqError, ValidationError, RequestValidationError, ClientDisconnect, HTTPException, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, refuse)
    app.include_router(images.routes)
    app.include_router(coding.routes)
    _add_state(app)
    _add_page(app)
    return Gate(app, read_key(), server.metrics)


async def _observe(server: Server) -> None:
    with suppress(ClosedError):
        while True:
            server.metrics.observe(server.engines.served.values())
            await asyncio.sleep(OBSERVED_EVERY)


def _add_state(app: FastAPI) -> None:
    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["state"], response_model=None)
    async def readyz(request: Request) -> Response:
        """Whether it takes requests."""
        closing = server_of(request).engines.closing
        return JSONResponse({"status": "closing" if closing else "ready"}, 503 if closing else 200)

    @app.get("/metrics", tags=["state"], response_model=None)
    async def metrics(request: Request) -> Response:
        """Numbers for Prometheus: queue, slots, tokens, images, times, errors."""
        server = server_of(request)
        server.metrics.observe(server.engines.served.values())
        text, kind = server.metrics.text()
        return Response(text, media_type=kind)


def _add_page(app: FastAPI) -> None:
    """The page's files, all of them read now; a request cannot name any other."""
    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in TYPES}
    headers = {"Cache-Control": "no-cache"}

    def send(name: str) -> Response:
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return send("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return send("docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Any:
        if name not in files:
            raise HTTPException(404)
        return send(name)
