"""Released configurations that ask for what cannot be reproduced exactly are refused, by the setting's name."""

import json
from typing import Any

import pytest
from dq_golden import GOLDEN
from mq_golden import GOLDEN as MQ
from released import changed, config_of, imported

from runtimes.errors import CheckpointError, ConfigError
from training.import_published import import_published

A, B, T, E = "a_dual_entropy", "b_dual_feature", "c_triple", "e_class2_entropy"
BUDGET = "modules.dynamic_modules.budget.BudgetConstraint_RatioMSE_DualGrain"
SHARES = "modules.dynamic_modules.budget.BudgetConstraint_NormedSeperateRatioMSE_TripleGrain"
M, C, U = "mqvae_refine", "stackformer_class", "stackformer_uncond"
FEATURE_ROUTER = {"target": "modules.dynamic_modules.RouterDual.DualGrainFeatureRouter", "params": {"num_channels": 32}}
PLAIN_QUANTIZER = {
    "target": "modules.vector_quantization.quantize_codebook_mask.MaskVectorQuantize",
    "params": {"codebook_size": 64, "codebook_dim": 32, "use_cosine_sim": True},
}
UNCONDITIONAL = {"target": "modules.dynamic_modules.label_provider.PositionAwareSOSProvider", "params": {}}
TRIPLE_ENCODER = {"target": "modules.dynamic_modules.EncoderTriple.TripleGrainEncoder", "params": {}}

RANDOM_MASKER = {"target": "modules.masked_quantization.masker_random.RandomTokenizer", "params": {}}
POSITION_FIRST = {"target": "modules.masked_quantization_stage2.stackedgpt.StackedPositionGPT", "params": {}}
DQ_TOKENIZER = {"target": "models.stage1_dynamic.dqvae_dual_entropy.DualGrainVQModel", "params": {}}
DQ_TRANSFORMER = "models.stage2_dynamic.dqtransformer_uncond_entropy.Dualformer"
OTHER_PERMUTER = {"target": "modules.dynamic_modules.permuter.DualGrainSeperatePermuter"}
FIRST = "first_stage_config"


