"""The command line, with a stand-in for the generator."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from dvq_rt.__main__ import main, pick_labels, psnr, table
from dvq_rt.codes import Codes
from dvq_rt.images import grid
from dvq_rt.layout import TokenLayout
from dvq_rt.manifest import Manifest, write_engine
from dvq_rt.sampling import SamplingParams
from runtimes.errors import EngineError, InputError

MADE = Manifest(
    layout=TokenLayout(codebook_size=16, sides=(2, 4), classes=3, null_label=True),
    image_size=32,
    slots=4,
    step={"inputs": [], "outputs": [], "caches": []},
    precision="fp32",
    weights="fp16",
    tools={"torch": "2.13.0"},
    class_names=("cat", "dog", "7"),
    defaults={"temperature": 0.9, "top_k": 5},
    tolerances={"logits": 1.25e-5},
    parameters={"transformer": 1234567},
)


class FakeSamples:
    def __init__(self, n: int) -> None:
        self.pictures = np.zeros((n, 32, 32, 3), dtype=np.uint8)

    def grid(self, columns: int | None = None) -> Image.Image:
        return grid(self.pictures, columns, 0)

    def save(self, folder: Path) -> None:
        for i, picture in enumerate(self.pictures):
            Image.fromarray(picture).save(Path(folder) / f"{i}.png")


class FakeGenerator:
    """Records what it was asked; ``failure`` is raised instead of sampling, ``checks`` returned by verify."""

    calls: ClassVar[list[tuple[str, dict]]] = []
    failure: BaseException | None = None
    checks: ClassVar[list[SimpleNamespace]] = []

    def __init__(self, engine_dir=None, **options) -> None:
        self.calls.append(("open", {"engine": engine_dir, **options}))
        self.manifest, self.class_names = MADE, MADE.class_names

    def sample(self, progress=None, **options) -> FakeSamples:
        self.calls.append(("sample", options))
        if self.failure:
            raise self.failure
        assert isinstance(progress, bool)
        return FakeSamples(options["n"])

    def encode(self, images) -> list[Codes]:
        return [Codes(np.zeros((4, 4), int), np.array([[0, 1], [0, 0]]), MADE.layout) for _ in images]

    def decode(self, codes) -> np.ndarray:
        return np.full((len(codes), 32, 32, 3), 100, dtype=np.uint8)

    def verify(self) -> list[SimpleNamespace]:
        return self.checks


@pytest.fixture
def fake(monkeypatch, tmp_path):
    module = ModuleType("dvq_rt.generator")
    module.Generator = FakeGenerator
    monkeypatch.setitem(sys.modules, "dvq_rt.generator", module)
    monkeypatch.setattr(FakeGenerator, "calls", [])
    monkeypatch.setattr(FakeGenerator, "failure", None)
    monkeypatch.chdir(tmp_path)
    return FakeGenerator


def test_sample_defaults(fake, capsys):
    """With no options the demo gives a row of six pictures for every label, with the engine's own parameters."""
    assert main(["sample"]) == 0
    (_, opened), (_, asked) = fake.calls
    assert opened == {"engine": None, "device": None, "slots": None, "threads": None}
    assert asked["n"] == 18 and asked["seed"] == 0
    assert asked["params"] == SamplingParams(temperature=0.9, top_k=5)
    assert asked["labels"] == [0] * 6 + [1] * 6 + [2] * 6
    assert capsys.readouterr().out.splitlines()[-1] == "samples.png"
    assert Image.open("samples.png").size == (192, 96)  # six columns of 32, three rows
    assert [p.name for p in Path().iterdir()] == ["samples.png"]


def test_sample_options_reach_the_generator(fake):
    """Each option overrides the engine's own value and arrives under its name."""
    text = (
        "sample --engine E --n 4 --labels dog,0 --seed 9 --temperature 0.5 --top-k none --top-p 0.8 --columns 4 "
        "--top-k-position 3 --top-p-position 0.7 --guidance 2 --positions drawn --slots 2 --threads 1 "
        "--device cuda --out a.webp"
    )
    assert main(text.split()) == 0
    (_, opened), (_, asked) = fake.calls
    assert opened == {"engine": "E", "device": "cuda", "slots": 2, "threads": 1}
    assert asked == {
        "n": 4,
        "labels": ["dog", "dog", 0, 0],
        "seed": 9,
        "params": SamplingParams(0.5, None, 0.8, 3, 0.7, 2.0, "drawn"),
    }
    assert Image.open("a.webp").size == (128, 32)


