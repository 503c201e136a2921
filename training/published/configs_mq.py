"""The released MQ code's configurations, read as ours (spec/mq.md sections 1 to 5).

The kept ratio is not stored in the weights: that of a stage-2 configuration's first stage holds, even where stage 1 was
trained with another one (Q24).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvq_rt.files import short
from dvq_rt.layout import UNORDERED, TokenLayout
from runtimes.errors import ConfigError
from training.models.mqvae import MQVAEConfig
from training.models.transformer import TransformerConfig
from training.published import configs
from training.published.configs import (
    DECODER_OPTIONS,
    Option,
    ReleasedTransformer,
    agree,
    optional,
    section,
    stack_sizes,
    tokenizer_sizes,
)

MQ_TOKENIZER = "models.stage1_masked.mqvae.MaskedVectorQuantizationModel"
MQ_CLASS = "models.stage2_masked.stackformer_class.ClassTransformer"
MQ_UNCONDITIONAL = "models.stage2_masked.stackformer_uncond.ReverseStackformer"
MQ_TRANSFORMERS = (MQ_CLASS, MQ_UNCONDITIONAL)
ENCODER = "modules.diffusionmodules.model.Encoder"
DECODER = "modules.masked_quantization.decoder.Decoder"
DEMASKER = "modules.masked_quantization.demasker_vanilla.VanillaDemasker"
QUANTIZER = "modules.vector_quantization.quantize2.VectorQuantize2"
MASKERS = {  # target -> (the one mode that it accepts, our scorer)
    "modules.masked_quantization.masker_vanilla_refine.VanillaMasker": ("2layer", "conv"),
    "modules.masked_quantization.masker_vanilla.VanillaMasker": ("2layer-fc", "token"),
}
STACKS = {  # target -> the head that draws first
    "modules.masked_quantization_stage2.stackedgpt.ReverseStackedPositionGPT": "content",
    "modules.masked_quantization_stage2.stackedgpt.StackedPositionGPT": "position",
}
RASTER = "modules.masked_quantization_stage2.permuter.raster_scan_permuter"
IDENTITY = "modules.masked_quantization_stage2.permuter.identity_permuter"

TOKENIZER_OPTIONS = {
    name: Option("section")
    for name in ("encoder_config", "decoder_config", "masker_config", "demasker_config", "vqconfig")
}
ENCODER_OPTIONS = {**configs.ENCODER_OPTIONS, "double_z": Option("flag")}
MASKER_OPTIONS = {
    "topk_ratio": Option("number"),
    "input_token_num": Option("size"),
    "input_dim": Option("size"),
    "patch_size": Option("size"),
    "score_pred_net_mode": Option("text"),
    "codebook_dim": Option("size"),
}
DEMASKER_OPTIONS = {
    "codebook_dim": Option("size"),
    "output_dim": Option("size"),
    "height_and_width": Option("size"),
    "n_layer": Option("size"),
    "mask_init_value": optional("number", 0.02),
}
QUANTIZER_OPTIONS = {
    **configs.QUANTIZER_OPTIONS,
    "accept_image_fmap": Option("flag"),
    "channel_last": Option("flag"),
    "commit_loss_legacy": optional("flag", True),
}
STACK_OPTIONS = {
    **configs.STACK_OPTIONS,
    **{name: Option("size") for name in ("position_size", "n_head", "n_embd", "position_layer", "value_layer")},
    "n_unmasked": optional("integer", 0),
    "add_absolute_position": Option("flag"),
}
TRANSFORMER_OPTIONS = {
    "transformer_config": Option("section"),
    "first_stage_config": Option("section"),
    "position_value_permuter_config": optional("section", {"target": IDENTITY}),
    "sos_pos_token": Option("integer"),
    "height_and_weight": optional("size", 16),  # sic
}
TRANSFORMER_PASSED_OVER = (
    *configs.TRANSFORMER_PASSED_OVER,
    "add_absolute_position",  # unlike the stack's own, read by the optimizer alone (Q19)
    "loss_position_weight",
    "pkeep",
    "first_stage_key",
    "cond_stage_key",
)


def released_mq_tokenizer(node: Any, where: str) -> MQVAEConfig:
    """Read a stage-1 section, called ``where`` in errors.

    Raises:
        ConfigError: names what contradicts itself or is not supported.
    """
    top = section(node, where, MQ_TOKENIZER, TOKENIZER_OPTIONS, configs.TOKENIZER_PASSED_OVER)
    encoder = section(top["encoder_config"], f"{where}.encoder_config", ENCODER, ENCODER_OPTIONS, ("out_ch",))
    decoder = section(top["decoder_config"], f"{where}.decoder_config", DECODER, DECODER_OPTIONS)
    target = top["masker_config"].get("target")
    if target not in list(MASKERS):
        raise ConfigError(
            f"{where}.masker_config.target is {short(target)}, which is not supported here; "
            f"it must be one of {[*MASKERS]}"
        )
    masker = section(top["masker_config"], f"{where}.masker_config", target, MASKER_OPTIONS)
    demasker = section(top["demasker_config"], f"{where}.demasker_config", DEMASKER, DEMASKER_OPTIONS)
    quantizer = section(top["vqconfig"], f"{where}.vqconfig", QUANTIZER, QUANTIZER_OPTIONS)
    mode, scorer = MASKERS[target]
    config = MQVAEConfig(
        **tokenizer_sizes(encoder, decoder, quantizer),
        kept_ratio=float(masker["topk_ratio"]),
        scorer=scorer,
        demask_blocks=demasker["n_layer"],
        mask_damping=float(demasker["mask_init_value"]),
    )
    (side,), d = config.sides, config.code_dim
    agree(f"{where}.encoder_config", encoder, {"in_channels": 3, "resamp_with_conv": True, "double_z": False})
    wanted = {"out_ch": 3, "resolution": config.image_size, "resamp_with_conv": True, "give_pre_end": False}
    agree(f"{where}.decoder_config", decoder, wanted)
    wanted = {"input_token_num": side**2, "input_dim": config.z_channels, "patch_size": config.stride}
    agree(f"{where}.masker_config", masker, {**wanted, "codebook_dim": d, "score_pred_net_mode": mode})
    width = config.decoder_channels * config.decoder_mult[-1]
    wanted = {"codebook_dim": d, "output_dim": width, "height_and_width": side}
    agree(f"{where}.demasker_config", demasker, wanted)
    wanted = {"accept_image_fmap": False, "channel_last": False, "commit_loss_legacy": True}
    agree(f"{where}.vqconfig", quantizer, wanted)
    return config


def released_mq_transformer(config: Mapping[str, Any]) -> ReleasedTransformer:
    """Read a stage-2 configuration, whose ``target`` is one of MQ_TRANSFORMERS.

    A model that was trained without a raster permuter has seen its cells by importance, so for it positions are to be
    drawn, not visited in order.

    Raises:
        ConfigError: names what contradicts itself or is not supported.
    """
    start = "n_classes" if config["target"] == MQ_CLASS else "sos_token"
    options = {**TRANSFORMER_OPTIONS, start: Option("size")}
    values = section(config, "config", config["target"], options, TRANSFORMER_PASSED_OVER)
    permuter = values["position_value_permuter_config"].get("target")
    if permuter not in (RASTER, IDENTITY):
        raise ConfigError(
            f"position_value_permuter_config.target is {short(permuter)}, which is not supported here; "
            f"it must be one of {[RASTER, IDENTITY]}"
        )
    section(values["position_value_permuter_config"], "position_value_permuter_config", permuter, {})
    tokenizer = released_mq_tokenizer(values["first_stage_config"], "first_stage_config")
    order = UNORDERED if permuter == IDENTITY else "row-first"
    layout = TokenLayout(**tokenizer.layout(), order=order, classes=values.get("n_classes", 0))
    wanted = {"sos_pos_token": layout.position_sos(0), "height_and_weight": layout.sides[0]}
    agree("config", values, wanted if start == "n_classes" else {**wanted, "sos_token": layout.content_sos})
    sizes = stack_config(values["transformer_config"], layout)
    defaults = {"positions": "drawn"} if permuter == IDENTITY else {}
    return ReleasedTransformer(sizes, layout, values["first_stage_config"], defaults)


def stack_config(stack: Any, layout: TokenLayout) -> TransformerConfig:
    """A released StackedPositionGPT section (ReverseStackedPositionGPT where ``layout.first`` is ``content``) as our
    sizes.

    Raises:
        ConfigError: a size contradicts the layout, or an option is not supported.
    """
    target = next(name for name, first in STACKS.items() if first == layout.first)
    values = section(stack, "transformer_config", target, STACK_OPTIONS)
    wanted = {"vocab_size": layout.content_vocabulary, "position_size": layout.position_head, "n_unmasked": 0}
    agree("transformer_config", values, wanted)
    index_embedding = values["add_absolute_position"]
    return stack_sizes(values, layout, values["value_layer"], segment_embedding=False, index_embedding=index_embedding)
