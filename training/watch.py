"""Runs that cannot come right any more end with an error, and not in silence after their last step."""

from __future__ import annotations

import math
from pathlib import Path

from runtimes.errors import TrainingError
from training.run import say

IN_A_ROW = 10
"""Steps without a finite gradient, or with a loss that has grown, one behind the other."""
GROWN = 10.0
"""Times its lowest value, at which a loss counts as grown."""
COLLAPSED = 3
"""Validations one behind the other."""


class Watch:
    """What goes wrong in a run, counted.

    Attributes:
        skipped: steps that were left out so far, since their gradient was not finite.
        saved: the step of ``run/checkpoint``; None while there is none.
    """

    def __init__(self, run: Path, skipped: int, saved: int | None) -> None:
        self.run, self.skipped, self.saved = run, skipped, saved
        self._without_gradient = self._grown = self._collapsed = 0
        self.restart()

    def restart(self) -> None:
        """Forget how low the loss was, because it is another one from now on."""
        self._first, self._lowest = math.inf, math.inf

    @property
    def in_trouble(self) -> bool:
        """Whether the last steps were no good, so that they had better not replace a checkpoint."""
        return self._without_gradient + self._grown > 0

    def after_step(self, step: int, loss: float, smooth_loss: float, rate: float, finite: bool) -> None:
        """Note how a step went.

        Args:
            step: steps taken, this one included.
            loss: its loss, and ``smooth_loss`` the mean of the last ones.
            rate: learning rate.
            finite: whether the gradient was, without which the step is skipped.

        Raises:
            TrainingError: it was the last of too many.
        """
        what = f"loss {loss:g}, learning rate {rate:g}"
        if not finite:
            self.skipped += 1
            self._without_gradient += 1
            if self._without_gradient == 1:
                say(f"step {step}: skipped, its gradient is not finite ({what})")
            if self._without_gradient == IN_A_ROW:
                raise self.error(step, f"{IN_A_ROW} steps in a row had no finite gradient ({what})")
            return
        self._without_gradient = 0
        self._first = min(self._first, loss) if math.isinf(self._first) else self._first
        grown = loss > GROWN * max(
            self._lowest, self._first / 100
        )  # a loss near zero may well become ten times as much
        self._lowest = min(self._lowest, smooth_loss)
        self._grown = self._grown + 1 if grown else 0
        if self._grown == IN_A_ROW:
            lowest = f"{GROWN:g} times its lowest mean, {self._lowest:g}"
            raise self.error(step, f"the loss diverges: in {IN_A_ROW} steps in a row it was above {lowest} ({what})")

    def at_validation(self, step: int, problem: str) -> None:
        """Note what is wrong with the model, nothing if ``problem`` is empty.

        Raises:
            TrainingError: something was so for too long.
        """
        self._collapsed = self._collapsed + 1 if problem else 0
        if problem:
            say(f"step {step}: {problem}")
        if self._collapsed == COLLAPSED:
            raise self.error(step, f"at {COLLAPSED} validations in a row, {problem}")

    def error(self, step: int, reason: str) -> TrainingError:
        """What ends the run."""
        folder = self.run / "checkpoint"
        saved = f"the last good checkpoint is {folder} of step {self.saved}"
        way = "lower training.lr or training.clip in a new run"
        if self.saved is None:
            return TrainingError(f"stopped at step {step}: {reason}; there is no checkpoint yet; {way}")
        return TrainingError(f"stopped at step {step}: {reason}; {saved}; {way}, which may start from it with --init")
