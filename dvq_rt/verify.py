"""Check an engine on this machine: golden values from PyTorch, and that slots do not disturb one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dvq_rt.decoding import Request
from dvq_rt.engine import LOGITS, Engine, run_alone
from dvq_rt.files import read_tensors
from dvq_rt.images import to_uint8
from dvq_rt.layout import HEADS, TokenLayout, Tokens
from dvq_rt.sampling import SamplingParams
from runtimes.protocol import Array

LOGIT_BOUND = 2e-4
"""Largest logit error over the largest logit: float32 sums in another order; TF32 or a wrong mask gives far more."""
QUANTIZED_BOUND = 0.03
"""Largest root mean square of a sequence's logit errors over that of its logits, for integer weights, against PyTorch
with the same integers and the same rounding of activations. One layer agrees within 1e-6, but where the last bit of a
sum decides how an activation is rounded the two part by one level of 255, and over some layers that grows to the size
of the rounding itself, under 1 % of the logits; wrong integers or scales give about 1."""
TOP_BOUND = 0.05
"""Share of most probable tokens that may differ for integer weights, for the same reason."""
QUANTIZED_IMAGE_BOUND = 0.15
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


def verify(engine: Engine, limit: int | None = None) -> list[Check]:
    """Run every check; an engine is sound if all are ``ok``. ``limit`` stops each sequence after so many tokens.

    Golden tensors (``golden.safetensors``, made by PyTorch at export): ``images``, ``codes``, ``grain``, ``decoded``;
    ``position`` and ``content`` int64 [N, T + 1] (joint ids, -1 after the end), ``steps`` int64 [S] and both heads'
    logits [N, S, V] at those steps, of models that can be given tokens also the ``kind`` of each; ``free_labels`` [M]
    of free runs with seed 0 and either their ``free_cells`` [M, cells] or their tokens, ``free_position`` and
    ``free_content`` as above.
    """
    golden = read_tensors(engine.path / "golden.safetensors")
    bounds = BOUNDS[engine.manifest.precision]
    quantized = engine.manifest.weights.startswith("int")
    results = check_tokenizer(engine, golden, bounds, quantized)
    prompts = golden_prompts(engine, golden)
    if prompts:
        results.append(check_prompts(golden, prompts, bounds))

    rows = [golden_tokens(engine.layout, golden, i) for i in range(len(golden["position"]))]
    kinds = [golden["kind"][i][: len(row.content)] if "kind" in golden else None for i, row in enumerate(rows)]
    before: list[Array | None] = [*prompts] or [None] * len(rows)
    records = [
        engine.force([row], slots=1, limit=limit, kinds=[kind], prompts=[prompt])[0]
        for row, kind, prompt in zip(rows, kinds, before, strict=True)
    ]
    results += check_logits(engine, golden, records, bounds, quantized)

    count = engine.manifest.slots if engine.manifest.fixed_slots else SLOTS

    def forced(which: list[int]) -> list[dict[str, Array]]:
        return engine.force(
            [rows[i] for i in which],
            slots=count,
            limit=limit,
            kinds=[kinds[i] for i in which],
            prompts=[before[i] for i in which],
        )

    twins = forced([0] * count)
    same = max(difference(twins[0], twin) for twin in twins[1:])
    results.append(check("step: difference between identical slots", same, 0.0))
    beside = forced([0, *(len(rows) - 1 - i % (len(rows) - 1) for i in range(count - 1))])
    changed = difference(twins[0], beside[0])
    results.append(check("step: change of a slot when its neighbour changes", changed, 0.0))

    if not quantized:  # a draw that rounding turned makes another image; the share above bounds how often
        results.append(free_runs(engine, golden, bounds, limit))
    return results


def check_tokenizer(engine: Engine, golden: dict[str, Array], bounds: Bounds, quantized: bool) -> list[Check]:
    """The image encoder and decoder against golden values."""
    results = []
    encoded = engine.by_row("encoder", "images", golden["images"])
    differing = (encoded["codes"] != golden["codes"]).mean()
    results.append(check("encoder: share of codes that differ", differing, bounds.codes))
    # of a keeping layout the network's scores decide, and they have near-ties too
    routed = 0.0 if engine.layout.covering or engine.manifest.precision == "fp32" else bounds.codes
    differing = (encoded["grain"] != golden["grain"]).mean()
    results.append(check("encoder: share of regions routed otherwise", differing, routed))
    if "scores" in encoded and "scores" in golden:
        relative = largest(encoded["scores"] - golden["scores"]) / max(largest(golden["scores"]), 1e-9)
        results.append(check("encoder: relative error of the scores", relative, bounds.logits))
        differing = (encoded["grain_codes"] != golden["grain_codes"]).mean()
        results.append(check("encoder: share of codes in every grain that differ", differing, bounds.codes))
    decoded = engine.by_row("decoder", "codes", golden["codes"])
    error = decoded["images"] - golden["decoded"]
    if quantized:
        relative = root_mean_square(error) / root_mean_square(golden["decoded"])
        results.append(check("decoder: relative pixel error (root mean square)", relative, QUANTIZED_IMAGE_BOUND))
    else:
        results.append(check("decoder: largest pixel error", largest(error), bounds.images))
    if "pixels" in decoded:
        levels = np.abs(decoded["pixels"].astype(int) - to_uint8(decoded["images"])).max()
        results.append(check("decoder: levels between the device's bytes and the host's", levels, 1.0))
    return results


def golden_prompts(engine: Engine, golden: dict[str, Array]) -> list[Array]:
    """Rows of the golden prompts by the engine's text encoder; none of a model that reads none."""
    return [engine.embed(ids[ids >= 0]) for ids in golden.get("prompts", ())]


