"""Integer weights for ONNX Runtime's ``MatMulNBits``: how a matrix becomes integers, and layers that compute with them.

A linear layer keeps its weights as integers of 4 or 8 bits with one float scale for each block of inputs of each
output. The kernel rounds activations to 8 bits as well, per row and block of inputs. ``QuantLinear`` and
``CachedProjection`` compute the same in PyTorch, so that the parity check of a quantized engine compares like with
like; what quantization itself costs is measured by ``export.accuracy``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32
"""Inputs that share a scale. In larger blocks the kernel is faster, but adds up the last of an odd number of rows in
another order than the others, so that an image's bits would depend on its slot."""
DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
SHRINK = tuple(1 - step / 50 for step in range(-5, 21))
"""Scales that are tried, relative to the one that represents the largest weight."""


class QuantLinear(nn.Module):
    """A linear layer with ``packed`` uint8 [N, K / block, block * bits / 8], ``scales`` float32 [N, K / block] and
    ``bias`` float32 [N]: x float [.., K] -> float [.., N].

    ``weight`` float32 [N, K] is what the integers stand for; an exported graph does not hold it. ``rounds`` says
    whether the kernel also rounds activations to 8 bits, as on CPUs; on CUDA it does not.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    weight: Tensor

    def __init__(self, levels: Tensor, scales: Tensor, bits: int, bias: Tensor | None, rounds: bool = True) -> None:
        super().__init__()
        self.bits, self.rounds = bits, rounds
        self.register_buffer("packed", pack(levels, bits))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("weight", dequantize(levels, scales, bits))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.linear(round_activations(x) if self.rounds else x, self.weight, self.bias)
        n, k = self.weight.shape
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.packed, self.scales],
            attrs={"K": k, "N": n, "bits": self.bits, "block_size": BLOCK, "accuracy_level": 4 if self.rounds else 0},
            dtype=x.dtype,
            shape=[*x.shape[:-1], n],
            version=1,
        )
        return y if self.bias is None else y + self.bias


class CachedProjection(nn.Module):
    """Projection to query, key and value for a cache of int8: x float [B, T, C] -> float [B, T, 3 C], keys and values
    rounded to what the cache holds.

    ``cache_scales`` float32 [2, H, 1, D], of keys and of values. In an exported graph the attention does the rounding.
    """

    cache_scales: Tensor

    def __init__(self, linear: nn.Module, cache_scales: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("cache_scales", cache_scales)

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.linear(x)
        if torch.compiler.is_exporting():
            return qkv
        query, cached = qkv.split([qkv.shape[-1] // 3, qkv.shape[-1] // 3 * 2], -1)
        scales = self.cache_scales.flatten()
        rounded = (cached / scales).round().clamp(-128, 127) * scales
        if cached.requires_grad:
            rounded = cached + (rounded - cached).detach()
        return torch.cat([query, rounded], -1)


def quantize_weight(weight: Tensor, bits: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers and scales of a weight matrix.

    Args:
        weight: float32 [N, K], K a multiple of ``BLOCK``.
        moments: float32 [K, K], of the layer's inputs, see ``calibration.observe``; None rounds to the nearest.

    Returns:
        levels uint8 [N, K] in 0 .. 2^bits - 1, standing for (level - 2^(bits - 1)) * scale; scales float32
        [N, K / BLOCK].
    """
    rest = weight.clone()  # of columns not rounded yet: the weight, corrected for the errors of those before
    k = rest.shape[1]
    importance = torch.ones(k) if moments is None else moments.diagonal().clamp_min(1e-12)
    feedback = None if moments is None else error_feedback(moments)
    levels, scales = torch.zeros_like(rest, dtype=torch.uint8), torch.zeros(rest.shape[0], k // BLOCK)
    for start in range(0, k, BLOCK):
        span = slice(start, start + BLOCK)
        # one scale for the block, from the corrected weights
        scale = scales[:, start // BLOCK] = best_scale(rest[:, span], importance[span], bits)
        if feedback is None:
            levels[:, span] = to_levels(rest[:, span], scale[:, None], bits)
            continue
        # round column by column; the block's later columns make up for each error at once
        errors = torch.zeros_like(rest[:, span])
        for j in range(start, start + BLOCK):
            levels[:, j] = to_levels(rest[:, j], scale, bits)
            error = (rest[:, j] - (levels[:, j].float() - 2 ** (bits - 1)) * scale) / feedback[j, j]
            rest[:, j + 1 : start + BLOCK] -= error[:, None] * feedback[j, j + 1 : start + BLOCK]
            errors[:, j - start] = error
        # all later blocks make up for the whole block's errors in one product
        rest[:, start + BLOCK :] -= errors @ feedback[span, start + BLOCK :]
    return levels, scales


def error_feedback(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments: row j says how the error of input j is made up for
    by the inputs after it. float32 [K, K]."""
    damped = moments.double() + torch.eye(len(moments), dtype=torch.double) * (
        DAMPING * moments.diagonal().double().mean().clamp_min(1e-12)
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def best_scale(block: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The scale of each row of a block of weights [N, block] with the least squared error, weighted by
    ``importance`` [block]; float32 [N]. Its sign gives the largest weight the one more negative level there is."""
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))[:, 0]
    full = -largest / 2 ** (bits - 1)
    full = torch.where(full == 0, torch.ones_like(full), full)
    best, least = full, torch.full_like(full, torch.inf)
    for shrink in SHRINK:
        scale = full * shrink
        rounded = (to_levels(block, scale[:, None], bits).float() - 2 ** (bits - 1)) * scale[:, None]
        error = ((block - rounded).square() * importance).sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def to_levels(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest levels, uint8."""
    half = 2 ** (bits - 1)
    return ((weight / scale).round().clamp(-half, half - 1) + half).to(torch.uint8)


def dequantize(levels: Tensor, scales: Tensor, bits: int) -> Tensor:
    """float32 [N, K] of levels [N, K] and scales [N, K / BLOCK]."""
    return (levels.float() - 2 ** (bits - 1)) * scales.repeat_interleave(BLOCK, 1)


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels [N, K] as uint8 [N, K / BLOCK, BLOCK * bits / 8]; of two 4-bit levels the first is the low half."""
    n, k = levels.shape
    if bits == 4:
        levels = levels[:, ::2] | levels[:, 1::2] << 4
    return levels.reshape(n, k // BLOCK, BLOCK * bits // 8).contiguous()


def round_activations(x: Tensor) -> Tensor:
    """x float [.., K] with every block of every row rounded to 255 levels, as the kernel does."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((blocks / scale).round() * scale).flatten(-2)
