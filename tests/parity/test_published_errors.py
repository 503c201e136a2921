"""What cannot be imported exactly is refused, by name, before anything is written or executed."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from dq_golden import GOLDEN

from runtimes.errors import CheckpointError, ConfigError
from training.import_published import import_published, main

A, E, E2 = "a_dual_entropy", "e_class2_entropy", "e2_class_content_only"


def config_of(case):
    return json.loads((GOLDEN / case / "config.json").read_text())


def state_of(case):
    return torch.load(GOLDEN / case / "model.ckpt", weights_only=True)["state_dict"]


def imported(case, state, tmp_path):
    """Import a case with other tensors."""
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    return import_published(GOLDEN / case / "config.json", tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (A, "encoder.conv_out_fine.bias"),
        (A, "quantize.codebook.embed_ema"),
        (E, "first_stage_model.decoder.position_bias_fourier.lff.ffm.conv.weight"),
        (E, "transformer.content_fine_pos_emb.weight"),
        (E, "transformer.content_transformer.1.attn.value.bias"),
    ],
)
def test_missing_tensor(case, name, tmp_path):
    """Protects against a model that keeps random values where the file had none."""
    state = state_of(case)
    del state[name]
    with pytest.raises(CheckpointError, match=rf"missing \['{name}'\], unknown \[\]"):
        imported(case, state, tmp_path)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (A, "encoder.router.gate.0.weight"),
        (E, "first_stage_model.encoder.mid_median.block_1.conv1.bias"),
        (E, "transformer.position_transformer.1.ln1.bias"),
        (E, "epoch"),
    ],
)
def test_unknown_tensor(case, name, tmp_path):
    """Protects against importing half of a model that has more parts than ours."""
    with pytest.raises(CheckpointError, match=rf"unknown \['{name}'\]"):
        imported(case, {**state_of(case), name: torch.zeros(2)}, tmp_path)


def test_ignored_tensors(tmp_path):
    """Protects the import of files with training losses and causal masks, which have no place in the model."""
    extra = {
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
        "transformer.content_transformer.0.attn.mask": torch.zeros(1, 1, 96, 96),
    }
    got, want = imported(E, {**state_of(E), **extra}, tmp_path), imported(E, state_of(E), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values(), strict=True))


@pytest.mark.parametrize("position_type", ["learned", "learned-relative"])
def test_unused_position_tables(position_type, tmp_path):
    """Protects the released behaviour of two position types: their tables are in the file and have no effect (Q9)."""
    case, config, state = GOLDEN / A, config_of(A), state_of(A)
    config["params"]["decoderconfig"]["params"]["position_type"] = position_type
    state = {k: v for k, v in state.items() if "position_bias" not in k}
    state["decoder.position_bias.row_embed.weight"] = torch.ones(8, 32)
    state["decoder.position_bias.col_embed.weight"] = torch.ones(8, 32)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    tokenizer = import_published(config, tmp_path / "model.ckpt", base=case).tokenizer
    assert tokenizer.config.position_bias == "none"
    assert not any("position_bias" in name for name in tokenizer.state_dict())


def test_fourier_alone(tmp_path):
    """Protects the other name that the Fourier features have without learned tables beside them."""
    config, state = config_of(A), state_of(A)
    config["params"]["decoderconfig"]["params"]["position_type"] = "fourier"
    state = {k.replace("position_bias_fourier", "position_bias"): v for k, v in state.items() if "_learned" not in k}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    tokenizer = import_published(config, tmp_path / "model.ckpt", base=GOLDEN / A).tokenizer
    weight = state["decoder.position_bias.lff.ffm.conv.weight"].float()
    assert torch.equal(tokenizer.decoder.position_bias_fourier.conv.weight, weight)


def test_wrong_shape(tmp_path):
    """Protects against a file of another size than its config; the codebook's extra row is part of the shape."""
    state = state_of(A)
    state["quantize.codebook.weight"] = state["quantize.codebook.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"quantize\.codebook\.weight \(64, 32\) instead of \(65, 32\)"):
        imported(A, state, tmp_path)


class Payload:
    """An object whose unpickling leaves a trace."""

    trace: Path

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_pickle_is_never_executed(form, tmp_path):
    """Protects the machine: a file whose pickle would run code is refused, and the code has not run."""
    Payload.trace = tmp_path / "trace"
    content = {"state_dict": state_of(A), "callbacks": Payload()}
    if form == "torch":
        torch.save(content, tmp_path / "model.ckpt")
    else:
        (tmp_path / "model.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match="would have to execute code" if form == "torch" else str(tmp_path)):
        import_published(GOLDEN / A / "config.json", tmp_path / "model.ckpt")
    assert not Payload.trace.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False) if form == "torch" else pickle.loads(
        (tmp_path / "model.ckpt").read_bytes()
    )
    assert Payload.trace.exists(), "the payload must be one that works"


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "folder", "list", "no tensors"])
def test_damaged_file(damage, tmp_path):
    """Protects the user from tracebacks: every kind of damage is a CheckpointError that names the file."""
    path, whole = tmp_path / "model.ckpt", (GOLDEN / A / "model.ckpt").read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "list":
        torch.save([1], path)
    elif damage == "no tensors":
        torch.save({"state_dict": {"encoder.conv_in.weight": 1}}, path)
    elif damage != "missing":
        path.write_bytes({"empty": b"", "text": b"hello world", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(CheckpointError, match=str(path)):
        import_published(GOLDEN / A / "config.json", path)


def changed(case, *path_and_value):
    """A case's config with one value replaced (or, given None, removed)."""
    *path, last, value = path_and_value
    config = copy.deepcopy(config_of(case))
    node = config["params"]
    for name in path:
        node = node[name]["params"]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return config


FEATURE_ROUTER = {"target": "modules.dynamic_modules.RouterDual.DualGrainFeatureRouter", "params": {"num_channels": 32}}
PLAIN_QUANTIZER = {"target": "modules.vector_quantization.quantize_codebook_mask.MaskVectorQuantize", "params": {}}
UNCONDITIONAL = {"target": "modules.dynamic_modules.label_provider.PositionAwareSOSProvider", "params": {}}
TRIPLE_ENCODER = {"target": "modules.dynamic_modules.EncoderTriple.TripleGrainEncoder", "params": {}}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (A, ("encoderconfig", "router_config", FEATURE_ROUTER), "router_config.target is '.*FeatureRouter'"),
        (A, ("encoderconfig", TRIPLE_ENCODER), "encoderconfig.target is '.*TripleGrainEncoder'"),
        (A, ("vqconfig", PLAIN_QUANTIZER), "vqconfig.target is '.*MaskVectorQuantize'"),
        (A, ("encoderconfig", "router_config", "fine_grain_ratito", 1.0), "fine_grain_ratito is 1.0"),
        (A, ("encoderconfig", "router_config", "json_path", "none.json"), "threshold table none.json"),
        (A, ("encoderconfig", "resamp_with_conv", False), "resamp_with_conv is False, not True"),
        (A, ("encoderconfig", "ch", "32"), "ch is '32'; it must be a positive integer"),
        (A, ("encoderconfig", "ch", 40), "norm_groups is 32"),
        (A, ("encoderconfig", "z_channels", None), r"missing \['z_channels'\]"),
        (A, ("decoderconfig", "position_type", "relative"), "position_type is 'relative'"),
        (A, ("decoderconfig", "position_type", None), "position_type is 'relative'"),
        (A, ("decoderconfig", "latent_size", 16), "latent_size is 16, not 8"),
        (A, ("decoderconfig", "resolution", 32), "resolution is 32, not 64"),
        (A, ("entropy_patch_size", 8), "entropy_patch_size is 8, not 16"),
        (A, ("image_size", None), "image_size is 256, not 64"),
        (A, ("quant_after_dim", 16), "quant_after_dim is 16, not 32"),
        (A, ("vqconfig", "channel_last", True), "channel_last is True, not False"),
        (A, ("vqconfig", "kmeans_init", True), r"unknown \['kmeans_init'\]"),
        (E, ("permuter_config", "content_eos_code", 50), "content_eos_code is 50, not 49"),
        (E, ("permuter_config", "fine_hw", 16), "fine_hw is 16, not 8"),
        (E, ("permuter_config", "fine_position_order", "spiral"), "fine_position_order is 'spiral'"),
        (E, ("class_cond_stage_config", "threshold_content", 51), "threshold_content is 51, not 50"),
        (E, ("class_cond_stage_config", "threshold_fine_position", 65), "threshold_fine_position is 65, not 66"),
        (E, ("class_cond_stage_config", "fine_seg_sos", 0), "fine_seg_sos is 0, not 1"),
        (E, ("class_cond_stage_config", "n_classes", 11), "vocab_size is 60, not 61"),
        (E, ("class_cond_stage_config", UNCONDITIONAL), "class_cond_stage_config.target is '.*PositionAware"),
        (E, ("transformer_config", "coarse_position_size", 29), "coarse_position_size is 29, not 28"),
        (E, ("transformer_config", "segment_size", 3), "segment_size is 3, not 2"),
        (E, ("transformer_config", "block_size", 60), "block_size is 60"),
        (E, ("transformer_config", "activate_pad_ignore", False), "activate_pad_ignore is False, not True"),
        (E, ("transformer_config", "n_head", 5), "width is 32; it must be a multiple of heads"),
        (E, ("activate_sos_for_fine_sequence", False), "activate_sos_for_fine_sequence is False, not True"),
        (E, ("first_stage_config", "vqconfig", "codebook_size", 40), "does not fit its config"),
    ],
)
def test_unsupported_config(case, change, message):
    """Protects the promise of exactness: unsupported or contradictory settings are errors that name the setting."""
    with pytest.raises((ConfigError, CheckpointError), match=message):
        import_published(changed(case, *change), GOLDEN / case / "model.ckpt")


