"""The training loop of both stages, on one process or many: schedule, averages, checkpoints, exact resumption."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from runtimes.errors import CheckpointError, ConfigError, guard, short
from training import processes
from training.checkpoint import (
    Model,
    TrainingState,
    keep_copies,
    load_strictly,
    load_training_state,
    not_finite,
    save_checkpoint,
)
from training.data.stream import CROPS
from training.learner import Learner, average, averaged_copy, under
from training.record import READ_EVERY, TRACKERS, Record, make_tracker
from training.run import cut_log, say
from training.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST = 10**9
"""Largest number of steps and such."""
CRITIC, CRITIC_OPTIMIZER, WEIGHTS = "critic.", "critic_optimizer.", "weights."
"""What the names of tensors in a training state start with: a critic's, its optimizer's, and the weights that learn,
where the checkpoint's own are their average. The others are the optimizer's."""


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
        batch_size: images per optimizer step, of all processes and parts together; a multiple of their number.
        accumulate: parts of a batch that go through the networks one after another, so that it needs less memory. What
            is computed over a batch (the codebook's averages, batch normalisation, the router's budget) is computed
            over each part.
        precision: ``fp32``; ``bf16`` or, on GPUs, ``fp16``: autocast in the networks. Weights, the codebook, routers
            and losses stay in float32.
        compile: put the networks through ``torch.compile``.
        lr: peak learning rate, after a linear warm-up over ``warmup`` steps.
        lr_schedule: what follows the warm-up: ``cosine``, half of one down to 0, or ``constant``.
        least_lr: the cosine stays above it.
        betas, weight_decay: of AdamW; only Linear and convolution weights decay.
        clip: largest gradient norm.
        seed: of the data order, augmentation, dropout and initialization, in 0..2^63 - 1.
        shift: largest random translation of the images, pixels; flip: mirror half of them; crop: which square of an
            oblong one, ``centre`` or ``random``.
        workers: processes that decode images; 0 leaves it to two threads. It changes no batch.
        ema: decay per step of an average of the weights, which is then what is validated, drawn and kept as the
            checkpoint's weights; 0 for none.
        validate_every, picture_every, checkpoint_every: steps between these.
        keep_last: number of latest checkpoints of which a copy stays under ``run/step-N``.
        tracker: ``tensorboard``, or ``wandb``, offline.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 5000
    batch_size: int = 8
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
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
    ema: float = 0.0
    validate_every: int = 250
    picture_every: int = 500
    checkpoint_every: int = 250
    keep_last: int = 0
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas is {self.betas}; it must be two numbers in [0, 1)")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"training.seed is {self.seed}; it must be in 0..2^63 - 1")
        for name in ("steps", "batch_size", "accumulate", "validate_every", "picture_every", "checkpoint_every"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ConfigError(
                    f"training.{name} is {short(getattr(self, name))}; it must be at least 1, and {MOST} at most"
                )
        for name in ("warmup", "shift", "weight_decay", "keep_last"):
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
        for name, known in (("precision", tuple(processes.PRECISIONS)), ("tracker", TRACKERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"training.{name} is {short(getattr(self, name))}; it must be one of {list(known)}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"training.ema is {short(self.ema)}; it must be in [0, 1)")
        if not 0 <= self.least_lr <= self.lr:
            raise ConfigError(f"training.least_lr is {short(self.least_lr)}; it must be in 0..training.lr, {self.lr}")

    def check_parts(self) -> None:
        """
        Raises:
            ConfigError: a batch does not come apart evenly.
        """
        parts = processes.count() * self.accumulate
        if self.batch_size % parts:
            up = -(-self.batch_size // parts) * parts
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, the images of all {processes.count()} processes and all "
                f"{self.accumulate} parts (training.accumulate) together; give a multiple of {parts}, such as {up}"
            )

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
        loss: the module as it is wrapped -> what it minimizes, on what the loss was just asked for; None where it does
            not learn yet.
    """

    module: nn.Module
    loss: Callable[[nn.Module], Tensor | None]


