"""The released DQ code's configurations, read as ours (spec/dq.md sections 0, 9, 10, 11), and what the reading of
the released MQ code's (``training.published.configs_mq``) shares with it.

A released configuration is a tree of ``{target, params}`` sections. Every parameter that changes what the model
computes is read, checked and carried over; whatever cannot be reproduced exactly is refused by name. Dropout rates are
those of the encoder and of the residual branches; the released code can set the decoder's and the embeddings' apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dvq_rt.layout import ORDERS, TokenLayout
from runtimes.errors import ConfigError
from training.models.dqvae import DQVAEConfig
from training.models.transformer import TransformerConfig

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

KINDS = {
    "size": "a positive integer",
    "integer": "an integer",
    "sizes": "a list of positive integers",
    "number": "a number",
    "flag": "true or false",
    "text": "a string",
    "section": "a section with target and params",
}


class Option(NamedTuple):
    """One parameter of a released section: its kind (a key of KINDS) and its default, which the released class has."""

    kind: str
    default: Any = None
    required: bool = True


def optional(kind: str, value: Any) -> Option:
    """A parameter that may be left out, with the released class's default."""
    return Option(kind, value, False)


ENCODER_OPTIONS = {
    "ch": Option("size"),
    "ch_mult": optional("sizes", [1, 2, 4, 8]),
    "num_res_blocks": Option("size"),
    "attn_resolutions": Option("sizes"),
    "dropout": optional("number", 0.0),
    "resamp_with_conv": optional("flag", True),
    "in_channels": Option("size"),
    "resolution": Option("size"),
    "z_channels": Option("size"),
    "router_config": Option("section"),
}
DECODER_OPTIONS = {
    "ch": Option("size"),
    "in_ch": Option("size"),
    "out_ch": Option("size"),
    "ch_mult": Option("sizes"),
    "num_res_blocks": Option("size"),
    "resolution": Option("size"),
    "attn_resolutions": Option("sizes"),
    "dropout": optional("number", 0.0),
    "resamp_with_conv": optional("flag", True),
    "give_pre_end": optional("flag", False),
}
POSITION_OPTIONS = {"latent_size": optional("size", 32), "position_type": optional("text", "relative")}
QUANTIZER_OPTIONS = {
    "codebook_size": Option("size"),
    "codebook_dim": Option("size"),
    "accept_image_fmap": optional("flag", True),
    "channel_last": optional("flag", False),
    "commitment_beta": optional("number", 0.25),
    "decay": optional("number", 0.99),
    "restart_unused_codes": optional("flag", True),
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
TOKENIZER_PASSED_OVER = (
    "lossconfig",
    "quant_sample_temperature",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "monitor",
    "warmup_epochs",
    "loss_with_epoch",
    "scheduler_type",
)
TRANSFORMER_PASSED_OVER = (
    "content_loss_weight",
    "position_loss_weight",
    "weight_decay",
    "warmup_epochs",
    "monitor",
    "ckpt_path",
    "ignore_keys",
)
STACK_OPTIONS = {
    "vocab_size": Option("size"),
    "coarse_position_size": Option("size"),
    "fine_position_size": Option("size"),
    "segment_size": optional("integer", -1),
    "block_size": Option("size"),
    "position_layer": optional("size", 12),
    "content_layer": optional("size", 12),
    "n_head": optional("size", 8),
    "n_embd": optional("size", 256),
    "embd_pdrop": optional("number", 0.0),
    "resid_pdrop": optional("number", 0.0),
    "attn_pdrop": optional("number", 0.0),
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


def read_released_config(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The ``{target, params}`` mapping of a mapping or a JSON or YAML file, from under ``model:`` where there is one.

    Raises:
        ConfigError: the file cannot be read, or there is no such mapping.
    """
    values: Any = source
    if isinstance(source, str | Path):
        path = Path(source)
        try:
            text = path.read_text()
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; give the released JSON or YAML configuration") from None
    if isinstance(values, Mapping) and "target" not in values:
        values = values.get("model")
    if not isinstance(values, Mapping) or "target" not in values:
        name = source if isinstance(source, str | Path) else "the configuration"
        raise ConfigError(f"{name} has no target, neither at the top nor under 'model'; give a released configuration")
    return values


def _fits(value: Any, kind: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "size":
        return whole and value > 0
    if kind == "sizes":
        return isinstance(value, list | tuple) and all(_fits(v, "size") for v in value)
    if kind == "number":
        return whole or (isinstance(value, float) and math.isfinite(value))
    if kind == "section":
        return isinstance(value, Mapping)
    return whole if kind == "integer" else isinstance(value, bool if kind == "flag" else str)


def section(
    node: Any,
    where: str,
    target: str,
    options: Mapping[str, Option],
    passed_over: Sequence[str] | None = (),
) -> dict[str, Any]:
    """The parameters of a ``{target, params}`` section, defaults filled in.

    Args:
        where: the section's name, for errors.
        target: the supported target.
        options: the parameters that matter.
        passed_over: further parameters without a meaning for the model; None passes over every other.

    Raises:
        ConfigError: names the target or parameter that is missing, unknown or of the wrong kind.
    """
    given = node.get("target") if isinstance(node, Mapping) else None
    if given != target:
        raise ConfigError(f"{where}.target is {given!r}, which is not supported here; it must be {target!r}")
    params = node.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{where}.params is {params!r}; it must be a mapping")
    unknown = [] if passed_over is None else sorted(map(str, set(params) - set(options) - set(passed_over)))
    missing = sorted(name for name, option in options.items() if option.required and name not in params)
    if unknown or missing:
        raise ConfigError(f"{where}.params: unknown {unknown}, missing {missing}; there are {sorted(options)}")
    out = {name: params.get(name, option.default) for name, option in options.items()}
    for name, value in out.items():
        if not _fits(value, options[name].kind):
            raise ConfigError(f"{where}.params.{name} is {value!r}; it must be {KINDS[options[name].kind]}")
    return out


def agree(where: str, values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse values that differ from the only supported ones, or from what the rest of the configuration implies."""
    wrong = [f"{name} is {values[name]!r}, not {value!r}" for name, value in wanted.items() if values[name] != value]
    if wrong:
        raise ConfigError(
            f"{where}: {', '.join(wrong)}; the rest of the configuration implies the latter, or only that is supported"
        )


class ReleasedTokenizer(NamedTuple):
    """A stage-1 configuration: our sizes, the path of the threshold table, and the decoder's position type ("": it has
    none)."""

    config: DQVAEConfig
    json_path: str
    position_type: str


class ReleasedTransformer(NamedTuple):
    """A stage-2 configuration: our sizes, the token layout, the section of the first stage, and the sampling parameters
    to recommend where ours by default would not suit."""

    config: TransformerConfig
    layout: TokenLayout
    first_stage: Mapping[str, Any]
    defaults: dict[str, Any]


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
            f"{where}.decoderconfig.position_type is {position_type!r}, which the released code cannot build either; "
            f"it must be one of {list(POSITION_BIAS)}"
        )
    ratio = router["fine_grain_ratito"]
    key = int(100 - 100 * ratio)  # truncates as released: 0.55 gives 44 (spec Q12)
    if not 1 <= key <= 99:
        raise ConfigError(f"{where}: fine_grain_ratito is {ratio!r}; the threshold table has 0.01 to 0.99 only")
    config = DQVAEConfig(
        image_size=encoder["resolution"],
        channels=encoder["ch"],
        encoder_mult=tuple(encoder["ch_mult"]),
        decoder_channels=decoder["ch"],
        decoder_mult=tuple(decoder["ch_mult"]),
        blocks=encoder["num_res_blocks"],
        decoder_blocks=decoder["num_res_blocks"],
        attention=tuple(encoder["attn_resolutions"]),
        decoder_attention=tuple(decoder["attn_resolutions"]),
        z_channels=encoder["z_channels"],
        codebook_size=quantizer["codebook_size"],
        code_dim=quantizer["codebook_dim"],
        norm_groups=32,
        dropout=float(encoder["dropout"]),
        position_bias="none" if plain else POSITION_BIAS[position_type],
        fine_percent=100 - key,
        beta=float(quantizer["commitment_beta"]),
        decay=float(quantizer["decay"]),
        restart_below=1.0 if quantizer["restart_unused_codes"] else 0.0,
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
            f"permuter_config.fine_position_order is {values['fine_position_order']!r}; it must be one of {ORDERS}"
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
    if values["block_size"] < layout.max_length:
        raise ConfigError(
            f"transformer_config.block_size is {values['block_size']}, but an image that is fine everywhere has "
            f"{layout.max_length} tokens; the released code would fail on it"
        )
    return TransformerConfig(
        width=values["n_embd"],
        heads=values["n_head"],
        position_blocks=values["position_layer"],
        content_blocks=values["content_layer"],
        block_size=values["block_size"],
        dropout=float(values["resid_pdrop"]),
        attention_dropout=float(values["attn_pdrop"]),
        segment_embedding=segment_embedding,
    )
