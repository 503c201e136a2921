"""Labels and counts as callers give them: names, numbers of any library, one or many."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from dvq_rt.layout import TokenLayout
from runtimes.errors import InputError, short

Label = SupportsIndex | str | None
SHOWN_NAMES = 50
MOST_IMAGES = 1_000_000
"""Of one call, which holds them all in memory."""


def choose_labels(
    layout: TokenLayout, names: Sequence[str], labels: Label | Iterable[Label], n: int | None = None
) -> list[int | None]:
    """One label index per image; None stands for no label.

    Args:
        layout: says which labels there are; ``names`` names them.
        labels: one for all images, or one for each.
        n: number of images; None takes one per label, or one.

    Raises:
        InputError: a label is unknown or missing, or their number is another one than ``n``.
    """
    several = _listed(labels)
    if several is None:
        return [_index(layout, names, labels)] * (1 if n is None else n)
    if n not in (None, len(several)):
        raise InputError(f"there are {len(several)} labels for {n} images; give one label, or one per image")
    if not several:
        raise InputError("labels is empty; give one label, or one per image")
    return [_index(layout, names, label) for label in several]


def read_label(text: str, names: Sequence[str]) -> str | int:
    """A label as a word of a command or a form says it: by its name, or else by its index."""
    return int(text) if text not in names and text.isdecimal() and text.isascii() else text


def whole(name: str, value: Any, low: int, high: int) -> int:
    """An integer of any library as an int.

    Raises:
        InputError: it is none, or is out of range.
    """
    number = as_index(value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name} is {short(value)}; it must be an integer from {low} to {high}")
    return number


def as_index(value: Any) -> int | None:
    """An integer, also of NumPy or PyTorch, as an int; None for anything else, truth values included."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool":
        return None
    try:
        return operator.index(value)
    except Exception:  # a foreign object may raise anything
        return None


def _listed(labels: Any) -> list[Any] | None:
    """The labels if there are several, else None."""
    if labels is None or isinstance(labels, str | bytes) or as_index(labels) is not None:
        return None
    try:
        return list(labels)
    except Exception:
        return None


def _index(layout: TokenLayout, names: Sequence[str], label: Any) -> int | None:
    if label is None:
        if layout.classes and not layout.null_label:
            raise InputError(f"this model needs a label: {_choices(layout, names)}")
        return None
    if not layout.classes:
        raise InputError(f"label is {short(label)}, but this model has no labels; leave it out")
    if isinstance(label, str) and label in names:
        return list(names).index(label)
    number = as_index(label)
    if number is not None and 0 <= number < layout.classes:
        return number
    raise InputError(f"unknown label {short(label)}; this model has {_choices(layout, names)}")


def _choices(layout: TokenLayout, names: Sequence[str]) -> str:
    indices = f"0 to {layout.classes - 1}"
    return f"{', '.join(names[:SHOWN_NAMES])} (or {indices})" if names else indices
