"""training/prepare_emoji.py: the demo data from a tiny stand-in for the npm package, without any network."""

import gzip
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import DataError
from training.prepare_emoji import emoji_key, load_table, main, prepare, render

STEMS = {
    "0031-fe0f-20e3": ("symbols/keycap", "keycap: 1"),
    "1f44b-1f3ff": ("people-body/hand-fingers-open", "waving hand: dark skin tone"),
    "1f3f4-e0067_e0062_e0065_e006e_e0067": ("flags/subdivision-flag", "flag: England"),
    "2764-fe0f": ("smileys-emotion/heart", "red heart"),
}


def webp(width: int = 16, height: int = 16, colour: tuple[int, ...] = (255, 0, 0, 255), kind: str = "WEBP") -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (width, height), colour).save(stream, kind, lossless=True)
    return stream.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The four emoji of STEMS, beside files that are not images."""
    images = {f"package/assets/{stem}.webp": webp() for stem in STEMS}
    return pack(tmp_path / "emoji.tgz", {"package/package.json": b"{}", "../escape.webp": webp(), **images})


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("classes", ["group", "subgroup"])
def test_sorts_and_captions_every_image(
    archive: Path, tmp_path: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of the package, however its name is spelled, lands in its Unicode class with its full name."""
    out = tmp_path / "deep" / "out"
    main([str(out), "--archive", str(archive), "--size", "8", "--classes", classes])
    part = 0 if classes == "group" else 1
    expected = {f"{where.split('/')[part]}/{stem}.png": name for stem, (where, name) in STEMS.items()}
    assert json.loads((out / "captions.json").read_text(encoding="utf-8")) == expected
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == set(expected)
    assert capsys.readouterr().out.splitlines()[-1] == f"4 images, 4 classes: {out}"
    assert sorted(path.name for path in tmp_path.rglob("*") if "escape" in path.name) == []
    with Image.open(next(out.rglob("*.png"))) as image:
        assert image.mode == "RGB" and image.size == (8, 8)


