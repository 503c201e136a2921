"""The processes that train one model together, and the device that each of them uses.

The batch of a step is one, of which process r of w has the r-th part of the rows. What is computed over a batch is
computed over the whole of it, and what is drawn at random is drawn for the whole of it, so that w processes train as
one does. Where there is one process, all this costs nothing and changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from runtimes.errors import ConfigError, DvqError, guard, short

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
DEVICES = ("cuda", "mps", "cpu")
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Ours, and Accelerate's names."""
PATIENCE = timedelta(hours=6)
"""How long processes wait for one that validates, draws pictures or saves."""

_alone = False


# --- who and where ---------------------------------------------------------------------------------------------
def start(device: str = "", precision: str = "fp32", compiled: bool = False) -> Accelerator:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, if they did, and choose the device.

    Args:
        device: ``cuda``, ``mps`` or ``cpu``; empty takes the first of these that is there.
        precision: ``fp32``, or ``bf16`` or ``fp16`` for autocast in the networks.
        compiled: whether networks go through ``torch.compile``.

    Raises:
        ConfigError: the device is not there, or cannot compute so; or Accelerate is missing.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise ConfigError(f"training needs Accelerate ({error}); pip install 'dvq-rt[train]' brings it") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device and device not in DEVICES:
        raise ConfigError(f"--device is {short(device)}; it must be one of {list(DEVICES)}")
    if device and not there[device]:
        raise ConfigError(
            f"--device is {device}, but PyTorch {torch.__version__} finds no such device here; leave --device out to "
            f"take what is there ({', '.join(name for name in DEVICES if there[name])})"
        )
    chosen = device or next(name for name in DEVICES if there[name])
    if chosen == "cpu" and precision == "fp16":
        raise ConfigError("training.precision is fp16, which needs a GPU; on a CPU choose bf16 or fp32")
    if compiled:
        functorch_config.donated_buffer = False  # the weight of the adversarial loss goes through a graph twice
    AcceleratorState._reset_state(reset_partial_state=not _together())  # of a run before in this program
    with guard(ConfigError, f"training with precision {precision} on {chosen} cannot start"):
        accelerator = Accelerator(
            cpu=chosen == "cpu",
            mixed_precision=PRECISIONS[precision],
            dynamo_backend="inductor" if compiled else "no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    return accelerator


def leave() -> None:
    """Leave the other processes, at a program's end."""
    if _together():
        torch.distributed.destroy_process_group()


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """w, the number of processes."""
    return torch.distributed.get_world_size() if _together() and not _alone else 1


def number() -> int:
    """r, the number of this process, from 0."""
    return torch.distributed.get_rank() if _together() and not _alone else 0


@contextmanager
def alone() -> Iterator[None]:
    """Compute as if there were no other processes."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def on_first(act: Callable[[], T]) -> T:
    """What a call gives in process 0, which alone does it; the others wait, and get a copy of the result.

    Raises:
        DvqError: the call failed; the others raise the same text.
    """
    if count() == 1:
        return act()
    result, error = None, None
    if number() == 0:
        try:
            with alone():
                result = act()
        except BaseException as caught:
            error = caught
    box: list[Any] = [result, None if error is None else str(error) or type(error).__name__]
    torch.distributed.broadcast_object_list(box, src=0)
    if error is not None:
        raise error
    if box[1] is not None:
        raise DvqError(box[1])
    made: T = box[0]
    return made


def agreed(wish: bool, device: torch.device) -> bool:
    """Whether any of the processes wishes something. Waits for the device."""
    return wish if count() == 1 else bool(total(torch.tensor(float(wish), device=device)) > 0)


# --- tensors ---------------------------------------------------------------------------------------------------
def total(x: Tensor) -> Tensor:
    """Sum over the processes of tensors of one shape, without a gradient."""
    if count() == 1:
        return x.detach()
    x = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """Mean over the processes of tensors of one shape, with its gradient."""
    if count() == 1:
        return x
    made: Tensor = _Sum.apply(x) / count()
    return made


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient is summed too, as every process has a loss that depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0])


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, which is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def gathered(x: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 [k] of all processes' tensors [n, d] in a row: [k, d]."""
    if count() == 1:
        return x[rows]
    own = rows - number() * len(x)
    inside = (own >= 0) & (own < len(x))
    return total(torch.where(inside[:, None], x[own.clamp(0, len(x) - 1)], 0))


def drawn(like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
    """This process's rows of random numbers for the rows of all, which have one shape everywhere.

    Args:
        like: float [n, ..], of whose dtype, device and order in memory they are.
        fill: fills a tensor in place, with the same numbers in every process.
    """
    shape, whole = (len(like) * count(), *like.shape[1:]), like.stride(0) * len(like) == like.numel()
    made = fill(like.new_empty_strided(shape, like.stride()) if whole else like.new_empty(shape))
    return made[number() * len(like) : (number() + 1) * len(like)]


def share(tensors: list[Tensor]) -> None:
    """Give all processes what these tensors hold in process 0."""
    if count() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
