"""Import of checkpoints of the released code: ``python -m training.import_published CONFIG CKPT --out DIR``.

CONFIG is the released configuration (JSON or YAML, ``target`` and ``params``, on its own or under ``model:``), CKPT the
Lightning file it was trained to. Read are the three DQ-VAEs (two grains, by entropy or a learned gate, and three by a
learned gate), the three DQ-Transformers of two grains, the MQ-VAE and both Stackformers. Whatever cannot be reproduced
exactly is refused by name.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtimes.errors import CheckpointError, ConfigError, short
from training.checkpoint import Model, save_checkpoint
from training.cli import guarded
from training.models.dqvae import DQVAE
from training.models.mqvae import MQVAE
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer
from training.published.configs import ReleasedTransformer, agree, read_released_config
from training.published.configs_dq import TOKENIZERS, TRANSFORMERS, released_tokenizer, released_transformer
from training.published.configs_mq import MQ_TOKENIZER, MQ_TRANSFORMERS, released_mq_tokenizer, released_mq_transformer
from training.published.weights import (
    find_file,
    new_released,
    read_state,
    read_thresholds,
    released_transformer_state,
    tokenizer_sources,
    transformer_sources,
)

AUTO = "auto"
BINS = {"zero": 0.0, "model": -1.0}
"""Values of the first entropy bin, by name."""
ZERO_ENTROPY = 1e-30
"""Above the first percentile of a table made with bins from zero, which see nothing in dark patches; far below that of
any made with bins from -1."""

TEXT_TARGETS = ("t2i", "text2image")
"""What the names of the released text-to-image classes hold."""


def import_published(
    config: Mapping[str, Any] | str | Path, ckpt: str | Path, base: str | Path | None = None, bins: str = AUTO
) -> Model:
    """A released checkpoint as our model, float32, in eval mode.

    Args:
        config: the released configuration: a mapping, or a JSON or YAML file.
        ckpt: a file with a ``state_dict``, read without executing anything in it. Training losses and causal-mask
            buffers in it are passed over.
        base: folder that the configuration's own paths (threshold table, first-stage checkpoint) start from; the
            configuration file's folder when left out. The checkpoint's folder and the working directory come next.
        bins: grey values of the first entropy bin of a DQ-VAE (spec/dq.md Q14): ``zero``, as in the released threshold
            script and in the code that the released weights were trained with; ``model``, -1, as in the code since; or
            ``auto``, which tells by the table: only with bins from zero are its first percentiles zero.

    Returns:
        Model; its ``transformer`` is None for a stage-1 file. Its ``tokenizer`` is None for a stage-2 file that has
        no ``first_stage_model.*`` tensors and whose configuration's ``ckpt_path`` does not exist.

    Raises:
        ConfigError: the configuration is unreadable, contradicts itself, or asks for what is not supported.
        CheckpointError: the file is unreadable or would execute code, or a tensor is missing, unknown or misshapen.
    """
    if bins not in (AUTO, *BINS):
        raise ConfigError(f"bins are {short(bins)}; they must be one of {[AUTO, *BINS]}")
    if isinstance(config, str | Path):
        base = Path(config).parent if base is None else base
    node, ckpt = read_released_config(config), Path(ckpt)
    folders = [*([Path(base)] if base is not None else []), ckpt.parent, Path()]
    target = node["target"]
    read_dq, read_mq = partial(_dq_tokenizer, bins=bins), partial(_mq_tokenizer, bins=bins)
    stage_1: dict[str, ReadTokenizer] = {**dict.fromkeys(TOKENIZERS, read_dq), MQ_TOKENIZER: read_mq}
    stage_2: dict[str, tuple[Callable[[Any], ReleasedTransformer], ReadTokenizer]] = {
        **dict.fromkeys(TRANSFORMERS, (released_transformer, read_dq)),
        **dict.fromkeys(MQ_TRANSFORMERS, (released_mq_transformer, read_mq)),
    }
    if target in list(stage_1):
        return Model(stage_1[target](node, "config", read_state(ckpt), str(ckpt), folders, "")).eval()
    if isinstance(target, str) and any(word in target for word in TEXT_TARGETS):
        raise ConfigError(
            f"config.target is {short(target)}, a text-to-image class: the released code lacks its transformer, and no "
            "checkpoint of one was released; train one with the section 'text' (docs/prompts.md)"
        )
    if target not in list(stage_2):
        raise ConfigError(f"config.target is {short(target)}, not one of the supported {[*stage_1, *stage_2]}")
    read_transformer, read_tokenizer = stage_2[target]
    released = read_transformer(node)
    parts: dict[str, dict[str, Tensor]] = {"transformer.": {}, "first_stage_model.": {}, "": {}}
    for name, tensor in read_state(ckpt).items():
        prefix = next(p for p in parts if name.startswith(p))
        parts[prefix][name.removeprefix(prefix)] = tensor
    if parts[""]:
        raise CheckpointError(f"{ckpt} does not fit its config: unknown {short(sorted(parts['']))}")
    layout = released.layout
    stack = released_transformer_state(layout, parts["transformer."])
    transformer = new_released(
        lambda: StackedTransformer(released.config, layout), stack, transformer_sources, str(ckpt), "transformer."
    )
    tokenizer = _first_stage(read_tokenizer, released.first_stage, parts["first_stage_model."], ckpt, folders)
    if tokenizer is not None:
        agree(
            "first_stage_config",
            {"codebook_size": tokenizer.config.codebook_size, "cells per side": tokenizer.config.sides},
            {"codebook_size": layout.codebook_size, "cells per side": layout.sides},
        )
    names = tuple(str(label) for label in range(layout.classes))
    return Model(tokenizer, transformer, names, released.defaults).eval()


ReadTokenizer = Callable[[Any, str, Mapping[str, Tensor], str, Sequence[Path], str], Tokenizer]
"""(section, its name, released tensors, their file, folders of further files, prefix cut off) -> tokenizer."""


def _dq_tokenizer(
    node: Any, where: str, state: Mapping[str, Tensor], source: str, folders: Sequence[Path], prefix: str, *, bins: str
) -> Tokenizer:
    """The DQ-VAE of a released stage-1 section and its tensors."""
    released = released_tokenizer(node, where)
    ignored: tuple[str, ...] = ("loss.",)
    config, extra = released.config, {}
    if config.router == "entropy":
        table = read_thresholds(released.json_path, folders)
        low = BINS["zero" if table[0] < ZERO_ENTROPY else "model"] if bins == AUTO else BINS[bins]
        config, extra = replace(config, entropy_low=low), {"entropy_thresholds": table}
    elif bins == AUTO:
        extra = {"router_biases": torch.zeros(config.grains)}  # as released: the largest logit
    else:
        raise ConfigError(f"bins are {bins!r}, but a feature router has no entropy bins; leave them at 'auto'")
    if released.plain_codebook:
        ignored += ("quantize.initted", "quantize.cluster_size")
        extra["quantizer.cluster_size"] = torch.ones(config.codebook_size)
    if released.position_type.startswith("learned"):
        ignored += ("decoder.position_bias.row_embed.", "decoder.position_bias.col_embed.")
    used = {name: tensor for name, tensor in state.items() if not name.startswith(ignored)}
    sources = partial(tokenizer_sources, position_type=released.position_type, plain_codebook=released.plain_codebook)
    return new_released(lambda: DQVAE(config), used, sources, source, prefix, extra)


def _mq_tokenizer(
    node: Any, where: str, state: Mapping[str, Tensor], source: str, folders: Sequence[Path], prefix: str, *, bins: str
) -> Tokenizer:
    """The MQ-VAE of a released stage-1 section and its tensors; those of a time projection that the released code never
    calls (MQ spec Q2) are passed over."""
    if bins != AUTO:
        raise ConfigError(f"bins are {bins!r}, but an MQ-VAE has no entropy bins; leave them at 'auto'")
    config = released_mq_tokenizer(node, where)
    unused = re.compile(r"loss\.|demasker\.transformer\.(blocks\.\d+\.|last_)resblock\.temb_proj\.")
    used = {name: tensor for name, tensor in state.items() if not unused.match(name)}
    return new_released(lambda: MQVAE(config), used, tokenizer_sources, source, prefix)


def _first_stage(
    read: ReadTokenizer, node: Mapping[str, Any], state: Mapping[str, Tensor], ckpt: Path, folders: Sequence[Path]
) -> Tokenizer | None:
    """The tokenizer of a stage-2 file: from the file itself, else from the section's ``ckpt_path``, else None."""
    if state:
        return read(node, "first_stage_config", state, str(ckpt), folders, "first_stage_model.")
    params = node.get("params")
    path = params.get("ckpt_path") if isinstance(params, Mapping) else None
    file = find_file(path, folders) if isinstance(path, str) and path else None
    return None if file is None else read(node, "first_stage_config", read_state(file), str(file), folders, "")


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.import_published", description="Turn a released checkpoint into a checkpoint folder."
    )
    parser.add_argument("config", help="released configuration, JSON or YAML")
    parser.add_argument("ckpt", help="released checkpoint (.ckpt)")
    words = "of a DQ-VAE: the first entropy bin is 0 (zero), -1 (model), or as the threshold table tells (auto)"
    parser.add_argument("--bins", choices=[AUTO, *BINS], default=AUTO, help=words)
    parser.add_argument("--out", required=True, help="checkpoint folder to write; it must not exist")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise ConfigError(f"{args.out} already exists; choose another --out")
    model = import_published(args.config, args.ckpt, bins=args.bins)
    save_checkpoint(model, args.out)
    for name, part in (("tokenizer", model.tokenizer), ("transformer", model.transformer)):
        size = f"{sum(p.numel() for p in part.state_dict().values()):,} values" if part is not None else "none"
        print(f"{name}: {size}")
    if isinstance(model.tokenizer, DQVAE) and model.tokenizer.config.router == "entropy":
        print(f"entropy bins: from {model.tokenizer.config.entropy_low:g} to 1 (--bins {args.bins})")
    print(args.out)


if __name__ == "__main__":
    main()
