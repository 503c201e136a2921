"""Convolutional building blocks of the tokenizers (spec/dq.md section 1, spec/mq.md sections 2.1, 2.2 and 2.6).

All maps are float [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtimes.errors import ConfigError, short
from training.models.whole_batch import Dropout

SIZES = (
    *("image_size", "channels", "encoder_mult", "decoder_channels", "decoder_mult", "blocks", "decoder_blocks"),
    *("attention", "decoder_attention", "z_channels", "codebook_size", "code_dim", "norm_groups", "shrink"),
)
"""Fields that the configurations of both tokenizers have."""


MOST = {"image_size": 4096, "blocks": 256, "decoder_blocks": 256}
MOST_LEVELS = 16


def check_sizes(config: Any) -> None:
    """Checks that the configurations of both tokenizers share; turns lists into tuples.

    Raises:
        ConfigError: names the field, its value and what it must be.
    """
    for name in ("encoder_mult", "decoder_mult", "attention", "decoder_attention"):
        object.__setattr__(config, name, tuple(getattr(config, name)))
    for name in SIZES:
        value = getattr(config, name)
        sizes = value if isinstance(value, tuple) else (value,)
        most = MOST.get(name, 1 << 20)
        if len(sizes) > MOST_LEVELS or not all(type(size) is int and 1 <= size <= most for size in sizes):
            raise ConfigError(
                f"tokenizer.{name} is {short(value)}; it must be positive integers, of at most {most}, at most "
                f"{MOST_LEVELS} of them"
            )
    if config.shrink & (config.shrink - 1):
        raise ConfigError(f"tokenizer.shrink is {config.shrink}; it must be a power of two")
    if config.image_size < 11:
        raise ConfigError(f"tokenizer.image_size is {config.image_size}; it must be at least 11, the window of SSIM")
    if config.image_size % config.stride:
        raise ConfigError(f"tokenizer.image_size is {config.image_size}; it must be a multiple of {config.stride}")
    widths = [config.channels * m for m in (1, *config.encoder_mult)]
    widths += [config.decoder_channels * m for m in config.decoder_mult]
    if bad := [w for w in widths if w % config.norm_groups]:
        raise ConfigError(f"tokenizer.norm_groups is {config.norm_groups}; it must divide every width, not {bad}")
    if not 0 <= config.decay < 1 or not 0 <= config.dropout < 1:
        raise ConfigError(f"tokenizer.decay {config.decay} and tokenizer.dropout {config.dropout} must be in [0, 1)")
    for name in ("beta", "restart_below"):
        if not 0 <= getattr(config, name) <= 1e9:
            raise ConfigError(f"tokenizer.{name} is {short(getattr(config, name))}; it must be in 0..1e9")


def shrunk(images: Tensor, times: int) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] whose side is ``times`` smaller (1 or an even number), by Lanczos' filter of three
    lobes."""
    if times == 1:
        return images
    reach, channels = 3 * times, images.shape[1]
    at = (torch.arange(2 * reach, device=images.device) + 0.5) / times - 3
    taps = torch.sinc(at) * torch.sinc(at / 3)
    taps = (taps / taps.sum()).to(images.dtype).expand(channels, 1, 1, -1)
    edge = reach - times // 2
    rows = F.conv2d(F.pad(images, (edge, edge, edge, edge), mode="replicate"), taps, stride=(1, times), groups=channels)
    return F.conv2d(rows, taps.transpose(2, 3), stride=(times, 1), groups=channels).clamp(-1, 1)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation with eps 1e-6; ``channels`` must be a multiple of ``groups`` (32 in the released code)."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv; added to the input (through a 1x1 conv if the width changes)."""

    def __init__(self, c_in: int, c_out: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all H*W places, added to the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, damping: Tensor | None = None) -> Tensor:
        """[B, C, H, W]; ``damping`` [B, H*W] multiplies each key's weight after the softmax (spec/mq.md 2.5)."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, HW]
        scores = q.transpose(1, 2) @ k * x.shape[1] ** -0.5  # [B, HW(query), HW(key)]
        weight = torch.softmax(scores.float(), dim=-1)  # float32 also where the features are narrower
        if damping is not None:
            weight = weight * damping[:, None]
        return x + self.proj_out((v @ weight.to(v.dtype).transpose(1, 2)).view_as(x))


class Downsample(nn.Module):
    """Half the side: zero padding on the right and bottom only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where asked, then an optional change of side."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, groups: int, dropout: float) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups, dropout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at constant width."""

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups, dropout)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Contracting(nn.Module):
    """A convolution and one Level per entry of ``mult``, with half the side from each to the next.

    Args:
        size: pixels per side; attention sides are compared with ``size / shrink / 2 ** level``.
        channels: width of the first convolution, which ``mult`` scales per level.
        shrink: the first convolution sees images whose side is this many times smaller, see ``shrunk``.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        mult: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        groups: int,
        dropout: float,
        shrink: int = 1,
    ) -> None:
        super().__init__()
        self.shrink, size = shrink, size // shrink
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, m in enumerate(mult):
            width = channels * m
            c_in = channels * mult[level - 1] if level else channels
            self.down.append(Level(c_in, width, blocks, size // 2**level in attention, groups, dropout))
            if level < len(mult) - 1:
                self.down[level].downsample = Downsample(width)

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """[B, 3, H, W] -> what each level makes of it, largest side first."""
        h = self.conv_in(shrunk(x, self.shrink))
        for i, level in enumerate(self.down):
            h = level(h)
            yield h
            if i < len(self.down) - 1:
                h = level.get_submodule("downsample")(h)


class Expanding(nn.Module):
    """One Level per entry of ``mult``, the last first, with twice the side from each to the next; then the pixels.

    Args: as Contracting; ``blocks`` counts one less than a level has.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        mult: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in mult]
        levels: list[nn.Module] = []
        for level in range(len(widths) - 1, -1, -1):
            c_in = widths[min(level + 1, len(widths) - 1)]
            module = Level(c_in, widths[level], blocks + 1, size // 2**level in attention, groups, dropout)
            if level:
                module.upsample = Upsample(widths[level])
            levels.insert(0, module)
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def pixels(self, h: Tensor) -> Tensor:
        """[B, C, side, side] -> images [B, 3, H, W], not clamped."""
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h)
            if i:
                h = level.get_submodule("upsample")(h)
        return self.conv_out(F.silu(self.norm_out(h)))
