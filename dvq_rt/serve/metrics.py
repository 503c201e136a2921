"""What ``GET /metrics`` tells Prometheus. With several workers the numbers are those of all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from dvq_rt.serve.engines import Served

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Of the library: where several processes keep their numbers."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and gauges of one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("dvq_requests", "answered requests", ("path", "status"), registry=registry)
        self.seconds = Histogram(
            "dvq_request_seconds", "from a request to its answer's end", ("path",), buckets=SECONDS, registry=registry
        )
        self.first_preview = Histogram(
            "dvq_first_preview_seconds",
            "from a streaming request to its first event",
            ("model",),
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter("dvq_images", "finished images", ("model",), registry=registry)
        self.tokens = Counter("dvq_tokens", "drawn or scored tokens", ("model",), registry=registry)
        self.errors = Counter("dvq_errors", "refused or failed requests", ("code",), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ("model",), registry=registry, multiprocess_mode="livesum")

        self.held = gauge("dvq_images_held", "images that are admitted and not finished")
        self.queue = gauge("dvq_queue_images", "images without a slot")
        self.slots = gauge("dvq_slots", "slots")
        self.busy = gauge("dvq_slots_busy", "slots in use")
        self._counted: dict[str, int] = {}

    def observe(self, engines: Iterable[Served]) -> None:
        """Take the numbers of the batches as they are now."""
        for served in engines:
            load, name = served.generator.engine.batch.load, served.name
            self.held.labels(name).set(served.held)
            self.queue.labels(name).set(load.waiting)
            self.slots.labels(name).set(load.slots)
            self.busy.labels(name).set(load.busy)
            self.tokens.labels(name).inc(load.tokens - self._counted.get(name, 0))
            self._counted[name] = load.tokens

    def text(self) -> tuple[bytes, str]:
        """The page and its media type."""
        registry = self.registry
        if FOLDER_VARIABLE in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST
