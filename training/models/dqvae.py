"""DQ-VAE: an autoencoder whose image regions get one coarse or four fine codes (arXiv 2305.11718, section 3.1;
spec/dq.md sections 1 to 6, the entropy-routed dual-granularity form)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtimes.errors import ConfigError
from training.models.blocks import Contracting, Expanding, Middle, check_sizes, group_norm
from training.models.quantizer import EMAQuantizer
from training.models.tokenizer import Reconstruction, Tokenizer, check_images

GREY = (0.2989, 0.5870, 0.1140)  # adds to 0.9999, as released (spec Q16)
ENTROPY_BINS, ENTROPY_SIGMA = 32, 0.01
POSITION_BIASES = ("none", "fourier", "fourier+learned")


@dataclass(frozen=True, slots=True)
class DQVAEConfig:
    """Sizes of a DQ-VAE.

    Args:
        image_size: side of the square images, pixels.
        channels: width of the first encoder level; ``encoder_mult`` scales it per level. The last level is the coarse
            grid, the one before it the fine grid.
        decoder_channels, decoder_mult: likewise for the decoder, highest resolution first.
        blocks, decoder_blocks: residual blocks per encoder level; per decoder level (the decoder adds one more).
        attention, decoder_attention: image sides at which blocks are followed by attention.
        z_channels: width of the encoder heads and the decoder input.
        codebook_size, code_dim: number and width of the codes.
        norm_groups: groups of every normalisation (32 in the released code).
        position_bias: what the decoder adds to its input: ``none``, ``fourier`` or ``fourier+learned``.
        fine_percent: share of regions, 1 to 99 percent, that the entropy threshold makes fine.
        beta, decay, restart_below, mask_weighted: see EMAQuantizer.
        entropy_low: value of the first entropy bin, -1 or 0 (see ``patch_entropy``); 0 is for released weights.

    Raises:
        ConfigError: a value is out of range.
    """

    image_size: int = 64
    channels: int = 32
    encoder_mult: tuple[int, ...] = (1, 1, 2, 4)
    decoder_channels: int = 32
    decoder_mult: tuple[int, ...] = (1, 1, 2)
    blocks: int = 1
    decoder_blocks: int = 1
    attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    z_channels: int = 64
    codebook_size: int = 512
    code_dim: int = 64
    norm_groups: int = 32
    dropout: float = 0.0
    position_bias: str = "fourier+learned"
    fine_percent: int = 50
    beta: float = 0.25
    decay: float = 0.99
    restart_below: float = 1.0
    mask_weighted: bool = True
    entropy_low: float = -1.0

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.entropy_low not in (-1.0, 0.0):
            raise ConfigError(f"tokenizer.entropy_low is {self.entropy_low}; it must be -1 or 0")
        if len(self.encoder_mult) < 2:
            raise ConfigError(f"tokenizer.encoder_mult is {self.encoder_mult}; dual granularity needs two levels")
        if self.encoder_mult[-1] % self.encoder_mult[-2]:
            raise ConfigError(
                f"tokenizer.encoder_mult is {self.encoder_mult}; the last must be a multiple of the last but one"
            )
        if 2 ** len(self.decoder_mult) != self.stride:
            raise ConfigError(
                f"tokenizer.decoder_mult has {len(self.decoder_mult)} levels; the fine grid needs "
                f"{len(self.encoder_mult) - 1}"
            )
        if type(self.fine_percent) is not int or not 1 <= self.fine_percent <= 99:
            raise ConfigError(f"tokenizer.fine_percent is {self.fine_percent}; it must be in 1..99")
        if self.position_bias not in POSITION_BIASES:
            raise ConfigError(f"tokenizer.position_bias is {self.position_bias!r}; it must be one of {POSITION_BIASES}")

    @property
    def stride(self) -> int:
        """Pixels per side of a coarse cell."""
        return int(2 ** (len(self.encoder_mult) - 1))

    @property
    def sides(self) -> tuple[int, int]:
        """Coarse and fine cells per image side."""
        return self.image_size // self.stride, 2 * self.image_size // self.stride

    def layout(self) -> dict[str, Any]:
        """Arguments of the TokenLayout that follow from the tokenizer."""
        return {"codebook_size": self.codebook_size, "sides": self.sides}


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


class Encoder(Contracting):
    """Image to a coarse and a fine feature map, the fine one taken one level earlier."""

    def __init__(self, config: DQVAEConfig) -> None:
        c, groups = config, config.norm_groups
        super().__init__(c.image_size, c.channels, c.encoder_mult, c.blocks, c.attention, groups, c.dropout)
        coarse = c.channels * c.encoder_mult[-1]
        fine = coarse // (c.encoder_mult[-1] // c.encoder_mult[-2])
        self.mid_coarse, self.mid_fine = Middle(coarse, groups, c.dropout), Middle(fine, groups, c.dropout)
        self.norm_out_coarse, self.norm_out_fine = group_norm(coarse, groups), group_norm(fine, groups)
        self.conv_out_coarse = nn.Conv2d(coarse, c.z_channels, 3, padding=1)
        self.conv_out_fine = nn.Conv2d(fine, c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> coarse [B, z, hc, wc], fine [B, z, 2 hc, 2 wc]."""
        *_, fine, coarse = self.maps(x)
        coarse = self.conv_out_coarse(F.silu(self.norm_out_coarse(self.mid_coarse(coarse))))
        return coarse, self.conv_out_fine(F.silu(self.norm_out_fine(self.mid_fine(fine))))


