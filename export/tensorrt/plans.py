"""Plans: which GPUs to build for, and the build."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dvq_rt.files import guard
from export.tensorrt.check import Census, check_network, specs
from export.tracing import load_graph
from runtimes.cuda import driver_version, find_gpu
from runtimes.errors import ExportError
from runtimes.tensorrt_api import CURRENT, TensorRT

AHEAD = ("sm86", "sm89", "sm120")
"""Targets without a GPU at hand: GeForce RTX 30, 40 and 50."""


class Plan(NamedTuple):
    """A plan that was built: what its network consists of, ``bytes`` of the plan, ``seconds`` of the build."""

    name: str
    census: Census
    bytes: int
    seconds: float


def choose_targets(api: TensorRT, targets: Sequence[str]) -> list[str]:
    """GPUs to build for, ``current`` and nothing resolved by what is in this machine.

    Raises:
        ConfigError: the package cannot build for a target.
        BackendError: ``current`` without a GPU.
    """
    resolved = list(targets) or ([CURRENT] if driver_version() or not api.ahead_of_time else list(AHEAD))
    api.check_targets(resolved)
    if resolved == [CURRENT]:
        resolved = [find_gpu().target]
        if api.ahead_of_time:
            api.check_targets(resolved)
    return resolved


def build_plan(api: TensorRT, graph: Path, folder: Path, interface: dict[str, Any], targets: Sequence[str]) -> Plan:
    """Parse a graph, check the network, write the plan.

    Args:
        graph: ONNX file; the plan gets its name, into ``folder``.
        interface: of the step, as in the manifest; of the other graphs their own is taken.

    Raises:
        ExportError: TensorRT refuses or would misread the graph, or cannot build the plan.
    """
    with guard(ExportError, f"TensorRT cannot build {graph.name}"):
        network = api.parse(graph)
        if graph.stem == "step":
            census = check_network(network, interface, len(interface["caches"]) // 2)
        else:
            census = check_network(network, {**specs(load_graph(graph).graph), "caches": []}, 0)
        start = time.monotonic()
        plan = api.build(network, targets)
    (folder / f"{graph.stem}.plan").write_bytes(plan)
    return Plan(graph.stem, census, len(plan), time.monotonic() - start)


def plans_table(plans: Sequence[Plan]) -> str:
    """A table of plans."""
    lines = [f"{'plan':8s} {'layers':>7s} {'KV updates':>11s} {'attentions':>11s} {'MB':>8s} {'build s':>8s}"]
    for plan in plans:
        layers, updates, attentions = plan.census
        lines.append(
            f"{plan.name:8s} {layers:7d} {updates:11d} {attentions:11d} {plan.bytes / 1e6:8.1f} {plan.seconds:8.1f}"
        )
    return "\n".join(lines)