def test_two_styles_in_one_folder(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flat style stands beside the other one, under classes and captions that say so; what is newer than the table
    is left out and said; each style needs its own archive."""
    images = {
        f"package/img/google/64/{stem.replace('_', '-')}.png": webp(8, 8, kind="PNG") for stem in (*STEMS, "1fae9")
    }
    flat = pack(
        tmp_path / "flat.tgz", {**images, "package/img/google/sheets/64.png": np.random.default_rng(0).bytes(3 << 19)}
    )
    out = ["--styles", "3d", "flat", "--size", "8", "--archive"]
    main([str(tmp_path / "both"), *out, str(archive), str(flat)])
    captions = json.loads((tmp_path / "both" / "captions.json").read_text(encoding="utf-8"))
    assert len(captions) == 8 and captions["heart/2764-fe0f.png"] == "red heart"
    assert captions["flat-heart/2764-fe0f.png"] == "red heart, flat"
    assert {path.relative_to(tmp_path / "both").as_posix() for path in (tmp_path / "both").rglob("*.png")} == set(
        captions
    )
    printed = capsys.readouterr()
    assert "8 images, 8 classes" in printed.out and "1 files are no emoji that" in printed.err
    assert "1fae9; they are left out" in printed.err
    for wrong, words in (((archive,), "1 files for 2 styles"), ((archive, archive), "google/64/*.png")):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "other"), *out, *map(str, wrong)])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other"), "--styles", "3d", "3d"])
    assert "names a style twice" in capsys.readouterr().err
    newer = pack(tmp_path / "newer.tgz", {"package/img/google/64/1fae9.png": webp(8, 8, kind="PNG")})
    with pytest.raises(DataError, match="1fae9; use emoji-datasource-google"):
        prepare({"flat": newer}, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_table_is_well_formed() -> None:
    """Each row has its three texts, and class names are safe folder names without spaces."""
    table = load_table()
    assert len(table) > 3600 and len({row.subgroup for row in table.values()}) > 95
    assert all(
        row.name and set(row.group + row.subgroup) <= set("abcdefghijklmnopqrstuvwxyz-") for row in table.values()
    )
    assert all(emoji_key(key) == key for key in table)


def test_transparent_pixels_leave_no_dark_fringe() -> None:
    """Black under full transparency does not bleed into the edges of a shape when it is made smaller."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, 29:] = (255, 200, 0, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, exact=True)
    small = np.asarray(render(stream.getvalue(), 16)).astype(int)
    assert small[..., 0].min() >= 254 and small[..., 1].min() >= 190
    assert small[0, 0].tolist() == [255, 255, 255] and small[0, -1].tolist() == [255, 200, 0]


def test_other_shapes_are_padded_to_a_square() -> None:
    """An image that is not square keeps its proportions on a white square."""
    small = np.asarray(render(webp(16, 32), 32))
    assert small[16, 16].tolist() == [255, 0, 0] and small[16, 2].tolist() == [255, 255, 255]


def test_existing_folder_is_kept(archive: Path, tmp_path: Path) -> None:
    """A folder that is there is neither overwritten nor mixed with."""
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out already exists"):
        prepare({"3d": archive}, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"package/index.js": b""}, "holds no package/assets"),
        ({"package/assets/1f600.webp": webp(), "package/assets/10fffe.webp": webp()}, "1 files.*10fffe"),
        ({"package/assets/smile.webp": webp()}, "1 files.*smile"),
        ({"package/assets/fe0f.webp": webp()}, "1 files.*fe0f"),
        ({"package/assets/1f600.webp": b"RIFF no image"}, "the image 1f600 cannot be read"),
        ({"package/assets/1f600.webp": webp(1025, 1)}, "1025 x 1 pixels"),
        ({"package/assets/1f600.webp": bytes((1 << 20) + 1)}, "1048577 bytes"),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, members: dict[str, bytes], text: str) -> None:
    """Another package, an unknown file or a broken image is named, and nothing is left behind."""
    archive = pack(tmp_path / "wrong.tgz", members)
    with pytest.raises(DataError, match=text):
        prepare({"3d": archive}, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.tgz"]


def test_unreadable_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    """A missing, cut or foreign archive gets an error that names it and what to give instead."""
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(archive.read_bytes()[:-200])
    text = tmp_path / "text.tgz"
    text.write_text("hello", encoding="utf-8")
    for wrong in (cut, text, tmp_path / "missing.tgz", tmp_path):
        with pytest.raises(DataError, match=rf"cannot read the archive {wrong}.*npm pack"):
            prepare({"3d": wrong}, tmp_path / "out", progress=False)


def test_fetches_with_npm(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --archive the package comes from `npm pack`, asked for by its exact version."""
    fake_npm(tmp_path / "bin", monkeypatch, f'[ "$*" = "pack @lobehub/fluent-emoji-3d@1.1.0" ] && cp {archive} p.tgz')
    main([str(tmp_path / "out")])
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4


@pytest.mark.parametrize("npm", ["missing", "failing"])
def test_npm_problems_are_explained(
    npm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No npm, or an npm that fails, ends in one line that offers --archive, with status 2 and nothing written."""
    if npm == "failing":
        fake_npm(tmp_path / "bin", monkeypatch, "echo no registry >&2; exit 7")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--archive" in error
    assert ("status 7: no registry" in error) == (npm == "failing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [7, 257])
def test_size_is_checked(archive: Path, tmp_path: Path, size: int) -> None:
    """A size out of range is refused by value."""
    with pytest.raises(DataError, match=f"size {size} is out of range"):
        prepare({"3d": archive}, tmp_path / "out", size=size)


def test_archives_that_expand(tmp_path: Path) -> None:
    """Small archives that unpack to far more are refused by their sizes, before that much is unpacked: many members,
    one long member that is no image, and a header that says it is long."""
    zeros = {f"package/other/{i}": bytes(1 << 20) for i in range(24)}
    archive = pack(tmp_path / "many.tgz", {"package/assets/2764-fe0f.webp": webp(), **zeros})
    assert archive.stat().st_size < 1 << 17
    with pytest.raises(DataError, match=r"many\.tgz unpacks to more than \d+ bytes; this is not"):
        prepare({"3d": archive}, tmp_path / "out", size=8)
    long = tarfile.TarInfo("package/assets/2764-fe0f.webp")
    long.size = 1 << 40
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    for name, info, words in (
        ("long", long, "unpacks to more than"),
        ("header", header, "it has a part of 1099511627776"),
    ):
        (tmp_path / f"{name}.tgz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16)))
        with pytest.raises(DataError, match=words):
            prepare({"3d": tmp_path / f"{name}.tgz"}, tmp_path / "out", size=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are POSIX's")
def test_pipes_are_no_archives(tmp_path: Path) -> None:
    """A pipe in place of the archive is refused instead of waited for."""
    os.mkfifo(tmp_path / "emoji.tgz")
    with pytest.raises(DataError, match=r"it is not a regular file; give the \.tgz"):
        prepare({"3d": tmp_path / "emoji.tgz"}, tmp_path / "out", size=8)
