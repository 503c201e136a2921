"""The prompt in front of an image: text tokens, or features of a frozen text encoder, to rows of the transformer's
width that stand before the start token. Both stacks read them as they read tokens; nothing is predicted about text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtimes.errors import ConfigError, short


@dataclass(frozen=True, slots=True)
class TextConfig:
    """What a transformer knows of prompts.

    Args:
        length: L, the most tokens of a prompt.
        vocabulary: number of text tokens; 0 with ``features``.
        blocks: bidirectional blocks over the prompt.
        features: width of a frozen encoder's features, which are projected instead of embedding tokens; 0 for none.
        empty: whether the empty prompt was trained, so that it stands for "anything".

    Raises:
        ConfigError: a value is out of range.
    """

    length: int = 32
    vocabulary: int = 4096
    blocks: int = 2
    features: int = 0
    empty: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (("length", 1, 1024), ("blocks", 0, 64), ("vocabulary", 0, 1 << 20)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"text.{name} is {short(value)}; it must be an integer in {least}..{most}")
        if not 0 <= self.features <= 1 << 16 or bool(self.features) == bool(self.vocabulary):
            raise ConfigError(
                f"text.vocabulary is {self.vocabulary} and text.features {self.features}; one of them must be positive"
            )


class Prefix(NamedTuple):
    """Prompts in front of sequences: ``rows`` float [B, P, C], each prompt at the end of its row, directly before the
    start token, and ``length`` int64 [B] rows of it in use. What lies before is never read."""

    rows: Tensor
    length: Tensor

    def mask(self, tokens: int) -> Tensor:
        """Which of the P + ``tokens`` places each one reads, bool [B, 1, P + tokens, P + tokens]: causal, without the
        unused ones, which read themselves alone."""
        places = torch.arange(self.rows.shape[1] + tokens, device=self.rows.device)
        used = places >= (self.rows.shape[1] - self.length)[:, None]
        causal = places <= places[:, None]
        return ((causal & used[:, None]) | (places == places[:, None]))[:, None]


def align_right(rows: Tensor, length: Tensor) -> Prefix:
    """The ``Prefix`` of prompts that stand at the beginning of their rows: float [B, P, C], lengths int64 [B]."""
    places = torch.arange(rows.shape[1], device=rows.device)
    source = (places + length[:, None] - rows.shape[1]).clamp_min(0)
    return Prefix(rows.gather(1, source[..., None].expand_as(rows)), length)


class TextEncoder(nn.Module):
    """Prompts to rows of width C.

    Args:
        config: sizes.
        width: C.
        blocks: the bidirectional blocks, of that width.
    """

    def __init__(self, config: TextConfig, width: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocabulary, width) if config.vocabulary else None
        self.place_emb = nn.Parameter(torch.zeros(config.length, width)) if config.vocabulary else None
        self.project = nn.Linear(config.features, width) if config.features else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.segment_emb = nn.Parameter(torch.zeros(width))

    def forward(self, prompt: Tensor, length: Tensor) -> Tensor:
        """Rows of prompts that stand at the beginning, each independent of what lies behind its length.

        Args:
            prompt: token ids int64 [B, P], or a frozen encoder's features float [B, P, features]; P at most L.
            length: int64 [B].

        Returns:
            float [B, P, C].
        """
        x, mask = self.embed(prompt), self.mask(prompt, length)
        for block in self.blocks:
            x = block(x, mask)
        return self.close(x)

    def embed(self, prompt: Tensor) -> Tensor:
        """What the first block reads, float [B, P, C]."""
        if self.project is not None:
            return self.project(prompt)
        assert self.token_emb is not None and self.place_emb is not None
        return self.token_emb(prompt) + self.place_emb[: prompt.shape[1]]

    def mask(self, prompt: Tensor, length: Tensor) -> Tensor:
        """Which places each one reads, bool [B, 1, P, P]: those in use, and itself."""
        places = torch.arange(prompt.shape[1], device=prompt.device)
        used = (places < length[:, None])[:, None]
        return (used | (places == places[:, None]))[:, None]

    def close(self, x: Tensor) -> Tensor:
        """Rows from what the last block gives."""
        return self.norm(x) + self.segment_emb
