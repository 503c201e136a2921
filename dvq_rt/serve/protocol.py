"""HTTP connections that cannot be held for ever by clients that send or read too slowly."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
LOOK_SECONDS = 5.0
PATIENCE = 4
"""Looks in a row that find a connection stuck before it is cut."""


class PatientProtocol(H11Protocol):
    """Cuts a connection whose request's head does not come, or whose client does not read the answer, within
    ``PATIENCE`` looks; and refuses those beyond ``MOST_CONNECTIONS``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stuck = 0
        self.look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self.look = self.loop.call_later(LOOK_SECONDS, self.watch)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.look is not None:
            self.look.cancel()
            self.look = None
        super().connection_lost(exc)

    def watch(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        self.stuck = self.stuck + 1 if idle or self.flow.write_paused else 0
        if self.stuck >= PATIENCE:
            self.transport.abort()
        elif self.look is not None:
            self.look = self.loop.call_later(LOOK_SECONDS, self.watch)