class FourierBias(nn.Module):
    """sin(W [x, y] + b) over coordinates in [-1, 1], [1, z, side, side]."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 1)
        nn.init.uniform_(self.conv.weight, -math.sqrt(9 / 2), math.sqrt(9 / 2))
        axis = torch.linspace(-1.0, 1.0, side)
        grid = torch.stack([axis.expand(side, side), axis[:, None].expand(side, side)])[None]
        self.register_buffer("grid", grid, persistent=False)

    def forward(self) -> Tensor:
        return torch.sin(self.conv(self.grid))


class LearnedBias(nn.Module):
    """row_embed[i] + col_embed[j], [1, z, side, side]."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.row_embed, self.col_embed = nn.Embedding(side, channels), nn.Embedding(side, channels)
        for table in (self.row_embed, self.col_embed):
            nn.init.trunc_normal_(table.weight, std=1.0, a=-2.0, b=2.0)

    def forward(self) -> Tensor:
        return (self.row_embed.weight[:, None] + self.col_embed.weight[None]).permute(2, 0, 1)[None]


class Decoder(Expanding):
    """Fine feature map to image; a position bias is added to its input (spec section 6)."""

    def __init__(self, config: DQVAEConfig) -> None:
        c, groups, width = config, config.norm_groups, config.decoder_channels * config.decoder_mult[-1]
        super().__init__(
            c.image_size, c.decoder_channels, c.decoder_mult, c.decoder_blocks, c.decoder_attention, groups, c.dropout
        )
        side = c.sides[1]
        if c.position_bias != "none":
            self.position_bias_fourier = FourierBias(c.z_channels, side)
        if c.position_bias == "fourier+learned":
            self.position_bias_learned = LearnedBias(c.z_channels, side)
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = Middle(width, groups, c.dropout)

    def forward(self, h: Tensor) -> Tensor:
        """[B, z, side, side] -> images [B, 3, H, W], not clamped."""
        if hasattr(self, "position_bias_fourier"):
            h = h + self.position_bias_fourier()
        if hasattr(self, "position_bias_learned"):
            h = h + self.position_bias_learned()
        return self.pixels(self.mid(self.conv_in(h)))


class Encoding(NamedTuple):
    """``codes`` int64 [B, hf, wf]; ``grain`` int64 [B, hc, wc], 0 coarse, 1 fine; ``entropy`` float [B, hc, wc]."""

    codes: Tensor
    grain: Tensor
    entropy: Tensor


