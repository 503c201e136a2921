"""Released checkpoints of both families, changed for the tests of what cannot be imported."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from dq_golden import GOLDEN as DQ
from mq_golden import GOLDEN as MQ
from torch import Tensor

from training.checkpoint import Model
from training.import_published import import_published


def folder(case: str) -> Path:
    """Where a case lies."""
    return DQ / case if (DQ / case).exists() else MQ / case


def base(case: str) -> Path:
    """Where the paths in its configuration start."""
    return DQ / case if (DQ / case).exists() else MQ


def config_of(case: str) -> Any:
    return json.loads((folder(case) / "config.json").read_text())


def state_of(case: str) -> dict[str, Tensor]:
    return torch.load(folder(case) / "model.ckpt", weights_only=True)["state_dict"]


def imported(case: str, tmp_path: Path, state: dict[str, Any] | None = None, config: Any = None) -> Model:
    """Import a case, with other tensors or another configuration where given."""
    file = folder(case) / "model.ckpt"
    if state is not None:
        file = tmp_path / "model.ckpt"
        torch.save({"state_dict": state}, file)
    return import_published(config_of(case) if config is None else config, file, base=base(case))


def changed(case: str, *path_and_value: Any) -> Any:
    """A case's config with one value replaced (or, given None, removed)."""
    *path, last, value = path_and_value
    config = copy.deepcopy(config_of(case))
    node = config.get("model", config)["params"]
    for name in path:
        node = node[name]["params"]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return config
