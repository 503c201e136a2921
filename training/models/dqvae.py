"""DQ-VAE: an autoencoder whose image regions get one code, four or sixteen (arXiv 2305.11718, section 3.1; spec/dq.md
sections 1 to 6). Two or three grains, routed by entropy or by a learned gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtimes.errors import ConfigError
from training.models.blocks import Contracting, Expanding, Middle, check_sizes, group_norm, shrunk
from training.models.quantizer import EMAQuantizer
from training.models.router import (
    GATES,
    GRAINS,
    FeatureRouter,
    budget_loss,
    draw_gate,
    gumbel_noise,
    patch_entropy,
)
from training.models.tokenizer import EveryGrain, Reconstruction, Tokenizer, check_images
from training.models.whole_batch import in_float32

ROUTERS = ("entropy", "feature")
ROUTER_GRADIENTS = ("chosen", "every")
POSITION_BIASES = ("none", "fourier", "fourier+learned")


@dataclass(frozen=True, slots=True)
class DQVAEConfig:
    """Sizes of a DQ-VAE.

    Args:
        image_size: side of the square images, pixels.
        channels: width of the first encoder level; ``encoder_mult`` scales it per level. The last level is the
            coarsest grid, the ones before it are the finer grids.
        decoder_channels, decoder_mult: likewise for the decoder, highest resolution first.
        shrink: the encoder and the entropy router see images whose side is this many times smaller; a power of two.
        blocks, decoder_blocks: residual blocks per encoder level; per decoder level (the decoder adds one more).
        attention, decoder_attention: image sides at which blocks are followed by attention.
        z_channels: width of the encoder heads and the decoder input.
        codebook_size, code_dim: number and width of the codes.
        norm_groups: groups of every normalisation (32 in the released code).
        position_bias: what the decoder adds to its input: ``none``, ``fourier`` or ``fourier+learned``.
        fine_percent, median_percent: share of regions, in percent, that are fine, and with three grains median. The
            rest is coarse. Whole numbers for the entropy router, which has a table of percentiles.
        beta, decay, restart_below, mask_weighted: see EMAQuantizer.
        entropy_low: value of the first entropy bin, -1 or 0 (see ``patch_entropy``); 0 is for released weights.
        grains: 2 (coarse, fine) or 3 (coarse, median, fine).
        router: what chooses the grain of a region: ``entropy``, its entropy against thresholds; ``feature``, a gate
            that is trained with the autoencoder.
        router_norm_groups, router_gate: of the feature router, see FeatureRouter.
        router_gradient: by what the feature router learns: ``chosen``, how the loss changes with the size of the
            features of the drawn grain, as released; ``every``, of every grain's, so that grains are compared.
        budget: factor of the loss that holds the feature router to the shares; 0 leaves it free.

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
    fine_percent: float = 50
    beta: float = 0.25
    decay: float = 0.99
    restart_below: float = 1.0
    mask_weighted: bool = True
    entropy_low: float = -1.0
    grains: int = 2
    median_percent: float = 0
    router: str = "entropy"
    router_norm_groups: int = 32
    router_gate: str = "silu"
    router_gradient: str = "chosen"
    budget: float = 10.0
    shrink: int = 1

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.entropy_low not in (-1.0, 0.0):
            raise ConfigError(f"tokenizer.entropy_low is {self.entropy_low}; it must be -1 or 0")
        if type(self.grains) is not int or self.grains not in GRAINS:
            raise ConfigError(f"tokenizer.grains is {self.grains!r}; it must be one of {sorted(GRAINS)}")
        if len(self.encoder_mult) < self.grains:
            raise ConfigError(
                f"tokenizer.encoder_mult is {self.encoder_mult}; {self.grains} grains need as many levels"
            )
        widths = self.encoder_mult[-self.grains :]
        if any(coarse % fine for fine, coarse in pairwise(widths)):
            raise ConfigError(
                f"tokenizer.encoder_mult is {self.encoder_mult}; of the last {self.grains} each must be a multiple of "
                "the one before"
            )
        if len(self.decoder_mult) != (levels := len(self.encoder_mult) - self.grains + self.shrink.bit_length()):
            raise ConfigError(
                f"tokenizer.decoder_mult has {len(self.decoder_mult)} levels; the fine grid needs {levels}"
            )
        self._check_router()
        if self.position_bias not in POSITION_BIASES:
            raise ConfigError(f"tokenizer.position_bias is {self.position_bias!r}; it must be one of {POSITION_BIASES}")

    def _check_router(self) -> None:
        """The fields of the router and its budget."""
        if self.router not in ROUTERS:
            raise ConfigError(f"tokenizer.router is {self.router!r}; it must be one of {ROUTERS}")
        if self.router_gradient not in ROUTER_GRADIENTS:
            raise ConfigError(
                f"tokenizer.router_gradient is {self.router_gradient!r}; it must be one of {ROUTER_GRADIENTS}"
            )
        names = [f"{grain}_percent" for grain in GRAINS[self.grains][1:]]
        kind, text = (int, "a whole number") if self.router == "entropy" else (int | float, "a number")
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 100:
                raise ConfigError(f"tokenizer.{name} is {value!r}; it must be {text} above 0 and below 100")
        if (total := sum(getattr(self, name) for name in names)) >= 100:
            raise ConfigError(
                f"tokenizer.{' + '.join(names)} is {total:g}; it must be below 100, because every region has one grain "
                "and some must stay coarse"
            )
        if self.grains == 2 and self.median_percent:
            raise ConfigError(
                f"tokenizer.median_percent is {self.median_percent}, but there are two grains; set it to 0, or "
                "tokenizer.grains to 3"
            )
        if self.router_gate not in GATES:
            raise ConfigError(f"tokenizer.router_gate is {self.router_gate!r}; it must be one of {GATES}")
        groups = self.router_norm_groups
        if type(groups) is not int or groups < 0 or (self.router == "feature" and groups and self.z_channels % groups):
            raise ConfigError(
                f"tokenizer.router_norm_groups is {groups!r}; it must be 0, for none, or divide z_channels, "
                f"{self.z_channels}"
            )
        if not isinstance(self.budget, int | float) or not 0 <= self.budget < math.inf:
            raise ConfigError(f"tokenizer.budget is {self.budget!r}; it must be a number of at least 0")

    @property
    def ratios(self) -> tuple[float, ...]:
        """Share of the regions that get each grain but the coarsest."""
        return tuple(getattr(self, f"{grain}_percent") / 100 for grain in GRAINS[self.grains][1:])

    @property
    def stride(self) -> int:
        """Pixels per side of a coarsest cell."""
        return int(self.shrink * 2 ** (len(self.encoder_mult) - 1))

    @property
    def sides(self) -> tuple[int, ...]:
        """Cells per image side of each grain, coarse to fine."""
        return tuple(2**s * self.image_size // self.stride for s in range(self.grains))

    def layout(self) -> dict[str, Any]:
        """Arguments of the TokenLayout that follow from the tokenizer."""
        return {"codebook_size": self.codebook_size, "sides": self.sides}


ADDED = {
    "entropy_low": -1.0,
    "grains": 2,
    "median_percent": 0,
    "router": "entropy",
    "router_norm_groups": 32,
    "router_gate": "silu",
    "router_gradient": "chosen",
    "budget": 10.0,
    "shrink": 1,
}
"""Fields of DQVAEConfig that checkpoints lack which were written before there were these, and what they were like."""


class Encoder(Contracting):
    """Image to one feature map per grain, each finer one taken one level earlier."""

    def __init__(self, config: DQVAEConfig) -> None:
        c, groups = config, config.norm_groups
        super().__init__(c.image_size, c.channels, c.encoder_mult, c.blocks, c.attention, groups, c.dropout, c.shrink)
        self.grains = GRAINS[c.grains]
        widths = {g: c.channels * m for g, m in zip(self.grains, reversed(c.encoder_mult[-c.grains :]), strict=True)}
        for grain, width in widths.items():
            self.add_module(f"mid_{grain}", Middle(width, groups, c.dropout))
        for grain, width in widths.items():
            self.add_module(f"norm_out_{grain}", group_norm(width, groups))
        for grain, width in widths.items():
            self.add_module(f"conv_out_{grain}", nn.Conv2d(width, c.z_channels, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> [B, z, side, side] of each grain, coarsest first."""
        trunks = list(self.maps(x))[-len(self.grains) :]
        return tuple(self.head(grain, trunk) for grain, trunk in zip(self.grains, reversed(trunks), strict=True))

    def head(self, grain: str, trunk: Tensor) -> Tensor:
        mid, norm, conv = (self.get_submodule(f"{part}_{grain}") for part in ("mid", "norm_out", "conv_out"))
        out: Tensor = conv(F.silu(norm(mid(trunk))))
        return out


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
        side = c.sides[-1]
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
    """``codes`` int64 [B, hf, wf]; ``grain`` int64 [B, hc, wc], 0 is the coarsest; ``scores`` float [B, hc, wc] that it
    was chosen by: the entropy, or how far the finest grain's logit is above the coarsest's."""

    codes: Tensor
    grain: Tensor
    scores: Tensor


class Features(NamedTuple):
    """``merged`` [B, d, hf, wf], what is quantized: the vector of a coarser cell stands in all places that it covers;
    ``grain`` and ``scores`` as of Encoding; ``maps`` of every grain before they are merged, coarsest first; ``logits``
    and ``gate`` [B, hc, wc, n] of the feature router, the gate only in training."""

    merged: Tensor
    grain: Tensor
    scores: Tensor
    maps: Sequence[Tensor]
    logits: Tensor | None = None
    gate: Tensor | None = None


class DQVAE(Tokenizer):
    """The tokenizer.

    ``entropy_thresholds`` [99] is the table made from the user's images (entry p - 1 is the p-th percentile); NaN until
    ``training.thresholds`` or training has filled it. A model with a feature router has ``router_biases`` [n] instead,
    which are added to its logits where it does not learn; 0 until they are fitted to the user's images.
    """

    entropy_thresholds: Tensor
    router_biases: Tensor
    behind_codes = ("post_quant_conv", "decoder")

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
        if config.router == "entropy":
            self.register_buffer("entropy_thresholds", torch.full((99,), float("nan")))
        else:
            c = config
            self.router = FeatureRouter(c.z_channels, c.grains, c.router_norm_groups, c.router_gate)
            self.register_buffer("router_biases", torch.zeros(config.grains))

    def routing(self) -> dict[str, Any]:
        c = self.config
        shares = {"fine_percent": c.fine_percent} | ({"median_percent": c.median_percent} if c.grains == 3 else {})
        return {"router": c.router, **({"entropy_low": c.entropy_low} if c.router == "entropy" else {}), **shares}

    def thresholds(self) -> list[Tensor]:
        """The entropies above which a region has at least each grain but the coarsest, scalars."""
        c = self.config
        percents = [c.fine_percent] if c.grains == 2 else [c.fine_percent + c.median_percent, c.fine_percent]
        return [self.entropy_thresholds[99 - int(percent)] for percent in percents]

    def route(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Grain int64 [B, hc, wc] and entropy float [B, hc, wc] of [B, 3, H, W] images, by the entropy router."""
        c = self.config
        entropy = patch_entropy(shrunk(images, c.shrink), c.stride // c.shrink, c.entropy_low)
        grain, *finer = ((entropy > threshold).long() for threshold in self.thresholds())
        for more in finer:
            grain = grain + more
        return grain, entropy

    def logits(self, images: Tensor) -> Tensor:
        """What the feature router makes of [B, 3, H, W] images, without biases: float [B, hc, wc, n]."""
        logits: Tensor = self.router(self.encoder(images))
        return logits

    def features(self, images: Tensor) -> Features:
        """Route [B, 3, H, W] images and merge the grains; in training a feature router draws."""
        logits, gate = None, None
        if self.config.router == "entropy":
            grain, scores = in_float32(self.route, images)
            maps = self.encoder(images)
        else:
            maps = self.encoder(images)
            logits = in_float32(lambda *maps: self.router(maps), *maps)
            gate = draw_gate(logits, gumbel_noise(logits)) if self.router.training else None
            grain = (logits + self.router_biases if gate is None else gate).argmax(-1)
            scores = logits[..., -1] - logits[..., 0]
        return Features(self.quant_conv(self.merge(maps, grain, gate)), grain, scores, maps, logits, gate)

    def merge(self, maps: Sequence[Tensor], grain: Tensor, gate: Tensor | None = None) -> Tensor:
        """One map [B, z, hf, wf] of the grains' maps, coarsest first; a gate carries the router's gradient: its largest
        entries, which are 1, times the map, or the sum of all its entries times the grains' maps."""
        times = self.config.grains - 1
        if gate is not None and self.config.router_gradient == "every":
            gates = spread(gate.permute(3, 0, 1, 2), times)[:, :, None]
            return torch.stack(
                [g * spread(h, times - s) for s, (g, h) in enumerate(zip(gates, maps, strict=True))]
            ).sum(0)
        merged, *coarser = reversed(maps)
        spread_grain = spread(grain, times)[:, None]
        for step, coarse in enumerate(coarser, 1):
            merged = torch.where(spread_grain == times - step, spread(coarse, step), merged)
        return merged if gate is None else merged * spread(gate.amax(-1), times)[:, None]

    def encode(self, images: Tensor) -> Encoding:
        """Codes of images, float [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the images do not have the model's size.
        """
        check_images(images, self.config.image_size)
        h, grain, scores, *_ = self.features(images)
        codes = self.quantizer.search(to_vectors(h)).view(h.shape[0], *h.shape[2:])
        return Encoding(codes, grain, scores)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W] (about [-1, 1], not clamped) of code maps int64 [B, hf, wf]."""
        return self.decode(self.quantizer.lookup(codes).permute(0, 3, 1, 2))

    def decode(self, quantized: Tensor) -> Tensor:
        """Images of quantized features [B, d, hf, wf]."""
        return self.decoder(self.post_quant_conv(quantized))

    def encode_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.encode(images)
        return encoding.codes, encoding.grain

    def encode_grains(self, images: Tensor) -> EveryGrain:
        check_images(images, self.config.image_size)
        routed, times = self.features(images), self.config.grains - 1
        codes = self.quantizer.search(to_vectors(routed.merged)).view(images.shape[0], *routed.merged.shape[2:])
        grain_codes = []
        for s, h in enumerate(routed.maps):
            own = self.quantizer.search(to_vectors(self.quant_conv(h))).view(images.shape[0], *h.shape[2:])
            grain_codes.append(spread(own, times - s))
        # a region of twice the entropy needs a finer grain twice as much
        steps = torch.arange(times + 1, dtype=routed.scores.dtype, device=routed.scores.device)
        scores = routed.scores[..., None] * steps if routed.logits is None else routed.logits.float()
        return EveryGrain(codes, routed.grain, scores, torch.stack(grain_codes, 1))

    def decode_maps(self, codes: Tensor) -> Tensor:
        return self.decode_codes(codes)

    def code_vectors(self, images: Tensor) -> Tensor:
        h, grain, *_ = self.features(images)
        times = self.config.grains - 1
        grain = spread(grain, times)
        first = torch.zeros_like(grain).bool()  # of the copies of a vector
        for s in range(times + 1):
            side = 2 ** (times - s)
            first[:, ::side, ::side] |= grain[:, ::side, ::side] == s
        return h.permute(0, 2, 3, 1)[first]

    def copy_weights(self, grain: Tensor) -> Tensor:
        """1 / the number of copies of each vector in the merged map: int64 [B, hc, wc] -> float [B, hf, wf]."""
        times = self.config.grains - 1
        return 4.0 ** (spread(grain, times) - times)

    def forward(self, images: Tensor, *, quantize: bool = True, noise: torch.Generator | None = None) -> Reconstruction:
        h, grain, scores, _, _, gate = self.features(images)
        ratios = self.config.ratios
        budget = None if gate is None else budget_loss(gate, ratios, [self.config.budget] * len(ratios))
        if not quantize:
            return Reconstruction(self.decode(h), h.new_zeros(()), None, grain, scores, budget)
        out = self.quantizer(to_vectors(h), self.copy_weights(grain).flatten(), noise)
        values = out.values.view(len(h), *h.shape[2:], -1).permute(0, 3, 1, 2)
        codes = out.codes.view(h.shape[0], *h.shape[2:])
        return Reconstruction(self.decode(values), out.loss, codes, grain, scores, budget)


def spread(x: Tensor, times: int = 1) -> Tensor:
    """Repeat every cell to the cells of a grid with twice the side, so many times: [.., h, w] -> [.., 2h, 2w]."""
    return x.repeat_interleave(2**times, -1).repeat_interleave(2**times, -2)


def to_vectors(x: Tensor) -> Tensor:
    """[B, d, h, w] -> [B * h * w, d]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
