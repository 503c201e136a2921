"""MQ-VAE: an autoencoder that keeps codes for the most important cells of an image only and recovers the others
(arXiv 2305.13607; spec/mq.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtimes.errors import ConfigError
from training import processes
from training.models.blocks import AttnBlock, Contracting, Expanding, Middle, ResBlock, check_sizes, group_norm
from training.models.quantizer import EMAQuantizer
from training.models.tokenizer import EveryGrain, Reconstruction, Tokenizer, check_images
from training.models.whole_batch import BatchNorm2d, in_float32

ADDED = {"shrink": 1}
"""Fields of MQVAEConfig that checkpoints of before lack, and what they were like."""
SCORERS = ("conv", "token", "random")


@dataclass(frozen=True, slots=True)
class MQVAEConfig:
    """Sizes of an MQ-VAE.

    Args:
        image_size: side of the square images, pixels.
        channels: width of the first encoder level; ``encoder_mult`` scales it per level, and each level but the last
            halves the side.
        decoder_channels, decoder_mult: likewise for the decoder, highest resolution first.
        shrink: the encoder sees images whose side is this many times smaller; a power of two.
        blocks, decoder_blocks: residual blocks per encoder level; per decoder level (the decoder adds one more).
        attention, decoder_attention: image sides at which blocks are followed by attention.
        z_channels: width of the encoder's output.
        codebook_size, code_dim: number and width of the codes.
        norm_groups: groups of every normalisation (32 in the released code).
        kept_ratio: share of the cells that keep a code, in (0, 1]; K = int(kept_ratio * cells) must be at least 1.
        scorer: what finds the important cells: ``conv``, a convolutional network with batch normalisation over the
            jointly normalised map (the released configurations'); ``token``, two linear layers per cell; ``random``,
            the ablation baseline: other cells in every training step, the same ones for all images otherwise.
        demask_blocks: pairs of a residual and an attention block in the de-mask module.
        mask_damping: weight of a masked cell as a key in the first de-mask attention, in [0, 1]; every further one
            takes its square root.
        beta, decay, restart_below: see EMAQuantizer.

    Raises:
        ConfigError: a value is out of range.
    """

    image_size: int = 64
    channels: int = 32
    encoder_mult: tuple[int, ...] = (1, 1, 2)
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
    kept_ratio: float = 0.5
    scorer: str = "conv"
    demask_blocks: int = 4
    mask_damping: float = 0.02
    beta: float = 0.25
    decay: float = 0.99
    restart_below: float = 1.0
    shrink: int = 1

    def __post_init__(self) -> None:
        check_sizes(self)
        if len(self.decoder_mult) != (levels := len(self.encoder_mult) + self.shrink.bit_length() - 1):
            raise ConfigError(f"tokenizer.decoder_mult has {len(self.decoder_mult)} levels; the cells need {levels}")
        if not isinstance(self.kept_ratio, int | float) or not 0 < self.kept_ratio <= 1 or not self.kept:
            cells = self.sides[0] ** 2
            raise ConfigError(
                f"tokenizer.kept_ratio is {self.kept_ratio!r}; it must be at least {1 / cells:.4g} (one of {cells} "
                "cells) and at most 1"
            )
        if self.scorer not in SCORERS:
            raise ConfigError(f"tokenizer.scorer is {self.scorer!r}; it must be one of {SCORERS}")
        if type(self.demask_blocks) is not int or not 0 <= self.demask_blocks <= 256 or not 0 <= self.mask_damping <= 1:
            raise ConfigError(
                f"tokenizer.demask_blocks is {self.demask_blocks!r}, tokenizer.mask_damping {self.mask_damping!r}; "
                "they must be an integer of at least 0, 256 at most, and a number in [0, 1]"
            )

    @property
    def stride(self) -> int:
        """Pixels per side of a cell."""
        return int(self.shrink * 2 ** (len(self.encoder_mult) - 1))

    @property
    def sides(self) -> tuple[int]:
        """Cells per image side."""
        return (self.image_size // self.stride,)

    @property
    def kept(self) -> int:
        """K, the number of codes of an image; truncated as released (0.29 * 100 gives 28)."""
        return int(self.kept_ratio * self.sides[0] ** 2)

    def layout(self) -> dict[str, Any]:
        """Arguments of the TokenLayout that follow from the tokenizer; by default codes come first, as published."""
        sizes = {"codebook_size": self.codebook_size, "sides": self.sides, "kept": self.kept}
        return {**sizes, "first": "content", "label_in_position": False}


class Encoder(Contracting):
    """Image to feature map, [B, 3, H, W] -> [B, z, h, w]."""

    def __init__(self, config: MQVAEConfig) -> None:
        c, width = config, config.channels * config.encoder_mult[-1]
        super().__init__(
            c.image_size, c.channels, c.encoder_mult, c.blocks, c.attention, c.norm_groups, c.dropout, c.shrink
        )
        self.mid = Middle(width, c.norm_groups, c.dropout)
        self.norm_out = group_norm(width, c.norm_groups)
        self.conv_out = nn.Conv2d(width, c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        *_, h = self.maps(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class JointNorm(nn.Module):
    """Layer normalisation without parameters over all of [C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


class Kept(NamedTuple):
    """``vectors`` [B, K, d] to quantize, most important first, and their row-major ``positions`` int64 [B, K];
    ``scores`` [B, h, w] of all cells."""

    vectors: Tensor
    positions: Tensor
    scores: Tensor


class Masker(nn.Module):
    """Adaptive mask module (section 2.3): score every cell, keep the K best (the lower position on ties), normalise
    each one's features, weigh them by their score, project."""

    random_scores: Tensor

    def __init__(self, config: MQVAEConfig) -> None:
        super().__init__()
        c, self.kept = config.z_channels, config.kept
        self.score_pred_net: nn.Module | None = None
        if config.scorer == "conv":
            conv = [nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, 1, 1), BatchNorm2d(1)]
            self.score_pred_net = nn.Sequential(JointNorm(), *conv)
        elif config.scorer == "token":
            self.score_pred_net = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, 1))
        else:
            self.register_buffer("random_scores", torch.randn(config.sides[0] ** 2))
        self.scorer = config.scorer
        self.pre_projection = nn.Linear(c, config.code_dim, bias=False)

    def score(self, h: Tensor) -> Tensor:
        """Importance of each cell, [B, C, h, w] -> [B, h * w]; in 0..1 but for ``random``."""
        if self.score_pred_net is None:
            if not self.training:
                return self.random_scores.expand(h.shape[0], -1)
            return processes.drawn(h[:, 0].detach(), torch.Tensor.normal_).flatten(1)
        if self.scorer == "conv":
            return torch.sigmoid(self.score_pred_net(h)).flatten(1)
        return torch.sigmoid(self.score_pred_net(h.flatten(2).transpose(1, 2))).squeeze(2)

    def forward(self, h: Tensor) -> Kept:
        """Features [B, C, h, w] -> Kept."""
        scores = in_float32(self.score, h)  # of equal ones, which narrower numbers have many of, the lower is kept
        positions = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices[:, : self.kept]
        tokens = F.layer_norm(h.flatten(2).transpose(1, 2), h.shape[1:2])  # [B, h * w, C]
        kept = tokens.gather(1, positions[..., None].expand(-1, -1, h.shape[1]))
        if self.score_pred_net is not None:  # the only gradient that the scores get
            kept = kept * scores.gather(1, positions)[..., None]
        return Kept(self.pre_projection(kept), positions, scores.view(h.shape[0], *h.shape[2:]))


