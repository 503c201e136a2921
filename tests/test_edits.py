"""Editing: that kept cells are kept whatever is redrawn, that the law is the one claimed, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from small_models import small_transformer

from dvq_rt.__main__ import main
from dvq_rt.codes import Codes
from dvq_rt.decoding import Event, Request, cells_to_maps
from dvq_rt.editing import Edit, between, cell_mask, composite, effective, forced_beginning, pins, spread, weights
from dvq_rt.engine import LOGMASSES, LOGPROBS, run_alone
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams, uniforms
from dvq_rt.step import StepTable
from runtimes.errors import InputError
from training.models.transformer import StackedTransformer
from training.sampling import sample_tokens
from training.torch_program import TOKENS, decode_loop

LAYOUTS = {
    "two grains": TokenLayout(32, (4, 8), classes=3, null_label=True),
    "region-first": TokenLayout(32, (4, 8), order="region-first", classes=1, null_label=True),
    "three grains": TokenLayout(32, (2, 4, 8), classes=2, null_label=True),
    "three grains, region-first": TokenLayout(32, (2, 4, 8), order="region-first", classes=2, null_label=True),
    "kept": TokenLayout(32, (8,), classes=3, null_label=True, label_in_position=False, kept=25, first="content"),
    "kept, position first": TokenLayout(32, (8,), classes=2, null_label=True, kept=25),
}
PARAMS = {"plain": SamplingParams(), "guided": SamplingParams(guidance=1.7, temperature=0.8)}


def random_codes(layout: TokenLayout, rng: np.random.Generator) -> Codes:
    grain = layout.random_grain(rng, rng.uniform())
    codes = rng.integers(0, layout.codebook_size, layout.cells)
    of_cell = layout.grain_of_cells(grain)
    for s in range(layout.segments - 1):
        for covered in layout.covered_cells(s):
            if of_cell[covered[0]] == s:
                codes[covered] = codes[covered[0]]
    side = layout.sides[-1]
    return Codes(np.where(of_cell < 0, -1, codes).reshape(side, side), grain.astype(np.int8), layout)


def random_mask(side: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Half-planes of all sides, rectangles, strokes, scattered cells, all but one cell, one cell."""
    mask = np.zeros((side, side), dtype=bool)
    kind = rng.integers(6)
    if kind == 0:
        mask[: rng.integers(1, side)] = True
        mask = np.rot90(mask, rng.integers(4)).copy()
    elif kind == 1:
        top, left = rng.integers(0, side, 2)
        mask[top : top + rng.integers(1, side), left : left + rng.integers(1, side)] = True
    elif kind == 2:
        at = rng.integers(0, side, 2)
        for _ in range(side):
            mask[tuple(at)] = True
            at = (at + rng.integers(-1, 2, 2)).clip(0, side - 1)
    elif kind == 3:
        mask = rng.random((side, side)) < rng.uniform()
    else:
        mask[tuple(rng.integers(0, side, 2))] = True
        mask = mask if kind == 4 else ~mask
    return mask if 0 < mask.sum() < side * side else random_mask(side, rng)


def drawn(net: StackedTransformer, requests: Sequence[Request], slots: int = 64) -> list[Event]:
    keyed = [replace(request, key=i) for i, request in enumerate(requests)]
    return sorted(run_alone(decode_loop(net, slots), keyed), key=lambda event: event.request.key)


def as_codes(layout: TokenLayout, event: Event) -> Codes:
    codes, grain = cells_to_maps(layout, event.cells)
    return Codes(codes, grain.astype(np.int8), layout)


def changed(edit: Edit, result: Codes) -> bool:
    """Whether a kept cell is not what it was."""
    keep = spread(edit.codes.layout, ~edit.redraw).reshape(result.codes.shape)
    grains = edit.grain == "keep" and (result.grain != edit.codes.grain).any()
    finest = edit.grain == "finest" and (result.grain[edit.redraw] != edit.codes.layout.segments - 1).any()
    same = (result.codes == edit.codes.codes)[keep].all() and (result.grain == edit.codes.grain)[~edit.redraw].all()
    return bool(grains or finest or not same)


