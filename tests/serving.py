"""A server that runs in a thread of the tests."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx

from dvq_rt.serve.command import ClosingServer, configuration, listen
from dvq_rt.serve.server import Server
from dvq_rt.serve.settings import Settings

SETTINGS = Settings(
    engines=(("dq", "demo:dq"), ("mq", "demo:mq")),
    port=0,
    slots=4,
    threads=1,
    queue=4,
    images=8,
    megabytes=1,
    megapixels=1,
)


class Running:
    """A server in a thread.

    Attributes:
        url, port: where it listens.
        server: what its routes share.
    """

    def __init__(self, settings: Settings) -> None:
        listener = listen(settings)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = configuration(settings)
        self.uvicorn = ClosingServer(config)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.server: Server = config.loaded_app.app.state.server

    def post(self, path: str, **options: Any) -> Any:
        return httpx.post(self.url + path, timeout=60, **options)

    def load(self, name: str = "dq") -> Any:
        return self.server.engines.served[name].generator.engine.batch.load

    def end(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
