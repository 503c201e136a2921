"""The released DQ code's configurations, read as ours (spec/dq.md sections 0, 9, 10, 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dvq_rt.files import short
from dvq_rt.layout import ORDERS, TokenLayout
from runtimes.errors import ConfigError
from training.models.dqvae import DQVAEConfig
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

TOKENIZER = "models.stage1_dynamic.dqvae_dual_entropy.DualGrainVQModel"
ENCODER = "modules.dynamic_modules.EncoderDual.DualGrainEncoder"
ROUTER = "modules.dynamic_modules.RouterDual.DualGrainFixedEntropyRouter"
DECODER = "modules.dynamic_modules.Decoder.Decoder"
POSITIONAL_DECODER = "modules.dynamic_modules.DecoderPositional.Decoder"
QUANTIZER = "modules.vector_quantization.quantize2_mask.VectorQuantize2"
STACK = "modules.dynamic_modules.stackgpt.StackGPT"
PERMUTER = "modules.dynamic_modules.permuter.DualGrainSeperatePermuter"
CLASS_EVERYWHERE = "modules.dynamic_modules.label_provider.ClassAwareSOSProvider"
CLASS_IN_CONTENT = "modules.dynamic_modules.label_provider.ClassForContentOnlyPositionAwareSOSProvider"
UNCONDITIONAL = "modules.dynamic_modules.label_provider.PositionAwareSOSProvider"
TRANSFORMERS = {  # target -> (name of its start-token section, target of that section)
    "models.stage2_dynamic.dqtransformer_class2_entropy.Dualformer": ("class_cond_stage_config", CLASS_EVERYWHERE),
    "models.stage2_dynamic.dqtransformer_class.Dualformer": ("class_cond_stage_config", CLASS_IN_CONTENT),
    "models.stage2_dynamic.dqtransformer_uncond_entropy.Dualformer": ("uncond_stage_config", UNCONDITIONAL),
}
STARTS = {  # start-token section -> its parameters, and the vocabulary whose first start id each must be
    CLASS_EVERYWHERE: {
        "threshold_content": "content",
        "threshold_coarse_position": "coarse",
        "threshold_fine_position": "fine",
    },
    CLASS_IN_CONTENT: {"threshold": "content", "coarse_pos_sos": "coarse", "fine_pos_sos": "fine"},
    UNCONDITIONAL: {
        "coarse_sos": "content",
        "fine_sos": "content",
        "coarse_pos_sos": "coarse",
        "fine_pos_sos": "fine",
    },
}
POSITION_BIAS = {  # position_type -> ours; learned tables without Fourier features go unused (spec Q9)
    "fourier": "fourier",
    "fourier+learned": "fourier+learned",
    "learned": "none",
    "learned-relative": "none",
}
ENCODER_OPTIONS = {**configs.ENCODER_OPTIONS, "router_config": Option("section")}
POSITION_OPTIONS = {"latent_size": optional("size", 32), "position_type": optional("text", "relative")}
QUANTIZER_OPTIONS = {
    **configs.QUANTIZER_OPTIONS,
    "accept_image_fmap": optional("flag", True),
    "channel_last": optional("flag", False),
}
TOKENIZER_OPTIONS = {
    "encoderconfig": Option("section"),
    "decoderconfig": Option("section"),
    "vqconfig": Option("section"),
    "quant_before_dim": Option("size"),
    "quant_after_dim": Option("size"),
    "entropy_patch_size": optional("size", 16),
    "image_size": optional("size", 256),
}
TOKENIZER_PASSED_OVER = (*configs.TOKENIZER_PASSED_OVER, "quant_sample_temperature", "loss_with_epoch")
TRANSFORMER_PASSED_OVER = (*configs.TRANSFORMER_PASSED_OVER, "content_loss_weight", "position_loss_weight")
STACK_OPTIONS = {
    **configs.STACK_OPTIONS,
    "coarse_position_size": Option("size"),
    "fine_position_size": Option("size"),
    "segment_size": optional("integer", -1),
    "position_layer": optional("size", 12),
    "content_layer": optional("size", 12),
    "n_head": optional("size", 8),
    "n_embd": optional("size", 256),
    "content_pad_code": optional("integer", 1025),
    "coarse_position_pad_code": optional("integer", 257),
    "fine_position_pad_code": optional("integer", 1025),
    "activate_pad_ignore": optional("flag", True),
}
PERMUTER_OPTIONS = {
    "coarse_hw": optional("size", 16),
    "fine_hw": optional("size", 32),
    "content_pad_code": optional("size", 1024),
    "content_eos_code": optional("integer", 1025),
    "coarse_position_pad_code": optional("integer", 256),
    "coarse_position_eos_code": optional("integer", 257),
    "fine_position_pad_code": optional("integer", 1024),
    "fine_position_eos_code": optional("integer", 1025),
    "fine_position_order": optional("text", "region-first"),
}
SEGMENT_OPTIONS = {"coarse_seg_sos": Option("integer"), "fine_seg_sos": Option("integer")}


class ReleasedTokenizer(NamedTuple):
    """A stage-1 configuration: our sizes, the path of the threshold table, and the decoder's position type ("": it has
    none)."""

    config: DQVAEConfig
    json_path: str
    position_type: str


def released_tokenizer(node: Any, where: str) -> ReleasedTokenizer:
    """Read a stage-1 section, called ``where`` in errors.

    Raises:
        ConfigError: names what contradicts itself or is not supported.
    """
    top = section(node, where, TOKENIZER, TOKENIZER_OPTIONS, TOKENIZER_PASSED_OVER)
    encoder = section(top["encoderconfig"], f"{where}.encoderconfig", ENCODER, ENCODER_OPTIONS, None)
    router = section(
        encoder["router_config"],
        f"{where}.encoderconfig.router_config",
        ROUTER,
        {"json_path": Option("text"), "fine_grain_ratito": Option("number")},
    )
    plain = top["decoderconfig"].get("target") == DECODER  # the trunk alone, without a position bias
    decoder = section(
        top["decoderconfig"],
        f"{where}.decoderconfig",
        DECODER if plain else POSITIONAL_DECODER,
        DECODER_OPTIONS if plain else {**DECODER_OPTIONS, **POSITION_OPTIONS},
        () if plain else ("window_size",),
    )
    quantizer = section(top["vqconfig"], f"{where}.vqconfig", QUANTIZER, QUANTIZER_OPTIONS)
    position_type = "" if plain else decoder["position_type"]
    if not plain and position_type not in POSITION_BIAS:
        raise ConfigError(
            f"{where}.decoderconfig.position_type is {short(position_type)}, which the released code cannot "
            f"build either; it must be one of {list(POSITION_BIAS)}"
        )
    ratio = router["fine_grain_ratito"]
    key = int(100 - 100 * ratio)  # truncates as released: 0.55 gives 44 (spec Q12)
    if not 1 <= key <= 99:
        raise ConfigError(f"{where}: fine_grain_ratito is {short(ratio)}; the threshold table has 0.01 to 0.99 only")
    config = DQVAEConfig(
        **tokenizer_sizes(encoder, decoder, quantizer),
        position_bias="none" if plain else POSITION_BIAS[position_type],
        fine_percent=100 - key,
        mask_weighted=False,
    )
    z, d, size = config.z_channels, config.code_dim, config.image_size
    agree(f"{where}.encoderconfig", encoder, {"in_channels": 3, "resamp_with_conv": True})
    wanted = {"in_ch": z, "out_ch": 3, "resolution": size, "resamp_with_conv": True, "give_pre_end": False}
    agree(f"{where}.decoderconfig", decoder, wanted)
    if config.position_bias != "none":
        agree(f"{where}.decoderconfig", decoder, {"latent_size": config.sides[1]})
    agree(f"{where}.vqconfig", quantizer, {"accept_image_fmap": True, "channel_last": False})
    wanted = {"quant_before_dim": z, "quant_after_dim": d, "entropy_patch_size": config.stride, "image_size": size}
    agree(where, top, wanted)
    return ReleasedTokenizer(config, router["json_path"], position_type)


def released_transformer(config: Mapping[str, Any]) -> ReleasedTransformer:
    """Read a stage-2 configuration, whose ``target`` is a key of TRANSFORMERS.

    Raises:
        ConfigError: names what contradicts itself or is not supported.
    """
    start_name, provider = TRANSFORMERS[config["target"]]
    options = {
        **{n: Option("section") for n in ("transformer_config", "first_stage_config", "permuter_config", start_name)},
        "activate_sos_for_fine_sequence": optional("flag", True),
    }
    values = section(config, "config", config["target"], options, TRANSFORMER_PASSED_OVER)
    agree("config", values, {"activate_sos_for_fine_sequence": True})
    layout = released_layout(values["permuter_config"], values[start_name], start_name, provider)
    sizes = transformer_config(values["transformer_config"], layout)
    return ReleasedTransformer(sizes, layout, values["first_stage_config"], {})


def released_layout(permuter: Any, start: Any, start_name: str, provider: str) -> TokenLayout:
    """The token layout of a permuter section and a start-token section.

    Args:
        start_name: the start-token section's name, for errors.
        provider: its target, a key of STARTS.

    Raises:
        ConfigError: an id is not the one that the sizes imply.
    """
    values = section(permuter, "permuter_config", PERMUTER, PERMUTER_OPTIONS)
    if values["fine_position_order"] not in ORDERS:
        raise ConfigError(
            f"permuter_config.fine_position_order is {short(values['fine_position_order'])}; it must be one of {ORDERS}"
        )
    agree("permuter_config", values, {"fine_hw": 2 * values["coarse_hw"]})
    names = STARTS[provider]
    options = {**{name: Option("integer") for name in names}, **SEGMENT_OPTIONS}
    if provider != UNCONDITIONAL:
        options["n_classes"] = Option("size")
    starts = section(start, start_name, provider, options)
    layout = TokenLayout(
        codebook_size=values["content_pad_code"],
        sides=(values["coarse_hw"], values["fine_hw"]),
        order=values["fine_position_order"],
        classes=starts.get("n_classes", 0),
        label_in_position=provider != CLASS_IN_CONTENT,
    )
    wanted = {
        "content_eos_code": layout.content_eos,
        "coarse_position_pad_code": layout.position_pad(0),
        "coarse_position_eos_code": layout.position_eos(0),
        "fine_position_pad_code": layout.position_pad(1),
        "fine_position_eos_code": layout.position_eos(1),
    }
    agree("permuter_config", values, wanted)
    ids = {"content": layout.content_sos, "coarse": layout.position_sos(0), "fine": layout.position_sos(1)}
    wanted = {**{name: ids[kind] for name, kind in names.items()}, "coarse_seg_sos": 0, "fine_seg_sos": 1}
    agree(start_name, starts, wanted)
    return layout


def transformer_config(stack: Any, layout: TokenLayout) -> TransformerConfig:
    """A released StackGPT section as our sizes.

    Raises:
        ConfigError: a size contradicts the layout, or an option is not supported.
    """
    values = section(stack, "transformer_config", STACK, STACK_OPTIONS)
    segment_embedding = values["segment_size"] > 0
    wanted = {
        "vocab_size": layout.content_vocabulary,
        "coarse_position_size": layout.position_vocabulary(0),
        "fine_position_size": layout.position_vocabulary(1),
        "content_pad_code": layout.content_pad,
        "coarse_position_pad_code": layout.position_pad(0),
        "fine_position_pad_code": layout.position_pad(1),
        "activate_pad_ignore": True,
    }
    if segment_embedding:
        wanted["segment_size"] = layout.segments
    agree("transformer_config", values, wanted)
    return stack_sizes(values, layout, values["content_layer"], segment_embedding=segment_embedding)
