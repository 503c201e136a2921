"""The stacked transformer: one causal stack predicts one half of the next token, a second one, reading the first's
hidden state and that half, predicts the other. Position, then content in DQ-Transformer (arXiv 2305.11718, section
3.2; spec/dq.md section 10); content, then position in Stackformer (arXiv 2305.13607; spec/mq.md section 5)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvq_rt.layout import TokenLayout
from runtimes.errors import ConfigError, short
from training.models.text import Prefix, TextConfig, TextEncoder, align_right
from training.models.whole_batch import Dropout


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes of a stacked transformer.

    Args:
        width: C, a multiple of ``heads``.
        heads: attention heads per block.
        position_blocks, content_blocks: depth of the two stacks.
        block_size: longest sequence T of the position table.
        dropout: of embeddings and residual branches; attention_dropout: of attention weights (slow on CPUs;
            several processes draw the same numbers each, so they do not train as one does).
        segment_embedding: whether tokens carry an embedding of their segment.
        index_embedding: whether they carry one of their place in the sequence (``add_absolute_position``).
        given: whether tokens may stand first that are given and not drawn; their two kinds carry an embedding each.

    Raises:
        ConfigError: a value is out of range.
    """

    width: int = 256
    heads: int = 8
    position_blocks: int = 2
    content_blocks: int = 4
    block_size: int = 259
    dropout: float = 0.1
    attention_dropout: float = 0.0
    segment_embedding: bool = True
    index_embedding: bool = True
    given: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "heads", "position_blocks", "content_blocks", "block_size"):
            most = 1024 if name.endswith("_blocks") else 1 << 20
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"transformer.{name} is {short(getattr(self, name))}; it must be at least 1, and {most} at most"
                )
        if self.width % self.heads:
            raise ConfigError(f"transformer.width is {self.width}; it must be a multiple of heads ({self.heads})")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"transformer.{name} is {getattr(self, name)}; it must be in [0, 1)")


ADDED = {"given": False}
"""Fields of TransformerConfig that checkpoints lack which were written before there were these, and what they were."""


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value; causal unless a mask says otherwise."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        in_float32 = q.device.type == "cpu" and torch.is_autocast_enabled("cpu")  # its bfloat16 kernels are slower
        with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
            q, k, v = (row.float() if in_float32 else row for row in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """Pre-norm transformer block with an exact-GELU MLP of width 4C; ``mask`` is bool, what each place reads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config.width
        self.ln1, self.ln2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln1(x), mask))
        return x + self.dropout(self.mlp(self.ln2(x)))


class Head(nn.Module):
    """Layer norm and a bias-free projection to logits."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class StackedTransformer(nn.Module):
    """Position stack and content stack over (position, content) tokens; ``layout.first`` says which reads the tokens.

    Index i reads token i and predicts one half of token i + 1, then the other. Positions are joint ids
    (``TokenLayout``); the position head predicts local ids. With ``text`` a prompt may stand in front of the start
    token, read by both stacks like tokens; the places of the image's tokens do not shift with it.
    """

    def __init__(self, config: TransformerConfig, layout: TokenLayout, text: TextConfig | None = None) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        c = config.width
        self.content_emb = nn.Embedding(layout.content_vocabulary, c)
        self.position_emb = nn.Embedding(layout.position_table, c)
        self.segment_emb = nn.Embedding(layout.segments, c) if config.segment_embedding else None
        self.index_emb = nn.Parameter(torch.zeros(config.block_size, c)) if config.index_embedding else None
        self.dropout = Dropout(config.dropout)
        self.position_blocks = nn.ModuleList(Block(config) for _ in range(config.position_blocks))
        self.content_blocks = nn.ModuleList(Block(config) for _ in range(config.content_blocks))
        self.position_head = Head(c, layout.position_head)
        self.content_head = Head(c, layout.content_vocabulary)
        self.text = None if text is None else TextEncoder(text, c, [Block(config) for _ in range(text.blocks)])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.given_emb = nn.Parameter(torch.randn(2, c) * 0.02) if config.given else None

    def parts(self, head: str) -> tuple[nn.ModuleList, Head, nn.Embedding]:
        """Blocks, head and embedding of ``position`` or ``content``."""
        if head == "position":
            return self.position_blocks, self.position_head, self.position_emb
        return self.content_blocks, self.content_head, self.content_emb

    def embed(
        self, content: Tensor, position: Tensor, segment: Tensor, index: Tensor, kind: Tensor | None = None
    ) -> Tensor:
        """Sum of the embeddings of tokens: int64 tensors of one shape [..] -> float [.., C].

        ``kind`` is 0 for tokens of the image's own sequence, 1 for given ones, 2 for hints; None for 0 everywhere.
        """
        x = self.content_emb(content) + self.position_emb(position)
        x = x if self.index_emb is None else x + self.index_emb[index]
        if kind is not None and self.given_emb is not None:
            x = x + F.embedding(kind, F.pad(self.given_emb, (0, 0, 1, 0)))
        return x if self.segment_emb is None else x + self.segment_emb(segment)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        segment: Tensor,
        following: Tensor,
        prompt: Tensor | None = None,
        prompt_length: Tensor | None = None,
        kind: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits.

        Args:
            content, position, segment: int64 [B, T], tokens 0 .. T - 1; T at most ``block_size``.
            following: int64 [B, T], of tokens 1 .. T what the first head predicts: joint positions or content.
            prompt, prompt_length: see ``TextEncoder.forward``; None for no prompts.
            kind: int64 [B, T], see ``embed``.

        Returns:
            position logits [B, T, position head] and content logits [B, T, content vocabulary].
        """
        prefix = self.prefix(prompt, prompt_length)
        h = self.hidden(content, position, segment, prefix, kind)
        first, second = self.first_logits(h[:, -content.shape[1] :]), self.second_logits(h, following, prefix)
        logits = {self.layout.heads[0]: first, self.layout.heads[1]: second}
        return logits["position"], logits["content"]

    def prefix(self, prompt: Tensor | None, length: Tensor | None) -> Prefix | None:
        """Prompts as the stacks read them; see ``TextEncoder.forward``."""
        if prompt is None or length is None:
            return None
        assert self.text is not None, "a model with text"
        return align_right(self.text(prompt, length), length)

    def hidden(
        self,
        content: Tensor,
        position: Tensor,
        segment: Tensor,
        prefix: Prefix | None = None,
        kind: Tensor | None = None,
    ) -> Tensor:
        """Output of the first stack, [B, T, C]; with P rows of a prefix before it [B, P + T, C]."""
        h = self.embed(content, position, segment, torch.arange(content.shape[1], device=content.device), kind)
        mask = None if prefix is None else prefix.mask(content.shape[1])
        h = self.dropout(h if prefix is None else torch.cat([prefix.rows, h], 1))
        for block in self.parts(self.layout.heads[0])[0]:
            h = block(h, mask)
        return h

    def first_logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] of the first head, from the first stack's output [.., C]."""
        return self.parts(self.layout.heads[0])[1](hidden)

    def second_logits(self, hidden: Tensor, following: Tensor, prefix: Prefix | None = None) -> Tensor:
        """Logits [B, T, V] of the second head, from ``hidden``'s output and what the first head predicts."""
        blocks, head, _ = self.parts(self.layout.heads[1])
        told = self.parts(self.layout.heads[0])[2](following)
        mask = None if prefix is None else prefix.mask(following.shape[1])
        g = hidden + (told if prefix is None else F.pad(told, (0, 0, prefix.rows.shape[1], 0)))
        for block in blocks:
            g = block(g, mask)
        return head(g[:, -following.shape[1] :])