class DQVAE(Tokenizer):
    """The tokenizer. ``entropy_thresholds`` [99] is the table made from the user's images (entry p - 1 is the p-th
    percentile); NaN until ``training.thresholds`` or training has filled it."""

    entropy_thresholds: Tensor

    def __init__(self, config: DQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.quantizer = EMAQuantizer(
            config.codebook_size,
            config.code_dim,
            beta=config.beta,
            decay=config.decay,
            restart_below=config.restart_below,
            mask_weighted=config.mask_weighted,
        )
        self.register_buffer("entropy_thresholds", torch.full((99,), float("nan")))

    def routing(self) -> dict[str, Any]:
        return {"router": "entropy", "entropy_low": self.config.entropy_low, "fine_percent": self.config.fine_percent}

    def threshold(self) -> Tensor:
        """The entropy above which a region is fine, a scalar."""
        return self.entropy_thresholds[99 - self.config.fine_percent]

    def route(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Grain (0 coarse, 1 fine) int64 [B, hc, wc] and entropy float [B, hc, wc] of [B, 3, H, W] images."""
        entropy = patch_entropy(images, self.config.stride, self.config.entropy_low)
        return (entropy > self.threshold()).long(), entropy

    def features(self, images: Tensor, grain: Tensor) -> Tensor:
        """Merged features before quantization, [B, d, hf, wf]: each coarse cell's vector stands in its four places."""
        coarse, fine = self.encoder(images)
        return self.quant_conv(torch.where(spread(grain)[:, None] == 0, spread(coarse), fine))

    def encode(self, images: Tensor) -> Encoding:
        """Codes of images, float [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the images do not have the model's size.
        """
        check_images(images, self.config.image_size)
        grain, entropy = self.route(images)
        h = self.features(images, grain)
        codes = self.quantizer.search(to_vectors(h)).view(h.shape[0], *h.shape[2:])
        return Encoding(codes, grain, entropy)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W] (about [-1, 1], not clamped) of code maps int64 [B, hf, wf]."""
        return self.decode(self.quantizer.lookup(codes).permute(0, 3, 1, 2))

    def decode(self, quantized: Tensor) -> Tensor:
        """Images of quantized features [B, d, hf, wf]."""
        return self.decoder(self.post_quant_conv(quantized))

    def encode_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.encode(images)
        return encoding.codes, encoding.grain

    def decode_maps(self, codes: Tensor) -> Tensor:
        return self.decode_codes(codes)

    def code_vectors(self, images: Tensor) -> Tensor:
        grain, _ = self.route(images)
        fine = spread(grain).bool()
        corner = torch.zeros_like(fine)  # one of a coarse cell's four copies
        corner[:, ::2, ::2] = True
        return self.features(images, grain).permute(0, 2, 3, 1)[fine | corner]

    def forward(self, images: Tensor, *, quantize: bool = True, noise: torch.Generator | None = None) -> Reconstruction:
        grain, entropy = self.route(images)
        h = self.features(images, grain)
        if not quantize:
            return Reconstruction(self.decode(h), h.new_zeros(()), None, grain, entropy)
        weight = 0.25 + 0.75 * spread(grain).to(h.dtype)  # 1 / number of copies
        out = self.quantizer(to_vectors(h), weight.flatten(), noise)
        values = out.values.view(len(h), *h.shape[2:], -1).permute(0, 3, 1, 2)
        return Reconstruction(self.decode(values), out.loss, out.codes.view(h.shape[0], *h.shape[2:]), grain, entropy)


def spread(x: Tensor) -> Tensor:
    """Repeat every cell to its 2x2 fine cells: [.., h, w] -> [.., 2h, 2w]."""
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def to_vectors(x: Tensor) -> Tensor:
    """[B, d, h, w] -> [B * h * w, d]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
