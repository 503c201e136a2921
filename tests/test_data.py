"""training/data.py: what an image folder yields, what it refuses, and that its stream of batches is reproducible."""

import itertools
import json
import multiprocessing
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import DataError
from training.data.folder import Batch, ImageFolder
from training.data.stream import Augment, batches


def write(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 12, 5 and 1 images of noise."""
    for name, count in (("ant", 12), ("bee", 5), ("cat", 1)):
        for index in range(count):
            write(tmp_path / "set" / name / f"{index:02}.png", noise(100 * ord(name[0]) + index))
    return tmp_path / "set"


def take(folder: ImageFolder, count: int, **options: object) -> list[Batch]:
    settings = {"indices": folder.train, "batch_size": 4, "seed": 7} | options
    stream = batches(folder, **settings)  # type: ignore[arg-type]
    made = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return made


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(a, c) and np.array_equal(b, d) for (a, b), (c, d) in pairs)


def one_image(tmp_path: Path, image: Image.Image, name: str = "a.png", size: int = 4, **options: object) -> np.ndarray:
    write(tmp_path / "one" / "class" / name, image, **options)
    return ImageFolder(tmp_path / "one", size).pixels(0)


def test_lists_classes_labels_and_captions(root: Path) -> None:
    """Sub-folders become sorted labels; every file has the label of its folder and its caption."""
    (root / "captions.json").write_text(json.dumps({"bee/03.png": "a bee"}), encoding="utf-8")
    write(root / ".hidden" / "x.png", noise(1))
    (root / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    folder = ImageFolder(root, 8)
    assert folder.classes == ["ant", "bee", "cat"]
    assert len(folder) == 18 and folder.labels.dtype == np.int64
    assert [folder.classes[label] for label in folder.labels] == [path.parent.name for path in folder.paths]
    index = folder.paths.index(root / "bee" / "03.png")
    assert folder.captions(index) == ("a bee",) and folder.captions(0) == ()


def test_labels_join_sub_folders(root: Path) -> None:
    """A mapping groups sub-folders in its own order, and those it leaves out are not read."""
    folder = ImageFolder(root, 8, labels={"pets": ["cat"], "insects": ["ant"]})
    assert folder.classes == ["pets", "insects"]
    assert np.bincount(folder.labels).tolist() == [1, 12]
    everything = ImageFolder(root, 8, labels={"": ["*"]})
    assert everything.classes == [""] and len(everything) == 18
    begun = ImageFolder(root, 8, labels={"": ["*"], "b": ["b*", "ant"]})
    assert begun.classes == ["", "b"] and np.bincount(begun.labels).tolist() == [1, 17]
    with pytest.raises(DataError, match=r"labels names d\*, which"):
        ImageFolder(root, 8, labels={"b": ["d*"]})


def test_digest_tells_sets_of_images_apart(root: Path) -> None:
    """A file more, a file renamed or another mapping is another digest; the place of the folder is not."""
    known = ImageFolder(root, 8).digest()
    assert ImageFolder(root.rename(root.with_name("moved")), 8).digest() == known
    root.with_name("moved").rename(root)
    assert ImageFolder(root, 8, labels={"": ["*"]}).digest() != known
    write(root / "bee" / "zz.png", noise(5))
    more = ImageFolder(root, 8).digest()
    (root / "bee" / "zz.png").rename(root / "ant" / "zz.png")
    assert len({known, more, ImageFolder(root, 8).digest()}) == 3


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"x": ["dog"]}, "dog.*ant, bee, cat"),
        ({"x": ["ant"], "y": ["ant", "bee"]}, "ant more than once"),
        ({"x": [], "y": ["ant"]}, "no readable image for x"),
        ({}, "labels is empty"),
    ],
)
def test_wrong_labels_are_refused(root: Path, labels: dict[str, list[str]], text: str) -> None:
    """A mapping that names what is not there, or nothing, fails with the names instead of training on less."""
    with pytest.raises(DataError, match=text):
        ImageFolder(root, 8, labels=labels)


def test_split_is_stable_and_covers_large_classes(root: Path) -> None:
    """The held-out images do not change with the run or with new files, and no class is wholly held out."""
    folder = ImageFolder(root, 8, val_fraction=0.01, seed=3)
    again = ImageFolder(root, 8, val_fraction=0.01, seed=3)
    assert np.array_equal(folder.train, again.train) and np.array_equal(folder.val, again.val)
    assert sorted([*folder.train, *folder.val]) == list(range(18))
    assert (folder.labels[folder.val] == 0).sum() >= 1
    assert set(folder.labels[ImageFolder(root, 8, val_fraction=0.95).train]) == {0, 1, 2}
    assert len(ImageFolder(root, 8, val_fraction=0).val) == 0

    before = {folder.relative(index) for index in ImageFolder(root, 8, val_fraction=0.4).val}
    write(root / "aardvark" / "0.png", noise(5))
    grown = ImageFolder(root, 8, val_fraction=0.4)
    assert {grown.relative(index) for index in grown.val} == before
    seeds = {tuple(ImageFolder(root, 8, val_fraction=0.4, seed=seed).val) for seed in range(4)}
    assert len(seeds) > 1


def test_modes_become_rgb_on_white(tmp_path: Path) -> None:
    """Transparency shows white whatever its encoding, and deep or grey images keep their brightness."""
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert one_image(tmp_path, half)[0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([0, 0, 0, 0, 255, 0])
    assert one_image(tmp_path, clear, transparency=0)[0, 0].tolist() == [255, 255, 255]
    assert one_image(tmp_path, Image.new("LA", (4, 4), (0, 0)))[0, 0].tolist() == [255, 255, 255]
    assert one_image(tmp_path, Image.new("1", (4, 4), 1))[0, 0].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16))
    assert one_image(tmp_path, deep)[0, 0].tolist() == [128, 128, 128]
    (tmp_path / "one" / "class" / "a.png").unlink()
    assert one_image(tmp_path, Image.new("CMYK", (8, 8)), "a.jpg").min() > 250
    (tmp_path / "one" / "class" / "a.jpg").unlink()
    floats = Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))
    assert one_image(tmp_path, floats, "a.tif")[0, 0].tolist() == [128, 128, 128]


def test_orientation_resize_and_centre_crop(tmp_path: Path) -> None:
    """A photo held sideways is upright, its shorter side is the size, and the middle is kept."""
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, 8:16] = 255
    stripes[:4, 8:16, 0] = 0  # the top of the middle square is cyan
    image = Image.fromarray(stripes)
    plain = one_image(tmp_path, image, size=8)
    assert plain.shape == (8, 8, 3) and plain.dtype == np.uint8
    assert np.array_equal(plain, stripes[:, 8:16])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = one_image(tmp_path, image, size=8, exif=exif)
    assert np.array_equal(turned, np.rot90(stripes[:, 8:16], -1))


def test_extreme_aspect_ratio_is_cheap(tmp_path: Path) -> None:
    """A strip of 1 x 60,000 pixels is cropped before it is enlarged, so it needs no gigabytes."""
    assert one_image(tmp_path, Image.new("L", (60_000, 1), 7), size=64).shape == (64, 64, 3)


def test_broken_headers_are_skipped_with_one_warning(root: Path) -> None:
    """Files that are no images, and too large ones, are left out once and counted by name, not with a traceback."""
    for index in range(7):
        (root / "ant" / f"bad{index}.png").write_bytes(b"not an image")
    write(root / "bee" / "huge.png", Image.new("1", (10_000, 10_000)))
    with pytest.warns(UserWarning, match=r"8 unreadable.*bad0\.png.* and 3 more") as caught:
        folder = ImageFolder(root, 8)
    assert len(caught) == 1 and len(folder) == 18 and len(folder.unreadable) == 8


def test_format_is_allow_listed(root: Path) -> None:
    """A file of another format under an image's name never reaches its decoder."""
    noise(1).save(root / "ant" / "sneaky.png", format="PPM")
    with pytest.warns(UserWarning, match=r"1 unreadable.*sneaky\.png"):
        ImageFolder(root, 8)


def test_truncated_images_are_replaced_in_batches(root: Path) -> None:
    """A file with a good header and a cut body is skipped everywhere, warned of once, and named on direct access."""
    path = root / "ant" / "04.png"
    path.write_bytes(path.read_bytes()[:60])
    folder = ImageFolder(root, 8, val_fraction=0)
    index = folder.paths.index(path)
    with pytest.raises(DataError, match=r"04\.png"):
        folder.pixels(index)
    fresh = ImageFolder(root, 8, val_fraction=0)
    with pytest.warns(UserWarning, match=r"1 unreadable.*04\.png") as caught:
        made = take(fresh, 12)
    assert len(caught) == 1 and all(images.shape == (4, 8, 8, 3) for images, _ in made)
    assert same(take(fresh, 6, step=6), made[6:])
    with pytest.warns(UserWarning, match="1 unreadable"):
        images, kept = ImageFolder(root, 8).load(range(18))
    assert len(images) == 17 and index not in kept
    fresh = ImageFolder(root, 8, val_fraction=0)
    fresh.val = np.array([0, index, 7])
    with pytest.warns(UserWarning, match="1 unreadable"):
        fresh.check_held_out()
    assert fresh.val.tolist() == [0, 7]
    assert [list(kept) for _, kept in fresh.chunks(np.array([0, 1, index, 7]), 2)] == [[0, 1], [7]]
    assert [list(kept) for _, kept in fresh.chunks(np.array([index, 7]), 1)] == [[7]]


def test_all_images_truncated_is_an_error(root: Path) -> None:
    """A folder of cut files ends the stream with an error instead of an endless search."""
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="none of the"), pytest.warns(UserWarning, match="unreadable"):
        take(ImageFolder(root, 8), 1)


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    """Every way to point at the wrong place gets an error that names the path."""
    lone = write(tmp_path / "lone" / "a.png", noise(0))
    with pytest.raises(DataError, match="missing does not exist"):
        ImageFolder(tmp_path / "missing", 8)
    with pytest.raises(DataError, match="is a file"):
        ImageFolder(lone, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no readable image among 0"):
        ImageFolder(tmp_path / "empty", 8)
    (tmp_path / "set" / "void").mkdir(parents=True)
    with pytest.raises(DataError, match="set: no readable image among 0"):
        ImageFolder(tmp_path / "set", 8)
    write(tmp_path / "set" / "full" / "a.png", noise(0))
    with pytest.raises(DataError, match="no readable image for void"):
        ImageFolder(tmp_path / "set", 8)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_malformed_captions_are_refused(root: Path, text: str) -> None:
    """Captions that are no map of texts are named, not half used."""
    (root / "captions.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"captions\.json"):
        ImageFolder(root, 8)


def test_out_of_range_options_are_refused(root: Path) -> None:
    """Each option is checked before any work, with its value in the message."""
    with pytest.raises(DataError, match="size is 0"):
        ImageFolder(root, 0)
    with pytest.raises(DataError, match=r"val_fraction is 1\.0"):
        ImageFolder(root, 8, val_fraction=1.0)
    with pytest.raises(DataError, match="shift is -1"):
        Augment(shift=-1)
    folder = ImageFolder(root, 8)
    wrong: list[tuple[dict[str, object], str]] = [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"step": -1}, "step is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"indices": []}, "no images"),
        ({"indices": [18]}, "indices span 18"),
        ({"part": (0, 3)}, "batch_size 4 cannot be shared by 3"),
        ({"part": (2, 2)}, r"part is \(2, 2\)"),
        ({"part": (0, 4), "indices": [1, 2]}, "2 images are fewer than the 4 processes"),
        ({"augment": Augment(shift=8)}, "shift is 8"),
        ({"augment": Augment(flip_exclude=frozenset({"dog"}))}, "dog.*ant, bee, cat"),
    ]
    for options, text in wrong:
        settings = {"indices": folder.train, "batch_size": 4, "seed": 7} | options
        with pytest.raises(DataError, match=text):
            batches(folder, **settings)  # type: ignore[arg-type]


def test_processes_share_the_batches_of_one(root: Path) -> None:
    """Each process gets its rows of every batch; together they are the batch of one process, row for row."""
    augment = Augment(shift=2, flip=True)
    whole = take(ImageFolder(root, 8), 6, augment=augment)
    parts = [take(ImageFolder(root, 8), 6, augment=augment, part=(number, 2)) for number in range(2)]
    joined = [(np.concatenate([a, c]), np.concatenate([b, d])) for (a, b), (c, d) in zip(*parts, strict=True)]
    assert same(joined, whole)


@pytest.mark.parametrize("batch_size", [4, 40])
def test_stream_resumes_exactly(root: Path, batch_size: int) -> None:
    """A run killed at step k and started there sees the images it would have seen, whatever the number of workers."""
    augment = Augment(shift=2, flip=True)
    whole = take(ImageFolder(root, 8), 11, batch_size=batch_size, augment=augment)
    for step, workers in ((0, 0), (1, 1), (5, 2)):
        rest = take(ImageFolder(root, 8), 11 - step, batch_size=batch_size, augment=augment, step=step, workers=workers)
        assert same(rest, whole[step:])
    assert not same(take(ImageFolder(root, 8), 11, batch_size=batch_size, augment=augment, seed=8), whole)


def test_every_epoch_visits_every_image_once(root: Path) -> None:
    """No image is dropped or doubled within an epoch, and the order changes from epoch to epoch."""
    folder = ImageFolder(root, 8, val_fraction=0)
    known = [folder.pixels(index).tobytes() for index in range(18)]
    rows = [
        (known.index(image.tobytes()), int(label))
        for images, labels in take(folder, 9)
        for image, label in zip(images, labels, strict=True)
    ]
    first, second = rows[:18], rows[18:]
    assert sorted(first) == sorted(second) == [(index, int(label)) for index, label in enumerate(folder.labels)]
    assert first != second


def test_shift_and_flip(tmp_path: Path) -> None:
    """Shifts stay within bounds and repeat the edge; excluded classes are never mirrored."""
    gradient = np.repeat(np.arange(10, 18, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    for name in ("text", "face"):
        write(tmp_path / "set" / name / "a.png", Image.fromarray(gradient))
    folder = ImageFolder(tmp_path / "set", 8)
    flipped = {"face": 0, "text": 0}
    seen = set()
    augment = Augment(shift=2, flip=True, flip_exclude=frozenset({"text"}))
    for images, labels in take(folder, 40, augment=augment):
        for image, label in zip(images, labels, strict=True):
            row = image[0, :, 0].astype(int)
            mirrored = row[0] > row[-1]
            flipped[folder.classes[label]] += mirrored
            row = row[::-1] if mirrored else row
            seen.add(int(row[4]) - 14)
            assert np.all((row >= 10) & (row <= 17)) and np.all(np.diff(row) >= 0)
    assert seen == {-2, -1, 0, 1, 2}
    assert flipped["text"] == 0 and 20 < flipped["face"] < 60


def test_cache_stays_within_its_bound(root: Path) -> None:
    """A set larger than memory keeps working: the cache stops growing, results stay the same and are read-only."""
    small = ImageFolder(root, 8, cache_bytes=3 * 3 * 8 * 8)
    large = ImageFolder(root, 8)
    for index in range(18):
        assert np.array_equal(small.pixels(index), large.pixels(index))
    assert small.cached == 3 and large.cached == 18
    with pytest.raises(ValueError, match="read-only"):
        large.pixels(0)[0, 0] = 0


def test_closing_a_stream_stops_its_workers(root: Path) -> None:
    """A loop that ends leaves no thread and no worker process behind."""
    for workers in (0, 2):
        take(ImageFolder(root, 8), 2, workers=workers)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
        assert not multiprocessing.active_children()
