"""The interface of the step graph as one table: the traced example, the manifest, the loop's buffers and controls, the
PyTorch twin and the benchmarks all read it here. What each tensor means is told by ``training.step.Step``.

Roles: ``state`` goes in and comes out changed; ``cache`` likewise, in place; ``control`` goes in only; ``report`` comes
out only. The name of an output that continues an input is the input's with ``_out``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from runtimes.errors import ConfigError

STATE, CONTROL, REPORT, CACHE = "state", "control", "report", "cache"
SLOTS = "B"
OWN = "own"
"""An idle value: each slot's own number."""
Setting = Callable[[SamplingParams, TokenLayout], float]


@dataclass(frozen=True, slots=True)
class Port:
    """One tensor of the step.

    Attributes:
        name: of the input; of a report, of the output.
        role: ``state``, ``control``, ``report`` or ``cache``.
        dtype: numpy name.
        shape: sizes; ``B`` is the number of slots, and in ``PORTS`` other names are sizes of the layout.
        idle: value of a slot that draws nothing, or ``OWN``.
        setting: of a control that sampling parameters decide, its value for a slot.
        optional: whether engines may lack it, as those do that were exported before it was there.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...] = (SLOTS,)
    idle: float | bool | str = 0
    setting: Setting | None = None
    optional: bool = False

    @property
    def output(self) -> str:
        """Name of the output."""
        return self.name if self.role == REPORT else f"{self.name}_out"

    def sized(self, slots: int) -> tuple[int, ...]:
        """The shape with so many slots."""
        return tuple(slots if size == SLOTS else int(size) for size in self.shape)

    def idle_values(self, slots: int) -> NDArray[Any]:
        """The tensor of so many idle slots."""
        shape = self.sized(slots)
        return np.arange(slots, dtype=self.dtype) if self.idle == OWN else np.full(shape, self.idle, self.dtype)


PORTS: tuple[Port, ...] = (
    Port("content", STATE, "int64"),
    Port("position", STATE, "int64"),
    Port("length", STATE, "int32"),
    Port("done", STATE, "bool", idle=True),
    Port("cells", STATE, "int32", (SLOTS, "cells"), idle=-1),
    Port("phase", STATE, "int64", optional=True),
    Port("kind", STATE, "int64", optional=True),
    Port("reset", CONTROL, "bool", idle=False),
    Port("label", CONTROL, "int64"),
    Port("uniforms", CONTROL, "float32", (SLOTS, "length", 2)),
    Port("temperature", CONTROL, "float32", idle=1, setting=lambda p, _: p.temperature),
    Port("top_k", CONTROL, "int64", idle=1, setting=lambda p, lay: p.top_k or lay.content_vocabulary),
    Port("top_p", CONTROL, "float32", idle=1, setting=lambda p, _: p.top_p),
    Port(
        "top_k_position", CONTROL, "int64", idle=1, setting=lambda p, layout: p.top_k_position or layout.position_head
    ),
    Port("top_p_position", CONTROL, "float32", idle=1, setting=lambda p, _: p.top_p_position),
    Port("ordered", CONTROL, "bool", idle=True, setting=lambda p, _: p.positions == "ordered"),
    Port("partner", CONTROL, "int64", idle=OWN),
    Port("partner_weight", CONTROL, "float32", idle=1, setting=lambda p, _: p.guidance),
    Port("forced_position", CONTROL, "int64", idle=-1),
    Port("forced_content", CONTROL, "int64", idle=-1),
    Port("pinned", CONTROL, "int32", (SLOTS, "cells"), idle=-1, optional=True),
    Port("given", CONTROL, "int64", optional=True),
    Port("position_logits", REPORT, "float32", (SLOTS, "position")),
    Port("content_logits", REPORT, "float32", (SLOTS, "content")),
    Port("position_logprob", REPORT, "float32"),
    Port("content_logprob", REPORT, "float32"),
    Port("position_logmass", REPORT, "float32", optional=True),
    Port("content_logmass", REPORT, "float32", optional=True),
)
"""All but the caches, in the order of the graph's inputs and outputs."""
GIVEN_PORTS = ("phase", "kind", "given")
"""Those of models alone that were trained with what is kept first (``dvq_rt.editing.given_first``)."""

PROMPT_PORTS: tuple[Port, ...] = (
    Port("prefix", CONTROL, "float32", (SLOTS, "prompt", "width")),
    Port("prefix_length", CONTROL, "int32"),
)
"""What a model that reads prompts has beside them, before the caches."""


