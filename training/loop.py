"""The training loop of both stages: schedule, progress, TensorBoard, checkpoints, exact resumption."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dvq_rt.progress import progress_bar
from runtimes.errors import CheckpointError, ConfigError, guard, short
from training.checkpoint import (
    Model,
    TrainingState,
    load_strictly,
    load_training_state,
    not_finite,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from training.data.stream import CROPS
from training.run import cut_log, log, say
from training.watch import Watch

MOST = 10**9
"""Largest number of steps and such."""
CRITIC, CRITIC_OPTIMIZER = "critic.", "critic_optimizer."
"""What the names of a critic's tensors in a training state start with."""


def schedule(step: int, warmup: float, steps: float, least: float = 0.0) -> float:
    """The released factor of the learning rate (spec/mq.md section 3.2): linear from 0 to 1 over ``warmup`` steps, then
    half a cosine that ends at 0 after ``steps``, but never less than ``least``. With ``steps`` infinite it stays 1."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.5 * (1 + math.cos(math.pi * min(1.0, progress))), least)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train, for either stage.

    Args:
        steps: optimizer steps in all.
        batch_size: images per step.
        lr: peak learning rate, after a linear warm-up over ``warmup`` steps.
        lr_schedule: what follows the warm-up: ``cosine``, half of one down to 0, or ``constant``.
        least_lr: the cosine stays above it.
        betas, weight_decay: of AdamW; only Linear and convolution weights decay.
        clip: largest gradient norm.
        seed: of the data order, augmentation, dropout and initialization, in 0..2^63 - 1.
        shift: largest random translation of the images, pixels; flip: mirror half of them; crop: which square of an
            oblong one, ``centre`` or ``random``.
        workers: processes that decode images; 0 leaves it to two threads. It changes no batch.
        validate_every, picture_every, checkpoint_every: steps between these.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 5000
    batch_size: int = 8
    lr: float = 2e-3
    warmup: int = 100
    lr_schedule: str = "cosine"
    least_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    shift: int = 0
    flip: bool = False
    crop: str = "centre"
    workers: int = 0
    validate_every: int = 250
    picture_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas is {self.betas}; it must be two numbers in [0, 1)")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"training.seed is {self.seed}; it must be in 0..2^63 - 1")
        for name in ("steps", "batch_size", "validate_every", "picture_every", "checkpoint_every"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ConfigError(
                    f"training.{name} is {short(getattr(self, name))}; it must be at least 1, and {MOST} at most"
                )
        for name in ("warmup", "shift", "weight_decay"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ConfigError(f"training.{name} is {short(getattr(self, name))}; it must be in 0..{MOST}")
        if not 0 < self.lr <= MOST or not 0 < self.clip <= MOST:
            raise ConfigError(
                f"training.lr {short(self.lr)} and training.clip {short(self.clip)} must be positive, {MOST} at most"
            )
        if self.crop not in CROPS or not 0 <= self.workers <= 1024:
            raise ConfigError(
                f"training.crop is {self.crop!r}, one of {list(CROPS)} is known; training.workers is "
                f"{short(self.workers)}, it must be in 0..1024"
            )
        if self.lr_schedule not in ("cosine", "constant"):
            raise ConfigError(f"training.lr_schedule is {self.lr_schedule!r}; it must be 'cosine' or 'constant'")
        if not 0 <= self.least_lr <= self.lr:
            raise ConfigError(f"training.least_lr is {short(self.least_lr)}; it must be in 0..training.lr, {self.lr}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:  # one step ahead of the released schedule, whose first step has the rate 0
            return self.lr * (step + 1) / self.warmup
        steps = self.steps if self.lr_schedule == "cosine" else math.inf
        return self.lr * schedule(step, self.warmup, steps, self.least_lr / self.lr)


@dataclass(slots=True)
class Critic:
    """A network that the loss uses and that is trained beside, by an optimizer of its own (a discriminator).

    Attributes:
        module: its weights are training state, kept with the optimizers' and not in the model.
        loss: () -> what it minimizes, on what the step just taken made; None where it does not learn yet.
    """

    module: nn.Module
    loss: Callable[[], Tensor | None]


@dataclass(slots=True)
class Stage:
    """What a training script supplies to ``fit``.

    Attributes:
        model: holds all parameters; ``trained`` is the part that is optimized.
        batches: from a step number, an endless iterator of that step's batch and the next ones'.
        loss: (batch, step) -> scalars, of which ``loss`` is minimized.
        validate: () -> scalars, of which ``loss`` picks the best checkpoint; without it the checkpoint is no candidate.
        pictures: () -> named uint8 [H, W, 3] images for TensorBoard.
        count: batch -> number of images.
        critic: trained after every step, if there is one.
        watched: the scalar that must not grow.
        problem: smoothed scalars -> what is wrong with the model by them, or nothing; asked at every validation.
    """

    model: Model
    trained: nn.Module
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[Any, int], dict[str, Tensor]]
    validate: Callable[[], dict[str, float]]
    pictures: Callable[[], dict[str, np.ndarray]]
    count: Callable[[Any], int]
    critic: Critic | None = None
    watched: str = "loss"
    problem: Callable[[dict[str, float]], str] = lambda smooth: ""


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays only the weights of Linear and convolution layers."""
    decay = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": [p for p in module.parameters() if id(p) in decay], "weight_decay": config.weight_decay},
        {"params": [p for p in module.parameters() if id(p) not in decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def fit(stage: Stage, config: TrainConfig, run: Path, resume: bool) -> Model:
    """Train to ``config.steps``, resuming exactly from ``run/checkpoint`` if asked.

    All randomness of step k is a function of (seed, k), so an interrupted and resumed run has the loss curve of an
    uninterrupted one. SIGTERM and Ctrl-C save a checkpoint and raise ``SystemExit(130)``. Writes ``run/checkpoint``
    (latest), ``run/best`` (lowest validation loss), ``run/tensorboard`` and ``run/log.jsonl``.

    Raises:
        TrainingError: the run cannot come right any more, see Watch; ``run/checkpoint`` is from before.
    """
    optimizer, critic = make_optimizer(stage.trained, config), stage.critic
    critic_optimizer = make_optimizer(critic.module, config) if critic else None
    state = TrainingState(values={"best": math.inf, "seconds": 0.0})
    if resume:
        state = load_training_state(run / "checkpoint")
        state.values = {"best": math.inf, "seconds": 0.0, **state.values}
        judging, source = (CRITIC, CRITIC_OPTIMIZER), f"the training state in {run / 'checkpoint'}"
        with guard(CheckpointError, f"{source} cannot be used"):
            restore_optimizer(optimizer, {k: t for k, t in state.tensors.items() if not k.startswith(judging)})
            if critic and critic_optimizer:
                load_strictly(critic.module, _under(CRITIC, state.tensors), source)
                restore_optimizer(critic_optimizer, _under(CRITIC_OPTIMIZER, state.tensors))
        cut_log(run, state.step)
    watch = Watch(run, state.values.get("skipped", 0), state.step if resume else None)
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=state.step + 1)

    def save(folder: Path) -> None:
        parts = stage.model.state_dict() | (critic.module.state_dict() if critic else {})
        if broken := not_finite(parts):
            raise watch.error(state.step, f"the model holds numbers that are not finite, in {short(broken)}")
        state.values["skipped"] = watch.skipped
        state.tensors = optimizer_tensors(optimizer)
        if critic and critic_optimizer:
            state.tensors |= {CRITIC + name: tensor for name, tensor in critic.module.state_dict().items()}
            tensors = optimizer_tensors(critic_optimizer)
            state.tensors |= {CRITIC_OPTIMIZER + name: tensor for name, tensor in tensors.items()}
        writer.flush()
        save_checkpoint(stage.model, folder, state)

    batches = stage.batches(state.step)
    started, before = time.monotonic(), state.values["seconds"]
    smooth: dict[str, float] = {}
    with (
        progress_bar(total=config.steps, initial=state.step, unit="step") as bar,
        writer,
        _signals() as stop,
    ):
        while state.step < config.steps and not stop:
            began = time.monotonic()
            batch = next(batches)
            torch.manual_seed((config.seed * 1_000_003 + state.step) % 2**64)
            stage.trained.train()
            scalars = stage.loss(batch, state.step)
            norm = _descend(stage.trained, optimizer, scalars["loss"], config, state.step)
            finite = bool(torch.isfinite(norm))
            if critic and critic_optimizer and (judged := critic.loss()) is not None:
                finite &= bool(torch.isfinite(_descend(critic.module, critic_optimizer, judged, config, state.step)))
                scalars["critic"] = judged
            state.step += 1
            state.values["seconds"] = before + time.monotonic() - started
            values = {k: float(v.detach()) for k, v in scalars.items()}
            if set(values) - set(smooth):  # another sum of terms than before
                smooth = {}
                watch.restart()
            smooth |= {k: 0.98 * smooth.get(k, v) + 0.02 * v for k, v in values.items() if math.isfinite(v)}
            rate, loss = config.rate(state.step - 1), values[stage.watched]
            watch.after_step(state.step, loss, smooth.get(stage.watched, loss), rate, finite)
            speed = stage.count(batch) / (time.monotonic() - began)
            bar.update()
            shown = [f"{k} {v:.3f}" for k, v in smooth.items() if "_" not in k]  # without the parts of parts
            shown += [f"{watch.skipped} steps skipped"] if watch.skipped else []
            bar.set_postfix_str(", ".join([f"{speed:.0f} images/s", *shown]), refresh=False)
            last = state.step == config.steps
            if state.step % 10 == 0 or last:
                skipped = {"skipped": watch.skipped} if watch.skipped else {}
                for name, value in {**values, "lr": rate, "images_per_s": speed, **skipped}.items():
                    writer.add_scalar(f"train/{name}", value, state.step)
                row = {"step": state.step, "train": values, "norm": float(norm), **skipped}
                log(run, {**row, "s": state.values["seconds"]})
            if state.step % config.validate_every == 0 or last:
                stage.model.eval()
                with torch.no_grad():
                    checked = stage.validate()
                for name, value in checked.items():
                    writer.add_scalar(f"val/{name}", value, state.step)
                log(run, {"step": state.step, "val": checked, "s": state.values["seconds"]})
                say(f"step {state.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in checked.items()))
                if checked.get("loss", math.inf) < state.values["best"]:
                    state.values["best"] = checked["loss"]
                    save(run / "best")
                watch.at_validation(state.step, stage.problem(smooth))
            if state.step % config.picture_every == 0 or last:
                stage.model.eval()
                with torch.no_grad():
                    for name, picture in stage.pictures().items():
                        writer.add_image(name, picture, state.step, dataformats="HWC")
            if (state.step % config.checkpoint_every == 0 and not watch.in_trouble) or last or stop:
                save(run / "checkpoint")
                watch.saved = state.step
    if watch.skipped:
        say(f"{watch.skipped} of {state.step} steps were skipped, since their gradient was not finite")
    if stop:
        print(f"stopped at step {state.step}; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130)
    return stage.model


def _descend(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, config: TrainConfig, step: int
) -> Tensor:
    """One step of an optimizer, none where the gradient is not finite; the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip)
    if torch.isfinite(norm):
        optimizer.step()
    return norm


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills when SIGTERM or SIGINT arrives (main thread only); afterwards they act as before."""
    seen: list[int] = []
    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):
            for wanted in (signal.SIGTERM, signal.SIGINT):
                before[wanted] = signal.signal(wanted, lambda n, _: seen.append(n))
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
