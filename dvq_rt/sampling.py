"""How tokens are drawn: the parameters that a user sets, and the random numbers.

One uniform number per draw decides a token by inverse CDF. The numbers come from a counter-based generator keyed by
(seed, image index), so the same seed and image index give the same image whatever the batch, the slot and the
neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.files import read_dataclass
from dvq_rt.labels import whole
from dvq_rt.layout import HEADS
from runtimes.errors import InputError, short

POSITIONS = ("ordered", "drawn")

# Outside these bounds logits overflow in float32; within them they do not.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
MIN_TOP_P = 1e-30
MAX_GUIDANCE = 1000.0
MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one image are drawn. The defaults draw from the model's own distribution.

    Args:
        temperature: divides the logits of both heads, in [1e-6, 1e6]; for the most probable token use ``top_k=1``.
        top_k: content codes are drawn among the ``top_k`` most probable ones, at least 1; None keeps all.
        top_p: content codes are drawn among the fewest most probable ones that hold this mass, in (0, 1].
        top_k_position: the same for the position head.
        top_p_position: the same for the position head.
        guidance: weight of the label against "no label", in [0, 1000]; 1 is the plain conditional model.
        positions: ``ordered`` visits the positions of the last segment in the order of training (where all of them
            are coded that leaves no choice), ``drawn`` lets the position head choose among the free ones.

    Raises:
        InputError: a value is not a number of the right kind, or out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    top_k_position: int | None = None
    top_p_position: float = 1.0
    guidance: float = 1.0
    positions: str = "ordered"

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (MIN_TEMPERATURE, MAX_TEMPERATURE, f"in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]"),
            "top_p": (MIN_TOP_P, 1.0, "in (0, 1]"),
            "top_p_position": (MIN_TOP_P, 1.0, "in (0, 1]"),
            "guidance": (0.0, MAX_GUIDANCE, f"in [0, {MAX_GUIDANCE:g}]"),
        }
        for name, (low, high, words) in bounds.items():
            value: Any = getattr(self, name)
            number = math.nan
            if isinstance(value, Real) and not isinstance(value, bool):
                with suppress(OverflowError):  # of an integer that is too large for a float
                    number = float(value)
            if not low <= number <= high:  # NaN fails this too
                raise InputError(f"{name} is {short(value)}; it must be a number {words}")
            object.__setattr__(self, name, number)
        for name in ("top_k", "top_k_position"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(name, value, 1, MAX_TOP_K))
        if not isinstance(self.positions, str) or self.positions not in POSITIONS:
            raise InputError(f"positions is {short(self.positions)}; it must be one of {POSITIONS}")
        object.__setattr__(self, "positions", str(self.positions))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters from named values; fields that are left out keep their defaults.

        Raises:
            InputError: a name is unknown, or a value is of the wrong type or out of its range.
        """
        return read_dataclass(cls, values, "sampling parameters", defaults=True, error=InputError)


def uniforms(seed: int, image: int, length: int) -> NDArray[np.float32]:
    """The random numbers of one image.

    The number of step ``t`` and head ``h`` depends on (seed, image, t, h) alone: a longer table starts with the
    shorter one. Every number is a multiple of 2**-24, so it is exact in float32 and less than 1.

    Args:
        seed: 0 to 2**64 - 1.
        image: index of the image among those of the seed, 0 to 2**63 - 1.
        length: number of steps, 0 or more.

    Returns:
        float32 [length, 2] in [0, 1): column 0 for the position head, column 1 for the content head.

    Raises:
        InputError: an argument is not an integer or out of its range.
    """
    key = [whole("seed", seed, 0, 2**64 - 1), whole("image", image, 0, 2**63 - 1)]
    steps = whole("length", length, 0, 2**40)
    raw = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(steps * len(HEADS))
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(steps, len(HEADS))