# --- what is kept ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_cells_are_kept(name: str, params: str) -> None:
    """Of 360 edits (30 for each layout, with and without guidance) with masks of every shape none changes a kept cell,
    and every result is a legal image, some with other grains in the hole."""
    layout, rng = LAYOUTS[name], np.random.default_rng(len(name))
    grains = ("free", "keep", "finest") if layout.covering else ("free", "keep")
    edits = [
        Edit(random_codes(layout, rng), random_mask(layout.sides[0], rng), grains[i % len(grains)]) for i in range(30)
    ]
    requests = [Request(0, PARAMS[params], 5, i, **edit.constraint()) for i, edit in enumerate(edits)]
    made = [as_codes(layout, event) for event in drawn(small_transformer(layout), requests)]
    assert [i for i, (edit, codes) in enumerate(zip(edits, made, strict=True)) if changed(edit, codes)] == []
    assert sum(codes != edit.codes for edit, codes in zip(edits, made, strict=True)) > 22
    assert any((codes.grain != edit.codes.grain).any() for edit, codes in zip(edits, made, strict=True))


def test_without_pins_cells_change() -> None:
    """The negative control of the test above: it notices draws that keep nothing."""
    layout, rng = LAYOUTS["two grains"], np.random.default_rng(0)
    edits = [Edit(random_codes(layout, rng), random_mask(4, rng)) for _ in range(8)]
    events = drawn(small_transformer(layout), [Request(0, SamplingParams(), 5, i) for i in range(8)])
    assert all(changed(edit, as_codes(layout, event)) for edit, event in zip(edits, events, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_oracle_draws_the_same(name: str) -> None:
    """Pins in the step and in the plain sampler without caches: the same tokens, guided and with free positions too."""
    layout, rng = LAYOUTS[name], np.random.default_rng(3)
    net = small_transformer(layout)
    several = [SamplingParams(), SamplingParams(guidance=2.5, temperature=0.7)]
    if layout.segments < 3 and layout.first == "position":
        several.append(SamplingParams(positions="drawn", top_p=0.9, top_p_position=0.9))
    for i, params in enumerate(several):
        edit = Edit(random_codes(layout, rng), random_mask(layout.sides[0], rng), ("free", "keep")[i % 2])
        constraint = edit.constraint()
        (event,) = drawn(net, [Request(0, params, 7, record=TOKENS, **constraint)], 2)
        (oracle,) = sample_tokens(net, [0], params, seed=7, **constraint)
        for head, expected in zip(TOKENS, oracle, strict=True):
            mine = event.records[head].tolist()  # the oracle's may end with the start of an empty segment
            assert mine[: len(expected) - 1] == expected[1 : len(mine) + 1] and len(mine) > 10
        assert not changed(edit, as_codes(layout, event))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_image_and_none(name: str) -> None:
    """Pins of a whole image give that image; free pins give what is drawn without, and report that nothing was left
    out."""
    layout = LAYOUTS[name]
    net, nothing = small_transformer(layout), np.zeros((layout.sides[0],) * 2, dtype=bool)
    plain = drawn(net, [Request(1 % layout.starts, SamplingParams(), 3, i, record=LOGMASSES) for i in range(3)], 4)
    free = [replace(event.request, pinned=np.full(layout.cells, -1, np.int32)) for event in plain]
    for event, other in zip(plain, drawn(net, free, 4), strict=True):
        np.testing.assert_array_equal(event.cells, other.cells)
        for name_ in LOGMASSES:
            assert not event.records[name_].any() and not other.records[name_].any()
    again = [replace(event.request, seed=9, **Edit(as_codes(layout, event), nothing).constraint()) for event in plain]
    for event, other in zip(plain, drawn(net, again, 4), strict=True):
        np.testing.assert_array_equal(event.cells, other.cells)


@pytest.mark.parametrize("name", ["two grains", "region-first", "three grains", "kept, position first"])
def test_kept_grains_are_forced_positions(name: str) -> None:
    """With all grains kept, pins draw what forced positions draw, token for token."""
    layout, rng = LAYOUTS[name], np.random.default_rng(1)
    net = small_transformer(layout)
    for i in range(4):
        edit = Edit(random_codes(layout, rng), random_mask(layout.sides[0], rng), "keep")
        position, content = forced_beginning(edit.codes, 0, layout.max_length)
        wide = spread(layout, edit.redraw)
        for s in range(layout.segments):
            mine = np.flatnonzero(
                (layout.segment_of(position) == s) & (content >= 0) & (content < layout.codebook_size)
            )
            hole = wide[layout.covered_cells(s)[position[mine] - layout.position_offset(s), 0]]
            content[mine[hole]] = -1
        requests = [Request(0, SamplingParams(), 3, i, record=TOKENS, **edit.constraint())]
        requests.append(Request(0, SamplingParams(), 3, i, record=TOKENS, forced=(position, content)))
        pinned, forced = drawn(net, requests, 2)
        for head in TOKENS:
            steps = layout.steps_of(edit.codes.tokens(0))
            np.testing.assert_array_equal(pinned.records[head][:steps], forced.records[head][:steps])


# --- the law ---------------------------------------------------------------------------------------------------
def images_with(edit: Edit) -> list[Codes]:
    """All images that an edit of one cell, or of a few kept ones, may give."""
    layout, out = edit.codes.layout, []
    hole = np.flatnonzero(spread(layout, edit.redraw))
    k = layout.codebook_size
    if layout.covering:
        for values in [(c,) * len(hole) for c in range(k)] + list(product(range(k), repeat=len(hole))):
            for grain in (0, 1):
                codes, grains = edit.codes.codes.copy(), edit.codes.grain.copy()
                codes.reshape(-1)[hole], grains[edit.redraw] = values, grain
                if grain == 1 or len(set(values)) == 1:
                    out.append(Codes(codes, grains, layout))
    else:
        count = int((edit.codes.codes.reshape(-1)[hole] >= 0).sum())
        for values in product(range(-1, k), repeat=len(hole)):
            if sum(value >= 0 for value in values) == count:
                codes = edit.codes.codes.copy()
                codes.reshape(-1)[hole] = values
                out.append(Codes(codes, np.where(codes < 0, -1, 0), layout))
    return list({(c.codes.tobytes(), c.grain.tobytes()): c for c in out}.values())


LAWS = {
    "two grains": (TokenLayout(2, (2, 4)), [[1, 0], [0, 0]], 4096),
    "kept": (TokenLayout(2, (3,), kept=5), [[1, 1, 0], [0, 1, 0], [0, 0, 0]], 4096),
}


@pytest.mark.parametrize("name", LAWS)
def test_weighted_candidates_follow_the_models_law(name: str) -> None:
    """All results of an edit whose hole comes first and all else is kept are listed, with their true probabilities
    given what is kept. Choosing among 256 candidates by weight comes within 0.02 of these (total variation; the
    choice is averaged, not drawn); a single candidate, the negative control, is off by more than 0.1. And each image is
    drawn as often as its probability over its weight says."""
    layout, redraw, count = LAWS[name]
    net = small_transformer(layout, seed=4)
    rng = np.random.default_rng(2)
    codes = random_codes(layout, rng)
    if not layout.covering:
        grain = np.array([[0, -1, -1], [0, 0, 0], [-1, 0, -1]])
        codes = Codes(np.where(grain < 0, -1, rng.integers(0, 2, (3, 3))), grain, layout)
    edit = Edit(codes, np.array(redraw, dtype=bool))
    assert not edit.beginning
    images = images_with(edit)
    along = (Request.along(layout, c.tokens(0), record=LOGPROBS) for c in images)
    forced = drawn(net, [replace(request, params=SamplingParams()) for request in along])
    steps = [layout.steps_of(c.tokens(0)) for c in images]
    logs = np.array([sum(e.records[r][:n].sum() for r in LOGPROBS) for e, n in zip(forced, steps, strict=True)])
    truth = weights(logs.astype(np.float64))

    requests = [Request(0, SamplingParams(), 1, i, record=LOGMASSES, **edit.constraint()) for i in range(count)]
    events = drawn(net, requests, 512)
    of = {(c.codes.tobytes(), c.grain.tobytes()): i for i, c in enumerate(images)}
    keys = [(c.codes.tobytes(), c.grain.tobytes()) for c in (as_codes(layout, event) for event in events)]
    which = np.array([of[key] for key in keys])
    log_w = np.array([sum(e.records[r].astype(np.float64).sum() for r in LOGMASSES) for e in events])

    one = np.bincount(which, minlength=len(images)) / count
    assert 0.5 * np.abs(one - truth).sum() > 0.1, "the edit is too easy"
    chosen = np.zeros(len(images))
    for start in range(0, count, 256):
        group = slice(start, start + 256)
        np.add.at(chosen, which[group], weights(log_w[group]) / (count / 256))
    assert 0.5 * np.abs(chosen - truth).sum() < 0.02
    expected = np.zeros(len(images))
    for i in range(len(images)):
        if (which == i).any():
            assert np.ptp(log_w[which == i]) < 1e-4
            expected[i] = np.exp(logs[i] - log_w[which == i][0])
    assert 0.5 * np.abs(one - expected).sum() < 0.05


def test_choosing() -> None:
    """Weights are proportional to their exponentials, impossible candidates have none, and none at all is an error."""
    assert weights(np.array([0.0, np.log(3), -np.inf])).round(6).tolist() == [0.25, 0.75, 0.0]
    assert effective(np.array([0.25] * 4)) == 4
    with pytest.raises(InputError, match="no candidate is possible"):
        weights(np.array([-np.inf, -np.inf]))


def test_interpolated_numbers_keep_their_law() -> None:
    """On the way between two seeds random numbers are even on [0, 1), independent, and end where they should."""
    a, b = uniforms(1, 0, 4000), uniforms(2, 0, 4000)
    np.testing.assert_array_equal(between(a, b, 0), a)
    np.testing.assert_array_equal(between(a, b, 1), b)
    for share in (0.3, 0.5, 0.9):
        u = between(a, b, share)
        assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
        counts = np.histogram(u, 16, (0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 38  # chi-squared of 15 degrees of freedom, 0.1 %
        assert abs(np.corrcoef(u.T)[0, 1]) < 0.05 and abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.05


# --- the calls -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["generator", "mq_generator"])
def test_edits_beside_samples(kind: str, request: pytest.FixtureRequest) -> None:
    """An edit does not depend on what is drawn beside it, nor a sample on edits: bit for bit, in one shared batch."""
    generator: Generator = request.getfixturevalue(kind)
    made = generator.sample(3, labels="ant", seed=6)
    mask = np.zeros(generator.layout.sides[:1] * 2, dtype=bool)
    mask[1:, :2] = True
    alone = generator.edit(made.codes[0], mask, n=3, labels="bee", seed=2)
    edit = generator.edit_of(made.codes[0], mask)
    stream = generator.stream(3, labels="bee", seed=2, every=4, edit=edit)
    first = next(stream)
    beside = generator.sample(3, labels="ant", seed=6)  # while the stream goes on
    previews = [first, *stream]
    assert beside.codes == made.codes
    last = {p.index: p for p in previews if p.codes}
    assert [last[i].codes for i in range(3)] == alone.codes
    assert all((np.asarray(last[i].image) == np.asarray(alone[i])).all() for i in range(3))
    assert all(not changed(edit, codes) for codes in alone.codes) and alone.labels == [1, 1, 1]
    assert alone.law == "pins" and alone.log_weights is not None and alone.log_weights.shape == (3,)


@pytest.mark.parametrize("kind", ["class", "plain", "mq"])
def test_engines_draw_what_pytorch_draws(kind: str, request: pytest.FixtureRequest) -> None:
    """The exported step, fused or of standard operators, edits as PyTorch does, code for code."""
    name = {"class": "generator", "plain": "plain_generator", "mq": "mq_generator"}[kind]
    generator, model = request.getfixturevalue(name), request.getfixturevalue(f"{kind}_model")
    layout, rng = generator.layout, np.random.default_rng(5)
    label = None if kind == "plain" else 1
    for i in range(4):
        codes, mask = random_codes(layout, rng), random_mask(layout.sides[0], rng)
        edit = Edit(codes, mask)
        made = generator.edit(codes, mask, labels=label, seed=3, first=i, params=SamplingParams()).codes[0]
        (event,) = drawn(model.transformer, [Request(label or 0, SamplingParams(), 3, i, **edit.constraint())], 1)
        assert (as_codes(layout, event).codes == made.codes).all()


def test_variation(generator: Generator, mq_generator: Generator) -> None:
    """Coarse codes or a share of the tokens stay; with the original's seed and number all of it comes back."""
    params = SamplingParams(guidance=1.5, temperature=0.8)
    (codes,) = generator.sample(1, "bee", seed=4, params=params).codes
    made = generator.vary(codes, n=4, seed=4, params=params)
    assert made.codes[0] == codes and made.labels == [1] * 4 and made.law == "prefix"
    coarse = codes.grain == 0
    wide = spread(codes.layout, coarse).reshape(codes.codes.shape)
    for other in made.codes[1:]:
        assert ((other.grain == 0) == coarse).all() and (other.codes == codes.codes)[wide].all() and other != codes
    assert generator.vary(codes, 1.0, n=1, seed=1).codes == [codes]
    (kept,) = mq_generator.sample(1, "bee", seed=4).codes
    half = mq_generator.vary(kept, 0.5, n=2, seed=5).codes
    beginning = [c.tokens().position[:13].tolist() for c in half]
    assert beginning == [kept.tokens().position[:13].tolist()] * 2 and half[0] != half[1]
    with pytest.raises(InputError, match="this model has one grain; give a share"):
        mq_generator.vary(kept)


def test_completion(mq_generator: Generator) -> None:
    """Of a model with one grid the upper part is a beginning, so the lower one is drawn from the model's own law."""
    (codes,) = mq_generator.sample(1, "bee", seed=4).codes
    made = mq_generator.complete(codes, keep=0.5, n=2, exact=True)
    assert made.law == "prefix"
    assert all((c.codes[:4] == codes.codes[:4]).all() for c in made.codes) and made.codes[0] != made.codes[1]


def test_interpolation(generator: Generator) -> None:
    """The ends are the two seeds' first images, by either way of mixing."""
    ends = [generator.sample(1, "cat", seed=seed).codes[0] for seed in (3, 8)]
    for mix in ("sphere", "tail"):
        frames = generator.interpolate(3, 8, 4, labels="cat", mix=mix)
        assert [frames.codes[0], frames.codes[-1]] == ends and len(frames) == 4


def test_density(mq_generator: Generator) -> None:
    """A plain background has few codes; by density a hole in it gets its share, and what is kept the others."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (own,) = mq_generator.encode(pixels)
    half = np.zeros((8, 8), dtype=bool)
    half[:, :4] = True
    for density, most in ((1.0, 12), (0.5, 6)):
        edit = mq_generator.edit_of(pixels, half, density=density)
        (made,) = mq_generator.edit(pixels, half, labels="ant", density=density).codes
        assert (made.grain[~half] >= 0).sum() == min(most, (own.grain[~half] >= 0).sum())
        assert made.length == 25 and not changed(edit, made)
        kept = (made.grain >= 0) & ~half
        assert (made.codes[kept] == own.codes[kept]).all()
    with pytest.raises(InputError, match="density is -1"):
        mq_generator.edit(pixels, half, labels="ant", density=-1)


def test_refinement(generator: Generator) -> None:
    """Chosen coarse cells get fine codes, nothing else changes."""
    codes = next(c for c in generator.sample(8, seed=1).codes if (c.grain == 0).sum() > 3)
    more = generator.refine(codes, ratio=1.0, candidates=3).codes[0]
    assert (more.grain == 1).all()
    fine = spread(codes.layout, codes.grain == 1).reshape(codes.codes.shape)
    assert (more.codes == codes.codes)[fine].all()
    with pytest.raises(InputError, match="no cell is to be refined"):
        generator.refine(more, ratio=0.5)


def test_candidates_and_pixels(generator: Generator) -> None:
    """One of several candidates is chosen, the same every time; pixels away from the hole are the original's."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[9, 9] = 1
    options: dict[str, Any] = {"labels": "ant", "candidates": 5, "seed": 3}
    one = generator.edit(pixels, mask, n=2, **options)
    assert one.codes == generator.edit(pixels, mask, n=2, **options).codes
    assert one.effective is not None and (one.effective >= 1).all() and (one.effective <= 5).all()
    shown = one.to_numpy()[0]
    assert (
        (shown[:6] == pixels[:6]).all()
        and (shown[:, :6] == pixels[:, :6]).all()
        and (shown[8:12, 8:12] != pixels[8:12, 8:12]).any()
    )
    plain = generator.edit(pixels, region=(8, 8, 12, 12), n=2, blend=False, **options)
    assert plain.codes == one.codes and (plain.to_numpy() == generator.decode(one.codes)).all()
    for select in ("likelihood", "consistent"):
        assert generator.edit(pixels, mask, select=select, **options).law == "pins"


def test_masks() -> None:
    """A coarsest cell is redrawn if any of its pixels is; rings are added; a picture is a mask."""
    layout, pixels = TokenLayout(4, (4, 8)), np.zeros((16, 16))
    pixels[5, 9] = 1
    expected = np.zeros((4, 4), dtype=bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(cell_mask(pixels, layout, 16), expected)
    np.testing.assert_array_equal(cell_mask(Image.fromarray(pixels.astype(np.uint8)), layout, 16), expected)
    assert cell_mask(expected, layout, 16, dilate=1).sum() == 9
    white, black = (np.full((16, 16, 3), value, np.uint8) for value in (255, 0))
    mixed = composite(white, black, expected)
    assert (mixed[4:8, 8:12] == 0).all() and (mixed[:, :6] == 255).all() and (mixed[10:] == 255).all()
    grain = np.zeros((4, 4), np.int8)
    codes = Codes(np.full((8, 8), 3), grain, layout)
    found = pins(codes, ~expected).reshape(8, 8)
    assert (found[2:4, 4:6] == -1).all() and (found[0] == 3).all()
    assert (pins(codes, ~expected, "finest").reshape(8, 8)[2:4, 4:6] == -3).all()


def test_bad_input(generator: Generator, mq_generator: Generator, tmp_path: Path) -> None:
    """What cannot be edited is refused with the reason, before anything is drawn."""
    (codes,) = generator.sample(1, "bee", params=SamplingParams()).codes
    (kept,) = mq_generator.sample(1, "bee").codes
    pixels = np.zeros((16, 16, 3), np.uint8)
    half = np.zeros((4, 4), dtype=bool)
    half[:, :2] = True
    cases: list[tuple[Any, str]] = [
        (lambda: generator.edit(codes), "give a mask or a region, and not both"),
        (lambda: generator.edit(codes, half, region=(0, 0, 4, 4)), "not both"),
        (lambda: generator.edit(codes, np.zeros((15, 16))), r"the mask is float64 \(15, 16\); it must be"),
        (lambda: generator.edit(codes, "mask.png"), "the mask is"),
        (lambda: generator.edit(codes, half & False), "nothing to redraw"),
        (lambda: generator.edit(codes, half | True), "plain sampling: use sample"),
        (lambda: generator.edit(codes, half, dilate=4), "plain sampling"),
        (lambda: generator.edit(codes, half, dilate=-1), "dilate is -1"),
        (lambda: generator.edit(codes, region=(0, 0, 17, 4)), r"region is \(0, 0, 17, 4\); it must be"),
        (lambda: generator.edit(codes, region=(4, 0, 4, 4)), "region is"),
        (lambda: generator.edit(codes, region=5), "region is 5"),
        (lambda: generator.edit(np.zeros((20, 16, 3), np.uint8), half), r"the image is 16 x 20; edits need 16 x 16"),
        (lambda: generator.edit(tmp_path / "no.png", half), "no.png does not exist"),
        (lambda: generator.edit(kept, half), "the codes have .*this model has"),
        (lambda: generator.edit(codes, half, labels="emu"), "unknown label 'emu'"),
        (lambda: generator.edit(codes, half, grain="coarse"), "grain is 'coarse'"),
        (lambda: generator.edit(codes, half, exact=True), r"not exact: .*stage\.given"),
        (lambda: generator.edit(codes, half, density=1.0), "density is for models that keep some cells"),
        (lambda: generator.edit(codes, half, candidates=0), "candidates is 0"),
        (lambda: generator.edit(codes, half, select="best"), "select is 'best'"),
        (lambda: generator.complete(codes, keep=1.5), "keep is 1.5"),
        (lambda: generator.complete(codes, rows=4), "rows is 4"),
        (lambda: generator.vary(codes, "fine"), "keep is 'fine'"),
        (lambda: generator.vary(pixels, -0.1), "keep is -0.1"),
        (lambda: generator.interpolate(0, 1, 1), "frames is 1"),
        (lambda: generator.interpolate(0, 1, 3, mix="line"), "mix is 'line'"),
        (lambda: generator.interpolate(0, -1, 3), "seed_b is -1"),
        (lambda: generator.refine(codes), "give cells or ratio"),
        (lambda: generator.refine(codes, ratio=2.0), "ratio is 2.0"),
        (lambda: generator.refine(pixels, ratio=0.5), "refine takes the codes of one image"),  # type: ignore[arg-type]
        (lambda: mq_generator.refine(kept, ratio=0.5), "this one has one"),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()


def test_engines_of_before(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without pins and their reports is read, does all else, and says that it cannot edit."""
    table = generator.engine.table
    old = table.to_dict()
    old["inputs"] = [spec for spec in old["inputs"] if spec["name"] != "pinned"]
    old["outputs"] = [spec for spec in old["outputs"] if spec["name"] not in LOGMASSES]
    before = StepTable.from_dict(table.layout, old)
    assert table.has("pinned") and not before.has("pinned") and before.to_dict() == old
    (codes,) = generator.sample(1, "bee").codes
    monkeypatch.setattr(generator.engine, "table", before)
    with pytest.raises(InputError, match="exported before there was editing; export it again"):
        generator.edit(codes, region=(0, 0, 4, 4))
    with pytest.raises(InputError, match="exported before there was editing"):
        generator.stream(1, edit=Edit(codes, cell_mask(np.eye(16), table.layout, 16)))


def test_commands(class_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Edit, vary and outpaint from the command line: pictures of the right size, and errors that say what to give."""
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    mask = np.zeros((20, 24), np.uint8)
    mask[4:9, 6:12] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    shared = [
        str(tmp_path / "a.png"),
        "--engine",
        str(class_engine),
        "--label",
        "ant",
        "--out",
        str(tmp_path / "o.png"),
    ]
    for words, size in (
        (["edit", *shared, "--n", "1", "--region", "8,8,16,16"], (3, 1)),
        (["edit", *shared, "--n", "1", "--mask", str(tmp_path / "mask.png"), "--dilate", "1"], (3, 1)),
        (["vary", *shared, "--n", "2", "--keep", "0.5"], (3, 1)),
    ):
        assert main(words) == 0
        assert Image.open(tmp_path / "o.png").width in ((size[0] * 18 + 2), 2 * 18 + 2)
    assert main(["outpaint", *shared, "--right", "8", "--top", "4"]) == 0
    assert Image.open(tmp_path / "o.png").size == (24, 20)
    for words, told in (
        (["edit", *shared], "give --mask or --region"),
        (["edit", *shared, "--region", "1,2,3"], "it must be 4 numbers, separated by commas"),
        (["outpaint", *shared, "--right", "3"], "right is 3; it must be a multiple of 4"),
        (["outpaint", *shared], "nothing is to be added"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err


def test_outpainting(generator: Generator, mq_generator: Generator) -> None:
    """Windows keep what earlier ones drew, the image's own codes and pixels stay, and all of the canvas is drawn."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture, windows = generator.outpaint(pixels, left=8, bottom=12, labels="ant", seed=3)
    assert picture.size == (24, 28) and windows[0] == generator.encode(pixels)[0] and len(windows) == 6
    assert (np.asarray(picture)[:12, 12:] == pixels[:12, 4:]).all()
    (below, left) = windows[1], windows[2]
    assert any((w.codes[:4] == windows[0].codes[4:]).all() for w in (below, left))
    tall, two = mq_generator.outpaint(pixels, bottom=8, labels="ant")
    assert tall.size == (16, 24) and (two[1].codes[:4] == two[0].codes[4:]).all()
