"""The released DQ code's configurations, read as ours (spec/dq.md sections 0, 9, 10, 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dvq_rt.layout import ORDERS, TokenLayout
from runtimes.errors import ConfigError, short
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


class Variant(NamedTuple):
    """What a released stage-1 model is built of: targets of its encoder and router, and our name of the router."""

    encoder: str
    router: str
    kind: str


DUAL_ENCODER = "modules.dynamic_modules.EncoderDual.DualGrainEncoder"
TRIPLE_ENCODER = "modules.dynamic_modules.EncoderTriple.TripleGrainEncoder"
TOKENIZERS = {
    "models.stage1_dynamic.dqvae_dual_entropy.DualGrainVQModel": Variant(
        DUAL_ENCODER, "modules.dynamic_modules.RouterDual.DualGrainFixedEntropyRouter", "entropy"
    ),
    "models.stage1_dynamic.dqvae_dual_feat.DualGrainVQModel": Variant(
        DUAL_ENCODER, "modules.dynamic_modules.RouterDual.DualGrainFeatureRouter", "feature"
    ),
    "models.stage1_dynamic.dqvae_triple_feat.TripleGrainVQModel": Variant(
        TRIPLE_ENCODER, "modules.dynamic_modules.RouterTriple.TripleGrainFeatureRouter", "feature"
    ),
}
DECODER = "modules.dynamic_modules.Decoder.Decoder"
POSITIONAL_DECODER = "modules.dynamic_modules.DecoderPositional.Decoder"
QUANTIZER = "modules.vector_quantization.quantize2_mask.VectorQuantize2"
PLAIN_QUANTIZER = "modules.vector_quantization.quantize_codebook_mask.MaskVectorQuantize"
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
GATES = {"1layer-fc": "linear", "2layer-fc-SiLu": "silu", "2layer-fc-ReLu": "relu"}
"""gate_type -> ours; the last is the triple router's alone."""
BUDGETS = {  # section of the budget -> ours: names of the shares and of the grids
    "modules.dynamic_modules.budget.BudgetConstraint_RatioMSE_DualGrain": (
        {"fine": "target_ratio"},
        ("min_grain_size", "max_grain_size"),
    ),
    "modules.dynamic_modules.budget.BudgetConstraint_NormedSeperateRatioMSE_TripleGrain": (
        {"fine": "target_fine_ratio", "median": "target_median_ratio"},
        ("min_grain_size", "median_grain_size", "max_grain_size"),
    ),
}
ENCODER_OPTIONS = {
    **configs.ENCODER_OPTIONS,
    "router_config": Option("section"),
    "update_router": optional("flag", True),
}
ENTROPY_ROUTER_OPTIONS = {"json_path": Option("text"), "fine_grain_ratito": Option("number")}
FEATURE_ROUTER_OPTIONS = {
    "num_channels": Option("size"),
    "normalization_type": optional("text", "none"),
    "gate_type": optional("text", "1layer-fc"),
}
POSITION_OPTIONS = {"latent_size": optional("size", 32), "position_type": optional("text", "relative")}
QUANTIZER_OPTIONS = {
    **configs.QUANTIZER_OPTIONS,
    "accept_image_fmap": optional("flag", True),
    "channel_last": optional("flag", False),
}
PLAIN_QUANTIZER_OPTIONS = {
    "codebook_size": Option("size"),
    "codebook_dim": Option("size"),
    "commitment_beta": optional("number", 0.25),
    "use_cosine_sim": optional("flag", False),
    "accept_image_fmap": optional("flag", True),
    "channel_last": optional("flag", False),
}
PLAIN_QUANTIZER_PASSED_OVER = ("kmeans_init", "kmeans_iters", "orthogonal_reg_weight", "activate_mask_quantize")
TOKENIZER_OPTIONS = {
    "encoderconfig": Option("section"),
    "decoderconfig": Option("section"),
    "vqconfig": Option("section"),
    "quant_before_dim": Option("size"),
    "quant_after_dim": Option("size"),
}
ENTROPY_OPTIONS = {"entropy_patch_size": optional("size", 16), "image_size": optional("size", 256)}
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
    """A stage-1 configuration: our sizes, the path of the threshold table ("" for a feature router), the decoder's
    position type ("": it has none), and whether the codebook is a plain table, without moving averages."""

    config: DQVAEConfig
    json_path: str
    position_type: str
    plain_codebook: bool


