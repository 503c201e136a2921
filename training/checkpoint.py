"""Checkpoint folders: ``config.json`` and ``model.safetensors``, training state apart. Never pickle.

``config.json`` has the SHA-256 of the other files. Names and shapes of the tensors are compared with what it describes
before a model is made, so that no file makes a reader allocate more than it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvq_rt.files import new_folder, open_regular, parse_json, read_dataclass, read_json, restore_folder
from dvq_rt.layout import TokenLayout
from dvq_rt.prompts import BYTES, TextTokenizer
from runtimes.errors import CheckpointError, ConfigError, guard, short
from training.models.dqvae import ADDED, DQVAE, DQVAEConfig
from training.models.mqvae import ADDED as ADDED_TO_MQ
from training.models.mqvae import MQVAE, MQVAEConfig
from training.models.text import TextConfig
from training.models.tokenizer import Tokenizer
from training.models.transformer import ADDED as ADDED_SIZES
from training.models.transformer import StackedTransformer, TransformerConfig

FORMAT = 3
UNHASHED = 2
"""The format before, which is read too: without hashes."""
CONFIG, WEIGHTS, STATE = "config.json", "model.safetensors", "training.safetensors"
TEXT_TOKENIZER = "tokenizer.json"
"""The text tokenizer of a model that reads prompts; without this file it reads bytes."""
STAGE_1_ONLY = "this checkpoint holds stage 1 only; train stage 2 with training.train_transformer"
FAMILIES: dict[str, tuple[Any, Any]] = {"dq": (DQVAE, DQVAEConfig), "mq": (MQVAE, MQVAEConfig)}
"""Tokenizer class and its configuration, by family."""
TOO_LARGE = "a model of these sizes cannot be made"
MAY_BE_NAN = ("entropy_thresholds",)  # until training has made them

Module = TypeVar("Module", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]


def family_config(family: str) -> Any:
    """The tokenizer configuration class of a family.

    Raises:
        ConfigError: there is no such family.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"family is {short(family)}; it must be one of {sorted(FAMILIES)}")
    return FAMILIES[family][1]


def new_tokenizer(config: Any) -> Tokenizer:
    """A freshly initialized tokenizer of its configuration."""
    return next(model for model, kind in FAMILIES.values() if kind is type(config))(config)


