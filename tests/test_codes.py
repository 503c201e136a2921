"""Codes: checks, cost, files."""

import io
import json
import lzma
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dvq_rt.codes import MAX_CODES, Codes, load_codes, save_codes
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
        ((codes, grain, DUAL, True), "label is True"),
        ((codes, grain, DUAL, "1"), "label is '1'"),
        ((codes, grain, DUAL, 10**5000), r"label is a.*int.*; it must be 0\.\.2"),
        ((None, grain, DUAL), "codes is object"),
        ((codes, b"grain", DUAL), "grain is "),
        (([[1], [1, 2]], grain, DUAL), "codes cannot be read as an array"),
        ((codes.astype(object), grain, DUAL), "codes is object"),
        ((codes, grain, None), "layout is None; it must be a TokenLayout"),
        ((codes, grain, DUAL.to_dict()), "layout is {"),
    ):
        with pytest.raises(InputError, match=words):
            Codes(*arguments)
    Codes(uneven, np.array([[0, 1], [0, 0]]), DUAL)
    made = Codes(codes.tolist(), grain.astype(np.uint8), DUAL, np.array(2))
    assert made.label == 2 and type(made.label) is int
    for call in (made.tokens, made.bits_per_pixel):
        for bad in ("1", 1.5, [1], b"1", True):
            with pytest.raises(InputError, match="it must be an integer"):
                call(bad)


def test_median_positions_may_differ_but_not_their_copies():
    """A cell of the middle segment holds one code per position of that segment, each in all the cells it covers."""
    grain = np.array([[1, 0], [2, 1]])
    codes = np.zeros((8, 8), dtype=np.int64)
    codes[:4, :4] = np.kron([[1, 2], [3, 4]], np.ones((2, 2), dtype=int))
    codes[4:, :4] = np.arange(16).reshape(4, 4)
    made = Codes(codes, grain, TRIPLE)
    assert made.length == len(made) == 4 + 1 + 16 + 4
    assert made.bits == pytest.approx(25 * 5 + 4 * math.log2(3))
    for row, column, segment in ((1, 2, 1), (3, 3, 1), (5, 7, 1), (2, 6, 0), (0, 7, 0)):
        uneven = codes.copy()
        uneven[row, column] += 7
        place = f"segment {segment} at row {row & -2 if segment else 0}, column {column & -2 if segment else 4}"
        with pytest.raises(InputError, match=f"inside the cell of {place}"):
            Codes(uneven, grain, TRIPLE)
    finer = codes.copy()
    finer[7, 1] += 7  # of the finest segment, where every cell is on its own
    assert Codes(finer, grain, TRIPLE).tokens().content.size == 25 + 2 * 3


