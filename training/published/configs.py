"""What reading the released configurations of both families has in common.

A released configuration is a tree of ``{target, params}`` sections. Every parameter that changes what the model
computes is read, checked and carried over; whatever cannot be reproduced exactly is refused by name. Dropout rates are
those of the encoder and of the residual branches; the released code can set the decoder's and the embeddings' apart.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dvq_rt.files import guard, open_regular, parse_json, short
from dvq_rt.layout import TokenLayout
from runtimes.errors import ConfigError
from training.models.transformer import TransformerConfig

KINDS = {
    "size": "a positive integer",
    "integer": "an integer",
    "sizes": "a list of positive integers",
    "number": "a finite number",
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
QUANTIZER_OPTIONS = {
    "codebook_size": Option("size"),
    "codebook_dim": Option("size"),
    "commitment_beta": optional("number", 0.25),
    "decay": optional("number", 0.99),
    "restart_unused_codes": optional("flag", True),
}
STACK_OPTIONS = {
    **{name: Option("size") for name in ("vocab_size", "block_size")},
    **{name: optional("number", 0.0) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")},
}
TRANSFORMER_PASSED_OVER = ("weight_decay", "warmup_epochs", "monitor", "ckpt_path", "ignore_keys")
TOKENIZER_PASSED_OVER = (*TRANSFORMER_PASSED_OVER[1:], "lossconfig", "image_key", "scheduler_type")


MAX_BYTES = 1 << 20
"""Of a configuration file."""


class PlainLoader(yaml.SafeLoader):
    """Values without references to one another, a few of which can stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not read; write the values out")
        return super().compose_node(parent, index)


def read_released_config(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The ``{target, params}`` mapping of a mapping or a JSON or YAML file, from under ``model:`` where there is one.

    Raises:
        ConfigError: the file cannot be read, or there is no such mapping.
    """
    values: Any = source
    if isinstance(source, str | Path):
        mend = "give the released JSON or YAML configuration"
        with guard(ConfigError, f"{source} cannot be read", mend), open_regular(source, MAX_BYTES) as file:
            text = file.read(MAX_BYTES).decode()
            values = parse_json(text) if Path(source).suffix == ".json" else yaml.load(text, PlainLoader)
    if isinstance(values, Mapping) and "target" not in values:
        values = values.get("model")
    if not isinstance(values, Mapping) or "target" not in values:
        name = source if isinstance(source, str | Path) else "the configuration"
        raise ConfigError(f"{name} has no target, neither at the top nor under 'model'; give a released configuration")
    return values


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of a kind of KINDS; numbers must be ones that floats hold."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "size":
        return whole and value > 0
    if kind == "sizes":
        return isinstance(value, list | tuple) and all(fits(v, "size") for v in value)
    if kind == "number":
        return (whole or isinstance(value, float)) and abs(value) <= sys.float_info.max
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
        raise ConfigError(f"{where}.target is {short(given)}, which is not supported here; it must be {target!r}")
    params = node.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{where}.params is {short(params)}; it must be a mapping")
    unknown = [] if passed_over is None else sorted(map(str, set(params) - set(options) - set(passed_over)))
    missing = sorted(name for name, option in options.items() if option.required and name not in params)
    if unknown or missing:
        raise ConfigError(f"{where}.params: unknown {short(unknown)}, missing {missing}; there are {sorted(options)}")
    out = {name: params.get(name, option.default) for name, option in options.items()}
    for name, value in out.items():
        if not fits(value, options[name].kind):
            raise ConfigError(f"{where}.params.{name} is {short(value)}; it must be {KINDS[options[name].kind]}")
    return out


def agree(where: str, values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse values that differ from the only supported ones, or from what the rest of the configuration implies."""
    wrong = [
        f"{name} is {short(values[name])}, not {value!r}" for name, value in wanted.items() if values[name] != value
    ]
    if wrong:
        raise ConfigError(
            f"{where}: {', '.join(wrong)}; the rest of the configuration implies the latter, or only that is supported"
        )


class ReleasedTransformer(NamedTuple):
    """A stage-2 configuration: our sizes, the token layout, the section of the first stage, and the sampling parameters
    to recommend where ours by default would not suit."""

    config: TransformerConfig
    layout: TokenLayout
    first_stage: Mapping[str, Any]
    defaults: dict[str, Any]


def tokenizer_sizes(
    encoder: Mapping[str, Any], decoder: Mapping[str, Any], quantizer: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that both families' tokenizer configurations have in common, of the values of their sections."""
    return {
        "image_size": encoder["resolution"],
        "channels": encoder["ch"],
        "encoder_mult": tuple(encoder["ch_mult"]),
        "decoder_channels": decoder["ch"],
        "decoder_mult": tuple(decoder["ch_mult"]),
        "blocks": encoder["num_res_blocks"],
        "decoder_blocks": decoder["num_res_blocks"],
        "attention": tuple(encoder["attn_resolutions"]),
        "decoder_attention": tuple(decoder["attn_resolutions"]),
        "z_channels": encoder["z_channels"],
        "codebook_size": quantizer["codebook_size"],
        "code_dim": quantizer["codebook_dim"],
        "norm_groups": 32,
        "dropout": float(encoder["dropout"]),
        "beta": float(quantizer["commitment_beta"]),
        "decay": float(quantizer["decay"]),
        "restart_below": 1.0 if quantizer["restart_unused_codes"] else 0.0,
    }


def stack_sizes(
    stack: Mapping[str, Any], layout: TokenLayout, content_blocks: int, **embeddings: bool
) -> TransformerConfig:
    """The sizes of a released stack's values; ``embeddings`` are further arguments of the TransformerConfig.

    Raises:
        ConfigError: ``block_size`` is too small for the layout.
    """
    if stack["block_size"] < layout.max_length:
        raise ConfigError(
            f"transformer_config.block_size is {stack['block_size']}, but an image has up to {layout.max_length} "
            "tokens; the released code would fail on it; give a block_size that holds them"
        )
    return TransformerConfig(
        width=stack["n_embd"],
        heads=stack["n_head"],
        position_blocks=stack["position_layer"],
        content_blocks=content_blocks,
        block_size=stack["block_size"],
        dropout=float(stack["resid_pdrop"]),
        attention_dropout=float(stack["attn_pdrop"]),
        **embeddings,
    )
