"""Imports at the door: files that expand, block or hold no numbers, configurations that never end, and where the
threshold table and its bins come from."""

import json
import os
import shutil
import zipfile

import pytest
import torch
from dq_golden import GOLDEN, load
from mq_golden import GOLDEN as MQ
from released import changed, config_of, imported, state_of

from runtimes.errors import CheckpointError, ConfigError
from training.checkpoint import load_checkpoint
from training.import_published import import_published, main
from training.models.router import patch_entropy

A, E, U = "a_dual_entropy", "e_class2_entropy", "stackformer_uncond"


@pytest.fixture
def case(tmp_path):
    """A folder with a configuration, its checkpoint and a threshold table, to be changed."""
    shutil.copytree(GOLDEN / A, tmp_path / "case")
    return tmp_path / "case"


def table(folder, first, name="thresholds.json"):
    """A threshold table whose first percentile is ``first``."""
    values = {str(p): 0.02 * p for p in range(1, 100)} | {"1": first}
    (folder / name).write_text(json.dumps(values))


# --- thresholds ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "bins", "low"),
    [
        (0.0, "auto", 0.0),
        (3.2e-38, "auto", 0.0),
        (1.6e-7, "auto", -1.0),
        (0.0, "model", -1.0),
        (1.6e-7, "zero", 0.0),
    ],
)
def test_bins_of_the_table(first, bins, low, case, tmp_path, capsys):
    """Protects the routing of the released weights: their table was made with bins from 0, which its first percentile
    tells, and so were they. The choice can be forced, is printed, kept, and decides which cells are fine."""
    table(case, first)
    arguments = [str(case / "config.json"), str(case / "model.ckpt"), "--out", str(tmp_path / "out"), "--bins", bins]
    main(arguments)
    assert f"entropy bins: from {low:g} to 1 (--bins {bins})" in capsys.readouterr().out
    tokenizer = load_checkpoint(tmp_path / "out").tokenizer
    assert tokenizer.config.entropy_low == low
    image = load(A)["image"]
    grain, entropy = tokenizer.route(image)
    assert torch.equal(entropy, patch_entropy(image, tokenizer.config.stride, low))
    other = patch_entropy(image, tokenizer.config.stride, -1.0 - low) > tokenizer.thresholds()[0]
    assert not torch.equal(grain.bool(), other)


def test_bins_of_other_models():
    """Protects against a setting that would do nothing, or is none."""
    with pytest.raises(ConfigError, match="bins are 'zero', but an MQ-VAE has no entropy bins"):
        import_published(MQ / U / "config.json", MQ / U / "model.ckpt", base=MQ, bins="zero")
    with pytest.raises(ConfigError, match="bins are 'half'; they must be one of"):
        import_published(GOLDEN / A / "config.json", GOLDEN / A / "model.ckpt", bins="half")


