"""Random edits on an engine, by hand, in some minutes: is everything kept, is every result legal, and does an image
depend on those beside it?

    python tests/edits_by_hand.py dvq_rt/demo          # 1,000 edits; a number behind the folder for another count

Masks are half-planes of all sides, rectangles, strokes, scattered cells, one cell, all but one, the object and the
background. Every second edit is guided, every third drawn by pins where the engine could do better. All are drawn in
one batch with plain samples between them; some of both are drawn again alone. Prints counts, and ends with status 1 if
one is wrong. ``tests/test_edits.py`` does less of it, fast.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from test_edits import changed, random_mask  # noqa: E402

from dvq_rt import Codes, Generator, SamplingParams  # noqa: E402
from dvq_rt.decoding import Event, Request, cells_to_maps  # noqa: E402
from dvq_rt.editing import Edit, Mask  # noqa: E402

ORIGINALS, SLOTS, ALONE = 24, 8, 12
SEED = 1


def hole(codes: Codes, i: int, rng: np.random.Generator) -> Mask:
    """Of every eighth image the object or the background, else of any shape."""
    own = codes.grain == 0 if i % 16 else codes.grain > 0
    return own if i % 8 == 0 and own.any() and not own.all() else random_mask(len(codes.grain), rng)


def drawn(generator: Generator, requests: list[Request]) -> dict[object, Event]:
    with closing(generator.engine.draw(requests)) as events:
        return {event.request.key: event for event in events if event.finished}


def main(folder: str, count: int) -> int:
    generator, rng = Generator(folder, slots=SLOTS), np.random.default_rng(0)
    guided = SamplingParams.from_dict(generator.manifest.defaults)
    if generator.manifest.guidable and guided.guidance == 1:
        guided = replace(guided, guidance=1.5)
    names = generator.class_names
    labels = [names[i % len(names)] for i in range(ORIGINALS)] if names else [None] * ORIGINALS
    originals = generator.sample(ORIGINALS, labels, SEED).codes
    grains = ("free", "keep", "finest") if generator.layout.segments > 1 else ("free", "keep")
    edits, laws, requests = [], Counter[str](), []
    for i in range(count):
        codes, params = originals[i % ORIGINALS], (guided, replace(guided, guidance=1.0))[i % 2]
        (request,) = generator.requests(1, codes.label, SEED, params, first=i)
        edit = Edit(codes, hole(codes, i, rng), grains[i // 2 % len(grains)])
        (request,), law = generator.constrained([request], edit, None if i % 3 else False)
        edits.append(edit)
        laws[f"{law}, {'guided' if params.guidance != 1 else 'unguided'}"] += 1
        requests.append(replace(request, key=("edit", i)))
        if i % 5 == 0:
            (plain,) = generator.requests(1, codes.label, SEED + 1, params, first=i)
            requests.append(replace(plain, key=("sample", i)))
    began = time.perf_counter()
    events = drawn(generator, requests)
    seconds = time.perf_counter() - began

    broken, illegal, others = [], [], 0
    for i, edit in enumerate(edits):
        try:
            maps, grain = cells_to_maps(generator.layout, events["edit", i].cells)
            made = Codes(maps, grain.astype(np.int8), generator.layout)  # checks itself
            broken += [i] if changed(edit, made) else []
            others += made != edit.codes
        except ValueError as error:
            illegal.append((i, str(error)))
    again = [requests[i] for i in np.linspace(0, len(requests) - 1, min(ALONE, len(requests))).astype(int)]
    apart = [r.key for r in again if (drawn(generator, [r])[r.key].cells != events[r.key].cells).any()]
    each = 1e3 * seconds / len(requests)
    print(f"{count} edits and {len(requests) - count} samples in {seconds:.1f} s, {each:.0f} ms each")
    print(f"drawn from: {dict(laws)}")
    print(f"results that differ from the original: {others}")
    print(f"results in which something kept has changed: {len(broken)} {broken[:5]}")
    print(f"results that are no legal image: {len(illegal)} {illegal[:5]}")
    print(f"of {len(again)} drawn again alone, others than before: {len(apart)} {apart[:5]}")
    return int(bool(broken or illegal or apart))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000))