def test_first_stage_of_another_size(tmp_path):
    """Protects against a tokenizer whose codes have no id in the transformer's vocabulary."""
    config = changed(E, "first_stage_config", "vqconfig", "codebook_size", 49)
    state = state_of(E)
    for name, rows in (("weight", 50), ("embed_ema", 49), ("cluster_size_ema", 49)):
        name = f"first_stage_model.quantize.codebook.{name}"
        state[name] = torch.zeros(rows, *state[name].shape[1:])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(ConfigError, match="codebook_size is 49, not 48"):
        import_published(config, tmp_path / "model.ckpt", base=GOLDEN / E)


@pytest.mark.parametrize("target", ["models.stage1_dynamic.dqvae_dual_feat.DualGrainVQModel", ["a"], None])
def test_unsupported_target(target):
    """Protects against reading another model family's file as ours."""
    with pytest.raises(ConfigError, match="not one of the supported"):
        import_published({"target": target, "params": {}}, GOLDEN / A / "model.ckpt")


def test_without_segment_embedding(tmp_path):
    """Protects the released option of no segment embedding (a size of 0 or less)."""
    state = state_of(E2)
    del state["transformer.seg_emb.weight"]
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    got = import_published(changed(E2, "transformer_config", "segment_size", -1), tmp_path / "model.ckpt")
    assert got.transformer.segment_emb is None
    assert not got.transformer.config.segment_embedding


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "cannot be read"),
        ("bad.json", "{", "cannot be read"),
        ("bad.yml", "a: [", "cannot be read"),
        ("list.json", "[1]", "has no target"),
        ("data.yml", "data: {}", "has no target"),
    ],
)
def test_unreadable_config(name, text, message, tmp_path):
    """Protects the user from tracebacks on a wrong configuration file."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        import_published(tmp_path / name, GOLDEN / A / "model.ckpt")


@pytest.mark.parametrize("table", ["{", "[]", '{"1": 0.5}', json.dumps({str(p): "x" for p in range(1, 100)})])
def test_damaged_threshold_table(table, tmp_path):
    """Protects the router from thresholds that are missing or no numbers."""
    (tmp_path / "thresholds.json").write_text(table)
    with pytest.raises(ConfigError, match=r"thresholds\.json"):
        import_published(config_of(A), GOLDEN / A / "model.ckpt", base=tmp_path)


def test_command_writes_nothing_on_error(tmp_path, capsys):
    """Protects the disk: a refused import ends in one line of text and no folder."""
    out = tmp_path / "checkpoint"
    with pytest.raises(SystemExit):
        main([str(GOLDEN / E / "config.json"), str(GOLDEN / A / "model.ckpt"), "--out", str(out)])
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
