"""Tensors and files that cannot be imported exactly are refused, by name, before anything is written or executed."""

import pickle
from pathlib import Path

import pytest
import torch
from dq_golden import GOLDEN
from mq_golden import GOLDEN as MQ
from mq_golden import load, model
from released import changed, config_of, imported, state_of

from runtimes.errors import CheckpointError, ConfigError
from training.import_published import import_published, main

A, E, E2 = "a_dual_entropy", "e_class2_entropy", "e2_class_content_only"
M, C, U = "mqvae_refine", "stackformer_class", "stackformer_uncond"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (A, "encoder.conv_out_fine.bias"),
        (A, "quantize.codebook.embed_ema"),
        (E, "first_stage_model.decoder.position_bias_fourier.lff.ffm.conv.weight"),
        (E, "transformer.content_fine_pos_emb.weight"),
        (E, "transformer.content_transformer.1.attn.value.bias"),
        (M, "masker.score_pred_net.4.running_var"),
        (M, "masker.score_pred_net.4.num_batches_tracked"),
        (M, "demasker.mask_token"),
        (M, "demasker.transformer.last_resblock.conv2.bias"),
        (C, "first_stage_model.quantize.codebook.cluster_size_ema"),
        (C, "transformer.value_pos_emb.weight"),
        (C, "transformer.value_transformer.1.attn.key.bias"),
        (U, "transformer.pos_emb"),
    ],
)
def test_missing_tensor(case, name, tmp_path):
    """Protects against a model that keeps random values where the file had none."""
    state = state_of(case)
    del state[name]
    with pytest.raises(CheckpointError, match=rf"missing \['{name}'\], unknown \[\]"):
        imported(case, tmp_path, state)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (A, "encoder.router.gate.0.weight"),
        (E, "first_stage_model.encoder.mid_median.block_1.conv1.bias"),
        (E, "transformer.position_transformer.1.ln1.bias"),
        (E, "epoch"),
        (M, "masker.score_pred_net.6.weight"),
        (M, "decoder.mid.block_1.temb_proj.weight"),
        (M, "encoder.down.3.block.1.norm1.weight"),
        (C, "first_stage_model.masker.pre_projection.bias"),
        (C, "transformer.value_transformer.3.ln1.bias"),
        (U, "epoch"),
    ],
)
def test_unknown_tensor(case, name, tmp_path):
    """Protects against importing half of a model that has more parts than ours."""
    with pytest.raises(CheckpointError, match=rf"unknown \['{name}'\]"):
        imported(case, tmp_path, {**state_of(case), name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("case", "name", "message"),
    [
        (A, "quantize.codebook.weight", r"quantize\.codebook\.weight \(64, 32\) instead of \(65, 32\)"),
        (M, "quantize.codebook.weight", r"\(48, 24\) instead of \(49, 24\)"),
        (M, "demasker.mask_token", r"\(24, 1\) instead of \(1, 24, 1\)"),
        (C, "transformer.value_emb.weight", r"\(49, 32\) instead of \(50, 32\)"),
    ],
)
def test_wrong_shape(case, name, message, tmp_path):
    """Protects against a file of another size than its config; the codebook's extra row is part of the shape."""
    state = state_of(case)
    state[name] = state[name][0] if name.startswith("demasker") else state[name][:-1]
    with pytest.raises(CheckpointError, match=message):
        imported(case, tmp_path, state)


def test_ignored_tensors(tmp_path):
    """Protects the import of files with training losses and causal masks, which have no place in the model."""
    extra = {
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
        "transformer.content_transformer.0.attn.mask": torch.zeros(1, 1, 96, 96),
    }
    got, want = imported(E, tmp_path, {**state_of(E), **extra}), imported(E, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values(), strict=True))