def test_where_the_table_is_looked_for(case, tmp_path, monkeypatch):
    """Protects imports from a fresh folder: the table that a configuration names by a path of its authors' machine is
    found beside it, and where it is not, the error says where it was looked for."""
    config = changed(A, "encoderconfig", "router_config", "json_path", "scripts/deep/made_there.json")
    (case / "config.json").write_text(json.dumps(config))
    elsewhere = tmp_path / "weights"
    elsewhere.mkdir()
    (case / "model.ckpt").rename(elsewhere / "model.ckpt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        import_published(case / "config.json", elsewhere / "model.ckpt")
    for place in (
        case / "scripts/deep/made_there.json",
        elsewhere / "made_there.json",
        case / "made_there.json",
        "scripts/deep/made_there.json",
    ):
        assert str(place) in str(caught.value)
    table(case, 0.3, "made_there.json")
    found_beside = import_published(case / "config.json", elsewhere / "model.ckpt").tokenizer
    (case / "scripts" / "deep").mkdir(parents=True)
    table(case / "scripts" / "deep", 0.4, "made_there.json")  # the path itself comes first
    found_there = import_published(case / "config.json", elsewhere / "model.ckpt").tokenizer
    assert [float(t.entropy_thresholds[0]) for t in (found_beside, found_there)] == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("text", ["[" * 90_000, '{"1": 1e999}', '{"1": true}', '{"1": ' + "9" * 400 + "}"])
def test_tables_that_are_none(text, case):
    """Protects the router from tables whose numbers are none, and the user from a RecursionError."""
    values = {str(p): 0.5 for p in range(2, 100)}
    (case / "thresholds.json").write_text(text.replace("}", ", " + json.dumps(values)[1:]) if "}" in text else text)
    with pytest.raises(ConfigError, match=r"thresholds\.json"):
        import_published(case / "config.json", case / "model.ckpt")


# --- configurations --------------------------------------------------------------------------------------------
ALIASES = "target: &a [x]\nparams:\n" + "".join(
    f"  {k}: &{k} [{', '.join([f'*{j}'] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)
)
"""400 bytes that stand for 43 million values."""


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("aliases.yml", ALIASES, "it has aliases"),
        ("one.yaml", "target: &t a\nparams: {x: *t}", "it has aliases"),
        ("merge.yml", "base: &b {x: 1}\ntarget: t\nparams: {<<: *b}", "it has aliases"),
        ("deep.yml", "target: " + "[" * 5000, "cannot be read"),
        ("deep.json", "[" * 100_000, "cannot be read"),
        ("code.yml", "target: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("twice.json", '{"target": 1, "target": 2}', "a name appears twice"),
        ("bytes.yml", b"target: \xff\xfe", "cannot be read"),
        ("large.yml", "#" * (1 << 21), "at most 1048576 are read"),
        ("nul.yml", "target: \0", "cannot be read"),
        ("date.yml", "target: 2001-01-01\nparams: {}", "not one of the supported"),
        ("list.yml", "target: [" + "1, " * 9000 + "1]", "not one of the supported"),
    ],
)
def test_configurations_that_never_end(name, text, words, tmp_path):
    """Protects the reader of configurations: aliases, depth, size, tags and odd bytes end in one short error."""
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        import_published(tmp_path / name, GOLDEN / A / "model.ckpt")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "value", [[[0] * 9000] * 9, {"a": {"b": {"c": {"d": 1}}}}, 10**400, -(10**400), float("nan"), "x" * 10**6, None]
)
@pytest.mark.parametrize("place", [("encoderconfig", "ch"), ("encoderconfig", "dropout"), ("decoderconfig", "ch_mult")])
def test_values_in_errors_are_short(value, place, tmp_path):
    """Protects the message: whatever stands in place of a size or a rate, the error is short and names the setting."""
    config = changed(A, *place, 1)
    node = config["params"][place[0]]["params"]
    node[place[1]] = value
    with pytest.raises(ConfigError, match=place[1]) as caught:
        imported(A, tmp_path, config=config)
    assert len(str(caught.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are POSIX's")
@pytest.mark.parametrize("name", ["config.json", "model.ckpt", "thresholds.json"])
def test_pipes_do_not_block(name, case):
    """Protects against waiting for a writer that never comes."""
    (case / name).unlink()
    os.mkfifo(case / name)
    with pytest.raises((ConfigError, CheckpointError), match=name):
        import_published(case / "config.json", case / "model.ckpt")


# --- weights ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: torch.complex(t, t), "no plain tensors of real numbers"),
        (lambda t: t.to_sparse(), "no plain tensors of real numbers"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "no plain tensors of real numbers"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "not finite"),
        (lambda t: t / 0, "not finite"),
        (lambda t: t.double() * 1e300 + 1e300, "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor|TypedStorage")
@pytest.mark.parametrize(("case", "name"), [(A, "quant_conv.bias"), (E, "transformer.content_head.0.bias")])
def test_weights_that_are_no_numbers(change, words, case, name, tmp_path):
    """Protects against complex weights, whose imaginary parts would be lost, and against NaN and infinity, also those
    that come with the conversion to float32."""
    state = state_of(case)
    with pytest.raises(CheckpointError, match=words):
        imported(case, tmp_path, {**state, name: change(state[name].float())})


def test_weights_of_another_precision(tmp_path):
    """Protects the import of half and double precision, as before."""
    state = {k: v.double() if v.is_floating_point() else v for k, v in state_of(A).items()}
    got, want = imported(A, tmp_path, state).state_dict(), imported(A, tmp_path).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_checkpoints_that_expand(case):
    """Protects memory: a file of a few kilobytes that would unpack to a hundred megabytes is refused by its sizes; one
    that was merely zipped again is read as before."""
    torch.save({"state_dict": {"x": torch.zeros(1 << 25)}}, case / "large.ckpt")
    for source, target in (("large.ckpt", "bomb.ckpt"), ("model.ckpt", "zipped.ckpt")):
        with zipfile.ZipFile(case / source) as old, zipfile.ZipFile(case / target, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
    assert (case / "bomb.ckpt").stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt cannot be read: it would unpack to 1342\d+ bytes"):
        import_published(case / "config.json", case / "bomb.ckpt")
    assert import_published(case / "config.json", case / "zipped.ckpt").tokenizer is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("transformer_config", "n_embd", 1 << 20), "does not fit its config: .*wrong shape"),
        (("transformer_config", "content_layer", 1000), "does not fit its config: missing"),
        (("transformer_config", "content_layer", 10**7), "content_blocks is 10000000; .* 1024 at most"),
        (("transformer_config", "block_size", 10**12), "block_size is 1000000000000; .* 1048576 at most"),
        (("first_stage_config", "encoderconfig", "num_res_blocks", 10**8), "blocks is 100000000; .* at most 256"),
        (("first_stage_config", "encoderconfig", "z_channels", 10**30), "z_channels is 10000000"),
    ],
)
def test_sizes_are_compared_before_they_are_allocated(change, words, tmp_path):
    """Protects memory: a configuration of impossible sizes is refused by the tensors' shapes, not by the machine."""
    with pytest.raises((ConfigError, CheckpointError), match=words):
        imported(E, tmp_path, config=changed(E, *change))


def test_sections_of_another_kind(tmp_path):
    """Protects the user from an AttributeError where a section holds a list."""
    config = config_of(U)
    config["model"]["params"]["first_stage_config"]["params"] = [1]
    with pytest.raises(ConfigError, match="first_stage_config"):
        imported(U, tmp_path, config=config)
