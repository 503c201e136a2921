"""Bytes as the floats that the models take."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


def to_float(images: Pixels) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
