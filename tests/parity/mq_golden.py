"""Access to the reference numbers in ``tests/data/golden/mq``, and their tokens as this project writes them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dvq_rt.layout import TokenLayout
from training.checkpoint import Model
from training.import_published import import_published

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "mq"
STAGE_2 = ("stackformer_class", "stackformer_uncond")
MAPS, IMAGES, LOGITS, PURE = ({"tolerance": t, "scale": 1.0} for t in (1e-4, 3e-4, 1e-4, 1e-6))  # absolute errors
LOSS, GRADIENT = {"tolerance": 1e-5}, {"tolerance": 5e-3}  # errors relative to the largest value


@lru_cache
def load(case: str, name: str = "outputs") -> dict[str, Tensor]:
    """The tensors of one file."""
    return load_file(GOLDEN / case / f"{name}.safetensors")


@lru_cache
def extra(case: str, name: str = "extra") -> Any:
    """Numbers and notes of a case, or its ``config``."""
    return json.loads((GOLDEN / case / f"{name}.json").read_text())


@lru_cache
def model(case: str) -> Model:
    """The case's imported checkpoint; tests share it and must not change it."""
    return import_published(GOLDEN / case / "config.json", GOLDEN / case / "model.ckpt", base=GOLDEN)


def images(case: str) -> Tensor:
    """The images whose tokens a stage-2 case has."""
    return load("mqvae_refine" if case == "stackformer_uncond" else case, "inputs")["image"]


def to_ours(layout: TokenLayout, values: Tensor) -> Tensor:
    """Released content ids (labels, then codes) as ours (codes, then labels), int64 of any shape."""
    return (values - layout.classes) % layout.content_vocabulary


def to_released(layout: TokenLayout, rows: Tensor, dim: int = -1) -> Tensor:
    """What lies in our order of content ids along ``dim`` (logits, embeddings, gradients) in the released order."""
    return rows.roll(layout.classes, dim)


def teacher_forcing(
    layout: TokenLayout, content: Tensor, position: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Token sequences with their start token, our ids, int64 [B, K + 1] each, as the arguments of
    ``StackedTransformer.forward`` and the targets of ``stacked_losses``."""
    segment = torch.zeros_like(content)
    following = content if layout.first == "content" else position
    inputs = {
        "content": content[:, :-1],
        "position": position[:, :-1],
        "segment": segment[:, :-1],
        "following": following[:, 1:],
    }
    return inputs, {"content": content[:, 1:], "position": position[:, 1:], "segment": segment[:, 1:]}