@dataclass(frozen=True, slots=True)
class StepTable:
    """The step of one model: ``PORTS`` with the sizes of its ``layout``, and its caches. ``prompt`` is the most tokens
    of a prompt, 0 where none are read."""

    layout: TokenLayout
    ports: tuple[Port, ...]
    prompt: int = 0

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        caches: int,
        heads: int,
        width: int,
        dtype: str = "float32",
        prompt: int = 0,
        given: bool = False,
    ) -> StepTable:
        """The table of a model.

        Args:
            layout: its token layout.
            caches: number of caches, two per transformer block.
            heads, width: attention heads, and numbers per head and token.
            dtype: of the caches.
            prompt: most tokens of a prompt.
            given: whether it has ``GIVEN_PORTS``.
        """
        shape = (SLOTS, heads, layout.max_length + prompt, width)
        ports = (p for p in _sized(layout, prompt, heads * width) if given or p.name not in GIVEN_PORTS)
        return cls(layout, (*ports, *(Port(f"cache_{i}", CACHE, dtype, shape) for i in range(caches))), prompt)

    def role(self, *roles: str) -> tuple[Port, ...]:
        """The tensors of some roles, in order."""
        return tuple(port for port in self.ports if port.role in roles)

    def has(self, name: str) -> bool:
        """Whether the step has a tensor; engines may lack the optional ones."""
        return any(port.name == name for port in self.ports)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self.role(STATE, CONTROL, CACHE)

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self.role(STATE, REPORT, CACHE)

    def settings(self, params: SamplingParams) -> dict[str, float]:
        """The controls that sampling parameters decide, by name, for one slot."""
        return {port.name: port.setting(params, self.layout) for port in self.ports if port.setting}

    def to_dict(self, slots: int | None = None) -> dict[str, Any]:
        """The interface as the manifest has it: ``inputs`` and ``outputs``, lists of {name, dtype, shape}, and
        ``caches``, pairs of names; ``slots`` is a graph's fixed number."""

        def spec(name: str, port: Port) -> dict[str, Any]:
            shape = [size if slots is None or size != SLOTS else slots for size in port.shape]
            return {"name": name, "dtype": port.dtype, "shape": shape}

        return {
            "inputs": [spec(port.name, port) for port in self.inputs],
            "outputs": [spec(port.output, port) for port in self.outputs],
            "caches": [[port.name, port.output] for port in self.role(CACHE)],
        }

    @classmethod
    def from_dict(cls, layout: TokenLayout, interface: Mapping[str, Any], prompt: int = 0) -> StepTable:
        """The table of an interface as ``to_dict`` gives it; ``prompt`` is the most tokens of a prompt.

        Raises:
            ConfigError: a tensor is missing, unknown, or of another kind than a step of this layout has.
        """
        names = {name for name, _ in interface["caches"]}
        there = {spec["name"] for side in ("inputs", "outputs") for spec in interface[side]}
        specs = {spec["name"]: spec for spec in interface["inputs"]}
        first = specs.get("content", {"shape": [SLOTS]})["shape"][0]
        caches = tuple(
            Port(name, CACHE, spec["dtype"], (SLOTS, *spec["shape"][1:]))
            for name, spec in specs.items()
            if name in names
        )
        width = max((int(port.shape[1]) * int(port.shape[3]) for port in caches if len(port.shape) == 4), default=0)
        sized = _sized(layout, prompt, width)
        own = (port for port in sized if not port.optional or {port.name, port.output} & there)
        table = cls(layout, (*own, *caches), prompt)
        wanted = table.to_dict(None if first == SLOTS else first)
        for side in ("inputs", "outputs"):
            have, want = (
                {spec["name"]: (spec["dtype"], list(spec["shape"])) for spec in values[side]}
                for values in (interface, wanted)
            )
            for name in [*want, *have]:
                if have.get(name) != want.get(name):
                    raise ConfigError(
                        f"step.{side}: {name} is {have.get(name, 'missing')}; a step of this layout has "
                        f"{want.get(name, 'no such tensor')}"
                    )
        return table


def _sized(layout: TokenLayout, prompt: int, width: int) -> list[Port]:
    """``PORTS`` with the sizes of a layout, and with a prompt ``PROMPT_PORTS``, of rows of ``width`` numbers."""
    sizes: dict[Any, int] = {
        "cells": layout.cells,
        "length": layout.max_length,
        "position": layout.position_head,
        "content": layout.content_vocabulary,
        "prompt": prompt,
        "width": width,
    }
    ports = (*PORTS, *PROMPT_PORTS) if prompt else PORTS
    return [replace(port, shape=tuple(sizes.get(size, size) for size in port.shape)) for port in ports]


def idle_inputs(ports: Sequence[Port], slots: int) -> dict[str, NDArray[Any]]:
    """Tensors of so many idle slots, by name."""
    return {port.name: port.idle_values(slots) for port in ports}