@pytest.mark.parametrize("prepare", [True, False])
def test_sample_into_a_folder(fake, capsys, prepare):
    """A folder, there already or named with a slash, gets the grid and every picture."""
    if prepare:
        Path("made").mkdir()
    assert main(["sample", "--n", "3", "--out", "made" if prepare else "made/"]) == 0
    assert sorted(p.name for p in Path("made").iterdir()) == ["0.png", "1.png", "2.png", "grid.png"]
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("made/grid.png"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "0"], "--n is 0"),
        (["--columns", "0"], "--columns is 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", "0"], "top_k is 0"),
        (["--out", "absent/a.png"], "cannot write --out absent/a.png: No such file"),
        (["--out", "a.txt"], "end it with one of .png"),
        (["--out", "/dev/null"], "end it with"),
        (["--out", "file/"], "cannot write --out file/: Not a directory"),
        (["--out", "fifo.png"], "not a regular file"),
        (["--out", "x" * 300 + ".png"], "File name too long"),
        (["--out", "x" * 300 + "/"], "File name too long"),
    ],
)
def test_bad_options_stop_before_any_work(fake, capsys, arguments, words):
    """What cannot work is said before the engine is even opened, and nothing is written."""
    Path("file").write_text("")
    os.mkfifo("fifo.png")
    assert main(["sample", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err and not captured.out
    assert not fake.calls
    assert sorted(p.name for p in Path().iterdir()) == ["fifo.png", "file"]


def test_failures_while_sampling(fake, capsys, monkeypatch):
    """Our errors are one line and status 2, Ctrl-C is 130, other bugs keep their traceback; no file is left."""
    monkeypatch.setattr(fake, "failure", EngineError("no such thing; mend it"))
    assert main(["sample", "--out", "new/"]) == 2
    assert capsys.readouterr().err == "error: no such thing; mend it\n"
    monkeypatch.setattr(fake, "failure", KeyboardInterrupt())
    assert main(["sample"]) == 130
    monkeypatch.setattr(fake, "failure", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["sample"])
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["sample", "--n", "x"], ["sample", "--temp", "1"], ["reconstruct"]]
)
def test_bad_use_exits_2(fake, arguments):
    """Unknown commands and options are refused by the parser."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_labels():
    """Labels are shared out evenly and in order; names win over indices, also names with commas or digits."""
    names = ("cat", "a,b", "7")
    assert pick_labels(None, 4, (), 0) is None
    assert pick_labels(None, 2, names, 4) == [0, 2]
    assert pick_labels("7, 1 ,cat", 3, names, 3) == ["7", 1, "cat"]
    assert pick_labels("a,b", 2, names, 3) == ["a,b", "a,b"]
    assert pick_labels("-1", 1, names, 3) == [-1]
    with pytest.raises(InputError, match="names 3 labels, but --n is 2"):
        pick_labels("0,1,2", 2, names, 3)


def test_reconstruct(fake, capsys):
    """Each picture gets its code length and PSNR, and the sheet shows all three rows."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32), (100, 100, 110)).save(name)
    assert main(["reconstruct", "a.png", "b.png", "--out", "r.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a.png: 7 of 16 codes, 0.031 bits per pixel, PSNR 32.90 dB"
    assert lines[1].startswith("b.png:") and lines[2:] == ["r.png"]
    assert Image.open("r.png").size == (2 * 258 + 2, 3 * 258 + 2)
    assert main(["reconstruct", *["a.png"] * 9, "--out", "r.png"]) == 0
    assert Image.open("r.png").size == (8 * 258 + 2, 6 * 258 + 2)
    assert main(["reconstruct", "c.png"]) == 2
    assert "c.png does not exist" in capsys.readouterr().err and not Path("reconstructions.png").exists()


def test_inspect(tmp_path, capsys):
    """The summary needs no backend and shows what a user asks of a folder; a broken folder is one line."""

    def build(folder: Path) -> Manifest:
        (folder / "step.onnx").write_bytes(b"x" * 1500)
        return MADE

    write_engine(tmp_path / "engine", build)
    assert main(["inspect", str(tmp_path / "engine")]) == 0
    text = capsys.readouterr().out
    for part in (
        "2 x 2, 4 x 4",
        "32 x 32 pixels",
        "fp16",
        "1 dog",
        "temperature",
        "1,234,567",
        "1.25e-05",
        "1,500 bytes",
    ):
        assert part in text
    assert main(["inspect", str(tmp_path)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err


def test_verify(fake, capsys, monkeypatch):
    """The table lists every check, and a failed one gives exit status 1."""
    good = SimpleNamespace(name="step logits", measured=1.5e-6, bound=2e-4, ok=True)
    monkeypatch.setattr(fake, "checks", [good])
    assert main(["verify", "E", "--threads", "2"]) == 0
    assert fake.calls == [("open", {"engine": "E", "device": None, "slots": None, "threads": 2})]
    assert capsys.readouterr().out.splitlines() == [
        "check        measured  bound   result",
        "step logits  1.5e-06   0.0002  ok",
        "all 1 passed",
    ]
    bad = SimpleNamespace(name="hash", measured=float("nan"), bound=0.0, ok=False)
    monkeypatch.setattr(fake, "checks", [good, bad])
    assert main(["verify"]) == 1
    assert "1 of 2 checks failed: hash" in capsys.readouterr().out


def test_small_texts():
    """PSNR is the textbook one, and tables line up."""
    black = np.zeros((2, 2, 3), dtype=np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 255) == 0
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"
