"""What the routes of one process share."""

from __future__ import annotations

from starlette.requests import Request

from dvq_rt.serve.bodies import read_body
from dvq_rt.serve.engines import Engines
from dvq_rt.serve.errors import ApiError
from dvq_rt.serve.metrics import Metrics
from dvq_rt.serve.settings import UPLOADS, Settings


class Server:
    """Settings, engines and counters. The engines are opened when the process starts to serve."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.engines: Engines
        self._uploads = 0

    async def receive(self, request: Request, limit: int) -> bytes:
        """The body of a request; only so many are received at the same time, so that memory is bounded.

        Raises:
            ApiError: too many are, or as ``read_body``.
        """
        if self._uploads >= UPLOADS:
            raise ApiError(
                429,
                f"{UPLOADS} bodies are being received, the most at a time; try again in a second",
                kind="rate_limit_error",
                code="too_many_uploads",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._uploads += 1
        try:
            return await read_body(request, limit)
        finally:
            self._uploads -= 1


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server
