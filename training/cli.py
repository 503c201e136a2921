"""What all training and export commands do with errors."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from runtimes.errors import DvqError

BROKEN_PIPE = 141


def guarded(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Turn a DvqError, or what the disk or the memory refuses, into ``error: ...`` on stderr and exit status 2, Ctrl-C
    into 130 and a reader that has left into 141. A console that lacks a character shows another one."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        for stream in (sys.stdout, sys.stderr):  # None in windowed programs
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            main(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed into the pipe
            raise SystemExit(BROKEN_PIPE) from None
        except (DvqError, OSError, SafetensorError, MemoryError) as error:
            if sys.stderr is not None:
                print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run
