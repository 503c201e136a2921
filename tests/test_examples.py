"""The scripts in examples/ are what people copy: each runs as it stands, on a bundled demo, and makes what it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvq_rt import load_codes
from dvq_rt.manifest import DEMOS

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURE = EXAMPLES.parent / "docs" / "samples.png"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a script with arguments in an empty folder; returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_sample_grid(example) -> None:  # type: ignore[no-untyped-def]
    """Protects the grid: one row per label, one column per image, 128 px and a gap of 2."""
    example("sample_grid", "--labels", "faces,hearts", "--n", 1, "--out", "grid.png")
    assert Image.open("grid.png").size == (128 + 4, 2 * 128 + 6)


def test_stream_previews(example) -> None:  # type: ignore[no-untyped-def]
    """Protects the animation, which ends with the finished image; busy machines may leave previews out."""
    printed = example("stream_previews", "--every", 16, "--out", "growing.gif")
    assert "100% of the codes (the finished image)" in printed
    with Image.open("growing.gif") as film:
        assert film.format == "GIF" and film.size == (256, 256)


@pytest.mark.parametrize("engine", DEMOS)
def test_encode_decode(example, engine: str) -> None:  # type: ignore[no-untyped-def]
    """Protects coding, the file of codes and the overlay of both families."""
    printed = example("encode_decode", PICTURE, PICTURE, "--engine", engine, "--codes", "c.npz", "--out", "c.png")
    first, second = load_codes("c.npz")
    assert first == second and printed.count(f"{first.length} codes") == 2
    picture = np.asarray(Image.open("c.png"))
    assert not np.array_equal(picture[2:258, 2:258], picture[260:516, 2:258])  # reconstruction, cells over it


def test_compare_labels(example) -> None:  # type: ignore[no-untyped-def]
    """Protects scoring under every label: a drawn heart is most likely as a heart."""
    assert example("compare_labels", "--label", "hearts", "--n", 1).startswith("image 0: hearts (")


def test_bulk(example) -> None:  # type: ignore[no-untyped-def]
    """Protects drawing in parts: files go by the images' numbers, and an image is the same in whatever part it is."""
    example("bulk", "--n", 3, "--part", 2, "--out", "images")
    example("bulk", "--first", 2, "--n", 1, "--out", "alone")
    images = {path.name: path.read_bytes() for path in Path("images").iterdir()}
    assert sorted(images) == ["00000.png", "00001.png", "00002.png"] and len(set(images.values())) == 3
    assert Path("alone/00002.png").read_bytes() == images["00002.png"]


def test_threads(example) -> None:  # type: ignore[no-untyped-def]
    """Protects shared use: the script itself compares an image with the one that is drawn alone."""
    assert example("threads", "--n", 3, "--out", "threads.png") == "threads.png\n"


def test_edit_regions(example) -> None:  # type: ignore[no-untyped-def]
    """Protects editing of a bundled demo: three regions, and of MQ the lower half follows the model's own law."""
    printed = example("edit_regions", "--engine", "demo:mq", "--n", 1, "--out", "edits.png")
    assert "lower half: drawn from the law of prefix" in printed and "centre: drawn from the law of given" in printed
    assert Image.open("edits.png").size == (3 * 130 + 2, 3 * 130 + 2)


def test_async_calls(example) -> None:  # type: ignore[no-untyped-def]
    """Protects asynchronous use: the stream ends with all codes, and three calls make a picture."""
    assert "100% of the codes" in example("async_calls", "--n", 3, "--out", "async.png")
    assert Image.open("async.png").size == (2 * 130 + 2, 2 * 130 + 2)


def test_every_example_is_tested_and_short() -> None:
    """Protects the promise of the folder: nothing there goes untested, and each script is read at a glance."""
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) >= 6
    for script in scripts:
        assert f'"{script.stem}"' in Path(__file__).read_text(encoding="utf-8"), f"{script.name} has no test"
        assert len(script.read_text(encoding="utf-8").splitlines()) < 30
