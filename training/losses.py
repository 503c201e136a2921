"""Losses of both stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training import processes


def reconstruction_loss(target: Tensor, output: Tensor) -> Tensor:
    """Multi-scale pixel loss with a colour term, a scalar.

    At full size and average-pooled by 2, 4 and 8: mean |e| + mean e^2 + half the mean of the two opponent-colour
    errors |eR - eG| and |(eR + eG) / 2 - eB|; at full size also a quarter of the L1 of the image gradients. Without
    the colour term small models stay grey for a long time. The released code has L1 instead.

    Args:
        target, output: float [B, 3, H, W] in about [-1, 1].
    """
    error = output - target
    loss = 0.25 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    for scale in range(4):
        if scale:
            error = F.avg_pool2d(error, 2)
        red, green, blue = error.unbind(1)
        opponent = (red - green).abs().mean() + ((red + green) / 2 - blue).abs().mean()
        loss = loss + error.abs().mean() + 0.5 * opponent + error.square().mean()
    return loss


PICTURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiscale": reconstruction_loss,
    "l1": F.l1_loss,
    "l2": F.mse_loss,
}


class AdversarialLoss(NamedTuple):
    """What the two sides minimize, scalars of the discriminator's logits, of any shape (spec/mq.md section 3.1).

    ``generator`` takes those of made images, ``discriminator`` those of real and of made images.
    """

    generator: Callable[[Tensor], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss, a scalar, from its logits of real and of made images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(lambda fake: -fake.mean(), hinge_loss),
    "non_saturating": AdversarialLoss(
        lambda fake: F.softplus(-fake).mean(), lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean()
    ),
}


def adaptive_weight(
    picture: Tensor, adversarial: Tensor, weight: Tensor, factor: float, most: float = 1.0, scale: float | Tensor = 1.0
) -> Tensor:
    """Factor of the adversarial loss at which it pulls as hard as the picture loss, a scalar without gradient.

    It is ``factor`` times |d picture / d weight| / (|d adversarial / d weight| + 1e-4), at most ``most`` (spec/mq.md
    section 3.1). The gradients are those of the batch of all processes.

    Args:
        picture, adversarial: scalar losses whose graphs are kept.
        weight: the last weight that both depend on, the decoder's output convolution.
        scale: by which losses are multiplied on the way, so that float16 holds their gradients.
    """

    def strength(part: Tensor) -> Tensor:
        gradient = torch.autograd.grad(part * scale, weight, retain_graph=True)[0]
        return (processes.total(gradient) / (processes.count() * scale)).norm()

    pull, push = strength(picture), strength(adversarial)
    return ((pull / (push + 1e-4)).clamp(0, 1e4) * factor).clamp(max=most).detach()


def stacked_losses(
    position_logits: Tensor,
    content_logits: Tensor,
    position: Tensor,
    content: Tensor,
    segment: Tensor,
    counts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropies of a stacked transformer (spec/dq.md section 10).

    ``position`` is the mean over segments of each segment's mean; ``content`` the mean over all targets.

    Args:
        position_logits: float [B, T, position head]; content_logits: float [B, T, content vocabulary].
        position: local target ids int64 [B, T], -1 where there is none; content: likewise.
        segment: int64 [B, T], segment of each target.
        counts: what ``target_counts`` gives, where means are to be over more than this batch.

    Returns:
        dict of scalars ``loss``, ``position``, ``content``, ``position_<segment>``.
    """
    if counts is None:
        counts = target_counts(position, content, segment, int(segment.max()) + 1)

    def mean_nll(logits: Tensor, target: Tensor, use: Tensor, count: Tensor) -> Tensor:
        nll = F.cross_entropy(logits.flatten(0, 1), target.clamp_min(0).flatten(), reduction="none").view_as(target)
        return (nll * use.to(nll.dtype)).sum() / count.clamp_min(1e-6)

    *of_segments, of_content = counts
    parts = {
        f"position_{s}": mean_nll(position_logits, position, (position >= 0) & (segment == s), count)
        for s, count in enumerate(of_segments)
    }
    out = {
        "position": torch.stack(list(parts.values())).mean(),
        "content": mean_nll(content_logits, content, content >= 0, of_content),
    }
    return {"loss": out["position"] + out["content"], **out, **parts}


def target_counts(position: Tensor, content: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Numbers of position targets of each segment and of content targets, float32 [segments + 1]; arguments as of
    ``stacked_losses``."""
    uses = [(position >= 0) & (segment == s) for s in range(segments)]
    return torch.stack([use.sum() for use in (*uses, content >= 0)]).float()
