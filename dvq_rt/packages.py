"""The packages of dvq-rt lie side by side. One of the same name from elsewhere, such as a folder ``runtimes`` in the
working directory of ``python -m dvq_rt``, is refused by name and place before its code runs."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from itertools import pairwise

PACKAGES = ("dvq_rt", "runtimes", "training", "export")
HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder or archive that holds them all."""


def refuse_strangers(*names: str) -> None:
    """
    Raises:
        ImportError: one of these packages would be, or is, imported from elsewhere. ``SystemExit`` with the same words
            if a package of dvq-rt is run as a command (``python -m``), which then says this and nothing else.
    """
    for name in names:
        try:
            spec = find_spec(name)
        except ValueError:  # made by hand, so that there is nothing to compare
            continue
        if spec is None:
            continue
        place = [*(spec.submodule_search_locations or ()), spec.origin or ""][0]
        ours = spec.origin is not None and _same(os.path.dirname(place), HOME)
        if ours or spec.origin in ("frozen", "built-in"):
            continue
        words = (
            f"the package {name} of dvq-rt, in {HOME}, is hidden by {place}: rename that, or start Python from another "
            "folder"
        )
        raise SystemExit(f"error: {words}") if _is_command() else ImportError(words, name=name, path=place)


def _same(a: str, b: str) -> bool:
    return os.path.normcase(os.path.abspath(a)) == os.path.normcase(b)


def _is_command() -> bool:
    return any(word == "-m" and after.partition(".")[0] in PACKAGES for word, after in pairwise(sys.orig_argv))


refuse_strangers("runtimes")
