"""Layers that see, or draw for, the batch of all processes; and what stays in float32 under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from training import processes

T = TypeVar("T")


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batch of all processes, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w], as many on every process."""
        if not self.training or processes.count() == 1:
            return super().forward(x)
        values = x.float()
        mean = processes.mean(values.mean((0, 2, 3), keepdim=True))
        centred = values - mean
        variance = processes.mean(centred.square().mean((0, 2, 3), keepdim=True))
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            assert self.num_batches_tracked is not None
            seen = processes.count() * x.numel() // x.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (seen / (seen - 1)), self.momentum)
        made = centred * torch.rsqrt(variance + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]
        return made.to(x.dtype)


class Dropout(nn.Dropout):
    """Dropout whose mask is a part of the one that is drawn for the batch of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..], of one shape on every process."""
        if not self.training or not self.p or processes.count() == 1:
            return super().forward(x)
        kept = 1 - self.p
        mask = processes.drawn(x.detach(), lambda mask: mask.bernoulli_(kept))
        return x * mask.div(kept)


def in_float32(act: Callable[..., T], *tensors: Tensor) -> T:
    """Call with tensors, which are made float32 where autocast is on; it is off meanwhile."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return act(*tensors)
    with torch.autocast(kind, enabled=False):
        return act(*(tensor.float() for tensor in tensors))
