"""Checkpoint folders: ``config.json`` and ``model.safetensors``, training state apart. Never pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvq_rt.files import sync
from dvq_rt.layout import TokenLayout
from runtimes.errors import CheckpointError, ConfigError
from training.models.dqvae import DQVAE, DQVAEConfig
from training.models.mqvae import MQVAE, MQVAEConfig
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer, TransformerConfig

FORMAT = 2
STAGE_1_ONLY = "this checkpoint holds stage 1 only; train stage 2 with training.train_transformer"
FAMILIES: dict[str, tuple[Any, Any]] = {"dq": (DQVAE, DQVAEConfig), "mq": (MQVAE, MQVAEConfig)}
"""Tokenizer class and its configuration, by family."""


def family_config(family: str) -> Any:
    """The tokenizer configuration class of a family.

    Raises:
        ConfigError: there is no such family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family is {family!r}; it must be one of {sorted(FAMILIES)}")
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
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        transformer: StackedTransformer | None = None,
        class_names: tuple[str, ...] = (),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.class_names, self.defaults = tuple(class_names), dict(defaults or {})

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

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        out: dict[str, Any] = {"format": FORMAT, "family": self.family}
        out["tokenizer"] = asdict(self.tokenizer.config) if self.tokenizer else None
        if self.transformer:
            out["transformer"] = asdict(self.transformer.config)
            out["layout"] = self.transformer.layout.to_dict()
        else:
            out["transformer"] = out["layout"] = None
        return {**out, "class_names": list(self.class_names), "defaults": self.defaults}


@dataclass(slots=True)
class TrainingState:
    """What a resumed run needs beside the weights: the step, scalars such as the best loss, optimizer tensors."""

    step: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def strict(cls: Any, values: Any, where: str) -> Any:
    """Build a frozen config dataclass from a dict that must name exactly its fields.

    Raises:
        ConfigError: a key is unknown or missing.
    """
    known = {f.name for f in fields(cls)}
    if not isinstance(values, dict) or set(values) != known:
        keys = set(values) if isinstance(values, dict) else set()
        raise ConfigError(f"{where}: unknown keys {sorted(keys - known)}, missing keys {sorted(known - keys)}")
    return cls(**values)


def save_checkpoint(model: Model, folder: str | Path, state: TrainingState | None = None) -> None:
    """Write a checkpoint folder atomically: a crash leaves the old one or the new one, never a mixture."""
    folder = Path(folder)
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # a crash interrupted the swap
        old.rename(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, fresh / "model.safetensors")
    if state is not None:
        text = json.dumps({"step": state.step, "values": state.values})
        save_file(state.tensors, fresh / "training.safetensors", metadata={"state": text})
    (fresh / "config.json").write_text(json.dumps(model.config(), indent=1) + "\n", encoding="utf-8")
    for path in (*fresh.iterdir(), fresh):
        sync(path)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # a crash may have left it
        folder.rename(old)
    fresh.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def existing(folder: str | Path) -> Path:
    """The checkpoint folder, or ``<folder>.old`` where only that is left of a swap that a crash interrupted."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    return old if not folder.exists() and old.exists() else folder


def load_checkpoint(folder: str | Path) -> Model:
    """Read a checkpoint folder (see ``existing``), in eval mode.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, unknown or damaged.
    """
    folder = existing(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no checkpoint folder: it has no config.json (a run writes RUN/checkpoint and RUN/best)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object")
    if config.get("format") != FORMAT or config.get("family") not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'} has format {config.get('format')!r}, family {config.get('family')!r}; "
            f"this version reads format {FORMAT}, families {sorted(FAMILIES)}"
        )
    try:
        model = build_model(config)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is wrong: {error}") from None
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} cannot be read: {error}") from None
    load_strictly(model, tensors, str(folder / "model.safetensors"))
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


def build_model(config: dict[str, Any]) -> Model:
    """A freshly initialized model of a ``config.json`` dict.

    Raises:
        ConfigError: a key is unknown or missing, or a value is out of range.
    """
    keys = {"format", "family", "tokenizer", "transformer", "layout", "class_names", "defaults"}
    if set(config) != keys:
        raise ConfigError(f"unknown keys {sorted(set(config) - keys)}, missing keys {sorted(keys - set(config))}")
    tokenizer = None
    if config["tokenizer"]:
        tokenizer = new_tokenizer(strict(family_config(config["family"]), config["tokenizer"], "tokenizer"))
    transformer = None
    if config["transformer"]:
        layout = TokenLayout.from_dict(config["layout"])
        transformer = StackedTransformer(strict(TransformerConfig, config["transformer"], "transformer"), layout)
    return Model(tokenizer, transformer, tuple(config["class_names"]), config["defaults"])


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors whose names and shapes must be the model's.

    Raises:
        CheckpointError: names the missing, unknown and misshapen keys.
    """
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(set(own) & set(tensors))
        if own[k].shape != tensors[k].shape
    ]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"{source} does not fit its config: missing {missing}, unknown {unknown}, wrong shape {shapes}"
        )
    model.load_state_dict(tensors)


def load_training_state(folder: str | Path) -> TrainingState:
    """The training state beside a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = existing(folder) / "training.safetensors"
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            return TrainingState(state["step"], state["values"], {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; train into a new folder instead") from None


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
