"""TokenLayout: the published ids, sequences to maps and back, what it refuses."""

import json
from typing import Any

import numpy as np
import pytest

from dvq_rt.layout import ORDERS, TokenLayout
from runtimes.errors import ConfigError

DUAL = {"codebook_size": 16, "sides": (2, 4)}
KEPT = {"codebook_size": 16, "sides": (4,), "kept": 3, "first": "content", "label_in_position": False}


@pytest.mark.parametrize(
    ("options", "content", "coarse", "fine"),
    [
        ({}, 1027, 259, 1027),
        ({"classes": 1000}, 2026, 1258, 2026),
        ({"classes": 1000, "label_in_position": False}, 2026, 259, 1027),
        ({"classes": 1000, "null_label": True}, 2027, 1259, 2027),
    ],
)
def test_published_ids(options: dict[str, Any], content: int, coarse: int, fine: int) -> None:
    """Every id of the released 256-pixel models (spec/dq.md section 9), so that their embeddings keep their meaning."""
    layout = TokenLayout(codebook_size=1024, sides=(16, 32), **options)
    assert (layout.content_pad, layout.content_eos, layout.content_sos) == (1024, 1025, 1026)
    assert [layout.position_pad(s) for s in (0, 1)] == [256, 1024]
    assert [layout.position_eos(s) for s in (0, 1)] == [257, 1025]
    assert [layout.position_sos(s) for s in (0, 1)] == [258, 1026]
    assert layout.content_vocabulary == content
    assert [layout.position_vocabulary(s) for s in (0, 1)] == [coarse, fine]
    assert layout.position_head == fine
    assert [layout.position_offset(s) for s in (0, 1, 2)] == [0, coarse, coarse + fine]
    assert layout.position_table == coarse + fine
    assert layout.max_length == 1027


@pytest.mark.parametrize(
    ("options", "content"), [({}, 1025), ({"classes": 1000}, 2024), ({"classes": 1000, "null_label": True}, 2025)]
)
def test_published_kept_ids(options: dict[str, Any], content: int) -> None:
    """The vocabularies of the released Stackformers (spec/mq.md section 4): codes or cells, then the start ids, nothing
    else; and no token but a start and the codes."""
    layout = TokenLayout(1024, (32,), kept=256, first="content", label_in_position=False, **options)
    assert not layout.covering and layout.heads == ("content", "position")
    assert (layout.content_sos, layout.content_vocabulary) == (1024, content)
    assert (layout.position_sos(0), layout.position_vocabulary(0), layout.position_head) == (1024, 1025, 1025)
    assert layout.position_table == 1025 and layout.max_length == layout.filled_cells == 256
    absent = (layout.content_pad, layout.content_eos, layout.position_pad(0), layout.position_eos(0))
    assert absent == (-1, -1, -1, -1)
    assert layout.start(0, 0) == (1024, 1024)
    if layout.classes:
        assert layout.start(0, 999) == (2023, 1024)


def test_kept_sequence_by_hand() -> None:
    """The exact sequence of a small image: the start, then the kept cells in row-major order, and the map back."""
    codes = np.full((4, 4), -1)
    codes[0, 2], codes[3, 0], codes[1, 1] = 7, 0, 15
    grain = np.minimum(codes, 0)
    for first in ("content", "position"):
        layout = TokenLayout(**{**KEPT, "first": first}, classes=2)
        tokens = layout.to_tokens(codes, grain, label=1)
        assert tokens.content.tolist() == [17, 7, 15, 0]
        assert tokens.position.tolist() == [16, 2, 5, 12]
        assert tokens.segment.tolist() == [0] * 4
        for order in ([0, 1, 2, 3], [3, 2, 1], [2, 0, 3, 1]):
            again, cells = layout.to_map(tokens.content[order], tokens.position[order])
            np.testing.assert_array_equal(again, codes)
            np.testing.assert_array_equal(cells, grain)
    labelled = TokenLayout(**{**KEPT, "label_in_position": True}, classes=2)
    assert labelled.to_tokens(codes, grain, label=1).position.tolist() == [17, 2, 5, 12]


