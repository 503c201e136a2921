"""The tensors of released checkpoints, read without executing pickles; each is mapped to ours or refused by name."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dvq_rt.files import read_json
from dvq_rt.layout import TokenLayout
from runtimes.errors import CheckpointError, ConfigError, guard, short
from training.checkpoint import compare_shapes, load_strictly, new_module, not_finite
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer
from training.published.configs import fits

Module = TypeVar("Module", bound=nn.Module)
MAX_TABLE_BYTES = 1 << 20
EXPANSION = 4
"""A checkpoint may unpack to so many times its size: numbers of trained weights can hardly be compressed."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The ``state_dict`` of a checkpoint file, without pickle execution.

    Raises:
        CheckpointError: the file is missing, damaged, has no state dict, unpacks to far more than it holds, or needs
            pickle to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is no file; give the .ckpt file of the released code")
    with guard(CheckpointError, f"{path} cannot be read", "fetch it again"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > EXPANSION * path.stat().st_size + MAX_TABLE_BYTES:
                raise ValueError(f"it would unpack to {unpacked} bytes, which no checkpoint does")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                f"{path} is damaged, or holds pickled objects{f' ({wanted[1]})' if wanted else ''} beside its tensors "
                "and would have to execute code, which is never done; where you trust the file, save its state_dict "
                "alone: torch.save({'state_dict': ...})"
            ) from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} has no 'state_dict'; give the Lightning checkpoint of the released code")
    if odd := sorted(str(name) for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))):
        raise CheckpointError(f"{path}: the state_dict entries {short(odd)} are no plain tensors of real numbers")
    return state


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that holds its numbers one by one, and real ones."""
    plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return plain and not value.is_complex() and not value.is_quantized


def find_file(path: str, folders: Sequence[Path]) -> Path | None:
    """The first of the folders' files of that path."""
    return next((folder / path for folder in folders if (folder / path).is_file()), None)


def read_thresholds(path: str, folders: Sequence[Path]) -> Tensor:
    """The released threshold table, float32 [99]: entry p - 1 is that of key p.

    Args:
        path: of the released configuration.
        folders: where the path may start; or the file may lie in one of them itself.
    """
    places = [folder / place for place in dict.fromkeys((path, Path(path).name)) for folder in folders]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        raise ConfigError(
            f"the threshold table {path[:200]} (json_path) is not there; put it beside the configuration. "
            f"Looked at: {looked}"
        )
    values = read_json(file, mend="give the released threshold table", most=MAX_TABLE_BYTES)
    table = [values.get(str(p)) if isinstance(values, dict) else None for p in range(1, 100)]
    wrong = [p for p, v in enumerate(table, 1) if not fits(v, "number")]
    if wrong:
        raise ConfigError(
            f"{file} is no threshold table: the keys {wrong} have no finite number; there must be 1 to 99"
        )
    return torch.tensor(table, dtype=torch.float32)


class Source(NamedTuple):
    """A released tensor: its name and its shape."""

    name: str
    shape: tuple[int, ...]


QUANTIZER_NAMES = {
    "quantizer.codebook": "quantize.codebook.weight",
    "quantizer.cluster_size": "quantize.codebook.cluster_size_ema",
    "quantizer.embed_sum": "quantize.codebook.embed_ema",
}


def tokenizer_sources(
    tokenizer: Tokenizer, position_type: str = "", plain_codebook: bool = False
) -> dict[str, list[Source]]:
    """Our tensor name -> the released tensors that it is made of, joined along the rows (see ``load_released``)."""
    fourier = "position_bias" if position_type == "fourier" else "position_bias_fourier"
    out = {}
    for name, tensor in tokenizer.state_dict().items():
        shape = tuple(tensor.shape)
        if name == "quantizer.codebook":
            shape = (shape[0] + 1, *shape[1:])  # the released codebook ends in an unused row (DQ spec Q39, MQ spec 2.4)
        elif name == "demasker.mask_token":
            shape = (1, *shape, 1)
        released = QUANTIZER_NAMES.get(name, name.replace("position_bias_fourier.", f"{fourier}.lff.ffm."))
        if name.startswith("router."):
            released = f"encoder.{name}"
        for block in ("blocks.", "last_resblock."):
            released = released.replace(f"demasker.{block}", f"demasker.transformer.{block}")
        out[name] = [Source(released, shape)]
    if plain_codebook:  # a table of its own, which the averages start from
        table = [Source("quantize.embedding.weight", tuple(tokenizer.quantizer.codebook.shape))]
        out |= {"quantizer.codebook": table, "quantizer.embed_sum": table}
        out.pop("quantizer.cluster_size")
    for fitted in ("entropy_thresholds", "router_biases"):
        out.pop(fitted, None)
    return out


