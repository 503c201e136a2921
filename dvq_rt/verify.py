"""Check an engine on this machine: golden values from PyTorch, and that slots do not disturb one another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dvq_rt.decoding import Job, Loop
from dvq_rt.files import read_tensors
from dvq_rt.images import to_uint8
from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.protocol import Array, Program

if TYPE_CHECKING:
    from dvq_rt.generator import Generator

LOGIT_BOUND = 2e-4
"""Largest logit error over the largest logit: float32 sums in another order; TF32 or a wrong mask gives far more."""
QUANTISED_BOUND = 0.03
"""Largest root mean square of a sequence's logit errors over that of its logits, for integer weights, against PyTorch
with the same integers and the same rounding of activations. One layer agrees within 1e-6, but where the last bit of a
sum decides how an activation is rounded the two part by one level of 255, and over some layers that grows to the size
of the rounding itself, under 1 % of the logits; wrong integers or scales give about 1."""
TOP_BOUND = 0.05
"""Share of most probable tokens that may differ for integer weights, for the same reason."""
QUANTISED_IMAGE_BOUND = 0.15
"""Largest root mean square of pixel errors over that of the pixels, for integer convolutions, also for that reason. It
grows to the size of the rounding itself: 1 % of the pixels for the demos, 9 and 11 % for presets' random weights."""
IMAGE_BOUND = 1e-3
"""Largest error of a decoded pixel on the [-1, 1] scale, an eighth of an 8-bit level."""
CODE_BOUND = 0.005
"""Share of codes that may differ: only near-ties between two codes can."""
SLOTS = 7
"""Slots that are compared with one another: 4 + 2 + 1, because kernels take rows in groups, and what is left over in
another way."""
FEW = 4
"""Candidates of each draw in free runs that are compared token by token."""


class Bounds(NamedTuple):
    """The most that is allowed of each error: of ``logits``, ``images``, share of ``codes``, share of ``tokens`` drawn
    otherwise from the same history."""

    logits: float = LOGIT_BOUND
    images: float = IMAGE_BOUND
    codes: float = CODE_BOUND
    tokens: float = 0.0


BOUNDS = {"fp32": Bounds(), "fp16": Bounds(2e-2, 2e-2, 0.05, 0.05), "bf16": Bounds(0.16, 0.16, 0.4, 0.5)}
"""By the manifest's precision. Narrow formats meet many near-ties; bf16 has an eighth of the digits of fp16."""


class Check(NamedTuple):
    """One comparison: what was measured, the most that is allowed, and whether it holds."""

    name: str
    measured: float
    bound: float
    ok: bool


def check(name: str, measured: float, bound: float) -> Check:
    return Check(name, float(measured), bound, bool(measured <= bound))


