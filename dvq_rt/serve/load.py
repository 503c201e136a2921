"""A load test of a running server: requests that come when they come, whatever the answers take.

    python -m dvq_rt.serve.load http://127.0.0.1:8000 --engine demo:dq --seconds 120

It measures the capacity with as many clients as there are slots, then lets requests of one image arrive at random (a
Poisson process) at shares of it, and says throughput, latencies and refusals. Every image is compared with
``Generator.sample`` of the same engine, opened here. With ``--closed`` it compares instead: one client at a time, as a
server without a shared batch would work; so many clients at once; and one call of ``sample`` in this process.
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
from PIL import Image

from dvq_rt.files import write_file
from dvq_rt.generator import Generator
from dvq_rt.serve.client import Client
from dvq_rt.serve.settings import read_key
from runtimes.errors import DvqError, EngineError

PATH = "/v1/images/generations"
FIRST_SEED = 1000


@dataclass(slots=True)
class Outcome:
    """One request: its seed, seconds from its arrival to the answer, status (0 for none), and the image."""

    seed: int
    seconds: float = 0.0
    status: int = 0
    image: bytes = b""
    answers: int = 0


async def ask(client: Client, seed: int, label: int | None) -> Outcome:
    outcome, began = Outcome(seed), time.perf_counter()
    try:
        answer = await client.post(PATH, {"seed": seed, "label": label})
        outcome.status = answer.status
        if answer.status == 200:
            content = answer.json()
            if content["seed"] == seed:
                outcome.answers = len(content["data"])
                outcome.image = base64.b64decode(content["data"][0]["b64_json"])
    except (OSError, asyncio.IncompleteReadError):
        outcome.status = 0
    outcome.seconds = time.perf_counter() - began
    return outcome


async def closed(
    client: Client, clients: int, count: int, label: int | None, first: int
) -> tuple[float, list[Outcome]]:
    """Images a second of so many clients, each of which asks again when it is answered."""
    seeds, outcomes = iter(range(first, first + count)), []

    async def one() -> None:
        for seed in seeds:
            outcomes.append(await ask(client, seed, label))

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return count / (time.perf_counter() - began), outcomes


async def arriving(client: Client, rate: float, seconds: float, label: int | None, first: int) -> list[Outcome]:
    """Requests at random times, ``rate`` a second on average."""
    clock = random.Random(first)
    tasks: list[asyncio.Task[Outcome]] = []
    began = time.perf_counter()
    due = clock.expovariate(rate)
    while due < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, first + len(tasks), label)))
        due += clock.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def compare(generator: Generator, outcomes: Sequence[Outcome], label: int | None, most: int) -> dict[str, int]:
    """How many images, of at most so many, are bit for bit those of ``Generator.sample``."""
    drawn = [outcome for outcome in outcomes if outcome.image][:most]
    equal = 0
    for outcome in drawn:
        image = np.asarray(Image.open(io.BytesIO(outcome.image)))
        equal += bool((image == generator.sample(1, label, outcome.seed).to_numpy()[0]).all())
    return {"compared": len(drawn), "equal": equal}


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Throughput, latencies in seconds, refusals, and requests that were lost or answered with other than one image."""
    times = [outcome.seconds for outcome in outcomes if outcome.status == 200]
    quantiles = np.quantile(times, [0.5, 0.95, 0.99]) if times else [float("nan")] * 3
    counts = {str(status): sum(o.status == status for o in outcomes) for status in sorted({o.status for o in outcomes})}
    return {
        "requests": len(outcomes),
        "images_per_second": round(len(times) / seconds, 2),
        **{name: round(float(value), 3) for name, value in zip(("p50", "p95", "p99"), quantiles, strict=True)},
        "statuses": counts,
        "lost": sum(o.status == 0 for o in outcomes),
        "not_one_image": sum(o.status == 200 and o.answers != 1 for o in outcomes),
    }


async def main_closed(client: Client, generator: Generator, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of the three ways, in turn, so that other load on the machine hits them alike."""
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        first = FIRST_SEED + number * options.images
        few = max(2, options.images // 4)
        single, _ = await closed(client, 1, few, options.label, first)
        several, outcomes = await closed(client, options.clients, options.images, options.label, first)
        began = time.perf_counter()
        generator.sample(options.images, options.label, seed=first)
        call = options.images / (time.perf_counter() - began)
        row = {"one_client": single, "clients": several, "sample": call}
        row |= {"clients_to_sample": several / call, "clients_to_one": several / single}
        lost = summary(outcomes, 1.0)
        rounds.append({**{name: round(value, 3) for name, value in row.items()}, "lost": lost["lost"]})
        print(json.dumps(rounds[-1]), flush=True)
    medians = {name: round(float(np.median([row[name] for row in rounds])), 3) for name in rounds[0]}
    print(json.dumps({"median": medians}))
    return [*rounds, {"median": medians}]


async def main_open(client: Client, generator: Generator, options: argparse.Namespace) -> list[dict[str, Any]]:
    slots = (await client.call("GET", "/v1/models")).json()["data"][0]["slots"]
    await closed(client, slots, slots, options.label, FIRST_SEED)  # the loop has grown to its slots then
    capacity, _ = await closed(client, 2 * slots, options.images, options.label, FIRST_SEED)
    print(json.dumps({"capacity": round(capacity, 2), "slots": slots, "images": options.images}), flush=True)
    results: list[dict[str, Any]] = [{"capacity": round(capacity, 2)}]
    for share in options.rates:
        first = FIRST_SEED * (2 + len(results)) * 1000
        began = time.perf_counter()
        outcomes = await arriving(client, share * capacity, options.seconds, options.label, first)
        row = {"share": share, **summary(outcomes, time.perf_counter() - began)}
        row |= compare(generator, outcomes, options.label, options.compare)
        results.append(row)
        print(json.dumps(row), flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--engine", default="demo:dq", help="the engine that the server has, for the comparison")
    parser.add_argument("--label", type=int, help="index of the label that is drawn; none if left out")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8, 1.2], help="shares of the capacity")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals at each rate (120)")
    parser.add_argument("--images", type=int, default=64, help="drawn to measure the capacity, or in a round (64)")
    parser.add_argument("--compare", type=int, default=100, help="most images that are compared, for each rate (100)")
    parser.add_argument("--closed", action="store_true", help="compare clients with one client and with sample")
    parser.add_argument("--clients", type=int, default=8, help="with --closed (8)")
    parser.add_argument("--rounds", type=int, default=5, help="with --closed (5)")
    parser.add_argument("--slots", type=int, help="of the engine opened here; as the server's")
    parser.add_argument("--threads", type=int, help="of the engine opened here; as the server's")
    parser.add_argument("--out", help="write all numbers to this JSON file")
    options = parser.parse_args(argv)
    try:
        client = Client(options.url, read_key())
        with Generator(options.engine, slots=options.slots, threads=options.threads) as generator:
            work = main_closed if options.closed else main_open
            results = asyncio.run(work(client, generator, options))
        if options.out:
            write_file(Path(options.out), (json.dumps(results, indent=1) + "\n").encode())
    except OSError as error:
        print(f"error: {EngineError(f'no server answers at {options.url}: {error}')}", file=sys.stderr)
        return 2
    except DvqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    faults = sum(
        r.get("lost", 0) + r.get("not_one_image", 0) + r.get("compared", 0) - r.get("equal", 0) for r in results
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
