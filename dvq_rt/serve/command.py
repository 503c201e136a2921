"""``dvq-rt serve``: from options to a listening server."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import time
from functools import partial

import uvicorn
from uvicorn.supervisors import Multiprocess

from dvq_rt.serve.app import create_app
from dvq_rt.serve.engines import open_engine
from dvq_rt.serve.gate import Gate, JsonLines
from dvq_rt.serve.metrics import FOLDER_VARIABLE
from dvq_rt.serve.protocol import PatientProtocol
from dvq_rt.serve.settings import KEY_VARIABLE, Settings, read_key
from runtimes.errors import InputError

LOG = logging.getLogger("dvq_rt.serve")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 256
ANSWER_SECONDS = 2
"""In which a server that closes sends its last answers."""
WORKER_SECONDS = 60
"""In which a worker must have started to answer its parent; loading the packages takes long on a busy machine."""


def serve(settings: Settings) -> int:
    """Serve until a signal ends it: new requests are refused then, and those under way are finished.

    Returns:
        Exit status: 0, or 1 if the server could not start.

    Raises:
        EngineError: an engine's folder is missing or altered.
        BackendError: its device is not there, or not for this engine.
        InputError: the address cannot be listened on, or the API key is none.
    """
    key = read_key()
    for _, folder in settings.engines:
        open_engine(folder, settings).close()  # told in one line, before workers fail at it one after the other
    config = configuration(settings)
    log_json()
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    if settings.host not in LOOPBACK and key is None:
        LOG.warning("everybody who reaches %s may use this server; set %s to a key", host, KEY_VARIABLE)
    LOG.info("serving %s on http://%s:%d", ", ".join(name for name, _ in settings.engines), host, port)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again once it has ended well
    if settings.workers == 1:
        server = ClosingServer(config)
        server.run([listener])
        return 0 if server.started else 1
    with tempfile.TemporaryDirectory(prefix="dvq-rt-metrics-") as folder:
        os.environ[FOLDER_VARIABLE] = folder  # read by the workers
        Multiprocess(config, sockets=[listener]).run()
    return 0


class ClosingServer(uvicorn.Server):
    """Goes on listening while it finishes what it has, so that ``/readyz`` and new requests are told that it closes;
    what is not finished in time, or meets a second Ctrl-C, is answered with 503."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        engines = self.config.loaded_app.app.state.server.engines
        engines.closing = True
        end = time.monotonic() + (self.config.timeout_graceful_shutdown or 0)
        while self.server_state.tasks and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(engines.close)
        end = time.monotonic() + ANSWER_SECONDS
        while self.server_state.tasks and time.monotonic() < end:
            await asyncio.sleep(0.1)
        self.config.timeout_graceful_shutdown = ANSWER_SECONDS
        await super().shutdown(sockets)


def configuration(settings: Settings) -> uvicorn.Config:
    """Of uvicorn, for one process."""
    return uvicorn.Config(
        partial(application, settings),
        factory=True,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        workers=settings.workers,
        timeout_worker_healthcheck=WORKER_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )


def application(settings: Settings) -> Gate:
    """The application of one process."""
    if settings.workers > 1:
        log_json()  # a worker is a process that has no log yet
    return create_app(settings)


def log_json() -> None:
    """Everything at level INFO as lines of JSON on the standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def listen(settings: Settings) -> socket.socket:
    """A socket that listens on the address.

    Raises:
        InputError: it is taken, or is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --host or --port"
        ) from error
    return listener