def verify(generator: Generator, limit: int | None = None) -> list[Check]:
    """Run every check; an engine is sound if all are ``ok``. ``limit`` stops each sequence after so many tokens.

    Golden tensors (``golden.safetensors``, made by PyTorch at export): ``images``, ``codes``, ``grain``, ``decoded``;
    ``position`` and ``content`` int64 [N, T + 1] (joint ids, -1 after the end), ``steps`` int64 [S] and both heads'
    logits [N, S, V] at those steps; ``free_labels`` [M] of free runs with seed 0 and either their ``free_cells`` [M,
    cells] or their tokens, ``free_position`` and ``free_content`` as above.
    """
    golden = read_tensors(generator.path / "golden.safetensors")
    bounds = BOUNDS[generator.manifest.precision]
    results = []
    encoded = by_row(generator._program("encoder"), "images", golden["images"])
    results.append(
        check("encoder: share of codes that differ", (encoded["codes"] != golden["codes"]).mean(), bounds.codes)
    )
    # of a keeping layout the network's scores decide, and they have near-ties too
    routed = 0.0 if generator.layout.covering or generator.manifest.precision == "fp32" else bounds.codes
    results.append(
        check("encoder: share of regions routed otherwise", (encoded["grain"] != golden["grain"]).mean(), routed)
    )
    quantised = generator.manifest.weights.startswith("int")
    decoded = by_row(generator._program("decoder"), "codes", golden["codes"])
    error = decoded["images"] - golden["decoded"]
    if quantised:
        relative = root_mean_square(error) / root_mean_square(golden["decoded"])
        results.append(check("decoder: relative pixel error (root mean square)", relative, QUANTISED_IMAGE_BOUND))
    else:
        results.append(check("decoder: largest pixel error", largest(error), bounds.images))
    if "pixels" in decoded:
        levels = np.abs(decoded["pixels"].astype(int) - to_uint8(decoded["images"])).max()
        results.append(check("decoder: levels between the device's bytes and the host's", levels, 1.0))

    position, content = golden["position"], golden["content"]
    errors: dict[str, list[float]] = {"position": [], "content": []}
    agree: list[Array] = []
    rows = [replay(generator, [(position[i], content[i])], limit)[0] for i in range(len(position))]
    for i, row in enumerate(rows):
        codes = np.flatnonzero((content[i] >= 0) & (content[i] < generator.layout.codebook_size))
        for head in errors:
            want = golden[f"{head}_logits"][i]
            reached = golden["steps"] < min(len(row[head]), codes[-1])  # what follows the last code is not computed
            got = row[head][golden["steps"][reached]]
            size = root_mean_square if quantised else largest
            errors[head].append(size(got - want[reached]) / size(want[reached]))
            agree.append(got.argmax(-1) == want[reached].argmax(-1))
    bound = QUANTISED_BOUND if quantised else bounds.logits
    for head, found in errors.items():  # np.max, unlike max, hands NaN on
        name = f"step: relative {head} logit error" + (" (root mean square)" if quantised else "")
        results.append(check(name, np.max(found), bound))
    if quantised:
        differing = 1 - np.concatenate(agree).mean()
        results.append(check("step: share of most probable tokens that differ", differing, TOP_BOUND))

    count = generator.manifest.slots if generator.manifest.fixed_slots else SLOTS
    twins = replay(generator, [(position[0], content[0])] * count, limit)
    same = np.max([np.abs(twins[0][h] - twin[h]).max() for twin in twins[1:] for h in errors])
    results.append(check("step: difference between identical slots", same, 0.0))
    others = [(position[-1 - i % (len(position) - 1)], content[-1 - i % (len(position) - 1)]) for i in range(count - 1)]
    beside = replay(generator, [(position[0], content[0]), *others], limit)
    changed = np.max([np.abs(twins[0][h] - beside[0][h]).max() for h in errors])
    results.append(check("step: change of a slot when its neighbour changes", changed, 0.0))

    if not quantised:  # a draw that rounding turned makes another image; the share above bounds how often
        results.append(free_runs(generator, golden, bounds, limit))
    return results


def largest(values: Array) -> float:
    """Largest absolute value."""
    return float(np.abs(values).max())


def root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean()))


def free_runs(generator: Generator, golden: dict[str, Array], bounds: Bounds, limit: int | None) -> Check:
    """Draw freely with the random numbers of seed 0, and compare: whole images, or where narrow numbers meet near-ties
    and an image may take another turn, the share of tokens that differ from the same history."""
    differ: list[float] = []
    for i, label in enumerate(golden["free_labels"].tolist()):
        few = "free_position" in golden
        params = free_params(generator.layout, generator.manifest.defaults, label, few)
        if few:
            row = [golden[f"free_{head}"][i] for head in ("position", "content")]
            # from here on the mean is over the bound, whatever the other images do
            enough = bounds.tokens * len(golden["free_labels"])
            differ.append(strays(generator, label, i, params, row[0], row[1], enough, limit))
            continue
        loop = generator._new_loop(1 if params.guidance == 1 else 2)
        jobs = [Job(0, int(label), uniforms(0, i, generator.layout.max_length), params)]
        differ.append(float((next(iter(loop.run(jobs))).cells != golden["free_cells"][i]).any()))
    if "free_position" in golden:
        return check("free run: share of tokens drawn otherwise", float(np.mean(differ)), bounds.tokens)
    return check("free run: images whose tokens differ from PyTorch", np.sum(differ), 0.0)


