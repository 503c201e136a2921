"""What a user can get wrong: each is a DvqError that names the thing and the way out, and nothing is written."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import png_header

from dvq_rt.__main__ import main
from dvq_rt.codes import Codes
from dvq_rt.decoding import DecodeLoop
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout
from dvq_rt.manifest import MANIFEST, manifest_digest
from dvq_rt.sampling import SamplingParams
from runtimes.errors import CheckpointError, DvqError, EngineError, InputError
from training.checkpoint import Model, TrainingState, load_checkpoint, load_training_state, save_checkpoint


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


# --- calls -----------------------------------------------------------------------------------------------------
CALLS: dict[str, tuple[Callable[[Generator], Any], str]] = {
    "unknown name": (
        lambda g: g.sample(labels="emu"),
        r"unknown label 'emu'; this model has ant, bee, cat \(or 0 to 2",
    ),
    "index too high": (lambda g: g.sample(labels=3), "unknown label 3; this model has ant, bee, cat"),
    "negative index": (lambda g: g.sample(labels=[0, -1]), "unknown label -1; this model has ant"),
    "float label": (lambda g: g.sample(labels=1.0), r"unknown label 1\.0; this model has ant"),
    "truth as label": (lambda g: g.sample(labels=True), "unknown label True; this model has ant"),
    "too few labels": (lambda g: g.sample(3, labels=[0, 1]), "2 labels for 3 images; give one label, or one per image"),
    "no labels": (lambda g: g.sample(labels=[]), "labels is empty; give one label, or one per image"),
    "n zero": (lambda g: g.sample(0), "n is 0; it must be an integer from 1"),
    "n negative": (lambda g: g.sample(-4), "n is -4; it must be an integer from 1"),
    "n fraction": (lambda g: g.sample(1.5), r"n is 1\.5; it must be an integer from 1"),
    "temperature zero": (lambda g: g.sample(params=SamplingParams(temperature=0)), "temperature is 0; it must be"),
    "temperature NaN": (lambda g: g.sample(params=SamplingParams(temperature=math.nan)), "temperature is nan; it must"),
    "top_k zero": (lambda g: g.sample(params=SamplingParams(top_k=0)), "top_k is 0; it must be an integer from 1"),
    "top_p zero": (lambda g: g.sample(params=SamplingParams(top_p=0.0)), r"top_p is 0\.0; it must be .* in \(0, 1\]"),
    "top_p above 1": (lambda g: g.sample(params=SamplingParams(top_p=1.1)), r"top_p is 1\.1; it must be"),
    "plain dict": (lambda g: g.sample(params={"top_k": 3}), "params is a dict; it must be a SamplingParams"),
    "seed": (lambda g: g.sample(seed=-1), "seed is -1; it must be an integer from 0"),
    "every": (lambda g: g.stream(every=0), "every is 0; it must be an integer from 1"),
    "stream label": (lambda g: g.stream(labels="emu"), "unknown label 'emu'; this model has ant"),
    "score label": (lambda g: g.score(g.sample().codes, "emu"), "unknown label 'emu'; this model has ant"),
    "n huge": (lambda g: g.sample(10**30), r"n is 1000.*; it must be an integer from 1 to"),
    "n none of a number": (lambda g: g.sample(np.float32(2)), r"n is np\.float32\(2\.0\); it must be an integer"),
    "n true": (lambda g: g.sample(np.bool_(True)), "n is np.True_; it must be an integer"),
    "bytes as label": (lambda g: g.sample(labels=b"ant"), "unknown label b'ant'; this model has ant"),
    "bytes among labels": (lambda g: g.sample(labels=["ant", b"bee"]), "unknown label b'bee'"),
    "surrogate as label": (lambda g: g.sample(labels="\udcff"), "unknown label"),
    "matrix as labels": (lambda g: g.sample(labels=np.zeros((2, 2), int)), "unknown label array"),
    "object as label": (lambda g: g.sample(labels=object()), "unknown label <object object at"),
    "seed text": (lambda g: g.sample(seed="1"), "seed is '1'; it must be an integer from 0"),
    "seed huge": (lambda g: g.sample(seed=2**64), "seed is 18446744073709551616"),
    "first": (lambda g: g.sample(first=-1), "first is -1; it must be an integer from 0"),
    "on_token": (lambda g: g.sample(on_token=3), "on_token is 3; it must be a function"),
    "progress": (lambda g: g.sample(progress="bar"), "progress is 'bar'; it must be True, False, None or a function"),
    "progress array": (lambda g: g.sample(progress=np.zeros(2)), r"progress is array\(.*it must be True, False, None"),
    "codes none": (lambda g: g.decode(None), "got a NoneType; codes come from encode"),
    "codes path": (lambda g: g.score("codes.npz"), "got a str; codes come from encode, sample or load_codes"),
    "path with NUL": (lambda g: g.encode("a\0b.png"), "image"),
    "image none": (lambda g: g.encode(None), "the image is a NoneType"),
    "image mode": (lambda g: g.encode(Image.new("La", (9, 9))), r"mode La .*convert it .*convert\('RGB'\)"),
    "image path": (lambda g: g.encode("nowhere.png"), r"nowhere\.png does not exist"),
    "image size": (lambda g: g.encode("../huge.png"), r"huge\.png is 20000 x 20000 pixels.*scale it down first"),
    "image type": (lambda g: g.reconstruct([3]), "the image is a int; give a path"),
    "other codes": (
        lambda g: g.decode(Codes(np.zeros((4, 4), int), np.zeros((2, 2), int), TokenLayout(16, (2, 4)))),
        r"the codes have a codebook of 16 .* this model has a codebook of 32 and grids \(4, 8\)",
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(name: str, generator: Generator, clean: Path) -> None:
    """A wrong argument of any call stops it at once, and the generator still draws what it drew before."""
    (clean.parent / "huge.png").write_bytes(png_header(20_000, 20_000))
    call, words = CALLS[name]
    before = generator.sample(1, "ant").codes
    with pytest.raises(InputError, match=words):
        call(generator)
    assert generator.sample(1, "ant").codes == before
    assert not list(clean.iterdir())


def test_labels_of_a_model_without(plain_generator: Generator, class_engine: Path) -> None:
    """An unconditional model takes no label and no guidance; guidance needs room for the second slot."""
    with pytest.raises(InputError, match="label is 'ant', but this model has no labels; leave it out"):
        plain_generator.sample(labels="ant")
    with pytest.raises(InputError, match=r"guidance is 2\.0, .* without a null label; use guidance=1"):
        plain_generator.sample(params=SamplingParams(guidance=2))
    alone = Generator(class_engine, slots=1, threads=1)
    for call in (alone.sample, alone.stream):
        with pytest.raises(InputError, match=r"guidance takes two slots an image.*use 2 or more"):
            call(params=SamplingParams(guidance=2))
    assert len(alone.sample(3, params=SamplingParams())) == 3
    assert all(check.ok for check in alone.verify())


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, "4", 10**9])
def test_bad_slots(slots: Any, class_engine: Path) -> None:
    """A number of slots that is none is refused before anything is loaded."""
    with pytest.raises(InputError, match=rf"slots is {slots!r}; it must be an integer from 1 to 4096"):
        Generator(class_engine, slots=slots)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "emu"], "unknown label 'emu'; this model has ant, bee, cat"),
        (["--labels", "0,1", "--n", "1"], "names 2 labels, but --n is 1"),
        (["--guidance", "2", "--slots", "1"], "guidance takes two slots"),
        (["--slots", "0"], "slots is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--engine", "nowhere"], "engine folder nowhere does not exist; name none to use the bundled demo"),
        (["--device", "cuda"], "was exported for the CPU; export it again with --target cuda"),
        (["--device", "tpu"], "device is 'tpu'; it must be 'cpu', 'cuda' (the first GPU) or 'cuda:N', N from 0"),
    ],
)
def test_bad_commands(
    arguments: list[str], words: str, class_engine: Path, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line says the same in one line, exits with 2 and leaves no picture, also in a folder of its own."""
    for out in ("a.png", "made/"):
        assert main(["sample", "--engine", str(class_engine), "--n", "2", *arguments, "--out", out]) == 2
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("error: ") and words in captured.err and not captured.out
    assert not list(clean.iterdir())


