"""training/tokenize.py: codes on the disk are the same whoever writes them, go on where they stopped, and are refused
for another tokenizer, data set or augmentation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import TOKENIZER
from test_data import noise, write

from runtimes.errors import DataError
from training import tokenize
from training.checkpoint import Model, save_checkpoint
from training.data.codes import Codes, Tokenization, check, open_codes
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.data.stream import Augment, batches
from training.models.dqvae import DQVAE

SETTINGS = {
    "training": {"shift": 2, "flip": True},
    "stage": {"copies": 2, "val_fraction": 0.1, "defaults": {}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, 50 pictures of two classes with captions, and a configuration."""
    place = tmp_path_factory.mktemp("tokenize")
    torch.manual_seed(0)
    save_checkpoint(Model(DQVAE(TOKENIZER).eval()), place / "tokenizer")
    torch.manual_seed(1)
    save_checkpoint(Model(DQVAE(TOKENIZER).eval()), place / "other")
    for number in range(50):
        write(place / "set" / ("ant", "bee")[number % 2] / f"{number:02}.png", noise(number, 16, 16))
    captions = {"ant/00.png": ["an ant", "Ameise"], "bee/01.png": "a bee"}
    (place / "set" / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    (place / "two.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    return place


def run(place: Path, out: str, *options: str, tokenizer: str = "tokenizer") -> Path:
    fixed = ["--tokenizer", str(place / tokenizer), "--config", str(place / "two.json"), "--shard-size", "32"]
    tokenize.main([str(place / "set"), "--out", str(place / out), *fixed, *options])
    return place / out


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return run(place, "whole")


def work(place: Path, tokenizer: str = "tokenizer", copies: int = 2) -> Tokenization:
    from training.checkpoint import load_tokenizer

    folder = ImageFolder(place / "set", 16, val_fraction=0.1)
    vae = load_tokenizer(place / tokenizer)
    return Tokenization(vae, folder, copies, 1, Augment(2, True), 32)


def test_rows_are_the_codes_of_the_stream(place: Path, whole: Path) -> None:
    """Row i is the code of the i-th image of the stream of augmented copies, with its label, index and captions."""
    given = work(place)
    train, val = open_codes(whole, replace(given, shard_size=64))  # the folder knows its own
    assert len(train) == 2 * len(given.folder.train) and val.images.tolist() == given.folder.val.tolist()
    row = 0
    stream = batches(given.folder, given.folder.train, 32, seed=1, augment=given.augment, indexed=True)
    for images, indices in stream:
        codes, grain = given.tokenizer.encode_maps(to_float(images))
        for code, cells, index in zip(codes.numpy(), grain.numpy(), indices, strict=True):
            if row < len(train):
                assert np.array_equal(train.codes[row], code) and np.array_equal(train.grain[row], cells)
                assert train.images[row] == index and train.labels[row] == given.folder.labels[index]
                assert train.captions(row) == given.folder.captions(int(index))
                row += 1
        if row == len(train):
            break
    assert {train.captions(i) for i in range(len(train))} >= {(), ("an ant", "Ameise"), ("a bee",)}


def test_any_processes_write_the_same_bytes(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two worker processes, and two processes of torchrun one after the other, write what one process writes; the
    codes of one of the two alone are refused with the way to go on."""
    assert content(run(place, "workers", "--workers", "2")) == content(whole)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        out = run(place, "shared")
        if rank == "1":
            with pytest.raises(
                DataError, match=r"shared lacks 2 of 3 parts \(train-00000.* run training.tokenize again"
            ):
                Codes(out, work(place), "train")
    assert content(out) == content(whole)


def test_killed_command_goes_on(place: Path, whole: Path) -> None:
    """Parts that are there are left as they are, what is lacking comes in, and what a killed process left half is no
    part."""
    out = run(place, "again")
    (out / "train-00001.safetensors").unlink()
    (out / ".train-00001.safetensors.dvq-tmp").write_bytes(b"half")
    kept = (out / "train-00000.safetensors").stat().st_mtime_ns
    run(place, "again")
    assert content(out) == content(whole)
    assert (out / "train-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--copies", "3"], "copies 2 there and 3 now"),
        (["--set", "training.shift=1"], "augment"),
        (["--set", 'stage.labels={"bee": ["bee"], "ant": ["ant"]}'], "classes"),
        (["--set", "training.seed=5"], "held-out images"),
        (["--shard-size", "20"], "the shard size is 20; it must be a multiple of 32"),
        (["--workers", "-1"], "--workers is -1; choose 0 or more"),
        (["--ray"], "--workers is 0; choose 1 or more"),
    ],
)
def test_other_settings_are_refused(
    options: list[str], words: str, place: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of codes takes no codes of another kind: the error names both, and the folder stays."""
    before = content(whole)
    with pytest.raises(SystemExit):
        run(place, "whole", *options)
    assert words in capsys.readouterr().err and content(whole) == before


def test_other_tokenizers_and_images_are_refused(place: Path, whole: Path) -> None:
    """Neither the codes of another tokenizer nor those of other images are read, and damaged ones are named."""
    with pytest.raises(DataError, match=r"tokenizer [0-9a-f]{12} there and [0-9a-f]{12} now"):
        check(whole, work(place, "other"))
    other = place / "set" / "ant" / "99.png"
    write(other, noise(99, 16, 16))
    with pytest.raises(DataError, match=r"images of .*set [0-9a-f]{12} there and [0-9a-f]{12} now"):
        check(whole, work(place))
    other.unlink()
    changed = place / "set" / "ant" / "00.png"
    before = changed.read_bytes()
    write(changed, Image.new("RGB", (16, 16)))
    with pytest.raises(DataError, match=r"sizes of the image files of .*set [0-9a-f]{12} there and [0-9a-f]{12} now"):
        check(whole, work(place))
    changed.write_bytes(before)
    with pytest.raises(DataError, match="holds no codes"):
        check(place / "set", work(place))
    part = run(place, "cut") / "val-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*val-00000.* remove it and run training.tokenize again"):
        Codes(part.parent, work(place), "val")