def test_passed_over_tensors(tmp_path):
    """Protects the import of files with training losses, and of those without what has no effect: causal masks and the
    time projections that are never called."""
    unused = (".temb_proj.", ".attn.mask")
    state = {name: tensor for name, tensor in state_of(C).items() if not any(part in name for part in unused)}
    assert len(state) < len(state_of(C)) - 8
    state["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(2)
    got, want = imported(C, tmp_path, state).state_dict(), model(C).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("position_type", ["learned", "learned-relative"])
def test_unused_position_tables(position_type, tmp_path):
    """Protects the released behaviour of two position types: their tables are in the file and have no effect (Q9)."""
    config, state = config_of(A), state_of(A)
    config["params"]["decoderconfig"]["params"]["position_type"] = position_type
    state = {k: v for k, v in state.items() if "position_bias" not in k}
    state["decoder.position_bias.row_embed.weight"] = torch.ones(8, 32)
    state["decoder.position_bias.col_embed.weight"] = torch.ones(8, 32)
    tokenizer = imported(A, tmp_path, state, config).tokenizer
    assert tokenizer.config.position_bias == "none"
    assert not any("position_bias" in name for name in tokenizer.state_dict())


def test_fourier_alone(tmp_path):
    """Protects the other name that the Fourier features have without learned tables beside them."""
    config, state = config_of(A), state_of(A)
    config["params"]["decoderconfig"]["params"]["position_type"] = "fourier"
    state = {k.replace("position_bias_fourier", "position_bias"): v for k, v in state.items() if "_learned" not in k}
    tokenizer = imported(A, tmp_path, state, config).tokenizer
    weight = state["decoder.position_bias.lff.ffm.conv.weight"].float()
    assert torch.equal(tokenizer.decoder.position_bias_fourier.conv.weight, weight)


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


def test_first_stage_of_another_size(tmp_path):
    """Protects against a tokenizer whose codes have no id in the transformer's vocabulary."""
    config = changed(E, "first_stage_config", "vqconfig", "codebook_size", 49)
    state = state_of(E)
    for name, rows in (("weight", 50), ("embed_ema", 49), ("cluster_size_ema", 49)):
        name = f"first_stage_model.quantize.codebook.{name}"
        state[name] = torch.zeros(rows, *state[name].shape[1:])
    with pytest.raises(ConfigError, match="codebook_size is 49, not 48"):
        imported(E, tmp_path, state, config)


def test_without_segment_embedding(tmp_path):
    """Protects the released option of no segment embedding (a size of 0 or less)."""
    state = state_of(E2)
    del state["transformer.seg_emb.weight"]
    got = imported(E2, tmp_path, state, changed(E2, "transformer_config", "segment_size", -1))
    assert got.transformer.segment_emb is None
    assert not got.transformer.config.segment_embedding


def test_without_index_embedding(tmp_path):
    """Protects the released option of no absolute positions."""
    state = state_of(C)
    del state["transformer.pos_emb"]
    got = imported(C, tmp_path, state, changed(C, "transformer_config", "add_absolute_position", False)).transformer
    assert got.index_emb is None and not got.config.index_embedding


def test_another_kept_ratio(tmp_path):
    """Protects the ratio of a stage-2 configuration, which need not be that of stage 1 (Q24): it sets the number of
    codes and the length of the sequences."""
    refine, unconditional = model(M).tokenizer, model(U)
    assert (refine.config.kept, unconditional.tokenizer.config.kept, unconditional.layout.kept) == (19, 32, 32)
    got = imported(U, tmp_path, config=changed(U, "first_stage_config", "masker_config", "topk_ratio", 0.25))
    assert (got.tokenizer.config.kept, got.layout.kept, got.layout.max_length) == (16, 16, 16)
    few, many = (m.tokenizer.encode(load(M, "inputs")["image"]) for m in (got, unconditional))
    assert torch.equal(few.positions, many.positions[:, :16]) and torch.equal(few.codes, many.codes[:, :16])


def test_first_stage_elsewhere(tmp_path):
    """Protects a file without its first stage: the configuration's ``ckpt_path`` is found from the base folder, and
    where it is not there is no tokenizer."""
    alone = tmp_path / "model.ckpt"
    alone.write_bytes((MQ / U / "model.ckpt").read_bytes())
    config = config_of(U)
    assert import_published(config, alone, base=MQ).tokenizer is not None
    without = import_published(config, alone, base=tmp_path)
    assert without.tokenizer is None and without.family == "mq" and without.layout.kept == 32


def test_command_writes_nothing_on_error(tmp_path, capsys):
    """Protects the disk: a refused import ends in one line of text and no folder."""
    out = tmp_path / "checkpoint"
    with pytest.raises(SystemExit):
        main([str(GOLDEN / E / "config.json"), str(GOLDEN / A / "model.ckpt"), "--out", str(out)])
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