def loss(target: str, **params: float) -> dict[str, Any]:
    """A loss section with a budget."""
    return {"target": "loss", "params": {"budget_loss_config": {"target": target, "params": params}}}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (A, ("encoderconfig", "router_config", FEATURE_ROUTER), "router_config.target is '.*FeatureRouter'"),
        (A, ("encoderconfig", TRIPLE_ENCODER), "encoderconfig.target is '.*TripleGrainEncoder'"),
        (A, ("vqconfig", PLAIN_QUANTIZER), "use_cosine_sim is True, not False"),
        (A, ("vqconfig", TRIPLE_ENCODER), "vqconfig.target is '.*TripleGrainEncoder'"),
        (B, ("encoderconfig", "update_router", False), "update_router is False, not True"),
        (
            B,
            ("encoderconfig", "router_config", "gate_type", "2layer-fc-ReLu"),
            "gate_type is '2layer-fc-ReLu'; it must",
        ),
        (B, ("encoderconfig", "router_config", "normalization_type", "group"), "normalization_type is 'group'"),
        (B, ("encoderconfig", "router_config", "normalization_type", "batch"), "normalization_type is 'batch'"),
        (B, ("encoderconfig", "router_config", "num_channels", 16), "num_channels is 16, not 32"),
        (B, ("entropy_patch_size", 2), r"unknown \['entropy_patch_size'\]"),
        (B, ("lossconfig", loss(BUDGET, target_ratio=1.0)), "target_ratio 1.0 cannot be met"),
        (B, ("lossconfig", loss(BUDGET, target_ratio=0.5, eta=1)), r"unknown \['eta'\]"),
        (T, ("lossconfig", loss(BUDGET)), "budget_loss_config.target is '.*DualGrain'"),
        (
            T,
            ("lossconfig", loss(SHARES, target_fine_ratio=0.6, target_median_ratio=0.4)),
            "target_fine_ratio 0.6, target_median_ratio 0.4 cannot be met",
        ),
        (T, ("encoderconfig", "ch_mult", [1, 2, 3]), "of the last 3 each must be a multiple of the one before"),
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
        (E, ("transformer_config", "block_size", 60), "block_size is 60, but an image has up to"),
        (E, ("transformer_config", "activate_pad_ignore", False), "activate_pad_ignore is False, not True"),
        (E, ("transformer_config", "n_head", 5), "width is 32; it must be a multiple of heads"),
        (E, ("activate_sos_for_fine_sequence", False), "activate_sos_for_fine_sequence is False, not True"),
        (E, ("first_stage_config", "vqconfig", "codebook_size", 40), "does not fit its config"),
        (M, ("masker_config", RANDOM_MASKER), "masker_config.target is '.*RandomTokenizer'.*must be one of"),
        (M, ("masker_config", "score_pred_net_mode", "2layer-fc"), "score_pred_net_mode is '2layer-fc', not '2layer'"),
        (M, ("masker_config", "topk_ratio", 1.5), "kept_ratio is 1.5"),
        (M, ("masker_config", "topk_ratio", 0.01), "kept_ratio is 0.01"),
        (M, ("masker_config", "topk_ratio", None), r"missing \['topk_ratio'\]"),
        (M, ("masker_config", "input_token_num", 256), "input_token_num is 256, not 64"),
        (M, ("masker_config", "input_dim", 64), "input_dim is 64, not 32"),
        (M, ("masker_config", "codebook_dim", 32), "masker_config: codebook_dim is 32, not 24"),
        (M, ("demasker_config", "codebook_dim", 32), "demasker_config: codebook_dim is 32, not 24"),
        (M, ("demasker_config", "height_and_width", 16), "height_and_width is 16, not 8"),
        (M, ("demasker_config", "output_dim", 64), "output_dim is 64, not 32"),
        (M, ("demasker_config", "mask_init_value", 2.0), "mask_damping 2.0"),
        (M, ("demasker_config", "reweight", True), r"unknown \['reweight'\]"),
        (M, ("demasker_config", "n_layer", 3), "missing .*demasker.transformer.blocks.2"),
        (M, ("encoder_config", "double_z", True), "double_z is True, not False"),
        (M, ("encoder_config", "double_z", None), r"missing \['double_z'\]"),
        (M, ("encoder_config", "in_channels", 1), "in_channels is 1, not 3"),
        (M, ("encoder_config", "resamp_with_conv", False), "resamp_with_conv is False, not True"),
        (M, ("encoder_config", "ch", 40), "norm_groups is 32"),
        (M, ("encoder_config", "attn_type", "linear"), r"unknown \['attn_type'\]"),
        (M, ("decoder_config", "give_pre_end", True), "give_pre_end is True, not False"),
        (M, ("decoder_config", "resolution", 32), "resolution is 32, not 64"),
        (M, ("decoder_config", "ch_mult", [1, 1]), "decoder_mult has 2 levels"),
        (M, ("vqconfig", "channel_last", True), "channel_last is True, not False"),
        (M, ("vqconfig", "accept_image_fmap", True), "accept_image_fmap is True, not False"),
        (M, ("vqconfig", "commit_loss_legacy", False), "commit_loss_legacy is False, not True"),
        (M, ("vqconfig", "codebook_size", 40), "does not fit its config"),
        (M, ("vqconfig", DQ_TOKENIZER), "vqconfig.target is '.*DualGrainVQModel'"),
        (M, ("learn_mask", True), r"unknown \['learn_mask'\]"),
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
        (C, ("transformer_config", "block_size", 16), "block_size is 16, but an image has up to 17 tokens"),
        (C, ("transformer_config", "add_absolute_position", False), r"unknown \['transformer.pos_emb'\]"),
        (C, (FIRST, "masker_config", "topk_ratio", 0.7), "block_size is 40, but an image has up to 44 tokens"),
        (C, (FIRST, "vqconfig", "codebook_size", 41), "vocab_size is 50, not 51"),
        (C, (FIRST, DQ_TOKENIZER), "first_stage_config.target is '.*DualGrainVQModel'"),
    ],
)
def test_unsupported_config(case, change, message, tmp_path):
    """Protects the promise of exactness: unsupported or contradictory settings are errors that name the setting."""
    with pytest.raises((ConfigError, CheckpointError), match=message):
        imported(case, tmp_path, config=changed(case, *change))


@pytest.mark.parametrize("target", ["models.stage2_dynamic.other.Dualformer", ["a"], None])
def test_unsupported_target(target):
    """Protects against reading another model family's file as ours."""
    with pytest.raises(ConfigError, match="not one of the supported"):
        import_published({"target": target, "params": {}}, GOLDEN / A / "model.ckpt")


def test_families_do_not_mix():
    """Protects against the first stage of one family under the transformer of the other."""
    config = {**config_of(U)["model"], "target": DQ_TRANSFORMER}
    with pytest.raises(ConfigError, match=r"config\.params: unknown"):
        import_published(config, MQ / U / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"does not fit its config: missing .*demasker"):
        import_published(MQ / M / "config.json", GOLDEN / A / "model.ckpt")


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
