"""What stage 1 minimizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtimes.errors import ConfigError
from training.losses import adaptive_weight, hinge_loss, reconstruction_loss
from training.models.discriminator import PatchDiscriminator


@dataclass(frozen=True, slots=True)
class StageOneConfig:
    """What stage 1 has beyond TrainConfig.

    Args:
        warmup_fraction: share of the steps, at the start, without quantization; then the codebook starts from k-means.
        quantizer_weight: factor of the commitment loss.
        exclude: classes (sub-folders) whose images are not used.
        val_fraction: share of the images held out.
        adversarial_weight: factor of the adversarial loss, relative to the weight at which it pulls as hard as the
            picture loss (see ``adaptive_weight``); 0 trains without a discriminator, the released code has 0.75.
        adversarial_start: share of the steps after which the discriminator starts to learn and to count.
        discriminator_width, discriminator_layers: see PatchDiscriminator.
    """

    warmup_fraction: float = 0.25
    quantizer_weight: float = 1.0
    exclude: tuple[str, ...] = ()
    val_fraction: float = 0.05
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.5
    discriminator_width: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.quantizer_weight < math.inf:
            raise ConfigError(f"stage.quantizer_weight is {self.quantizer_weight}; it must be at least 0 and finite")
        if not 0 <= self.adversarial_weight < math.inf or not 0 <= self.adversarial_start < 1:
            raise ConfigError(
                f"stage.adversarial_weight {self.adversarial_weight} must be a number of at least 0, "
                f"stage.adversarial_start {self.adversarial_start} in [0, 1)"
            )
        if self.discriminator_width < 1 or self.discriminator_layers < 1:
            raise ConfigError(
                f"stage.discriminator_width {self.discriminator_width} and stage.discriminator_layers "
                f"{self.discriminator_layers} must be at least 1"
            )
        if not 0 <= self.warmup_fraction < 1 or not 0 < self.val_fraction < 1:
            raise ConfigError(
                f"stage.warmup_fraction {self.warmup_fraction} must be in [0, 1), "
                f"stage.val_fraction {self.val_fraction} in (0, 1)"
            )


class Objective:
    """The losses of a tokenizer and of its discriminator, with the state of the step just taken.

    The module that reconstructs is given to each call, so that it may be a wrapped tokenizer.

    Args:
        stage: weights and starts of the terms.
        steps: of the whole training, which the starts are shares of.
        codebook_size: of the tokenizer.
        last: the tokenizer's last weight, by which the adversarial loss is balanced.

    Attributes:
        start_quantizing: the step from which on codes are used.
        discriminator: None without an adversarial loss.
        quantizing: whether the step just taken used codes.
    """

    def __init__(self, stage: StageOneConfig, steps: int, codebook_size: int, last: nn.Parameter) -> None:
        self.stage, self.codebook_size, self.last = stage, codebook_size, last
        self.start_quantizing = int(steps * stage.warmup_fraction)
        self.start_judging = int(steps * stage.adversarial_start)
        self.discriminator: PatchDiscriminator | None = None
        if stage.adversarial_weight:
            self.discriminator = PatchDiscriminator(stage.discriminator_width, stage.discriminator_layers)
        self.quantizing = False
        self._judged: tuple[Tensor, Tensor] | None = None  # images and reconstructions of the step just taken

    def losses(self, tokenizer: nn.Module, images: Tensor, step: int) -> dict[str, Tensor]:
        """Scalars of one step, of which ``loss`` is to be minimized.

        Args:
            tokenizer: called as ``Tokenizer.forward`` is.
            images: float [B, 3, H, W] in [-1, 1].
            step: number of steps taken before.
        """
        self.quantizing = step >= self.start_quantizing
        out = tokenizer(images, quantize=self.quantizing)
        picture = reconstruction_loss(images, out.images)
        scalars = {"loss": picture + self.stage.quantizer_weight * out.loss, "picture": picture, "commitment": out.loss}
        if out.codes is not None:
            scalars["perplexity"] = perplexity(out.codes, self.codebook_size)
        self._judged = None
        if self.discriminator and step >= self.start_judging:
            self._judged = images, out.images.detach()
            adversarial = -self.discriminator(out.images).mean()
            factor = adaptive_weight(picture, adversarial, self.last, self.stage.adversarial_weight)
            scalars["loss"] = scalars["loss"] + factor * adversarial
            scalars |= {"adversarial": adversarial, "adversarial_weight": factor}
        return scalars

    def critic_loss(self) -> Tensor | None:
        """What the discriminator minimizes on the step just taken, a scalar; None while it does not learn."""
        if self.discriminator is None or self._judged is None:
            return None
        real, made = (self.discriminator(images) for images in self._judged)
        return hinge_loss(real, made)


def perplexity(codes: Tensor, size: int) -> Tensor:
    """exp of the entropy of code use, a scalar between 1 and ``size``."""
    p = torch.bincount(codes.flatten(), minlength=size).float()
    p = p / p.sum()
    return torch.exp(-(p * torch.log(p.clamp_min(1e-10))).sum())