def test_iteration_and_representation():
    """Every code comes once with its place, coarse to fine; the text is one line whatever the size."""
    codes = np.zeros((8, 8), dtype=np.int64)
    codes[4:, :4] = np.kron([[1, 2], [3, 4]], np.ones((2, 2), dtype=int))
    codes[:4, 4:] = np.arange(16).reshape(4, 4)
    made = Codes(codes, np.array([[0, 2], [1, 0]]), TRIPLE)
    rows = list(made)
    assert rows[:6] == [(0, 0, 0, 0), (0, 1, 1, 0), (1, 2, 0, 1), (1, 2, 1, 2), (1, 3, 0, 3), (1, 3, 1, 4)]
    assert rows[6:] == [(2, i // 4, 4 + i % 4, i) for i in range(16)]
    assert repr(made) == "Codes(22 codes on grids (2, 4, 8), label=None)"
    for layout in (DUAL, TRIPLE, KEPT):
        made = random_codes(layout, 3)
        assert len(list(made)) == made.length == len(made)
        for segment, row, column, code in made:
            block = layout.sides[-1] // layout.sides[segment]
            assert made.codes[row * block, column * block] == code


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
    for bad in (None, 3, [one, None], "codes", [b"codes"], object()):
        with pytest.raises(InputError, match="codes"):
            save_codes(tmp_path / "codes.npz", bad)
    for path in (None, b"codes.npz", 3, "a\0b.npz", "\ud800.json"):
        with pytest.raises(InputError):
            one.save(path)
        with pytest.raises(InputError):
            load_codes(path)
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
        ({"schema": 3}, "upgrade"),
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
    for text in ("", "[]", "3", "{", "[" * 100_000, '{"labels": 1, "labels": []}', "\ufeff", "NaN", "1" * 10_000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"codes\.json"):
            load_codes(path)


def rezipped(source: Path, target: Path, kind: int = zipfile.ZIP_DEFLATED, **members: bytes) -> None:
    """An archive with some members replaced or added, packed in some way."""
    with zipfile.ZipFile(source) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content.update({f"{name}.npy": data for name, data in members.items()})
    with zipfile.ZipFile(target, "w", kind) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_codes(tmp_path / "good.npz", [random_codes(DUAL, i) for i in range(3)])
    return tmp_path / "good.npz"


def test_archives_of_other_makers(tmp_path, good):
    """Another packer, other integers, another order in memory and members that are not asked for do no harm."""
    path, codes = tmp_path / "codes.npz", np.stack([c.codes for c in load_codes(good)])
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for array in (codes, codes.astype(np.uint8), codes.astype(">i2"), np.asfortranarray(codes)):
            rezipped(good, path, kind, codes=array_file(array), notes=b"mine")
            assert load_codes(path) == load_codes(good)


def test_nothing_is_unpacked_before_its_size_is_right(tmp_path, good, monkeypatch):
    """Archives that unpack to gigabytes, in any of their members, are refused by what they declare."""
    path, read = tmp_path / "codes.npz", zipfile.ZipExtFile.read

    def bounded(stream: zipfile.ZipExtFile, size: int = -1) -> bytes:
        data = read(stream, size)
        assert len(data) < 1 << 20
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", bounded)
    zeros = bytes(1 << 26)
    bombs = {
        "codes": array_file(np.zeros((1, 4, 4), np.int32)) + zeros,
        "grain": array_file(np.zeros((3, 2, 2), np.int8)) + zeros,
        "header": array_file(np.array("{}")) + zeros,
    }
    for name, data in bombs.items():
        rezipped(good, path, **{name: data})
        assert path.stat().st_size < 1 << 18
        with pytest.raises(InputError, match=rf"codes\.npz is not a readable file of codes: {name} is "):
            load_codes(path)
    for array in (np.zeros((1 << 24, 4, 4), np.int8), np.zeros((3, 4, 1 << 20), np.int8)):
        rezipped(good, path, codes=array_file(array))
        with pytest.raises(InputError, match="codes is int8"):
            load_codes(path)
    odd = [np.zeros((3, 4, 4), dtype) for dtype in ("V8", "f8", "M8[s]", "c8", "?")]
    for array in (*odd, np.zeros(3), np.zeros(()), np.zeros((3, 4, 5), np.int32)):
        rezipped(good, path, codes=array_file(array))
        with pytest.raises(InputError, match="codes is "):
            load_codes(path)


def test_files_that_are_too_large(tmp_path, good, monkeypatch):
    """A file of a size that ours cannot have is not read, and we do not write what we would not read."""
    for name in ("codes.npz", "codes.json"):
        with (tmp_path / name).open("wb") as file:
            file.write(good.read_bytes())
            file.truncate(1 << 40)
        with pytest.raises(InputError, match=rf"{name}: it has 1099511627776 bytes; at most"):
            load_codes(tmp_path / name)
    wide = TokenLayout(16, (1 << 14,))
    text = json.dumps({"format": "dvq-codes", "schema": 1, "layout": wide.to_dict(), "labels": [None]})
    rezipped(good, tmp_path / "wide.npz", header=array_file(np.array(text)))
    with pytest.raises(InputError, match=r"1 images of 268435456 cells are too many for one file.*split them"):
        load_codes(tmp_path / "wide.npz")
    one = random_codes(DUAL, 0)
    for count in (MAX_CODES // DUAL.cells + 1, (1 << 20) + 1):
        with pytest.raises(InputError, match="too many for one file"):
            save_codes(tmp_path / "many.npz", [one] * count)
    monkeypatch.setattr("dvq_rt.codes.MAX_JSON_BYTES", 1000)
    with pytest.raises(InputError, match=r"20 images make a JSON file of \d+ bytes; save them as \.npz"):
        save_codes(tmp_path / "many.json", [one] * 20)
    assert not (tmp_path / "many.npz").exists() and not (tmp_path / "many.json").exists()


def test_special_files(tmp_path, good):
    """A pipe does not block, a device or folder is no file of codes, and links are followed."""
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    (tmp_path / "dangling.npz").symlink_to("/nowhere")
    for name in ("pipe.npz", "folder.json", "zero.npz", "dangling.npz", "absent.npz"):
        with pytest.raises(InputError, match=rf"cannot read the codes .*{name}: "):
            load_codes(tmp_path / name)
    (tmp_path / "link.npz").symlink_to(good)
    assert load_codes(tmp_path / "link.npz") == load_codes(good)


def test_odd_archives(tmp_path, good):
    """Cut headers, other ways of packing, encryption, long lists of members: each is our error with the file's name."""
    path, data = tmp_path / "codes.npz", good.read_bytes()
    cases = {"nothing": b"", "only an end": data[-22:], "a comment": data + b"x", "cut": data[:-30] + data[-22:]}
    end = bytearray(data)
    end[-10:-6] = (1 << 20).to_bytes(4, "little")
    cases["a list of a million bytes"] = bytes(end)
    cases["a longer form of the end"] = data[:-22] + b"PK\6\7" + bytes(16) + data[-22:]
    encrypted = bytearray(data)
    encrypted[data.index(b"PK\1\2") + 8] |= 1
    cases["encrypted"] = bytes(encrypted)
    for words, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"codes\.npz is not a readable file of codes"):
            load_codes(path)
            raise AssertionError(words)
    for member in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\0\xff\xff{", b"\x93NUMPY\x03\0" + bytes(99), lzma.compress(b"x")):
        for name in ("header", "codes", "grain"):
            rezipped(good, path, **{name: member})
            with pytest.raises(InputError, match=r"codes\.npz is not a readable file of codes"):
                load_codes(path)
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        rezipped(good, path, kind)
        damaged = bytearray(path.read_bytes())
        damaged[60] ^= 255
        for content in (path.read_bytes(), bytes(damaged)):
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"packed in a way that save_codes does not use|not a readable"):
                load_codes(path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(100):
            archive.writestr(f"member{i}", b"")
    with pytest.raises(InputError, match="no archive of header, codes and grain"):
        load_codes(path)
