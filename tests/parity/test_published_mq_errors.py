"""What cannot be imported exactly of the released MQ code is refused, by name."""

import copy

import pytest
import torch
from dq_golden import GOLDEN as DQ
from mq_golden import GOLDEN, extra, load, model

from runtimes.errors import CheckpointError, ConfigError
from training.import_published import import_published

A, C, U = "mqvae_refine", "stackformer_class", "stackformer_uncond"
RANDOM_MASKER = {"target": "modules.masked_quantization.masker_random.RandomTokenizer", "params": {}}
POSITION_FIRST = {"target": "modules.masked_quantization_stage2.stackedgpt.StackedPositionGPT", "params": {}}
DQ_TOKENIZER = {"target": "models.stage1_dynamic.dqvae_dual_entropy.DualGrainVQModel", "params": {}}
DQ_TRANSFORMER = "models.stage2_dynamic.dqtransformer_uncond_entropy.Dualformer"
OTHER_PERMUTER = {"target": "modules.dynamic_modules.permuter.DualGrainSeperatePermuter"}
FIRST = "first_stage_config"


def state_of(case):
    return torch.load(GOLDEN / case / "model.ckpt", weights_only=True)["state_dict"]


def imported(case, state, tmp_path):
    """Import a case with other tensors."""
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    return import_published(GOLDEN / case / "config.json", tmp_path / "model.ckpt", base=GOLDEN)


def changed(case, *path_and_value):
    """A case's config with one value replaced (or, given None, removed)."""
    *path, last, value = path_and_value
    config = copy.deepcopy(extra(case, "config"))
    node = config["model"]["params"]
    for name in path:
        node = node[name]["params"]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return config


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (A, "masker.score_pred_net.4.running_var"),
        (A, "masker.score_pred_net.4.num_batches_tracked"),
        (A, "demasker.mask_token"),
        (A, "demasker.transformer.last_resblock.conv2.bias"),
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
        imported(case, state, tmp_path)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (A, "masker.score_pred_net.6.weight"),
        (A, "decoder.mid.block_1.temb_proj.weight"),
        (A, "encoder.down.3.block.1.norm1.weight"),
        (C, "first_stage_model.masker.pre_projection.bias"),
        (C, "transformer.value_transformer.3.ln1.bias"),
        (U, "epoch"),
    ],
)
def test_unknown_tensor(case, name, tmp_path):
    """Protects against importing half of a model that has more parts than ours."""
    with pytest.raises(CheckpointError, match=rf"unknown \['{name}'\]"):
        imported(case, {**state_of(case), name: torch.zeros(2)}, tmp_path)


@pytest.mark.parametrize(
    ("case", "name", "message"),
    [
        (A, "quantize.codebook.weight", r"\(48, 24\) instead of \(49, 24\)"),
        (A, "demasker.mask_token", r"\(24, 1\) instead of \(1, 24, 1\)"),
        (C, "transformer.value_emb.weight", r"\(49, 32\) instead of \(50, 32\)"),
    ],
)
def test_wrong_shape(case, name, message, tmp_path):
    """Protects against a file of another size than its config; the codebook's extra row is part of the shape."""
    state = state_of(case)
    state[name] = state[name][0] if name.startswith("demasker") else state[name][:-1]
    with pytest.raises(CheckpointError, match=message):
        imported(case, state, tmp_path)