class Model(nn.Module):
    """What a checkpoint holds: the tokenizer and, after stage 2, the transformer with its token layout.

    Attributes:
        tokenizer: DQVAE or MQVAE, or None for a stage-2 file without its first stage.
        transformer: StackedTransformer, or None after stage 1.
        class_names: one name per label, without the null label; empty if unconditional.
        defaults: recommended sampling parameters, copied to the engine's manifest.
        text_encoder: ``folder`` and ``sha256`` of a frozen text encoder (``training.frozen_text``); empty for none.
        text_tokenizer: content of the ``tokenizer.json`` of a model that reads prompts, or ``bytes``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        transformer: StackedTransformer | None = None,
        class_names: tuple[str, ...] = (),
        defaults: dict[str, Any] | None = None,
        text_tokenizer: str = BYTES,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.class_names, self.defaults = tuple(class_names), dict(defaults or {})
        self.text_tokenizer = text_tokenizer
        self.text_encoder: dict[str, str] = {}

    @property
    def family(self) -> str:
        """``dq`` or ``mq``."""
        if self.tokenizer is None:
            return "dq" if self.layout.covering else "mq"
        return next(name for name, (model, _) in FAMILIES.items() if isinstance(self.tokenizer, model))

    @property
    def layout(self) -> TokenLayout:
        if self.transformer is None:
            raise CheckpointError(STAGE_1_ONLY)
        return self.transformer.layout

    def both(self) -> tuple[Tokenizer, StackedTransformer]:
        """Tokenizer and transformer of a whole model.

        Raises:
            CheckpointError: it holds one stage only.
        """
        if self.transformer is None:
            raise CheckpointError(STAGE_1_ONLY)
        if self.tokenizer is None:
            raise CheckpointError(
                "this checkpoint holds stage 2 only; import it again with its first stage where the released "
                "configuration's ckpt_path says"
            )
        return self.tokenizer, self.transformer

    def with_parts(
        self, tokenizer: Tokenizer, transformer: StackedTransformer, class_names: tuple[str, ...] | None = None
    ) -> Model:
        """A model of other networks and, if given, other labels, the rest being this one's."""
        names = self.class_names if class_names is None else class_names
        made = Model(tokenizer, transformer, names, self.defaults, self.text_tokenizer)
        made.text_encoder = self.text_encoder
        return made

    @property
    def text(self) -> TextConfig | None:
        """What the transformer knows of prompts; None if it reads none."""
        return None if self.transformer is None or self.transformer.text is None else self.transformer.text.config

    def prompts(self) -> TextTokenizer:
        """The text tokenizer.

        Raises:
            CheckpointError: the model reads no prompts.
            BackendError: the package tokenizers is missing.
        """
        if self.text is None:
            raise CheckpointError("this model was trained without text; train one with the section 'text'")
        return TextTokenizer(self.text_tokenizer, self.text.length)

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        out: dict[str, Any] = {"format": FORMAT, "family": self.family}
        out["tokenizer"] = asdict(self.tokenizer.config) if self.tokenizer else None
        if self.transformer:
            out["transformer"] = asdict(self.transformer.config)
            out["layout"] = self.transformer.layout.to_dict()
        else:
            out["transformer"] = out["layout"] = None
        if self.text is not None:
            out["text"] = asdict(self.text)
        if self.text_encoder:
            out["text_encoder"] = self.text_encoder
        return {**out, "class_names": list(self.class_names), "defaults": self.defaults}


@dataclass(slots=True)
class TrainingState:
    """What a resumed run needs beside the weights: the step, scalars such as the best loss, optimizer tensors."""

    step: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