@pytest.mark.parametrize("kept", [1, 3, 35, 36])
def test_kept_round_trip(kept: int) -> None:
    """Any map comes back from its sequence, from one kept cell to all of them; half a sequence gives half a map."""
    layout = TokenLayout(50, (6,), kept=kept, first="content")
    rng = np.random.default_rng(0)
    for _ in range(20):
        codes = np.full(36, -1)
        codes[rng.permutation(36)[:kept]] = rng.integers(0, 50, kept)
        codes = codes.reshape(6, 6)
        tokens = layout.to_tokens(codes, np.minimum(codes, 0))
        assert len(tokens.content) - 1 == layout.max_length == kept
        again, grain = layout.to_map(tokens.content, tokens.position)
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_array_equal(grain, np.minimum(codes, 0))
        part, _ = layout.to_map(tokens.content[: kept // 2 + 1], tokens.position[: kept // 2 + 1])
        assert (part >= 0).sum() == kept // 2 and ((part == codes) | (part == -1)).all()


def test_kept_maps_of_another_number_are_refused() -> None:
    """A map with more or fewer codes than the model keeps has no sequence."""
    codes = np.zeros((4, 4), dtype=np.int64)
    with pytest.raises(ConfigError, match="the maps hold 16 codes; this layout has 3 per image"):
        TokenLayout(**KEPT).to_tokens(codes, codes)
    with pytest.raises(ConfigError, match="the maps hold 0 codes"):
        TokenLayout(**KEPT).to_tokens(codes - 1, codes - 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": 0}, "layout.kept is 0"),
        ({"kept": 17}, r"layout.kept is 17 with grids \(4,\); it must be null, or an integer from 1 to the cells"),
        ({"kept": 2.0}, "layout.kept is 2.0"),
        ({"kept": True}, "layout.kept is True"),
        ({"sides": (2, 4)}, r"layout.kept is 3 with grids \(2, 4\)"),
        ({"first": "value"}, "layout.first is 'value'; it must be 'position', or 'content' if there is a kept"),
        ({"kept": None}, "layout.first is 'content'"),
    ],
)
def test_bad_kept_sizes_are_named(changes: dict[str, Any], words: str) -> None:
    """A number of kept cells that the grid does not have, or codes first where only a position can end a segment, is
    refused with field, value and rule."""
    with pytest.raises(ConfigError, match=words):
        TokenLayout(**{**KEPT, **changes})


def test_kept_dict_round_trip() -> None:
    """A keeping layout survives JSON."""
    layout = TokenLayout(**KEPT, classes=3, null_label=True)
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_start_ids() -> None:
    """A label starts every segment, in the position vocabularies only where the model says so."""
    both = TokenLayout(codebook_size=1024, sides=(16, 32), classes=1000, null_label=True)
    assert both.start(0, 7) == (1033, 265) and both.start(1, 1000) == (2026, 2026)
    content_only = TokenLayout(codebook_size=1024, sides=(16, 32), classes=1000, label_in_position=False)
    assert content_only.start(0, 7) == (1033, 258) and content_only.start(1, 7) == (1033, 1026)
    with pytest.raises(ConfigError, match=r"label 1000 is outside 0\.\.999"):
        content_only.start(0, 1000)


def test_sequence_by_hand() -> None:
    """The exact sequence of a small image in both orders: starts, coarse pairs, end, start, fine pairs, end."""
    codes = np.array([[1, 1, 2, 3], [1, 1, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]])
    grain = np.array([[0, 1], [1, 1]])
    wanted = {
        "row-first": ([2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]),
        "region-first": ([2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15], [2, 3, 4, 5, 6, 7, 10, 11, 8, 9, 12, 13]),
    }
    for order, (places, values) in wanted.items():
        layout = TokenLayout(**DUAL, order=order, classes=3)
        tokens = layout.to_tokens(codes, grain, label=2)
        assert tokens.content.tolist() == [20, 1, 17, 20, *values, 17]
        assert tokens.position.tolist() == [8, 0, 5, 9 + 20, *(9 + p for p in places), 9 + 17]
        assert tokens.segment.tolist() == [0] * 3 + [1] * 14


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sides", [(2, 4), (2, 8), (1, 2, 4), (2, 4, 8), (3, 6, 12)])
def test_round_trip(order: str, sides: tuple[int, ...]) -> None:
    """Any map comes back from its sequence, whatever the order, the ratio and the number of segments."""
    layout = TokenLayout(codebook_size=50, sides=sides, order=order, classes=2)
    rng = np.random.default_rng(0)
    last = layout.segments - 1
    for trial in range(20):
        grain = rng.integers(0, layout.segments, (sides[0], sides[0])) if trial > 1 else np.full([sides[0]] * 2, trial)
        codes = rng.integers(0, 50, layout.cells)
        for s in range(layout.segments):
            cells = layout.covered_cells(s)
            cells = cells[layout.grain_of_cells(grain)[cells[:, 0]] == s]
            codes[cells] = codes[cells[:, :1]]
        tokens = layout.to_tokens(codes, grain, label=trial % 2)
        assert len(tokens.content) - 1 <= layout.max_length
        again, regions = layout.to_map(tokens.content, tokens.position)
        np.testing.assert_array_equal(again.reshape(-1), codes)
        np.testing.assert_array_equal(regions, grain)
    longest = layout.to_tokens(codes, np.full([sides[0]] * 2, last))
    assert len(longest.content) - 1 == layout.max_length


def test_orders_visit_every_position_once() -> None:
    """Both orders are permutations, and region-first keeps the four codes of a region together."""
    for order in ORDERS:
        layout = TokenLayout(codebook_size=4, sides=(2, 4, 8), order=order)
        for s, side in enumerate(layout.sides):
            assert sorted(layout.ordered_positions(s).tolist()) == list(range(side * side))
    region = TokenLayout(codebook_size=4, sides=(2, 4), order="region-first").ordered_positions(1)
    assert region.reshape(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_unfinished_sequences() -> None:
    """A segment that never ends is lost unless it is the last; cells that nothing covers hold code 0."""
    layout = TokenLayout(codebook_size=16, sides=(1, 2, 4))
    tokens = layout.to_tokens(np.full(16, 9), np.array([[1]]))
    middle = layout.position_eos(1) + layout.position_offset(1)
    unended = tokens.position != middle
    codes, grain = layout.to_map(tokens.content[unended], tokens.position[unended])
    assert (codes == 0).all() and grain.tolist() == [[2]]
    codes, grain = layout.to_map([3], [layout.position_offset(2) + 5])
    assert codes.reshape(-1).nonzero()[0].tolist() == [5] and grain.tolist() == [[2]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_size": 0}, "layout.codebook_size is 0"),
        ({"codebook_size": 16.0}, "layout.codebook_size is 16.0; it must be an integer"),
        ({"codebook_size": True}, "layout.codebook_size is True"),
        ({"codebook_size": "16"}, "layout.codebook_size is '16'"),
        ({"sides": ()}, r"layout.sides is \(\)"),
        ({"sides": 4}, "layout.sides is 4; it must be a list"),
        ({"sides": (0, 4)}, r"layout.sides is \(0, 4\)"),
        ({"sides": (2, 4.0)}, r"layout.sides is \(2, 4.0\)"),
        ({"sides": (True, 4)}, r"layout.sides is \(True, 4\)"),
        ({"sides": (4, 2)}, "larger multiple of the one before"),
        ({"sides": (4, 4)}, "larger multiple of the one before"),
        ({"sides": (2, 3, 12)}, "larger multiple of the one before"),
        ({"sides": (4, 6, 12)}, "larger multiple of the one before"),
        ({"order": "spiral"}, "layout.order is 'spiral'; it must be one of"),
        ({"classes": -1}, "layout.classes is -1"),
        ({"classes": 2.0}, "layout.classes is 2.0"),
        ({"classes": False}, "layout.classes is False"),
        ({"null_label": True}, "layout.null_label needs layout.classes"),
        ({"null_label": 1, "classes": 2}, "layout.null_label is 1"),
        ({"label_in_position": "no"}, "layout.label_in_position is 'no'"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, Any], words: str) -> None:
    """A layout from a damaged file is refused with field, value and rule before any id is derived from it."""
    with pytest.raises(ConfigError, match=words):
        TokenLayout(**{**DUAL, **changes})


def test_maps_of_other_sizes_are_refused() -> None:
    """Codes of another model are not silently cut to this one's grid."""
    with pytest.raises(ConfigError, match=r"code map \(3, 3\) and grain map \(2, 2\) do not fit"):
        TokenLayout(**DUAL).to_tokens(np.zeros((3, 3)), np.zeros((2, 2)))
    with pytest.raises(ConfigError, match=r"grain map \(4, 4\) do not fit"):
        TokenLayout(**DUAL).to_tokens(np.zeros((4, 4)), np.zeros((4, 4)))


def test_dict_is_strict() -> None:
    """A layout survives JSON, and a file with a key too many or too few is refused by name."""
    layout = TokenLayout(**DUAL, order="region-first", classes=3, null_label=True, label_in_position=False)
    values = json.loads(json.dumps(layout.to_dict()))
    assert TokenLayout.from_dict(values) == layout
    with pytest.raises(ConfigError, match=r"unknown keys \['side'\], missing keys \['sides'\]"):
        TokenLayout.from_dict({**{k: v for k, v in values.items() if k != "sides"}, "side": 4})
