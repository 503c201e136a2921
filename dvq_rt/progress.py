"""Progress bars that suit where standard error goes: a terminal, a log file, or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from runtimes.errors import InputError, short

LOG_SECONDS = 30.0
"""Between two lines in a log file."""
Progress = bool | Callable[[int, int], None] | None


def progress_bar(*arguments: Any, **options: Any) -> tqdm[Any]:
    """A ``tqdm`` bar. Without a standard error, as in windowed programs, it shows nothing; where that is no terminal it
    writes whole lines, seldom."""
    if sys.stderr is None:
        return tqdm(*arguments, **{**options, "disable": True})
    if not sys.stderr.isatty():
        options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "file": _Lines(), **options}
    return tqdm(*arguments, **{"dynamic_ncols": True, **options})


class _Lines:
    """Standard error, with a line for each state of a bar instead of carriage returns."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n \x1b[A"):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def check_progress(progress: Any) -> None:
    """
    Raises:
        InputError: it is nothing that ``told`` takes.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise InputError(f"progress is {short(progress)}; it must be True, False, None or a function")


@contextmanager
def told(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many images are done: True shows them in a bar, a function is called with (done,
    ``total``)."""
    if progress is True:
        with progress_bar(total=total, unit="image") as bar:
            yield lambda done: (bar.update(done - bar.n), None)[1]
    elif callable(progress):
        yield lambda done: progress(done, total)
    else:
        yield lambda done: None
