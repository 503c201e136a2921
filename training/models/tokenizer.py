"""What the tokenizers of both families have in common: the interface that training, export and evaluation use.

Maps follow ``dvq_rt.codes.Codes``: ``codes`` int64 [B, h, w] of the finest grid, -1 where a cell has no code, and
``grain`` int64 [B, hc, wc], the segment that codes each coarsest cell, -1 where none does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtimes.errors import InputError
from training.models.quantizer import EMAQuantizer


class Reconstruction(NamedTuple):
    """``images`` [B, 3, H, W], ``loss`` of the quantizer, ``codes`` int64 of any shape or None, ``grain`` map,
    ``scores`` [B, hc, wc] that the grain was decided by (entropy, importance), and ``budget``, what a
    router that learns must minimize."""

    images: Tensor
    loss: Tensor
    codes: Tensor | None
    grain: Tensor
    scores: Tensor
    budget: Tensor | None = None


class EveryGrain(NamedTuple):
    """What an encoder says of images: ``codes`` and ``grain`` as it chooses them; ``scores`` float [B, hc, wc, n], how
    well each of n grains (in MQ the one) suits each coarsest cell, larger being better; ``grain_codes`` int64 [B, n, h,
    w], the codes that the cells would have in each grain."""

    codes: Tensor
    grain: Tensor
    scores: Tensor
    grain_codes: Tensor


class Tokenizer(nn.Module):
    """Base of DQVAE and MQVAE."""

    config: Any
    quantizer: EMAQuantizer
    decoder: nn.Module
    behind_codes: tuple[str, ...]
    """The names of the modules that make images of codes."""
    codes_fixed = False

    def fix_codes(self) -> None:
        """Let nothing but the modules behind the codes learn, so that images keep their codes."""
        self.codes_fixed = True
        for name, module in self.named_children():
            module.requires_grad_(name in self.behind_codes)
        self.train(self.training)

    def train(self, mode: bool = True) -> Tokenizer:
        super().train(mode)
        if self.codes_fixed:
            for name, module in self.named_children():
                module.train(mode and name in self.behind_codes)
        return self

    def encode_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``codes`` and ``grain`` maps of images, float [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the images do not have the model's size.
        """
        raise NotImplementedError

    def encode_grains(self, images: Tensor) -> EveryGrain:
        """``encode_maps``, and what is needed to choose other grains; arguments and errors as there."""
        raise NotImplementedError

    def decode_maps(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W] (about [-1, 1], not clamped) of ``codes`` maps."""
        raise NotImplementedError

    def code_vectors(self, images: Tensor) -> Tensor:
        """What is quantized of images, one vector per code, [n, d]."""
        raise NotImplementedError

    def routing(self) -> dict[str, Any]:
        """How it chooses what gets codes, as plain values for an engine's manifest."""
        return {}

    def forward(self, images: Tensor, *, quantize: bool = True, noise: torch.Generator | None = None) -> Reconstruction:
        """Reconstruct; ``quantize=False`` passes the features through (the start of training)."""
        raise NotImplementedError


def check_images(images: Tensor, size: int) -> None:
    """
    Raises:
        InputError: the images are not [B, 3, size, size].
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise InputError(f"images have shape {tuple(images.shape)}; this model takes [B, 3, {size}, {size}]")
