"""The cached step in PyTorch: against the full forward, beside other slots, and against the uncached sampler."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from small_models import BOUND, cells_of, full_logits, ragged_tokens, relative_error, small_transformer
from torch import Tensor

from dvq_rt.codes import Codes
from dvq_rt.decoding import cells_to_maps
from dvq_rt.layout import HEADS, ORDERS, TokenLayout, Tokens
from dvq_rt.sampling import SamplingParams, uniforms
from dvq_rt.step import CACHE, STATE
from training.models.transformer import StackedTransformer
from training.sampling import Grammar, sample_tokens
from training.step import Step, example_inputs, step_table

LAYOUTS = {
    "row-first": TokenLayout(32, (4, 8), classes=3, null_label=True),
    "region-first": TokenLayout(32, (4, 8), order="region-first"),
    "content labels": TokenLayout(32, (4, 8), classes=3, label_in_position=False),
    "three segments": TokenLayout(32, (2, 4, 8), order="region-first", classes=2, null_label=True),
    "three segments, row-first": TokenLayout(32, (2, 4, 8), classes=2, null_label=True),
    "kept": TokenLayout(32, (8,), classes=3, null_label=True, label_in_position=False, kept=25, first="content"),
    "kept, position first": TokenLayout(32, (8,), classes=2, null_label=True, kept=25),
    "all kept": TokenLayout(32, (4,), kept=16, first="content"),
    "one kept": TokenLayout(32, (4,), kept=1, first="content"),
}
MODES = {
    "ordered": SamplingParams(),
    "drawn": SamplingParams(positions="drawn", temperature=1.3),
    "filtered": SamplingParams(positions="drawn", top_k=5, top_p=0.8, top_k_position=6, top_p_position=0.9),
    "greedy": SamplingParams(top_k=1, top_k_position=1),
    "guided": SamplingParams(guidance=2.5, temperature=0.7),
    "guided drawn": SamplingParams(guidance=0.5, positions="drawn", top_p=0.9),
}


class Slots:
    """The step over a batch: every slot starts afresh with its label, and state is carried from step to step."""

    def __init__(self, net: StackedTransformer, labels: Sequence[int]) -> None:
        self.step, self.table = Step(net).eval(), step_table(net)
        inputs = example_inputs(self.table, len(labels))
        self.ports, self.caches = inputs["ports"], inputs["caches"]
        self.ports["reset"] = torch.ones(len(labels), dtype=torch.bool)
        self.ports["label"] = torch.tensor(labels)

    @torch.no_grad()
    def advance(self, **controls: Tensor) -> dict[str, Tensor]:
        """One token, and state and reports after it; ``controls`` stay as they are until given again."""
        self.ports.update(controls)
        out = self.step(self.ports, self.caches)
        named = {port.name: tensor for port, tensor in zip(self.table.outputs, out, strict=True)}
        self.ports.update({port.name: named[port.name] for port in self.table.role(STATE)})
        self.caches = [named[port.name] for port in self.table.role(CACHE)]
        self.ports["reset"] = torch.zeros_like(self.ports["reset"])
        return named


def forced_logits(net: StackedTransformer, rows: Sequence[Tokens]) -> list[dict[str, np.ndarray]]:
    """Both heads of every row, all rows side by side, [T, V] each until the row is done."""
    layout = net.layout
    slots = Slots(net, [int(row.content[0]) - layout.content_sos for row in rows])
    seen = []
    for t in range(max(layout.steps_of(row) for row in rows)):
        at = [min(t + 1, len(row.content) - 1) for row in rows]
        forced_position = torch.tensor([int(row.position[i]) for row, i in zip(rows, at, strict=True)])
        forced_content = torch.tensor([int(row.content[i]) for row, i in zip(rows, at, strict=True)])
        seen.append(slots.advance(forced_position=forced_position, forced_content=forced_content))
        done = [t + 1 >= layout.steps_of(row) for row in rows]
        assert slots.ports["done"].tolist() == done
    return [
        {h: torch.stack([out[f"{h}_logits"][i] for out in seen[: layout.steps_of(row)]]).numpy() for h in HEADS}
        for i, row in enumerate(rows)
    ]


def free_run(
    net: StackedTransformer, labels: Sequence[int], params: SamplingParams, seed: int
) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """Final cells [B, cells] and the (content, joint position) tokens of every image, drawn side by side."""
    layout, guided = net.layout, params.guidance != 1
    starts = [label for one in labels for label in ((one, layout.classes) if guided else (one,))]
    slots, width = Slots(net, starts), 2 if guided else 1
    count = len(starts)
    own = torch.arange(count)
    numbers = np.stack([uniforms(seed, i // width, layout.max_length) for i in range(count)])
    settings = {name: torch.full((count,), value) for name, value in slots.table.settings(params).items()}
    controls = {"uniforms": torch.from_numpy(numbers), "partner": own ^ 1 if guided else own, **settings}
    tokens: list[list[tuple[int, int]]] = [[] for _ in labels]
    done = torch.zeros(count, dtype=torch.bool)
    while not done.all():
        slots.advance(**controls)
        content, position = slots.ports["content"], slots.ports["position"]
        for i in range(len(labels)):
            if not done[i * width]:
                tokens[i].append((int(content[i * width]), int(position[i * width])))
        assert torch.equal(slots.ports["done"][::width], slots.ports["done"][width - 1 :: width])
        done = slots.ports["done"]
    return slots.ports["cells"].numpy()[::width], tokens


@pytest.mark.parametrize("name", LAYOUTS)
def test_cached_step_equals_the_full_forward(name: str) -> None:
    """The caches, indices, segments and start tokens of every position, with rows of different lengths together."""
    net = small_transformer(LAYOUTS[name])
    rows = ragged_tokens(net.layout, 7)
    assert len({net.layout.steps_of(row) for row in rows}) > 4 or not net.layout.covering
    found, worst = forced_logits(net, rows), 0.0
    for got, row in zip(found, rows, strict=True):
        want = full_logits(net, row)
        worst = np.max([worst, *(relative_error(got[head], want[head]) for head in HEADS)])
    print(f"\ncached step, {name}: largest relative logit error {worst:.1e}")
    assert worst <= BOUND


@pytest.mark.parametrize("name", ["row-first", "kept"])
def test_neighbours_change_nothing(name: str) -> None:
    """A slot's logits keep every bit when the other slots hold other images, labels and lengths."""
    net = small_transformer(LAYOUTS[name])
    mine, *others = ragged_tokens(net.layout, 7)[3:] + ragged_tokens(net.layout, 7, seed=1)[:3]
    first = forced_logits(net, [mine, *others[:3]])[0]
    second = forced_logits(net, [mine, *others[3:]])[0]
    alike = forced_logits(net, [others[0], *others[:3]])[0]
    for head in HEADS:
        np.testing.assert_array_equal(first[head], second[head])
        assert first[head].shape != alike[head].shape or (first[head] != alike[head]).any()


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in LAYOUTS for m in MODES if LAYOUTS[n].null_label or not m.startswith("guided")]
)
def test_free_run_equals_the_uncached_sampler(name: str, mode: str) -> None:
    """Grammar, draws, guidance and the end of an image: with the same random numbers every token is the oracle's, and
    every cell is coded exactly once, or as many as the layout keeps, in raster order where that is asked."""
    net, params = small_transformer(LAYOUTS[name]), MODES[mode]
    layout = net.layout
    labels = [i % layout.starts for i in range(6)]
    wanted = sample_tokens(net, labels, params, seed=5)
    cells, tokens = free_run(net, labels, params, seed=5)
    for i, (content, position) in enumerate(wanted):
        # the oracle also takes the forced ends that follow the last code
        assert tokens[i] == list(zip(content[1:], position[1:], strict=True))[: len(tokens[i])]
        np.testing.assert_array_equal(cells[i], cells_of(layout, wanted[i]))
        if not layout.covering and params.positions == "ordered":
            assert tokens[i] == sorted(tokens[i], key=lambda token: token[1])
    assert len({len(t) for t in tokens}) > 1 or params.top_k == 1 or not layout.covering