def transformer_sources(transformer: StackedTransformer) -> dict[str, list[Source]]:
    """Our tensor name -> the released tensors that it is made of, joined along the rows (see ``load_released``)."""
    layout = transformer.layout
    renames = {
        "position_blocks.": "position_transformer.",
        "content_blocks.": "content_transformer.",
        "segment_emb.": "seg_emb.",
        "_head.norm.": "_head.0.",
        "_head.linear.": "_head.1.",
    }
    if not layout.covering:  # the names of the Stackformer
        renames |= {"content_": "value_", "position_emb.": "value_pos_emb."}
    out = {}
    for name, tensor in transformer.state_dict().items():
        released, shape = name, tuple(tensor.shape)
        for ours, theirs in renames.items():
            released = released.replace(ours, theirs)
        if name == "index_emb":
            out[name] = [Source("pos_emb", (1, *shape))]
        elif name == "position_emb.weight" and layout.covering:
            out[name] = [
                Source(f"content_{grain}_pos_emb.weight", (layout.position_vocabulary(s), *shape[1:]))
                for s, grain in enumerate(("coarse", "fine"))
            ]
        elif ".qkv." in name:
            third = (shape[0] // 3, *shape[1:])
            out[name] = [Source(released.replace(".qkv.", f".{part}."), third) for part in ("query", "key", "value")]
        else:
            out[name] = [Source(released, shape)]
    return out


def new_released(
    make: Callable[[], Module],
    state: Mapping[str, Tensor],
    sources: Callable[[Module], dict[str, list[Source]]],
    source: str,
    prefix: str,
    extra: Mapping[str, Tensor] | None = None,
) -> Module:
    """A new module, filled with released tensors; arguments and errors as for ``load_released``, but that ``sources``
    gives them for a module. Names and shapes are compared before memory is allocated."""

    def check(plan: Module) -> None:
        compare_released(state, sources(plan), source, prefix)

    module = new_module(make, check)
    load_released(module, state, sources(module), source, prefix, extra)
    return module


def compare_released(
    state: Mapping[str, Tensor], sources: Mapping[str, list[Source]], source: str, prefix: str
) -> None:
    """Refuse released tensors that are not exactly those that a model is made of.

    Raises:
        CheckpointError: names the missing, unknown and misshapen tensors as the released code does.
    """
    wanted = {prefix + part.name: part.shape for parts in sources.values() for part in parts}
    compare_shapes(wanted, {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}, source)


def load_released(
    model: nn.Module,
    state: Mapping[str, Tensor],
    sources: Mapping[str, list[Source]],
    source: str,
    prefix: str = "",
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill a model with released tensors.

    Args:
        state: released name -> tensor; every one must be used.
        sources: our name -> released tensors, which are flattened to rows, joined, and cut to our number of rows.
        source: the file, and ``prefix`` what the names start with in it, for errors.
        extra: further tensors under our names.

    Raises:
        CheckpointError: names the missing, unknown and misshapen tensors as the released code does, and those that
            hold NaN or infinity.
    """
    compare_released(state, sources, source, prefix)
    if broken := [prefix + name for name in not_finite(state)]:
        raise CheckpointError(f"{source} holds numbers that are not finite, in {short(broken)}; it cannot be used")
    own = model.state_dict()
    tensors = {}
    for name, parts in sources.items():
        like = own[name]
        rows = torch.cat([state[p.name].to(like.dtype).reshape(-1, *like.shape[1:]) for p in parts])
        tensors[name] = rows[: len(like)] if like.ndim else rows[0]
    load_strictly(model, {**tensors, **(extra or {})}, source)


def released_transformer_state(layout: TokenLayout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a released stack that a transformer of ours is made of, content ids in our order."""
    used = {name: tensor for name, tensor in state.items() if not name.endswith(".attn.mask")}  # DQ spec Q28
    if not layout.covering:  # the released class model's start ids lie before its codes, ours behind them
        for name in {"value_emb.weight", "value_head.1.weight"} & set(used):
            used[name] = used[name].roll(-layout.classes, 0) if used[name].ndim else used[name]
    return used


def load_transformer(
    transformer: StackedTransformer, state: Mapping[str, Tensor], source: str, prefix: str = ""
) -> None:
    """Fill a stacked transformer with the tensors of the released StackGPT or, if its layout keeps cells, of the
    released [Reverse]StackedPositionGPT; ``prefix`` has been cut off their names.

    Raises:
        CheckpointError: see ``load_released``.
    """
    used = released_transformer_state(transformer.layout, state)
    load_released(transformer, used, transformer_sources(transformer), source, prefix)
