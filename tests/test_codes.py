"""Codes: checks, cost, files."""

import json
import math
import pickle

import numpy as np
import pytest

from dvq_rt.codes import Codes, load_codes, save_codes
from dvq_rt.layout import TokenLayout
from runtimes.errors import InputError

DUAL = TokenLayout(codebook_size=16, sides=(2, 4), classes=3, null_label=True)
TRIPLE = TokenLayout(codebook_size=32, sides=(2, 4, 8), order="region-first")
KEPT = TokenLayout(16, (4,), classes=3, null_label=True, kept=5, first="content", label_in_position=False)


def random_codes(layout: TokenLayout, seed: int, label: int | None = None) -> Codes:
    rng = np.random.default_rng(seed)
    if layout.kept is not None:
        codes = np.full(layout.cells, -1)
        codes[rng.permutation(layout.cells)[: layout.kept]] = rng.integers(0, layout.codebook_size, layout.kept)
        codes = codes.reshape(layout.sides[0], -1)
        return Codes(codes, np.minimum(codes, 0), layout, label)
    grain = rng.integers(0, layout.segments, (layout.sides[0],) * 2)
    codes = rng.integers(0, layout.codebook_size, layout.cells)
    for s in range(layout.segments):
        cells = layout.covered_cells(s)
        cells = cells[layout.grain_of_cells(grain)[cells[:, 0]] == s]
        codes[cells] = codes[cells[:, :1]]
    return Codes(codes.reshape(layout.sides[-1], -1), grain, layout, label)


def test_length_and_bits():
    """The reported cost is the number of codes really sent, plus the grain map."""
    codes = np.zeros((4, 4), dtype=np.int32)
    for grain, length in (([[0, 0], [0, 0]], 4), ([[1, 0], [0, 0]], 7), ([[1, 1], [1, 1]], 16)):
        made = Codes(codes, np.array(grain), DUAL)
        assert made.length == length
        assert made.bits == length * 4 + 4
        assert made.bits_per_pixel(32) == (length * 4 + 4) / 1024
    triple = Codes(np.zeros((8, 8), dtype=np.int64), np.array([[0, 1], [2, 0]]), TRIPLE)
    assert triple.length == 1 + 4 + 16 + 1
    assert triple.bits == pytest.approx(22 * 5 + 4 * math.log2(3))
    with pytest.raises(InputError, match="image_size is 0"):
        triple.bits_per_pixel(0)


def test_length_and_bits_of_kept_cells():
    """Where cells are kept the cost is the codes and the choice of their places; nothing where all are kept."""
    made = random_codes(KEPT, 0)
    assert made.length == 5 and (made.codes >= 0).sum() == 5
    assert made.bits == pytest.approx(5 * 4 + math.log2(4368))  # 16 over 5
    assert made.bits_per_pixel(32) == pytest.approx(made.bits / 1024)
    whole = random_codes(TokenLayout(16, (4,), kept=16), 0)
    assert whole.length == 16 and whole.bits == 16 * 4
    part = np.where(np.arange(16).reshape(4, 4) == 6, 3, -1)  # of another number of cells than the model makes
    one = Codes(part, np.minimum(part, 0), KEPT)
    assert one.length == 1 and one.bits == 4 + 4
    with pytest.raises(InputError, match="the maps hold 1 codes; this layout has 5 per image"):
        one.tokens()


