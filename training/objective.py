"""What stage 1 minimizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtimes.errors import ConfigError, short
from training import processes
from training.losses import ADVERSARIAL_LOSSES, PICTURE_LOSSES, adaptive_weight
from training.models.discriminator import PatchDiscriminator
from training.perceptual import PERCEPTUAL


@dataclass(frozen=True, slots=True)
class StageOneConfig:
    """What stage 1 has beyond TrainConfig.

    Args:
        learns: ``all``, or ``decoder``: only what makes images of codes learns, so that every image keeps its codes and
            a transformer that was trained on them fits. That needs a tokenizer to start from.
        warmup_fraction: share of the steps, at the start, without quantization; then the codebook starts from k-means.
        quantizer_weight: factor of the commitment loss.
        min_perplexity: share of the codebook that the perplexity of the codes must reach; training ends with an error
            where it is lower at three validations in a row. 0 lets it be anything.
        exclude: classes (sub-folders) whose images are not used.
        val_fraction: share of the images held out.
        picture: ``multiscale`` (see ``reconstruction_loss``), ``l1`` as released, or ``l2``.
        perceptual: ``none``; ``lpips``, as released, with weights of your own; ``efficientnet``, the substitute.
        perceptual_weight: factor of the perceptual distance, which is added to the picture loss.
        lpips_weights: folder, or the two files, of the weights of LPIPS; see ``load_lpips``.
        adversarial: ``hinge``, as released, or ``non_saturating``.
        adversarial_weight: factor of the adversarial loss, relative to the weight at which it pulls as hard as picture
            and perceptual loss (see ``adaptive_weight``); 0 trains without a discriminator, released are 1 (DQ) and
            0.75 (MQ).
        adversarial_cap: largest weight of the adversarial loss; released are 0.75 (DQ) and 1 (MQ).
        adversarial_start: share of the steps after which the discriminator starts to learn and to count.
        discriminator_width, discriminator_layers: see PatchDiscriminator.
    """

    learns: str = "all"
    warmup_fraction: float = 0.25
    quantizer_weight: float = 1.0
    min_perplexity: float = 0.01
    exclude: tuple[str, ...] = ()
    val_fraction: float = 0.05
    picture: str = "multiscale"
    perceptual: str = "none"
    perceptual_weight: float = 1.0
    lpips_weights: str | tuple[str, ...] = ""
    adversarial: str = "hinge"
    adversarial_weight: float = 0.0
    adversarial_cap: float = 1.0
    adversarial_start: float = 0.5
    discriminator_width: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.lpips_weights, str):
            object.__setattr__(self, "lpips_weights", tuple(self.lpips_weights))
        for name, known in (
            ("learns", ("all", "decoder")),
            ("picture", PICTURE_LOSSES),
            ("perceptual", PERCEPTUAL),
            ("adversarial", ADVERSARIAL_LOSSES),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"stage.{name} is {getattr(self, name)!r}; it must be one of {list(known)}")
        for name in ("perceptual_weight", "adversarial_cap"):
            if not 0 < getattr(self, name) <= 1e9:
                raise ConfigError(f"stage.{name} is {short(getattr(self, name))}; it must be above 0, and 1e9 at most")
        for name, least, most in (
            ("quantizer_weight", 0, 1e9),
            ("adversarial_weight", 0, 1e9),
            ("discriminator_width", 1, 1 << 16),
            ("discriminator_layers", 1, 16),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"stage.{name} is {short(getattr(self, name))}; it must be in {least}..{most:g}")
        for name in ("warmup_fraction", "adversarial_start", "min_perplexity"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"stage.{name} is {short(getattr(self, name))}; it must be in [0, 1)")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"stage.val_fraction is {short(self.val_fraction)}; it must be in (0, 1)")

    def check_size(self, image_size: int) -> None:
        """
        Raises:
            ConfigError: the networks of the loss cannot judge images of this size.
        """
        needed = 3 * 2**self.discriminator_layers
        if self.adversarial_weight and image_size < needed:
            raise ConfigError(
                f"stage.discriminator_layers is {self.discriminator_layers}, which needs images of {needed} px; these "
                f"have {image_size}, use fewer layers"
            )
        if self.perceptual == "lpips" and image_size < 16:
            raise ConfigError(
                f"stage.perceptual is 'lpips', which needs images of 16 px; these have {image_size}, use 'efficientnet'"
            )


def starts(stage: StageOneConfig, steps: int, has_codes: bool = False) -> dict[str, int]:
    """The steps at which parts of the objective start, of ``steps`` in all: ``codes``, unless the tokenizer has them
    from its beginning, and ``discriminator``, if there is one."""
    codes = {} if has_codes else {"codes": int(steps * stage.warmup_fraction)}
    return codes | ({"discriminator": int(steps * stage.adversarial_start)} if stage.adversarial_weight else {})


class Objective:
    """The losses of a tokenizer and of its discriminator, with the state of the step just taken.

    The module that reconstructs is given to each call, so that it may be a wrapped tokenizer. The perceptual network is
    frozen, in eval mode, and no part of any checkpoint.

    Args:
        stage: weights and starts of the terms.
        starts: see ``starts``.
        codebook_size: of the tokenizer.
        last: the tokenizer's last weight, by which the adversarial loss is balanced.
        perceptual: what ``load_perceptual`` gives for the stage: (images, images) -> distance [B], or None.
        grains: number of the tokenizer's grains.

    Attributes:
        discriminator: None without an adversarial loss.
        quantizing: whether the step just taken used codes.
    """

    def __init__(
        self,
        stage: StageOneConfig,
        starts: dict[str, int],
        codebook_size: int,
        last: nn.Parameter,
        perceptual: nn.Module | None = None,
        grains: int = 2,
    ) -> None:
        self.stage, self.starts, self.codebook_size, self.last = stage, starts, codebook_size, last
        self.perceptual, self.grains = perceptual, grains
        self.discriminator: PatchDiscriminator | None = None
        if stage.adversarial_weight:
            self.discriminator = PatchDiscriminator(stage.discriminator_width, stage.discriminator_layers)
        self.adversarial = ADVERSARIAL_LOSSES[stage.adversarial]
        self.quantizing = False
        self._judged: tuple[Tensor, Tensor] | None = None  # images and reconstructions of the step just taken

    def losses(self, tokenizer: nn.Module, images: Tensor, step: int, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
        """Scalars of one step, of which ``loss`` is to be minimized.

        Where several processes train, their mean over the processes is that of the whole batch.

        Args:
            tokenizer: called as ``Tokenizer.forward`` is.
            images: float [B, 3, H, W] in [-1, 1].
            step: number of steps taken before.
            scale: see ``adaptive_weight``.
        """
        self.quantizing = step >= self.starts.get("codes", 0)
        out = tokenizer(images, quantize=self.quantizing)
        picture = PICTURE_LOSSES[self.stage.picture](images, out.images)
        scalars = {"loss": picture + self.stage.quantizer_weight * out.loss, "picture": picture, "commitment": out.loss}
        if self.perceptual:
            scalars["perceptual"] = self.perceptual(images, out.images).mean()
            weighted = self.stage.perceptual_weight * scalars["perceptual"]
            picture, scalars["loss"] = picture + weighted, scalars["loss"] + weighted
        if out.budget is not None:
            shares = {f"share_{s}": (out.grain == s).float().mean() for s in range(self.grains)}
            scalars |= {"loss": scalars["loss"] + out.budget, "budget": out.budget, **shares}
        if out.codes is not None:
            scalars["perplexity"] = perplexity(out.codes, self.codebook_size)
        self._judged = None
        if self.discriminator and step >= self.starts["discriminator"]:
            self._judged = images, out.images.detach()
            self.discriminator.requires_grad_(False)  # its turn comes in ``critic_loss``
            adversarial = self.adversarial.generator(self.discriminator(out.images))
            factor = adaptive_weight(
                picture, adversarial, self.last, self.stage.adversarial_weight, self.stage.adversarial_cap, scale
            )
            scalars["loss"] = scalars["loss"] + factor * adversarial
            scalars |= {"adversarial": adversarial, "adversarial_weight": factor}
        return scalars

    def problem(self, smooth: dict[str, float]) -> str:
        """What is wrong with the codebook by the means of the last losses, or nothing."""
        least, reached = self.stage.min_perplexity * self.codebook_size, smooth.get("perplexity", math.inf)
        if reached >= least:
            return ""
        return (
            f"the codebook collapses: the perplexity of the codes is {reached:.1f}, below {least:.1f}, "
            f"stage.min_perplexity {self.stage.min_perplexity:g} of {self.codebook_size} codes"
        )

    def critic_loss(self, discriminator: nn.Module | None = None) -> Tensor | None:
        """What the discriminator minimizes on the step just taken, a scalar; None while it does not learn.

        Args:
            discriminator: the discriminator as it is wrapped for training; None for itself.
        """
        if self.discriminator is None or self._judged is None:
            return None
        self.discriminator.requires_grad_(True)
        judge = self.discriminator if discriminator is None else discriminator
        real, made = (judge(images) for images in self._judged)
        return self.adversarial.discriminator(real, made)

    @torch.no_grad()
    def error(self, images: Tensor, made: Tensor) -> dict[str, Tensor]:
        """How far reconstructions are from images, float [B, 3, H, W] both, as tensors [B]: ``loss``, the mean absolute
        error plus the weighted perceptual distance, as the released code picks the best checkpoint; and
        ``perceptual``, if there is such a distance."""
        parts = {"loss": (images - made).abs().mean((1, 2, 3))}
        if self.perceptual:
            parts["perceptual"] = self.perceptual(images, made)
            parts["loss"] = parts["loss"] + self.stage.perceptual_weight * parts["perceptual"]
        return parts


def perplexity(codes: Tensor, size: int) -> Tensor:
    """exp of the entropy of code use in the batch of all processes, a scalar between 1 and ``size``."""
    flat = codes.flatten()
    p = processes.total(torch.zeros(size, device=codes.device).index_add_(0, flat, torch.ones_like(flat).float()))
    p = p / p.sum()
    return torch.exp(-(p * torch.log(p.clamp_min(1e-10))).sum())
