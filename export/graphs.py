"""The graphs that get traced beside ``training.step.Step``: the tokenizer's two, and of prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.frozen_text import FrozenText
from training.models.text import TextEncoder
from training.models.tokenizer import Tokenizer
from training.models.transformer import Block


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


class TextGraph(nn.Module):
    """ids int64 [1, L], length int64 [1] -> prefix float32 [1, L, C], rows beyond the length being of no use.

    Args:
        text: the model's.
        frozen: encoder before it, if there is one.
    """

    def __init__(self, text: TextEncoder, frozen: FrozenText | None = None) -> None:
        super().__init__()
        self.text, self.frozen = text, frozen

    def forward(self, ids: Tensor, length: Tensor) -> Tensor:
        text = self.text
        prompt = ids if self.frozen is None else self.frozen(ids, length).to(text.segment_emb.dtype)
        x, mask = text.embed(prompt), text.mask(ids, length)
        for block in text.blocks:
            assert isinstance(block, Block)
            x = x + block.attn.proj(attend(block.attn.qkv(block.ln1(x)), mask, block.attn.heads))
            x = x + block.mlp(block.ln2(x))
        return text.close(x).float()


def attend(qkv: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Self-attention [B, T, C] of standard operators, from qkv [B, T, 3 C] and a mask bool [B, 1, T, T]."""
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weight = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return (weight @ v).transpose(1, 2).reshape(b, t, width // 3)