def mixed_images(layout: TokenLayout, cells: np.ndarray) -> int:
    """How many images [B, cells] have a coarsest cell that is coded by two segments."""
    block = layout.sides[-1] // layout.sides[0]
    segment = (cells // layout.codebook_size).reshape(-1, layout.sides[0], block, layout.sides[0], block)
    return int((segment != segment[:, :, :1, :, :1]).any((1, 2, 3, 4)).sum())


def many_runs(layout: TokenLayout, positions: str, count: int, batch: int = 500) -> np.ndarray:
    """Final cells of free runs of a model with random weights, [count, cells]."""
    net, params = small_transformer(layout), SamplingParams(positions=positions, temperature=2.0)
    return np.concatenate([free_run(net, [0] * batch, params, seed=seed)[0] for seed in range(count // batch)])


@pytest.mark.parametrize("positions", ["ordered", "drawn"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_cell_is_coded_by_one_segment(order: str, positions: str) -> None:
    """Of 1,000 images of three grains none has a cell that is half one grain and half another, and all are codes."""
    layout = TokenLayout(8, (2, 4, 8), order)
    cells = many_runs(layout, positions, 1000)
    assert mixed_images(layout, cells) == 0
    grains = {Codes(*cells_to_maps(layout, image), layout).grain.tobytes() for image in cells}
    assert len(grains) > 20  # of 81


def test_without_the_rule_cells_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: where a segment may end at any time, what the test above looks for is there."""

    def lax(self: Step, s: int, cells: Tensor, free: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return free, torch.ones_like(free[:, :1])

    monkeypatch.setattr(Step, "whole_cells", lax)
    layout = TokenLayout(8, (2, 4, 8))
    assert mixed_images(layout, many_runs(layout, "drawn", 500)) > 50


@pytest.mark.parametrize("order", ORDERS)
def test_every_grain_map_can_be_drawn(order: str) -> None:
    """No rule is too strict: each of the 81 grain maps of 2 x 2 cells has its sequence allowed, by the step and by the
    oracle, ordered and drawn."""
    layout = TokenLayout(8, (2, 4, 8), order)
    rng = np.random.default_rng(0)
    rows = [layout.random_tokens(rng, grain=np.reshape(grain, (2, 2))) for grain in product(range(3), repeat=4)]
    for ordered in (True, False):
        slots = Slots(small_transformer(layout), [0] * len(rows))
        slots.ports["ordered"] = torch.full((len(rows),), ordered)
        grammars = [Grammar(layout, ordered) for _ in rows]
        for t in range(1, max(len(row.position) for row in rows)):
            at = [min(t, len(row.position) - 1) for row in rows]
            live = [t <= layout.steps_of(row) for row in rows]
            forced = {
                "forced_position": torch.tensor([int(row.position[i]) for row, i in zip(rows, at, strict=True)]),
                "forced_content": torch.tensor([int(row.content[i]) for row, i in zip(rows, at, strict=True)]),
            }
            out = slots.advance(**forced)
            assert torch.isfinite(out["position_logprob"][live]).all()
            for grammar, position in zip(grammars, forced["forced_position"], strict=True):
                if not grammar.done:
                    local = int(layout.local(position.numpy()))
                    assert grammar.starting or local in grammar.allowed()
                    grammar.advance(local)
