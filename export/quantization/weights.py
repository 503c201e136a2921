"""Quantisation of the stacked transformer: integer weights for ONNX Runtime's ``MatMulNBits`` and int8 caches for its
``GroupQueryAttention``.

Every linear layer keeps its weights as integers of 4 or 8 bits (``layer_bits``) with one float scale for each block of
inputs of each output. Embedding tables stay float32: a token reads one row of each, so they cost nothing. Keys and
values are cached as int8 with one scale for each channel, fixed at export.

The kernel rounds activations to 8 bits as well, per row and block of inputs. ``QuantLinear`` and ``CachedProjection``
compute the same in PyTorch, so that the parity check of a quantised engine compares like with like; what quantisation
itself costs is measured by ``export.accuracy``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from export.torch_program import draw_tokens, teacher_forced
from runtimes.errors import ExportError
from training.models.transformer import StackedTransformer

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
"""Inputs that share a scale. In larger blocks the kernel is faster, but adds up the last of an odd number of rows in
another order than the others, so that an image's bits would depend on its slot."""
DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
SHRINK = tuple(1 - step / 50 for step in range(-5, 21))
"""Scales that are tried, relative to the one that represents the largest weight."""
CALIBRATION, TOGETHER = 64, 16
"""Images that a model draws to be calibrated with, and how many of them at once."""
UNCALIBRATED = 4
"""Images that ranges come from if none are to be drawn: of random codes, or drawn where codes have no sequence."""


class QuantLinear(nn.Module):
    """A linear layer with ``packed`` uint8 [N, K / block, block * bits / 8], ``scales`` float32 [N, K / block] and
    ``bias`` float32 [N]: x float [.., K] -> float [.., N].

    ``weight`` float32 [N, K] is what the integers stand for; an exported graph does not hold it.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    weight: Tensor

    def __init__(self, levels: Tensor, scales: Tensor, bits: int, bias: Tensor | None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("packed", pack(levels, bits))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("weight", dequantise(levels, scales, bits))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.linear(round_activations(x), self.weight, self.bias)
        n, k = self.weight.shape
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.packed, self.scales],
            attrs={"K": k, "N": n, "bits": self.bits, "block_size": BLOCK, "accuracy_level": 4},
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


def quantise(model: StackedTransformer, weights: str, rows: Rows, *, feed_back: bool = True) -> StackedTransformer:
    """A copy of a model with QuantLinear layers and int8 caches.

    Args:
        weights: ``int8`` or ``int4``.
        rows: (content, joint position) of typical images, which the caches' ranges come from.
        feed_back: feed rounding errors back along the inputs' second moments over ``rows``, as in GPTQ
            (arXiv 2210.17323); if not, weights are rounded to the nearest.
    """
    net = copy.deepcopy(model)
    moments, scales_of_caches = observe(net, rows, moments=feed_back)
    for name, layer in list(linear_layers(net)):
        bits = layer_bits(name, weights, net.layout)
        levels, scales = quantise_weight(layer.weight.detach(), bits, moments.get(name))
        made: nn.Module = QuantLinear(levels, scales, bits, layer.bias)
        if name.endswith("attn.qkv"):
            made = CachedProjection(made, scales_of_caches[name])
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, made)
    return net.eval().requires_grad_(False)


def check_widths(model: StackedTransformer, weights: str) -> None:
    """
    Raises:
        ExportError: a layer's number of inputs is not a multiple of ``BLOCK``.
    """
    for name, layer in linear_layers(model):
        if layer.in_features % BLOCK:
            raise ExportError(
                f"{name} has {layer.in_features} inputs; {weights} needs a multiple of {BLOCK}, so use --weights fp32 "
                "or fp16"
            )


def layer_bits(name: str, weights: str, layout: TokenLayout) -> int:
    """Bits of a layer's weights. With ``int4`` those layers keep 8 whose rounding moves the distributions most: the
    heads, because a logit's error is the draw's error; the first block, whose error all others carry on; and the first
    layer of each MLP."""
    first = name.startswith(f"{layout.heads[0]}_blocks.0.")
    return 8 if weights == "int8" or first or name.endswith(("head.linear", ".mlp.0")) else 4


def own_rows(model: StackedTransformer, images: int, seed: int = 2**32) -> Rows:
    """(content, joint position) of images that the model draws for itself, with labels from the first to the last."""
    layout, rows = model.layout, []
    spread = spread_labels(layout, images)
    for first in range(0, images, TOGETHER):
        labels = spread[first : first + TOGETHER]
        rows += draw_tokens(model, labels, SamplingParams(), seed=seed, first_image=first)
    return rows


def spread_labels(layout: TokenLayout, images: int) -> list[int]:
    """Start labels for so many images: the first, the last, which is the null label if there is one, and others
    evenly between them."""
    return [round(i * (layout.starts - 1) / max(1, images - 1)) for i in range(images)]


def linear_layers(model: StackedTransformer) -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers, in the order in which they run."""
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))