def check_prompts(golden: dict[str, Array], prompts: list[Array], bounds: Bounds) -> Check:
    """The text encoder against golden values."""
    wanted = [want[: len(rows)] for want, rows in zip(golden["prefix"], prompts, strict=True)]
    error = max(largest(rows - want) for rows, want in zip(prompts, wanted, strict=True) if len(rows))
    return check("text: relative error", error / largest(golden["prefix"]), bounds.logits)


def check_logits(
    engine: Engine, golden: dict[str, Array], records: list[dict[str, Array]], bounds: Bounds, quantized: bool
) -> list[Check]:
    """Both heads along the golden sequences, at the golden steps that the records reach."""
    results, agree = [], []
    size = root_mean_square if quantized else largest
    for head, name in zip(HEADS, LOGITS, strict=True):
        errors = []
        for want, record in zip(golden[name], records, strict=True):
            reached = golden["steps"] < len(record[name])
            got = record[name][golden["steps"][reached]]
            errors.append(size(got - want[reached]) / size(want[reached]))
            agree.append(got.argmax(-1) == want[reached].argmax(-1))
        text = f"step: relative {head} logit error" + (" (root mean square)" if quantized else "")
        bound = QUANTIZED_BOUND if quantized else bounds.logits
        results.append(check(text, np.max(errors), bound))  # np.max, unlike max, hands NaN on
    if quantized:
        differing = 1 - np.concatenate(agree).mean()
        results.append(check("step: share of most probable tokens that differ", differing, TOP_BOUND))
    return results


def largest(values: Array) -> float:
    """Largest absolute value."""
    return float(np.abs(values).max())


def root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean()))


def difference(one: dict[str, Array], other: dict[str, Array]) -> float:
    """Largest difference between two records of the same sequence."""
    return float(np.max([largest(one[name] - other[name]) for name in one]))


def golden_tokens(layout: TokenLayout, golden: dict[str, Array], row: int) -> Tokens:
    """One of the golden sequences, without its padding."""
    end = int((golden["position"][row] >= 0).sum())
    position, content = golden["position"][row, :end], golden["content"][row, :end]
    return Tokens(content, position, layout.segment_of(position))


