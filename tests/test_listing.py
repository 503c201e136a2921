"""training/data/listing.py: folders, flat folders and lists as they are in the world."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import noise, write

from dvq_rt.images import to_array
from runtimes.errors import DataError
from training.data.folder import ImageFolder
from training.data.pixels import to_float


def names(folder: ImageFolder) -> dict[str, str]:
    """Relative path to class of all images."""
    return {folder.relative(i): folder.classes[label] for i, label in enumerate(folder.labels)}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Three images without sub-folders, and what archives and tools leave beside them."""
    for index in range(3):
        write(tmp_path / "flat" / f"{index}.png", noise(index))
    for rubbish in ("__MACOSX/._0.png", "__MACOSX/deep/1.png", ".thumbs/2.png", "._2.png"):
        write(tmp_path / "flat" / rubbish, noise(9))
    return tmp_path / "flat"


def test_flat_folder(flat: Path) -> None:
    """Images without sub-folders are one class without a name; what macOS and hidden tools add is none of them."""
    folder = ImageFolder(flat, 8)
    assert folder.classes == [""] and names(folder) == dict.fromkeys(("0.png", "1.png", "2.png"), "")
    assert not folder.unreadable


def test_rubbish_below_classes(flat: Path) -> None:
    """The same holds at any depth below a class; images beside the sub-folders are said, not silently lost."""
    write(flat / "ant" / "deep" / "a.png", noise(4))
    write(flat / "ant" / "deep" / "__MACOSX" / "a.png", noise(4))
    with pytest.warns(UserWarning, match=r"3 image\(s\) directly in .*flat are left out \(0.png, 1.png, 2.png\)"):
        folder = ImageFolder(flat, 8)
    assert names(folder) == {"ant/deep/a.png": "ant"}


def test_excluded_classes(tmp_path: Path) -> None:
    """Classes can be left out; the split of the others stays, and a name that is not there is an error."""
    for name in ("ant", "bee", "cat"):
        for index in range(12):
            write(tmp_path / name / f"{index}.png", noise(index))
    whole, part = ImageFolder(tmp_path, 8), ImageFolder(tmp_path, 8, exclude=("bee",))
    assert part.classes == ["ant", "cat"] and len(part) == 24
    held = {whole.relative(int(i)) for i in whole.val}
    assert {part.relative(int(i)) for i in part.val} == {name for name in held if not name.startswith("bee")}
    with pytest.raises(DataError, match=r"exclude names bees, which .* lacks; its classes are ant, bee, cat"):
        ImageFolder(tmp_path, 8, exclude=("bees",))
    with pytest.raises(DataError, match="labels names bee, which"):
        ImageFolder(tmp_path, 8, exclude=("bee",), labels={"insects": ["ant", "bee"]})


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_list_with_classes(start: str, flat: Path, tmp_path: Path) -> None:
    """A list names the images, near or far, and their classes; labels join classes as they join sub-folders."""
    far = write(tmp_path / "far" / "é.png", noise(7))
    path = flat / "few.tsv"
    path.write_text(f"{start}# path, class\n0.png\tant\n\n2.png\tbee \n{far}\tant\n", encoding="utf-8")
    folder = ImageFolder(path, 8)
    assert names(folder) == {"0.png": "ant", far.as_posix(): "ant", "2.png": "bee"} and folder.classes == ["ant", "bee"]
    joined = ImageFolder(path, 8, labels={"insects": ["*"]})
    assert joined.classes == ["insects"] and len(joined) == 3
    assert np.array_equal(joined.pixels(joined.paths.index(far)), np.asarray(noise(7)))


def test_list_without_classes(flat: Path) -> None:
    """A list of paths alone is like a flat folder of them; a path that leads nowhere is counted, not fatal."""
    (flat / "few.txt").write_text("0.png\r\n1.png\r\nnowhere.png\r\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"1 unreadable image\(s\) left out: .*nowhere\.png"):
        folder = ImageFolder(flat / "few.txt", 8)
    assert names(folder) == {"0.png": "", "1.png": ""}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "names no image"),
        (b"# nothing\n\n", "names no image"),
        (b"0.png\tant\n1.png\n", r"none behind '1\.png'"),
        (b"0.png\n0.png\n", r"names .*0\.png more than once"),
        (b"\xff\xfe0", "cannot be read"),
        (b"a\0b.png\n", "no readable image among 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:1 unreadable")
def test_wrong_lists(data: bytes, words: str, flat: Path) -> None:
    """A list that cannot be meant is refused with the line."""
    (flat / "few.txt").write_bytes(data)
    with pytest.raises(DataError, match=words):
        ImageFolder(flat / "few.txt", 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are POSIX's")
def test_pipes_do_not_block(flat: Path) -> None:
    """A pipe under an image's name is left out like a broken file, and one under a list's name is refused: neither
    waits for a writer."""
    os.mkfifo(flat / "pipe.png")
    with pytest.warns(UserWarning, match=r"1 unreadable image\(s\) left out: .*pipe\.png"):
        assert len(ImageFolder(flat, 8)) == 3
    os.mkfifo(flat / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt cannot be read: it is not a regular file"):
        ImageFolder(flat / "pipe.txt", 8)


def test_training_sees_what_the_engine_sees(tmp_path: Path) -> None:
    """One decoder for both: deep, CMYK, transparent, turned, animated and tall pictures are the same to the byte."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    exif = Image.Exif()
    exif[0x0112] = 5
    pictures: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "deep.png": (Image.fromarray(ramp.astype(np.uint16) * 257), {}),
        "cmyk.tif": (noise(1).convert("CMYK"), {}),
        "clear.webp": (Image.merge("RGBA", [*noise(2).split(), Image.fromarray(ramp)]), {"lossless": True}),
        "turned.png": (noise(3), {"exif": exif}),
        "film.gif": (noise(4), {"save_all": True, "append_images": [noise(5)]}),
        "tall.jpg": (noise(6, 8, 31), {}),
    }
    for name, (image, options) in pictures.items():
        write(tmp_path / name, image, **options)
    folder = ImageFolder(tmp_path, 6)
    assert {folder.relative(i) for i in range(len(folder))} == set(pictures)
    for index, path in enumerate(folder.paths):
        assert np.array_equal(to_float(folder.pixels(index)[None])[0].numpy(), to_array(path, 6)), path.name
