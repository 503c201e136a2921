"""A load test of a running server, which nobody else uses meanwhile. It does one of three things:

    python -m dvq_rt.serve.load http://127.0.0.1:8000 --seconds 120               # requests that come when they come
    python -m dvq_rt.serve.load http://127.0.0.1:8000 --closed                    # against one client, and sample
    python -m dvq_rt.serve.load http://127.0.0.1:8000 --requests 10000 --pid PID  # memory after 100 and after all

The first measures the capacity with twice as many clients as there are slots, then lets requests of one image arrive at
random (a Poisson process) at shares of it, whatever the answers take. The second compares one client at a time, as a
server without a shared batch would work; so many clients at once; and one call of ``sample`` in this process. The third
has so many clients who ask again when they are answered. With ``--stream`` requests are streams, and the time to the
first preview is measured too.

All of them say throughput, latencies and refusals, compare every image with ``Generator.sample`` of the same engine,
opened here, and count requests without an answer, answers with other than one image, and how many images more or fewer
the server has drawn by its own count than came here. If any of these is not 0 the exit status is 1.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt.files import write_file
from dvq_rt.generator import Generator
from dvq_rt.serve.client import Client, resident
from dvq_rt.serve.settings import read_key
from runtimes.errors import DvqError, EngineError

PATH = "/v1/images/generations"
SEED = 1000
PREVIEWS = 8
"""Previews of an image that streams ask for."""
SETTLED = 100
"""Requests after which memory is looked at for the first time."""
LATE = {"queue_full": 429, "deadline": 504}
"""Statuses that a stream tells as the code of an event, since it has begun."""
FAULTS = ("lost", "not_one_image", "different", "miscounted")


@dataclass(slots=True)
class Outcome:
    """One request: the number of its image, seconds from its arrival to the answer and to the first event of a stream,
    status (0: no answer), the image's file, and how many images came."""

    number: int
    seconds: float = 0.0
    preview: float | None = None
    status: int = 0
    image: bytes = b""
    answers: int = 0

    def put(self, item: dict[str, Any]) -> None:
        self.answers += 1
        self.image = base64.b64decode(item["b64_json"])