class DemaskBlock(nn.Module):
    """Residual block, then attention in which masked cells count less as keys."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resblock, self.attn = ResBlock(channels, channels, groups), AttnBlock(channels, groups)

    def forward(self, x: Tensor, damping: Tensor) -> Tensor:
        return self.attn(self.resblock(x), damping)


class Demasker(nn.Module):
    """Adaptive de-mask module (section 2.5): a learned vector stands in for every masked cell, and attention fills it
    in. Masked keys are damped, less from block to block."""

    def __init__(self, config: MQVAEConfig) -> None:
        super().__init__()
        d, width, self.damping = config.code_dim, config.decoder_channels * config.decoder_mult[-1], config.mask_damping
        self.mask_token = nn.Parameter(torch.empty(d).uniform_(-1 / d, 1 / d))
        self.post_projection = nn.Conv2d(d, width, 1)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(DemaskBlock(width, config.norm_groups) for _ in range(config.demask_blocks))
        self.last_resblock = ResBlock(width, width, config.norm_groups)

    def forward(self, values: Tensor, kept: Tensor) -> Tensor:
        """Quantized vectors [B, d, h, w], of any value where ``kept`` bool [B, h, w] is false -> [B, C, h, w]."""
        kept = kept[:, None]
        x = self.conv_in(self.post_projection(torch.where(kept, values, self.mask_token[:, None, None])))
        weight = torch.where(kept, 1.0, self.damping).flatten(1)
        for block in self.blocks:
            x = block(x, weight)
            weight = weight.sqrt()
        return self.last_resblock(x)


class Decoder(Expanding):
    """Recovered feature map to image, [B, C, h, w] -> [B, 3, H, W], not clamped."""

    def __init__(self, config: MQVAEConfig) -> None:
        c = config
        size, groups = c.image_size, c.norm_groups
        super().__init__(
            size, c.decoder_channels, c.decoder_mult, c.decoder_blocks, c.decoder_attention, groups, c.dropout
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.pixels(h)


class Encoding(NamedTuple):
    """``codes`` and row-major ``positions`` int64 [B, K], most important first; ``scores`` [B, h, w] of all cells."""

    codes: Tensor
    positions: Tensor
    scores: Tensor


class MQVAE(Tokenizer):
    """The tokenizer."""

    behind_codes = ("demasker", "decoder")

    def __init__(self, config: MQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.masker = Encoder(config), Masker(config)
        self.demasker, self.decoder = Demasker(config), Decoder(config)
        self.quantizer = EMAQuantizer(
            config.codebook_size,
            config.code_dim,
            beta=config.beta,
            decay=config.decay,
            restart_below=config.restart_below,
        )

    def encode(self, images: Tensor) -> Encoding:
        """Codes of images, float [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the images do not have the model's size.
        """
        check_images(images, self.config.image_size)
        kept = self.masker(self.encoder(images))
        codes = self.quantizer.search(kept.vectors.flatten(0, 1)).view(kept.positions.shape)
        return Encoding(codes, kept.positions, kept.scores)

    def decode_codes(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Images [B, 3, H, W] (about [-1, 1], not clamped) of ``codes`` int64 [B, n] at different row-major
        ``positions`` int64 [B, n]; their order and number do not matter."""
        return self.decode_maps(self.to_map(codes, positions))

    def encode_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.encode(images)
        codes = self.to_map(encoding.codes, encoding.positions)
        return codes, codes.clamp_max(0)

    def encode_grains(self, images: Tensor) -> EveryGrain:
        encoding = self.encode(images)
        codes = self.to_map(encoding.codes, encoding.positions)
        return EveryGrain(codes, codes.clamp_max(0), encoding.scores[..., None], codes[:, None])

    def decode_maps(self, codes: Tensor) -> Tensor:
        values = self.quantizer.lookup(codes.clamp_min(0)).permute(0, 3, 1, 2)
        return self.decoder(self.demasker(values, codes >= 0))

    def to_map(self, values: Tensor, positions: Tensor) -> Tensor:
        """int64 [B, n] -> [B, h, w], -1 at the cells that have none."""
        side = self.config.sides[0]
        return values.new_full((values.shape[0], side**2), -1).scatter(1, positions, values).view(-1, side, side)

    def code_vectors(self, images: Tensor) -> Tensor:
        return self.masker(self.encoder(images)).vectors.flatten(0, 1)

    def forward(self, images: Tensor, *, quantize: bool = True, noise: torch.Generator | None = None) -> Reconstruction:
        kept = self.masker(self.encoder(images))
        values, loss, codes = kept.vectors, images.new_zeros(()), None
        if quantize:
            out = self.quantizer(values.flatten(0, 1), noise=noise)
            values, loss, codes = out.values.view_as(values), out.loss, out.codes
        b, _, d = values.shape
        side = self.config.sides[0]
        at = kept.positions[..., None].expand(-1, -1, d)
        canvas = values.new_zeros(b, side**2, d).scatter(1, at, values).transpose(1, 2).view(b, d, side, side)
        grain = self.to_map(torch.zeros_like(kept.positions), kept.positions)
        return Reconstruction(self.decoder(self.demasker(canvas, grain >= 0)), loss, codes, grain, kept.scores)
