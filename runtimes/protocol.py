"""What a backend offers: programs, device buffers, a program bound to buffers. Nothing of images or tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Files = Mapping[str, Mapping[str, Any]]
"""``{"sha256", "bytes"}`` by file name, as a manifest lists them."""


class TensorSpec(NamedTuple):
    """A tensor's number format, by numpy's name, and its sizes; one that may be any number is a name or None."""

    dtype: str
    shape: tuple[int | str | None, ...]


class Buffer(Protocol):
    """A tensor that stays at one address on the device."""

    def write(self, values: Array) -> None:
        """Copy host values of the buffer's shape and dtype in."""

    def request(self) -> None:
        """Start copying the values after the last ``Binding.run`` to the host; the next ``read`` gives these. On a CPU
        nothing is copied, and the caller reads before they change."""

    def read(self) -> Array:
        """A host copy, or on a CPU a view, of the values asked for with ``request``, or else of those after the last
        ``Binding.run``."""


class Binding(Protocol):
    """A program with every input and output tied to a buffer."""

    def run(self) -> None:
        """Execute once; outputs are complete, or in order on the device, when this returns."""


class Bindable(Protocol):
    """What can be tied to buffers and run over and over."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Binding:
        """Tie all inputs and outputs to buffers of the program's device."""


class Program(Bindable, Protocol):
    """A loaded graph."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What it takes, by name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What it gives, by name."""

    def run(self, inputs: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Execute on host arrays; ``names`` of the outputs that are wanted, None for all."""


class Device(Protocol):
    """What gives out buffers."""

    poll: int
    """Steps to take before looking at a device value again: reading costs a synchronisation on a GPU."""

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """A zeroed buffer.

        Raises:
            BackendError: the device has no room for it.
        """


class Backend(Device, Protocol):
    """A device that runs graph files."""

    suffix: str
    """How the names of its graph files end."""

    def load(self, path: Path, files: Files | None = None, *, main: bool = False) -> Program:
        """Open a graph file: what is loaded is what was compared, or it is refused.

        Args:
            path: the file.
            files: what the manifest lists; the graph, and files beside it that it names, must be as listed. None
                compares nothing.
            main: marks the one program that runs in a tight loop.

        Raises:
            EngineError: a file is missing, or not as listed.
            BackendError: the bytes are no graph that this backend runs.
        """