def test_passed_over_tensors(tmp_path):
    """Protects the import of files with training losses, and of those without what has no effect: causal masks and the
    time projections that are never called."""
    unused = (".temb_proj.", ".attn.mask")
    state = {name: tensor for name, tensor in state_of(C).items() if not any(part in name for part in unused)}
    assert len(state) < len(state_of(C)) - 8
    state["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(2)
    got, want = imported(C, state, tmp_path).state_dict(), model(C).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (A, ("masker_config", RANDOM_MASKER), "masker_config.target is '.*RandomTokenizer'.*must be one of"),
        (A, ("masker_config", "score_pred_net_mode", "2layer-fc"), "score_pred_net_mode is '2layer-fc', not '2layer'"),
        (A, ("masker_config", "topk_ratio", 1.5), "kept_ratio is 1.5"),
        (A, ("masker_config", "topk_ratio", 0.01), "kept_ratio is 0.01"),
        (A, ("masker_config", "topk_ratio", None), r"missing \['topk_ratio'\]"),
        (A, ("masker_config", "input_token_num", 256), "input_token_num is 256, not 64"),
        (A, ("masker_config", "input_dim", 64), "input_dim is 64, not 32"),
        (A, ("masker_config", "codebook_dim", 32), "masker_config: codebook_dim is 32, not 24"),
        (A, ("demasker_config", "codebook_dim", 32), "demasker_config: codebook_dim is 32, not 24"),
        (A, ("demasker_config", "height_and_width", 16), "height_and_width is 16, not 8"),
        (A, ("demasker_config", "output_dim", 64), "output_dim is 64, not 32"),
        (A, ("demasker_config", "mask_init_value", 2.0), "mask_damping 2.0"),
        (A, ("demasker_config", "reweight", True), r"unknown \['reweight'\]"),
        (A, ("demasker_config", "n_layer", 3), "missing .*demasker.transformer.blocks.2"),
        (A, ("encoder_config", "double_z", True), "double_z is True, not False"),
        (A, ("encoder_config", "double_z", None), r"missing \['double_z'\]"),
        (A, ("encoder_config", "in_channels", 1), "in_channels is 1, not 3"),
        (A, ("encoder_config", "resamp_with_conv", False), "resamp_with_conv is False, not True"),
        (A, ("encoder_config", "ch", 40), "norm_groups is 32"),
        (A, ("encoder_config", "attn_type", "linear"), r"unknown \['attn_type'\]"),
        (A, ("decoder_config", "give_pre_end", True), "give_pre_end is True, not False"),
        (A, ("decoder_config", "resolution", 32), "resolution is 32, not 64"),
        (A, ("decoder_config", "ch_mult", [1, 1]), "decoder_mult has 2 levels"),
        (A, ("vqconfig", "channel_last", True), "channel_last is True, not False"),
        (A, ("vqconfig", "accept_image_fmap", True), "accept_image_fmap is True, not False"),
        (A, ("vqconfig", "commit_loss_legacy", False), "commit_loss_legacy is False, not True"),
        (A, ("vqconfig", "codebook_size", 40), "does not fit its config"),
        (A, ("vqconfig", DQ_TOKENIZER), "vqconfig.target is '.*DualGrainVQModel'"),
        (A, ("learn_mask", True), r"unknown \['learn_mask'\]"),
        (C, ("height_and_weight", 16), "height_and_weight is 16, not 8"),
        (C, ("height_and_weight", None), "height_and_weight is 16, not 8"),
        (C, ("sos_pos_token", 65), "sos_pos_token is 65, not 64"),
        (C, ("n_classes", 11), "vocab_size is 50, not 51"),
        (C, ("n_classes", None), r"missing \['n_classes'\]"),
        (C, ("sos_token", 40), r"unknown \['sos_token'\]"),
        (U, ("sos_token", 49), "sos_token is 49, not 48"),
        (U, ("n_classes", 1), r"unknown \['n_classes'\]"),
        (C, ("position_value_permuter_config", OTHER_PERMUTER), "permuter_config.target is '.*SeperatePermuter'"),
        (C, ("transformer_config", POSITION_FIRST), "transformer_config.target is '.*StackedPositionGPT'"),
        (C, ("transformer_config", "position_size", 64), "position_size is 64, not 65"),
        (C, ("transformer_config", "n_unmasked", 2), "n_unmasked is 2, not 0"),
        (C, ("transformer_config", "block_size", 16), "block_size is 16, but an image has 17 codes"),
        (C, ("transformer_config", "add_absolute_position", False), r"unknown \['transformer.pos_emb'\]"),
        (C, (FIRST, "masker_config", "topk_ratio", 0.7), "block_size is 40, but an image has 44 codes"),
        (C, (FIRST, "vqconfig", "codebook_size", 41), "vocab_size is 50, not 51"),
        (C, (FIRST, DQ_TOKENIZER), "first_stage_config.target is '.*DualGrainVQModel'"),
    ],
)
def test_unsupported_config(case, change, message):
    """Protects the promise of exactness: unsupported or contradictory settings are errors that name the setting."""
    with pytest.raises((ConfigError, CheckpointError), match=message):
        import_published(changed(case, *change), GOLDEN / case / "model.ckpt", base=GOLDEN)


def test_families_do_not_mix():
    """Protects against the first stage of one family under the transformer of the other."""
    config = {**extra(U, "config")["model"], "target": DQ_TRANSFORMER}
    with pytest.raises(ConfigError, match=r"config\.params: unknown"):
        import_published(config, GOLDEN / U / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"does not fit its config: missing .*demasker"):
        import_published(GOLDEN / A / "config.json", DQ / "a_dual_entropy" / "model.ckpt")


def test_another_kept_ratio():
    """Protects the ratio of a stage-2 configuration, which need not be that of stage 1 (Q24): it sets the number of
    codes and the length of the sequences."""
    refine, unconditional = model(A).tokenizer, model(U)
    assert (refine.config.kept, unconditional.tokenizer.config.kept, unconditional.layout.kept) == (19, 32, 32)
    got = import_published(
        changed(U, FIRST, "masker_config", "topk_ratio", 0.25), GOLDEN / U / "model.ckpt", base=GOLDEN
    )
    assert (got.tokenizer.config.kept, got.layout.kept, got.layout.max_length) == (16, 16, 16)
    few, many = (m.tokenizer.encode(load(A, "inputs")["image"]) for m in (got, unconditional))
    assert torch.equal(few.positions, many.positions[:, :16]) and torch.equal(few.codes, many.codes[:, :16])


def test_first_stage_elsewhere(tmp_path):
    """Protects a file without its first stage: the configuration's ``ckpt_path`` is found from the base folder, and
    where it is not there is no tokenizer."""
    alone = tmp_path / "model.ckpt"
    alone.write_bytes((GOLDEN / U / "model.ckpt").read_bytes())
    config = extra(U, "config")
    assert import_published(config, alone, base=GOLDEN).tokenizer is not None
    without = import_published(config, alone, base=tmp_path)
    assert without.tokenizer is None and without.family == "mq" and without.layout.kept == 32


def test_without_index_embedding(tmp_path):
    """Protects the released option of no absolute positions."""
    state = state_of(C)
    del state["transformer.pos_emb"]
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    got = import_published(
        changed(C, "transformer_config", "add_absolute_position", False), tmp_path / "model.ckpt"
    ).transformer
    assert got.index_emb is None and not got.config.index_embedding
