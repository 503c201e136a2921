"""Mixed abuse of a running server: what bad and unlucky clients do, beside good ones whose answers are checked.

    python -m dvq_rt.serve.abuse http://127.0.0.1:8000 --engine demo:dq --seconds 1200 --pid PID

Streams that are left, bodies too large or too slow, broken pictures, unknown models, floods, connections without a
request, answers that nobody reads. It fails if a good client gets a wrong answer, if the server dies or keeps room for
images that are gone, or, with ``--pid`` of the server, if its memory grows by more than ``--growth`` MiB after the
first fifth. Start the server with its log in a file and look for ``exception`` in it; there must be none.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dvq_rt.generator import Generator
from dvq_rt.serve.client import Client, resident
from dvq_rt.serve.load import PATH
from dvq_rt.serve.settings import read_key
from runtimes.errors import DvqError

FAILED = (OSError, asyncio.IncompleteReadError)
SEEDS = 8
"""Different images that good clients ask for."""
BUSY = (429, 504)
"""What a good client may be told by a server with more to do than it can: the queue is full, or the time over."""


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


class Abuse:
    """
    Args:
        client: of the server.
        generator: its engine, opened here.
        gap: seconds between two acts of one actor.
    """

    def __init__(self, client: Client, generator: Generator, gap: float) -> None:
        self.client, self.gap = client, gap
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.random = random.Random(0)
        self.expected = generator.sample(SEEDS, seed=0).to_numpy()
        self.good_picture, self.codes = picture(100), generator.encode(io.BytesIO(picture(100)))[0].codes.tolist()

    def note(self, act: str, status: object) -> None:
        self.counts[f"{act}: {status}"] += 1

    def check(self, act: str, right: bool, words: str) -> None:
        if not right:
            self.wrong.append(f"{act}: {words}")

    # --- acts ------------------------------------------------------------------------------------------------------
    async def draw(self) -> None:
        """A good client."""
        number = self.random.randrange(SEEDS)
        answer = await self.client.post(PATH, {"seed": 0, "first": number})
        self.note("draw", answer.status)
        self.check("draw", answer.status in (200, *BUSY), f"status {answer.status} {answer.body[:200]!r}")
        if answer.status == 200:
            image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
            self.check(
                "draw", bool((np.asarray(image) == self.expected[number]).all()), f"image {number} is another one"
            )

    async def encode(self) -> None:
        """A good client."""
        answer = await self.client.call("POST", "/encode", self.good_picture)
        self.note("encode", answer.status)
        right = answer.status in BUSY or (answer.status == 200 and answer.json()["codes"]["codes"] == [self.codes])
        self.check("encode", right, f"status {answer.status} {answer.body[:200]!r}")

    async def leave(self) -> None:
        """Begin a stream of several images and leave it."""
        reader, writer = await self.client.connect()
        body = json.dumps({"n": 8, "stream": True, "partial_images": 20}).encode()
        writer.write(self.client.head("POST", PATH, len(body)) + body)
        await writer.drain()
        first = await reader.read(200)
        await asyncio.sleep(self.random.random())
        writer.transport.abort()
        self.note("leave", first.split()[1].decode() if first else "nothing")

    async def oversize(self) -> None:
        """A body that is too large, declared or in chunks without end."""
        path = self.random.choice(["/encode", "/score", PATH])
        if self.random.random() < 0.5:
            await self.refused("oversize", "POST", path, b"x" * (9 << 20), (413, 429))
            return
        reader, writer = await self.client.connect()
        writer.write(self.client.head("POST", path, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        for _ in range(1000):
            writer.write(chunk)
            await writer.drain()
            if reader.at_eof():
                break
        first = await reader.read(20)
        writer.transport.abort()
        self.note("endless", first.split()[1].decode() if first else "cut")

    async def broken(self) -> None:
        """Bytes that are no picture, a cut one, and one that says it is huge."""
        huge = bytearray(picture(8))
        huge[16:24] = (60000).to_bytes(4, "big") * 2
        body = self.random.choice([self.random.randbytes(999), self.good_picture[:5000], bytes(huge), b""])
        await self.refused("broken", "POST", self.random.choice(["/encode", "/reconstruct"]), body, (400, 413, 429))

    async def unknown(self) -> None:
        """Models, fields, paths and methods that there are not."""
        body = json.dumps(self.random.choice([{"model": "../../etc/passwd"}, {"n": -1}, {"x": 1}, {"n": 10**30}, []]))
        method = self.random.choice(["POST", "PUT", "DELETE"])
        await self.refused(
            "unknown", method, self.random.choice([PATH, "/decode", "/x"]), body.encode(), (400, 404, 405)
        )

    async def slow(self) -> None:
        """A body that comes a byte at a time, or never; a request that never ends; an answer that is not read."""
        _, writer = await self.client.connect()
        body = json.dumps({"n": 8, "with_codes": True}).encode()
        head = self.client.head("POST", PATH, len(body) + 9 * self.random.randrange(2))
        writer.write(self.random.choice([b"POST /encode HT", head, head + body]))
        await asyncio.sleep(30 * self.random.random())
        writer.transport.abort()
        self.note("slow", "left")

    async def flood(self) -> None:
        """Fifty requests at once."""

        async def one() -> None:
            answer = await self.client.post(PATH, {"n": 1})
            self.note("flood", answer.status)
            self.check("flood", answer.status in (200, *BUSY), f"status {answer.status}")

        await asyncio.gather(*(one() for _ in range(50)))
        await asyncio.sleep(10 * self.gap)

    async def garbage(self) -> None:
        """No HTTP at all."""
        _, writer = await self.client.connect()
        writer.write(self.random.randbytes(2000))
        await asyncio.sleep(0.1)
        writer.transport.abort()
        self.note("garbage", "left")

    async def refused(self, act: str, method: str, path: str, body: bytes, statuses: tuple[int, ...]) -> None:
        answer = await self.client.call(method, path, body)
        self.note(act, answer.status)
        told = answer.status in statuses and "message" in answer.json()["error"]
        self.check(act, told, f"{method} {path}: status {answer.status} {answer.body[:200]!r}")

    # --- all of them -----------------------------------------------------------------------------------------------
    async def run(self, seconds: float, pid: int | None) -> list[tuple[float, float]]:
        """Everybody at once; gives (seconds, MiB) of the server's memory."""
        end, memory = time.monotonic() + seconds, []
        acts = [self.draw, self.draw, self.encode, self.leave, self.leave, self.oversize, self.broken, self.unknown]
        acts += [self.slow, self.slow, self.slow, self.flood, self.garbage]

        async def repeat(act: Callable[[], Awaitable[None]]) -> None:
            while time.monotonic() < end:
                try:
                    await act()
                except FAILED as error:
                    self.note(act.__name__, type(error).__name__)
                await asyncio.sleep(self.gap * (0.5 + self.random.random()))

        tasks = [asyncio.create_task(repeat(act)) for act in acts]
        while time.monotonic() < end:
            if pid is not None:
                memory.append((round(seconds - end + time.monotonic(), 1), resident(pid)))
            await asyncio.sleep(min(5.0, seconds / 20))
        await asyncio.gather(*tasks)
        return memory

    async def settled(self) -> dict[str, float]:
        """What the server still holds some seconds after the last act."""
        for _ in range(60):
            text = (await self.client.call("GET", "/metrics")).body.decode()
            rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            names = ("dvq_images_held", "dvq_slots_busy", "dvq_queue_images")
            held = {row: float(value) for row, value in rows.items() if row.startswith(names)}
            if not any(held.values()):
                break
            await asyncio.sleep(1)
        return held


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--engine", default="demo:dq", help="the first engine that the server has")
    parser.add_argument("--seconds", type=float, default=1200.0, help="1200")
    parser.add_argument(
        "--gap", type=float, default=0.5, help="seconds between two acts of one client, of thirteen (0.5)"
    )
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory; on Linux")
    parser.add_argument("--growth", type=float, default=64.0, help="most MiB that memory may grow (64)")
    options = parser.parse_args(argv)
    try:
        with Generator(options.engine, threads=1) as generator:
            abuse = Abuse(Client(options.url, read_key()), generator, options.gap)
    except DvqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    async def work() -> tuple[list[tuple[float, float]], dict[str, float]]:
        return await abuse.run(options.seconds, options.pid), await abuse.settled()

    memory, held = asyncio.run(work())
    report: dict[str, Any] = {"counts": dict(sorted(abuse.counts.items())), "held": held, "wrong": abuse.wrong[:20]}
    growth = 0.0
    if memory:
        settled = [value for when, value in memory if when >= options.seconds / 5]
        growth = max(settled) - settled[0]
        report["memory"] = {
            "first": memory[0][1],
            "after_a_fifth": settled[0],
            "last": settled[-1],
            "most": max(settled),
        }
    print(json.dumps(report, indent=1))
    return 1 if abuse.wrong or any(held.values()) or growth > options.growth else 0


if __name__ == "__main__":
    sys.exit(main())
