"""training/checkpoint.py: what a checkpoint folder may hold before any of it is believed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import masked_model, small_model

from runtimes.errors import CheckpointError, ConfigError
from training.checkpoint import (
    Model,
    TrainingState,
    load_checkpoint,
    load_strictly,
    load_training_state,
    new_module,
    save_checkpoint,
)
from training.models.dqvae import DQVAEConfig
from training.models.mqvae import MQVAEConfig
from training.models.transformer import TransformerConfig


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(small_model(("ant", "bee")), tmp_path / "saved", TrainingState(3, {}, {"0.step": torch.ones(2)}))
    return tmp_path / "saved"


def changed(checkpoint: Path, **values: Any) -> Path:
    """The checkpoint with other values in its configuration; ``section__field`` is a field of a section."""
    config = json.loads((checkpoint / "config.json").read_text())
    for key, value in values.items():
        *section, name = key.split("__")
        (config[section[0]] if section else config)[name] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def test_every_flipped_bit_is_noticed(checkpoint: Path) -> None:
    """One changed bit in the weights or in the training state keeps them from loading, wherever it lies; put back, they
    load again."""
    for name, load in (("model.safetensors", load_checkpoint), ("training.safetensors", load_training_state)):
        path = checkpoint / name
        data = path.read_bytes()
        for place in (9, len(data) // 3, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(CheckpointError, match=name):
                load(checkpoint)
        path.write_bytes(data)
        load(checkpoint)


@pytest.mark.parametrize("family", ["dq", "mq"])
def test_older_checkpoints_load(family: str, tmp_path: Path) -> None:
    """Folders of the format before, without hashes and without what models have gained since, load as they did, with
    entropy bins from -1; one of the present format without its hashes does not."""
    if family == "dq":
        save_checkpoint(small_model(("a",)), source := tmp_path / "older")
    else:
        save_checkpoint(masked_model(("a",)), source := tmp_path / "older")
    config = json.loads((source / "config.json").read_text())
    added = ("entropy_low", "grains", "router", "median", "shrink")
    config["tokenizer"] = {name: x for name, x in config["tokenizer"].items() if not name.startswith(added)}
    del config["transformer"]["given"], config["sha256"]
    (source / "config.json").write_text(json.dumps({**config, "format": 2}))
    model = load_checkpoint(source)
    assert model.family == family and (family == "mq" or model.both()[0].config.entropy_low == -1.0)
    save_checkpoint(model, tmp_path / "saved")
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert after["format"] == 3 and set(after["sha256"]) == {"model.safetensors"}
    again = load_checkpoint(tmp_path / "saved")
    weights = model.state_dict()
    assert again.config() == model.config()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its SHA-256"):
        load_checkpoint(changed(tmp_path / "saved", sha256={}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokenizer__z_channels": 1 << 19}, "does not fit its config: .*wrong shape"),
        ({"transformer__width": 1 << 20}, "does not fit its config: .*wrong shape"),
        ({"transformer__content_blocks": 1024}, "does not fit its config: missing"),
        ({"transformer__content_blocks": 10**9}, "transformer.content_blocks is 1000000000; .* 1024 at most"),
        ({"tokenizer__blocks": 10**9}, "tokenizer.blocks is 1000000000; .* at most 256"),
        ({"tokenizer__image_size": 1 << 30}, "tokenizer.image_size is 1073741824; .* at most 4096"),
        ({"tokenizer__encoder_mult": [1] * 40}, "tokenizer.encoder_mult is .* at most 16 of them"),
        ({"layout__classes": 10**12, "class_names": []}, "does not fit its config|cannot be made"),
        ({"layout__codebook_size": 10**30}, "cannot be made|does not fit"),
    ],
)
def test_sizes_are_compared_before_they_are_allocated(values: dict[str, Any], words: str, checkpoint: Path) -> None:
    """Sizes that would need terabytes, or as many modules, are refused by comparing them with the file's header."""
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(changed(checkpoint, **values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokenizer__decay": float("nan")}, "decay is nan"),
        ({"tokenizer__beta": float("inf")}, "beta is inf"),
        ({"tokenizer__entropy_low": -0.5}, "tokenizer.entropy_low is -0.5; it must be -1 or 0"),
        ({"tokenizer__dropout": "0"}, "dropout is '0'; it must be of type float"),
        ({"class_names": "ab"}, "class_names are 'ab'"),
        ({"class_names": ["a"]}, "there are 1 class_names for 2 labels"),
        ({"class_names": [1, 2]}, r"class_names are \[1, 2\]"),
        ({"defaults": []}, r"defaults \[\]; they must be"),
        ({"family": ["dq"]}, r"family \['dq'\]; this version reads"),
        ({"format": [2]}, r"has format \[2\]"),
        ({"tokenizer": [1]}, r"tokenizer is \[1\]"),
        ({"layout": None}, "config.json is wrong"),
    ],
)
def test_values_that_are_none(values: dict[str, Any], words: str, checkpoint: Path) -> None:
    """Configurations with numbers that are none, or values of another kind, are refused by the field's name."""
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(changed(checkpoint, **values))


