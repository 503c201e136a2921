"""What is kept stands first: its sequences, the step, the plain sampler, training batches, and an exported engine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import BOUND, relative_error, small_model, small_transformer
from test_edits import LAYOUTS, PARAMS, as_codes, changed, drawn, random_codes, random_mask

from dvq_rt.codes import Codes
from dvq_rt.decoding import Request
from dvq_rt.editing import Edit, given_first
from dvq_rt.engine import LOGITS, LOGMASSES, LOGPROBS
from dvq_rt.generator import Generator
from dvq_rt.layout import HEADS, TokenLayout
from dvq_rt.prompts import BYTES, TextTokenizer
from dvq_rt.sampling import SamplingParams
from dvq_rt.step import GIVEN_PORTS
from export.to_onnx import export_onnx
from runtimes.errors import InputError
from training.checkpoint import Model, save_checkpoint
from training.data.holes import GRAIN_SHAPES, SHAPES, drawn_hole
from training.data.tokens import collate
from training.evaluate_edits import Asked, holes, likelihood
from training.evaluate_edits import main as measure
from training.losses import stacked_losses
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer, TransformerConfig
from training.sampling import embed_prompts, sample_tokens
from training.step import step_table
from training.torch_program import TOKENS, teacher_forced

NAMES = ("content", "position", "segment")


class Rows(NamedTuple):
    """Images' codes and grains by number."""

    codes: Any
    grain: Any