def free_runs(engine: Engine, golden: dict[str, Array], bounds: Bounds, limit: int | None) -> Check:
    """Draw freely with the random numbers of seed 0, and compare: whole images, or where narrow numbers meet near-ties
    and an image may take another turn, the share of tokens that differ from the same history."""
    differing: list[float] = []
    few = "free_position" in golden
    for i in range(len(golden["free_labels"])):
        request = free_request(engine, golden, i)
        if few:
            row = (golden["free_position"][i], golden["free_content"][i])
            # from here on the mean is over the bound, whatever the other images do
            enough = bounds.tokens * len(golden["free_labels"])
            differing.append(strays(engine, request, row, enough, limit))
        else:
            event = next(run_alone(engine.loop(request.width), [request]))
            differing.append(float((event.cells != golden["free_cells"][i]).any()))
    if few:
        return check("free run: share of tokens drawn otherwise", float(np.mean(differing)), bounds.tokens)
    return check("free run: images whose tokens differ from PyTorch", np.sum(differing), 0.0)


def free_request(engine: Engine, golden: dict[str, Array], image: int) -> Request:
    """The request of a golden free run. The prompt of one is what the one before is led away from."""
    label, few = int(golden["free_labels"][image]), "free_position" in golden
    some = {"prompts": golden["prompts"][image : image + 2]} if "prompts" in golden else {}
    prompts: list[Array | None] = [*golden_prompts(engine, some)]
    prompt, negative = [*prompts, None, None][:2]
    params = free_params(engine.layout, engine.manifest.defaults, label, few, engine.manifest.empty_prompt)
    return Request(label, params, image=image, prompt=prompt, negative=negative)


def free_params(
    layout: TokenLayout, defaults: dict[str, Any], label: int, few: bool, empty: bool = False
) -> SamplingParams:
    """How the free runs draw: by the engine's defaults, where the label, or the ``empty`` prompt, allows guidance; with
    ``few`` among FEW candidates, since the order of many nearly equal ones, and so the draw, hangs on the last bit of
    narrow numbers."""
    guided = empty or (layout.null_label and label < layout.classes)
    return SamplingParams.from_dict(
        {**(defaults if guided else {}), **({"top_k": FEW, "top_k_position": FEW} if few else {})}
    )


def strays(
    engine: Engine, request: Request, row: tuple[Array, Array], enough: float, limit: int | None = None
) -> float:
    """Share of an image's tokens that the engine draws otherwise than given, from the same history. After each such
    token the given history is forced and drawing goes on; stops once the share is over ``enough``.

    Args:
        request: of the image; row: its given positions and contents.
    """
    position, content = row
    total = min(int((position >= 0).sum()) - 1, limit or len(position))
    wrong = start = 0
    while wrong <= enough * total:
        # start tokens are left to the grammar, since those of a guided pair differ
        free = content[1 : start + 1] >= engine.layout.content_sos
        forced = (np.where(free, -1, position[1 : start + 1]), np.where(free, -1, content[1 : start + 1]))
        drawn = draw_tokens(engine, replace(request, forced=forced), total)
        other = np.flatnonzero((drawn[0] != position[1 : total + 1]) | (drawn[1] != content[1 : total + 1]))
        if not (other >= start).any():
            break
        wrong += 1
        start = int(other[other >= start][0]) + 1
    return wrong / total


def draw_tokens(engine: Engine, request: Request, count: int) -> tuple[Array, Array]:
    """Joint positions and contents of the first ``count`` tokens of an image, int64 [count] each; -1 after its end."""
    request = replace(request, record=("position", "content"), limit=count)
    records = next(run_alone(engine.loop(request.width), [request])).records
    table = np.full((2, count), -1, dtype=np.int64)
    for line, name in zip(table, request.record, strict=True):
        line[: len(records[name])] = records[name]
    return table[0], table[1]