def test_a_layout_of_another_tokenizer(tmp_path: Path) -> None:
    """A transformer whose cells are not the tokenizer's is refused, although every tensor has its shape."""
    one, other = masked_model(("ant", "bee")), masked_model(("ant", "bee"), kept=24)
    save_checkpoint(Model(one.tokenizer, other.transformer, one.class_names), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"layout\.kept is 24; the tokenizer has 25"):
        load_checkpoint(tmp_path / "saved")


def test_deep_and_odd_json(checkpoint: Path) -> None:
    """Files that exhaust a parser are errors that name them, and not a RecursionError."""
    for text in (
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"format": 3, "format": 3}',
        '{"format": 1' + "0" * 9000,
    ):
        (checkpoint / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            load_checkpoint(checkpoint)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are POSIX's")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.safetensors"])
def test_pipes_do_not_block(name: str, checkpoint: Path) -> None:
    """A pipe in place of a file is refused instead of waited for."""
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    load = load_training_state if name.startswith("training") else load_checkpoint
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is not a regular file"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((32, 8), float("nan")), "numbers that are not finite in .*codebook"),
        (torch.full((32, 8), float("-inf")), "numbers that are not finite in .*codebook"),
        (torch.zeros(32, 8, dtype=torch.complex64), "wrong number format .*codebook torch.complex64"),
        (torch.full((32, 8), 1e300, dtype=torch.float64), "numbers that are not finite in .*codebook"),
        (torch.zeros(32, 8, dtype=torch.int32), "wrong number format .*codebook torch.int32"),
    ],
)
def test_weights_that_are_no_numbers(tensor: torch.Tensor, words: str, checkpoint: Path) -> None:
    """Weights that are no finite numbers of the model's format do not load, also where nothing hashes them."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["tokenizer.quantizer.codebook"] = tensor
    save_file(tensors, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["sha256"], config["tokenizer"]["entropy_low"]
    (checkpoint / "config.json").write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(checkpoint)


def test_thresholds_may_be_lacking(tmp_path: Path) -> None:
    """A DQ-VAE whose entropy thresholds were not made yet has NaN in their place, and nowhere else."""
    model = small_model()
    vae = model.both()[0]
    vae.get_buffer("entropy_thresholds").fill_(float("nan"))
    save_checkpoint(model, tmp_path / "saved")
    load_checkpoint(tmp_path / "saved")
    state = {**vae.state_dict(), "quant_conv.bias": torch.full((8,), float("nan"))}
    with pytest.raises(CheckpointError, match=r"here holds numbers that are not finite in \['quant_conv.bias'\]"):
        load_strictly(vae, state, "here")


@pytest.mark.parametrize(
    "text", ["[]", '{"step": -1, "values": {}}', '{"step": "1", "values": {}}', '{"step": 1}', "[" * 9000]
)
def test_wrong_training_states(text: str, checkpoint: Path) -> None:
    """A training state whose numbers are none is an error that names its file."""
    save_file({"0.step": torch.ones(1)}, checkpoint / "training.safetensors", {"state": text})
    with pytest.raises(CheckpointError, match=r"training\.safetensors cannot be read: .*train into a new folder"):
        load_training_state(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, -1])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (DQVAEConfig, "restart_below"),
        (DQVAEConfig, "codebook_size"),
        (MQVAEConfig, "beta"),
        (TransformerConfig, "width"),
    ],
)
def test_configurations_made_in_python(cls: Any, name: str, value: Any) -> None:
    """The same limits hold where no file is read."""
    with pytest.raises(ConfigError, match=name):
        cls(**{name: value})


def test_sizes_that_pytorch_refuses() -> None:
    """What PyTorch says of impossible sizes becomes an error of ours, before anything is compared."""
    with pytest.raises(ConfigError, match="a model of these sizes cannot be made: "):
        new_module(lambda: torch.nn.Linear(1 << 40, 1 << 40), lambda plan: None)


def test_full_disk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses leaves the old checkpoint, and says so."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = (checkpoint / "config.json").read_bytes()
    monkeypatch.setattr("training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*saved: No space left on device"):
        save_checkpoint(small_model(), checkpoint)
    assert (checkpoint / "config.json").read_bytes() == before and load_checkpoint(checkpoint).class_names == (
        "ant",
        "bee",
    )
    shutil.rmtree(checkpoint)
