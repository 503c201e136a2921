"""By what the routers of a DQ-VAE choose the grain of each coarsest cell: the entropy of its pixels, or learned logits
(spec/dq.md sections 3, 4 and 7).

Gates and logits are [B, hc, wc, n], the coarsest of n grains first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import processes
from training.models.blocks import group_norm

GREY = (0.2989, 0.5870, 0.1140)  # adds to 0.9999, as released (spec Q16)
ENTROPY_BINS, ENTROPY_SIGMA = 32, 0.01
GRAINS = {2: ("coarse", "fine"), 3: ("coarse", "median", "fine")}
"""Names of the grains, by their number."""
GATES = ("linear", "silu", "relu")


def patch_entropy(images: Tensor, patch: int, low: float = -1.0) -> Tensor:
    """Entropy in nats of the grey values of each patch, by kernel density over 32 bins (spec section 3).

    p ln p is taken as 0 at p = 0, which equals the released formula within 1e-36 and needs no denormals (spec Q15).

    Args:
        images: float [B, 3, H, W] in [-1, 1].
        patch: patch side in pixels, dividing H and W.
        low: value of the first bin. The released threshold script, and the code that the released weights were trained
            with, had 0; the released code has -1 since (spec Q14).

    Returns:
        float [B, H / patch, W / patch] in 0 .. ln 32.
    """
    b, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    grey = sum(weight * images[:, i] for i, weight in enumerate(GREY))
    assert isinstance(grey, Tensor)
    values = grey.view(b, rows, patch, columns, patch).permute(0, 1, 3, 2, 4).reshape(b, rows, columns, patch**2)
    bins = torch.linspace(low, 1.0, ENTROPY_BINS, device=images.device)
    scaled = (values[..., None] - bins) / ENTROPY_SIGMA
    kernel = torch.exp(-0.5 * scaled * scaled).mean(3)  # [B, rows, columns, bins]
    total = kernel.sum(-1, keepdim=True)
    p = kernel / torch.where(total > 0, total, torch.ones_like(total))
    return -(p * torch.log(torch.where(p > 0, p, torch.ones_like(p)))).sum(-1)


class FeatureRouter(nn.Module):
    """Logits from the feature maps of all grains, each normalized and pooled to the coarsest grid.

    Args:
        channels: z of every map.
        grains: number of maps.
        groups: of the normalization, 0 for none.
        gate: ``linear``, or the nonlinearity between two linear layers, ``silu`` or ``relu``.
    """

    def __init__(self, channels: int, grains: int, groups: int, gate: str) -> None:
        super().__init__()
        width = grains * channels
        for name in GRAINS[grains]:
            norm = group_norm(channels, groups) if groups else nn.Identity()
            self.add_module(f"feature_norm_{name}", norm)
        self.norms = [f"feature_norm_{name}" for name in GRAINS[grains]]
        between: nn.Module = nn.ReLU() if gate == "relu" else nn.SiLU()
        layers = nn.Sequential(nn.Linear(width, width), between, nn.Linear(width, grains))
        self.gate = nn.Linear(width, grains) if gate == "linear" else layers

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, z, side, side], coarsest first, each of twice the side of the one before -> logits."""
        normed = [self.get_submodule(name)(x) for name, x in zip(self.norms, maps, strict=True)]
        pooled = [F.avg_pool2d(x, 2**s) if s else x for s, x in enumerate(normed)]
        logits: Tensor = self.gate(torch.cat(pooled, 1).permute(0, 2, 3, 1))
        return logits


def gumbel_noise(like: Tensor) -> Tensor:
    """What makes the largest of logits a draw of probability softmax(logits): standard Gumbel numbers."""
    return -processes.drawn(like.detach(), torch.Tensor.exponential_).log()


def draw_gate(logits: Tensor, noise: Tensor) -> Tensor:
    """A hard Gumbel-softmax draw: one-hot in value, with the gradient of softmax(logits + noise)."""
    soft = torch.softmax(logits + noise, dim=-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard - soft.detach() + soft


def budget_loss(gate: Tensor, ratios: Sequence[float], factors: Sequence[float]) -> Tensor:
    """Squared distances of a batch's shares of finer grains from what they shall be, a scalar. The batch is that of all
    processes.

    Args:
        gate: one-hot, as ``draw_gate`` gives it.
        ratios: wanted share of each grain but the coarsest; factors: of their terms.
    """
    loss = gate.new_zeros(())
    for s, (ratio, factor) in enumerate(zip(ratios, factors, strict=True), 1):
        more = 4**s - 1  # codes that such a cell has beyond one
        codes = gate.sum(-1) + more * gate[..., s]
        share = (processes.mean(codes.mean()) - 1) / more
        loss = loss + factor * (share - ratio) ** 2
    return loss


def fit_biases(logits: Tensor, ratios: Sequence[float], rounds: int = 100) -> Tensor:
    """Biases with which the largest logit gives each grain its share of cells.

    Args:
        logits: float [N, n] of cells.
        ratios: share of each grain but the coarsest.
        rounds: most passes; each moves one bias after another to where its grain has its share exactly.

    Returns:
        float [n], 0 for the coarsest.
    """
    biases, count = logits.new_zeros(logits.shape[1]), len(logits)
    wanted = [round(ratio * count) for ratio in ratios]
    for _ in range(rounds):
        for s in range(len(ratios), 0, -1):
            others = logits + biases
            others[:, s] = -torch.inf
            lead = (logits[:, s] - others.amax(1)).sort(descending=True).values
            k = min(max(wanted[s - 1], 1), count - 1)
            biases[s] = -(lead[k - 1] + lead[k]) / 2
        shares = torch.bincount((logits + biases).argmax(1), minlength=len(biases)) / count
        if all(abs(float(shares[s]) - ratio) < 1e-4 for s, ratio in enumerate(ratios, 1)):
            break
    return biases
