"""The error family. Everything a user can cause raises one of these, and its text names what to do."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


class DvqError(Exception):
    """Base of all errors that dvq-rt raises on purpose."""


class ConfigError(DvqError, ValueError):
    """A size, option or configuration file is wrong."""


class InputError(DvqError, ValueError):
    """An argument of a call (label, image, codes, sampling parameter) is wrong."""


class ClosedError(InputError):
    """What is asked for something is closed, or was closed meanwhile."""


class DataError(DvqError):
    """A training folder or archive cannot be used."""


class CheckpointError(DvqError):
    """A checkpoint folder or a published checkpoint cannot be read."""


class EngineError(DvqError):
    """An engine folder is missing, incomplete, corrupted or too new."""


class BackendError(DvqError):
    """The execution backend or device that was asked for is not available or failed."""


class ExportError(DvqError):
    """An export did not reach parity with PyTorch, or a graph could not be built."""


class TrainingError(DvqError):
    """A training run cannot come right any more."""


def short(value: object) -> str:
    """``repr`` of at most a few hundred characters, made in time that does not grow with the value."""
    words = reprlib.Repr()
    words.maxlevel, words.maxstring, words.maxother, words.maxlong = 3, 120, 120, 60
    words.maxlist = words.maxtuple = words.maxdict = words.maxset = words.maxfrozenset = 12
    try:
        text = words.repr(value[:120] if isinstance(value, bytes | bytearray) else value)
    except Exception:  # an integer of more digits than Python prints, or a broken __repr__
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 400 else f"{text[:400]}..."


@contextmanager
def guard(error: type[DvqError], what: str, mend: str = "") -> Iterator[None]:
    """Turn anything that the block raises, but for ``error`` itself, into ``error("{what}: {reason}; {mend}")``.

    One such block stands at each boundary to a library, since what those raise on broken bytes has no end.
    """
    try:
        yield
    except error:
        raise
    except Exception as cause:
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        reason = (reason or type(cause).__name__)[:500]
        raise error(f"{what}: {reason}" + (f"; {mend}" if mend else "")) from cause
