"""A small HTTP client on asyncio, for the load test and the abuse test: quick, and free to misbehave."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtimes.errors import InputError


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers (lower case), and the whole body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to one server, each on a connection of its own.

    Args:
        url: ``http://host:port``.
        key: for the header ``Authorization``; None sends none.

    Raises:
        InputError: the URL is of another kind.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise InputError(f"the server's address is {url}; it must be like http://127.0.0.1:8000")
        self.host, self.port = parts.hostname, parts.port or 80
        self.key = key

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, limit=1 << 24)

    def head(self, method: str, path: str, length: int, **headers: str) -> bytes:
        """The lines before a body."""
        lines = {"Host": self.host, "Content-Length": str(length), "Connection": "close", **headers}
        if self.key:
            lines["Authorization"] = f"Bearer {self.key}"
        rows = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items())]
        return ("\r\n".join(rows) + "\r\n\r\n").encode()

    async def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """
        Raises:
            OSError, asyncio.IncompleteReadError: the connection failed.
        """
        reader, writer = await self.connect()
        try:
            writer.write(self.head(method, path, len(body), **headers) + body)
            await writer.drain()
            return await read_answer(reader)
        finally:
            writer.close()

    async def post(self, path: str, content: Any, **headers: str) -> Answer:
        """With a JSON body."""
        return await self.call("POST", path, json.dumps(content).encode(), **headers)

    async def stream(self, path: str, content: Any, take: Callable[[str, Any], None]) -> int:
        """With a JSON body, for server-sent events; each is handed to ``take`` when it comes, as kind and data.

        Returns:
            the status; without an event if it is no success.

        Raises:
            OSError, asyncio.IncompleteReadError: the connection failed.
        """
        reader, writer = await self.connect()
        try:
            body, text = json.dumps(content).encode(), b""
            writer.write(self.head("POST", path, len(body)) + body)
            await writer.drain()
            status, headers = await read_head(reader)
            chunked = headers.get("transfer-encoding") == "chunked"
            while chunked and (size := int(await reader.readuntil(b"\r\n"), 16)):
                text += (await reader.readexactly(size + 2))[:-2]
                *events, text = text.split(b"\n\n")
                for event in events:
                    kind, data = event.decode().split("\n")
                    take(kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
            return status
        finally:
            writer.close()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:] if line)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    status, headers = await read_head(reader)
    body = await (reader.readexactly(int(headers["content-length"])) if "content-length" in headers else reader.read())
    return Answer(status, headers, body)


def resident(pid: int) -> float:
    """MiB of a process that are in memory; of Linux."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
