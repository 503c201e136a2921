"""Check an engine on this machine: golden values from PyTorch, and that slots do not disturb one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dvq_rt.decoding import Job
from dvq_rt.manifest import read_tensors
from dvq_rt.sampling import SamplingParams, uniforms

if TYPE_CHECKING:
    from dvq_rt.generator import Generator

LOGIT_BOUND = 2e-4
"""Largest logit error over the largest logit: float32 sums in another order; TF32 or a wrong mask gives far more."""
IMAGE_BOUND = 1e-3
"""Largest error of a decoded pixel on the [-1, 1] scale, an eighth of an 8-bit level."""
CODE_BOUND = 0.005
"""Share of codes that may differ: only near-ties between two codes can."""


class Check(NamedTuple):
    """One comparison: what was measured, the most that is allowed, and whether it holds."""

    name: str
    measured: float
    bound: float
    ok: bool


def check(name: str, measured: float, bound: float) -> Check:
    return Check(name, float(measured), bound, bool(measured <= bound))


def verify(generator: Generator) -> list[Check]:
    """Run every check; an engine is sound if all are ``ok``.

    Golden tensors (``golden.safetensors``, made by PyTorch at export): ``images``, ``codes``, ``grain``, ``decoded``;
    ``position`` and ``content`` int64 [N, T + 1] (joint ids, -1 after the end), ``steps`` int64 [S] and both heads'
    logits [N, S, V] at those steps; ``free_labels`` [M], ``free_cells`` [M, cells] of free runs with seed 0.
    """
    golden = read_tensors(generator.path / "golden.safetensors")
    layout = generator.layout
    results = []
    encoded = generator._program("encoder").run({"images": golden["images"]})
    results.append(
        check("encoder: share of codes that differ", (encoded["codes"] != golden["codes"]).mean(), CODE_BOUND)
    )
    results.append(
        check("encoder: share of regions routed otherwise", (encoded["grain"] != golden["grain"]).mean(), 0.0)
    )
    decoded = generator._program("decoder").run({"codes": golden["codes"]})["images"]
    results.append(check("decoder: largest pixel error", np.abs(decoded - golden["decoded"]).max(), IMAGE_BOUND))

    position, content = golden["position"], golden["content"]
    errors: dict[str, list[float]] = {"position": [], "content": []}
    rows = [replay(generator, position[i], content[i], 1)[0] for i in range(len(position))]
    for i, row in enumerate(rows):
        for head in errors:
            want = golden[f"{head}_logits"][i]
            reached = golden["steps"] < min(len(row[head]), (position[i] >= 0).sum() - 1)
            got = row[head][golden["steps"][reached]]
            errors[head].append(np.abs(got - want[reached]).max() / np.abs(want[reached]).max())
    for head, found in errors.items():  # np.max, unlike max, hands NaN on
        results.append(check(f"step: relative {head} logit error", np.max(found), LOGIT_BOUND))

    twins = replay(generator, position[0], content[0], 2, other=(position[0], content[0]))
    same = np.max([np.abs(twins[0][h] - twins[1][h]).max() for h in errors])
    results.append(check("step: difference between identical slots", same, 0.0))
    beside = replay(generator, position[0], content[0], 2, other=(position[-1], content[-1]))
    changed = np.max([np.abs(twins[0][h] - beside[0][h]).max() for h in errors])
    results.append(check("step: change of a slot when its neighbour changes", changed, 0.0))

    plain = SamplingParams.from_dict(generator.manifest.defaults)
    differ = 0
    for i, label in enumerate(golden["free_labels"].tolist()):
        params = plain if layout.null_label and label < layout.classes else SamplingParams()
        jobs = [Job(0, int(label), uniforms(0, i, layout.max_length), params)]
        width = 1 if params.guidance == 1 else 2
        loop = generator._new_loop(width)
        cells = next(iter(loop.run(jobs))).cells
        differ += int((cells != golden["free_cells"][i]).any())
    results.append(check("free run: images whose tokens differ from PyTorch", differ, 0.0))
    return results


def replay(
    generator: Generator,
    position: np.ndarray,
    content: np.ndarray,
    slots: int,
    other: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Logits of both heads, [T, V] each, of a forced sequence in slot 0 and, if given, of another one in slot 1."""
    loop = generator._new_loop(slots)
    layout, params = generator.layout, SamplingParams(positions="drawn")
    given = [(position, content)] + ([other] if other else [])
    jobs = []
    for i, (p, c) in enumerate(given):
        end = int((p >= 0).sum())
        label = int(c[0]) - layout.content_sos
        jobs.append(Job(i, label, uniforms(0, i, layout.max_length), params, (p[1:end], c[1:end])))
    seen: list[dict[str, list[np.ndarray]]] = [{"position": [], "content": []} for _ in jobs]

    def watch(active: dict[int, Job]) -> None:
        for slot, job in active.items():
            for head, found in seen[job.index].items():
                found.append(loop.report(f"{head}_logits")[slot].copy())

    for _ in loop.run(jobs, watch=watch):
        pass
    return [{head: np.stack(found) for head, found in rows.items()} for rows in seen]