def released_tokenizer(node: Any, where: str) -> ReleasedTokenizer:
    """Read a stage-1 section, called ``where`` in errors.

    Raises:
        ConfigError: names what contradicts itself or is not supported.
    """
    target = node.get("target") if isinstance(node, Mapping) else None
    if target not in list(TOKENIZERS):
        raise ConfigError(
            f"{where}.target is {short(target)}, which is not supported here; it must be one of {[*TOKENIZERS]}"
        )
    variant = TOKENIZERS[target]
    options = TOKENIZER_OPTIONS | (ENTROPY_OPTIONS if variant.kind == "entropy" else {})
    top = section(node, where, target, options, TOKENIZER_PASSED_OVER)
    encoder = section(top["encoderconfig"], f"{where}.encoderconfig", variant.encoder, ENCODER_OPTIONS, None)
    plain = top["decoderconfig"].get("target") == DECODER  # the trunk alone, without a position bias
    decoder = section(
        top["decoderconfig"],
        f"{where}.decoderconfig",
        DECODER if plain else POSITIONAL_DECODER,
        DECODER_OPTIONS if plain else {**DECODER_OPTIONS, **POSITION_OPTIONS},
        () if plain else ("window_size",),
    )
    plain_codebook = top["vqconfig"].get("target") == PLAIN_QUANTIZER
    quantizer = section(
        top["vqconfig"],
        f"{where}.vqconfig",
        PLAIN_QUANTIZER if plain_codebook else QUANTIZER,
        PLAIN_QUANTIZER_OPTIONS if plain_codebook else QUANTIZER_OPTIONS,
        PLAIN_QUANTIZER_PASSED_OVER if plain_codebook else (),
    )
    if plain_codebook:
        agree(f"{where}.vqconfig", quantizer, {"use_cosine_sim": False})
        quantizer |= {"decay": 0.99, "restart_unused_codes": False}  # only for training that goes on here
    position_type = "" if plain else decoder["position_type"]
    if not plain and position_type not in POSITION_BIAS:
        raise ConfigError(
            f"{where}.decoderconfig.position_type is {short(position_type)}, which the released code cannot "
            f"build either; it must be one of {list(POSITION_BIAS)}"
        )
    read_router = entropy_router if variant.kind == "entropy" else feature_router
    router, json_path = read_router(encoder, variant, where, node["params"].get("lossconfig"))
    config = DQVAEConfig(
        **tokenizer_sizes(encoder, decoder, quantizer),
        **router,
        position_bias="none" if plain else POSITION_BIAS[position_type],
        mask_weighted=False,
    )
    z, d, size = config.z_channels, config.code_dim, config.image_size
    agree(f"{where}.encoderconfig", encoder, {"in_channels": 3, "resamp_with_conv": True})
    wanted = {"in_ch": z, "out_ch": 3, "resolution": size, "resamp_with_conv": True, "give_pre_end": False}
    agree(f"{where}.decoderconfig", decoder, wanted)
    if config.position_bias != "none":
        agree(f"{where}.decoderconfig", decoder, {"latent_size": config.sides[-1]})
    agree(f"{where}.vqconfig", quantizer, {"accept_image_fmap": True, "channel_last": False})
    wanted = {"quant_before_dim": z, "quant_after_dim": d}
    if variant.kind == "entropy":
        wanted |= {"entropy_patch_size": config.stride, "image_size": size}
    agree(where, top, wanted)
    return ReleasedTokenizer(config, json_path, position_type, plain_codebook)


def entropy_router(
    encoder: Mapping[str, Any], variant: Variant, where: str, _: Any = None
) -> tuple[dict[str, Any], str]:
    """Fields of our configuration, and the path of the threshold table, of an encoder section's values."""
    where = f"{where}.encoderconfig.router_config"
    router = section(encoder["router_config"], where, variant.router, ENTROPY_ROUTER_OPTIONS)
    ratio = router["fine_grain_ratito"]
    key = int(100 - 100 * ratio)  # truncates as released: 0.55 gives 44 (spec Q12)
    if not 1 <= key <= 99:
        raise ConfigError(f"{where}: fine_grain_ratito is {short(ratio)}; the threshold table has 0.01 to 0.99 only")
    return {"fine_percent": 100 - key}, router["json_path"]


def feature_router(encoder: Mapping[str, Any], variant: Variant, where: str, loss: Any) -> tuple[dict[str, Any], str]:
    """As ``entropy_router``; the shares and the budget are those of the loss section, where it has them."""
    triple = variant.encoder == TRIPLE_ENCODER
    name = f"{where}.encoderconfig.router_config"
    router = section(encoder["router_config"], name, variant.router, FEATURE_ROUTER_OPTIONS)
    agree(name, router, {"num_channels": encoder["z_channels"]})
    if not triple:  # a router that never learns is no model of anybody's
        agree(f"{where}.encoderconfig", encoder, {"update_router": True})
    gates = [gate for gate in GATES if triple or GATES[gate] != "relu"]
    norm, groups = router["normalization_type"], router["normalization_type"].rpartition("-")[2]
    if router["gate_type"] not in gates:
        raise ConfigError(f"{name}.gate_type is {short(router['gate_type'])}; it must be one of {gates}")
    if norm != "none" and not ("group" in norm and groups.isdecimal()):
        raise ConfigError(
            f"{name}.normalization_type is {short(norm)}; it must be 'none' or 'group-N', such as group-32"
        )
    fields = {
        "grains": 3 if triple else 2,
        "router": "feature",
        "router_norm_groups": 0 if norm == "none" else int(groups),
        "router_gate": GATES[router["gate_type"]],
        "fine_percent": 30 if triple else 50,
        "median_percent": 30 if triple else 0,
        "budget": 0.0,
    }
    params = loss.get("params") if isinstance(loss, Mapping) else None
    budget = params.get("budget_loss_config") if isinstance(params, Mapping) else None
    return {**fields, **(read_budget(budget, f"{where}.lossconfig.budget_loss_config", triple) if budget else {})}, ""


def read_budget(node: Any, where: str, triple: bool) -> dict[str, Any]:
    """The shares and the factor of a budget section, which matter where training goes on. The released factor of two
    grains counts twice (spec Q21)."""
    target = list(BUDGETS)[triple]
    shares, sizes = BUDGETS[target]
    options = {name: optional("number", 0.0) for name in shares.values()} | {"gamma": optional("number", 1.0)}
    values = section(node, where, target, {**options, "calculate_all": optional("flag", True)}, sizes)
    ratios = {f"{grain}_percent": 100.0 * values[name] for grain, name in shares.items()}
    if not all(0 < ratio < 100 for ratio in ratios.values()) or sum(ratios.values()) >= 100:
        given = ", ".join(f"{name} {values[name]!r}" for name in shares.values())
        raise ConfigError(f"{where}: {given} cannot be met; the shares must be above 0 and add to less than 1")
    return {**ratios, "budget": float(values["gamma"]) * (2 if values["calculate_all"] and not triple else 1)}


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
