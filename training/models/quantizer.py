"""Vector quantizer with an exponential-moving-average codebook and a mask (spec/dq.md section 5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training import processes
from training.models.whole_batch import in_float32


class Quantized(NamedTuple):
    """``values`` [.., d] straight-through, ``codes`` int64 [..], ``loss`` scalar."""

    values: Tensor
    codes: Tensor
    loss: Tensor


class EMAQuantizer(nn.Module):
    """Nearest-code quantizer over vectors [N, d].

    Args:
        codes: codebook size K.
        dim: vector width d.
        beta: weight of the commitment loss.
        decay: decay of the moving averages, one update per training forward.
        restart_below: codes whose average count per update falls below this move to random inputs; 1 in the released
            code, 0 switches it off.
        mask_weighted: count a vector by its mask weight, so that a coarse vector and its copies count as one. The
            released code counts every copy (spec Q18); ``False`` reproduces that.

    Under autocast it computes in float32. Where several processes train, counts and sums are those of all vectors and
    restarts draw from all, so that the codebook stays the same everywhere.

    The codebook carries no gradient. Its moving averages start from the codebook itself (spec Q17, fixed form).
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_sum: Tensor

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 1.0,
        mask_weighted: bool = True,
    ) -> None:
        super().__init__()
        self.beta, self.decay, self.restart_below, self.mask_weighted = beta, decay, restart_below, mask_weighted
        start = torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes)
        self.register_buffer("codebook", start)
        self.register_buffer("cluster_size", torch.ones(codes))
        self.register_buffer("embed_sum", start.clone())

    def search(self, x: Tensor) -> Tensor:
        """Index of the nearest code (lowest index on ties): float [N, d] -> int64 [N]."""
        norms = (x * x).sum(1, keepdim=True) + (self.codebook * self.codebook).sum(1)
        return torch.addmm(norms, x, self.codebook.T, alpha=-2).argmin(1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook rows: int64 [..] -> float [.., d]."""
        return self.codebook[codes]

    def forward(self, x: Tensor, mask: Tensor | None = None, noise: torch.Generator | None = None) -> Quantized:
        """Quantize vectors; in training mode also update the codebook (this call still uses the old one).

        Args:
            x: float [N, d].
            mask: float [N], weight of each vector in the loss (and in the counts), or None for ones.
            noise: generator of the random restarts.

        Returns:
            Quantized; its loss is (beta + 1) * mean(mask * (x - q) ** 2), of which only beta's part has a gradient.
        """
        weight = x.new_ones(len(x)) if mask is None else mask
        return in_float32(lambda x, weight: self._quantize(x, weight, noise), x, weight)

    def _quantize(self, x: Tensor, weight: Tensor, noise: torch.Generator | None) -> Quantized:
        codes = self.search(x.detach())
        q = self.lookup(codes)
        loss = (self.beta * (q - x) ** 2 + (q - x.detach()) ** 2).mul(weight[:, None]).mean()
        if self.training:
            self.update(x.detach(), codes, weight, noise)
        return Quantized(x + (q - x).detach(), codes, loss)

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor, weight: Tensor, noise: torch.Generator | None) -> None:
        """One step of the moving averages, restarts, and the refresh of the codebook."""
        if not self.mask_weighted:
            weight = torch.ones_like(weight)
        count = processes.total(torch.zeros_like(self.cluster_size).index_add_(0, codes, weight))
        total = processes.total(torch.zeros_like(self.embed_sum).index_add_(0, codes, x * weight[:, None]))
        self.cluster_size.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.embed_sum.mul_(self.decay).add_(total, alpha=1 - self.decay)
        if self.restart_below:
            pool = self._pool(x, noise)
            dead = self.cluster_size < self.restart_below
            self.embed_sum.copy_(torch.where(dead[:, None], pool, self.embed_sum))
            self.cluster_size.masked_fill_(dead, 1.0)
        self.refresh()

    def refresh(self) -> None:
        """Set the codebook to the smoothed means of the moving averages."""
        total = self.cluster_size.sum()
        smooth = (self.cluster_size + 1e-5) / (total + len(self.cluster_size) * 1e-5) * total
        self.codebook.copy_(self.embed_sum / smooth[:, None])

    def _pool(self, x: Tensor, noise: torch.Generator | None) -> Tensor:
        """K random input vectors of all processes; too few inputs are repeated with a little noise."""
        (k, dim), n = self.codebook.shape, len(x) * processes.count()
        device, copies = x.device if noise is None else noise.device, max(1, -(-k // n))
        jitter = torch.rand((copies * n, dim), generator=noise, device=device) if copies > 1 else None
        drawn = torch.randperm(copies * n, generator=noise, device=device)[:k]
        pool = processes.gathered(x, (drawn % n).to(x.device))
        return pool if jitter is None else pool + (jitter[drawn] * (0.01 / dim**0.5)).to(x.device)

    @torch.no_grad()
    def initialize(self, x: Tensor, per_step: float, rounds: int = 10, noise: torch.Generator | None = None) -> None:
        """Start from k-means of vectors.

        Args:
            x: float [N, d], N at least K.
            per_step: total weight of the vectors of one update, to which the moving averages' counts are scaled.
            rounds: of Lloyd's algorithm.
            noise: generator of the random starts.
        """
        x = x.detach()
        self.codebook.copy_(self._pool(x, noise))
        for _ in range(rounds):
            codes = self.search(x)
            count = torch.zeros_like(self.cluster_size).index_add_(0, codes, x.new_ones(len(x)))
            total = torch.zeros_like(self.embed_sum).index_add_(0, codes, x)
            used = count > 0
            self.codebook[used] = total[used] / count[used, None]
            self.codebook[~used] = self._pool(x, noise)[~used]
        self.cluster_size.copy_(count * (per_step / count.sum())).clamp_(min=max(self.restart_below, 1e-3))
        self.embed_sum.copy_(self.codebook * self.cluster_size[:, None])
