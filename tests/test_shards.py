"""training/data/shards.py: tar shards as webdataset writes them are read like a folder, in any order, cut ones too."""

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data import noise, same, take

from runtimes.errors import DataError
from training.data.folder import ImageFolder

webdataset: Any = pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's indices and copies are."""
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, kind)
    return file.getvalue()


def write_shards(folder: Path, count: int = 3, images: int = 6, **parts: Any) -> list[Path]:
    """Shards of pictures; ``parts`` are functions from a picture's number to a further member's content."""
    folder.mkdir(parents=True, exist_ok=True)
    made, number = [], 0
    for shard in range(count):
        made.append(folder / f"part-{shard:02}.tar")
        with webdataset.TarWriter(str(made[-1])) as writer:
            for _ in range(images):
                extra = {name.replace("_", "."): part(number) for name, part in parts.items()}
                writer.write({"__key__": f"{number:04}", "png": picture(number), **extra})
                number += 1
    return made


def test_shards_are_read_like_a_folder(tmp_path: Path) -> None:
    """Labels from ``.cls`` in the order of numbers, every picture with its own parts, batches that resume exactly with
    any number of workers; a second start needs no listing."""
    write_shards(tmp_path / "wds", cls=lambda n: str(n % 11).encode(), txt=lambda n: f"picture {n}\nor {n}\n".encode())
    pattern = f"{tmp_path}/wds/part-{{00..02}}.tar"
    folder = ImageFolder(pattern, 8, val_fraction=0)
    assert folder.classes == [str(n) for n in range(11)] and len(folder) == 18
    for index in range(18):
        number = int(Path(folder.relative(index)).stem)
        assert folder.labels[index] == number % 11
        assert folder.captions(index) == (f"picture {number}", f"or {number}")
        assert np.array_equal(folder.pixels(index), np.asarray(noise(number)))
    assert folder.relative(0) == "part-00.tar/0000.png"
    whole = take(folder, 9)
    (tmp_path / "wds" / "part-00.tar").touch()  # listed anew
    starred = ImageFolder(f"{tmp_path}/wds/*.tar", 8, val_fraction=0)
    assert starred.digest() == folder.digest()
    assert same(take(starred, 6, step=3, workers=2), whole[3:])
    parts = [take(folder, 9, part=(number, 2)) for number in (0, 1)]
    joined = [(np.concatenate([a, c]), np.concatenate([b, d])) for (a, b), (c, d) in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_classes_of_json_and_of_folders(tmp_path: Path) -> None:
    """``.json`` names class and captions; without any named class a key's first folder is it; ``labels`` joins them."""
    fields = {0: {"label": "ant", "caption": "an ant"}, 1: {"label": "bee", "captions": ["a bee", "yellow"]}}
    (path,) = write_shards(tmp_path, 1, 2, json=lambda n: json.dumps(fields[n]).encode())
    folder = ImageFolder(path, 8)
    assert folder.classes == ["ant", "bee"] and folder.captions(0) == ("an ant",)
    assert folder.captions(1) == ("a bee", "yellow")
    with webdataset.TarWriter(str(tmp_path / "tree.tar")) as writer:
        for number, key in enumerate(("wasp/x/1", "ant/1", "ant/2")):
            writer.write({"__key__": key, "png": picture(number)})
    tree = ImageFolder(tmp_path / "tree.tar", 8)
    assert tree.classes == ["ant", "wasp"] and tree.labels.tolist() == [0, 0, 1] and tree.captions(0) == ()
    joined = ImageFolder(tmp_path / "tree.tar", 8, labels={"insects": ["*"]})
    assert joined.classes == ["insects"] and len(joined) == 3
    with pytest.raises(DataError, match=r"exclude names bee, which .*tree\.tar lacks"):
        ImageFolder(tmp_path / "tree.tar", 8, exclude=("bee",))
    only = {0: {"label": "ant"}, 1: {"size": 3}}
    (path,) = write_shards(tmp_path / "some", 1, 2, json=lambda n: json.dumps(only[n]).encode())
    with pytest.raises(DataError, match=r"1 of 2 samples have no class \(part-00\.tar/0001\.png\)"):
        ImageFolder(path, 8)


def test_a_command_is_run_once(tmp_path: Path, cache: Path) -> None:
    """A ``pipe:`` is copied when it is first listed, and gives the pictures in the order of local shards; one that
    fails is named and leaves no copy."""
    write_shards(tmp_path / "wds", 2)
    pipes = f"pipe:echo x >> {tmp_path}/runs; cat {tmp_path}/wds/part-{{00..01}}.tar"
    folder, again = ImageFolder(pipes, 8, val_fraction=0), ImageFolder(pipes, 8, val_fraction=0)
    local = ImageFolder(f"{tmp_path}/wds/*.tar", 8, val_fraction=0)
    assert (tmp_path / "runs").read_text() == "x\nx\n"
    assert same(take(folder, 5), take(local, 5)) and same(take(again, 5), take(local, 5))
    with pytest.raises(DataError, match=r"cannot copy the shard pipe:cat .*nowhere"):
        ImageFolder(f"pipe:cat {tmp_path}/nowhere", 8)
    assert len(list(cache.glob("*.tar"))) == 2


@pytest.mark.parametrize(
    ("cut", "reason"), [(-10, "within 0009.png"), (0, "behind 0009.png"), (200, "behind 0009.png"), (700, "behind")]
)
def test_shards_that_end_early(tmp_path: Path, cut: int, reason: str) -> None:
    """The whole pictures of a shard that is cut within a picture, behind one or within a header are used, and what is
    the last of them is said; a damaged header ends it too, and a shard without a whole picture is an error."""
    second = write_shards(tmp_path, 2)[1]
    data = second.read_bytes()
    with tarfile.open(second) as tar:
        member = tar.getmember("0009.png")
        end = member.offset_data + member.size
    behind = -(-end // 512) * 512
    second.write_bytes(data[: end - 10 if cut < 0 else behind + cut])
    with pytest.warns(UserWarning, match=rf"1 shard\(s\) end early .*part-01\.tar \({reason}"):
        folder = ImageFolder(f"{tmp_path}/*.tar", 8)
    assert len(folder) == (9 if cut < 0 else 10)
    second.write_bytes(data[:behind] + b"\1" * 512 + data[behind + 512 :])
    with pytest.warns(UserWarning, match=r"part-01\.tar \(behind 0009.png"):
        assert len(ImageFolder(f"{tmp_path}/*.tar", 8)) == 10
    second.write_bytes(data[:100])
    with pytest.raises(DataError, match=r"cannot list .*part-01\.tar"):
        ImageFolder(f"{tmp_path}/*.tar", 8)


def test_broken_pictures_are_counted_and_too_many_end_it(tmp_path: Path) -> None:
    """Pictures that cannot be decoded are replaced and named, also by worker processes; more than half is an error."""
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(12):
            content = picture(number)
            writer.write({"__key__": f"{number}", "png": content[:60] if number in (3, 5) else content})
    for workers in (0, 2):
        with pytest.warns(UserWarning, match=r"2 unreadable image.*a\.tar/[35]\.png, .*a\.tar/[35]\.png"):
            made = take(ImageFolder(path, 8, val_fraction=0), 3, workers=workers)
        assert all(images.shape == (4, 8, 8, 3) for images, _ in made)
    with pytest.raises(DataError, match=r"a\.tar/3\.png: .*"):
        ImageFolder(path, 8).pixels(3)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(12):
            writer.write({"__key__": f"{number}", "png": picture(number)[: 60 if number % 3 else 1000]})
    for workers in (0, 2):
        with (
            pytest.raises(DataError, match=r"\d of 12 images cannot be decoded, more than half, such as .*a\.tar/\d+"),
            pytest.warns(UserWarning, match="unreadable"),
        ):
            take(ImageFolder(path, 8, val_fraction=0), 9, workers=workers)


def test_random_crops(tmp_path: Path) -> None:
    """A random crop is a square of full height anywhere along an oblong picture; the centre stays what it was."""
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    (tmp_path / "set").mkdir()
    Image.fromarray(ramp).save(tmp_path / "set" / "a.png")
    folder = ImageFolder(tmp_path / "set", 8, val_fraction=0)
    from training.data.stream import Augment

    crops = [images[0] for images, _ in take(folder, 30, batch_size=1, augment=Augment(crop="random"))]
    starts = [int(crop[0, 0, 0]) for crop in crops]
    assert min(starts) < 20 and max(starts) > 140 and len(set(starts)) > 15
    assert all(int(crop[0, 7, 0]) - int(crop[0, 0, 0]) in range(64, 77) for crop in crops)
    assert np.array_equal(folder.pixels(0), ramp[:, 8:16])
    again = take(folder, 30, batch_size=1, augment=Augment(crop="random"), workers=2)
    assert all(np.array_equal(one, images[0]) for one, (images, _) in zip(crops, again, strict=True))
    with pytest.raises(DataError, match="crop is 'left'; choose one of"):
        Augment(crop="left")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{0..2}.tar", "no shard .*0.tar; check the path"),
        ("*.tar", r"no shard .*\*\.tar; check the path"),
        ("a.tar::a.tar", "a.tar is named more than once"),
        ("zip.tar", r"cannot list .*zip\.tar.*plain tar files"),
        ("empty.tar", r"empty\.tar: no image in it"),
    ],
)
def test_wrong_shards_are_refused(tmp_path: Path, name: str, words: str) -> None:
    """What is no shard, or is not there, is named."""
    if name != "*.tar":
        write_shards(tmp_path, 1)[0].rename(tmp_path / "a.tar")
    if name in ("zip.tar", "empty.tar"):
        with webdataset.TarWriter(str(tmp_path / name), compress=name == "zip.tar") as writer:
            writer.write({"__key__": "0", "txt": b"nothing to see"})
    text = "::".join(f"{tmp_path}/{part}" for part in name.split("::"))
    with pytest.raises(DataError, match=words):
        ImageFolder(text, 8)


def test_damaged_index_is_made_again(tmp_path: Path, cache: Path) -> None:
    """An index file that cannot be read is replaced, not trusted."""
    (path,) = write_shards(tmp_path, 1)
    known = ImageFolder(path, 8).digest()
    for index in itertools.chain(cache.glob("*.npz")):
        index.write_bytes(index.read_bytes()[:100])
    assert ImageFolder(path, 8).digest() == known
