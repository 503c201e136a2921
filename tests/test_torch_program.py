"""PyTorch behind the program protocol: with the engines' loop and caches in place it draws what the uncached sampler
draws."""

import numpy as np
import pytest
import torch
from small_models import BOUND, cells_of, full_logits, ragged_tokens, relative_error, small_transformer
from test_step import LAYOUTS, MODES

from dvq_rt.bench import middle_state
from dvq_rt.decoding import Event, Request
from dvq_rt.engine import LOGITS, run_alone
from dvq_rt.layout import HEADS
from dvq_rt.sampling import SamplingParams
from dvq_rt.step import CACHE
from runtimes.errors import BackendError, InputError
from training.checkpoint import Model
from training.sampling import sample_tokens
from training.torch_program import (
    TorchProgram,
    decode_loop,
    drawn_tokens,
    sample_events,
    stacked,
    teacher_forced,
)


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in LAYOUTS for m in MODES if LAYOUTS[n].null_label or not m.startswith("guided")]
)
def test_draws_the_oracles_tokens(name: str, mode: str) -> None:
    """Both families, guided and not, more images than slots and so ragged lengths: every token up to the last code is
    the oracle's, and the cells hold them."""
    net, params = small_transformer(LAYOUTS[name]), MODES[mode]
    layout = net.layout
    labels = [i % layout.starts for i in range(18)]
    events = sample_events(net, labels, params, seed=5, first=2)
    wanted = sample_tokens(net, labels, params, seed=5, first_image=2)
    assert [event.request.label for event in events] == labels and all(event.finished for event in events)
    for event, (content, position) in zip(events, wanted, strict=True):
        tokens = drawn_tokens(layout, event)
        steps = len(tokens.content)
        assert tokens.content.tolist() == content[:steps] and tokens.position.tolist() == position[:steps]
        assert all(value >= layout.codebook_size for value in content[steps:])
        np.testing.assert_array_equal(event.cells, cells_of(layout, (content, position)))


def test_a_limit_ends_an_image() -> None:
    """Unfinished images give the beginning of the whole ones."""
    net = small_transformer(LAYOUTS["row-first"])
    params = SamplingParams(guidance=1.5)
    whole, begun = (sample_events(net, [0, 1], params, limit=limit) for limit in (None, 9))
    for one, other in zip(whole, begun, strict=True):
        tokens = drawn_tokens(net.layout, other)
        assert len(tokens.content) == 10 and (other.cells < 0).any() and (one.cells >= 0).all()
        assert tokens.content.tolist() == drawn_tokens(net.layout, one).content[:10].tolist()


def test_guidance_needs_a_null_label() -> None:
    net = small_transformer(LAYOUTS["region-first"])
    with pytest.raises(InputError, match="guidance needs a model trained with a null label"):
        sample_events(net, [0], SamplingParams(guidance=2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_forced_logits_equal_the_full_forward(name: str) -> None:
    """Along given sequences of different lengths, in fewer slots than there are sequences, beside an idle slot too."""
    net = small_transformer(LAYOUTS[name])
    rows = ragged_tokens(net.layout, 7)
    requests = [Request.along(net.layout, row, record=LOGITS, key=i) for i, row in enumerate(rows)]
    events: list[Event] = [*run_alone(decode_loop(net, 3), requests[:5]), *run_alone(decode_loop(net, 5), requests[5:])]
    assert sorted(event.request.key for event in events) == list(range(7))
    for event in events:
        want = full_logits(net, rows[event.request.key])
        for head, logits in zip(HEADS, LOGITS, strict=True):
            assert relative_error(event.records[logits][: len(want[head])], want[head]) <= BOUND


def test_compiled_must_be_compiled(class_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.compile that silently runs eager PyTorch is refused, and so is one that fails."""
    _, net = class_model.both()

    def step_once() -> None:
        loop = decode_loop(net, 1, compiled=True)
        loop.set_state(middle_state(loop.table, 1, 9))
        loop.step()

    monkeypatch.setattr(torch, "compile", lambda module: module)
    with pytest.raises(BackendError, match=r"made 0 graphs and 0 kernels"):
        step_once()

    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module: broken)
    with pytest.raises(BackendError, match=r"torch\.compile failed: no C\+\+ compiler; leave the baseline out"):
        step_once()


def test_a_program_keeps_its_table(class_model: Model) -> None:
    """Two caches per block, as long as the longest sequence."""
    _, net = class_model.both()
    shapes = {port.sized(2) for port in TorchProgram(net).table.role(CACHE)}
    assert shapes == {(2, net.config.heads, net.layout.max_length, net.config.width // net.config.heads)}


def test_stacked_sequences_give_what_they_give_alone(class_model: Model) -> None:
    """Protects tuning and golden logits: padding changes nothing at the places that are used."""
    _, net = class_model.both()
    rows = ragged_tokens(net.layout, 4)
    inputs, used = stacked(net.layout, rows)
    assert used.sum(1).tolist() == [len(row.content) - 1 for row in rows]
    with torch.no_grad():
        together = net(*inputs)
    for i, row in enumerate(rows):
        alone, want = teacher_forced(net, row), full_logits(net, row)
        for values, head in zip(together, HEADS, strict=True):
            torch.testing.assert_close(values[i][used[i]], alone[head], rtol=1e-4, atol=1e-4)
            assert relative_error(alone[head][: len(want[head])].numpy(), want[head]) == 0