def free_params(layout: TokenLayout, defaults: dict[str, Any], label: int, few: bool) -> SamplingParams:
    """How the free runs draw: by the engine's defaults, where the label allows guidance; with ``few`` among FEW
    candidates, since the order of many nearly equal ones, and so the draw, hangs on the last bit of narrow numbers."""
    guided = layout.null_label and label < layout.classes
    return SamplingParams.from_dict(
        {**(defaults if guided else {}), **({"top_k": FEW, "top_k_position": FEW} if few else {})}
    )


def strays(
    generator: Generator,
    label: int,
    image: int,
    params: SamplingParams,
    position: Array,
    content: Array,
    enough: float,
    limit: int | None = None,
) -> float:
    """Share of an image's tokens that the engine draws otherwise than given, from the same history. After each such
    token the given history is forced and drawing goes on; stops once the share is over ``enough``."""
    total = min(int((position >= 0).sum()) - 1, limit or len(position))
    wrong = start = 0
    while wrong <= enough * total:
        # start tokens are left to the grammar, since those of a guided pair differ
        free = content[1 : start + 1] >= generator.layout.content_sos
        forced = (np.where(free, -1, position[1 : start + 1]), np.where(free, -1, content[1 : start + 1]))
        found = drawn(generator, label, image, params, total, forced)
        other = np.flatnonzero((found[0] != position[1 : total + 1]) | (found[1] != content[1 : total + 1]))
        if not (other >= start).any():
            break
        wrong += 1
        start = int(other[other >= start][0]) + 1
    return wrong / total


def drawn(
    generator: Generator,
    label: int,
    image: int,
    params: SamplingParams,
    count: int,
    forced: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Joint positions and contents of the first ``count`` tokens of an image, int64 [count] each; -1 after its end."""
    loop = generator._new_loop(1 if params.guidance == 1 else 2)
    found: list[tuple[int, int]] = []
    watched(
        loop,
        [Job(0, int(label), uniforms(0, image, generator.layout.max_length), params, forced)],
        lambda _: found.append((int(loop.read("position")[0]), int(loop.read("content")[0]))),
        count,
    )
    table = np.full((count, 2), -1, dtype=np.int64)
    table[: len(found)] = found
    return table[:, 0], table[:, 1]


class _Enough(Exception):
    """Ends a run early."""


def watched(loop: Loop, jobs: list[Job], look: Callable[[dict[int, Job]], None], limit: int | None) -> None:
    """Run a loop and look after every step, for at most ``limit`` steps."""
    steps = 0

    def watch(active: dict[int, Job]) -> None:
        nonlocal steps
        look(active)
        steps += 1
        if steps == limit:
            raise _Enough

    with suppress(_Enough):
        for _ in loop.run(jobs, watch=watch):
            pass


def by_row(program: Program, name: str, values: Array) -> dict[str, Array]:
    """Outputs of a graph that is run on each row alone."""
    rows = [program.run({name: row[None]}) for row in values]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def replay(generator: Generator, rows: list[tuple[Array, Array]], limit: int | None = None) -> list[dict[str, Array]]:
    """Logits of both heads, [T, V] each, of (position, content) sequences that are forced side by side."""
    loop = generator._new_loop(len(rows))
    layout, params = generator.layout, SamplingParams(positions="drawn")
    jobs = []
    for i, (p, c) in enumerate(rows):
        end = int((p >= 0).sum())
        label = int(c[0]) - layout.content_sos
        jobs.append(Job(i, label, uniforms(0, i, layout.max_length), params, (p[1:end], c[1:end])))
    seen: list[dict[str, list[Array]]] = [{"position": [], "content": []} for _ in jobs]

    def look(active: dict[int, Job]) -> None:
        for head in ("position", "content"):
            logits = loop.report(f"{head}_logits")
            for slot, job in active.items():
                seen[job.index][head].append(logits[slot].copy())

    watched(loop, jobs, look, limit)
    return [{head: np.stack(found) for head, found in row.items()} for row in seen]