# --- writing ---------------------------------------------------------------------------------------------------
def save_checkpoint(model: Model, folder: str | Path, state: TrainingState | None = None) -> None:
    """Write a checkpoint folder atomically: a crash leaves the old one or the new one, never a mixture.

    Raises:
        CheckpointError: the disk refused.
    """
    refused = guard(CheckpointError, f"cannot write {folder}")  # safetensors has errors of its own
    with refused, new_folder(folder, overwrite=True, error=CheckpointError) as fresh:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, fresh / WEIGHTS)
        if model.text_tokenizer != BYTES:
            (fresh / TEXT_TOKENIZER).write_text(model.text_tokenizer, encoding="utf-8")
        if state is not None:
            text = json.dumps({"step": state.step, "values": state.values})
            save_file(state.tensors, fresh / STATE, metadata={"state": text})
        config = {**model.config(), "sha256": {path.name: _sha256(path) for path in sorted(fresh.iterdir())}}
        (fresh / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def keep_copies(run: Path, step: int, most: int) -> None:
    """Keep ``run/checkpoint``, which is of that step, as ``run/step-N`` too, and of such copies the latest ``most``.

    Raises:
        CheckpointError: the disk refused.
    """
    with new_folder(run / f"step-{step}", overwrite=True, error=CheckpointError) as fresh:
        for path in (run / "checkpoint").iterdir():
            try:
                os.link(path, fresh / path.name)  # no file of a checkpoint is ever changed
            except OSError:  # a disk without links
                shutil.copyfile(path, fresh / path.name)
    steps = sorted(int(path.name[5:]) for path in run.glob("step-*") if path.name[5:].isdigit())
    for old in steps[:-most]:
        shutil.rmtree(run / f"step-{old}")


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------
def load_checkpoint(folder: str | Path) -> Model:
    """Read a checkpoint folder, in eval mode.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, unknown or damaged.
    """
    folder = restore_folder(folder)
    config, path = _read_config(folder), folder / WEIGHTS
    shapes = _read_shapes(path)

    def check(model: Model) -> None:
        compare_shapes(shapes_of(model), shapes, str(path))
        _check_parts(model)

    with guard(CheckpointError, f"{folder / CONFIG} is wrong"):
        model = new_module(lambda: build_model(config), check)
    _check_hash(path, config)
    with guard(CheckpointError, f"{path} cannot be read"):
        tensors = load_file(path)
    load_strictly(model, tensors, str(path))
    if model.text is not None and TEXT_TOKENIZER in config.get("sha256", {}):
        path = folder / TEXT_TOKENIZER
        with guard(CheckpointError, f"{path} cannot be read"), open_regular(path) as file:
            model.text_tokenizer = file.read().decode()
        _check_hash(path, config)
    return model.eval()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, in eval mode.

    Raises:
        CheckpointError: see ``load_checkpoint``; or it holds none.
    """
    tokenizer = load_checkpoint(folder).tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{folder} holds no tokenizer; give a checkpoint of training.train_tokenizer")
    return tokenizer


def checkpoint_step(folder: str | Path) -> int:
    """The number of steps after which a checkpoint that can be resumed was saved; errors as ``load_training_state``."""
    return load_training_state(folder, tensors=False).step


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights."""
    total = hashlib.sha256()
    for tensor in module.state_dict().values():
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()


def load_training_state(folder: str | Path, tensors: bool = True) -> TrainingState:
    """The training state beside a checkpoint; without its tensors if ``tensors`` is false.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = restore_folder(folder)
    path = folder / STATE
    mend = "train into a new folder instead"
    with guard(CheckpointError, f"{path} cannot be read", mend), open_regular(path), safe_open(path, "pt") as file:
        state = parse_json(file.metadata()["state"])
        step, values = state["step"], state["values"]
        if type(step) is not int or step < 0 or not isinstance(values, dict):
            raise ValueError(f"step {short(step)} or values {short(values)} are none")
        if not tensors:
            return TrainingState(step, values)
        _check_hash(path, _read_config(folder))
        return TrainingState(step, values, {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``, of a format that is read here."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} is no checkpoint folder: it has no config.json (a run writes RUN/checkpoint and RUN/best)"
        )
    config = read_json(path, error=CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    if config.get("format") not in (UNHASHED, FORMAT) or config.get("family") not in list(FAMILIES):
        raise CheckpointError(
            f"{path} has format {short(config.get('format'))}, family {short(config.get('family'))}; "
            f"this version reads format {UNHASHED} and {FORMAT}, families {sorted(FAMILIES)}"
        )
    return config


def _read_shapes(path: Path) -> Shapes:
    """Names and shapes of the tensors of a file, which are not read."""
    with guard(CheckpointError, f"{path} cannot be read"), open_regular(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_hash(path: Path, config: dict[str, Any]) -> None:
    """Refuse a file that is not the one that was saved, unless it is of the format without hashes."""
    hashes = config.get("sha256")
    if config["format"] != UNHASHED and not (isinstance(hashes, dict) and hashes.get(path.name) == _sha256(path)):
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {CONFIG}; copy it again, or take another checkpoint"
        )


def build_model(config: Mapping[str, Any]) -> Model:
    """A freshly initialized model of a ``config.json`` dict.

    Raises:
        ConfigError: a key is unknown or missing, or a value is out of range.
    """
    keys = {"format", "family", "tokenizer", "transformer", "layout", "class_names", "defaults"}
    given = set(config) - {"sha256", "text", "text_encoder"}
    if given != keys:
        raise ConfigError(f"unknown keys {short(sorted(given - keys))}, missing keys {sorted(keys - given)}")
    names, defaults = config["class_names"], config["defaults"]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or not isinstance(defaults, dict):
        raise ConfigError(
            f"class_names are {short(names)}, defaults {short(defaults)}; they must be a list of texts and an object"
        )
    tokenizer, transformer, values = None, None, config["tokenizer"]
    if values:
        if isinstance(values, dict):
            values = {**(ADDED if config["family"] == "dq" else ADDED_TO_MQ), **values}
        tokenizer = new_tokenizer(read_dataclass(family_config(config["family"]), values, "tokenizer"))
    if config["transformer"]:
        layout = TokenLayout.from_dict(config["layout"])
        values = config["transformer"]
        values = {**ADDED_SIZES, **values} if isinstance(values, dict) else values
        sizes = read_dataclass(TransformerConfig, values, "transformer")
        text = read_dataclass(TextConfig, config["text"], "text") if "text" in config else None
        transformer = StackedTransformer(sizes, layout, text)
    model = Model(tokenizer, transformer, tuple(names), defaults)
    if encoder := config.get("text_encoder", {}):
        if not isinstance(encoder, dict) or set(encoder) != {"folder", "sha256"}:
            raise ConfigError(f"text_encoder is {short(encoder)}; it must be an object with folder and sha256")
        model.text_encoder = {name: str(value) for name, value in encoder.items()}
    return model


def _check_parts(model: Model) -> None:
    """Refuse a layout that is not the tokenizer's, and names that are not the layout's."""
    if model.transformer is None:
        return
    layout = model.transformer.layout
    sizes = {} if model.tokenizer is None else model.tokenizer.config.layout()
    for name in ("codebook_size", "sides", "kept"):
        if sizes and getattr(layout, name) != sizes.get(name):
            raise ConfigError(f"layout.{name} is {getattr(layout, name)!r}; the tokenizer has {sizes.get(name)!r}")
    if len(model.class_names) not in (0, layout.classes):
        raise ConfigError(f"there are {len(model.class_names)} class_names for {layout.classes} labels")


# --- tensors ---------------------------------------------------------------------------------------------------
def new_module(make: Callable[[], Module], check: Callable[[Module], None]) -> Module:
    """A module whose sizes are checked before memory is allocated for them.

    Args:
        make: gives the module.
        check: raises if it is not the wanted one; is given one without storage (on PyTorch's meta device).

    Raises:
        ConfigError: PyTorch cannot make it.
    """
    with guard(ConfigError, TOO_LARGE), torch.device("meta"):
        plan = make()
    check(plan)
    with guard(ConfigError, TOO_LARGE):
        return make()


def shapes_of(module: nn.Module) -> Shapes:
    """Names and shapes of a module's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def compare_shapes(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Refuse tensors that are not exactly the wanted ones.

    Raises:
        CheckpointError: names the missing, unknown and misshapen ones.
    """
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    shapes = [
        f"{name} {given[name]} instead of {wanted[name]}"
        for name in sorted(set(wanted) & set(given))
        if given[name] != wanted[name]
    ]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"{source} does not fit its config: missing {missing}, unknown {unknown}, wrong shape {shapes}"
        )


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors whose names and shapes must be the module's, and whose numbers must be finite; real numbers may be
    of another precision.

    Raises:
        CheckpointError: names those that are not.
    """
    own = module.state_dict()
    compare_shapes(shapes_of(module), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    kinds = {name: (tensor.is_floating_point(), tensor.is_complex()) for name, tensor in tensors.items()}
    if odd := [
        f"{k} {tensors[k].dtype}" for k, v in own.items() if kinds[k] != (v.is_floating_point(), v.is_complex())
    ]:
        raise CheckpointError(f"{source} does not fit its config: wrong number format {short(odd)}")
    ready = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
    if broken := not_finite(ready):
        raise CheckpointError(f"{source} holds numbers that are not finite in {short(broken)}; take another one")
    module.load_state_dict(ready)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity, but for those that may."""
    return [k for k, v in tensors.items() if not k.endswith(MAY_BE_NAN) and not torch.isfinite(v).all()]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value).clone() for i, s in state.items() for name, value in s.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``; the parameter groups keep their own settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