def test_bad_kept_cells_are_named():
    """A cell has a code exactly where its grain says so, and layouts that cover the image have no empty cells."""
    codes = np.where(np.arange(16).reshape(4, 4) < 5, 3, -1)
    grain = np.minimum(codes, 0)
    shifted = np.roll(grain, 1)
    for arguments, words in (
        ((codes, shifted, KEPT), "codes and grain must be -1 in the same cells"),
        ((codes, np.zeros_like(grain), KEPT), "codes and grain must be -1 in the same cells"),
        ((codes - 1, grain, KEPT), r"codes holds values from -2 to 2; they must be in -1\.\.15"),
        ((codes + 13, grain, KEPT), r"codes holds values from 12 to 16; they must be in -1\.\.15"),
        ((codes, grain + 1, KEPT), r"grain holds values from 0 to 1; they must be in -1\.\.0"),
        ((codes, grain[:2, :2], DUAL), r"codes holds values from -1 to 3; they must be in 0\.\.15"),
    ):
        with pytest.raises(InputError, match=words):
            Codes(*arguments)
    assert Codes(codes, grain, KEPT, 2).tokens().content.tolist() == [18, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("layout", [DUAL, TRIPLE, KEPT])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_return_the_maps_and_agree_with_length(layout, seed):
    """Sequence and maps say the same, and length counts the sequence's codes without starts and ends."""
    made = random_codes(layout, seed)
    tokens = made.tokens()
    assert tokens.content.size - (2 if layout.covering else 1) * layout.segments == made.length
    codes, grain = layout.to_map(tokens.content, tokens.position)
    np.testing.assert_array_equal(codes, made.codes)
    np.testing.assert_array_equal(grain, made.grain)


def test_tokens_start_with_the_label():
    """The label in the codes, an explicit one, or the null label starts the sequence; none at all is an error."""
    made = random_codes(DUAL, 0, label=1)
    assert made.tokens().content[0] == DUAL.content_sos + 1
    assert made.tokens(label=2).content[0] == DUAL.content_sos + 2
    assert random_codes(DUAL, 0).tokens().content[0] == DUAL.content_sos + 3
    plain = random_codes(TokenLayout(codebook_size=16, sides=(2, 4), classes=3), 0)
    with pytest.raises(InputError, match="no label"):
        plain.tokens()
    with pytest.raises(InputError, match="label is 3"):
        plain.tokens(label=3)


def test_arrays_are_owned_and_read_only():
    """Codes cannot change behind the caller's back, neither through the source array nor through the object."""
    source = np.zeros((4, 4), dtype=np.int32)
    made = Codes(source, np.ones((2, 2), dtype=np.int64), DUAL)
    source[:] = 5
    assert made.codes.max() == 0 and made.codes.dtype == np.int64 and made.grain.dtype == np.int8
    with pytest.raises(ValueError, match="read-only"):
        made.codes[0, 0] = 1
    assert pickle.loads(pickle.dumps(made)) == made


def test_bad_values_are_named():
    """Codes that no model of the layout could have made are refused, with the reason."""
    codes, grain = np.zeros((4, 4), dtype=np.int64), np.zeros((2, 2), dtype=np.int64)
    uneven = codes.copy()
    uneven[1, 2] = 3
    for arguments, words in (
        ((codes + 16, grain, DUAL), "codes holds values from 16 to 16; they must be in 0..15"),
        ((codes - 1, grain, DUAL), "in 0..15"),
        ((codes, grain + 2, DUAL), "grain holds values from 2 to 2; they must be in 0..1"),
        ((codes, grain + 256, DUAL), "grain holds values from 256"),
        ((codes.astype(float), grain, DUAL), "codes is float64"),
        ((codes[:2], grain, DUAL), r"shape \(4, 4\)"),
        ((codes, codes, DUAL), r"grain is int64 \(4, 4\)"),
        ((uneven, grain, DUAL), "segment 0 at row 0, column 2"),
        ((codes, grain, DUAL, 3), r"label is 3; it must be 0..2 or None"),
        ((codes, grain, DUAL, 1.0), "label is 1.0"),
        ((np.zeros((8, 8), int), grain, TRIPLE, 0), "no labels"),
    ):
        with pytest.raises(InputError, match=words):
            Codes(*arguments)
    Codes(uneven, np.array([[0, 1], [0, 0]]), DUAL)


@pytest.mark.parametrize("suffix", [".npz", ".json", ".NPZ"])
@pytest.mark.parametrize("layout", [DUAL, TRIPLE, KEPT])
def test_files_round_trip(tmp_path, suffix, layout):
    """Both file kinds give back exactly what was saved, one image or many, labelled or not."""
    path = tmp_path / f"codes{suffix}"
    many = [random_codes(layout, i, label=i if i and layout.classes else None) for i in range(3)]
    save_codes(path, many)
    assert load_codes(path) == many
    many[1].save(path)
    assert Codes.load(path) == many[1]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_refuse_what_they_cannot_hold(tmp_path):
    """Wrong suffixes, empty lists, mixed layouts and unwritable places are named, and no file appears."""
    one = random_codes(DUAL, 0)
    with pytest.raises(InputError, match=r"\.npz or \.json, not as \.pkl"):
        one.save(tmp_path / "codes.pkl")
    with pytest.raises(InputError, match="no codes"):
        save_codes(tmp_path / "codes.npz", [])
    with pytest.raises(InputError, match="different layouts"):
        save_codes(tmp_path / "codes.npz", [one, random_codes(TRIPLE, 0)])
    with pytest.raises(InputError, match="cannot write"):
        one.save(tmp_path / "absent" / "codes.npz")
    with pytest.raises(InputError, match="cannot read"):
        load_codes(tmp_path / "codes.npz")
    assert not list(tmp_path.iterdir())
    save_codes(tmp_path / "two.json", [one, one])
    with pytest.raises(InputError, match="2 images; read it with load_codes"):
        Codes.load(tmp_path / "two.json")


def test_damaged_npz_never_gives_other_codes(tmp_path):
    """Cut and flipped files either load as they were (a byte that means nothing) or raise InputError."""
    path = tmp_path / "codes.npz"
    many = [random_codes(DUAL, i) for i in range(2)]
    save_codes(path, many)
    data = path.read_bytes()
    refused = 0
    for index in range(0, len(data), 3):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x41]) + data[index + 1 :])
        try:
            assert load_codes(path) == many
        except InputError:
            refused += 1
    assert refused > len(data) // 6
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(InputError, match=r"codes\.npz"):
            load_codes(path)


def test_foreign_files_are_refused(tmp_path):
    """Pickles, bare arrays, other JSON and newer schemas are errors of ours, never of numpy, and nothing is run."""
    path = tmp_path / "codes.npz"
    np.savez(path, header=np.array({"a": 1}, dtype=object), codes=np.zeros(1), grain=np.zeros(1))
    with pytest.raises(InputError):
        load_codes(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError):
        load_codes(path)
    path = tmp_path / "codes.json"
    random_codes(DUAL, 0).save(path)
    good = json.loads(path.read_text())
    for change, words in (
        ({"schema": 2}, "upgrade"),
        ({"format": "other"}, "format"),
        ({"labels": []}, "shorter|longer"),
        ({"codes": [[[0.5] * 4] * 4]}, "float64"),
        ({"codes": [[[0], [0, 1]]]}, "inhomogeneous"),
        ({"codes": 3}, "not a readable"),
        ({"layout": {}}, "missing keys"),
        ({"layout": {**good["layout"], "sides": "24"}}, "not a readable"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=words):
            load_codes(path)
    for text in ("", "[]", "3", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"codes\.json"):
            load_codes(path)