@dataclass(slots=True)
class Stage:
    """What a training script supplies to ``fit``.

    Attributes:
        model: holds all parameters.
        trained: of a model or its copy, the part that is optimized.
        batches: from a step number, an endless iterator of this process's rows of that step's batch, in
            ``accumulate`` parts, and of the next ones'.
        loss: (``trained`` as it is wrapped, part of a batch, step, scale of losses) -> scalars, of which ``loss`` is
            minimized; their means over parts and processes are the batch's.
        validate: model -> scalars, of which ``loss`` picks the best checkpoint; without it the checkpoint is no
            candidate.
        pictures: model -> named uint8 [H, W, 3] images for the tracker.
        before: called with the step number before a step.
        critic: trained after every step, if there is one.
        watched: the scalar that must not grow.
        problem: smoothed scalars -> what is wrong with the model by them, or nothing; asked at every validation.
    """

    model: Model
    trained: Callable[[Model], nn.Module]
    batches: Callable[[int], Iterator[list[Any]]]
    loss: Callable[[nn.Module, Any, int, float | Tensor], dict[str, Tensor]]
    validate: Callable[[Model], dict[str, float]]
    pictures: Callable[[Model], dict[str, np.ndarray]]
    before: Callable[[int], None] = lambda step: None
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
    fused = True if next(module.parameters()).is_cuda else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