class Load:
    """
    Args:
        client: of the server.
        label: index of the label that is drawn; None for none.
        stream: whether requests are streams.
        images: uint8 [K, H, W, 3], what ``Generator.sample`` draws as the first K images of ``SEED``; requests ask for
            them in turn.
    """

    def __init__(self, client: Client, label: int | None, stream: bool, images: NDArray[np.uint8]) -> None:
        self.client, self.stream, self.images = client, stream, images
        self.body: dict[str, Any] = {"seed": SEED, "label": label}
        if stream:
            self.body |= {"stream": True, "partial_images": PREVIEWS}

    async def ask(self, number: int) -> Outcome:
        outcome, began = Outcome(number % len(self.images)), time.perf_counter()
        body, failed = {**self.body, "first": outcome.number}, 0

        def take(kind: str, data: dict[str, Any]) -> None:
            nonlocal failed
            if outcome.preview is None:
                outcome.preview = time.perf_counter() - began
            if kind == "error":
                failed = LATE.get(data["error"]["code"], 500)
            elif kind.endswith("completed"):
                outcome.put(data)

        try:
            if self.stream:
                outcome.status = await self.client.stream(PATH, body, take)
                outcome.status = failed or outcome.status
            else:
                answer = await self.client.post(PATH, body)
                outcome.status = answer.status
                for item in answer.json()["data"] if answer.status == 200 else []:
                    outcome.put(item)
        except (OSError, asyncio.IncompleteReadError):
            outcome.status = 0
        outcome.seconds = time.perf_counter() - began
        return outcome

    async def closed(self, clients: int, numbers: range) -> tuple[float, list[Outcome]]:
        """Images a second of so many clients, each of which asks again when it is answered."""
        waiting, outcomes = iter(numbers), []

        async def one() -> None:
            for number in waiting:
                outcomes.append(await self.ask(number))

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return len(numbers) / (time.perf_counter() - began), outcomes

    async def arriving(self, rate: float, seconds: float) -> list[Outcome]:
        """Requests at random times, ``rate`` a second on average."""
        clock = random.Random(SEED)
        tasks: list[asyncio.Task[Outcome]] = []
        began = time.perf_counter()
        due = clock.expovariate(rate)
        while due < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(len(tasks))))
            due += clock.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    async def drawn(self) -> int:
        """Images that the server has finished by its own count."""
        text = (await self.client.call("GET", "/metrics")).body.decode()
        rows = [line.rsplit(" ", 1) for line in text.splitlines()]
        return round(sum(float(row[1]) for row in rows if row[0].startswith("dvq_images_total{")))

    def differs(self, outcome: Outcome) -> bool:
        image = np.asarray(Image.open(io.BytesIO(outcome.image)))
        return not np.array_equal(image, self.images[outcome.number])


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Throughput, latencies in seconds, refusals, and requests that were lost or answered with other than one image."""
    times = [outcome.seconds for outcome in outcomes if outcome.status == 200]
    previews = [outcome.preview for outcome in outcomes if outcome.status == 200 and outcome.preview is not None]
    counts = {str(status): sum(o.status == status for o in outcomes) for status in sorted({o.status for o in outcomes})}
    return {
        "requests": len(outcomes),
        "images_per_second": round(len(times) / seconds, 2),
        **quantiles({"p50": 0.5, "p95": 0.95, "p99": 0.99}, times),
        **quantiles({"preview_p50": 0.5, "preview_p95": 0.95}, previews),
        "refused": counts.get("429", 0),
        "statuses": counts,
        "lost": counts.get("0", 0),
        "not_one_image": sum(o.status == 200 and o.answers != 1 for o in outcomes),
    }


def quantiles(names: dict[str, float], values: Sequence[float]) -> dict[str, float]:
    """Quantiles by their names; none of no values."""
    return {name: round(float(np.quantile(values, share)), 3) for name, share in names.items()} if values else {}


async def checked(load: Load, outcomes: Sequence[Outcome], before: int) -> dict[str, int]:
    """How many images are others than ``Generator.sample``'s, and how many more or fewer the server has drawn since it
    had drawn ``before`` than came."""
    came = [outcome for outcome in outcomes if outcome.image]
    miscounted = await load.drawn() - before - sum(outcome.answers for outcome in outcomes)
    return {"compared": len(came), "different": sum(map(load.differs, came)), "miscounted": miscounted}


async def main_closed(load: Load, generator: Generator, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of the three ways, in turn, so that other load on the machine hits them alike."""
    rounds: list[dict[str, Any]] = []
    count, faults = len(load.images), dict.fromkeys(FAULTS, 0)
    for _ in range(options.rounds):
        before = await load.drawn()
        single, alone = await load.closed(1, range(max(2, count // 4)))
        several, together = await load.closed(options.clients, range(count))
        began = time.perf_counter()
        generator.sample(count, options.label, SEED)
        call = count / (time.perf_counter() - began)
        row = {"one_client": single, "clients": several, "sample": call}
        row |= {"clients_to_sample": several / call, "clients_to_one": several / single}
        rounds.append({name: round(value, 3) for name, value in row.items()})
        print(json.dumps(rounds[-1]), flush=True)
        found = {**summary(alone + together, 1.0), **await checked(load, alone + together, before)}
        faults = {name: faults[name] + abs(found[name]) for name in FAULTS}
    medians = {name: round(float(np.median([row[name] for row in rounds])), 3) for name in rounds[0]}
    last = {"median": medians, **faults}
    print(json.dumps(last))
    return [*rounds, last]


async def main_open(load: Load, slots: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    await load.closed(slots, range(slots))  # the loop has grown to its slots then
    capacity, _ = await load.closed(2 * slots, range(options.images))
    results: list[dict[str, Any]] = [{"capacity": round(capacity, 2), "slots": slots, "images": options.images}]
    print(json.dumps(results[0]), flush=True)
    for share in options.rates:
        before, began = await load.drawn(), time.perf_counter()
        outcomes = await load.arriving(share * capacity, options.seconds)
        row = {"share": share, **summary(outcomes, time.perf_counter() - began)}
        results.append({**row, **await checked(load, outcomes, before)})
        print(json.dumps(results[-1]), flush=True)
    return results


async def main_requests(load: Load, options: argparse.Namespace) -> list[dict[str, Any]]:
    """So many requests, and the memory of the server after the first of them and after all."""
    before, began = await load.drawn(), time.perf_counter()
    outcomes: list[Outcome] = []
    memory = {}
    for end in sorted({min(SETTLED, options.requests), options.requests}):
        outcomes += (await load.closed(options.clients, range(len(outcomes), end)))[1]
        if options.pid is not None:
            memory[f"mib_after_{end}"] = round(resident(options.pid), 1)
    row = {**summary(outcomes, time.perf_counter() - began), **memory, **await checked(load, outcomes, before)}
    print(json.dumps(row))
    return [row]


async def run(client: Client, options: argparse.Namespace) -> list[dict[str, Any]]:
    slots = (await client.call("GET", "/v1/models")).json()["data"][0]["slots"]
    with Generator(options.engine, slots=slots, threads=options.threads) as generator:
        images = generator.sample(options.images, options.label, SEED).to_numpy()
        load = Load(client, options.label, options.stream, images)
        if options.closed:
            return await main_closed(load, generator, options)
        return await (main_requests(load, options) if options.requests else main_open(load, slots, options))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--engine", default="demo:dq", help="the first engine that the server has, for the comparison")
    parser.add_argument("--label", type=int, help="index of the label that is drawn; none if left out")
    parser.add_argument("--stream", action="store_true", help="ask for streams, and measure the first preview")
    parser.add_argument("--images", type=int, default=64, help="different images; in a round, or for the capacity (64)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8, 1.2], help="shares of the capacity")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals at each rate (120)")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--closed", action="store_true", help="compare clients with one client and with sample")
    way.add_argument("--requests", type=int, help="send so many in all")
    parser.add_argument("--clients", type=int, default=8, help="with --closed or --requests (8)")
    parser.add_argument("--rounds", type=int, default=5, help="with --closed (5)")
    parser.add_argument("--pid", type=int, help="of the server's process, for its memory with --requests; on Linux")
    parser.add_argument("--threads", type=int, help="of the engine opened here; as the server's")
    parser.add_argument("--out", help="write all numbers to this JSON file")
    options = parser.parse_args(argv)
    try:
        results = asyncio.run(run(Client(options.url, read_key()), options))
        if options.out:
            write_file(Path(options.out), (json.dumps(results, indent=1) + "\n").encode())
    except OSError as error:
        print(f"error: {EngineError(f'no server answers at {options.url}: {error}')}", file=sys.stderr)
        return 2
    except DvqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(result.get(name, 0) for result in results for name in FAULTS) else 0


if __name__ == "__main__":
    sys.exit(main())
