"""The two graphs of the tokenizer that get traced beside ``training.step.Step``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.tokenizer import Tokenizer


class EncoderGraph(nn.Module):
    """images float32 [B, 3, S, S] in [-1, 1] -> codes int64 [B, h, w], grain int64 [B, hc, wc], scores float32 [B, hc,
    wc, n], grain_codes int64 [B, n, h, w] (``EveryGrain``)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.vae = tokenizer

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.vae.encode_grains(images))


class DecoderGraph(nn.Module):
    """codes int64 [B, h, w], -1 for cells without one -> images float32 [B, 3, S, S], about [-1, 1], not clamped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.vae = tokenizer

    def forward(self, codes: Tensor) -> Tensor:
        return self.vae.decode_maps(codes)


class PixelDecoder(nn.Module):
    """``DecoderGraph``, and ``pixels`` uint8 [B, S, S, 3] of its images (the rule of ``dvq_rt.images.to_uint8``)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.vae = tokenizer

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        images = self.vae.decode_maps(codes)
        levels = ((images + 1) * 127.5).clamp(0, 255).round()
        return images, levels.permute(0, 2, 3, 1).to(torch.uint8)