@contextmanager
def watching(layers: Iterable[tuple[str, nn.Module]], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``look`` with the name, the input and the output of every layer that runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: look(name, inputs[0], output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def observe(model: StackedTransformer, rows: Rows, *, moments: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ``rows`` do to a model, by names of linear layers.

    Args:
        moments: whether to measure second moments, which takes long for large models; there are none if not.

    Returns:
        second moments, the mean of x x^T over the inputs x of every layer, float32 [K, K]; and the scales of the
        caches' channels, float32 [2, H, 1, D] by projection to query, key and value: the largest key or value that
        occurs becomes 127.
    """
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, y: Tensor) -> None:
        if moments:
            x = x.flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x
        if name.endswith("attn.qkv"):
            found = y[..., y.shape[-1] // 3 :].abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest.get(name, found), found)

    with watching(linear_layers(model), look):
        for content, position in rows:
            teacher_forced(model, content, position)
    tokens, heads = sum(len(content) - 1 for content, _ in rows), model.config.heads
    scales = {name: (top.clamp_min(1e-6) / 127).view(2, heads, 1, -1) for name, top in largest.items()}
    return {name: total / tokens for name, total in sums.items()}, scales


def quantise_weight(weight: Tensor, bits: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers and scales of a weight matrix.

    Args:
        weight: float32 [N, K], K a multiple of ``BLOCK``.
        moments: float32 [K, K], see ``observe``; None rounds to the nearest.

    Returns:
        levels uint8 [N, K] in 0 .. 2^bits - 1, standing for (level - 2^(bits - 1)) * scale; scales float32
        [N, K / BLOCK].
    """
    rest = weight.clone()
    k = rest.shape[1]
    importance = torch.ones(k) if moments is None else moments.diagonal().clamp_min(1e-12)
    feedback = None if moments is None else error_feedback(moments)
    levels, scales = torch.zeros_like(rest, dtype=torch.uint8), torch.zeros(rest.shape[0], k // BLOCK)
    for start in range(0, k, BLOCK):
        span = slice(start, start + BLOCK)
        scale = scales[:, start // BLOCK] = best_scale(rest[:, span], importance[span], bits)
        if feedback is None:
            levels[:, span] = to_levels(rest[:, span], scale[:, None], bits)
            continue
        errors = torch.zeros_like(rest[:, span])
        for j in range(start, start + BLOCK):
            levels[:, j] = to_levels(rest[:, j], scale, bits)
            error = (rest[:, j] - (levels[:, j].float() - 2 ** (bits - 1)) * scale) / feedback[j, j]
            rest[:, j + 1 : start + BLOCK] -= error[:, None] * feedback[j, j + 1 : start + BLOCK]
            errors[:, j - start] = error
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


def dequantise(levels: Tensor, scales: Tensor, bits: int) -> Tensor:
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
