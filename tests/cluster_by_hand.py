"""The application of Ray Serve, really run: two replicas on this machine, one of which is killed under load; then one
replica, which gets a second beside it while requests wait.

    python tests/cluster_by_hand.py [seconds]        # needs dvq-rt[cpu,serve,ray]; minutes; not one of the tests

It fails unless every image is the one that ``Generator.sample`` draws, both replicas answer, all requests that come
after the kill are answered while Ray starts a new replica, and the second replica comes by itself.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import ray
from PIL import Image
from ray import serve

from dvq_rt import Generator
from dvq_rt.serve.ray import app

PORT = 8431
REPLICA = "ServeReplica"


def replicas() -> list[int]:
    """Process ids of the replicas, which descend from this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if REPLICA in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def draw(seed: int) -> np.ndarray:
    """One image from the server; a request whose replica died is sent again, as a client does."""
    body = json.dumps({"prompt": "hearts", "n": 1, "seed": seed}).encode()
    url, headers = f"http://127.0.0.1:{PORT}/v1/images/generations", {"Content-Type": "application/json"}
    for _ in range(20):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=300) as answer:
                (item,) = json.load(answer)["data"]
                return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))
        except (urllib.error.URLError, ConnectionError) as error:
            print(f"seed {seed}: {error}; again", flush=True)
            time.sleep(1)
    raise SystemExit(f"seed {seed} was never answered")


def wait_for_two(seconds: float) -> bool:
    """Whether there are two replicas within so many seconds."""
    deadline = time.monotonic() + seconds
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(1)
    return len(replicas()) == 2


def main() -> None:
    patience = float(sys.argv[1] if sys.argv[1:] else 120)
    ray.init(num_cpus=3, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    generator = Generator("demo:dq", slots=2, threads=1)
    kill_one(generator, patience)
    serve.delete("dvq_rt")
    scale_up(generator, patience)


def kill_one(generator: Generator, patience: float) -> None:
    """Of two replicas."""
    began = time.monotonic()
    arguments = {"engines": "demo:dq", "replicas": "2", "slots": "2", "timeout": "300"}
    serve.run(app(arguments), name="dvq_rt", route_prefix="/")
    print(f"two replicas after {time.monotonic() - began:.0f} s: {replicas()}", flush=True)
    assert len(replicas()) == 2
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(draw, range(4)))
        drawing = [pool.submit(draw, seed) for seed in range(4, 10)]
        time.sleep(1)
        busy = {pid: psutil.Process(pid).cpu_times().user for pid in replicas()}
        print(f"seconds of work by replica: {busy}", flush=True)
        victim = replicas()[0]
        os.kill(victim, signal.SIGKILL)
        print(f"killed {victim}", flush=True)
        pictures = first + [future.result() for future in drawing]
    compare(pictures, generator)
    assert wait_for_two(patience) and victim not in replicas()
    print(f"replicas now: {replicas()}", flush=True)


def scale_up(generator: Generator, patience: float) -> None:
    """From one replica to two, by eight clients at a time."""
    arguments = {"engines": "demo:dq", "replicas": "1", "most_replicas": "2", "slots": "2", "timeout": "300"}
    serve.run(app(arguments), name="dvq_rt", route_prefix="/")
    assert len(replicas()) == 1
    began, pictures = time.monotonic(), []
    with ThreadPoolExecutor(8) as pool:
        while len(replicas()) < 2 and time.monotonic() - began < patience:
            pictures += pool.map(draw, range(len(pictures), len(pictures) + 16))
        print(f"replicas {time.monotonic() - began:.0f} s after the first request: {replicas()}", flush=True)
        assert len(replicas()) == 2
        pictures += pool.map(draw, range(len(pictures), len(pictures) + 16))
    compare(pictures, generator)


def compare(pictures: list[np.ndarray], generator: Generator) -> None:
    """Picture i with the sample of seed i."""
    for seed, picture in enumerate(pictures):
        assert np.array_equal(picture, generator.sample(1, "hearts", seed=seed).to_numpy()[0]), f"seed {seed} differs"
    print(f"{len(pictures)} images are those of sample", flush=True)


if __name__ == "__main__":
    main()
