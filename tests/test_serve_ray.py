"""The application of Ray Serve: what it is asked for reaches replicas and settings. ``cluster_by_hand.py`` runs it."""

from __future__ import annotations

import pytest

from runtimes.errors import InputError

pytest.importorskip("ray.serve")

from dvq_rt.serve.ray import Cluster, read_arguments


def test_arguments_reach_replicas_and_settings() -> None:
    """Protects ``serve run``, whose arguments are texts: replicas, their limits, processors, GPUs, and the server's."""
    arguments = {"engines": "demo:dq,mine=demo:mq", "replicas": "2", "most_replicas": "6", "num_gpus": "0.5"}
    cluster, settings = read_arguments({**arguments, "num_cpus": "3", "asked": 4, "queue": "10", "timeout": "2.5"})
    assert cluster == Cluster(2, 6, 4, 3, 0.5)
    assert settings.engines == (("demo:dq", "demo:dq"), ("mine", "demo:mq"))
    assert (settings.threads, settings.device, settings.queue, settings.timeout) == (3, "cuda", 10, 2.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replicas": "0"}, "replicas is 0; it must be an integer from 1"),
        ({"replicas": "3", "most_replicas": "2"}, "most_replicas is 2; it must be an integer from 3"),
        ({"num_gpus": "many"}, "num_gpus is 'many'"),
        ({"nonsense": "1"}, "are unknown; there are engines, replicas"),
        ({"port": "80"}, "are unknown"),
        ({"engines": "a,demo:mq@cuda:1"}, "demo:mq@cuda:1 names a device"),
        ({"engines": "a b"}, "has other characters"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, str], words: str) -> None:
    """Protects deployments from an option that is taken and does nothing."""
    with pytest.raises(InputError, match=words):
        read_arguments(arguments)


def test_one_replica_by_default() -> None:
    """Protects small machines: nothing grows unless it was allowed to."""
    cluster, settings = read_arguments({})
    assert (cluster.replicas, cluster.most, settings.device) == (1, 1, None)