class Trainer:
    """A stage with its optimizers, and what of them is kept.

    Attributes:
        shown: the model that is validated, drawn and kept: the average of the weights, or the model itself.
        learners: of the model and, if there is one, of the critic.
        processes: how many train.
        state: what is kept beside the model.
    """

    def __init__(self, stage: Stage, config: TrainConfig, accelerator: Accelerator) -> None:
        self.stage, self.config, self.processes = stage, config, processes.count()
        stage.model.to(accelerator.device)
        processes.share(list(stage.model.state_dict().values()))
        self.shown: Model = averaged_copy(stage.model) if config.ema else stage.model  # type: ignore[assignment]
        self.trained = stage.trained(stage.model)
        modules = [self.trained, *([stage.critic.module.to(accelerator.device)] if stage.critic else [])]
        self.learners = [Learner(m, make_optimizer(m, config), accelerator, config.clip) for m in modules]
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler
        self.state = TrainingState(values={"best": math.inf, "seconds": 0.0})

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, whose weights the model has already."""
        state, source = load_training_state(folder), f"the training state in {folder}"
        state.values = {**self.state.values, **state.values}
        others = (CRITIC, CRITIC_OPTIMIZER, WEIGHTS)
        with guard(CheckpointError, f"{source} cannot be used"):
            self.learners[0].restore({k: t for k, t in state.tensors.items() if not k.startswith(others)})
            if self.stage.critic:
                load_strictly(self.stage.critic.module, under(CRITIC, state.tensors), source)
                self.learners[1].restore(under(CRITIC_OPTIMIZER, state.tensors))
            if self.config.ema:
                raw = dict(self.trained.named_buffers()) | under(WEIGHTS, state.tensors)
                load_strictly(self.trained, {k: raw[k] for k in self.trained.state_dict()}, source)
            if self.scaler:
                self.scaler.load_state_dict(state.values["scaler"])
        if (before := state.values.get("processes", 1)) != self.processes:
            say(
                f"resumed with {self.processes} processes instead of {before}: batches and random numbers stay the "
                "same, sums are taken in another order, so losses differ by rounding"
            )
        self.state = state

    def step(self, parts: list[Any], rate: float) -> dict[str, Tensor]:
        """One step of all optimizers on a batch; its scalars, ``norm`` and ``finite`` among them."""
        stage, step = self.stage, self.state.step
        torch.manual_seed((self.config.seed * 1_000_003 + step) % 2**64)
        self.trained.train()
        stage.before(step)
        scale = self.scaler.scale(torch.ones((), device=next(self.trained.parameters()).device)) if self.scaler else 1.0
        made: list[dict[str, Tensor]] = []
        for part in parts:
            last = part is parts[-1]
            with self.learners[0].without_averaging(not last):
                scalars = stage.loss(self.learners[0].wrapped, part, step, scale)
                self.learners[0].backward(scalars["loss"], len(parts))
            if stage.critic:
                with self.learners[1].without_averaging(not last):
                    judged = stage.critic.loss(self.learners[1].wrapped)
                    if judged is not None:
                        self.learners[1].backward(judged, len(parts))
                        scalars["critic"] = judged
            made.append({name: value.detach() for name, value in scalars.items()})
        norms = [learner.step(rate) for learner in self.learners[: 1 + ("critic" in made[0])]]
        if self.scaler:
            self.scaler.update()
        if self.config.ema:
            average(stage.trained(self.shown), self.trained, self.config.ema)
        self.state.step += 1
        means = {k: torch.stack([each[k] for each in made]).mean() for k in made[0]} if len(made) > 1 else made[0]
        return {**means, "norm": norms[0], "finite": torch.stack(norms).isfinite().all()}

    def save(self, folder: Path, watch: Watch, seconds: float) -> None:
        """Write a checkpoint, and its copy if copies are kept."""
        state, critic = self.state, self.stage.critic.module.state_dict() if self.stage.critic else {}
        if broken := not_finite(self.stage.model.state_dict() | critic) or not_finite(self.shown.state_dict()):
            raise watch.error(state.step, f"the model holds numbers that are not finite, in {short(broken)}")
        state.values |= {"skipped": watch.skipped, "seconds": seconds, "processes": self.processes}
        if self.scaler:
            state.values["scaler"] = self.scaler.state_dict()
        state.tensors = self.learners[0].tensors() | {CRITIC + name: tensor for name, tensor in critic.items()}
        if critic:
            state.tensors |= {CRITIC_OPTIMIZER + name: tensor for name, tensor in self.learners[1].tensors().items()}
        if self.config.ema:
            state.tensors |= {WEIGHTS + name: p.detach() for name, p in self.trained.named_parameters()}
        save_checkpoint(self.shown, folder, state)

    def close(self) -> None:
        """Leave the model as it was before it was wrapped."""
        for learner in self.learners:
            learner.close()


def fit(stage: Stage, config: TrainConfig, run: Path, resume: bool, accelerator: Accelerator) -> Model:
    """Train to ``config.steps``, resuming exactly from ``run/checkpoint`` if asked.

    All randomness of step k is a function of (seed, k), so an interrupted and resumed run has the loss curve of an
    uninterrupted one. SIGTERM and Ctrl-C save a checkpoint and raise ``SystemExit(130)``. Process 0 validates and
    writes ``run/checkpoint`` (latest), ``run/best`` (lowest validation loss), ``run/step-N``, ``run/log.jsonl`` and
    what the tracker keeps.

    Returns:
        the model that was kept last, on the CPU.

    Raises:
        TrainingError: the run cannot come right any more, see Watch; ``run/checkpoint`` is from before.
    """
    trainer = Trainer(stage, config, accelerator)
    if resume:
        trainer.restore(run / "checkpoint")
        processes.on_first(lambda: cut_log(run, trainer.state.step))
    state = trainer.state
    watch = Watch(run, state.values.get("skipped", 0), state.step if resume else None)
    tracker = make_tracker(config.tracker, run, state.step)
    seconds, batch_size = state.values["seconds"], config.batch_size
    record = Record(run, tracker, watch, stage.watched, batch_size, config.steps, state.step, seconds)

    def checked() -> dict[str, float]:
        with torch.no_grad():
            return stage.validate(trainer.shown.eval())

    def drawn() -> None:
        with torch.no_grad():
            for name, picture in stage.pictures(trainer.shown.eval()).items():
                record.picture(name, picture, state.step)

    def saved(name: str) -> None:
        trainer.save(run / name, watch, record.seconds)
        if name == "checkpoint" and config.keep_last:
            keep_copies(run, state.step, config.keep_last)

    batches, ends = stage.batches(state.step), False
    with closing(record), _signals() as signals:
        while state.step < config.steps and not ends:
            rate = config.rate(state.step)
            scalars = trainer.step(next(batches), rate)
            record.note(state.step, rate, scalars)
            row = state.step % READ_EVERY == 0 or state.step == config.steps
            validates, draws, saves = (
                state.step % every == 0 or state.step == config.steps
                for every in (config.validate_every, config.picture_every, config.checkpoint_every)
            )
            if row or processes.count() == 1:  # others do not hear of a signal at the same step
                ends = processes.agreed(bool(signals), accelerator.device)
            if row or validates or saves or ends:
                record.read(row)
            if validates:
                values = processes.on_first(checked)
                record.validated(values, state.step)
                if values.get("loss", math.inf) < state.values["best"]:
                    state.values["best"] = values["loss"]
                    processes.on_first(lambda: saved("best"))
                watch.at_validation(state.step, stage.problem(record.smooth))
            if draws:
                processes.on_first(drawn)
            if (saves and not watch.in_trouble) or state.step == config.steps or ends:
                processes.on_first(lambda: saved("checkpoint"))
                watch.saved = state.step
            if validates or draws or saves:
                record.other_work_ends()
    if watch.skipped:
        say(f"{watch.skipped} of {state.step} steps were skipped, since their gradient was not finite")
    trainer.close()
    if ends and state.step < config.steps:
        if processes.number() == 0:
            print(f"stopped at step {state.step}; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130)
    return trainer.shown.cpu()


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