# --- engine folders --------------------------------------------------------------------------------------------
def test_flipped_bytes(class_engine: Path, tmp_path: Path) -> None:
    """One changed byte anywhere in a real engine keeps it from opening, by the file's name; mended, it opens."""
    engine = tmp_path / "engine"
    shutil.copytree(class_engine, engine)
    names = sorted(p.name for p in engine.iterdir())
    assert names == ["decoder.onnx", "encoder.onnx", "golden.safetensors", "manifest.json", "step.onnx"]
    for name in names:
        data = (engine / name).read_bytes()
        for place in (len(data) // 3, len(data) // 2):
            (engine / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(EngineError, match=rf"{engine}: {name} .*export it again .*or copy the folder anew"):
                Generator(engine)
        (engine / name).write_bytes(data)
    assert Generator(engine, threads=1).sample().codes == Generator(class_engine, threads=1).sample().codes


def test_missing_files(class_engine: Path, tmp_path: Path) -> None:
    """A folder that lacks one of its files does not open."""
    for path in class_engine.iterdir():
        engine = tmp_path / f"without {path.stem}"
        shutil.copytree(class_engine, engine)
        (engine / path.name).unlink()
        with pytest.raises(EngineError, match=rf"{path.name} is missing .*; export it again"):
            Generator(engine)
    with pytest.raises(EngineError, match="nowhere does not exist"):
        Generator(tmp_path / "nowhere")


def test_newer_schema(class_engine: Path, tmp_path: Path) -> None:
    """An engine of a later version asks for an upgrade."""
    shutil.copytree(class_engine, tmp_path / "engine")
    values = json.loads((tmp_path / "engine" / MANIFEST).read_text())
    del values["sha256"]
    values["schema"] += 1
    (tmp_path / "engine" / MANIFEST).write_text(json.dumps({**values, "sha256": manifest_digest(values)}))
    with pytest.raises(EngineError, match=r"schema 4, this dvq-rt reads 3; upgrade dvq-rt \(`pip install -U dvq-rt`\)"):
        Generator(tmp_path / "engine")


def test_engine_that_leaves_out_the_end(class_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step graph that never reports an image as done is called broken, instead of running for ever."""
    read = DecodeLoop.read
    monkeypatch.setattr(
        DecodeLoop, "read", lambda loop, name: np.zeros(loop.slots, bool) if name == "done" else read(loop, name)
    )
    with pytest.raises(EngineError, match=r"image 0 did not end after .* the engine is broken"):
        Generator(class_engine, threads=1).sample(params=SamplingParams())


# --- checkpoint folders ----------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(class_model: Model, tmp_path: Path) -> Path:
    """A whole checkpoint with a training state."""
    save_checkpoint(class_model, tmp_path / "saved", TrainingState(3, {"best": math.inf}, {"0.step": torch.ones(1)}))
    return tmp_path / "saved"


def test_checkpoint_round_trip(checkpoint: Path, class_model: Model) -> None:
    """All tensors, sizes, names and defaults come back, and the training state beside them."""
    loaded = load_checkpoint(checkpoint)
    assert loaded.config() == class_model.config() and not loaded.training
    ours, theirs = class_model.state_dict(), loaded.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = load_training_state(checkpoint)
    assert (state.step, state.values, list(state.tensors)) == (3, {"best": math.inf}, ["0.step"])
    assert [p.name for p in checkpoint.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 1}, "has format 1, family 'dq'; this version reads format 2"),
        ({"family": "vq"}, "family 'vq'; this version reads"),
        ({"extra": 1}, r"unknown keys \['extra'\], missing keys \[\]"),
        ({"defaults": None}, r"unknown keys \[\], missing keys \['defaults'\]"),
        ({"tokenizer.chanels": 16}, r"tokenizer: unknown keys \['chanels'\], missing keys \[\]"),
        ({"tokenizer.channels": None}, r"tokenizer: unknown keys \[\], missing keys \['channels'\]"),
        ({"tokenizer.channels": "many"}, "config.json is wrong"),
        ({"tokenizer.image_size": 18}, "tokenizer.image_size is 18; it must be a multiple of 4"),
        ({"transformer.depth": 3}, r"transformer: unknown keys \['depth'\]"),
        ({"transformer.heads": 5}, r"transformer.width is 32; it must be a multiple of heads \(5\)"),
        ({"layout.sides": [8, 4]}, "layout.sides is"),
        ({"layout.codebook_size": 31}, r"does not fit its config: .*wrong shape .*content_emb"),
    ],
)
def test_wrong_checkpoint_config(changes: dict[str, Any], words: str, checkpoint: Path) -> None:
    """A configuration with a key too many, too few or out of range is refused by the key's name."""
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *section, name = key.split(".")
        target = values[section[0]] if section else values
        if value is None:
            del target[name]
        else:
            target[name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(checkpoint)


def test_wrong_checkpoint_tensors(checkpoint: Path) -> None:
    """Tensors that are missing, unknown or of another shape are all listed by name, and none is loaded."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["transformer.index_emb"]
    tensors["transformer.extra"] = torch.zeros(1)
    tensors["tokenizer.quantizer.codebook"] = torch.zeros(32, 7)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    for words in (
        "missing ['transformer.index_emb']",
        "unknown ['transformer.extra']",
        "tokenizer.quantizer.codebook (32, 7) instead of (32, 8)",
        str(checkpoint / "model.safetensors"),
    ):
        assert words in str(caught.value)


def test_damaged_checkpoints(checkpoint: Path) -> None:
    """Missing and cut files are named; a folder without training state cannot be resumed, but it can be read."""
    with pytest.raises(CheckpointError, match=r"nowhere is no checkpoint folder: it has no config\.json"):
        load_checkpoint(checkpoint.parent / "nowhere")
    for name, load in (("training.safetensors", load_training_state), ("model.safetensors", load_checkpoint)):
        data = (checkpoint / name).read_bytes()
        for damaged in (data[: len(data) // 2], data[:4], b""):
            (checkpoint / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"saved/{name} cannot be read"):
                load(checkpoint)
        (checkpoint / name).unlink()
        with pytest.raises(CheckpointError, match=rf"saved/{name} cannot be read"):
            load(checkpoint)
    for text in ("{", "[1]", '"text"', ""):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_checkpoint(checkpoint)


def test_stage_one_has_no_layout(class_model: Model) -> None:
    """Asking a stage-1 checkpoint for tokens says which command comes first."""
    with pytest.raises(CheckpointError, match=r"stage 1 only; train stage 2 with training\.train_transformer"):
        _ = Model(class_model.tokenizer).layout


def test_one_family(class_engine: Path) -> None:
    """A caller catches everything that dvq-rt raises on purpose with one name, or as the builtin it refines."""
    for name in ("BackendError", "CheckpointError", "ConfigError", "DataError", "EngineError", "ExportError"):
        assert issubclass(getattr(__import__("dvq_rt"), name), DvqError)
    assert issubclass(InputError, ValueError)
