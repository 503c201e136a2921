"""What all training and export commands do with errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from runtimes.errors import DvqError


def guarded(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Turn a DvqError, or what the disk refuses, into ``error: ...`` on stderr and exit status 2; Ctrl-C into 130."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except (DvqError, OSError, SafetensorError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run