def random_hints(edit: Edit, rng: np.random.Generator) -> np.ndarray | None:
    """Hints for some redrawn cells, where there is room for them."""
    layout = edit.codes.layout
    if not layout.covering:
        return None
    hints = rng.integers(0, layout.codebook_size, edit.redraw.shape)
    told = edit.redraw & (edit.codes.grain > 0) & (rng.random(edit.redraw.shape) < 0.5)
    spare = layout.max_length - len(edit.codes.tokens(0).content)
    told.reshape(-1)[np.flatnonzero(told)[spare:]] = False
    return np.where(told, hints, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sequence_holds_everything_once(name: str) -> None:
    """With what is kept in front a sequence has the same tokens, each part in its order, and hints between."""
    layout, rng = LAYOUTS[name], np.random.default_rng(0)
    for _ in range(20):
        edit = Edit(random_codes(layout, rng), random_mask(layout.sides[0], rng))
        hints, tokens = random_hints(edit, rng), edit.codes.tokens(0)
        first, kind = given_first(layout, tokens, ~edit.redraw, hints)
        own = kind != 2
        assert sorted(zip(*(part[own] for part in first), strict=True)) == sorted(zip(*tokens, strict=True))
        assert kind[0] == 0 and (np.diff(kind[kind > 0]) >= 0).all()
        count = int((kind > 0).sum())
        assert (kind[1 : count + 1] > 0).all() and not kind[count + 1 :].any()
        assert (kind == 2).sum() == (0 if hints is None else (hints >= 0).sum())
        rest = first.position[count + 1 :].tolist()
        assert [p for p in tokens.position[1:].tolist() if p in rest] == rest


@pytest.mark.parametrize("name", LAYOUTS)
def test_cached_step_equals_the_full_forward(name: str) -> None:
    """Both heads at every position of sequences with given tokens and hints, beside others without."""
    layout, rng = LAYOUTS[name], np.random.default_rng(1)
    net = small_transformer(layout, given=True)
    rows, kinds = [], []
    for i in range(5):
        edit = Edit(random_codes(layout, rng), random_mask(layout.sides[0], rng))
        tokens, kind = edit.codes.tokens(0), None
        if i < 4:
            tokens, kind = given_first(layout, tokens, ~edit.redraw, random_hints(edit, rng))
        rows.append(tokens)
        kinds.append(kind)
    requests = [Request.along(layout, row, kind, record=LOGITS) for row, kind in zip(rows, kinds, strict=True)]
    for event, row, kind in zip(drawn(net, requests, 5), rows, kinds, strict=True):
        full, steps = teacher_forced(net, row, kind=kind), layout.steps_of(row)
        for head, record in zip(HEADS, LOGITS, strict=True):
            assert relative_error(event.records[record][:steps], full[head][:steps].numpy()) < BOUND


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rest_is_drawn_around_what_is_given(name: str, params: str) -> None:
    """Of 12 edits for each layout, with and without guidance and hints, none changes a kept cell; the plain sampler
    draws the same tokens; nothing weighs."""
    layout, rng = LAYOUTS[name], np.random.default_rng(7)
    net = small_transformer(layout, given=True)
    grains = ("free", "keep", "finest") if layout.covering else ("free", "keep")
    edits = [
        Edit(random_codes(layout, rng), random_mask(layout.sides[0], rng), grains[i % len(grains)]) for i in range(12)
    ]
    for i in range(0, 12, 5):
        hints = random_hints(edits[i], rng)
        room = layout.max_length - len(layout.ordered_positions(0)) * layout.codes_per_cell[-1]
        few = None if hints is None else np.where(np.cumsum(hints >= 0).reshape(hints.shape) <= room - 3, hints, -1)
        edits[i] = replace(edits[i], hints=few)
    fields = [edit.constraint(given=True) for edit in edits]
    record = (*TOKENS, *LOGMASSES)
    events = drawn(net, [Request(0, PARAMS[params], 5, i, record=record, **f) for i, f in enumerate(fields)], 16)
    assert [i for i, event in enumerate(events) if changed(edits[i], as_codes(layout, event))] == []
    assert sum(as_codes(layout, event) != edit.codes for event, edit in zip(events, edits, strict=True)) > 7
    counts = [int((f["given"] > 0).sum()) for f in fields]
    several = [i for i, count in enumerate(counts) if 2 < count < layout.filled_cells][:2]
    assert len(several) == 2
    for i in several:
        (oracle,) = sample_tokens(net, [0], PARAMS[params], seed=5, first_image=i, **fields[i])
        for head, expected in zip(TOKENS, oracle, strict=True):
            mine = events[i].records[head].tolist()
            assert mine[: len(expected) - 1] == expected[1 : len(mine) + 1] and len(mine) > 10
    assert np.isfinite([event.records[name] for event in events[:1] for name in LOGMASSES]).all()


def test_models_without_it_stay_as_they_are() -> None:
    """The same weights from the same seed, no further tensors of the step, and the same training batches."""
    layout, rng = LAYOUTS["two grains"], np.random.default_rng(0)
    nets = []
    for given in (False, True):
        torch.manual_seed(0)
        nets.append(StackedTransformer(TransformerConfig(16, 2, 1, 1, layout.max_length, given=given), layout))
    plain, more = nets
    assert all(torch.equal(values, more.state_dict()[name]) for name, values in plain.state_dict().items())
    assert set(more.state_dict()) - set(plain.state_dict()) == {"given_emb"}
    assert not any(step_table(plain).has(name) for name in GIVEN_PORTS)
    assert all(step_table(more).has(name) for name in GIVEN_PORTS)
    several = [random_codes(layout, rng) for _ in range(4)]
    data = Rows([c.codes for c in several], [c.grain for c in several])
    before = collate(layout, data, np.arange(4), np.zeros(4, np.int64))
    after = collate(layout, data, np.arange(4), np.zeros(4, np.int64), [None] * 4)
    assert "kind" not in before and not after.pop("kind").any()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_batches() -> None:
    """What is given has no target, all else keeps its own; the same key gives the same edit."""
    layout, rng = LAYOUTS["two grains"], np.random.default_rng(0)
    several = [random_codes(layout, rng) for _ in range(6)]
    grain = np.stack([c.grain for c in several])
    coarse = rng.integers(0, 32, grain.shape).astype(np.int32)
    data = Rows([c.codes for c in several], grain)
    holes = [None if i == 1 else drawn_hole(layout, grain[i], (1, i)) for i in range(6)]
    batch = collate(layout, data, np.arange(6), np.zeros(6, np.int64), holes, coarse)
    for i, hole in enumerate(holes):
        tokens, kind = several[i].tokens(0), np.zeros(200, np.int64)
        if hole is not None:
            again = drawn_hole(layout, grain[i], (1, i))
            assert all((one == other).all() for one, other in zip(hole, again, strict=True))
            tokens, kind = given_first(layout, tokens, ~hole.redraw, np.where(hole.told, coarse[i], -1))
            assert (kind == 1).any() and (kind == 2).sum() == hole.told.sum()
        t = len(tokens.content) - 1
        wanted = np.where(kind[1 : t + 1] > 0, -1, tokens.content[1:])
        assert batch["target_content"][i, :t].tolist() == wanted.tolist()
        assert batch["kind"][i, :t].tolist() == kind[:t].tolist()


def test_holes() -> None:
    """Every shape of hole comes, leaves a code to keep and one to draw, and fits the longest sequence with hints."""
    layout, rng = TokenLayout(8, (4, 8)), np.random.default_rng(0)
    seen, hints = set(), 0
    for i in range(200):
        codes = random_codes(layout, rng)
        hole = drawn_hole(layout, codes.grain, (0, i))
        seen.add(hole.redraw.tobytes())
        coarse = rng.integers(0, 8, codes.grain.shape)
        tokens, kind = given_first(layout, codes.tokens(0), ~hole.redraw, np.where(hole.told, coarse, -1))
        assert len(tokens.content) - 1 <= layout.max_length
        assert {0, 1} <= set(kind[1:].tolist())
        hints += int(hole.told.sum())
    assert len(seen) > 100 and hints > 50
    for shape in (*SHAPES, *GRAIN_SHAPES):
        masks = [shape(8, rng.integers(0, 2, (8, 8)), rng) for _ in range(20)]
        assert all(mask.shape == (8, 8) and mask.dtype == bool for mask in masks)


def test_it_learns_from_what_comes_later() -> None:
    """A model whose training gave some cells first draws the first cell by the last one, which it must equal; the same
    model without anything given cannot."""
    layout = TokenLayout(8, (2,), kept=4)
    torch.manual_seed(0)
    config = TransformerConfig(32, 4, 1, 1, block_size=4, dropout=0.0, given=True)
    net = StackedTransformer(config, layout)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    keep = np.array([[False, True], [True, True]])

    def batch(size: int, given: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, kinds = [], []
        for _ in range(size):
            codes = rng.integers(0, 8, 4)
            codes[0] = codes[3]
            tokens, kind = layout.to_tokens(codes, np.zeros((2, 2), np.int64)), np.zeros(5, np.int64)
            if given:
                tokens, kind = given_first(layout, tokens, keep)
            rows.append(tokens)
            kinds.append(kind)
        columns = {n: torch.from_numpy(np.stack([getattr(r, n) for r in rows])) for n in NAMES}
        return columns, torch.from_numpy(np.stack(kinds))

    def loss(given: bool, size: int = 32) -> torch.Tensor:
        columns, kind = batch(size, given)
        content, position, segment = (columns[name] for name in NAMES)
        logits = net(content[:, :-1], position[:, :-1], segment[:, :-1], position[:, 1:], kind=kind[:, :-1])
        wanted = torch.where(kind[:, 1:] > 0, -1, content[:, 1:])
        if not given:
            wanted[:, 1:] = -1  # the first cell alone
        return stacked_losses(
            logits[0], logits[1], torch.where(kind[:, 1:] > 0, -1, position[:, 1:]), wanted, segment[:, 1:]
        )["content"]

    for _ in range(200):
        optimizer.zero_grad()
        (loss(True) + loss(False)).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(True, 200) < 0.5 and loss(False, 200) > 1.9  # log 8 is 2.08


@pytest.fixture(scope="module")
def model() -> Model:
    """Labels, prompts and given tokens in one."""
    return small_model(("ant", "bee"), given=True, text=TextConfig(length=16, vocabulary=256, blocks=1))


def prompt_of(net: StackedTransformer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A text as the uncached forward and as the step take it."""
    ids = TextTokenizer(BYTES, 16).encode(text)
    return ids, embed_prompts(net, [ids])[0]


def test_an_exported_model(model: Model, tmp_path: Path) -> None:
    """An engine of a model with labels, prompts and given tokens is compared with PyTorch, all three together; it edits
    exactly, as the plain sampler does, and takes hints."""
    export_onnx(model, tmp_path / "engine", slots=4)
    generator = Generator(tmp_path / "engine", slots=4, threads=1)
    net = model.both()[1]
    (codes,) = generator.sample(1, "ant", seed=1, prompts="a cat").codes
    mask = np.zeros((4, 4), dtype=bool)
    mask[:, :2] = True
    texts = ["red", "", "a long prompt"]
    made = generator.edit(codes, mask, exact=True, seed=4, prompts=texts)
    assert made.law == "given" and all(not changed(Edit(codes, mask), c) for c in made.codes)
    fields = Edit(codes, mask).constraint(given=True)
    rows = [prompt_of(net, text)[1] if text else None for text in texts]
    requests = [Request(0, made.params, 4, i, prompt=row, record=TOKENS, **fields) for i, row in enumerate(rows)]
    events = drawn(net, requests, 6)
    for event, mine in zip(events, made.codes, strict=True):
        assert (as_codes(codes.layout, event).codes == mine.codes).all()
    first, count = [row for row in rows if row is not None][-1], int((fields["given"] > 0).sum())
    (oracle,) = sample_tokens(net, [0], made.params, seed=4, first_image=2, prompts=[first], **fields)
    for head, expected in zip(TOKENS, oracle, strict=True):
        got = events[2].records[head].tolist()
        assert got[: len(expected) - 1] == expected[1 : len(got) + 1] and len(got) > count + 5
    by_pins = generator.edit(codes, mask, n=3, exact=False, seed=4)
    assert by_pins.law == "pins" and by_pins.codes != made.codes
    assert generator.sample(1, "ant", seed=1, prompts="a cat").codes == [codes]
    several = generator.sample(8, "ant", seed=2).codes
    codes = max(several, key=lambda c: int((c.grain == 0).sum()))
    few = np.zeros((4, 4), dtype=bool)
    few.reshape(-1)[np.flatnonzero(codes.grain == 0)[:2]] = True
    finer = generator.refine(codes, cells=few)
    assert finer.law == "given" and (finer.codes[0].grain[few] == 1).all()
    with pytest.raises(InputError, match="fit; refine fewer cells"):
        whole = Codes(np.full((8, 8), 3), np.zeros((4, 4), np.int8), codes.layout)
        generator.refine(whole, ratio=1.0, labels="ant")


def test_how_edits_are_measured(model: Model) -> None:
    """The likelihood of a hole and the weight of its draws make up that of the image under its label and prompt, or of
    what is left where the rest is given; without caches as with them."""
    layout, net, rng = model.layout, model.both()[1], np.random.default_rng(3)
    ids, rows = prompt_of(net, "an ant")
    for label in range(layout.starts):
        asked, codes = Asked(label, "an ant", ids, rows), random_codes(layout, rng)
        tokens = codes.tokens(label)
        for redraw in holes(layout, codes.grain).values():
            edit = Edit(codes, redraw)
            first, kind = given_first(layout, tokens, ~redraw)
            along = [
                Request(label, SamplingParams(), forced=(row.position[1:], row.content[1:]), given=given, prompt=rows)
                for row, given in ((tokens, None), (first, kind[1:]))
            ]
            whole, rest = drawn(net, [replace(request, record=LOGPROBS) for request in along], 2)
            totals = [sum(event.records[name].sum() for name in LOGPROBS) for event in (whole, rest)]
            for given, total in zip((False, True), totals, strict=True):
                by_draws, weight = likelihood(net, edit, asked, given)
                assert by_draws + weight == pytest.approx(total, rel=2e-4) and by_draws < 0


def test_the_table_of_edits(model: Model, tmp_path: Path) -> None:
    """The command on a checkpoint with labels and prompts: every hole, every way of drawing, two pictures."""
    captions = {}
    for name in ("ant", "bee", "cow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
            captions[f"{name}/{i}.png"] = f"{name} {i}"
    (tmp_path / "images" / "captions.json").write_text(json.dumps(captions))
    stage = {"labels": {"ant": ["ant"], "bee": ["bee"], "": ["*"]}, "val_fraction": 0.4}
    (tmp_path / "config.json").write_text(json.dumps({"stage": stage}))
    save_checkpoint(model, tmp_path / "ckpt")
    arguments = [str(tmp_path / "ckpt"), str(tmp_path / "images"), "--config", str(tmp_path / "config.json")]
    measure([*arguments, "--out", str(tmp_path / "out"), "--images", "2", "--candidates", "3", "--show", "cow/1.png"])
    result = json.loads((tmp_path / "out" / "edits.json").read_text())["holes"]
    assert {"left half", "right half", "upper half", "lower half", "centre"} <= set(result)
    assert all(set(row) == {"pins", "3 candidates", "given"} for row in result.values())
    assert all(place["nats"] < 0 for row in result.values() for place in row.values())
    assert all((tmp_path / "out" / name).exists() for name in ("edits.md", "edits.png", "holes.png"))
