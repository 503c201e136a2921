"""What a run shows of its steps: the log, the trackers, the progress bar, and the watch over all of it.

The numbers of a step stay on the device until they are read, all of some steps at once.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvq_rt.progress import progress_bar
from runtimes.errors import ConfigError, guard
from training import processes
from training.run import log, say
from training.watch import Watch

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = ("tensorboard", "wandb")
READ_EVERY = 10
"""Steps; a row of the log is as long."""


def make_tracker(name: str, run: Path, step: int) -> GeneralTracker:
    """Accelerate's tracker of a run, into its folder: ``tensorboard/``, where nothing behind ``step`` counts any more,
    or ``wandb/``, offline.

    Raises:
        ConfigError: its package is missing, or refuses.
    """
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    with guard(ConfigError, f"training.tracker {name} cannot start", f"pip install {name}, or choose another"):
        tracker: GeneralTracker = (
            WandBTracker("dvq-rt", dir=str(run), name=run.name, mode="offline")
            if name == "wandb"
            else TensorBoardTracker("tensorboard", str(run), purge_step=step + 1)
        )
        tracker.start()
    return tracker


class Record:
    """The record of a run that ``fit`` makes.

    Args:
        run: its folder.
        tracker: see ``make_tracker``.
        watch: looks at every step once it is read.
        watched: the scalar that must not grow.
        batch_size: images per step.
        steps: in all, of which ``step`` are done after ``seconds``.

    Attributes:
        seconds: that the run has taken, as of the last step noted.
        smooth: means of the scalars of the last steps read.
    """

    def __init__(
        self,
        run: Path,
        tracker: GeneralTracker,
        watch: Watch,
        watched: str,
        batch_size: int,
        steps: int,
        step: int,
        seconds: float,
    ) -> None:
        self.run, self.tracker, self.watch, self.watched = run, tracker, watch, watched
        self.batch_size, self.seconds, self.smooth = batch_size, seconds, dict[str, float]()
        self._waiting: list[tuple[int, float, dict[str, Tensor]]] = []
        self._last = self._working = time.monotonic()
        self._bar = progress_bar(total=steps, initial=step, unit="step", disable=processes.number() > 0)

    def note(self, step: int, rate: float, scalars: dict[str, Tensor]) -> None:
        """Take down a step, which is the ``step``-th, without waiting for the device; ``norm`` of its gradient and
        ``finite`` are among the scalars."""
        self._waiting.append((step, rate, {name: value.detach() for name, value in scalars.items()}))
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now
        self._bar.update()

    def read(self, row: bool) -> None:
        """Wait for the numbers of the steps taken down, which are means over the processes, and look at them.

        Args:
            row: whether the last step becomes a row of the log.

        Raises:
            TrainingError: see Watch.
        """
        if not self._waiting:
            return
        flat = torch.stack([value.float() for *_, scalars in self._waiting for value in scalars.values()])
        numbers = iter((processes.total(flat) / processes.count()).tolist())
        speed = len(self._waiting) * self.batch_size / max(1e-9, time.monotonic() - self._working)
        waiting, self._waiting = self._waiting, []
        for step, rate, scalars in waiting:
            values = {name: next(numbers) for name in scalars}
            norm, finite = values.pop("norm"), values.pop("finite") == 1
            self._smooth(values)
            loss = values[self.watched]
            self.watch.after_step(step, loss, self.smooth.get(self.watched, loss), rate, finite)
        skipped = {"skipped": self.watch.skipped} if self.watch.skipped else {}
        shown = [f"{k} {v:.3f}" for k, v in self.smooth.items() if "_" not in k]  # without the parts of parts
        shown += [f"{self.watch.skipped} steps skipped"] if skipped else []
        self._bar.set_postfix_str(", ".join([f"{speed:.0f} images/s", *shown]), refresh=False)
        if row:
            self._track("train", {**values, "lr": rate, "images_per_s": speed, **skipped}, step)
            self._write({"step": step, "train": values, "norm": norm, **skipped, "s": self.seconds})
        self._working = time.monotonic()

    def _smooth(self, values: dict[str, float]) -> None:
        if set(values) - set(self.smooth):  # another sum of terms than before
            self.smooth = {}
            self.watch.restart()
        self.smooth |= {k: 0.98 * self.smooth.get(k, v) + 0.02 * v for k, v in values.items() if math.isfinite(v)}

    def validated(self, values: dict[str, float], step: int) -> None:
        """Show what a validation found."""
        self._track("val", values, step)
        self._write({"step": step, "val": values, "s": self.seconds})
        say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Give a picture uint8 [H, W, 3] to the tracker.

        Raises:
            ConfigError: the disk refused; so do ``read`` and ``validated``.
        """
        options = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
        with self._refused():
            self.tracker.log_images({name: image[None]}, step=step, **options)

    def _track(self, kind: str, values: dict[str, Any], step: int) -> None:
        with self._refused():
            self.tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def _refused(self) -> AbstractContextManager[None]:
        what = f"the tracker {self.tracker.name} cannot write into {self.run}"
        return guard(ConfigError, what, "make room, and go on with --resume")

    def _write(self, row: dict[str, Any]) -> None:
        if processes.number() == 0:
            log(self.run, row)

    def other_work_ends(self) -> None:
        """Count the time since the last step read as other work than training, for the speed."""
        self._working = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        with self._refused():
            self.tracker.finish()
