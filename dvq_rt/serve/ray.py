"""The server on a Ray cluster: ``serve run dvq_rt.serve.ray:app engines=my-engine replicas=2 most_replicas=8``.

Every replica is a process with its own engines and answers what ``dvq-rt serve`` answers. Ray Serve spreads requests
over them, starts more while many wait, and starts those that die anew. It needs the extras ``[serve,ray]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import serve
from ray.serve import Application

from dvq_rt.engine import MOST_SLOTS
from dvq_rt.files import read_dataclass
from dvq_rt.labels import whole
from dvq_rt.serve.app import create_app
from dvq_rt.serve.gate import Gate
from dvq_rt.serve.settings import Settings, named_engines, place
from runtimes.errors import InputError

SETTINGS = ("slots", "queue", "timeout", "images", "megabytes", "megapixels")
"""Settings of the server that replicas take; the others belong to Ray Serve or follow from ``Cluster``."""
ASKED = 2
"""Requests of a replica, waiting ones included, above which there should be more replicas."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """
    Args:
        replicas: least number of replicas, 1 or more.
        most_replicas: largest number; None for ``replicas``.
        asked: requests of a replica, those that wait included, that Ray Serve keeps to by starting and ending replicas.
        num_cpus: processors of a replica; its graphs have as many threads.
        num_gpus: GPUs of a replica, also a share of one; above 0 the engines run there.

    Raises:
        InputError: a value is out of range.
    """

    replicas: int = 1
    most_replicas: int | None = None
    asked: int = ASKED
    num_cpus: int = 1
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        whole("replicas", self.replicas, 1, 10_000)
        whole("most_replicas", self.most, self.replicas, 10_000)
        whole("asked", self.asked, 1, 10_000)
        whole("num_cpus", self.num_cpus, 1, 1024)
        if not 0 <= self.num_gpus <= 64:
            raise InputError(f"num_gpus is {self.num_gpus}; it must be a number from 0 to 64")

    @property
    def most(self) -> int:
        return self.replicas if self.most_replicas is None else self.most_replicas


CLUSTER = tuple(field.name for field in fields(Cluster))


def app(arguments: Mapping[str, Any]) -> Application:
    """The application of Ray Serve; for the arguments see ``read_arguments``."""
    cluster, settings = read_arguments(arguments)

    def build() -> Gate:  # in each replica
        return create_app(settings)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="dvq_rt",
        ray_actor_options={"num_cpus": cluster.num_cpus, "num_gpus": cluster.num_gpus},
        # more than a replica admits: what is too much is refused by the application, with its status 429
        max_ongoing_requests=settings.queue + MOST_SLOTS,
        autoscaling_config={
            "min_replicas": cluster.replicas,
            "max_replicas": cluster.most,
            "target_ongoing_requests": cluster.asked,
        },
    )
    return deployment.bind()


def read_arguments(arguments: Mapping[str, Any]) -> tuple[Cluster, Settings]:
    """What ``serve run`` was given.

    Args:
        arguments: by name, as texts or numbers: ``engines``, as words of ``dvq-rt serve`` separated by commas, and the
            fields of ``Cluster``; ``slots``, ``queue``, ``timeout``, ``images``, ``megabytes`` and ``megapixels`` are
            those of ``dvq-rt serve``. Every machine opens the engines by these words.

    Raises:
        InputError: an argument is unknown or out of range.
    """
    given = {name: _number(value) for name, value in arguments.items()}
    words = [word.strip() for word in str(given.pop("engines", "")).split(",") if word.strip()]
    own = {name: given.pop(name) for name in CLUSTER if name in given}
    cluster: Cluster = read_dataclass(Cluster, own, "arguments", defaults=True, error=InputError)
    if foreign := sorted(set(given) - set(SETTINGS)):
        raise InputError(f"arguments: {foreign} are unknown; there are engines, {', '.join([*CLUSTER, *SETTINGS])}")
    device, engines = "cuda" if cluster.num_gpus else None, named_engines(words)
    if placed := [folder for _, folder in engines if place(folder)[1]]:
        raise InputError(
            f"engines: {', '.join(placed)} names a device, but Ray gives each replica its own; leave it out"
        )
    values = {"engines": engines, "threads": cluster.num_cpus, "device": device, **given}
    return cluster, read_dataclass(Settings, values, "arguments", defaults=True, error=InputError)


def _number(value: Any) -> Any:
    """A text from the command line as the number that it is."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value
