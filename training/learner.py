"""A network and the optimizer that trains it, on the device and in the precision that Accelerate was told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.checkpoint import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


class Learner:
    """A network that takes one optimizer step after another.

    A step whose gradient is not finite is left out without asking the device: the fused optimizer of a GPU is told by a
    tensor. On a CPU, where asking costs nothing, PyTorch's usual one is used.

    Args:
        module: the network, already on its device; a second move would make new buffers, which a copy shares.
        optimizer: of its parameters.
        accelerator: what wraps it.
        clip: largest norm of the gradient.

    Attributes:
        wrapped: what the losses call, so that gradients are averaged over the processes.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, clip: float
    ) -> None:
        self.module, self.optimizer, self.clip = module, optimizer, clip
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler
        with warnings.catch_warnings():  # of an option's new name, which Accelerate does not know yet
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self.wrapped: nn.Module = accelerator.prepare_model(module, device_placement=False)
        self._accelerator = accelerator

    def without_averaging(self, asked: bool) -> AbstractContextManager[None]:
        """Where gradients are summed up in every process by itself, if that is asked."""
        return self._accelerator.no_sync(self.wrapped) if asked else nullcontext()

    def backward(self, loss: Tensor, of: int) -> None:
        """Add the gradient of a loss, one ``of`` so many whose mean is minimized."""
        loss = loss / of if of > 1 else loss
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, rate: float) -> Tensor:
        """One step with the gradient that was added up, which is gone then; its norm before clipping, a scalar."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        finite = torch.isfinite(norm)
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state."""
        return optimizer_tensors(self.optimizer)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``tensors``."""
        restore_optimizer(self.optimizer, tensors)

    def close(self) -> None:
        """Leave the network as it was before it was wrapped."""
        self._accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode for ``average``; its buffers are the model's own, so that they are never stale."""
    made = copy.deepcopy(model, {id(buffer): buffer for buffer in model.buffers()})
    return made.eval().requires_grad_(False)


@torch.no_grad()
def average(mean: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the weights of a copy towards a network's: mean * decay + weight * (1 - decay)."""
    for of_mean, weight in zip(mean.parameters(), module.parameters(), strict=True):
        of_mean.lerp_(weight, 1 - decay)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
