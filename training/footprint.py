"""What a training step takes: memory and computation, counted with tensors that have sizes and no values (PyTorch's
FakeTensorMode), so that no model is too large; or measured on real ones."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dvq_rt.layout import TokenLayout
from training.checkpoint import new_tokenizer
from training.loop import TrainConfig, make_optimizer
from training.losses import ADVERSARIAL_LOSSES, PICTURE_LOSSES, adaptive_weight
from training.models.discriminator import PatchDiscriminator
from training.models.dqvae import DQVAEConfig
from training.models.mqvae import MQVAEConfig
from training.models.perceptual import LPIPS, EfficientNetDistance
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer, TransformerConfig
from training.objective import StageOneConfig

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"lpips": LPIPS, "efficientnet": EfficientNetDistance}
ELEMENT = 4
"""Bytes of a parameter, its gradient and each of the optimizer's two moments; autocast leaves all in float32."""
Module = TypeVar("Module", bound=nn.Module)
Maker = Callable[[Callable[[], nn.Module]], Any]
"""How a module is made of what makes it: ``real`` or ``of_sizes``."""


class Work(NamedTuple):
    """``parts`` that learn, by name; ``judges``, frozen networks of the loss; ``step``, forward and backward."""

    parts: dict[str, nn.Module]
    judges: list[nn.Module]
    step: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one process takes, in bytes, and what its step computes.

    Attributes:
        parameters: trainable ones of each part, by name, in numbers.
        weights: bytes of parameters and buffers; frozen: those of networks that only judge.
        optimizer: bytes of the moments.
        step: most bytes that a step allocates beside these: activations, gradients, temporaries.
        gradients: bytes of the gradients, which are part of ``step`` at its end.
        buckets: bytes in which several processes exchange gradients.
        average: bytes of the averaged copy of the weights, if there is one.
        flops: floating-point operations of the matrix products and convolutions of a step, a multiply-add being two.
    """

    parameters: dict[str, int]
    weights: int
    frozen: int
    optimizer: int
    step: int
    gradients: int
    buckets: int
    average: int
    flops: float

    @property
    def total(self) -> int:
        """Bytes of the process beyond Python, PyTorch and the data."""
        return (
            self.weights + self.frozen + self.optimizer + self.buckets + self.average + max(self.step, self.gradients)
        )


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that come into being while it is entered, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def ignore(self, *modules: nn.Module) -> None:
        """Leave the tensors of modules out."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                self._seen[id(storage)] = weakref.ref(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # storages keep their Python object as long as they live
        if key in self._seen:
            return
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_: object) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)


def tokenizer_work(
    config: DQVAEConfig | MQVAEConfig, stage: StageOneConfig, precision: str, batch: int, make: Maker
) -> Work:
    """A step of stage 1 while codes and, if there is one, the discriminator learn. The codebook stays, since how it
    moves depends on values; that takes little."""
    stage.check_size(config.image_size)
    vae = make(lambda: new_tokenizer(config)).train()
    vae.quantizer.eval()
    critic = None
    if stage.adversarial_weight:
        critic = make(lambda: PatchDiscriminator(stage.discriminator_width, stage.discriminator_layers))
    networks = [NETWORKS[stage.perceptual]] if stage.perceptual in NETWORKS else []
    judges = [make(network).eval().requires_grad_(False) for network in networks]
    images = torch.zeros(batch, 3, config.image_size, config.image_size)
    last = vae.get_parameter("decoder.conv_out.weight")

    def step() -> None:
        with autocast(precision):
            out = vae(images)
        copies = out.images.float()
        loss = PICTURE_LOSSES[stage.picture](images, copies)
        for judge in judges:
            loss = loss + judge(images, copies).mean()
        whole = loss + out.loss + (0 if out.budget is None else out.budget)
        if critic is not None:
            losses = ADVERSARIAL_LOSSES[stage.adversarial]
            critic.requires_grad_(False)
            pull = losses.generator(critic(copies))
            whole = whole + adaptive_weight(loss, pull, last, stage.adversarial_weight) * pull
        whole.backward()
        if critic is not None:
            critic.requires_grad_(True)
            losses.discriminator(critic(images), critic(copies.detach())).backward()

    return Work({"tokenizer": vae, **({"discriminator": critic} if critic is not None else {})}, judges, step)


def transformer_work(
    config: TransformerConfig,
    layout: TokenLayout,
    precision: str,
    batch: int,
    make: Maker,
    text: TextConfig | None = None,
) -> Work:
    """A step of stage 2 whose sequences and prompts are all as long as the longest, without dropout in attention: the
    fused kernels of GPUs draw it on the way, those of CPUs would keep every weight for it."""
    net = make(lambda: StackedTransformer(replace(config, attention_dropout=0.0), layout, text)).train()
    tokens = [torch.zeros(batch, layout.max_length, dtype=torch.int64) for _ in range(4)]
    if text is not None:
        ids = torch.zeros(batch, text.length, dtype=torch.int64)
        tokens += [ids, torch.full((batch,), text.length)]

    def step() -> None:
        with autocast(precision):
            logits = net(*tokens)
        parts = [F.cross_entropy(each.float().flatten(0, 1), tokens[0].flatten()) for each in logits]
        torch.stack(parts).sum().backward()

    return Work({"transformer": net}, [], step)


def real(make: Callable[[], Module]) -> Module:
    """A module as it is."""
    return make()


def of_sizes(make: Callable[[], Module]) -> Module:
    """Under FakeTensorMode, a module whose tensors have sizes alone. Initializations, which look at values, are made on
    the meta device."""
    with torch.device("meta"):
        module = make()
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return module


def footprint(work: Callable[[Maker], Work], processes: int, averaged: bool = False) -> Footprint:
    """What a process takes of those that share the training.

    Args:
        work: given ``of_sizes``, the work of one process.
        averaged: whether an average of the weights is kept too (``training.ema``), not that of a discriminator.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts, judges, step = work(of_sizes)
        with FlopCounterMode(display=False) as flops, Allocations() as allocated:
            allocated.ignore(*parts.values(), *judges)
            step()
    trainable = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    gradients = ELEMENT * sum(trainable.values())
    learning = [part for name, part in parts.items() if name != "discriminator"]
    return Footprint(
        parameters=trainable,
        weights=sum(map(size, parts.values())),
        frozen=sum(map(size, judges)),
        optimizer=2 * gradients,
        step=allocated.most,
        gradients=gradients,
        buckets=gradients if processes > 1 else 0,
        average=sum(map(size, learning)) if averaged else 0,
        flops=float(flops.get_total_flops()),
    )


def measured(work: Callable[[Maker], Work], training: TrainConfig) -> int:
    """Bytes by which this process (on Linux) grows at most while a model is made and takes two real steps on the CPU.
    Meaningful once in a process, whose largest size is compared."""
    import resource  # not on Windows

    before = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    parts, _, step = work(real)
    optimizers = [make_optimizer(part, training) for part in parts.values()]
    for _ in range(2):
        step()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def size(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def autocast(precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
